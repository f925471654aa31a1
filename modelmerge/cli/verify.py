"""`modelmerge verify DIR`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.bars import Bars
from modelmerge.cli.output import Sink, table

SUMMARY = "Are the files of an output, and its inputs, what the manifest says? Exit code 1 if one is not."
EXAMPLES = ("modelmerge verify merged", "modelmerge verify merged --json")
_WORDS = {True: "same", False: "DIFFERS", None: "not found"}


def command() -> Callable[..., None]:
    """The Typer command."""

    def declared(
        directory: Annotated[
            str, typer.Argument(metavar="DIR", help="What merge, search, extract or disentangle wrote.",
                                show_default=False)
        ],
    ) -> None: ...  # fmt: skip

    def run(sink: Sink, directory: str) -> None:
        from modelmerge.verbs.verify import verify

        with Bars(sink) as bars:
            report = verify(directory, progress=bars)
        files = report["files"]
        different = [file["name"] for file in files if file["same"] is False]
        missing = [file["name"] for file in files if file["same"] is None]
        rows = [[_WORDS[file["same"]], file["name"]] for file in files if sink.verbose or file["same"] is not True]
        same = len(files) - len(different) - len(missing)
        sink.result(
            report,
            quiet="\n".join(different),
            human=[
                *([table(None, ["", "file"], rows, words=2)] if rows else []),
                f"{same} of {len(files)} files are what the manifest says"
                + (f"; {len(missing)} inputs were not found" if missing else ""),
            ],
        )
        if different:
            sink.failed(f"{len(different)} of {len(files)} files are not what the manifest says: {different[0]}")
            raise typer.Exit(1)

    return opt.command(run, opt.shared(declared))
