"""`modelmerge demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.bars import Bars
from modelmerge.cli.output import Sink, line, table

SUMMARY = (
    "Train six small experts, merge them by every method, and see what each merge is worth. Offline, under a minute. "
    "All of it is real: the images, the training, the files on disk and the accuracy on images that no model has seen."
)
EXAMPLES = ("modelmerge demo", "modelmerge demo -o demo --json")


def command() -> Callable[..., None]:
    """The Typer command."""

    def declared(
        output: Annotated[
            str | None,
            typer.Option("-o", "--output", metavar="DIR", help="Where the models go. Default: a temporary directory."),
        ] = None,
        device: opt.Device = "auto",
        force: opt.Force = False,
    ) -> None: ...

    return opt.command(_demo, opt.shared(declared))


def _demo(sink: Sink, output: str | None, device: str, force: bool) -> None:
    import shutil
    import tempfile

    from modelmerge.checkpoint.output import check_output
    from modelmerge.verbs.demo import demo as run
    from modelmerge.verbs.demo import to_json

    out = Path(output).expanduser() if output else Path(tempfile.mkdtemp(prefix="modelmerge-demo-"))
    check_output(out, (), force=force)
    if out.exists():
        shutil.rmtree(out)
    with Bars(sink) as bars:
        story = run(out, device=device, progress=bars)

    tasks = list(story.rows[0].accuracies)
    best = max((row for row in story.rows if row.kind == "merge"), key=lambda row: row.mean)
    shown = [
        [
            f"expert {row.model}" if row.kind == "expert" else f"{row.model}{' *' if row is best else ''}",
            *(f"{100 * row.accuracies[task]:.1f}" for task in tasks),
            f"{100 * row.mean:.1f}",
        ]
        for row in story.rows
    ]
    reach = list(next(iter(story.scales.values())))
    head, *tail = best.model.split(" + ")
    words = (
        f"{tail[0]} BASE EXPERT EXPERT -o merged --disentangle {head}"
        if tail
        else f"{head} BASE EXPERT EXPERT -o merged"
    )
    sink.result(
        to_json(story, out),
        quiet=str(out),
        human=[
            table("Accuracy on held-out images, per cent (* best merge)", ["model", *tasks, "mean"], shown),
            "",
            table(
                "Mean by the scale of task arithmetic",
                ["", *map(str, story.scales)],
                [[label, *(f"{100 * means[label]:.1f}" for means in story.scales.values())] for label in reach],
            ),
            "\nAn expert masters its own task; a merge has to hold all six. Every method ran at its defaults.",
            line("\nThe models are in ", (str(out), "bold"), ". This made the best merge:"),
            f"  {story.commands[best.model]}",
            f"\nHow a merge stands to the experts, by its weights, and what all merges score:\n"
            f"  modelmerge eval weights {out}/merged/{best.model.replace(' ', '')}\n"
            f"  modelmerge eval custom {out}/merged/* --script modelmerge.evaluation.digits:scores",
            f"\nWith your own models, look before you merge:\n  modelmerge merge {words} --dry-run",
        ],
    )
