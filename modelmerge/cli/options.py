"""Options that commands share, each declared once; options made from a method's dataclass; what every command prints.

Whatever is not named on the command line is None here: the defaults are the verbs' own.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal

import typer

from modelmerge.cli.output import Format, Sink, flag
from modelmerge.errors import UsageError
from modelmerge.methods.contract import Method, TransformSpec
from modelmerge.methods.options import bounds, option_types
from modelmerge.plan import presets

_FROM_ENVIRONMENT = ("--device",)
MERGE_PANEL = "What is merged, and how"
RUN_PANEL = "How it is run"
HUB_PANEL = "The Hugging Face Hub"
DATA_PANEL = "Images and their classes"
UNLABELLED_PANEL = "Unlabelled data of any kind"

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        help="What the experts were fine-tuned from, [NAME=]REF: a path or org/name@revision.",
        show_default=False,
    ),
]
Experts = Annotated[
    list[str], typer.Argument(metavar="EXPERT", help="The fine-tuned models, [NAME=]REF each.", show_default=False)
]
Output = Annotated[
    str, typer.Option("-o", "--output", help="Directory for the result.", metavar="DIR", rich_help_panel=RUN_PANEL)
]


OptionalOutput = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", help="With --recipe: directory for the result.", metavar="DIR", rich_help_panel=RUN_PANEL
    ),
]


def device(panel: str | None) -> Any:
    """The option that chooses a device, in a panel of the help page."""
    return typer.Option(
        envvar="MODELMERGE_DEVICE",
        help="cpu, cuda, cuda:1, or auto, the default; or the variable MODELMERGE_DEVICE.",
        show_default=False,
        show_envvar=False,
        metavar="NAME",
        rich_help_panel=panel,
    )


Device = Annotated[str, device(RUN_PANEL)]
DryRun = Annotated[
    bool,
    typer.Option(
        "-n", "--dry-run", help="Print the plan and stop: tensors, bytes, peak memory.", rich_help_panel=RUN_PANEL
    ),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace DIR.", rich_help_panel=RUN_PANEL)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Take up what an interrupted run finished.", rich_help_panel=RUN_PANEL)
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream", help="Read weights on the Hub tensor by tensor, without storing them.", rich_help_panel=HUB_PANEL
    ),
]
Push = Annotated[
    str | None,
    typer.Option(help="Push the result to org/name or org/name@branch.", metavar="REPO", rich_help_panel=HUB_PANEL),
]
Private = Annotated[
    bool, typer.Option("--private", help="With --push: a private repository.", rich_help_panel=HUB_PANEL)
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(
        help="Store floats as float32, float16 or bfloat16, not as the base does.",
        metavar="TYPE",
        rich_help_panel=MERGE_PANEL,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Take only tensors of such names. Repeatable.", metavar="GLOB", rich_help_panel=MERGE_PANEL),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave tensors of such names as the base has them. Repeatable.",
        metavar="GLOB",
        rich_help_panel=MERGE_PANEL,
    ),
]
OnMismatch = Annotated[
    Literal["error", "copy", "common-rows"] | None,
    typer.Option(
        help="Shapes differ: error (default), copy the base's tensor, or merge the common-rows of tables.",
        metavar="WHAT",
        rich_help_panel=MERGE_PANEL,
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(help="Largest output file, like 200MB. Default: 5GB.", metavar="SIZE", rich_help_panel=RUN_PANEL),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Seed of methods that draw at random. Default: 0.", metavar="N", rich_help_panel=MERGE_PANEL),
]
AsLora = Annotated[
    str | None,
    typer.Option(
        "--as-lora",
        help="Write a PEFT adapter: of this rank, or below 1 so large that it keeps this share.",
        metavar="RANK",
        rich_help_panel=MERGE_PANEL,
    ),
]
Weight = Annotated[
    list[str] | None,
    typer.Option(help="Weight of an expert, 1 by default. Repeatable.", metavar="NAME=W", rich_help_panel=MERGE_PANEL),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A published set with its settings, in place of BASE EXPERT...",
        metavar="NAME",
        autocompletion=lambda: list(presets.names()),
        rich_help_panel=RUN_PANEL,
        show_default=False,
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Repeat the merge of a modelmerge.json, or run a mergekit YAML.",
        rich_help_panel=RUN_PANEL,
    ),
]
At = Annotated[
    list[str] | None,
    typer.Option(
        help="Another method or values for some tensors: '*mlp*: kron scale=0.8 math.weight=0'. Repeatable.",
        metavar="'GLOB: ...'",
        rich_help_panel=MERGE_PANEL,
    ),
]
Disentangle = Annotated[
    list[str] | None,
    typer.Option(
        help="A transform of the task vectors first: awd, or 'awd alpha=0.2'. Repeatable, in order.",
        metavar="'METHOD ...'",
        rich_help_panel=MERGE_PANEL,
    ),
]
Rest = Annotated[
    str | None,
    typer.Option(
        help="The method for what a method for linear layers leaves; base copies.",
        metavar="METHOD",
        rich_help_panel=MERGE_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, whatever happens.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only the path, URL, names or figures.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Name every tensor.")]

ImageTask = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help="A published task, as eurosat or eurosat:motion_blur; clip8 are the papers' eight, clip8-ood the "
        "corrupted ones. Repeatable.",
        metavar="NAME[:SPLIT]",
        rich_help_panel=DATA_PANEL,
    ),
]
ImageData = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Images of your own: a folder with a folder for each class, parquet files, or org/name@revision on "
        "the Hub. Under a published task's name it has that task's classes and prompts. Repeatable.",
        metavar="[NAME=]DATA",
        rich_help_panel=DATA_PANEL,
    ),
]
ImageClasses = Annotated[
    list[str] | None,
    typer.Option(
        "--classes",
        help="Of --data: class names for the prompts, one in each line, or LABEL<tab>NAME; or JSON. Default: the "
        "data set's own. Repeatable.",
        metavar="[NAME=]FILE",
        rich_help_panel=DATA_PANEL,
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A prompt with {} for the class; the embeddings of several are averaged. Repeatable. Default: the "
        "task's, or 'a photo of a {}.'",
        metavar="TEXT",
        rich_help_panel=DATA_PANEL,
    ),
]
ImageSplit = Annotated[
    str | None,
    typer.Option("--split", help="With --data: the split. Default: test, or the only one.", rich_help_panel=DATA_PANEL),
]
ImageConfig = Annotated[
    str | None, typer.Option("--config", help="With --data: of data that have several.", rich_help_panel=DATA_PANEL)
]
ImageColumn = Annotated[
    str | None, typer.Option("--image-column", help="With --data: where it is not clear.", rich_help_panel=DATA_PANEL)
]
LabelColumn = Annotated[
    str | None, typer.Option("--label-column", help="With --data: where it is not clear.", rich_help_panel=DATA_PANEL)
]
Heads = Annotated[
    str | None,
    typer.Option(
        "--heads",
        help="A folder of text heads, TASK.safetensors: used where there, written where not. With them a vision "
        "tower needs no text tower. Default: the cache.",
        metavar="DIR",
        rich_help_panel=DATA_PANEL,
    ),
]
ImageLimit = Annotated[
    int | None,
    typer.Option("--limit", help="So many images of each task, drawn with --seed.", rich_help_panel=DATA_PANEL),
]


Script = Annotated[
    str | None,
    typer.Option(
        "--script",
        metavar="FILE:FUNCTION",
        help="For models that are not CLIP: a Python function that is given an expert (its name, path and base_path) "
        "and returns (module, inputs): a torch module that gives logits, with the checkpoint's names in its state "
        "dict, and unlabelled inputs, as tensors or as batches that can be iterated over again. Or "
        "package.module:FUNCTION.",
        rich_help_panel=UNLABELLED_PANEL,
    ),
]


def unlabelled(
    script: Script = None,
    task: ImageTask = None,
    data: ImageData = None,
    classes: ImageClasses = None,
    template: Template = None,
    split: ImageSplit = None,
    config: ImageConfig = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    heads: Heads = None,
    limit: ImageLimit = None,
) -> None:
    """What tells a method of unlabelled data; for its signature alone."""


def drawn(
    plot: Annotated[
        str | None,
        typer.Option("--plot", help="Draw the coefficients as a heatmap, as .svg, .png or .pdf.", metavar="FILE"),
    ] = None,
) -> None:
    """What a method takes that finds coefficients, besides its data; for its signature alone."""


def merged(
    weight: Weight = None,
    at: At = None,
    rest: Rest = None,
    disentangle: Disentangle = None,
    include: Include = None,
    exclude: Exclude = None,
    on_mismatch: OnMismatch = None,
    dtype: Dtype = None,
    as_lora: AsLora = None,
    seed: Seed = None,
) -> None:
    """What determines the weights of every merge, besides the method's options; for its signature alone."""


