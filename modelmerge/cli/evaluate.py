"""`modelmerge eval SUITE MODEL...`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelmerge import evaluation
from modelmerge.cli import options as opt
from modelmerge.cli.bars import Bars
from modelmerge.cli.help import with_examples
from modelmerge.cli.output import Sink, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from modelmerge.charts import tables
    from modelmerge.evaluation import report as evaluation_report
    from modelmerge.verbs.render import Pictures

EXAMPLES = {
    "eval": ("modelmerge eval weights merged", "modelmerge eval lm merged --tasks gsm8k,ifeval --batch-size auto"),
    "weights": (
        "modelmerge eval weights merged                               (its modelmerge.json names base and experts)",
        "modelmerge eval weights ties apgd --base base --expert math --expert code=runs/9",
    ),
    "clip": (
        "modelmerge eval clip merged --task clip8 --base openai/clip-vit-base-patch32 --limit 500",
        "modelmerge eval clip merged --data svhn=images/svhn --data photos=images/photos --report today.html",
    ),
    "lm": (
        "modelmerge eval lm merged --tasks gsm8k,ifeval --batch-size auto",
        "modelmerge eval lm merged --tasks flan_t5_glue --expert cola --expert mnli --fail-under normalized=0.9",
    ),
    "custom": (
        "modelmerge eval custom merged --script metric.py:accuracy --json > today.json",
        "modelmerge eval custom merged --script metric.py:accuracy --compare today.json --fail-under avg=0.70",
    ),
    "report": (
        "modelmerge eval report today.json",
        "modelmerge eval report today.json --report today.html --plot bars.pdf",
    ),
}
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON
_picture_option = opt.in_panel("Pictures")

Models = Annotated[list[str], typer.Argument(
    metavar="MODEL", show_default=False,
    help="The models to evaluate, as [NAME=]REF each: a directory, a file, an adapter, or org/name@revision on "
    "the Hugging Face Hub.",
)]  # fmt: skip
Base = Annotated[str | None, typer.Option("--base", help="The model the experts were fine-tuned from.", metavar="REF")]
Expert = Annotated[
    list[str] | None, typer.Option("--expert", help="A fine-tuned model. Repeatable.", metavar="[NAME=]REF")
]
Globs = list[str] | None
Include = Annotated[Globs, typer.Option(help="Only tensors of such names. Repeatable.", metavar="GLOB")]
Exclude = Annotated[Globs, typer.Option(help="No tensors of such names. Repeatable.", metavar="GLOB")]
OnMismatch = Annotated[Literal["error", "copy", "common-rows"], typer.Option(
    help="Shapes differ: error, copy leaves the tensor out, common-rows looks at rows of tables that all have.",
)]  # fmt: skip
TaskExpert = Annotated[list[str] | None, typer.Option(
    "--expert", metavar="[TASK=]REF",
    help="Evaluate this expert too; scores at the task of its name are normalised by it. Repeatable.",
)]  # fmt: skip
NoCache = Annotated[bool, typer.Option("--no-cache", help="Measure again what was measured before.")]
Compare = Annotated[str | None, typer.Option(
    "--compare", metavar="FILE",
    help="Tell the differences to an earlier report, written by --json, and their significance.",
)]  # fmt: skip
FailUnder = Annotated[list[str] | None, typer.Option(
    "--fail-under", metavar="WHAT=LEAST",
    help="Exit with 1 if a MODEL has less: avg=70%, normalized=0.95 or TASK=0.8. Repeatable.",
)]  # fmt: skip
UpdateCard = Annotated[bool, typer.Option("--update-card", help="Write the scores into each MODEL's model card.")]
Plot = Annotated[str | None, _picture_option(
    "--plot", metavar="FILE",
    help="Draw a chart, as .svg, .png or .pdf: of scores, or of cosines as heatmaps.",
)]  # fmt: skip
Chart = Annotated[
    Literal["auto", "bars", "radar"],
    _picture_option(help="How --plot draws scores; auto: as a radar from 5 to 20 tasks."),
]
Report = Annotated[list[str] | None, _picture_option(
    "--report", metavar="FILE",
    help="Write the report: .html is a page with all of it, and charts; .md has the tables, for a pull request; .csv "
    "all figures. Repeatable.",
)]  # fmt: skip
BaseToo = Annotated[str | None, typer.Option("--base", help="Evaluate the base too; adapters need it.", metavar="REF")]

Device = Annotated[str, opt.device()]


def suites() -> typer.Typer:
    """`eval` and its suites."""
    summary = "Evaluate merged models: their weights beside the experts', or their scores at tasks. Alone: list suites."
    app = typer.Typer(
        rich_markup_mode="rich", invoke_without_command=True, help=with_examples(summary, EXAMPLES["eval"]),
        subcommand_metavar="SUITE MODEL...",
    )  # fmt: skip
    app.callback()(opt.command(_list, [opt.argument("context", typer.Context)]))
    for name, command in COMMANDS.items():
        app.command(name, help=with_examples(evaluation.summary(name), EXAMPLES[name]))(command)
    report = "Print a saved report again, or draw it; nothing is evaluated."
    app.command("report", help=with_examples(report, EXAMPLES["report"]))(opt.command(_render, opt.shared(_rendered)))
    return app


def _list(sink: Sink, context: typer.Context) -> None:
    if not opt.is_alone(context):
        return
    suites = [{"suite": name, "summary": evaluation.summary(name)} for name in evaluation.names()]
    grid = table(None, ["suite", ""], [[s["suite"], s["summary"]] for s in suites], words=2)
    line = "\nmodelmerge eval SUITE MODEL...      (SUITE --help for its options)"
    sink.result({"suites": suites}, quiet="\n".join(evaluation.names()), human=[grid, line])


Decompose = Annotated[bool, typer.Option(
    "--decompose/--no-decompose",
    help="Decompose matrices: subspace alignment, singular task interference, where APGD would arrive. Most "
    "of the time goes there.",
)]  # fmt: skip


def _of_weights(
    models: Models,
    base: Base = None,
    expert: Expert = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Tell the figures of each tensor too.")] = False,
    decompose: Decompose = True,
    include: Include = None,
    exclude: Exclude = None,
    on_mismatch: OnMismatch = "error",
    plot: Plot = None,
    page: Report = None,
    device: Device = "auto",
) -> None:
    """What `eval weights` takes; for its signature alone."""


def _weights(sink: Sink, models: list[str], plot: str | None, page: list[str] | None, **values: Any) -> None:
    from modelmerge.verbs.evaluate import evaluate
    from modelmerge.verbs.render import pictures_at

    pictures = pictures_at(plot, "auto", page)
    values |= {name: values[name] or () for name in ("include", "exclude")}
    experts = values.pop("expert") or ()
    with Bars(sink) as bars:
        report = evaluate(models, suite="weights", experts=experts, progress=bars, **values)
    _show(report, sink, pictures)


MetricScript = Annotated[str, typer.Option(
    "--script", metavar="FILE:FUNCTION",
    help="A Python function that is given a model and returns its score, or a mapping of tasks to scores. Or "
    "package.module:FUNCTION.",
)]  # fmt: skip
MetricTask = Annotated[
    list[str] | None,
    typer.Option("--task", help="Call FUNCTION(model, task) for this task. Repeatable.", metavar="NAME"),
]


def _custom(
    script: MetricScript,
    task: MetricTask = None,
    base: BaseToo = None,
    expert: TaskExpert = None,
    seed: Annotated[int, typer.Option(help="Seed of Python's, numpy's and torch's generators.")] = 0,
) -> None:
    """What `eval custom` takes besides; for its signature alone."""


ClipBase = Annotated[str | None, typer.Option(
    "--base", metavar="REF",
    help="A whole CLIP model: evaluated too, and completes vision towers and adapters.",
)]  # fmt: skip


def _clip(
    task: opt.ImageTask = None,
    data: opt.ImageData = None,
    classes: opt.ImageClasses = None,
    template: opt.Template = None,
    split: opt.ImageSplit = None,
    config: opt.ImageConfig = None,
    image_column: opt.ImageColumn = None,
    label_column: opt.LabelColumn = None,
    base: ClipBase = None,
    expert: TaskExpert = None,
    heads: opt.Heads = None,
    limit: opt.ImageLimit = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the images that --limit draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 64,
) -> None:
    """What `eval clip` takes besides; for its signature alone."""


LmTasks = Annotated[list[str] | None, typer.Option(
    "--tasks", metavar="NAME,...",
    help="Tasks, groups or tags of lm-evaluation-harness, or flan_t5_glue; * and ? stand for more. Default: "
    "all of --include-path. Repeatable, or with commas between.",
)]  # fmt: skip
TaskDirectory = Annotated[str | None, typer.Option(
    "--include-path", metavar="DIR",
    help="A directory of tasks of your own, as the harness's YAML files. Python code that they name will run.",
)]  # fmt: skip
LmMetric = Annotated[list[str] | None, typer.Option(
    "--metric", metavar="[TASK=]NAME",
    help="What the score is, such as acc_norm or exact_match,strict-match. Default: the task's first where "
    "more is better; all are in the JSON. Repeatable.",
)]  # fmt: skip
ComputeDtype = Annotated[
    Literal["auto", "float32", "float16", "bfloat16"],
    typer.Option(help="What the model computes in; auto: as it is stored."),
]
UnsafeCode = Annotated[bool, typer.Option(
    "--confirm-run-unsafe-code",
    help="Run tasks that execute code which the model writes: on this machine, as you.",
)]  # fmt: skip
LmExpert = Annotated[list[str] | None, typer.Option(
    "--expert", metavar="[TASK=]REF",
    help="Evaluate this expert too; scores at the task of its name are normalised by it (those at "
    "flan_t5_glue_cola by cola). Repeatable.",
)]  # fmt: skip


def _lm(
    task: LmTasks = None,
    include_path: TaskDirectory = None,
    limit: Annotated[
        float | None, typer.Option(help="So many items of each task, the first; below 1, this share.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples in front of each item. Default: the task's.")
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Items at a time, or auto.", metavar="N")] = "8",
    metric: LmMetric = None,
    dtype: ComputeDtype = "auto",
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put items as a conversation.")
    ] = False,
    confirm_run_unsafe_code: UnsafeCode = False,
    base: BaseToo = None,
    expert: LmExpert = None,
    seed: Annotated[int | None, typer.Option(help="In the place of the harness's own seeds.")] = None,
) -> None:
    """What `eval lm` takes besides; for its signature alone."""


def _shared(
    no_cache: NoCache = False,
    compare: Compare = None,
    fail_under: FailUnder = None,
    update_card: UpdateCard = False,
    plot: Plot = None,
    chart: Chart = "auto",
    page: Report = None,
    device: Device = "auto",
) -> None:
    """What every suite of scores takes; for its signature alone."""


_WORDS = {**opt.PLURALS, "script": "metric"}


def _scores(suite: str, declared: Callable[..., None]) -> Callable[..., None]:
    """The command of a suite that gives scores; `declared` has the suite's options."""
    parameters = opt.shared(declared)
    words = [parameter.name for parameter in parameters]

    def run(sink: Sink, **values: Any) -> None:
        from modelmerge.verbs.evaluate import evaluate
        from modelmerge.verbs.render import pictures_at

        pictures = pictures_at(values["plot"], values["chart"], values["page"])
        # What a suite's own code prints is no result.
        with Bars(sink) as bars, contextlib.redirect_stdout(sys.stderr):
            report = evaluate(
                values["models"], suite=suite, cache=not values["no_cache"], compare=values["compare"],
                fail_under=values["fail_under"] or (), update_card=values["update_card"], device=values["device"],
                progress=bars, **{_WORDS.get(word, word): values[word] for word in words if values[word] is not None},
            )  # fmt: skip
        _show(report, sink, pictures)
        _gate(report, sink)

    return opt.command(run, [opt.argument("models", Models), *parameters, *opt.shared(_shared)])


