"""`modelmerge push DIR ORG/NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.output import Sink, line

SUMMARY = "Push what a verb wrote to a repository on the Hugging Face Hub; paths of this machine stay here."
EXAMPLES = ("modelmerge push merged org/name --private", "modelmerge push merged org/name --create-pr")


def command() -> Callable[..., None]:
    """The Typer command."""

    def declared(
        directory: Annotated[str, typer.Argument(metavar="DIR", help="A finished output.", show_default=False)],
        to: Annotated[
            str,
            typer.Argument(metavar="ORG/NAME", help="Made if there is none; or ORG/NAME@BRANCH.", show_default=False),
        ],
        private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
        create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
        commit_message: Annotated[str | None, typer.Option(help="The commit's first line.", metavar="TEXT")] = None,
    ) -> None: ...

    def run(sink: Sink, directory: str, to: str, **values: Any) -> None:
        from modelmerge.verbs.push import push

        done = push(directory, to, progress=sink.form == "human" and sink.margin.is_terminal, **values)
        human = line(("pushed", "bold green"), " to ", (done["url"], "bold"))
        sink.result({"output": directory, **done}, quiet=done["url"], human=[human])

    return opt.command(run, opt.shared(declared))
