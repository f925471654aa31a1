"""Options that commands share, each declared once; options made from a method's dataclass; what every command prints.

Whatever is not named on the command line is None here: the defaults are the verbs' own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal

import typer

from modelmerge.cli.output import Format, Sink, flag
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Method, TransformSpec
from modelmerge.methods.options import bounds, option_types
from modelmerge.plan import presets

# What Python calls an option that may come several times.
PLURALS = {"task": "tasks", "expert": "experts", "template": "templates", "metric": "metrics"}
_FROM_ENVIRONMENT = ("--device",)


def in_panel(title: str) -> Callable[..., Any]:
    """What declares an option in a panel of the help page."""
    return functools.partial(typer.Option, rich_help_panel=title)


def _offering(values: Callable[[], list[tuple[str, str]]]) -> Callable[[str], list[tuple[str, str]]]:
    """What a shell is offered for an option: those of the values, each with its help line, that begin as typed."""
    return lambda incomplete: [(value, line) for value, line in values() if value.startswith(incomplete)]


def _summaries(kind: str) -> list[tuple[str, str]]:
    return [(name, registry.summary(name, kind)) for name in registry.names(kind)]


_merge_option = in_panel("What is merged, and how")
_run_option = in_panel("How it is run")
_hub_option = in_panel("The Hugging Face Hub")
_image_option = in_panel("Images and their classes")
_data_option = in_panel("Unlabelled data of any kind")

Base = Annotated[str, typer.Argument(
    metavar="BASE", show_default=False,
    help="What the experts were fine-tuned from, [NAME=]REF: a path or org/name@revision.",
)]  # fmt: skip
Experts = Annotated[
    list[str], typer.Argument(metavar="EXPERT", help="The fine-tuned models, [NAME=]REF each.", show_default=False)
]
Layered = Annotated[list[str], typer.Argument(
    metavar="EXPERT", default_factory=list, show_default=False,
    help="Models, [NAME=]REF each; none where all layers are the base's.",
)]  # fmt: skip
Output = Annotated[str, _run_option("-o", "--output", help="Directory for the result.", metavar="DIR")]


OptionalOutput = Annotated[
    str | None, _run_option("-o", "--output", help="With --recipe: directory for the result.", metavar="DIR")
]


def device(option: Callable[..., Any] = typer.Option) -> Any:
    """The option that chooses a device, declared by `option`."""
    return option(
        envvar="MODELMERGE_DEVICE", metavar="NAME", show_default=False, show_envvar=False,
        help="auto (default), cpu, cuda, cuda:1; a merge: cuda:0,cuda:1, cuda:all. Or MODELMERGE_DEVICE.",
    )  # fmt: skip


Device = Annotated[str, device(_run_option)]
DryRun = Annotated[bool, _run_option("-n", "--dry-run", help="Print the plan and stop: tensors, bytes, peak memory.")]
Force = Annotated[bool, _run_option("-f", "--force", help="Replace DIR.")]
Resume = Annotated[bool, _run_option("--resume", help="Take up what an interrupted run finished.")]
Stream = Annotated[
    bool, _hub_option("--stream", help="Read weights on the Hub tensor by tensor, without storing them.")
]
Push = Annotated[str | None, _hub_option(help="Push the result to org/name or org/name@branch.", metavar="REPO")]
Private = Annotated[bool, _hub_option("--private", help="With --push: a private repository.")]
Dtype = Annotated[
    Literal["float64", "float32", "float16", "bfloat16"] | None,
    _merge_option(help="Store floats as float64, float32, float16 or bfloat16.", metavar="TYPE"),
]
Include = Annotated[
    list[str] | None, _merge_option(help="Take only tensors of such names. Repeatable.", metavar="GLOB")
]
Exclude = Annotated[
    list[str] | None,
    _merge_option(help="Leave tensors of such names as the base has them. Repeatable.", metavar="GLOB"),
]
OnMismatch = Annotated[Literal["error", "copy", "common-rows"] | None, _merge_option(
    metavar="WHAT",
    help="Shapes differ: error (default), copy the base's tensor, or merge the common-rows of tables.",
)]  # fmt: skip
Vocab = Annotated[str | None, _merge_option(
    metavar="NAME", help="Whose tokens embeddings and heads get: base, union, or an expert's.",
)]  # fmt: skip
FilesFrom = Annotated[str | None, _merge_option(
    metavar="NAME", help="Whose tokenizer and chat template: an expert's, or base's.",
)]  # fmt: skip
ShardSize = Annotated[
    str | None, _run_option(help="Largest file, like 200MB. Default: 5GB; one file stays one.", metavar="SIZE")
]
Seed = Annotated[int | None, _merge_option(help="Seed of methods that draw at random. Default: 0.", metavar="N")]
AsLora = Annotated[str | None, _merge_option(
    "--as-lora", metavar="RANK",
    help="Write a PEFT adapter: of this rank, or below 1 so large that it keeps this share.",
)]  # fmt: skip
Weight = Annotated[list[str] | None, _merge_option(
    metavar="NAME=W", help="Weight of an expert, 1 by default. Repeatable. Or balanced.",
)]  # fmt: skip
Preset = Annotated[str | None, _run_option(
    metavar="NAME", show_default=False,
    autocompletion=_offering(lambda: [(name, presets.load(name).summary) for name in presets.names()]),
    help="A published set with its settings, for BASE EXPERT...",
)]  # fmt: skip
RecipeFile = Annotated[
    str | None, _run_option("--recipe", metavar="FILE", help="Repeat a modelmerge.json, or run a mergekit YAML.")
]
Cluster = Annotated[str | None, _run_option(
    "--cluster", metavar="HOW", help="Share the work among processes: files, or ray[=ADDRESS].",
)]  # fmt: skip
Part = Annotated[str | None, _run_option(
    "--part", metavar="I/N", help="Write part I of N; the machines may share no files.",
)]  # fmt: skip
Finish = Annotated[list[str] | None, _run_option(
    "--finish", metavar="DIR", help="Put parts together, nothing else. Repeat it for each part.",
)]  # fmt: skip
DifferentBits = Annotated[bool, _run_option(
    "--allow-different-bits",
    help="With --recipe: other bits than FILE records will do.",
)]  # fmt: skip
At = Annotated[list[str] | None, _merge_option(
    metavar="'GLOB: ...'",
    help="Another method, values: '*mlp*: kron scale=0.8'. Repeatable.",
)]  # fmt: skip
Layers = Annotated[list[str] | None, _merge_option(
    metavar="NAME:A-B", help="Layers, in order: math:0-8, or merged 'math:0-8 code:2-10'.",
)]  # fmt: skip
Disentangle = Annotated[list[str] | None, _merge_option(
    metavar="'METHOD ...'", autocompletion=_offering(lambda: _summaries("transform")),
    help="A transform first, such as 'awd alpha=0.2'. Repeatable, in order.",
)]  # fmt: skip
Rest = Annotated[str | None, _merge_option(
    metavar="METHOD", help="What merges the rest of a method for linear layers; base copies.",
    autocompletion=_offering(lambda: [("base", "Copy the tensors from the base."), *_summaries("merge")]),
)]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, whatever happens.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only the path, URL, names or figures.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Name every tensor.")]

ImageTask = Annotated[list[str] | None, _image_option(
    "--task", metavar="NAME[:SPLIT]",
    help="A published task, as eurosat or eurosat:motion_blur; clip8 are the papers' eight, clip8-ood the "
    "corrupted ones. Repeatable.",
)]  # fmt: skip
ImageData = Annotated[list[str] | None, _image_option(
    "--data", metavar="[NAME=]DATA",
    help="Images of your own: a folder with a folder for each class, parquet files, or org/name@revision on "
    "the Hub. Under a published task's name it has that task's classes and prompts. Repeatable.",
)]  # fmt: skip
ImageClasses = Annotated[list[str] | None, _image_option(
    "--classes", metavar="[NAME=]FILE",
    help="Of --data: class names for the prompts, one in each line, or LABEL<tab>NAME; or JSON. Default: the "
    "data set's own. Repeatable.",
)]  # fmt: skip
Template = Annotated[list[str] | None, _image_option(
    "--template", metavar="TEXT",
    help="A prompt with {} for the class; the embeddings of several are averaged. Repeatable. Default: the "
    "task's, or 'a photo of a {}.'",
)]  # fmt: skip
ImageSplit = Annotated[
    str | None, _image_option("--split", help="With --data: the split. Default: test, or the only one.")
]
ImageConfig = Annotated[str | None, _image_option("--config", help="With --data: of data that have several.")]
ImageColumn = Annotated[str | None, _image_option("--image-column", help="With --data: where it is not clear.")]
LabelColumn = Annotated[str | None, _image_option("--label-column", help="With --data: where it is not clear.")]
Heads = Annotated[str | None, _image_option(
    "--heads", metavar="DIR",
    help="A folder of text heads, TASK.safetensors: used where there, written where not. With them a vision "
    "tower needs no text tower. Default: the cache.",
)]  # fmt: skip
ImageLimit = Annotated[int | None, _image_option("--limit", help="So many images of each task, drawn with --seed.")]


Script = Annotated[str | None, _data_option(
    "--script", metavar="FILE:FUNCTION",
    help="For models that are not CLIP: a Python function that is given an expert (its name, path and base_path) "
    "and returns (module, inputs): a torch module that gives logits, with the checkpoint's names in its state "
    "dict, and unlabelled inputs, as tensors or as batches that can be iterated over again. Or "
    "package.module:FUNCTION.",
)]  # fmt: skip


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


def chosen(
    within: Annotated[
        float | None,
        typer.Option(
            "--within",
            metavar="MINUTES",
            show_default=False,
            help="The best method that takes no longer than this on the device.",
        ),
    ] = None,
) -> None:
    """What `auto` takes besides; for its signature alone."""


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
    layers: Layers = None,
    rest: Rest = None,
    disentangle: Disentangle = None,
    include: Include = None,
    exclude: Exclude = None,
    on_mismatch: OnMismatch = None,
    vocab: Vocab = None,
    files_from: FilesFrom = None,
    dtype: Dtype = None,
    as_lora: AsLora = None,
    seed: Seed = None,
) -> None:
    """What determines the weights of every merge, besides the method's options; for its signature alone."""


def divided(cluster: Cluster = None, part: Part = None, finish: Finish = None) -> None:
    """How a merge is shared out, for its signature alone."""


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
    # `typing.get_type_hints` of Python 3.10 hides what is `Annotated` behind an `Optional` where the default is None.
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [_keyword(p.name, p.annotation, p.default) for p in parameters]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
