"""What help pages say before the options."""

from __future__ import annotations

from collections.abc import Sequence


def with_examples(summary: str, lines: Sequence[str]) -> str:
    """A command's sentence, with examples below it."""
    return f"{summary}\n\n\b[bold]Examples[/]\n" + "\n".join(f"[dim]$[/] {_plain(line)}" for line in lines)


def _plain(line: str) -> str:
    return line.replace("[", "\\[")
