"""`modelmerge extract` and `modelmerge disentangle METHOD`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.merge import (
    Base,
    Experts,
    checked,
    chosen_format,
    destination,
    finish,
    list_methods,
    plan_lines,
    sink_of,
)
from modelmerge.cli.output import Bars, Sink, table
from modelmerge.methods import registry

if TYPE_CHECKING:
    from rich.table import Table

EXTRACT_EXAMPLES = (
    "modelmerge extract base math code -o vectors",
    "modelmerge extract base math code -o vectors --rank 16",
    "modelmerge merge ties base vectors/math vectors/code -o merged",
)
DISENTANGLE_EXAMPLES = (
    "modelmerge disentangle                                       (lists the methods)",
    "modelmerge disentangle awd base math code -o vectors",
    "modelmerge disentangle awd base math code -o vectors --published",
    "modelmerge disentangle apgd base math code -o vectors",
    "modelmerge merge task-arithmetic base vectors/math vectors/code -o merged",
)
_MODELS = (opt.of_argument("base", Base), opt.of_argument("experts", Experts))
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON


def extract() -> Callable[..., None]:
    """The Typer command `extract`."""

    def own(
        output: opt.Output,
        rank: Annotated[
            int | None,
            typer.Option(help="Write linear layers as factors of at most this rank.", rich_help_panel="Low rank"),
        ] = None,
        energy: Annotated[
            float | None,
            typer.Option(
                help="Write them as factors that keep this share of the squared norm.", rich_help_panel="Low rank"
            ),
        ] = None,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
        max_shard_size: opt.ShardSize = "5GB",
    ) -> None: ...

    def run(**values: Any) -> None:
        """Write each expert's task vector (expert minus base, float32), and tell how they relate.

        A task vector's directory can stand for the expert wherever an EXPERT is named, with the same base.
        """
        from modelmerge.verbs.vectors import extract

        told = {"rank": values["rank"], "energy": values["energy"]}
        _write(functools.partial(extract, **told), values, "extract", _extracted)

    return opt.with_parameters(run, [*_MODELS, *opt.shared(own), *opt.shared(opt.written)])


def _write(
    verb: Callable[..., dict[str, Any]],
    values: Mapping[str, Any],
    head: str,
    lines: Callable[[dict[str, Any]], list[str | Table]],
) -> None:
    """Run a verb that writes task vectors with the options that all such verbs have, and print what it tells."""
    sink, target, out = sink_of(values), destination(values), Path(values["output"]).expanduser()
    with Bars(sink) as bars:
        report = verb(
            values["base"], values["experts"], out, include=values["include"] or (), exclude=values["exclude"] or (),
            max_shard_size=values["max_shard_size"], device=values["device"], force=values["force"],
            resume=values["resume"], stream=values["stream"], dry_run=values["dry_run"],
            ready=lambda: checked(target), reporter=bars,
        )  # fmt: skip
    if values["dry_run"]:
        report["plan"]["push"] = checked(target, create=False)
        sink.result(report, quiet=str(out), human=plan_lines(head, report["plan"], sink.verbose))
        return
    finish(sink, target, out, {"output": str(out), **report}, [*lines(report), f"\n[bold]{out}[/]"])


def _extracted(report: dict[str, Any]) -> list[str | Table]:
    low = report["low_rank"]
    rows = []
    for expert in report["experts"]:
        row = [expert["name"], f"{expert['norm']:.4g}", _percent(expert["relative_norm"]), _percent(expert["changed"]),
               str(len(expert["unchanged_tensors"])), str(expert["entries_not_restored"])]  # fmt: skip
        rows.append([*row, _percent(low[expert["name"]]["relative_error"])] if low else row)
    columns = ["task vector", "norm", "of the base's", "changed", "tensors left out", "entries not restored"]
    lines: list[str | Table] = [table(None, [*columns, "low-rank error"] if low else columns, rows)]
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
        lines += ["", table("Numerical rank of the largest layers", ["tensor", "shape", *names], ranked, left=2)]
    return lines


def _off_diagonal(matrix: list[list[float | None]]) -> tuple[float | None, float | None]:
    values = [v for i, row in enumerate(matrix) for j, v in enumerate(row) if i < j and v is not None]
    return (sum(values) / len(values), max(values, key=abs)) if values else (None, None)


def disentangle_or_list(
    context: typer.Context, form: opt.Form = "human", json: opt.Json = False, quiet: opt.Quiet = False
) -> None:
    """Make task vectors easier to merge: take out what they share, or correct what their sum would lose.

    Without a method, list what there is.
    """
    if context.invoked_subcommand is None:
        list_methods("transform", Sink(chosen_format(form, json, quiet)))


def command(name: str) -> Callable[..., None]:
    """The Typer command of a disentangling method, its options made from the method's dataclass."""
    chosen = registry.load(name, "transform")

    def shared(
        output: opt.Output,
        experts_too: Annotated[
            bool,
            typer.Option("--experts", help="Also write base + disentangled task vector, as checkpoints.",
                         rich_help_panel=opt.SHARED_PANEL),
        ] = False,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
        max_shard_size: opt.ShardSize = "5GB",
    ) -> None: ...  # fmt: skip

    def run(**values: Any) -> None:
        from modelmerge.verbs.vectors import disentangle

        told = {"method": name, "full_experts": values["experts_too"], **opt.chosen(chosen, values)}
        _write(functools.partial(disentangle, **told), values, f"disentangle {name}", _disentangled)

    parameters = [*_MODELS, *opt.of_method(chosen), *opt.shared(shared), *opt.shared(opt.written)]
    return opt.with_parameters(run, parameters)


def _disentangled(report: dict[str, Any]) -> list[str | Table]:
    model, loss = report["model"], report["loss"]
    kinds = [["whole model", *_change(model)], *([name, *_change(told)] for name, told in report["tensors"].items())]
    options, losses = report["options"], f"loss {loss['first']:.4g} -> {loss['lowest']:.4g}"
    if report["steps"] is None:
        what = (
            f" for {'all tasks' if options['correction'] == 'shared' else 'each task'}, {options['solver']}: {losses}"
        )
    else:
        what = f" by {options['granularity']}: {losses} in {report['steps']} steps"
    size = "redundant" if report["steps"] is not None else "correction"
    columns = ["", "mean |cos|", "after", "largest |cos|", "after", size]
    return [
        f"[bold]{report['method']}[/]{what}",
        table(None, columns, kinds),
    ]


def _change(told: dict[str, Any]) -> list[str]:
    before, after = told["before"], told["after"]
    values = (before["mean_cosine"], after["mean_cosine"], before["largest_cosine"], after["largest_cosine"])
    return [*map(_cosine, values), _percent(told["redundant"])]


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
