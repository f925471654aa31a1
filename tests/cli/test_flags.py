"""Only cli/ spells options as they are typed; elsewhere they go by their Python names, `named`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import modelmerge

PACKAGE = Path(modelmerge.__file__).parent
# A recipe's shell line, for manifest and card.
SHELL = {"plan/recipe.py", "record/card.py"}
# Files still to do. The list can only become shorter.
PENDING: set[str] = {
    "charts/drawing.py",
    "engine/coefficients.py",
    "engine/loader.py",
    "evaluation/bench.py",
    "evaluation/clip.py",
    "evaluation/custom.py",
    "evaluation/images.py",
    "evaluation/lm.py",
    "evaluation/scores.py",
    "plan/mergekit.py",
    "verbs/adapted.py",
    "verbs/coefficients.py",
    "verbs/evaluate.py",
    "verbs/evaluate_clip.py",
    "verbs/render.py",
    "verbs/vectors.py",
}


def flags_in(file: Path) -> list[str]:
    """The string literals of a file, other than docstrings, in which an option stands as it is typed."""
    tree, docstrings = ast.parse(file.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.value)
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in docstrings
        and re.search(r"--[a-z]", node.value)
    ]


def test_only_the_command_line_spells_options_as_they_are_typed() -> None:
    found = {
        str(file.relative_to(PACKAGE)): flags
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] != "cli" and (flags := flags_in(file))
    }
    new = {name: flags for name, flags in found.items() if name not in PENDING | SHELL}
    assert not new
    assert not PENDING - found.keys(), "done: take them from the list"
