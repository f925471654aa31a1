"""The default scale of a sum: 1 / sqrt(T), less where the experts overlap, as their task vectors' angles tell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import modelmerge
from modelmerge.cli import main
from modelmerge.engine.lengths import overlap_scale
from tests.support.checkpoints import State, read, same_bits, write
from tests.support.hub_server import FakeHub

EXPERTS = ("a", "b", "c")
COSINE = 0.5
# The inverse length of three unit vectors at that cosine to one another.
SCALE = (3 + 6 * COSINE) ** -0.5


def states() -> dict[str, State]:
    """A base, and experts of unlike lengths whose task vectors are at COSINE to one another."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"layers.{i}.{kind}.weight": random(160, 48) for i in range(3) for kind in ("q_proj", "mlp")}
    base |= {"norm.weight": torch.ones(48)}
    shared = {key: random(*tensor.shape) for key, tensor in base.items()}
    experts = {
        name: {
            key: tensor
            + 0.01 * (i + 1) * (math.sqrt(COSINE) * shared[key] + math.sqrt(1 - COSINE) * random(*tensor.shape))
            for key, tensor in base.items()
        }
        for i, name in enumerate(EXPERTS)
    }
    return {"base": base, **experts}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, state) for name, state in states().items()]


@pytest.mark.parametrize(
    ("vectors", "scale"),
    [
        ([[1.0, 0.0], [0.0, 5.0]], 0.707),
        ([[1.0, 0.0], [4.0, 0.0]], 0.5),
        ([[1.0, 0.0], [-4.0, 0.1]], 0.707),  # turned away from one another: no more than at right angles
        ([[1.0, 0.0], [0.0, 0.0]], 0.707),  # what was looked at is as in the base
        ([[3.0, 4.0]], 1.0),
    ],
)
def test_the_scale_is_the_inverse_length_of_the_sum_of_unit_vectors(vectors: list[list[float]], scale: float) -> None:
    taus = torch.tensor(vectors, dtype=torch.float64)
    assert overlap_scale(taus @ taus.T) == scale


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_the_manifest_has_the_scale_and_naming_it_changes_no_bit(
    method: str, models: list[Path], tmp_path: Path
) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method=method)
    scale = manifest["recipe"]["options"]["scale"]
    assert scale == pytest.approx(SCALE, rel=0.02)
    plan = modelmerge.merge(models[0], models[1:], method=method, dry_run=True)
    assert plan["groups"][0]["settings"]["scale"] == scale
    named = modelmerge.merge(models[0], models[1:], tmp_path / "named", method=method, scale=scale)
    modelmerge.replay(tmp_path / "out" / "modelmerge.json", tmp_path / "again")
    # Whoever merges at another place measures it again.
    words = ["merge", method, *map(str, models), "-o", str(tmp_path / "shared"), "--cluster", "files", "-q"]
    assert main(words) == 0
    want = read(tmp_path / "out")
    for other in ("named", "again", "shared"):
        assert same_bits(want, read(tmp_path / other)), other
    base, *experts = (load_file(path / "model.safetensors") for path in models)
    assert same_bits(want, modelmerge.merge(base, dict(zip(EXPERTS, experts, strict=True)), method=method))
    assert named["recipe"]["overlap"] is None


def test_it_holds_in_overrides_and_for_the_rest(models: list[Path], tmp_path: Path) -> None:
    scale = modelmerge.merge(models[0], models[1:], method="ties", dry_run=True)["groups"][0]["settings"]["scale"]
    for how in ({"method": "average", "at": ["*mlp*: ties"]}, {"method": "tsv-m", "rest": "ties"}):
        plan = modelmerge.merge(models[0], models[1:], **how, dry_run=True)
        assert [group["settings"]["scale"] for group in plan["groups"] if group["method"] == "ties"] == [scale]
    # What keeps little of the task vectors, and what a transform has turned, goes by their number.
    for how in ({"method": "consensus"}, {"method": "ties", "disentangle": "awd"}):
        plan = modelmerge.merge(models[0], models[1:], **how, dry_run=True)
        assert plan["groups"][0]["settings"]["scale"] == 0.577


def test_a_replay_with_other_options_lets_go_of_it(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties")
    scale = manifest["recipe"]["options"]["scale"]
    words = ["merge", "--recipe", str(tmp_path / "out"), "-o", str(tmp_path / "again"), "--json", "-n"]
    for option, want in ((["--reduce", "mean"], 1.0), (["--published"], 0.3), (["--density", "0.5"], scale)):
        assert main([*words, *option]) == 0
        assert json.loads(capsys.readouterr().out)["plan"]["groups"][0]["settings"]["scale"] == want


def test_a_search_has_the_scale_of_a_merge(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text("def f(model):\n    return {'one': 1.0}\n")
    on = [f"custom:{tmp_path}/metric.py:f"]
    modelmerge.search(models[0], models[1:], tmp_path / "best", method="ties", tries={"density": [0.3, 0.5]}, on=on)
    modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="ties", density=0.3)
    assert same_bits(read(tmp_path / "best"), read(tmp_path / "plain"))


def test_on_the_hub_a_dry_run_says_what_looking_might_change(hub: FakeHub, tmp_path: Path) -> None:
    for name, state in states().items():
        hub.add(f"org/{name}", write(tmp_path / name, state))
    experts = [f"org/{name}" for name in EXPERTS]
    plan = modelmerge.merge("org/base", experts, method="ties", dry_run=True)
    assert plan["groups"][0]["settings"]["scale"] == 0.577
    assert any("will be smaller where the experts turn out to overlap" in remark for remark in plan["remarks"])
    manifest = modelmerge.merge("org/base", experts, tmp_path / "out", method="ties", stream=True)
    scale = manifest["recipe"]["options"]["scale"]
    assert scale == pytest.approx(SCALE, rel=0.02)
    # To put parts together, even to plan it, no model is read again.
    modelmerge.merge("org/base", experts, tmp_path / "part", method="ties", stream=True, part="1/1")
    plan = modelmerge.merge("org/base", experts, method="ties", finish=[tmp_path / "part"], dry_run=True)
    assert plan["groups"][0]["settings"]["scale"] == scale
