"""Whole merges through files: streamed equals in memory, and nothing but the numbers decides the bits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import modelmerge
from modelmerge.devices import find_device
from modelmerge.engine import job, memory
from modelmerge.engine.memory import beyond_device, peak_memory
from modelmerge.engine.parallel import threads
from modelmerge.errors import CheckpointError, DeviceError, RecipeError, UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Context, measured_at_once
from modelmerge.methods.options import make_options
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.prepare import prepare
from tests.support.checkpoints import State, base_state, expert_state, family, read, same_bits, write
from tests.support.methods import measured_in_blocks, surveyed, takes
from tests.support.progress import Ear

NAMES = registry.data_free()
NOTHING = {"name": "base", "reference": "base", "path": None, "files": {}}  # an input, as a manifest has it


def in_memory(name: str, base: State, experts: list[State], **values: Any) -> State:
    """The merge of whole models held in memory, by the method's own mathematics on uncut tensors.

    The experts are named expert_0, expert_1, ...
    """
    chosen = registry.load(name)
    options = make_options(chosen, name, values)
    kept = [
        key
        for key, tensor in base.items()
        if tensor.is_floating_point() and tensor.numel()
        and (not chosen.matrices or (tensor.ndim == 2 and "embed" not in key))
    ]  # fmt: skip
    taus = {key: torch.stack([e[key].float() - base[key].float() for e in experts]) for key in kept}
    survey, measured = chosen.survey(options, {}), None
    if survey is not None:
        everything = torch.cat([tau.reshape(len(experts), -1) for tau in taus.values()], dim=1)
        measured = surveyed(survey, everything)
    left = chosen.rest(options) if chosen.matrices else "base"
    result = dict(base) if left == "base" else in_memory(left, base, experts)
    moments = chosen.moments(options, {})
    for key in kept:
        if moments is not None:  # sums of floats are those of the engine's blocks
            width = base[key].shape[1] if base[key].ndim == 2 else 1
            step = max(job.CPU_BLOCK // width, 1) * width
            flat = taus[key].reshape(len(experts), -1), base[key].float().reshape(-1)
            if flat[1].numel() <= job.AT_ONCE:
                measured = measured_at_once(moments, *flat)
            else:
                measured = measured_in_blocks(moments, *flat, step, max(flat[1].numel() // 4, 1))
        context = Context(
            tensor=key, weights=(1.0,) * len(experts), experts=tuple(f"expert_{i}" for i in range(len(experts))),
            measured=measured, base=base[key].float() if chosen.wants_base else None,
        )  # fmt: skip
        with threads(1):
            delta = chosen.apply(taus[key], options, context)
        result[key] = (base[key].float() + delta).to(base[key].dtype)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_equals_in_memory_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 100)  # cut even these small tensors
    monkeypatch.setattr(job, "AT_ONCE", 100 if dtype == torch.bfloat16 else 1 << 20)
    base, *experts = family(tmp_path, dtype=dtype, experts=takes(name, 3))
    modelmerge.merge(base, experts, tmp_path / "out", method=name)
    want = in_memory(name, read(base), [read(e) for e in experts])
    assert same_bits(read(tmp_path / "out"), want)


@pytest.mark.parametrize("name", NAMES)
def test_sharding_changes_no_bit(name: str, tmp_path: Path) -> None:
    base, *experts = family(tmp_path / "single", experts=takes(name, 3))
    modelmerge.merge(base, experts, tmp_path / "out", method=name)
    want = read(tmp_path / "out")
    state = read(base)
    write(tmp_path / "three" / "base", dict(reversed(state.items())), shards=3)
    for i, expert in enumerate(experts):
        write(tmp_path / "three" / f"expert_{i}", read(expert), shards=2 + i)
    sharded = [tmp_path / "three" / path.name for path in experts]
    modelmerge.merge(tmp_path / "three" / "base", sharded, tmp_path / "out3", method=name, max_shard_size="2KB")
    files = sorted(path.name for path in (tmp_path / "out3").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert same_bits(read(tmp_path / "out3"), want)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_workers_changes_no_bit(name: str, models: list[Path], tmp_path: Path) -> None:
    results = []
    for workers in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(workers)
        try:
            modelmerge.merge(models[0], models[1 : 1 + takes(name, 3)], tmp_path / f"{workers}", method=name)
            assert torch.get_num_threads() == workers
        finally:
            torch.set_num_threads(before)
        results.append(read(tmp_path / f"{workers}"))
    assert same_bits(*results)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_experts_changes_nothing_beyond_rounding(name: str, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models[: 1 + takes(name, 3)]
    modelmerge.merge(base, experts, tmp_path / "forth", method=name)
    modelmerge.merge(base, experts[::-1], tmp_path / "back", method=name)
    forth, back, origin = read(tmp_path / "forth"), read(tmp_path / "back"), read(base)
    for key, tensor in origin.items():
        if tensor.is_floating_point() and tensor.numel():
            moved = (forth[key] - tensor).norm()
            assert (forth[key] - back[key]).norm() <= 2e-5 * moved


def test_experts_are_never_rounded_to_the_base(tmp_path: Path) -> None:
    state = base_state(torch.float32)
    base = write(tmp_path / "base", {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()})
    # Task vectors far below bfloat16's steps: cast to the base's dtype they would vanish or be all noise.
    stored = read(base)
    wide = {k: v.float() if v.is_floating_point() else v for k, v in stored.items()}
    experts = [write(tmp_path / f"e{i}", expert_state(wide, i, scale=1e-5)) for i in range(2)]
    modelmerge.merge(base, experts, tmp_path / "out", method="average", dtype="float32")
    merged, parts = read(tmp_path / "out"), [read(e) for e in experts]
    for key, tensor in wide.items():
        if tensor.is_floating_point() and tensor.numel():
            want = (parts[0][key] + parts[1][key]) / 2 - tensor
            assert merged[key].dtype == torch.float32
            assert (merged[key] - tensor - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("method", "options"), [("average", {}), ("task-arithmetic", {"scale": 1.0}), ("iso-c", {})])
def test_the_whole_of_one_expert_is_the_expert_to_the_bit(
    method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base, expert = base_state(dtype), expert_state(base_state(torch.float32), 1)
    expert = {key: (t * 7).to(dtype) if t.is_floating_point() else t for key, t in expert.items()}
    base, out = write(tmp_path / "base", base), tmp_path / "out"
    modelmerge.merge(base, [write(tmp_path / "a", expert)], out, method=method, **options)
    merged = read(out)
    wholes = [key for key in merged if method != "iso-c" or merged[key].ndim != 2 or "embed" in key]
    assert len(wholes) > 2
    for key in wholes:
        assert torch.equal(merged[key], expert[key]), key


def test_float64_keeps_its_precision(tmp_path: Path) -> None:
    base = {"w": torch.full((4, 4), 1.0, dtype=torch.float64) + 1e-12}
    expert = {"w": base["w"] + 1e-10}
    paths = [write(tmp_path / "b", base), write(tmp_path / "e", expert)]
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average")
    got = read(tmp_path / "out")["w"]
    assert got.dtype == torch.float64
    assert ((got - base["w"]) - 1e-10).abs().max() < 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_goes_for_every_floating_tensor(dtype: str, models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average", dtype=dtype, exclude=["*norm*"])
    for key, tensor in read(tmp_path / "out").items():
        assert tensor.dtype == (getattr(torch, dtype) if key != "position_ids" else torch.int64)


@pytest.mark.parametrize("rest", ["base", "average", "task-arithmetic"])
def test_rest_is_what_becomes_of_tensors_that_are_no_matrices(rest: str, models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method="apgd", published=True, steps=3, rest=rest)
    got, origin = read(tmp_path / "out"), read(base)
    want = origin if rest == "base" else in_memory(rest, origin, [read(e) for e in experts])
    for key in ("model.embed_tokens.weight", "model.layers.0.norm.weight", "logit_scale"):
        assert torch.equal(got[key], want[key])
        assert (key in manifest["tensors"]["copied"]) == (rest == "base")
    assert not torch.equal(got["model.layers.0.q_proj.weight"], origin["model.layers.0.q_proj.weight"])


def test_include_and_exclude_choose_the_tensors(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    modelmerge.merge(
        base, experts, tmp_path / "out", method="average", include=["model.layers.*"], exclude=["*.bias"]
    )  # fmt: skip
    got, origin = read(tmp_path / "out"), read(base)
    changed = {key for key in origin if not torch.equal(got[key], origin[key])}
    assert changed == {key for key in origin if key.startswith("model.layers.") and not key.endswith(".bias")}


def test_weights_are_by_name(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    named = {"a": experts[0], "b": experts[1]}
    modelmerge.merge(base, named, tmp_path / "out", method="average", weights={"b": 3})
    got, parts = read(tmp_path / "out"), [read(e) for e in experts]
    key = "model.layers.0.q_proj.weight"
    assert torch.allclose(got[key], (parts[0][key] + 3 * parts[1][key]) / 4, atol=1e-7)


def test_a_recipe_repeats_the_merge_to_the_same_bits(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    first = modelmerge.merge(
        base, experts, tmp_path / "one", method="ties", density=0.4, weights={"expert_1": 0.5}, dtype="bfloat16",
        exclude=["*norm*"], max_shard_size="3KB",
    )  # fmt: skip
    second = modelmerge.replay(tmp_path / "one" / "modelmerge.json", tmp_path / "two")
    assert first["recipe"] == second["recipe"]
    for name, entry in first["files"].items():
        if name != "README.md":  # it names the output
            assert second["files"][name] == entry
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_recipe_whose_input_changed_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    modelmerge.merge(base, experts, tmp_path / "one", method="average")
    shutil.copy(experts[0] / "model.safetensors", experts[1] / "model.safetensors")
    with pytest.raises(RecipeError, match=r"expert_1/model\.safetensors: not the file"):
        modelmerge.replay(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nonsense", "not valid JSON"), ("[]", "must be an object"), ("{}", "inputs is missing"),
        ('{"format": 99, "versions": {"modelmerge": "9.0"}}', "format 99"),
        (json.dumps({"format": 1, "inputs": {"base": NOTHING, "experts": []}, "recipe": {"colour": 1}}),
         "unknown entry 'colour'"),
    ],
)  # fmt: skip
def test_a_broken_recipe_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(RecipeError, match=says):
        modelmerge.replay(tmp_path / "r.json", tmp_path / "out")


def test_the_manifest_tells_the_whole_merge(models: list[Path], tmp_path: Path) -> None:
    base, *experts = models
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method="ties", density=0.5)
    assert manifest == json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    options = {
        "density": 0.5, "scale": 0.577, "published": False, "reduce": "sum", "trim_scope": "model", "rescale": "none",
    }  # fmt: skip
    assert manifest["recipe"]["options"] == options
    assert manifest["tensors"]["merged"] == 8
    assert manifest["tensors"]["copied"] == {"position_ids": "I64, not floating"}
    assert [e["name"] for e in manifest["inputs"]["experts"]] == ["expert_0", "expert_1", "expert_2"]
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "tokenizer.json", "README.md"}


def test_an_expert_that_did_not_change_a_layer_is_named_in_the_notes(tmp_path: Path) -> None:
    base = base_state()
    frozen = expert_state(base, 1)
    frozen["model.layers.0.q_proj.weight"] = base["model.layers.0.q_proj.weight"]
    paths = [
        write(tmp_path / "base", base),
        write(tmp_path / "x", expert_state(base, 0)),
        write(tmp_path / "y", frozen),
    ]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="apgd", published=True, steps=3)
    left_out = [{"tensor": "model.layers.0.q_proj.weight", "expert": "y", "reason": "it did not change this weight"}]
    assert manifest["tensors"]["left_out"] == left_out
    assert manifest["notes"] == ["'y' was left out of 1 tensor: it did not change this weight."]
    experts = {"x": paths[1], "y": paths[2], "z": paths[2]}
    manifest = modelmerge.merge(paths[0], experts, tmp_path / "three", method="apgd")
    assert manifest["notes"] == ["Each of 'y' and 'z' was left out of 1 tensor: it did not change this weight."]


def test_huge_finite_values_are_no_nan(tmp_path: Path) -> None:
    base = {"w": torch.zeros(8, 8)}
    expert = {"w": torch.full((8, 8), 3e38)}  # their sum overflows float32, they do not
    paths = [write(tmp_path / "b", base), write(tmp_path / "e", expert)]
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average")
    assert torch.equal(read(tmp_path / "out")["w"], expert["w"])


def test_a_result_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / "b", {"w": torch.zeros(8, 8)}), write(tmp_path / "e", {"w": torch.full((8, 8), 1e38)})]
    with pytest.raises(CheckpointError, match="'w': the merged values are not finite"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="task-arithmetic", scale=1e3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "e"]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:-1", "mps"])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="is no device"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_named_device_that_is_absent_is_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="no such CUDA device"):
        find_device(name)
    assert find_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weights": {"expert_9": 1}}, "'expert_9', which is no expert"),
        ({"weights": {"expert_0": 1, "expert_1": -1, "expert_2": 0}}, "add up to zero"),
        ({"rest": "mean"}, "there is no merge method 'mean'"),
        ({"dtype": "fp16"}, "dtype must be one of"),
        ({"max_shard_size": "five"}, "is no size"),
        ({"max_shard_size": "0GB"}, "is no size"),
        ({"density": 0.5}, "no option 'density'"),
    ],
)
def test_wrong_words_are_refused(values: dict[str, Any], says: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average", **values)


def test_an_expert_may_have_the_name_of_the_base(tmp_path: Path) -> None:
    base = base_state()
    paths = [write(tmp_path / "a" / "llama", base), write(tmp_path / "b" / "llama", expert_state(base, 0))]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average")
    assert manifest["inputs"]["base"]["path"] != manifest["inputs"]["experts"][0]["path"]
    assert same_bits(read(tmp_path / "out"), read(paths[1]))


def test_what_does_not_fit_on_the_device_is_merged_on_the_cpu(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(method="apgd", base=str(models[0]), experts=tuple(map(str, models[1:])))
    prepared = prepare(recipe, device="cpu")
    source = dataclasses.replace(prepared.job.source, device=torch.device("cuda", 1))
    job = dataclasses.replace(prepared.job, source=source)
    sizes = {t.name: t.numel for t in job.plan.select("merge") if t.linear}
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**12)
    assert beyond_device(job) == set()
    everything = peak_memory(job)["device"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert beyond_device(job) == set(sizes)
    assert peak_memory(job)["device"] <= everything
    assert beyond_device(prepared.job) == set()
    largest = max(sizes, key=lambda name: sizes[name])
    needed = memory._whole_bytes(job, [job.plan.tensors[largest]] * 2)
    for room, way in ((1.2 * needed, memory.AHEAD), (needed, memory.ALONE), (needed * 0.8, memory.ONE_BY_ONE)):
        monkeypatch.setattr(memory, "free_memory", lambda device, room=int(room): room)  # a tenth is kept free
        assert beyond_device(job) == set()
        assert memory.ways(job)[largest] == way
        assert 0 < peak_memory(job)["device"] <= room
    prepared.close()


UNEQUAL = {"model.layers.0.q_proj.weight": (96, 96), "model.layers.1.q_proj.weight": (24, 384)}  # as many bytes


def test_progress_goes_with_the_cost_of_matrices_not_with_their_bytes(tmp_path: Path) -> None:
    """The share of each matrix is about that of the operations which the method takes on it, as torch counts them.

    Of decompositions it counts none, and of reading neither.
    """
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).mul(0.1) for name, shape in UNEQUAL.items()}
    experts = [expert_state(base, seed) for seed in range(2)]
    kron, counted = registry.load("kron"), {}
    for name in UNEQUAL:
        context = Context(tensor=name, weights=(1.0, 1.0), experts=("a", "b"), base=base[name])
        with FlopCounterMode(display=False) as counter:
            kron.apply(torch.stack([expert[name] - base[name] for expert in experts]), kron.options(), context)
        counted[name] = counter.get_total_flops()
    paths = [write(tmp_path / name, state) for name, state in zip("bxy", [base, *experts], strict=True)]
    ear = Ear()
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="kron", device="cpu", progress=ear)
    assert (ear.label, ear.unit, ear.begun) == ("merging", "work", set(UNEQUAL))
    assert sum(ear.done.values()) == ear.total
    for name, count in counted.items():
        assert ear.done[name] / ear.total == pytest.approx(count / sum(counted.values()), abs=0.05)
    assert max(counted.values()) > 5 * min(counted.values())


@pytest.mark.parametrize("words", [
    {"method": "ties", "trim_scope": "tensor"}, {"method": "dare"}, {"method": "apgd"}, {"method": "slerp"},
    {"method": "average", "disentangle": ["apgd"]}, {"method": "kron", "as_lora": 2, "include": ["*proj.weight"]},
], ids=lambda words: " ".join(map(str, words.values())))  # fmt: skip
def test_progress_comes_to_its_end(words: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured first, cut into pieces, or merged whole."""
    monkeypatch.setattr(job, "AT_ONCE", 100)
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    base, *experts = family(tmp_path, experts=1 if words["method"] == "slerp" else 2)
    ear = Ear()
    modelmerge.merge(base, experts, tmp_path / "out", device="cpu", progress=ear, **words)
    assert ear.label == "merging"
    assert sum(ear.done.values()) == ear.total
