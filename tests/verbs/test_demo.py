"""The demo: real experts, and merges that pay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.engine.parallel import threads
from modelmerge.evaluation import digits
from modelmerge.methods import registry
from modelmerge.verbs import demo as verb
from tests.support import digits as digit_experts
from tests.support.checkpoints import read

Told = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The demo's directory, and what it prints as JSON."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = [sys.executable, "-m", "modelmerge", "demo", "-o", str(out), "--json"]
    return out, json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)


def test_a_short_demo_tells_the_same_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer tasks, less training, and the methods that users begin with."""
    some = ["average", "task-arithmetic", "ties", "apgd"]
    views = dict(list(digits._VIEWS.items())[:2])
    monkeypatch.setattr(digits, "_VIEWS", views)
    monkeypatch.setattr(digits, "TASKS", tuple(views))
    monkeypatch.setattr(digits, "_BASE_STEPS", 75)
    monkeypatch.setattr(digits, "_EXPERT_STEPS", 60)
    monkeypatch.setattr(verb, "suited", lambda experts: some)
    monkeypatch.setattr(verb, "SCALES", (0.707, 0.8))  # the first is the default for two experts at right angles
    assert main(["demo", "-o", str(tmp_path / "out"), "--json"]) == 0
    check((tmp_path / "out", json.loads(capsys.readouterr().out)), some, 0.8, capsys)


@pytest.mark.slow
def test_the_demo_tells_the_whole_story(demo: Told, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(digits.TASKS) >= 4
    check(demo, verb.suited(len(digits.TASKS)), 0.9, capsys)
    # What disentangling gives task arithmetic grows with the scale.
    gains = {row["scale"]: row["awd + task-arithmetic"] - row["task-arithmetic"] for row in demo[1]["scales"]}
    assert gains[0.8] > gains[0.2]
    means = {row["model"]: row["mean"] for row in demo[1]["models"]}
    assert means["average"] < means["task-arithmetic"]


def check(demo: Told, names: Sequence[str], least: float, capsys: pytest.CaptureFixture[str]) -> None:
    out, told = demo
    rows = {row["model"]: row for row in told["models"]}
    merges = {name for name, row in rows.items() if row["kind"] == "merge"}
    assert merges == {*names, *(f"{front} + task-arithmetic" for front in registry.names("transform"))}
    experts = [row for row in rows.values() if row["kind"] == "expert"]
    assert len(experts) == len(digits.TASKS)
    base = rows["base"]
    for expert in experts:
        own = expert["accuracy"][expert["model"]]
        assert own > base["accuracy"][expert["model"]] + 0.15
        assert own > least
    own_mean = sum(e["accuracy"][e["model"]] for e in experts) / len(experts)
    for name in names:
        assert base["mean"] + 0.01 < rows[name]["mean"] < own_mean
        # What the table says is what lies on disk.
        merged, task = read(out / "merged" / name), digits.load_tasks()[digits.TASKS[-1]]
        assert digits.accuracy(merged, task) == rows[name]["accuracy"][digits.TASKS[-1]]
    reach = {row["scale"]: (row["task-arithmetic"], row["awd + task-arithmetic"]) for row in told["scales"]}
    default = rows["task-arithmetic"]["mean"], rows["awd + task-arithmetic"]["mean"]
    assert reach.get(0.707, default)[1] == default[1]
    assert Path(told["manifests"]["apgd"]).is_file()
    assert told["commands"]["apgd"].startswith("modelmerge merge apgd ")
    _evaluated(out, rows, capsys)


def _evaluated(demo: Path, rows: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """`eval` finds what the demo has measured, and knows the experts of its merges."""
    words = ["eval", "custom", "--script", "modelmerge.evaluation.digits:scores", str(demo / "merged" / "apgd")]
    experts = [word for task in digits.TASKS for word in ("--expert", str(demo / "experts" / task))]
    assert main([*words, *experts, "--base", str(demo / "base"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    models = {model["name"]: model for model in told["models"]}
    assert told["tasks"] == list(digits.TASKS)
    for name, model in models.items():
        for task, accuracy in rows[name]["accuracy"].items():
            assert model["scores"][task]["score"] == pytest.approx(accuracy)
        assert model["average"] == pytest.approx(rows[name]["mean"])
    assert models["apgd"]["normalised"] == pytest.approx(
        sum(rows["apgd"]["accuracy"][task] / rows[task]["accuracy"][task] for task in digits.TASKS) / len(digits.TASKS)
    )
    assert models["base"]["normalised"] < models["apgd"]["normalised"] < 1.0
    assert main(["eval", "weights", str(demo / "merged" / "apgd"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["model"]
    assert list(figures["experts"]["norms"]) == list(digits.TASKS)
    assert figures["models"]["apgd"]["apgd_gap"] < 1.0


def test_some_steps_of_the_correction_of_apgd_pay(tmp_path: Path) -> None:
    base, *experts = digit_experts.save(tmp_path)
    check_that_steps_pay(base, experts, 50, tmp_path)


@pytest.mark.slow
def test_the_correction_of_apgd_pays(demo: Told, tmp_path: Path) -> None:
    experts = [demo[0] / "experts" / name for name in digits.TASKS]
    check_that_steps_pay(demo[0] / "base", experts, 400, tmp_path)


def check_that_steps_pay(base: Path, experts: list[Path], most: int, out: Path) -> None:
    """The merge is better at the tasks of its experts, which have their names, than without any step."""
    tasks, scores = digits.load_tasks(), {}
    for steps in (0, most):
        merged = out / f"out{steps}"
        modelmerge.merge(base, experts, merged, method="apgd", published=True, steps=steps)
        scores[steps] = sum(digits.accuracy(read(merged), tasks[expert.name]) for expert in experts) / len(experts)
    assert scores[most] > scores[0] + 0.02


def test_no_test_image_is_trained_on() -> None:
    for task in digits.load_tasks().values():
        seen = {image.numpy().tobytes() for image in task.train_x}
        assert not any(image.numpy().tobytes() in seen for image in task.test_x)
        assert len(task.train_y) + len(task.test_y) == 1797


def test_training_is_repeatable_and_leaves_the_classifier_and_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_BASE_STEPS", 20)
    monkeypatch.setattr(digits, "_EXPERT_STEPS", 20)
    tasks = digits.load_tasks()
    with threads(1):
        base = digits.train_base(tasks)
        before = {name: tensor.clone() for name, tensor in base.items()}
        one, two = (digits.train_expert(base, tasks["striped"]) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(base[name], before[name]) for name in base)
    assert torch.equal(one["classifier.weight"], base["classifier.weight"])


def test_the_demo_refuses_a_directory_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo", "-o", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"
