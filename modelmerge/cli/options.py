"""Options that commands share, each declared once, and options made from a method's dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from modelmerge.methods.contract import Disentangler, Method
from modelmerge.methods.options import bounds, option_types
from modelmerge.plan import presets

METHOD_PANEL = "Options of the method"
SHARED_PANEL = "Options of every merge"
PRINT_PANEL = "What is printed"
HUB_PANEL = "The Hugging Face Hub"
SEARCH_PANEL = "Search"
DATA_PANEL = "Images and their classes"
UNLABELLED_PANEL = "Unlabelled data of any kind"

Output = Annotated[
    str, typer.Option("-o", "--output", help="Directory for the result.", metavar="DIR", rich_help_panel=SHARED_PANEL)
]


def device(panel: str) -> Any:
    """The option that chooses a device, in a panel of the help page."""
    return typer.Option(
        envvar="MODELMERGE_DEVICE",
        help="cpu, cuda, cuda:1, or auto: a CUDA device if there is one.",
        metavar="NAME",
        rich_help_panel=panel,
    )


Device = Annotated[str, device(SHARED_PANEL)]
DryRun = Annotated[
    bool,
    typer.Option(
        "-n", "--dry-run", help="Print the plan and stop: tensors, bytes, peak memory.", rich_help_panel=SHARED_PANEL
    ),
]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace DIR.", rich_help_panel=SHARED_PANEL)]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep finished shards if interrupted; take up those of an interrupted run.",
        rich_help_panel=SHARED_PANEL,
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read weights on the Hub tensor by tensor, without storing them: for small disks.",
        rich_help_panel=HUB_PANEL,
    ),
]
Push = Annotated[
    str | None,
    typer.Option(
        help="Push the result to this repository, org/name or org/name@branch, made if there is none.",
        metavar="REPO",
        rich_help_panel=HUB_PANEL,
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="With --push: a private repository.", rich_help_panel=HUB_PANEL)
]
CreatePr = Annotated[
    bool,
    typer.Option("--create-pr", help="With --push: open a pull request instead.", rich_help_panel=HUB_PANEL),
]
CommitMessage = Annotated[
    str | None,
    typer.Option(help="With --push: the commit's first line.", metavar="TEXT", rich_help_panel=HUB_PANEL),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Store floating tensors so. Default: as the base does.", rich_help_panel=SHARED_PANEL),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Merge only tensors of such names. Repeatable.", metavar="GLOB", rich_help_panel=SHARED_PANEL),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Copy tensors of such names from the base. Repeatable.", metavar="GLOB", rich_help_panel=SHARED_PANEL
    ),
]
OnMismatch = Annotated[
    Literal["error", "copy", "common-rows"],
    typer.Option(
        help="What becomes of tensors whose shapes differ: copy takes the base's; common-rows merges the rows of "
        "embeddings and heads that all have.",
        rich_help_panel=SHARED_PANEL,
    ),
]
ShardSize = Annotated[
    str, typer.Option(help="Largest output file, like 5GB or 200MB.", metavar="SIZE", rich_help_panel=SHARED_PANEL)
]
Seed = Annotated[int, typer.Option(help="Seed of methods that draw at random.", rich_help_panel=SHARED_PANEL)]
AsLora = Annotated[
    str | None,
    typer.Option(
        "--as-lora",
        help="Write a PEFT adapter instead of a checkpoint: of this rank, or, below 1, keeping this share of each "
        "matrix's squared norm.",
        metavar="RANK|ENERGY",
        rich_help_panel=SHARED_PANEL,
    ),
]
Weight = Annotated[
    list[str] | None,
    typer.Option(help="Weight of an expert, 1 by default. Repeatable.", metavar="NAME=W", rich_help_panel=SHARED_PANEL),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help=f"In place of BASE EXPERT...: a published set, with the paper's settings where no option says otherwise. "
        f"{', '.join(presets.names())}.",
        metavar="NAME",
        autocompletion=lambda: list(presets.names()),
        rich_help_panel=SHARED_PANEL,
        show_default=False,
    ),
]
At = Annotated[
    list[str] | None,
    typer.Option(
        help='Another method or other values for tensors of such names: "*attn*: tsv-m", "*mlp*: scale=0.1,0.5", '
        '"*: math.weight=0.5". Repeatable; the first GLOB that matches decides.',
        metavar="GLOB: [METHOD] [OPTION=V[,V]] [NAME.OPTION=V]",
        rich_help_panel=SHARED_PANEL,
    ),
]
Search = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        help="Merge with each of these values, measure by --on, and keep the best: scale=0.1:1.0:0.1 (start, last, "
        "step), scale=0.2,0.5, reduce=sum,mean. Repeatable: all combinations. Of equal ones the first.",
        metavar="OPTION=VALUES",
        rich_help_panel=SEARCH_PANEL,
    ),
]
On = Annotated[
    list[str] | None,
    typer.Option(
        "--on",
        help="What --search measures with: custom:FILE:FUNCTION, clip:TASK or clip:DATA, lm:TASK; behind commas the "
        "settings of that suite in `eval`, as in clip:svhn,limit=500. clip and lm look at a validation split, or else "
        "at the training split; what a function looks at is its own. Repeatable: the mean over all tasks counts.",
        metavar="SUITE:WHAT[,SETTING=V...]",
        rich_help_panel=SEARCH_PANEL,
    ),
]
Disentangle = Annotated[
    str | None,
    typer.Option(
        help="Disentangle the task vectors first: apgd, awd. The same bits as through `modelmerge disentangle`.",
        metavar="METHOD",
        rich_help_panel=SHARED_PANEL,
    ),
]
Apgd = Annotated[
    bool,
    typer.Option(
        "--apgd",
        help="Short for --disentangle apgd --apgd-correction task: a correction for each task in front.",
        rich_help_panel=SHARED_PANEL,
    ),
]
Rest = Annotated[
    Literal["base", "average", "task-arithmetic"] | None,
    typer.Option(
        help="What becomes of tensors that a method for linear layers leaves: copied from the base, or merged so. "
        "Default: the method's own choice, told by --dry-run.",
        rich_help_panel=SHARED_PANEL,
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="The published algorithm, where the defaults differ; other options win.",
        rich_help_panel=METHOD_PANEL,
    ),
]
Form = Annotated[
    Literal["human", "json", "quiet"],
    typer.Option("--format", help="How results are printed.", rich_help_panel=PRINT_PANEL),
]
Json = Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=PRINT_PANEL)]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Short for --format quiet: the path or URL.", rich_help_panel=PRINT_PANEL),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Name every tensor in plans and results.", rich_help_panel=PRINT_PANEL)
]

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
        typer.Option(
            "--plot",
            help="Draw the coefficients as a heatmap, as .svg, .png or .pdf.",
            metavar="FILE",
            rich_help_panel=PRINT_PANEL,
        ),
    ] = None,
) -> None:
    """What a method is told that finds coefficients, besides its data; for its signature alone."""


def written(
    device: Device = "auto",
    stream: Stream = False,
    push: Push = None,
    private: Private = False,
    create_pr: CreatePr = False,
    commit_message: CommitMessage = None,
    dry_run: DryRun = False,
    force: Force = False,
    resume: Resume = False,
    form: Form = "human",
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """What every command takes that writes a directory; for its signature alone."""


def of_method(method: Method | Disentangler) -> list[inspect.Parameter]:
    """A keyword parameter for Typer for each field of the method's options."""
    types = option_types(method.options)
    made = []
    for spec in dataclasses.fields(method.options):
        optional = type(None) in typing.get_args(types[spec.name])
        declared = typer.Option(
            flag(spec.name), help=_told(spec), rich_help_panel=METHOD_PANEL, show_default=not optional
        )
        made.append(_keyword(spec.name, Annotated[types[spec.name], declared], spec.default))
    return made


