"""`modelmerge extract` and `modelmerge disentangle METHOD`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelmerge import method
from modelmerge.cli import options as opt
from modelmerge.cli.merge import Base, Experts, checked, chosen_format, destination, finish, list_methods, plan_lines
from modelmerge.cli.output import Bars, Sink, table

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
    "modelmerge merge task-arithmetic base vectors/math vectors/code -o merged",
)
_SHOWN_COSINES = 12  # experts: a wider matrix does not fit a terminal, and is in the JSON


def extract(
    base: Base,
    experts: Experts,
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
    device: opt.Device = "auto",
    stream: opt.Stream = False,
    push: opt.Push = None,
    private: opt.Private = False,
    create_pr: opt.CreatePr = False,
    commit_message: opt.CommitMessage = None,
    dry_run: opt.DryRun = False,
    force: opt.Force = False,
    resume: opt.Resume = False,
    form: opt.Form = "human",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write each expert's task vector (expert minus base, float32), and tell how they relate.

    A task vector's directory can stand for the expert wherever an EXPERT is named, with the same base.
    """
    from modelmerge.verbs.vectors import extract as run

    sink = Sink(chosen_format(form, json, quiet), verbose=verbose)
    out = Path(output).expanduser()
    target = destination(push, private=private, create_pr=create_pr, message=commit_message)
    with Bars(sink) as bars:
        report = run(
            base, experts, out, rank=rank, energy=energy, include=include or (), exclude=exclude or (),
            max_shard_size=max_shard_size, device=device, force=force, resume=resume, stream=stream, dry_run=dry_run,
            ready=lambda: checked(target), reporter=bars,
        )  # fmt: skip
    if dry_run:
        report["plan"]["push"] = checked(target, create=False)
        sink.result(report, quiet=str(out), human=plan_lines("extract", report["plan"], sink.verbose))
        return
    finish(sink, target, out, {"output": str(out), **report}, [*_extracted(report), f"\n[bold]{out}[/]"])


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
    """Make task vectors easier to merge, by taking out what they share.

    Without a method, list what there is.
    """
    if context.invoked_subcommand is None:
        list_methods("disentangle", Sink(chosen_format(form, json, quiet)))


def command(name: str) -> Callable[..., None]:
    """The Typer command of a disentangling method, its options made from the method's dataclass."""
    chosen = method.load(name, "disentangle")

    def shared(
        output: opt.Output,
        experts_too: Annotated[
            bool,
            typer.Option("--experts", help="Also write base + disentangled task vector, as checkpoints.",
                         rich_help_panel=opt.SHARED_PANEL),
        ] = False,
        published: opt.Published = False,
        include: opt.Include = None,
        exclude: opt.Exclude = None,
        max_shard_size: opt.ShardSize = "5GB",
        device: opt.Device = "auto",
        stream: opt.Stream = False,
        push: opt.Push = None,
        private: opt.Private = False,
        create_pr: opt.CreatePr = False,
        commit_message: opt.CommitMessage = None,
        dry_run: opt.DryRun = False,
        force: opt.Force = False,
        resume: opt.Resume = False,
        form: opt.Form = "human",
        json: opt.Json = False,
        quiet: opt.Quiet = False,
        verbose: opt.Verbose = False,
    ) -> None: ...  # fmt: skip

    def run(context: typer.Context, **values: Any) -> None:
        from modelmerge.verbs.vectors import disentangle

        form = chosen_format(values["form"], values["json"], values["quiet"])
        sink = Sink(form, verbose=values["verbose"])
        out = Path(values["output"]).expanduser()
        options = opt.chosen(chosen, values, context)
        target = destination(
            values["push"], private=values["private"], create_pr=values["create_pr"], message=values["commit_message"]
        )
        with Bars(sink) as bars:
            report = disentangle(
                values["base"], values["experts"], out, method=name, full_experts=values["experts_too"],
                include=values["include"] or (), exclude=values["exclude"] or (),
                max_shard_size=values["max_shard_size"], device=values["device"], force=values["force"],
                resume=values["resume"], stream=values["stream"], dry_run=values["dry_run"],
                ready=lambda: checked(target), reporter=bars, **options,
            )  # fmt: skip
        if values["dry_run"]:
            report["plan"]["push"] = checked(target, create=False)
            lines = plan_lines(f"disentangle {name}", report["plan"], sink.verbose)
            sink.result(report, quiet=str(out), human=lines)
            return
        human = [*_disentangled(report), f"\n[bold]{out}[/]"]
        finish(sink, target, out, {"output": str(out), **report}, human)

    words = {"context": typer.Context, "base": Base, "experts": Experts}
    arguments = [opt.of_argument(word, kind) for word, kind in words.items()]
    return opt.with_parameters(run, [*arguments, *opt.of_method(chosen), *opt.shared(shared)])


def _disentangled(report: dict[str, Any]) -> list[str | Table]:
    model, loss = report["model"], report["loss"]
    kinds = [["whole model", *_change(model)], *([name, *_change(told)] for name, told in report["tensors"].items())]
    columns = ["", "mean |cos|", "after", "largest |cos|", "after", "redundant"]
    options = report["options"]
    return [
        f"[bold]{report['method']}[/] by {options['granularity']}, {options['solver']}: loss {loss['first']:.4f} -> "
        f"{loss['lowest']:.4f} in {report['steps']} steps",
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
