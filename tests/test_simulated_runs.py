"""Whole runs on a device, without one: `sim:1` through files, with the CPU's numbers and within the promised memory."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.engine.parallel import threads
from modelmerge.methods import registry
from tests.benchmarks import promises
from tests.support.checkpoints import State, read, same, write
from tests.support.commands import refused, run
from tests.support.methods import takes
from tests.support.progress import Ear
from tests.support.simulated import Machine, simulated

SHAPES = {
    "model.embed_tokens.weight": (300, 96),
    "model.layers.0.mlp.up_proj.weight": (160, 96),
    "model.layers.0.mlp.up_proj.bias": (160,),
    "model.layers.1.mlp.down_proj.weight": (96, 160),
    "model.norm.weight": (96,),
}
EXPERTS = 3
# How often the engine waits for the device at each tensor: whether the values are finite, before and after; their copy
# to the host; and whether the whole of a lone expert is merged, or what 16 bits lose. Methods have bounds of their own.
EACH = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three experts."""
    root, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).mul(0.1) for name, shape in SHAPES.items()}
    states: list[State] = [
        {name: tensor + 1e-2 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(EXPERTS)
    ]
    return [write(root / name, state) for name, state in zip(("base", "a", "b", "c"), (base, *states), strict=True)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with simulated() as machine, threads(1):
        yield machine


def close(left: State, right: State, within: float) -> bool:
    """Whether all tensors are the same, to a relative norm."""
    return left.keys() == right.keys() and all(
        float((left[name].double() - right[name].double()).norm()) <= within * float(right[name].double().norm())
        for name in left
    )


def check_device(machine: Machine, promised: dict[str, int]) -> None:
    """Only the device that was named was used, it is empty again, and no more of it was held than promised."""
    assert machine.used <= {1}
    assert (machine.peak[0], machine.held[1]) == (0, 0)
    assert 0 < machine.peak[1] <= promised["device"], (machine.peak, promised)
    assert machine.pinned_peak <= promised["host"]


CASES = [
    *((name, {}) for name in registry.data_free()),
    ("apgd", {"published": True, "steps": 20}),
    ("ties", {"trim_scope": "tensor", "rescale": "norm"}),
    ("wudi", {"solver": "adam", "steps": 20}),
    ("average", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("name", "values"), CASES, ids=lambda each: str(each))
def test_merges_on_a_simulated_device(
    name: str, values: dict[str, Any], models: list[Path], tmp_path: Path, machine: Machine
) -> None:
    experts = models[1 : 1 + takes(name, EXPERTS)]
    plan = modelmerge.merge(models[0], experts, tmp_path, method=name, device="sim:1", dry_run=True, **values)
    assert not [wait for wait in machine.waits if "engine/estimate" not in wait], "a plan only measures the device"
    machine.forget()
    manifest = modelmerge.merge(models[0], experts, tmp_path / "there", method=name, device="sim:1", **values)
    waits = list(machine.waits)
    modelmerge.merge(models[0], experts, tmp_path / "here", method=name, device="cpu", **values)
    assert manifest["device"] == "sim:1"
    check_device(machine, plan["peak_memory"])
    assert len([wait for wait in waits if " at engine/" in wait]) <= EACH * len(SHAPES), waits
    left, right = read(tmp_path / "there"), read(tmp_path / "here")
    assert close(left, right, 1e-6) if registry.load(name).matrices else same(left, right)


# Batches.

LAYERS = 5


def small_layers(root: Path) -> list[Path]:
    """A base and three experts of layers that are alike, but that one expert has left two of them at the base."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{which}_proj.weight" for i in range(LAYERS) for which in "qk"]
    base = {name: torch.randn(64, 48, generator=generator).mul(0.1) for name in names}
    states: list[State] = [
        {name: tensor + 1e-2 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        for _ in range(EXPERTS)
    ]
    for name in names[:2]:
        states[0][name] = base[name].clone()
    return [write(root / name, state) for name, state in zip(("base", "a", "b", "c"), (base, *states), strict=True)]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_layers(tmp_path_factory.mktemp("layers"))


BATCHED: list[tuple[str, dict[str, Any]]] = [
    ("apgd", {}), ("apgd", {"solver": "adam", "steps": 5}), ("iso-c", {}), ("kron", {}), ("tsv-m", {}), ("wudi", {}),
]  # fmt: skip


@pytest.mark.parametrize("stored", ["whole", "factors"])
@pytest.mark.parametrize(("name", "values"), BATCHED, ids=str)
def test_small_matrices_are_merged_in_batches_on_a_simulated_device(
    name: str,
    values: dict[str, Any],
    stored: str,
    layers: list[Path],
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three at a time, within the promised memory: what is recorded of each is what the CPU records."""
    monkeypatch.setattr("modelmerge.engine.batches.BATCH", 3 * 64 * 48 + 1)
    base, *experts = layers
    if stored == "factors":
        modelmerge.extract(base, experts, tmp_path / "vectors", rank=2, device="cpu")
        experts = [tmp_path / "vectors" / expert.name for expert in experts]
    plan = modelmerge.merge(base, experts, tmp_path, method=name, device="sim:1", dry_run=True, **values)
    shapes = watched(monkeypatch, name)
    machine.forget()
    ear = Ear()
    there = modelmerge.merge(base, experts, tmp_path / "there", method=name, device="sim:1", progress=ear, **values)
    check_device(machine, plan["peak_memory"])
    assert (len(ear.done), sum(ear.done.values())) == (2 * LAYERS, ear.total)
    sizes = [shape[1] for shape in shapes if len(shape) == 4]
    # What is stored whole shows only when it is there that it is not alike: three are then merged one by one.
    assert sizes == ([] if values else [3, 3, 3] if stored == "whole" else [2, 3, 3, 2])
    here = modelmerge.merge(base, experts, tmp_path / "here", method=name, device="cpu", **values)
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-5)
    assert there["tensors"]["left_out"] == here["tensors"]["left_out"]
    for tensor, figures in here["tensors"]["figures"].items():
        assert there["tensors"]["figures"].pop(tensor) == pytest.approx(figures, rel=1e-4)
    assert not there["tensors"]["figures"]


def test_batches_do_not_depend_on_who_merges_which_file(
    layers: list[Path],
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Alone, and as units of a shared merge."""
    monkeypatch.setattr("modelmerge.engine.batches.BATCH", 3 * 64 * 48)
    seen = dict[str, list[int]]()
    for folder, words in {"alone": [], "shared": ["--cluster", "files"]}.items():
        shapes = watched(monkeypatch, "iso-c")
        asked = [*layers, "-o", tmp_path / folder, "--device", "sim:1", "--max-shard-size", "50KB", *words]
        assert run(capsys, "merge", "iso-c", *asked)[0] == 0
        seen[folder] = sorted(shape[1] for shape in shapes if len(shape) == 4)
    assert seen["alone"] == seen["shared"] != []
    assert len(list((tmp_path / "alone").glob("*.safetensors"))) > 2
    assert same(read(tmp_path / "alone"), read(tmp_path / "shared"))


@pytest.mark.parametrize("name", ["kron", "apgd"])
def test_a_batch_for_which_memory_is_short_is_merged_one_by_one_on_a_simulated_device(
    name: str, layers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the rest of it once the batch is there."""
    base, *experts = layers
    asked: dict[str, Any] = {"method": name, "experts": experts[1:]}  # they are alike
    modelmerge.merge(base, out=tmp_path / "here", device="cpu", **asked)
    with threads(1), simulated() as machine:

        def take() -> None:
            machine.capacity = machine.held[1] + 400_000

        shapes = watched(monkeypatch, name, take)
        modelmerge.merge(base, out=tmp_path / "there", device="sim:1", **asked)
    assert [len(shape) for shape in shapes] == [4] + [3] * 2 * LAYERS
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-5)


def test_batches_are_smaller_where_a_simulated_device_has_little_memory(
    layers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *experts = layers
    shapes = watched(monkeypatch, "kron")
    with threads(1), simulated(capacity=2_500_000) as machine:
        plan = modelmerge.merge(base, experts, tmp_path, method="kron", device="sim:1", dry_run=True)
        machine.forget()
        modelmerge.merge(base, experts, tmp_path / "there", method="kron", device="sim:1")
    assert 1 < max(shape[1] for shape in shapes if len(shape) == 4) < 2 * LAYERS
    assert 0 < machine.peak[1] <= plan["peak_memory"]["device"] <= machine.capacity


def watched(
    monkeypatch: pytest.MonkeyPatch, name: str, before: Callable[[], None] = lambda: None
) -> list[tuple[int, ...]]:
    """The shapes of the task vectors that the method is called with from now on, and what is done before."""
    module, shapes = importlib.import_module(f"modelmerge.methods.merge.{name.replace('-', '_')}"), list[Any]()
    chosen = module.METHOD

    def apply(taus: torch.Tensor, options: Any, context: Any) -> torch.Tensor:
        shapes.append(tuple(taus.shape))
        before()
        return chosen.apply(taus, options, context)

    monkeypatch.setattr(module, "METHOD", dataclasses.replace(chosen, apply=apply))
    return shapes


IN_BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"trim_scope": "tensor", "rescale": "norm"}),
    ("dare", {}),
    ("della", {}),
    *((name, {}) for name in registry.data_free() if registry.load(name).moments(registry.load(name).options(), {})),
]


