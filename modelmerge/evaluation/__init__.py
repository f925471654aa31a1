"""What `eval` measures, a file for each suite: weights beside weights, or models at their tasks."""

from __future__ import annotations

from pathlib import Path

from modelmerge.methods.registry import first_line

SUITES = ("clip", "custom", "lm", "weights")


def names() -> tuple[str, ...]:
    """The suites, by name; nothing is imported."""
    return SUITES


def summary(name: str) -> str:
    """A suite's help line: the first line of its file's docstring, read without importing it."""
    return first_line(Path(__file__).parent / f"{name}.py")
