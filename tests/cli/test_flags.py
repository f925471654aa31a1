"""Only cli/ and the program spell options as they are typed; elsewhere they go by their Python names, `named`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import modelmerge

PACKAGE = Path(modelmerge.__file__).parent
# A recipe's shell line, for manifest and card.
SHELL = {"record/command.py"}


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
        if file.relative_to(PACKAGE).parts[0] not in ("cli", "__main__.py") and (flags := flags_in(file))
    }
    assert found.keys() == SHELL, {name: flags for name, flags in found.items() if name not in SHELL}
