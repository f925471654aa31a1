"""demo: the whole story on small real experts, offline, in under a minute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.engine.parallel import threads
from modelmerge.evaluation import digits
from modelmerge.evaluation.bench import require
from modelmerge.methods import registry
from modelmerge.progress import SILENT, Reporter
from modelmerge.verbs.merge import merge

SCALES = (0.2, 0.3, 0.4, 0.6, 0.8)  # of task arithmetic, to see what disentangling does to its reach


@dataclass(frozen=True, slots=True)
class Row:
    """A model's accuracy on each task, from 0 to 1."""

    model: str
    kind: str  # base, expert or merge
    accuracies: Mapping[str, float]

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return sum(self.accuracies.values()) / len(self.accuracies)


@dataclass(frozen=True, slots=True)
class Story:
    """What the demo did: a row for each model, the shell line of each merge, and task arithmetic by its scale.

    `scales`: by scale, the mean accuracy of task arithmetic plain and behind each disentangling method.
    """

    rows: tuple[Row, ...]
    commands: Mapping[str, str]
    scales: Mapping[float, Mapping[str, float]]


def demo(out: str | Path, *, device: str = "auto", progress: Reporter = SILENT) -> Story:
    """Train a base and six experts, merge them by every method at its defaults, measure all on held-out images.

    Methods that take fewer experts are left out. Task arithmetic is also run behind each disentangling method, and over
    a range of scales.

    Args:
        out: An empty or new directory: gets `base/`, `experts/NAME/` and `merged/METHOD/`.
        device: Where the merges run; training takes seconds on any processor.
        progress: Receives the progress.

    Raises:
        ModelMergeError: scikit-learn, which carries the images, is not installed; or `out` cannot be written.
    """
    require("the demo", "scikit-learn", "sklearn.datasets")  # which carries the images
    tasks, out = digits.load_tasks(), Path(out)
    rows = train(out, tasks, progress)
    commands: dict[str, str] = {}
    experts = [out / "experts" / name for name in tasks]
    names = sorted(suited(len(experts)), key=lambda name: (name != "average", name))
    fronts = registry.names("transform")
    progress.stage("merging", len(names) + len(fronts) + len(SCALES) * (1 + len(fronts)), "merges")

    def run(name: str, label: str, front: str = "", **options: Any) -> Row:
        target = out / "merged" / label.replace(" ", "")
        manifest = merge(
            out / "base", experts, target, method=name, disentangle=front or (), device=device, force=True, **options
        )
        commands[label] = manifest["command"]
        progress.advance(1, label)
        return _measure(label, "merge", load_file(target / "model.safetensors"), tasks)

    scales: dict[float, dict[str, float]] = {}
    for scale in SCALES:
        scales[scale] = {"task-arithmetic": run("task-arithmetic", "task-arithmetic", scale=scale).mean}
        for front in fronts:
            label = f"{front} + task-arithmetic"
            scales[scale][label] = run("task-arithmetic", label, front, scale=scale).mean
    rows += [run(name, name) for name in names]
    rows += [run("task-arithmetic", f"{front} + task-arithmetic", front) for front in fronts]
    return Story(tuple(rows), commands, scales)


def suited(experts: int) -> list[str]:
    """The merge methods that take so many experts, and nothing but models."""
    return [name for name in registry.data_free() if (registry.load(name).most_experts or experts) >= experts]


def train(out: Path, tasks: Mapping[str, digits.Task], progress: Reporter = SILENT) -> list[Row]:
    """Train a base into `out/base` and an expert of each task into `out/experts/NAME`; how good each is."""
    progress.stage("training", 1 + len(tasks), "models")
    with threads(1):  # the network is too small to share out
        base = digits.train_base(tasks)
        _save(base, out / "base")
        rows = [_measure("base", "base", base, tasks)]
        progress.advance(1, "base")
        for name, task in tasks.items():
            expert = digits.train_expert(base, task)
            _save(expert, out / "experts" / name)
            rows.append(_measure(name, "expert", expert, tasks))
            progress.advance(1, name)
    return rows


def _save(state: Mapping[str, Tensor], directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(save(dict(state), metadata={"format": "pt"}))
    (directory / "config.json").write_text(json.dumps(digits.CONFIG, indent=2) + "\n")


def _measure(name: str, kind: str, state: Mapping[str, Tensor], tasks: Mapping[str, digits.Task]) -> Row:
    return Row(name, kind, {task: digits.accuracy(state, images) for task, images in tasks.items()})


def to_json(story: Story, out: Path) -> dict[str, Any]:
    """The story as plain data."""
    models = [{"model": r.model, "kind": r.kind, "accuracy": dict(r.accuracies), "mean": r.mean} for r in story.rows]
    scales = [{"scale": scale, **means} for scale, means in story.scales.items()]
    manifests = {name: str(out / "merged" / name.replace(" ", "") / MANIFEST) for name in story.commands}
    return {"output": str(out), "models": models, "commands": dict(story.commands), "scales": scales,
            "manifests": manifests}  # fmt: skip
