"""Reports of `modelmerge eval` as the suites make them, of any size, without any model."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelmerge.evaluation.scores import summarise

EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


def scores(
    tasks: Sequence[str],
    models: Sequence[str],
    *,
    experts: bool = True,
    base: bool = True,
    others: Sequence[str] = (),
    missing: Collection[tuple[str, str]] = (),
    owners: Mapping[str, str] | None = None,
    **told: Any,
) -> dict[str, Any]:
    """A report of accuracies over 1000 items each: of a base, an expert for each task, `others`, and models."""
    draw = random.Random(0)
    names = [*([("base", "base")] if base else []), *((task, "expert") for task in (tasks if experts else ()))]
    names += [*((name, "expert") for name in others), *((name, "model") for name in models)]
    rows = []
    for name, role in names:
        values: dict[str, float | None] = {task: draw.uniform(0.4, 0.9) for task in tasks}
        values |= {task: 0.95 for task in tasks if task == name and role == "expert"}
        values |= {task: None for task in tasks if (name, task) in missing}
        rows.append({
            "name": name, "reference": f"runs/{name}", "path": f"/models/{name}", "role": role,
            "files": {f"/models/{name}/model.safetensors": {"sha256": "ab" * 32, "bytes": 1000}},
            "digest": "cd" * 32, "cached": [],
            "scores": {
                task: {"score": value, "count": 1000, "metric": "accuracy",
                       "stderr": None if value is None else math.sqrt(value * (1 - value) / 1000)}
                for task, value in values.items()
            },
        })  # fmt: skip
    own = summarise(tasks, rows, owners)
    return {
        "suite": "custom", "format": 1, "device": "cpu", "created": "2026-01-01T00:00:00+00:00",
        "versions": {"modelmerge": "0.1.0"}, "seed": 0, "tasks": list(tasks), "models": rows, "notes": [],
        **({"own_experts": own} if own else {}), **told,
    }  # fmt: skip