@pytest.mark.parametrize(("name", "values"), IN_BLOCKS, ids=str)
def test_blocks_on_a_simulated_device(
    name: str,
    values: dict[str, Any],
    models: list[Path],
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors in many blocks, two at a time, are measured and merged there as on the CPU."""
    monkeypatch.setattr("modelmerge.engine.job.CUDA_BLOCK", 1 << 12)
    experts = models[1 : 1 + takes(name, EXPERTS)]
    modelmerge.merge(models[0], experts, tmp_path / "there", method=name, device="sim:1", **values)
    modelmerge.merge(models[0], experts, tmp_path / "here", method=name, device="cpu", **values)
    assert (machine.used, machine.peak[0], machine.held[1]) == ({1}, 0, 0)
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-6)


@pytest.mark.parametrize(
    "asked", [["ties"], ["pcb"], ["average", "--disentangle", "awd steps=5"], ["apgd"]], ids=" ".join
)
def test_units_of_a_shared_merge_on_a_simulated_device(
    asked: list[str], models: list[Path], tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a unit gives comes back from a file."""
    for device, folder in (("sim:1", "there"), ("cpu", "here")):
        words = ["merge", asked[0], *models, "-o", tmp_path / folder, *asked[1:], "--device", device]
        assert run(capsys, *words, "--cluster", "files")[0] == 0
    assert (machine.used, machine.peak[0], machine.held[1]) == ({1}, 0, 0)
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-6)