def written(
    max_shard_size: ShardSize = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    force: Force = False,
    resume: Resume = False,
    stream: Stream = False,
    push: Push = None,
    private: Private = False,
) -> None:
    """What every command takes that writes a directory; for its signature alone."""


def _printed(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """What every command takes; for its signature alone."""


def command(run: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """A Typer command with these parameters and the options of every command; `run` is called with a `Sink` first."""

    def called(**values: Any) -> None:
        json, quiet, verbose = (values.pop(name) for name in ("json", "quiet", "verbose"))
        if json and quiet:
            raise UsageError("--json and --quiet ask for different formats", hint="give one of them")
        form: Format = "json" if json else "quiet" if quiet else "human"
        run(Sink(form, verbose=verbose), **values)

    every = [*parameters, *shared(_printed)]
    called.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    called.__doc__ = run.__doc__
    return called


def of_method(method: Method | TransformSpec) -> list[inspect.Parameter]:
    """A keyword parameter for Typer for each field of the method's options."""
    types = option_types(method.options)
    parameters = []
    for spec in dataclasses.fields(method.options):
        optional = type(None) in typing.get_args(types[spec.name])
        limits = bounds(spec)
        words = f"{spec.metadata['help']} ({limits})" if limits else str(spec.metadata["help"])
        # A switch has no opposite: what is off by default is left out.
        names = [flag(spec.name)] if types[spec.name] is not bool or not spec.default else []
        declared = typer.Option(*names, help=words, show_default=not optional and types[spec.name] is not bool)
        parameters.append(_keyword(spec.name, Annotated[types[spec.name], declared], spec.default))
    return parameters


def in_help(parameter: inspect.Parameter, *, shown: bool) -> inspect.Parameter:
    """The parameter, among the first options of its help page or not on it."""
    kind, option = typing.get_args(parameter.annotation)
    option = copy.copy(option)
    option.hidden, option.rich_help_panel = not shown, None
    return parameter.replace(annotation=Annotated[kind, option])


def is_alone(context: typer.Context) -> bool:
    """Whether a verb stands without a method or suite.

    Raises:
        UsageError: It does not, and options stand before it, where nothing would heed them.
    """
    if context.invoked_subcommand is None:
        return True
    for name in (name for name in context.params if typed(context, name) and flag(name) not in _FROM_ENVIRONMENT):
        place = "stands before the method or suite"
        raise UsageError(f"{flag(name)} {place}", hint=f"put it after '{context.invoked_subcommand}'")
    return False


def typed(context: typer.Context, name: str) -> bool:
    """Whether the command line, or the environment, gives the option."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def of_values(method: Method | TransformSpec, values: Mapping[str, Any], names: AbstractSet[str]) -> dict[str, Any]:
    """The method's options among `names`; the others follow from these, or have their defaults."""
    return {name: values[name] for name in option_types(method.options) if name in names}


def argument(name: str, annotation: Any) -> inspect.Parameter:
    """A required parameter, or the context."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def shared(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function as keywords, with their annotations resolved."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [_keyword(p.name, hints[p.name], p.default) for p in parameters]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
