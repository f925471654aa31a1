"""`modelmerge eval SUITE MODEL...`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelmerge import evaluation
from modelmerge.cli import options as opt
from modelmerge.cli.merge import chosen_format, examples, sink_of
from modelmerge.cli.output import Bars, Sink, table

if TYPE_CHECKING:
    from rich.table import Table

    from modelmerge.charts import tables
    from modelmerge.evaluation import report as evaluation_report
    from modelmerge.verbs.render import Pictures

EXAMPLES = (
    "modelmerge eval                                              (lists the suites)",
    "modelmerge eval weights merged                               (its modelmerge.json names base and experts)",
    "modelmerge eval weights ties apgd --base base --expert math --expert code=runs/9",
    "modelmerge eval clip merged --task clip8 --base openai/clip-vit-base-patch32 --limit 500",
    "modelmerge eval clip merged --data svhn=images/svhn --data photos=images/photos --limit 500",
    "modelmerge eval lm merged --tasks gsm8k,ifeval --batch-size auto",
    "modelmerge eval lm merged --tasks flan_t5_glue --expert cola --expert mnli --fail-under normalized=0.9",
    "modelmerge eval custom merged --script metric.py:accuracy",
    "modelmerge eval custom ties apgd --script metric.py:accuracy --base base --expert svhn --expert mnist",
    "modelmerge eval custom merged --script metric.py:accuracy --json > today.json",
    "modelmerge eval custom merged --script metric.py:accuracy --compare today.json --fail-under avg=0.70",
    "modelmerge eval clip merged --task clip8 --base base --report today.html --plot radar.svg",
    "modelmerge eval report today.json --report today.html --plot bars.pdf --chart bars",
)
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON
_PANEL = "Options of the suite"
_PICTURES = "Pictures"

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="The models to evaluate, as [NAME=]REF each: a directory, a file, an adapter, or org/name@revision on "
        "the Hugging Face Hub.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="The model the experts were fine-tuned from.", metavar="REF", rich_help_panel=_PANEL),
]
Expert = Annotated[
    list[str] | None,
    typer.Option("--expert", help="A fine-tuned model. Repeatable.", metavar="[NAME=]REF", rich_help_panel=_PANEL),
]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Short for --format quiet: figures alone.", rich_help_panel=opt.PRINT_PANEL),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Look at tensors of such names only. Repeatable.", metavar="GLOB", rich_help_panel=_PANEL),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Leave out tensors of such names. Repeatable.", metavar="GLOB", rich_help_panel=_PANEL),
]


OnMismatch = Annotated[
    Literal["error", "copy", "common-rows"],
    typer.Option(
        help="What becomes of tensors whose shapes differ: copy leaves them out; common-rows looks at the rows of "
        "embeddings and heads that all have.",
        rich_help_panel=_PANEL,
    ),
]
TaskExpert = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        help="Evaluate this expert too; scores at the task of its name are normalised by it. Repeatable.",
        metavar="[TASK=]REF",
        rich_help_panel=_PANEL,
    ),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Measure again what was measured before.", rich_help_panel=_PANEL),
]
Compare = Annotated[
    str | None,
    typer.Option(
        "--compare",
        help="Tell the differences to an earlier report, written by --json, and their significance.",
        metavar="FILE",
        rich_help_panel=_PANEL,
    ),
]
FailUnder = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-under",
        help="Exit with 1 if a MODEL has less: avg=0.70, normalized=0.95 or TASK=0.8. Repeatable.",
        metavar="WHAT=LEAST",
        rich_help_panel=_PANEL,
    ),
]
UpdateCard = Annotated[
    bool,
    typer.Option("--update-card", help="Write the scores into each MODEL's model card.", rich_help_panel=_PANEL),
]


Plot = Annotated[
    str | None,
    typer.Option(
        "--plot",
        help="Draw a chart, as .svg, .png or .pdf: of scores, or of cosines as heatmaps.",
        metavar="FILE",
        rich_help_panel=_PICTURES,
    ),
]
Chart = Annotated[
    Literal["auto", "bars", "radar"],
    typer.Option(
        "--chart", help="How --plot draws scores; auto: as a radar from 5 to 20 tasks.", rich_help_panel=_PICTURES
    ),
]
Report = Annotated[
    str | None,
    typer.Option(
        "--report",
        help="Write all of it as one HTML page, with charts, that needs no network.",
        metavar="FILE",
        rich_help_panel=_PICTURES,
    ),
]


BaseToo = Annotated[
    str | None,
    typer.Option("--base", help="Evaluate the base too; adapters need it.", metavar="REF", rich_help_panel=_PANEL),
]

Device = Annotated[str, opt.device(_PANEL)]


def add_suites(app: typer.Typer) -> None:
    """Add `eval` and its suites to the application."""
    made = typer.Typer(
        rich_markup_mode="rich", invoke_without_command=True, epilog=examples(EXAMPLES),
        subcommand_metavar="SUITE MODEL...",
    )  # fmt: skip
    made.callback()(_list)
    for name, command in COMMANDS.items():
        made.command(name, help=evaluation.summary(name), epilog=examples(EXAMPLES))(command)
    made.command("report", epilog=examples(EXAMPLES))(_render)
    app.add_typer(made, name="eval")


def _list(context: typer.Context, form: opt.Form = "human", json: opt.Json = False, quiet: Quiet = False) -> None:
    """Evaluate merged models: their weights beside the experts', or their scores at tasks.

    Without a suite, list what there is.
    """
    if context.invoked_subcommand is not None:
        return
    listed = [{"suite": name, "summary": evaluation.summary(name)} for name in evaluation.names()]
    Sink(chosen_format(form, json, quiet)).result(
        {"suites": listed},
        quiet="\n".join(evaluation.names()),
        human=[
            table(None, ["suite", ""], [[s["suite"], s["summary"]] for s in listed], left=2),
            "\nmodelmerge eval SUITE MODEL...      (SUITE --help for its options)",
        ],
    )


def _weights(
    models: Models,
    base: Base = None,
    expert: Expert = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Tell the figures of each tensor too.", rich_help_panel=_PANEL)
    ] = False,
    decompose: Annotated[
        bool,
        typer.Option(
            "--decompose/--no-decompose",
            help="Decompose matrices: subspace alignment, singular task interference, where APGD would arrive. Most "
            "of the time goes there.",
            rich_help_panel=_PANEL,
        ),
    ] = True,
    include: Include = None,
    exclude: Exclude = None,
    on_mismatch: OnMismatch = "error",
    plot: Plot = None,
    page: Report = None,
    device: Device = "auto",
    form: opt.Form = "human",
    json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    from modelmerge.verbs.evaluate import evaluate
    from modelmerge.verbs.render import pictures_at

    pictures = pictures_at(plot, "auto", page)
    sink = Sink(chosen_format(form, json, quiet))
    with Bars(sink) as bars:
        report = evaluate(
            models, suite="weights", base=base, experts=expert or (), per_layer=per_layer, decompose=decompose,
            include=include or (), exclude=exclude or (), on_mismatch=on_mismatch, device=device, reporter=bars,
        )  # fmt: skip
    _draw(pictures, report, sink)
    _tell(report, sink)


def _custom(
    script: Annotated[
        str,
        typer.Option(
            "--script",
            metavar="FILE:FUNCTION",
            help="A Python function that is given a model and returns its score, or a mapping of tasks to scores. Or "
            "package.module:FUNCTION.",
            rich_help_panel=_PANEL,
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Call FUNCTION(model, task) for this task. Repeatable.",
            metavar="NAME",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    base: BaseToo = None,
    expert: TaskExpert = None,
    seed: Annotated[
        int, typer.Option(help="Seed of Python's, numpy's and torch's generators.", rich_help_panel=_PANEL)
    ] = 0,
) -> dict[str, Any]:
    return {"metric": script, "tasks": task or (), "base": base, "experts": expert or (), "seed": seed}


def _clip(
    task: opt.ImageTask = None,
    data: opt.ImageData = None,
    classes: opt.ImageClasses = None,
    template: opt.Template = None,
    split: opt.ImageSplit = None,
    config: opt.ImageConfig = None,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="A whole CLIP model: evaluated too, and completes vision towers and adapters.",
            metavar="REF",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    expert: TaskExpert = None,
    heads: opt.Heads = None,
    limit: opt.ImageLimit = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the images that --limit draws.", rich_help_panel=_PANEL)] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.", rich_help_panel=_PANEL)] = 64,
) -> dict[str, Any]:
    return {
        "tasks": task or (), "data": data or (), "classes": classes or (), "templates": template or (), "split": split,
        "config": config, "image_column": image_column, "label_column": label_column, "base": base,
        "experts": expert or (), "heads": heads, "limit": limit, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip


def _lm(
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks, groups or tags of lm-evaluation-harness, or flan_t5_glue; * and ? stand for more. Default: "
            "all of --include-path. Repeatable, or with commas between.",
            metavar="NAME,...",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    include_path: Annotated[
        str | None,
        typer.Option(
            "--include-path",
            help="A directory of tasks of your own, as the harness's YAML files. Python code that they name will run.",
            metavar="DIR",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="So many items of each task, the first; below 1, this share.", rich_help_panel=_PANEL),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", help="Solved examples in front of each item. Default: the task's.", rich_help_panel=_PANEL
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Items at a time, or auto.", metavar="N", rich_help_panel=_PANEL)
    ] = "8",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="What the score is, such as acc_norm or exact_match,strict-match. Default: the task's first where "
            "more is better; all are in the JSON. Repeatable.",
            metavar="[TASK=]NAME",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="What the model computes in; auto: as it is stored.", rich_help_panel=_PANEL),
    ] = "auto",
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put items as a conversation, as chat models want.", rich_help_panel=_PANEL
        ),
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            help="Run tasks that execute code which the model writes: on this machine, as you.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    base: BaseToo = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            help="Evaluate this expert too; scores at the task of its name are normalised by it (those at "
            "flan_t5_glue_cola by cola). Repeatable.",
            metavar="[TASK=]REF",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="In the place of the harness's own seeds.", rich_help_panel=_PANEL)
    ] = None,
) -> dict[str, Any]:
    names = [name for told in task or () for name in told.split(",") if name]
    return {
        "tasks": names, "include_path": include_path, "limit": limit, "num_fewshot": num_fewshot,
        "batch_size": batch_size, "dtype": dtype, "apply_chat_template": apply_chat_template,
        "confirm_run_unsafe_code": confirm_run_unsafe_code, "metrics": metric or (), "base": base,
        "experts": expert or (), "seed": seed,
    }  # fmt: skip


def _shared(
    no_cache: NoCache = False,
    compare: Compare = None,
    fail_under: FailUnder = None,
    update_card: UpdateCard = False,
    plot: Plot = None,
    chart: Chart = "auto",
    page: Report = None,
    device: Device = "auto",
    form: opt.Form = "human",
    json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    """What every suite of scores takes; for its signature alone."""


def _scores(suite: str, own: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """The command of a suite that gives scores. `own` declares the suite's options and hands them on by their names."""
    parameters = opt.shared(own)
    words = [parameter.name for parameter in parameters]

    def run(**values: Any) -> None:
        from modelmerge.verbs.evaluate import evaluate
        from modelmerge.verbs.render import pictures_at

        pictures = pictures_at(values["plot"], values["chart"], values["page"])
        sink = sink_of(values)
        # What a suite's own code prints is no result.
        with Bars(sink) as bars, contextlib.redirect_stdout(sys.stderr):
            report = evaluate(
                values["models"], suite=suite, cache=not values["no_cache"], compare=values["compare"],
                fail_under=values["fail_under"] or (), update_card=values["update_card"], device=values["device"],
                reporter=bars, **own(**{word: values[word] for word in words}),
            )  # fmt: skip
        _draw(pictures, report, sink)
        _tell(report, sink)
        _gate(report, sink)

    return opt.with_parameters(run, [opt.of_argument("models", Models), *parameters, *opt.shared(_shared)])


