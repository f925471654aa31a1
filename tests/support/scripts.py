"""A function of unlabelled data for a tiny classifier, which does something else the first time that it is called."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.checkpoints import write

TEXT = """
import os, signal, time, torch

def unlabelled(expert):
    try:
        with open({mark!r}, "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return torch.nn.Linear(3, 3), torch.arange(12.0).view(4, 3) / 12
    {action}
"""


def classifiers(folder: Path) -> list[Path]:
    """A base and two experts, which are linear layers."""
    base = {"weight": torch.eye(3), "bias": torch.zeros(3)}
    states = [base, *({"weight": torch.eye(3) * i, "bias": torch.ones(3)} for i in (2, 3))]
    return [write(folder / f"m{i}", state) for i, state in enumerate(states)]


def searching(folder: Path, action: str) -> tuple[list[str], Path]:
    """A merge that finds coefficients, where the first process that calls its script does that; and its mark."""
    mark, script = folder / "mark", folder / "script.py"
    script.write_text(TEXT.format(mark=str(mark), action=action))
    models = map(str, classifiers(folder))
    return ["merge", "adamerging", *models, "--script", f"{script}:unlabelled", "--steps", "3"], mark
