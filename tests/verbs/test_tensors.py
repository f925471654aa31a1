"""Merging tensors that are in memory, as a notebook does."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.errors import UsageError
from tests.support.checkpoints import State, read, same_bits


@pytest.fixture
def states(models: list[Path]) -> tuple[State, dict[str, State]]:
    return read(models[0]), {path.name: read(path) for path in models[1:]}


@pytest.mark.parametrize(
    "options",
    [{"method": "ties", "density": 0.4}, {"method": "kron", "at": ["*norm*: base"]}, {"method": "dare", "seed": 3},
     {"method": "average", "weights": {"expert_1": 2.0}, "dtype": "bfloat16"}, {"method": "auto"}],
)  # fmt: skip
def test_tensors_have_the_bits_of_files(
    options: dict[str, Any], states: tuple[State, dict[str, State]], models: list[Path], tmp_path: Path
) -> None:
    base, experts = states
    before = {name: tensor.clone() for name, tensor in base.items()}
    merged = modelmerge.merge(base, experts, **options)
    modelmerge.merge(models[0], models[1:], tmp_path / "out", max_shard_size="2KB", **options)
    assert same_bits(merged, read(tmp_path / "out"))
    assert list(merged) == list(base) or set(merged) == set(base)
    assert same_bits(base, before)


def test_experts_may_stand_in_a_list(states: tuple[State, dict[str, State]]) -> None:
    base, experts = states
    merged = modelmerge.merge(base, list(experts.values()), method="ties", weights={"expert_0": 2.0})
    assert same_bits(merged, modelmerge.merge(base, experts, method="ties", weights={"expert_0": 2.0}))


def test_views_and_tied_tensors_can_be_merged(states: tuple[State, dict[str, State]]) -> None:
    base, experts = states
    table = "model.embed_tokens.weight"
    tied = {**base, "lm_head.weight": base[table], "view": base[table][:4].T}
    others = {name: {**s, "lm_head.weight": s[table], "view": s[table][:4].T} for name, s in experts.items()}
    merged = modelmerge.merge(tied, others, method="average")
    assert torch.equal(merged["view"], merged[table][:4].T)
    assert torch.equal(merged["lm_head.weight"], merged[table])


def test_a_plan_needs_no_output(states: tuple[State, dict[str, State]], models: list[Path], tmp_path: Path) -> None:
    base, experts = states
    for plan in (
        modelmerge.merge(base, experts, method="ties", dry_run=True),
        modelmerge.merge(models[0], models[1:], method="ties", dry_run=True),
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", dry_run=True),
    ):
        assert {tensor["name"] for tensor in plan["tensors"]} == set(base)
        assert plan["peak_memory"]["host"] > 0
        assert plan["bytes"]["write"] > 0
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_meant_is_refused(
    states: tuple[State, dict[str, State]], models: list[Path], tmp_path: Path
) -> None:
    base, experts = states
    with pytest.raises(UsageError, match="must all be mappings of tensors, or all be references"):
        modelmerge.merge(base, models[1:], method="ties")
    with pytest.raises(UsageError, match="tensors in memory are merged in memory"):
        modelmerge.merge(base, experts, tmp_path / "out", method="ties")
    with pytest.raises(UsageError, match="out is missing"):
        modelmerge.merge(models[0], models[1:], method="ties")
    with pytest.raises(UsageError) as refused:
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", exlude=["*norm*"])
    assert refused.value.hint == "did you mean 'exclude'?"
    with pytest.raises(UsageError) as refused:
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", dnsity=0.1)
    assert refused.value.hint == "did you mean 'density'?"
    with pytest.raises(UsageError, match="dtype must be one of float64, float32, float16, bfloat16"):
        modelmerge.merge(base, experts, method="ties", dtype="fp16")
    assert list(tmp_path.glob("out*")) == []


def test_the_package_shows_its_verbs() -> None:
    verbs = {"disentangle", "evaluate", "extract", "merge", "push", "render", "replay", "search", "verify"}
    assert verbs <= set(dir(modelmerge))
    hints = typing.get_type_hints(modelmerge.merge)
    assert typing.Literal["error", "copy", "common-rows"] == hints["on_mismatch"]