TRANSFORMS = [
    "awd steps=5", "awd granularity=row steps=5", "awd published=true steps=5", "apgd", "apgd correction=task",
    "apgd published=true correction=task steps=5", "apgd published=true steps=5",
]  # fmt: skip


@pytest.mark.parametrize("words", TRANSFORMS)
def test_transforms_on_a_simulated_device(words: str, models: list[Path], tmp_path: Path, machine: Machine) -> None:
    """In front of a merge: fitted in a pass before it, and applied in each."""
    asked: dict[str, Any] = {"method": "task-arithmetic", "disentangle": [words]}
    plan = modelmerge.merge(models[0], models[1:], tmp_path, device="sim:1", dry_run=True, **asked)
    machine.forget()
    modelmerge.merge(models[0], models[1:], tmp_path / "there", device="sim:1", **asked)
    waits = list(machine.waits)
    modelmerge.merge(models[0], models[1:], tmp_path / "here", device="cpu", **asked)
    check_device(machine, plan["peak_memory"])
    # Each tensor of the merge; of the fit, a check, inner products, figures and matrices of each linear one.
    matrices = 2
    assert len([wait for wait in waits if " at engine/" in wait]) <= EACH * len(SHAPES) + 10 * matrices, waits
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-6)


VERBS = {
    "extract": ["extract"],
    "extract rank": ["extract", "--rank", "4"],
    "extract energy": ["extract", "--energy", "0.5"],
    "disentangle awd": ["disentangle", "awd", "--steps", "5"],
    "disentangle awd row": ["disentangle", "awd", "--steps", "5", "--granularity", "row", "--experts"],
    "disentangle apgd": ["disentangle", "apgd"],
    "disentangle apgd task": ["disentangle", "apgd", "--correction", "task", "--solver", "adam", "--steps", "5"],
    "merge": ["merge", "kron", "--at", "*down*: tsv-m", "--rest", "ties", "--disentangle", "awd steps=5"],
    "merge as lora": ["merge", "task-arithmetic", "--as-lora", "4", "--exclude", "*embed*", "--exclude", "*norm*"],
}


