"""What `eval` measures, a file for each suite: weights beside weights, or models at their tasks."""

from __future__ import annotations

import ast
from pathlib import Path

SUITES = ("clip", "custom", "lm", "weights")


def names() -> tuple[str, ...]:
    """The suites, by name; nothing is imported."""
    return SUITES


def summary(name: str) -> str:
    """A suite's help line: the first line of its file's docstring, read without importing it."""
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
