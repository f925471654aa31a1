"""The distribution's name and what it and its texts ask pip for: `modelmerge` on PyPI is somebody else's."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
OURS, TAKEN = "modelmerge-cli", "modelmerge"
TEXTS = [
    *(ROOT / "modelmerge").rglob("*.py"), *(ROOT / "modelmerge").rglob("*.md"), *(ROOT / "tests").rglob("*.py"),
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml", ROOT / ".ci" / "run",
]  # fmt: skip


def requirements(text: str) -> list[str]:
    """What a text gives pip to install: words that are requirements, and no options, files or variables."""
    found = []
    for command in re.findall(r"pip install ((?:[^\n`#&;)]|\n)*?)(?=`|\n\n|$|[#&;)])", text):
        words = re.findall(r"'[^']+'|\"[^\"]+\"|\S+", command.partition("\n")[0])
        found += [word.strip("'\"\\,.") for word in words if re.match(r"^['\"]?[A-Za-z]", word)]
    return [word for word in found if not word.endswith((".whl", ".txt")) and "/" not in word]


def name_of(requirement: str) -> str | None:
    try:
        return canonicalize_name(Requirement(requirement).name)
    except ValueError:  # a word of the sentence, not a requirement
        return None


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_text_asks_for_somebody_elses_package(file: Path) -> None:
    if file == Path(__file__):
        return
    names = [name_of(word) for word in requirements(file.read_text())]
    assert TAKEN not in names


def test_what_is_looked_for_is_found() -> None:
    text = "hint: `pip install modelmerge[clip]`, or pip install \"matplotlib>=3.10\" 'modelmerge'\nand so on"
    assert [name_of(word) for word in requirements(text)][:1] == [TAKEN]
    assert "matplotlib" in [name_of(word) for word in requirements('pip install "matplotlib>=3.10"')]


def test_the_distribution_asks_for_no_package_of_that_name() -> None:
    ours = distribution(OURS)
    names = {canonicalize_name(Requirement(text).name) for text in ours.requires or ()}
    assert TAKEN not in names
    assert {"torch", "typer", "safetensors"} <= names
    assert [point.name for point in ours.entry_points if point.group == "console_scripts"] == ["modelmerge"]
