"""Task-aware weights, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import UsageError
from modelmerge.methods import lambdas, registry
from modelmerge.methods.merge import apgd
from tests.checkpoints import SHAPES, State, base_state, expert_state, read, write
from tests.test_every_method import takes
from tests.test_merge import same_bits

FLOATING = list(SHAPES)
MODES = ("relative", "matched", "paper")
NAMES = [name for name in registry.data_free() if not registry.load(name).own_lambda]


@pytest.fixture
def uneven(tmp_path: Path) -> list[Path]:
    """A base and three experts, the first of which went far, and the last not everywhere."""
    base = base_state()
    states = [expert_state(base, i, scale=scale) for i, scale in enumerate((3e-2, 1e-2, 5e-3))]
    states[2]["model.layers.0.q_proj.weight"] = base["model.layers.0.q_proj.weight"].clone()
    return [write(tmp_path / "base", base), *(write(tmp_path / f"expert_{i}", s) for i, s in enumerate(states))]


def merged(models: list[Path], out: Path, **told: Any) -> State:
    modelmerge.merge(models[0], models[1:], out, **told)
    return read(out)


def expected(models: list[Path], key: str, mode: str) -> list[float]:
    """The lambdas in float64, as they are defined."""
    base, *experts = (read(path)[key].double() for path in models)
    taus = [expert - base for expert in experts]
    active = [tau for tau in taus if tau.any()]
    mean = sum(float(tau.norm()) for tau in active) / len(active)
    length = float(sum(tau / tau.norm() for tau in active).norm())  # type: ignore[union-attr]
    scale = {"relative": mean, "matched": mean / max(length, 1.0), "paper": 0.07}[mode]
    return [scale / float(tau.norm()) if tau.any() else 0.0 for tau in taus]


@pytest.mark.parametrize("mode", MODES)
def test_lambdas_are_as_defined(mode: str, uneven: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    manifest = modelmerge.merge(
        uneven[0], uneven[1:], tmp_path / "out", method="task-arithmetic", scale=1.0, task_lambda=mode,
        weights={"expert_1": 2.0},
    )  # fmt: skip
    base, *experts = ({k: t.double() for k, t in read(path).items()} for path in uneven)
    got = read(tmp_path / "out")
    for key in FLOATING:
        lambdas = expected(uneven, key, mode)
        assert manifest["tensors"]["task_lambda"][key] == pytest.approx(lambdas, rel=1e-6), key
        weights = [lambdas[0], 2 * lambdas[1], lambdas[2]]
        want = base[key] + sum(w * (expert[key] - base[key]) for w, expert in zip(weights, experts, strict=True))
        assert torch.allclose(got[key].double(), want, atol=1e-7), key
    left = {"tensor": "model.layers.0.q_proj.weight", "expert": "expert_2", "reason": "it hardly changed this weight"}
    assert manifest["tensors"]["left_out"] == [left]
    assert "'expert_2' was left out of 1 tensor: it hardly changed this weight." in manifest["notes"]


@pytest.mark.parametrize("mode", MODES)
def test_lambdas_are_those_of_apgd(mode: str) -> None:
    taus = (
        torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 3, 4.0])[:, None, None]
    )
    options = apgd.Options(lambda_mode=mode, **({"scale": 1.0} if mode == "relative" else {}))  # type: ignore[arg-type]
    want = apgd.task_lambdas(taus, [float(tau.norm()) for tau in taus], [1.0] * 4, options)
    flat = taus.flatten(1).double()
    assert lambdas.task_lambdas(flat @ flat.T, mode) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_them_as_weights(name: str, uneven: list[Path], tmp_path: Path) -> None:
    """As if each tensor had been merged with these --weight."""
    few = uneven[: 1 + takes(name, 3)]
    got = merged(few, tmp_path / "out", method=name, task_lambda="relative", rest="task-arithmetic")
    told = json.loads((tmp_path / "out" / "modelmerge.json").read_text())["tensors"]["task_lambda"]
    vary = [f"expert_{i}:weight={weight!r}@{key}" for key, lambdas in told.items() for i, weight in enumerate(lambdas)]
    assert same_bits(got, merged(few, tmp_path / "vary", method=name, vary=vary, rest="task-arithmetic"))


def test_they_are_of_the_disentangled_vectors_and_of_layers_before_they_are_scaled(
    uneven: list[Path], tmp_path: Path
) -> None:
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 1.0, "task_lambda": "paper"}
    plain, base = merged(uneven, tmp_path / "plain", **told), read(uneven[0])
    half = merged(uneven, tmp_path / "half", layer_scale="0.5", **told)
    assert all(torch.allclose(half[k] - base[k], 0.5 * (plain[k] - base[k]), atol=1e-7) for k in FLOATING)
    modelmerge.disentangle(uneven[0], uneven[1:], tmp_path / "apart", method="awd")
    vectors = [tmp_path / "apart" / f"expert_{i}" for i in range(3)]
    want = merged([uneven[0], *vectors], tmp_path / "want", **told)
    got = merged(uneven, tmp_path / "got", disentangle="awd", **told)
    assert all(torch.allclose(got[k], want[k], atol=1e-7) for k in FLOATING)


def test_a_method_that_makes_its_own_refuses_them(uneven: list[Path], tmp_path: Path) -> None:
    for told in ({"method": "apgd"}, {"method": "ties", "rule": ["*q_proj*=apgd"]}):
        with pytest.raises(UsageError, match="'apgd' makes its lambdas task-aware itself"):
            merged(uneven, tmp_path / "out", task_lambda="relative", **told)
    with pytest.raises(UsageError, match="--task-lambda must be one of relative, matched, paper, not 'even'"):
        merged(uneven, tmp_path / "out", task_lambda="even", method="ties")


def test_as_lora_and_again(uneven: list[Path], tmp_path: Path) -> None:
    words = ["merge", "average", *map(str, uneven), "--task-lambda", "relative", "--include", "*proj.weight"]
    assert main([*words, "-o", str(tmp_path / "one"), "-q"]) == 0
    assert main([*words, "-o", str(tmp_path / "lora"), "-q", "--as-lora", "16"]) == 0
    assert main(["merge", "--recipe", str(tmp_path / "one"), "-o", str(tmp_path / "two"), "-q"]) == 0
    one, base, factors = read(tmp_path / "one"), read(uneven[0]), read(tmp_path / "lora")
    assert same_bits(read(tmp_path / "two"), one)
    for key in (key for key in FLOATING if key.endswith("proj.weight")):
        place = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        product = factors[f"{place}B.weight"] @ factors[f"{place}A.weight"]
        assert torch.allclose(product, one[key] - base[key], atol=1e-6)