@pytest.mark.parametrize("words", VERBS.values(), ids=list(VERBS))
def test_verbs_on_a_simulated_device(
    words: list[str], models: list[Path], tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = words[: 1 if words[0] == "extract" else 2]
    line = [*verb, *models, *words[len(verb) :]]
    code, out, err = run(capsys, *line, "-o", tmp_path / "there", "--device", "sim:1", "-n", "--json")
    assert code == 0, err
    promised = json.loads(out)["plan"]["peak_memory"]
    machine.peak.clear()  # the plan has measured how fast the device is
    for device, folder in (("sim:1", "there"), ("cpu", "here")):
        code, _, err = run(capsys, *line, "-o", tmp_path / folder, "--device", device)
        assert code == 0, err
    check_device(machine, promised)
    files = sorted(file.relative_to(tmp_path / "here") for file in (tmp_path / "here").rglob("*.safetensors"))
    assert files
    for file in files:
        assert close(load_file(tmp_path / "there" / file), load_file(tmp_path / "here" / file), 1e-6), file


def test_weights_are_looked_at_on_a_simulated_device(models: list[Path], tmp_path: Path, machine: Machine) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "merged", method="ties", device="cpu")
    there, here = (modelmerge.evaluate([tmp_path / "merged"], suite="weights", device=d) for d in ("sim:1", "cpu"))
    assert machine.used <= {1}
    assert (machine.peak[0], machine.held[1]) == (0, 0)
    assert machine.peak[1] > 0
    assert figures(there) == pytest.approx(figures(here), rel=1e-6, abs=1e-9)


def figures(report: Any) -> dict[str, float]:
    """The numbers of a report, by place."""
    found: dict[str, float] = {}

    def collect(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                collect(each, f"{place}/{name}")
        elif isinstance(value, list):
            for i, each in enumerate(value):
                collect(each, f"{place}/{i}")
        elif isinstance(value, float):
            found[place] = value

    collect({name: report[name] for name in ("model", "layer_types")}, "")
    return found


@pytest.mark.parametrize("asked", [{"method": "apgd", "published": True, "steps": 3}, {"method": "ties"}], ids=str)
def test_adapters_that_rescale_columns_on_a_simulated_device(
    asked: dict[str, Any], tmp_path: Path, machine: Machine
) -> None:
    """Norms that are found on the device and on the host are used on both."""
    generator, name = torch.Generator().manual_seed(0), "transformer.h.0.mlp.c_fc"
    base = write(tmp_path / "base", {f"{name}.weight": torch.randn(48, 32, generator=generator)})
    experts = []
    for expert in ("a", "b"):
        parts = {"lora_A.weight": (4, 48), "lora_B.weight": (32, 4), "lora_magnitude_vector": (32,)}
        state = {
            f"base_model.model.{name}.{part}": torch.rand(shape, generator=generator) for part, shape in parts.items()
        }
        experts.append(tmp_path / expert)
        experts[-1].mkdir()
        save_file(state, experts[-1] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True, "fan_in_fan_out": True}
        (experts[-1] / "adapter_config.json").write_text(json.dumps(config))
    for device, folder in (("sim:1", "there"), ("cpu", "here")):
        modelmerge.merge(base, experts, tmp_path / folder, device=device, **asked)
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-6)


