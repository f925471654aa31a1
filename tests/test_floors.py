"""The house's floors: a module imports only lower floors, or its own package."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "modelmerge"
# From the ground up; a name is a module or a package of modelmerge.
FLOORS = (
    "errors", "progress", "interrupts", "text", "_version", "guides", "devices", "methods", "hub", "checkpoint", "plan",
    "engine", "record", "evaluation", "charts", "verbs", "cli", "__main__",
)  # fmt: skip
# What the mathematics may import besides the contract: no files, no command line; of devices only what can be asked
# of any.
MATHEMATICS = {
    "__future__",
    "torch",
    "numpy",
    "math",
    "dataclasses",
    "typing",
    "collections",
    "functools",
    "hashlib",
    "modelmerge",
}


@functools.cache
def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def test_every_module_has_a_floor() -> None:
    assert {floor_of(file) for file in modules()} == set(FLOORS)


def test_imports_go_down() -> None:
    for file in modules():
        mine = FLOORS.index(floor_of(file))
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "modelmerge" and len(parts) > 1 and parts[1] in FLOORS:
                theirs = FLOORS.index(parts[1])
                assert theirs <= mine, f"{file.relative_to(PACKAGE)} imports {name}, which is above it"
                assert theirs < mine or parts[1] == floor_of(file), f"{file.relative_to(PACKAGE)} imports {name}"


def test_the_mathematics_knows_no_files() -> None:
    plumbing = ("contract.py", "options.py", "registry.py", "words.py")
    for file in sorted(f for f in (PACKAGE / "methods").rglob("*.py") if f.name not in plumbing):
        for name in imports(file):
            assert name.split(".")[0] in MATHEMATICS, f"{file.name} imports {name}"
            if name.startswith("modelmerge."):
                assert name.split(".")[1] in ("devices", "errors", "interrupts", "methods"), (
                    f"{file.name} imports {name}"
                )


def test_only_the_command_line_imports_rich_and_typer() -> None:
    for file in modules():
        words = {name.split(".")[0] for name in imports(file)}
        if floor_of(file) != "cli":
            assert not words & {"rich", "typer"}, file
        assert "click" not in words, f"{file}: typer carries a private copy of click"


def test_no_module_is_a_drawer() -> None:
    assert not [file for file in modules() if file.stem in ("utils", "helpers", "misc", "common")]


def test_no_test_module_imports_another() -> None:
    """What tests share lies in tests/support/, which imports no test module either."""
    tests = Path(__file__).parent
    for file in sorted(tests.rglob("*.py")):
        for name in imports(file):
            words = name.split(".")
            shared = words[0] != "tests" or not any(word.startswith(("test_", "conftest")) for word in words)
            assert shared, f"{file.relative_to(tests)} imports {name}"


def test_the_tests_mirror_the_package() -> None:
    tests = Path(__file__).parent
    folders = {file.parent.name for file in tests.glob("*/test_*.py")}
    assert folders <= {folder.name for folder in PACKAGE.iterdir() if folder.is_dir()}
    assert all((tests / folder / "__init__.py").is_file() for folder in folders)


def test_one_module_speaks_of_what_only_devices_have() -> None:
    """So that what stands in for a device there stands in for it everywhere."""
    words = re.compile(r"torch\.cuda|\bis_cuda\b|pin_memory|\.cuda\(|record_stream|synchronize")
    speak = {file.name for file in modules() if words.search(file.read_text())}
    assert speak == {"devices.py", "unpickler.py"}  # the latter reads a name in files
