"""What a model card's own lines of Python load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.support.guides import blocks


def loaded_by_card(directory: Path) -> dict[str, Any]:
    """The variables that the lines on how the model is used leave, run beside its directory."""
    (lines,) = blocks((directory / "README.md").read_text(), "python")
    variables: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own
        patch.chdir(directory.parent)
        exec(compile(lines, "<card>", "exec"), variables)  # the card is ours
    return variables