def chosen(method: Method | Disentangler, values: Mapping[str, Any], context: typer.Context) -> dict[str, Any]:
    """The method's options as they were typed, over those of --published where that is asked for."""
    options = {spec: values[spec] for spec in option_types(method.options)}
    if not values.get("published"):
        return options
    given = {spec for spec in options if getattr(context.get_parameter_source(spec), "name", "") == "COMMANDLINE"}
    return options | {spec: value for spec, value in method.published.items() if spec not in given}


def of_front(name: str, method: Disentangler) -> list[inspect.Parameter]:
    """A parameter `--NAME-OPTION` for each option of a disentangler in front of a merge; None is: not given."""
    types = option_types(method.options)
    return [
        _keyword(
            front_word(name, spec.name),
            Annotated[
                types[spec.name] | None,
                typer.Option(
                    flag(front_word(name, spec.name)),
                    help=_told(spec) if spec.default is None else f"{_told(spec)} Default: {spec.default}.",
                    rich_help_panel=f"Options of --disentangle {name}",
                ),
            ],
            None,
        )
        for spec in dataclasses.fields(method.options)
    ]


def front_word(name: str, option: str) -> str:
    """The Python name of a disentangler's option in a merge command."""
    return f"{name}_{option}"


def flag(option: str) -> str:
    """An option as it is typed."""
    return "--" + option.replace("_", "-")


def _told(spec: dataclasses.Field[Any]) -> str:
    limits = bounds(spec)
    return f"{spec.metadata['help']} ({limits})" if limits else str(spec.metadata["help"])


def of_argument(name: str, annotation: Any) -> inspect.Parameter:
    """A required parameter, or the context."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)


def with_parameters(run: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The function, seen by Typer as one that has these parameters."""
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def shared(function: Any) -> list[inspect.Parameter]:
    """The parameters of a function as keywords, with their annotations resolved."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [_keyword(p.name, hints[p.name], p.default) for p in parameters]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
