"""Markdown made of text that may hold anything: words, code, tables. All that a card says goes through here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

from modelmerge.text import visible

# What begins a tag, an entity, a link, code, emphasis or mathematics; underscores inside words begin nothing.
_MARKS = re.compile(r"[\\`*\[\]<>&~$@]|:(?=//)|(?<=www)\.|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_START = re.compile(r"^(\d*)([.)](?=\s|$)|[#+=-](?=[\s#+=-]|$))")  # of a heading, a list, a line below a heading


def words(text: str) -> str:
    """Text on one line that is shown letter for letter."""
    return _START.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", visible(text).strip()))


def code(text: str) -> str:
    """Text as code."""
    text = visible(text)
    ticks = _fence(text, 1)
    padded = "`" in text or text.startswith(" ") or text.endswith(" ")
    return f"{ticks} {text} {ticks}" if padded else f"{ticks}{text}{ticks}"


def block(lines: str, language: str) -> str:
    """Lines of code, which need no escapes."""
    ticks = _fence(lines, 3)
    return f"{ticks}{language}\n{lines}\n{ticks}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; the columns `right` are set to the right."""
    lines = [head, ["---:" if i in right else "---" for i in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def shell(tokens: Iterable[str]) -> str:
    """A shell line of these words; what does not show is written as bash and zsh read it, `$'...'`."""
    return " ".join(map(_quoted, tokens))


def _quoted(token: str) -> str:
    if visible(token) == token:
        return shlex.quote(token)
    escaped = "".join(_escaped(letter) for letter in token)
    return f"$'{escaped}'"


def _escaped(letter: str) -> str:
    if letter in "\\'":
        return f"\\{letter}"
    if visible(letter) == letter:
        return letter
    return "".join(f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))


def _fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