COMMANDS: dict[str, Callable[..., None]] = {
    "clip": _scores("clip", _clip),
    "custom": _scores("custom", _custom),
    "lm": _scores("lm", _lm),
    "weights": _weights,
}


def _render(
    report: Annotated[
        str, typer.Argument(metavar="REPORT", help="What eval SUITE ... --json wrote.", show_default=False)
    ],
    plot: Plot = None,
    chart: Chart = "auto",
    page: Report = None,
    form: opt.Form = "human",
    json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a saved report again, or draw it; nothing is evaluated."""
    from modelmerge.verbs.render import pictures_at, read

    pictures = pictures_at(plot, chart, page)
    sink = Sink(chosen_format(form, json, quiet))
    told = read(report)
    _draw(pictures, told, sink)
    _tell(told, sink)


def _draw(pictures: Pictures, report: evaluation_report.Report, sink: Sink) -> None:
    for file in pictures.write(report):
        sink.note(f"drawn: {file}")


def _tell(report: evaluation_report.Report, sink: Sink) -> None:
    """Print a report, whatever the suite."""
    from modelmerge.charts.tables import of_report

    for note in report["notes"]:
        sink.note(note)
    if report["suite"] == "weights":
        figures = [
            f"{model}\t{expert}\t{'-' if told['cosine'] is None else format(told['cosine'], '.6f')}"
            for model, figures in report["model"]["models"].items()
            for expert, told in figures["experts"].items()
        ]
    else:
        averages = [model["average"] for model in report["models"] if model["role"] == "model"]
        figures = ["n/a" if average is None else f"{average:.6g}" for average in averages]
    human = _printed(of_report(report, widest=_SHOWN_COSINES))
    human += [f"\n{report['remark']}"] if report["suite"] == "weights" else []
    sink.result(report, quiet="\n".join(figures), human=human)


def _gate(report: evaluation_report.Report, sink: Sink) -> None:
    """Exit code 1 where a gate is not passed."""
    failures = report["gate"]["failures"] if report["suite"] != "weights" and "gate" in report else []
    for failure in failures:
        value = "n/a" if failure["value"] is None else f"{failure['value']:.4g}"
        sink.failed(f"'{failure['model']}' has {value}, and --fail-under asks for {failure['gate']}")
    if failures:
        raise typer.Exit(1)


def _printed(told: Sequence[tables.Table]) -> list[str | Table]:
    """Tables for a terminal, with an empty line between them."""
    from rich.text import Text

    from modelmerge.charts.tables import Best

    lines: list[str | Table] = []
    for each in told:
        rows = [[Text(c, style="bold") if isinstance(c, Best) else c for c in row] for row in (*each.rows, *each.foot)]
        lines += [*([""] if lines else []), table(each.title, list(each.columns), rows, left=each.words)]
    return lines
