"""Numbers that differ between experts, tensors and layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import modelmerge
from modelmerge.errors import UsageError
from modelmerge.methods import registry, threshold
from modelmerge.methods.contract import Context
from modelmerge.methods.options import make_options
from modelmerge.plan import overrides
from tests.support.checkpoints import base_state, expert_state, read, write


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scale=0.5", overrides.Variation("scale", (0.5,))),
        ("scale=0,1e-1,.7@*mlp*", overrides.Variation("scale", (0.0, 0.1, 0.7), None, "*mlp*")),
        ("a.b-c:density=0.2", overrides.Variation("density", (0.2,), "a.b-c")),
        ("shared-rank=3@a=b:c@d", overrides.Variation("shared_rank", (3.0,), None, "a=b:c@d")),
    ],
)  # fmt: skip
def test_grammar_and_back(text: str, said: overrides.Variation) -> None:
    assert overrides.parse(text) == said
    assert overrides.parse(str(said)) == said


@pytest.mark.parametrize("text", ["", "scale", "scale=", "scale=a", "=1", ":scale=1", "scale=1@", "scale=1,,2", "x:=1"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not"):
        overrides.parse(text)


def test_numbers_keep_their_bits() -> None:
    said = overrides.Variation("weight", (0.1 + 0.2, 1e-30, 2.0, 1 / 3))
    assert overrides.parse(str(said)) == said
    assert str(said).endswith(",1e-30,2,0.3333333333333333")


def test_depth_is_by_layer_and_prefix() -> None:
    names = ["embed", "enc.0.w", "enc.1.w", "enc.2.w.7.x", "dec.layers.0.w", "head.weight"]
    assert overrides.depths(names) == {
        "embed": 0.0, "enc.0.w": 0.0, "enc.1.w": 0.5, "enc.2.w.7.x": 1.0, "dec.layers.0.w": 1.0, "head.weight": 0.0,
    }  # fmt: skip
    assert [overrides.parse("scale=0,1,5").at(depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 3, 5]


def test_each_tensor_is_merged_with_its_own_numbers(models: list[Path], tmp_path: Path) -> None:
    """As if it had been merged alone with plain options."""
    told = ["weight=0.5", "expert_1:weight=3,1", "scale=0.7@*.mlp.*", "expert_2:density=0.3", "scale=0.2@*up_proj.bias"]
    common: dict[str, object] = {"method": "ties", "trim_scope": "tensor", "density": 0.6, "reduce": "mean"}
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", vary=told, **common)  # type: ignore[arg-type]
    assert manifest["recipe"]["vary"] == told
    got, settings = read(tmp_path / "out"), {
        "model.layers.0.q_proj.weight": (0.3, 3.0), "model.layers.0.mlp.up_proj.weight": (0.7, 3.0),
        "model.layers.0.mlp.up_proj.bias": (0.2, 3.0), "model.layers.1.mlp.down_proj.weight": (0.7, 1.0),
        "logit_scale": (0.3, 3.0),
    }  # fmt: skip
    states = [read(path) for path in models]
    ties = registry.load("ties")
    for name, (scale, weight) in settings.items():
        taus = torch.stack([expert[name] - states[0][name] for expert in states[1:]])
        options = make_options(ties, "ties", {"density": 0.6, "reduce": "mean", "trim_scope": "tensor"})
        context = Context(tensor=name, weights=(0.5, weight, 0.5), varied={"density": (0.6, 0.6, 0.3)})
        delta = ties.apply(taus, options, context) / 0.3 * scale
        assert torch.allclose(got[name], states[0][name] + delta, atol=1e-7), name


def test_the_last_that_applies_counts(models: list[Path], tmp_path: Path) -> None:
    say = {
        "one": ["scale=9", "scale=0.5"],
        "two": ["scale=0.5@*", "scale=0.5"],
        "three": ["scale=1@*q_proj*", "scale=0.5"],
    }
    for name, told in say.items():
        modelmerge.merge(models[0], models[1:], tmp_path / name, method="task-arithmetic", vary=told)
    modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="task-arithmetic", scale=0.5)
    want = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert all((tmp_path / name / "model.safetensors").read_bytes() == want for name in say)


def test_the_rest_goes_by_the_weights_too(models: list[Path], tmp_path: Path) -> None:
    only = ["expert_0:weight=0", "expert_1:weight=0"]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", steps=2, rest="average", vary=only)
    got, third = read(tmp_path / "out"), read(models[3])
    assert torch.allclose(got["model.embed_tokens.weight"], third["model.embed_tokens.weight"], atol=1e-7)


@pytest.mark.parametrize(
    ("method", "told", "says"),
    [
        ("ties", "expert_9:weight=1", "names 'expert_9', which is no expert"),
        ("ties", "sclae=1", "did you mean 'scale'"),
        ("ties", "reduce=1", "what can: weight, density, scale"),
        ("ties", "density=1@*norm*", "whole task vector, and can differ between experts only --trim"),
        ("ties", "expert_0:density=0.1,0.5", "whole task vector, and can differ between experts only --trim"),
        ("ties", "expert_0:scale=1", "scale is one number for all experts"),
        ("ties", "scale=1@*colour*", r"'\*colour\*' matches no tensor that is merged"),
        ("ties", "scale=inf", "--scale must be finite"),
        ("ties", "weight=nan", "a weight must be finite"),
        ("average", "weight=0@*norm*", "in 'model.layers.0.norm.weight' the weights add up to zero"),
        ("average", "position=1@position_ids", "'position_ids' matches no tensor that is merged"),
    ],
)
def test_what_cannot_vary_is_refused(method: str, told: str, says: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method=method, vary=[told])
    assert re.search(says, f"{refused.value.message} {refused.value.hint}")


@pytest.mark.parametrize(
    "told", [["density=0.5", "expert_2:density=0.05"], ["expert_0:density=0.6", "expert_1:density=1"]]
)
@pytest.mark.parametrize("sampled", [1 << 24, 1])
def test_a_density_of_the_whole_model_can_differ_between_experts(
    told: list[str], sampled: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "SAMPLED", sampled)
    densities = {"density=0.5": (0.5, 0.5, 0.05), "expert_0:density=0.6": (0.6, 1.0, 0.2)}[told[0]]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", scale=1.0, vary=told)
    states, got = [read(path) for path in models], read(tmp_path / "out")
    names = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    ups, downs = torch.zeros(1), torch.zeros(1)
    for density, expert in zip(densities, states[1:], strict=True):
        tau = torch.cat([(expert[name] - states[0][name]).flatten() for name in names])
        kept = tau * (tau.abs() >= tau.abs().sort(descending=True).values[min(int(density * len(tau)), len(tau) - 1)])
        ups, downs = ups + kept.clamp(min=0), downs + kept.clamp(max=0)
    want = torch.where(ups + downs > 0, ups, torch.where(ups + downs < 0, downs, 0.0))
    merged = torch.cat([(got[name] - states[0][name]).flatten() for name in names])
    assert torch.allclose(merged, want, atol=1e-7)


def test_a_density_out_of_bounds_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--density must be above 0 and at most 1, not 2"):
        modelmerge.merge(
            models[0], models[1:], tmp_path / "out", method="ties", trim_scope="tensor", vary=["density=0.5,2"]
        )


def test_a_gradient_needs_layers(tmp_path: Path) -> None:
    base = {"a": base_state()["model.embed_tokens.weight"]}
    paths = [write(tmp_path / "b", base), write(tmp_path / "e", expert_state(base, 0))]
    with pytest.raises(UsageError, match="no tensor that is merged has a numbered layer"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="ties", vary=["scale=0,1"])
