"""`modelmerge guide [TOPIC]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from modelmerge.cli import options as opt
from modelmerge.cli.output import Sink, table

SUMMARY = "Read a guide that comes with the package, or list them."
EXAMPLES = ("modelmerge guide", "modelmerge guide methods")


def command() -> Callable[..., None]:
    """The Typer command."""

    def declared(
        topic: Annotated[
            str | None, typer.Argument(metavar="[TOPIC]", help="A guide's name. Without one: list them.")
        ] = None,
    ) -> None: ...

    def run(sink: Sink, topic: str | None) -> None:
        from rich.markdown import Markdown
        from rich.text import Text

        from modelmerge import guides

        if topic is None:
            listed = [{"guide": name, "summary": guides.summary(name)} for name in guides.names()]
            sink.result(
                {"guides": listed},
                quiet="\n".join(guides.names()),
                human=[
                    table(None, ["guide", ""], [[g["guide"], g["summary"]] for g in listed], words=2),
                    "\nmodelmerge guide GUIDE",
                ],
            )
            return
        text = guides.read(topic)
        if sink.form == "human" and sink.screen.is_terminal:
            sink.screen.print(Markdown(text), soft_wrap=False)
        else:
            sink.result({"guide": topic, "text": text}, quiet=text.rstrip("\n"), human=[Text(text.rstrip("\n"))])

    return opt.command(run, opt.shared(declared))
