"""The weights of a layer's experts in one tensor are merged as so many matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import modelmerge
from modelmerge.cli import main
from modelmerge.methods import registry
from tests.support import mergekit_runs
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


# --- as one tensor, for a configuration of mergekit ---

_FAMILIES = {name: mergekit_runs.ORACLE / "models" / "experts" / name for name in ("mixtral", "qwen3_moe")}


def configured(place: Path, models: list[Path], *options: str) -> State:
    """What TIES makes of a base and two experts by way of a configuration."""
    listed = [{"model": str(model), "parameters": {"weight": 1, "density": 0.4}} for model in models[1:]]
    content = {"merge_method": "ties", "base_model": str(models[0]), "models": listed, "dtype": "float32"}
    place.mkdir()
    (place / "config.yml").write_text(json.dumps(content))
    assert main(["merge", "--recipe", str(place / "config.yml"), "-o", str(place / "out"), *options]) == 0
    return read(place / "out")


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("options", [[], ["--cluster", "files"], ["--max-shard-size", "2KB"]])
def test_experts_that_are_merged_as_one_tensor_are_stored_as_the_base_does(
    family: str, options: list[str], tmp_path: Path
) -> None:
    models = [_FAMILIES[family] / name for name in ("base", "one", "two")]
    merged, base = configured(tmp_path / "a", models, *options), read(models[0])
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in base.items()}
    plain = configured(tmp_path / "b", models)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in merged.items())
    index = tmp_path / "a" / "out" / "model.safetensors.index.json"
    assert index.exists() == ("2KB" in options)
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == base.keys()


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("rank", [None, 12])
def test_task_vectors_of_experts_that_are_one_tensor_merge_as_the_models(
    family: str, rank: int | None, tmp_path: Path
) -> None:
    base, one, two = (_FAMILIES[family] / name for name in ("base", "one", "two"))
    modelmerge.extract(base, [one], tmp_path / "vectors", rank=rank)
    merged = configured(tmp_path / "a", [base, tmp_path / "vectors" / "one", two])
    for name, tensor in configured(tmp_path / "b", [base, one, two]).items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_experts_that_are_not_stored_or_merged_alike(tmp_path: Path) -> None:
    """One in another dtype counts with all; where one is excluded, the others are matrices for themselves."""
    base, one, two = (_FAMILIES["mixtral"] / name for name in ("base", "one", "two"))
    odd = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    state = read(one)
    for place, dtype in (("half", torch.bfloat16), ("same", torch.float32)):
        write(tmp_path / place, state | {odd: state[odd].bfloat16().to(dtype)}, config=False)
    results = [configured(tmp_path / f"of-{name}", [base, tmp_path / name, two]) for name in ("half", "same")]
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    whole, part = (configured(tmp_path / str(i), [base, one, two], *more) for i, more in
                   enumerate(([], ["--exclude", odd])))  # fmt: skip
    changed = {name.partition(".block")[0] for name, tensor in whole.items() if not torch.equal(tensor, part[name])}
    assert torch.equal(part[odd], read(base)[odd])
    assert changed == {"model.layers.0"}
    down = odd.replace("w3", "w2")
    assert torch.equal(part[down], whole[down])


# --- kernels of convolutions ---

_KERNELS = {"down.conv1.weight": (6, 4, 3), "down.conv2.weight": (8, 4, 3, 3), "down.conv3.weight": (4, 5, 1, 2, 2)}
_OTHERS = {"modulation": (1, 6, 4), "conv_norm.weight": (6,), "down.linear.weight": (6, 5)}
_MATRIX_METHODS = [name for name in registry.names() if registry.load(name).matrices]


def kernels() -> list[State]:
    """A base with kernels over one, two and three dimensions, and three experts of it."""
    generator = torch.Generator().manual_seed(6)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: draw(shape) for name, shape in (_KERNELS | _OTHERS).items()}
    return [base, *({name: t + 0.1 * draw(tuple(t.shape)) for name, t in base.items()} for _ in range(3))]


def flat(state: State) -> State:
    """The same weights, the kernels stored as matrices [out, in * size]."""
    return {name: t.flatten(1) if name in _KERNELS else t for name, t in state.items()}


@pytest.mark.parametrize("name", _MATRIX_METHODS)
def test_a_kernel_that_a_method_for_matrices_is_named_for_is_merged_as_a_matrix(name: str, tmp_path: Path) -> None:
    merged = []
    for kind, shape in (("kernels", lambda state: state), ("flat", flat)):
        models = [write(tmp_path / kind / str(i), shape(state)) for i, state in enumerate(kernels())]
        modelmerge.merge(
            models[0], models[1 : 1 + takes(name, 3)], tmp_path / kind / "out", method="average", at=[f"*conv*: {name}"]
        )
        merged.append(read(tmp_path / kind / "out"))
    assert {name: tuple(tensor.shape) for name, tensor in merged[0].items()} == _KERNELS | _OTHERS
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in flat(merged[0]).items())


def test_kernels_go_to_the_rest_where_no_method_is_named_for_them(tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), state) for i, state in enumerate(kernels())]
    for at in ([], ["*conv*: scale=0.5"]):
        plan = modelmerge.merge(models[0], models[1:], method="kron", at=at, dry_run=True)
        groups = {group["method"]: set(group["tensors"]) for group in plan["groups"]}
        assert groups["kron"] == {"down.linear.weight"}
        assert set(_KERNELS) <= groups["average"]
    plan = modelmerge.merge(models[0], models[1:], method="average", at=["*: tsv-m"], dry_run=True)
    groups = {group["method"]: set(group["tensors"]) for group in plan["groups"]}
    assert groups["tsv-m"] == {*_KERNELS, "down.linear.weight"}


def test_a_merge_of_kernels_as_matrices_replays_and_takes_task_vectors(tmp_path: Path) -> None:
    models = [write(tmp_path / str(i), state) for i, state in enumerate(kernels())]
    out = tmp_path / "out"
    modelmerge.merge(models[0], models[1:], out, method="average", at=["*conv*: kron"], disentangle=["awd"])
    assert main(["merge", "--recipe", str(out / "modelmerge.json"), "-o", str(tmp_path / "again")]) == 0
    assert all(torch.equal(tensor, read(tmp_path / "again")[name]) for name, tensor in read(out).items())
    modelmerge.extract(models[0], models[1:], tmp_path / "vectors")
    vectors = [tmp_path / "vectors" / str(i) for i in (1, 2, 3)]
    modelmerge.merge(models[0], vectors, tmp_path / "from", method="average", at=["*conv*: tsv-m"])
    modelmerge.merge(models[0], models[1:], tmp_path / "direct", method="average", at=["*conv*: tsv-m"])
    for name, tensor in read(tmp_path / "direct").items():
        torch.testing.assert_close(read(tmp_path / "from")[name], tensor, rtol=0, atol=1e-5)