# Memory.


CARD = 80_000_000_000  # bytes of an H100
WIDTH, INNER = 16384, 53248  # of Llama 3.1 405B
UNEVEN = {"1": 0.5, "2": 0.0, "3": 2.0}
ONE_BY_ONE: list[dict[str, Any]] = [
    {"method": "kron", "tolerance": 0.1, "weights": UNEVEN}, {"method": "wudi"}, {"method": "apgd", "weights": UNEVEN},
]  # fmt: skip
SLOW: list[dict[str, Any]] = [
    *ONE_BY_ONE, {"method": "kron"}, {"method": "apgd"}, {"method": "apgd", "solver": "adam", "steps": 3},
    {"method": "apgd", "published": True, "steps": 3},
]  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("part", "asked"),
    [*((64, asked) for asked in ONE_BY_ONE), *(pytest.param(8, asked, marks=pytest.mark.slow) for asked in SLOW)],
    ids=str,
)
def test_task_vectors_come_one_at_a_time_where_a_simulated_device_has_no_room_for_them(
    asked: dict[str, Any], part: int, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight and eight experts of 405B whose sides are a 64th, or an 8th, and a card whose memory is as much smaller.

    The ordinary way would hold more than it has.
    """
    monkeypatch.setattr("modelmerge.engine.job.CUDA_BLOCK", 1 << 10)
    monkeypatch.setattr("modelmerge.engine.merge.SMALL", 1 << 30)  # one thread
    generator, name = torch.Generator().manual_seed(0), "model.layers.0.mlp.up_proj.weight"
    shape = (WIDTH // part, INNER // part)[:: -1 if turned else 1]
    base, shared = (torch.randn(shape, generator=generator).mul(size) for size in (0.02, 3e-4))
    states = [base, *(base + shared + 1e-3 * torch.randn(shape, generator=generator) for _ in range(8))]
    paths = []
    for i, state in enumerate(states):
        square = state[: WIDTH // part, : WIDTH // part]  # on its way to the device while another is merged
        others = {f"model.layers.{layer}.self_attn.q_proj.weight": square.bfloat16() for layer in range(2)}
        paths.append(write(tmp_path / f"{i}", {name: state.bfloat16(), **others}))
    asked = {"dtype": "float32", **asked}
    modelmerge.merge(paths[0], paths[1:], tmp_path / "here", device="cpu", **asked)
    with simulated(capacity=CARD // part**2) as machine:
        plan = modelmerge.merge(paths[0], paths[1:], tmp_path, device="sim:1", dry_run=True, **asked)
        machine.forget()
        modelmerge.merge(paths[0], paths[1:], tmp_path / "there", device="sim:1", **asked)
    tasks = 4 * 8 * base.numel()
    assert not [remark for remark in plan["remarks"] if "fit on" in remark]
    assert tasks < machine.peak[1] <= plan["peak_memory"]["device"] <= 0.9 * machine.capacity < 4 * tasks
    assert close(read(tmp_path / "there"), read(tmp_path / "here"), 1e-6)


@pytest.mark.parametrize("method", ["kron", "apgd", "wudi"])
def test_a_weight_of_405b_and_eight_experts_fit_on_a_card(method: str, tmp_path: Path) -> None:
    """By arithmetic: the files have no data."""
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (INNER, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, INNER),
    }
    models = [promises.write(tmp_path / f"{i}", shapes) for i in range(9)]
    for capacity, fits in ((CARD, True), (CARD // 2, False)):
        with simulated(capacity=capacity):
            plan = modelmerge.merge(models[0], models[1:], tmp_path, method=method, device="sim:1", dry_run=True)
        assert plan["peak_memory"]["device"] <= 0.9 * capacity
        beyond = [remark for remark in plan["remarks"] if "fit on sim:1 and" in remark]
        assert (beyond == []) == fits
        assert all(remark.endswith((" h", " days")) for remark in beyond)


@pytest.mark.parametrize("asked", [{"method": "kron"}, {"method": "apgd", "solver": "adam", "steps": 3}], ids=str)
@pytest.mark.parametrize("stored", ["whole", "factors"])
def test_what_exceeds_a_simulated_device_is_merged_on_the_cpu(
    stored: str, asked: dict[str, Any], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmerge.engine.job.CUDA_BLOCK", 1 << 12)  # what comes in blocks fits
    base, *experts = models
    with threads(1):
        if stored == "factors":
            modelmerge.extract(base, experts, tmp_path / "vectors", rank=4, device="cpu")
            experts = [tmp_path / "vectors" / expert.name for expert in experts]
        modelmerge.merge(base, experts, tmp_path / "here", device="cpu", rest="base", **asked)
        with simulated(capacity=1_000_000) as machine:
            plan = modelmerge.merge(base, experts, tmp_path, device="sim:1", rest="base", dry_run=True, **asked)
            machine.forget()
            modelmerge.merge(base, experts, tmp_path / "there", device="sim:1", rest="base", **asked)
    assert any(r.startswith("2 weights do not fit on sim:1 and are merged on the CPU") for r in plan["remarks"])
    assert 0 < machine.peak[1] <= plan["peak_memory"]["device"] <= machine.capacity
    assert same(read(tmp_path / "there"), read(tmp_path / "here"))


@pytest.mark.parametrize(
    "asked",
    [{"method": "apgd", "published": True, "steps": 3, "density": 0.3}, {"method": "ties", "rescale": "norm"}],
    ids=lambda asked: asked["method"],
)
def test_what_a_simulated_device_has_measured_is_used_on_the_cpu(asked: dict[str, Any], tmp_path: Path) -> None:
    """The matrix exceeds the device, and what counts its entries before does not."""
    generator = torch.Generator().manual_seed(0)
    states = [{"layers.0.fc.weight": torch.randn(512, 600, generator=generator)} for _ in range(3)]
    base, *experts = (write(tmp_path / f"{i}", state) for i, state in enumerate(states))
    with threads(1):
        modelmerge.merge(base, experts, tmp_path / "here", device="cpu", **asked)
        with simulated(capacity=15_000_000) as machine:
            plan = modelmerge.merge(base, experts, tmp_path, device="sim:1", dry_run=True, **asked)
            machine.forget()
            modelmerge.merge(base, experts, tmp_path / "there", device="sim:1", **asked)
    assert any(r.startswith("1 weight does not fit on sim:1 and is merged on the CPU") for r in plan["remarks"])
    assert 0 < machine.peak[1] <= machine.capacity
    assert same(read(tmp_path / "there"), read(tmp_path / "here"))


def test_corrections_of_what_exceeds_a_simulated_device_are_found_on_the_cpu(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmerge.engine.job.CUDA_BLOCK", 1 << 9)
    with threads(1):
        modelmerge.disentangle(models[0], models[1:], tmp_path / "here", method="apgd", device="cpu")
        with simulated(capacity=170_000) as machine:  # less than the task vectors of one matrix
            modelmerge.disentangle(models[0], models[1:], tmp_path / "there", method="apgd", device="sim:1")
    assert 0 < machine.peak[1] <= 170_000
    for name in ("a", "b", "c"):
        assert close(read(tmp_path / "there" / name), read(tmp_path / "here" / name), 1e-6)


@pytest.mark.parametrize("last", [5, 40])
@pytest.mark.parametrize(
    "words",
    [
        ["merge", "ties"], ["merge", "apgd"], ["merge", "ties", "--as-lora", "4"], ["disentangle", "apgd"],
        ["disentangle", "awd"], ["extract", "--rank", "4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_simulated_device_that_runs_out_of_memory_ends_in_one_error(
    words: list[str], last: int, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else takes it while the run lasts."""
    with simulated(last=last) as machine:
        error, hint = refused(capsys, *words, *models, "-o", tmp_path / "out", "--device", "sim:1")
    assert machine.allocations > last
    assert error.startswith("sim:1 has too little memory left")
    assert "--device cpu" in hint
    assert not (tmp_path / "out").exists()
