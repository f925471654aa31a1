"""The weights of a layer's experts in one tensor are merged as so many matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import modelmerge
from modelmerge.methods import registry
from tests.support.checkpoints import State, read, write
from tests.support.methods import takes

_STACK = "model.layers.0.mlp.experts.gate_up_proj"
_DRAWS = ("dare", "della")  # by the tensors' names, which differ


def unstacked(state: State) -> State:
    """The same weights, the stack's matrices one by one."""
    return {
        part: matrix
        for name, tensor in state.items()
        for part, matrix in (
            ((f"{name}.{i}.weight", m.clone()) for i, m in enumerate(tensor)) if name == _STACK else ((name, tensor),)
        )
    }


@pytest.fixture(scope="module")
def states() -> list[State]:
    """A base with a stack of three matrices, and three experts of it."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base = {_STACK: draw(3, 8, 6), "model.layers.0.self_attn.q_proj.weight": draw(6, 6), "model.norm.weight": draw(6)}
    return [base, *({name: t + 0.1 * draw(*t.shape) for name, t in base.items()} for _ in range(3))]


@pytest.mark.parametrize("name", [n for n in registry.names() if n not in (*_DRAWS, "adamerging")])
def test_a_stack_is_merged_as_its_matrices_are(name: str, states: list[State], tmp_path: Path) -> None:
    chosen = states[: 1 + takes(name, 3)]
    for kind, shape in (("stacked", lambda state: state), ("single", unstacked)):
        models = [write(tmp_path / kind / str(i), shape(state)) for i, state in enumerate(chosen)]
        modelmerge.merge(models[0], models[1:], tmp_path / kind / "out", method=name)
    stacked, single = read(tmp_path / "stacked" / "out"), read(tmp_path / "single" / "out")
    assert {n: t.shape for n, t in stacked.items()} == {n: t.shape for n, t in states[0].items()}
    for part, tensor in unstacked(stacked).items():
        torch.testing.assert_close(tensor, single[part], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", registry.names("transform"))
def test_a_transform_takes_a_stack_as_its_matrices(name: str, states: list[State], tmp_path: Path) -> None:
    for kind, shape in (("stacked", lambda state: state), ("single", unstacked)):
        models = [write(tmp_path / kind / str(i), shape(state)) for i, state in enumerate(states)]
        modelmerge.merge(models[0], models[1:], tmp_path / kind / "out", method="average", disentangle=name)
        modelmerge.disentangle(models[0], models[1:], tmp_path / kind / "vectors", method=name, full_experts=True)
    stacked, single = read(tmp_path / "stacked" / "out"), read(tmp_path / "single" / "out")
    for part, tensor in unstacked(stacked).items():
        torch.testing.assert_close(tensor, single[part], rtol=0, atol=1e-5)
    expert = read(tmp_path / "stacked" / "vectors" / "experts" / "1")
    other = read(tmp_path / "single" / "vectors" / "experts" / "1")
    for part, tensor in unstacked(expert).items():
        torch.testing.assert_close(tensor, other[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_task_vector_of_a_stack_merges_as_its_expert(rank: int | None, states: list[State], tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), state) for i, state in enumerate(states)]
    modelmerge.extract(models[0], models[1:], tmp_path / "vectors", rank=rank)
    vectors = [tmp_path / "vectors" / str(i) for i in (1, 2, 3)]
    modelmerge.merge(models[0], vectors, tmp_path / "out", method="tsv-m")
    modelmerge.merge(models[0], models[1:], tmp_path / "direct", method="tsv-m")
    merged, direct = read(tmp_path / "out"), read(tmp_path / "direct")
    assert merged.keys() == direct.keys()
    if rank is None:
        for part, tensor in merged.items():
            torch.testing.assert_close(tensor, direct[part], rtol=0, atol=1e-5)
    else:
        assert not torch.equal(merged[_STACK], states[0][_STACK])


def test_overrides_and_globs_speak_of_the_stack(states: list[State], tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), state) for i, state in enumerate(states)]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average", at=["*gate_up_proj: base"])
    assert torch.equal(read(tmp_path / "out")[_STACK], states[0][_STACK])
    plan = modelmerge.merge(models[0], models[1:], method="average", at=["*gate_up_proj: kron scale=0.5"], dry_run=True)
    groups = {group["method"]: group["tensors"] for group in plan["groups"]}
    assert groups["kron"] == [f"{_STACK}[{i}]" for i in range(3)]
    modelmerge.merge(models[0], models[1:], tmp_path / "without", method="average", exclude=["*experts*"])
    assert torch.equal(read(tmp_path / "without")[_STACK], states[0][_STACK])


def test_figures_of_weights_are_those_of_the_matrices(states: list[State], tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), state) for i, state in enumerate(states)]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average")
    report = modelmerge.evaluate([tmp_path / "out"], suite="weights", per_layer=True)
    assert f"{_STACK}[2]" in report["tensors"]