COMMANDS: dict[str, Callable[..., None]] = {
    "clip": _scores("clip", _clip),
    "custom": _scores("custom", _custom),
    "lm": _scores("lm", _lm),
    "weights": opt.command(_weights, opt.shared(_of_weights)),
}


def _rendered(
    report: Annotated[
        str, typer.Argument(metavar="REPORT", help="What eval SUITE ... --json wrote.", show_default=False)
    ],
    plot: Plot = None,
    chart: Chart = "auto",
    page: Report = None,
) -> None:
    """What `eval report` takes; for its signature alone."""


def _render(sink: Sink, report: str, plot: str | None, chart: Any, page: list[str] | None) -> None:
    from modelmerge.verbs.render import pictures_at, read

    pictures = pictures_at(plot, chart, page)
    _show(read(report), sink, pictures)


def _show(report: evaluation_report.Report, sink: Sink, pictures: Pictures) -> None:
    """Draw and print a report, whatever the suite."""
    from modelmerge.charts.tables import of_report
    from modelmerge.evaluation.conclusions import conclusion

    for file in pictures.write(report):
        sink.note(f"written: {file}")
    _summarise(report, sink)
    for note in report["notes"]:
        sink.note(note)
    if report["suite"] == "weights":
        figures = [
            f"{model}\t{expert}\t{'-' if pair['cosine'] is None else format(pair['cosine'], '.6f')}"
            for model, row in report["model"]["models"].items()
            for expert, pair in row["experts"].items()
        ]
    else:
        averages = [model["average"] for model in report["models"] if model["role"] == "model"]
        figures = ["n/a" if average is None else f"{average:.6g}" for average in averages]
    human = _printed(of_report(report, widest=_SHOWN_COSINES))
    human += ["", *conclusion(report)]
    if report["suite"] == "weights":
        human += [report["remark"], *(["--per-layer has each layer of each model."] if "tensors" not in report else [])]
    sink.result(report, quiet="\n".join(figures), human=human)


def _summarise(report: evaluation_report.Report, sink: Sink) -> None:
    """Put a report into the summary of a job of GitHub Actions, where this is one."""
    from modelmerge.verbs.render import append_summary

    if file := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            append_summary(report, Path(file))
        except OSError as error:
            sink.note(f"GITHUB_STEP_SUMMARY {file}: {error.strerror}: the job's summary lacks this report")


def _gate(report: evaluation_report.Report, sink: Sink) -> None:
    """Exit code 1 where a gate is not passed."""
    from modelmerge.evaluation.conclusions import verdicts

    for sentence in (failures := verdicts(report)):
        sink.failed(sentence)
    if failures:
        raise typer.Exit(1)


def _printed(grids: Sequence[tables.Table]) -> list[str | Text | Table]:
    """Tables for a terminal, with an empty line between them."""
    from rich.text import Text

    from modelmerge.charts.tables import Best

    lines: list[str | Text | Table] = []
    for each in grids:
        rows = [[Text(c, style="bold") if isinstance(c, Best) else c for c in row] for row in (*each.rows, *each.foot)]
        lines += [*([""] if lines else []), table(each.title, list(each.columns), rows, words=each.words)]
        lines += [Text(line, style="dim") for line in each.legend]
    return lines
