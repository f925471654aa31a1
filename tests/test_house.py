"""The size of the house and its words: how much there is, and how things are named."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "modelmerge"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Bare participles that once named variables by the hundred. The counts may only fall.
MOST = {"told": 0}
LINES = 27_820  # of code
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@functools.cache
def nodes(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def code_lines(text: str) -> int:
    """Lines with code: no blanks, comments or docstrings."""
    documented: set[int] = set()
    for node in nodes(text):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def names(file: Path) -> list[str]:
    """Every name that a module binds: variables, parameters, attributes, functions."""
    found = []
    for node in nodes(file.read_text()):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif isinstance(node, ast.arg):
            found.append(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.append(node.attr)
    return [name.strip("_") for name in found]


def test_lines_of_code_are_counted_rightly() -> None:
    assert (
        code_lines(
            '"""Doc."""\n\nx = 1  # why\n\n\ndef f():\n    """Doc\n    more."""\n    return [\n        x,\n    ]\n'
        )
        == 5
    )


def test_the_package_is_no_larger_than_it_needs_to_be() -> None:
    assert sum(code_lines(file.read_text()) for file in MODULES) <= LINES


def test_no_module_is_longer_than_one_can_read() -> None:
    assert {str(file) for file in MODULES if len(file.read_text().splitlines()) > 450} == set()


def test_variables_are_named_for_what_they_are() -> None:
    counts = dict.fromkeys(MOST, 0)
    for file in MODULES:
        for name in names(file):
            if name in counts:
                counts[name] += 1
    assert all(counts[word] <= most for word, most in MOST.items()), counts
