"""`modelmerge eval SUITE MODEL...`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelmerge import suites
from modelmerge.cli import options as opt
from modelmerge.cli.merge import chosen_format, examples, sink_of
from modelmerge.cli.output import Bars, Sink, table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

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
)
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON
_PANEL = "Options of the suite"

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="The models to evaluate, as [NAME=]REF each: a directory, a file, an adapter, or org/name[@revision] on "
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


BaseToo = Annotated[
    str | None,
    typer.Option("--base", help="Evaluate the base too; adapters need it.", metavar="REF", rich_help_panel=_PANEL),
]

Device = Annotated[
    str,
    typer.Option(
        envvar="MODELMERGE_DEVICE",
        help="cpu, cuda, cuda:1, or auto: a CUDA device if there is one.",
        metavar="NAME",
        rich_help_panel=_PANEL,
    ),
]


def add_suites(app: typer.Typer) -> None:
    """Add `eval` and its suites to the application."""
    made = typer.Typer(
        rich_markup_mode="rich", invoke_without_command=True, epilog=examples(EXAMPLES),
        subcommand_metavar="SUITE MODEL...",
    )  # fmt: skip
    made.callback()(_list)
    for name, command in COMMANDS.items():
        made.command(name, help=suites.summary(name), epilog=examples(EXAMPLES))(command)
    app.add_typer(made, name="eval")


def _list(context: typer.Context, form: opt.Form = "human", json: opt.Json = False, quiet: Quiet = False) -> None:
    """Evaluate merged models: their weights beside the experts', or their scores at tasks.

    Without a suite, list what there is.
    """
    if context.invoked_subcommand is not None:
        return
    listed = [{"suite": name, "summary": suites.summary(name)} for name in suites.names()]
    Sink(chosen_format(form, json, quiet)).result(
        {"suites": listed},
        quiet="\n".join(suites.names()),
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
    device: Device = "auto",
    form: opt.Form = "human",
    json: opt.Json = False,
    quiet: Quiet = False,
) -> None:
    from modelmerge.verbs.evaluate import evaluate_weights

    sink = Sink(chosen_format(form, json, quiet))
    with Bars(sink) as bars:
        report = evaluate_weights(
            models, base=base, experts=expert or (), per_layer=per_layer, decompose=decompose, include=include or (),
            exclude=exclude or (), on_mismatch=on_mismatch, device=device, reporter=bars,
        )  # fmt: skip
    for note in report["notes"]:
        sink.note(note)
    cosines = [
        f"{model}\t{expert}\t{'-' if told['cosine'] is None else format(told['cosine'], '.6f')}"
        for model, figures in report["model"]["models"].items()
        for expert, told in figures["experts"].items()
    ]
    sink.result(report, quiet="\n".join(cosines), human=_told(report))


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
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="A published task, as eurosat or eurosat:motion_blur; clip8 are the papers' eight, clip8-ood the "
            "corrupted ones. Repeatable.",
            metavar="NAME[:SPLIT]",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Images of your own: a folder with a folder for each class, parquet files, or org/name[@revision] on "
            "the Hub. Under a published task's name it has that task's classes and prompts. Repeatable.",
            metavar="[NAME=]DATA",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            help="Of --data: class names for the prompts, one in each line, or LABEL<tab>NAME; or JSON. Default: the "
            "data set's own. Repeatable.",
            metavar="[NAME=]FILE",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template",
            help="A prompt with {} for the class; the embeddings of several are averaged. Repeatable. Default: the "
            "task's, or 'a photo of a {}.'",
            metavar="TEXT",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="With --data: the split. Default: test, or the only one.", rich_help_panel=_PANEL),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", help="With --data: of data that have several.", rich_help_panel=_PANEL)
    ] = None,
    image_column: Annotated[
        str | None, typer.Option("--image-column", help="With --data: where it is not clear.", rich_help_panel=_PANEL)
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="With --data: where it is not clear.", rich_help_panel=_PANEL)
    ] = None,
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
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            help="A folder of text heads, TASK.safetensors: used where there, written where not. With them a vision "
            "tower alone can be evaluated. Default: the cache.",
            metavar="DIR",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="So many images of each task, drawn with --seed.", rich_help_panel=_PANEL),
    ] = None,
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
        from modelmerge.verbs.evaluate import SUITES

        sink = sink_of(values)
        # What a suite's own code prints is no result.
        with Bars(sink) as bars, contextlib.redirect_stdout(sys.stderr):
            report = SUITES[suite](
                values["models"], cache=not values["no_cache"], compare=values["compare"],
                fail_under=values["fail_under"] or (), update_card=values["update_card"], device=values["device"],
                reporter=bars, **own(**{word: values[word] for word in words}),
            )  # fmt: skip
        _finish(report, sink)

    return opt.with_parameters(run, [opt.of_argument("models", Models), *parameters, *opt.shared(_shared)])


COMMANDS: dict[str, Callable[..., None]] = {
    "clip": _scores("clip", _clip),
    "custom": _scores("custom", _custom),
    "lm": _scores("lm", _lm),
    "weights": _weights,
}


def _finish(report: dict[str, Any], sink: Sink) -> None:
    """Print a report of scores, whatever the suite; exit code 1 where a gate is not passed."""
    for note in report["notes"]:
        sink.note(note)
    averages = [_plain(model["average"]) for model in report["models"] if model["role"] == "model"]
    sink.result(report, quiet="\n".join(averages), human=_scored(report))
    failures = report.get("gate", {}).get("failures", [])
    for failure in failures:
        value = "n/a" if failure["value"] is None else f"{failure['value']:.4g}"
        sink.failed(f"'{failure['model']}' has {value}, and --fail-under asks for {failure['gate']}")
    if failures:
        raise typer.Exit(1)


def _scored(report: dict[str, Any]) -> list[str | Table]:
    tasks, models = report["tasks"], report["models"]
    # Shares are told in per cent.
    share = all(0.0 <= told["score"] <= 1.0 for told in _known(models))
    lower = [task for task in tasks if models[0]["scores"][task].get("lower")]
    normalised = any(model["normalised"] is not None for model in models)
    best = {
        task: _best(models, [model["scores"][task]["score"] for model in models], least=task in lower) for task in tasks
    }
    best_average = _best(models, [model["average"] for model in models])
    best_normalised = _best(models, [model["normalised"] for model in models])
    rows: list[list[str | Text]] = []
    for model in models:
        told = model["scores"]
        row: list[str | Text] = [model["name"] if model["role"] == "model" else f"{model['role']} {model['name']}"]
        row += [_cell(told[task]["score"], told[task]["stderr"], share, bold=model is best[task]) for task in tasks]
        row.append(_cell(model["average"], model["average_stderr"], share, bold=model is best_average))
        if normalised:
            row.append(_cell(model["normalised"], None, share=True, bold=model is best_normalised))
        rows.append(row)
    columns = [
        "",
        *(f"{task} (less is better)" if task in lower else task for task in tasks),
        "average",
        *(["normalised"] if normalised else []),
    ]
    counts = {task: [model["scores"][task]["count"] for model in models] for task in tasks}
    if all(each == own[0] and each is not None for own in counts.values() for each in own):
        rows.append(["items", *(f"{own[0]:,}" for own in counts.values()), *[""] * (1 + normalised)])
    metrics = {model["scores"][task]["metric"] for model in models for task in tasks}
    title = (
        f"{', '.join(sorted(metrics))}{', per cent' if share else ''}{', ± standard error' if _errors(models) else ''}"
    )
    lines: list[str | Table] = [table(title[0].upper() + title[1:], columns, rows)]
    if "comparison" in report:
        lines += _differences(report["comparison"], share)
    return lines


def _known(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [score for model in models for score in model["scores"].values() if score["score"] is not None]


def _plain(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.6g}"


def _errors(models: list[dict[str, Any]]) -> bool:
    return any(score["stderr"] is not None for model in models for score in model["scores"].values())


def _best(models: list[dict[str, Any]], values: list[float | None], *, least: bool = False) -> dict[str, Any] | None:
    """Of several models that are no base and no expert, the one with the largest value, or the least."""
    own = [(-value if least else value, i) for i, value in enumerate(values)
           if models[i]["role"] == "model" and value is not None]  # fmt: skip
    return models[max(own)[1]] if len(own) > 1 else None


def _cell(value: float | None, error: float | None, share: bool, *, bold: bool) -> str | Text:
    if value is None:
        return "n/a"
    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
    if error is not None:
        shown += f" ±{100 * error:.1f}" if share else f" ±{error:.2g}"
    from rich.text import Text

    return Text(shown, style="bold") if bold else shown


def _differences(comparison: dict[str, Any], share: bool) -> list[str | Table]:
    rows, unit = [], 100 if share else 1
    for pair in comparison["models"]:
        names = pair["model"] if pair["model"] == pair["other"] else f"{pair['model']} - {pair['other']}"
        for task, told in {**pair["tasks"], "average": pair["average"]}.items():
            error = "" if told["stderr"] is None else f"±{unit * told['stderr']:.2g}"
            p = "-" if told["p"] is None else "< 0.001" if told["p"] < 0.001 else f"{told['p']:.3f}"
            way = {True: "paired", False: "unpaired", None: ""}[told.get("paired")]
            difference = "n/a" if told["difference"] is None else f"{unit * told['difference']:+.3g}"
            rows.append([names, task, difference, error, p, way])
            names = ""
    title = f"Differences to {comparison['with']}" + (", percentage points" if share else "")
    return ["", table(title, ["", "task", "difference", "", "p", ""], rows, left=2)]


def _told(report: dict[str, Any]) -> list[str | Table]:
    model, kinds = report["model"], report["layer_types"]
    experts, models = list(model["experts"]["norms"]), list(model["models"])
    own = model["experts"]
    shown = experts if len(experts) <= _SHOWN_COSINES else []
    rows = [
        [name, _size(own["norms"][name]), _percent(own["relative_norms"][name]),
         *(_number(own["cosines"][i][experts.index(other)]) for other in shown)]
        for i, name in enumerate(experts)
    ]  # fmt: skip
    cosine = [f"cos {name}" for name in shown]
    lines: list[str | Table] = [table("Experts' task vectors", ["", "norm", "of the base's", *cosine], rows)]
    conflicts = [_conflicts(name, told["experts"]) for name, told in {"whole model": model, **kinds}.items()]
    lines += [
        "",
        table(
            "Conflicts between the experts",
            ["", "sign conflict", "minority signs", "mean |cos|", "after AWD", "interference", "APGD's start", "end"],
            conflicts,
        ),
        "",
        table("Merged models", ["", *models], _compared(model["models"], experts, report["models"])),
    ]
    for name in models:
        groups = {**kinds, **report.get("tensors", {})}
        table_rows = [_layer(kind, told["models"][name], experts) for kind, told in groups.items()]
        columns = ["", "norm", "APGD's gap", *(f"cos {expert}" for expert in shown), "mean cos", "mean alignment"]
        lines += ["", table(f"{name}, by layer", columns, [row if shown else _without(row) for row in table_rows])]
    lines.append(f"\n{report['remark']}")
    return lines


def _conflicts(name: str, told: Mapping[str, Any]) -> list[str]:
    interference, awd, apgd = (
        told[key] or {} for key in ("singular_task_interference", "awd_orthogonality", "apgd_gap")
    )
    return [
        name, _percent(told["sign_conflict"]), _percent(told["minority_sign_share"]), _number(awd.get("before")),
        _number(awd.get("after")), _number(interference.get("relative")), _number(apgd.get("start")),
        _number(apgd.get("solved")),
    ]  # fmt: skip


def _compared(models: Mapping[str, Any], experts: list[str], inputs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each figure, a column for each model."""
    told = list(models.values())
    measured = [model["measured_rounding"] for model in inputs]
    rounding = [
        _percent(exact) if exact is not None else _about(model["expected_rounding"])
        for exact, model in zip(measured, told, strict=True)
    ]
    rows = [
        ["norm", *(_size(model["norm"]) for model in told)],
        ["of the base's", *(_percent(model["relative_norm"]) for model in told)],
        ["lost to rounding", *rounding],
        ["APGD's gap (base: 1)", *(_number(model["apgd_gap"]) for model in told)],
    ]
    for label, key in (("cosine", "cosine"), ("distance", "relative_distance"), ("alignment", "subspace_alignment")):
        for expert in experts:
            rows.append([f"{label} {expert}", *(_number(model["experts"][expert][key]) for model in told)])
    return rows


def _layer(name: str, told: Mapping[str, Any], experts: list[str]) -> list[str]:
    own = [told["experts"][expert] for expert in experts]
    return [
        name, _size(told["norm"]), _number(told["apgd_gap"]), *(_number(each["cosine"]) for each in own),
        _number(_mean([each["cosine"] for each in own])),
        _number(_mean([each["subspace_alignment"] for each in own])),
    ]  # fmt: skip


def _without(row: list[str]) -> list[str]:
    """A layer's row with none of the cosines but their mean."""
    return [*row[:3], *row[-2:]]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _about(value: float | None) -> str:
    return "-" if value is None else f"about {_percent(value)}"
