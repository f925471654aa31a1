"""The blocks of the README that are made from the code: `python -m tests.readme` writes them anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from modelmerge import method

README = Path(__file__).parent.parent / "README.md"


def method_table(kind: Literal["merge", "disentangle"]) -> str:
    """Every method of a kind with its help line, its options and its source."""
    rows = ["| method | what it does | options (default) |", "|---|---|---|"]
    for name in method.names(kind):
        chosen = method.load(name, kind)
        told = []
        for spec in dataclasses.fields(chosen.options):
            default = "automatic" if spec.default is None else spec.default
            told.append(f"`--{spec.name.replace('_', '-')}` ({default})")
        rows.append(f"| [`{name}`]({chosen.paper}) | {method.summary(name, kind)} | {' '.join(told)} |")
    return "\n".join(rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": lambda: method_table("merge"),
    "disentanglers": lambda: method_table("disentangle"),
}


def renewed(text: str) -> str:
    """The README's text with every block between its markers made anew."""
    for name, make in BLOCKS.items():
        start, end = f"<!-- {name}: made by python -m tests.readme -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"README.md has no block '{name}'")
        text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
