"""Names that have to fit: on one line, on a few, or in so many characters."""

from __future__ import annotations

import re


def clean(name: str) -> str:
    """A name on one line, without what neither XML nor a font has."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def shorten(name: str, length: int) -> str:
    """A name of at most so many characters; what goes is in the middle."""
    name = clean(name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[len(name) - length // 2 :]}"


def wrap(name: str, width: int, lines: int) -> str:
    """A name on at most so many lines, broken after a space or a sign where one is, and shortened until it fits."""
    length = width * lines
    while len(rows := _lines(shorten(name, length), width)) > lines:
        length -= 2
    return "\n".join(rows)


def _lines(name: str, width: int) -> list[str]:
    rows = [""]
    for word in re.findall(r"[^\s_/.:,-]*[\s_/.:,-]*", name):
        while len(rows[-1]) + len(word.rstrip()) > width:
            room = width - len(rows[-1]) if len(word) > width else 0
            rows[-1] += word[:room]
            word = word[room:]
            rows.append("")
        rows[-1] += word
    return [line.rstrip() for line in rows if line.strip()]
