"""`--weight balanced`: an expert that went much farther than the others weighs less, and a replay has the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelmerge
from modelmerge.checkpoint.opening import open_references
from modelmerge.checkpoint.reference import parse
from modelmerge.cli import main
from modelmerge.engine.lengths import products
from modelmerge.errors import UsageError
from modelmerge.plan.tensors import make_plan
from tests.support.checkpoints import State, read, same_bits, write
from tests.support.hub_server import FakeHub

LAYERS, FACTORS = 5, {"near": 1.0, "far": 7.0, "other": 1.2}


def states() -> dict[str, State]:
    """A base, and experts that went as many times as far as FACTORS says; more of it in later layers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"layers.{i}.{kind}.weight": random(80, 24) for i in range(LAYERS) for kind in ("q_proj", "o_proj")}
    base |= {"norm.weight": torch.ones(24)}
    experts = {
        name: {key: tensor + 0.01 * factor * random(*tensor.shape) for key, tensor in base.items()}
        for name, factor in FACTORS.items()
    }
    return {"base": base, **experts}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, state) for name, state in states().items()]


@pytest.mark.parametrize("method", ["kron", "ties", "average", "apgd"])
def test_it_is_the_weight_that_it_tells(method: str, models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method=method, weights="balanced")
    weights = manifest["recipe"]["weights"]
    assert weights["near"] == weights["other"] == 1.0
    assert weights["far"] == pytest.approx(1.2 / 7, rel=0.05)
    assert any("'far' went " in note and f"weighs {weights['far']:g}." in note for note in manifest["notes"])
    modelmerge.merge(models[0], models[1:], tmp_path / "named", method=method, weights=weights)
    assert same_bits(read(tmp_path / "out"), read(tmp_path / "named"))
    modelmerge.replay(tmp_path / "out" / "modelmerge.json", tmp_path / "again")
    assert same_bits(read(tmp_path / "out"), read(tmp_path / "again"))


def test_a_sample_of_rows_tells_the_lengths(models: list[Path]) -> None:
    base, experts = open_references(parse(str(models[0])), [parse(str(path)) for path in models[1:]])
    plan, all_states = make_plan(base, experts), states()
    whole = [
        sum(float((all_states[name][key] - tensor).double().square().sum())
            for key, tensor in all_states["base"].items() if tensor.dim() == 2) ** 0.5
        for name in FACTORS
    ]  # fmt: skip
    assert products(plan).diagonal().sqrt().tolist() == pytest.approx(whole, rel=0.03)
    plan.close()


def test_experts_that_went_as_far_weigh_the_same(models: list[Path], tmp_path: Path) -> None:
    near = [models[1], models[3]]
    manifest = modelmerge.merge(models[0], near, tmp_path / "out", method="kron", weights="balanced")
    assert any(note.startswith("All experts went about as far from the base") for note in manifest["notes"])
    modelmerge.merge(models[0], near, tmp_path / "plain", method="kron")
    assert same_bits(read(tmp_path / "out"), read(tmp_path / "plain"))


def test_an_adapter_is_measured_by_what_it_makes(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:], tmp_path / "vectors", rank=24)
    vectors = [tmp_path / "vectors" / name for name in FACTORS]
    whole = modelmerge.merge(models[0], models[1:], method="ties", weights="balanced", dry_run=True)
    small = modelmerge.merge(models[0], vectors, method="ties", weights="balanced", dry_run=True)
    assert small["weights"] == pytest.approx(whole["weights"], rel=0.01)


def test_the_command_line_says_it_in_one_word(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "kron", *map(str, models), "--json"]
    assert main([*words, "-o", str(tmp_path / "out"), "--weight", "balanced", "-n"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["weights"]["far"] < 0.2
    assert main([*words, "-o", str(tmp_path / "out"), "--weight", "balanced", "--at", "*q_proj*: far.weight=1"]) == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    assert "--weight far=0.1" in manifest["command"]
    assert main([*words, "-o", str(tmp_path / "other"), "--weight", "balanced", "--weight", "far=1"]) == 2
    assert "sets the weights of all experts" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main([*words, "-o", str(tmp_path / "other"), "--weight", "balanced", "--layers", "0-2"]) == 2
    assert "needs the base's own layers" in json.loads(capsys.readouterr().out)["error"]["message"]
    recipe = ["merge", "--recipe", str(tmp_path / "out" / "modelmerge.json"), "-o", str(tmp_path / "plain"), "--json"]
    assert main([*recipe, "--weight", "far=1"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["recipe"]["weights"]["far"] == 1.0
    with pytest.raises(UsageError, match="must be balanced"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="kron", weights="even")  # type: ignore[arg-type]


def test_tensors_in_memory_are_weighed_too(models: list[Path], tmp_path: Path) -> None:
    base, *experts = (load_file(path / "model.safetensors") for path in models)
    named = dict(zip(FACTORS, experts, strict=True))
    merged = modelmerge.merge(base, named, method="kron", weights="balanced")
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="kron", weights="balanced")
    assert same_bits(merged, read(tmp_path / "out"))


def test_auto_weighs_what_went_far_and_nothing_else(models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="auto")
    assert manifest["recipe"]["weights"]["far"] < 0.2
    named = modelmerge.merge(models[0], models[1:], tmp_path / "named", method="auto", weights={"far": 2.0})
    assert named["recipe"]["weights"]["far"] == 2.0
    even = modelmerge.merge(models[0], [models[1], models[3]], tmp_path / "even", method="auto")
    assert even["recipe"]["weights"] == {}
    assert not any("from the base" in note for note in even["notes"])


def test_on_the_hub_a_dry_run_says_what_looking_might_change(hub: FakeHub, tmp_path: Path) -> None:
    for name, state in states().items():
        hub.add(f"org/{name}", write(tmp_path / name, state))
    experts = [f"org/{name}" for name in FACTORS]
    plan = modelmerge.merge("org/base", experts, method="kron", weights="balanced", dry_run=True)
    assert set(plan["weights"].values()) == {1.0}
    assert any("will have a smaller weight" in remark for remark in plan["remarks"])
    manifest = modelmerge.merge("org/base", experts, tmp_path / "out", method="kron", weights="balanced", stream=True)
    assert manifest["recipe"]["weights"]["far"] < 0.2
