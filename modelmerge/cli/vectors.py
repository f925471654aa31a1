"""`modelmerge extract` and `modelmerge disentangle METHOD`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.bars import Bars
from modelmerge.cli.help import with_examples
from modelmerge.cli.merge import checked, destination, finish
from modelmerge.cli.output import Sink, line, table
from modelmerge.cli.plan import plan_lines
from modelmerge.errors import UsageError
from modelmerge.methods import registry

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

EXTRACT = (
    "Write each expert's task vector (expert minus base, float32). "
    "Its directory can stand for the expert wherever an EXPERT is named, with the same base."
)
EXTRACT_EXAMPLES = (
    "modelmerge extract base math code -o vectors --rank 16",
    "modelmerge merge ties base vectors/math vectors/code -o merged",
)
DISENTANGLE = with_examples(
    "Make task vectors easier to merge, and write them. Without METHOD: list the methods.",
    (
        "modelmerge disentangle awd base math code -o vectors",
        "modelmerge merge task-arithmetic base vectors/math vectors/code -o merged",
    ),
)
_MODELS = (opt.argument("base", opt.Base), opt.argument("experts", opt.Experts))
_option = opt.in_panel("What is written")
Cluster = Annotated[str | None, opt.in_panel("How it is run")(
    "--cluster", metavar="HOW", help="Share the work among processes: files.",
)]  # fmt: skip
_WRITTEN = (opt.argument("output", opt.Output), *opt.shared(opt.written))
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON


def extract() -> Callable[..., None]:
    """The Typer command `extract`."""

    def extracted(
        rank: Annotated[int | None, _option(help="Linear layers as factors of at most this rank.")] = None,
        energy: Annotated[float | None, _option(help="As factors that keep this share of the squared norm.")] = None,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
        cluster: Cluster = None,
    ) -> None: ...

    def run(sink: Sink, **values: Any) -> None:
        from modelmerge.verbs.vectors import extract

        if values["cluster"] is not None and values["push"] is not None:
            hint = f"push once it is done: modelmerge push {values['output']}"
            raise UsageError("--push has no place beside --cluster", hint=hint)
        more = {name: values[name] for name in ("rank", "energy", "cluster")}
        _write(functools.partial(extract, **more), values, "extract", _extracted, sink)

    return opt.command(run, [*_MODELS, *opt.shared(extracted), *_WRITTEN])


def _write(
    verb: Callable[..., dict[str, Any]],
    values: Mapping[str, Any],
    head: str,
    lines: Callable[[dict[str, Any]], list[str | Text | Table]],
    sink: Sink,
) -> None:
    """Run a verb that writes task vectors with the options that all such verbs have, and print its report."""
    target, out = destination(values), Path(values["output"]).expanduser()
    size = {"max_shard_size": values["max_shard_size"]} if values["max_shard_size"] else {}
    with Bars(sink) as bars:
        report = verb(
            values["base"], values["experts"], out, include=values["include"] or (), exclude=values["exclude"] or (),
            device=values["device"], force=values["force"], resume=values["resume"], stream=values["stream"],
            dry_run=values["dry_run"], ready=lambda: checked(target), progress=bars, **size,
        )  # fmt: skip
    if values["dry_run"]:
        report["plan"]["push"] = checked(target, create=False)
        sink.result(report, quiet=str(out), human=plan_lines(head, report["plan"], sink.verbose))
        return
    data = {"output": str(out), "manifest": json.loads((out / "modelmerge.json").read_bytes())}
    finish(sink, target, out, data, [*lines(report), "", line((str(out), "bold"))])


def _extracted(report: dict[str, Any]) -> list[str | Text | Table]:
    low = report["low_rank"]
    rows = []
    for expert in report["experts"]:
        row = [expert["name"], f"{expert['norm']:.4g}", _percent(expert["relative_norm"]), _percent(expert["changed"]),
               str(len(expert["unchanged_tensors"])), str(expert["entries_not_restored"])]  # fmt: skip
        rows.append([*row, _percent(low[expert["name"]]["relative_error"])] if low else row)
    columns = ["task vector", "norm", "of the base's", "changed", "tensors left out", "entries not restored"]
    lines: list[str | Text | Table] = [table(None, [*columns, "low-rank error"] if low else columns, rows)]
    names = [expert["name"] for expert in report["experts"]]
    if 1 < len(names) <= _SHOWN_COSINES:
        matrix = [[name, *map(_cosine, row)] for name, row in zip(names, report["cosines"]["model"], strict=True)]
        lines += ["", table("Cosines", ["", *names], matrix)]
        kinds = [
            [kind, _cosine(mean), _cosine(largest)]
            for kind, cosines in report["cosines"]["layer_types"].items()
            for mean, largest in [_off_diagonal(cosines)]
        ]
        lines += ["", table("Cosines by type of layer", ["", "mean", "largest"], kinds)]
    if report["ranks"]:
        ranked = [[r["tensor"], "x".join(map(str, r["shape"])), *(str(r["numerical_rank"][n]) for n in names)]
                  for r in report["ranks"]]  # fmt: skip
        lines += ["", table("Numerical rank of the largest layers", ["tensor", "shape", *names], ranked, words=2)]
    return lines


def _off_diagonal(matrix: list[list[float | None]]) -> tuple[float | None, float | None]:
    values = [v for i, row in enumerate(matrix) for j, v in enumerate(row) if i < j and v is not None]
    return (sum(values) / len(values), max(values, key=abs)) if values else (None, None)


def command(name: str) -> Callable[..., None]:
    """The Typer command of a disentangling method, its options made from the method's dataclass."""
    method = registry.load(name, "transform")

    def disentangled(
        full_experts: Annotated[
            bool, _option("--experts", help="Also write base + disentangled task vector, as checkpoints.")
        ] = False,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
    ) -> None: ...  # fmt: skip

    def run(sink: Sink, context: typer.Context, **values: Any) -> None:
        from modelmerge.verbs.vectors import disentangle

        options = opt.of_values(method, values, {word for word in values if opt.typed(context, word)})
        verb = functools.partial(disentangle, method=name, full_experts=values["full_experts"], **options)
        _write(verb, values, f"disentangle {name}", _disentangled, sink)

    arguments = [opt.argument("context", typer.Context), *_MODELS]
    parameters = [*arguments, *opt.of_method(method), *opt.shared(disentangled), *_WRITTEN]
    return opt.command(run, parameters)


def _disentangled(report: dict[str, Any]) -> list[str | Text | Table]:
    model, loss = report["model"], report["loss"]
    kinds = [
        ["whole model", *_change(model)],
        *([name, *_change(figures)] for name, figures in report["tensors"].items()),
    ]
    options, losses = report["options"], f"loss {loss['first']:.4g} -> {loss['lowest']:.4g}"
    if report["steps"] is None:
        what = (
            f" for {'all tasks' if options['correction'] == 'shared' else 'each task'}, {options['solver']}: {losses}"
        )
    else:
        what = f" by {options['granularity']}: {losses} in {report['steps']} steps"
    size = "redundant" if report["steps"] is not None else "correction"
    columns = ["", "mean |cos|", "after", "largest |cos|", "after", size]
    return [line((report["method"], "bold"), what), table(None, columns, kinds)]


def _change(figures: dict[str, Any]) -> list[str]:
    before, after = figures["before"], figures["after"]
    values = (before["mean_cosine"], after["mean_cosine"], before["largest_cosine"], after["largest_cosine"])
    return [*map(_cosine, values), _percent(figures["redundant"])]


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{f'{100 * value:#.3g}'.rstrip('.')} %"
