"""A base and real experts of the demo's tasks, trained for a third of the demo's time, once in a process."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from modelmerge.engine.parallel import threads
from modelmerge.evaluation import digits

TASKS = ("inverted", "rotated", "swapped")


@functools.cache
def trained() -> dict[str, digits.State]:
    """The base and the expert of each task, by name; not to be changed."""
    tasks = digits.load_tasks()
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(digits, "_BASE_STEPS", 100)
        patch.setattr(digits, "_EXPERT_STEPS", 60)
        patch.setattr(digits, "_EXPERT_RATE", 4e-3)
        base = digits.train_base(tasks)
        return {"base": base, **{name: digits.train_expert(base, tasks[name]) for name in TASKS}}


def save(root: Path, tasks: tuple[str, ...] = TASKS) -> list[Path]:
    """[base, *experts] below `root`, as the demo writes them."""
    for name in ("base", *tasks):
        (root / name).mkdir()
        save_file(trained()[name], root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(digits.CONFIG))
    return [root / name for name in ("base", *tasks)]
