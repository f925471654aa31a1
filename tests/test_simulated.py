"""Work on a device, without one: on `sim:0` and `sim:1` the results are the CPU's, and the processor seldom waits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.devices import Sender, current, find_device, read_later
from modelmerge.errors import DeviceError
from modelmerge.methods import linalg, registry, threshold
from modelmerge.methods.contract import Apart, Context, Method, measured_at_once
from modelmerge.methods.options import make_options
from tests.support.methods import SHAPE, choices, context_of, measured_in_blocks, surveyed, takes, taus_of
from tests.support.simulated import Machine, simulated

SIM = torch.device("sim", 1)  # not the first: what forgets to say which one goes there
EXPERTS = 4


@pytest.fixture
def machine() -> Iterator[Machine]:
    with simulated() as machine:
        yield machine


# The device.


def test_simulated_tensors_are_the_cpus_with_another_device(machine: Machine) -> None:
    values = torch.arange(6.0).view(2, 3)
    there = values.to(SIM)
    made = [torch.zeros(2, device=SIM), torch.tensor([1.0], device=SIM), torch.eye(2, device=SIM), there.new_ones(2)]
    assert {each.device for each in (there, there[0], there.mT @ there, there[[1, 0]], *made)} == {SIM}
    there[0].mul_(2.0).add_(there[1])
    values[0].mul_(2.0).add_(values[1])
    assert torch.equal(there.cpu(), values)
    assert not there.is_cuda


def test_simulated_devices_refuse_to_be_mixed(machine: Machine) -> None:
    there, here, beside = torch.ones(3, device=SIM), torch.ones(3), torch.ones(3, device="sim:0")
    assert (there * torch.tensor(2.0)).device == SIM, "a scalar may lie anywhere, as on CUDA"
    for other in (here, beside):
        with pytest.raises(RuntimeError, match="mixes devices"):
            there + other
        with pytest.raises(RuntimeError, match="mixes devices"):
            other.add_(there)
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool(x.any()), lambda x: x.cpu(),
        lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x),
        lambda x: torch.empty(3).copy_(x), lambda x: x.int().bincount(), lambda x: read_later(x.sum())(),
    ],
)  # fmt: skip
def test_a_simulated_device_tells_where_it_was_waited_for(wait: Any, machine: Machine) -> None:
    there = torch.ones(3).to(SIM)
    there.mul_(2.0).sort()
    assert not machine.waits
    wait(there)
    assert len(machine.waits) == 1


def test_a_simulated_copy_is_there_once_it_was_waited_for(machine: Machine) -> None:
    value = torch.tensor(3.0, device=SIM)
    with current(SIM):
        host = machine.pinned((), torch.float32).copy_(value, non_blocking=True)
        assert host.isnan()
        value.fill_(5.0)  # queued behind the copy
        first, second = read_later(value), machine.event()
        second.record(machine.current_stream(SIM))
        second.synchronize()
    assert (float(host), first()) == (3.0, 5.0)


def test_simulated_streams_must_wait_for_one_another(machine: Machine) -> None:
    stream, event = machine.stream(SIM), machine.event()
    with machine.on(stream):
        there = torch.ones(3, device=SIM)
        event.record(stream)
    with pytest.raises(RuntimeError, match="has not been waited for"):
        there.sum()
    machine.current_stream(SIM).wait_event(event)
    with pytest.raises(RuntimeError, match="without record_stream"):
        there.sum()
    there.record_stream(machine.current_stream(SIM))
    assert float(there.sum()) == 3.0


def test_simulated_memory_is_counted_and_runs_out(machine: Machine) -> None:
    machine.capacity = 4000
    with current(SIM):
        there = torch.zeros(500, device=SIM)
        view = there.view(5, 100)[1:]
        assert machine.free(SIM) == 2000
        assert machine.free(torch.device("sim", 0)) == 4000
        with pytest.raises(torch.OutOfMemoryError):
            there.double()
        del there
        assert machine.free(SIM) == 2000, "a view holds it all"
        del view
    assert (machine.free(SIM), machine.peak[1]) == (4000, 2000)


def test_what_is_sent_to_a_simulated_device_takes_no_wait(machine: Machine) -> None:
    tensors = [torch.arange(4.0), torch.arange(5)]
    with current(SIM):
        there, arrive = Sender(SIM).send(tensors)
        with pytest.raises(RuntimeError, match="has not been waited for"):
            there[0].sum()
        arrive()
        doubled = [each * 2 for each in there]
    assert not machine.waits
    assert machine.used == {1}
    assert all(torch.equal(there.cpu(), here * 2) for there, here in zip(doubled, tensors, strict=True))


def test_simulated_devices_are_found_by_name(machine: Machine) -> None:
    assert [find_device(name) for name in ("sim", "sim:1", "auto")] == [
        torch.device("sim", 0),
        SIM,
        torch.device("sim", 0),
    ]
    with pytest.raises(DeviceError, match="no such SIM device; there are sim:0, sim:1"):
        find_device("sim:2")


def test_no_simulated_device_is_seen_outside() -> None:
    assert torch.accelerator.is_available() == torch.cuda.is_available()
    assert str(find_device("auto")) == ("cuda:0" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DeviceError, match="is no device"):
        find_device("sim")


def test_a_simulated_device_without_memory_is_one_error(machine: Machine) -> None:
    machine.capacity = 1000
    with pytest.raises(DeviceError, match="sim:1 has too little memory left: 1,000 bytes") as refused, current(SIM):
        torch.zeros(1000, device=SIM)
    assert refused.value.hint == "use another device, or device cpu; or end what else holds its memory"


# Every method on one tensor.

# How often the processor waits for the device while a method is at one tensor of so many experts, and for each of the
# iterations that it tells of: what it has to know there to go on. A method that is not named never waits. Where leading
# directions of large matrices are found by products, each round of these waits besides.
_RANKS = "how many singular values count: that is the shape of what follows"
_LOW = "who is of low rank"
_FULL = "whether a polar factor could be found by products"
WAITS: dict[str, tuple[int, float, str]] = {
    "ace": (3, 0, f"norms; {_LOW}; {_RANKS}"),
    "actmat": (1, 0, _LOW),
    "actmat density=0.5": (1, 0, "the ends of all experts"),
    "apgd": (
        6,
        1 / 8,
        f"norms; {_LOW}; the lambdas' scale; the residual, now and then; the iterations; by how much it is shortened",
    ),
    "apgd adam": (4, 0, f"norms; {_LOW}; the lambdas' scale; the first loss; both norms of the bound"),
    "breadcrumbs": (1, 0, "the ends and factors of all experts"),
    "della rescale=norm": (2 * EXPERTS, 0, "the norms before and after, of each expert in its turn"),
    "iso-c": (2, 0, f"{_LOW}; {_FULL}"),
    "iso-cts": (4 + 2 * EXPERTS, 0, f"{_LOW}; {_RANKS}; whether anything of an expert remains; {_FULL}, twice"),
    "karcher": (1, 0, "inner products, from which the host finds the coefficients"),
    "knots": (3, 0, f"{_LOW}; {_RANKS}; the ends of all experts"),
    "kron": (4 + EXPERTS, 1 / 8, f"norms; {_LOW}; {_RANKS}; the residual, now and then, and the iterations"),
    "model-stock": (2, 0, "who changed the tensor; the ratio, of which the user hears"),
    "multislerp": (1, 0, "inner products, from which the host finds the coefficients"),
    "pcb": (1, 0, "the ends of all experts"),
    "ramplus-tl": (1, 0, "the counts of all experts"),
    "sce": (2, 0, "the limit and the squares of all experts; which entries are above it"),
    "slerp": (1, 0, "inner products, from which the host finds the coefficients"),
    "svc": (1, 0, _RANKS),
    "svc of=ties": (2, 0, f"the thresholds of all experts; {_RANKS}"),
    "svc of=tsv-m": (4 + EXPERTS, 0, f"{_LOW}; {_RANKS}"),
    "ties": (1, 0, "the thresholds of all experts"),
    "ties rescale=norm": (2, 0, "the thresholds, and the norms, of all experts"),
    "tsv-m": (3 + EXPERTS, 0, f"{_LOW}; {_RANKS}; {_FULL}, twice"),
    "wudi": (2, 0, f"norms; {_LOW}"),
    "wudi adam": (2, 0, "norms; the size of the task vectors, of which the learning rate is a share"),
}
# Algorithms that are options, in addition to those that each choice of a choice makes.
MORE: dict[str, list[dict[str, Any]]] = {
    "ace": [{"published": True}],
    "actmat": [{"density": 0.5}],
    "apgd": [{"published": True, "steps": 50}, {"solver": "adam", "steps": 50}],
    "svc": [{"published": True}, {"of": "ties"}, {"of": "tsv-m"}],
    "wudi": [{"published": True, "steps": 50}, {"solver": "adam", "steps": 50, "relative_lr": 0.1}],
}
ALGORITHMS = [
    pytest.param(name, values, id=" ".join([name, *(f"{option}={value}" for option, value in values.items())]))
    for name in registry.names()
    for values in (*choices(registry.load(name)), *MORE.get(name, ()))
]


def bound(name: str, values: dict[str, Any], figures: dict[str, float]) -> float:
    """The most waits on one tensor."""
    adam = values.get("solver") == "adam" or values.get("published")
    words = [f"{name} adam"] if adam else [f"{name} {option}={value}" for option, value in values.items()]
    most, each, _ = next((WAITS[word] for word in (*words, name) if word in WAITS), (0, 0, ""))
    looks = figures.get("steps", 0) // 10  # Adam's loss, every tenth step
    return most + math.ceil(each * figures.get("iterations", 0)) + looks


@pytest.mark.parametrize(("name", "values"), ALGORITHMS)
def test_methods_on_a_simulated_device(name: str, values: dict[str, Any], machine: Machine) -> None:
    """The CPU's bits, but for what goes another way on a device; no mixing, few waits."""
    chosen, taus = registry.load(name), taus_of(takes(name, EXPERTS))
    options, figures = make_options(chosen, name, values), dict[str, float]()
    context = context_of(chosen, options, taus, tell=figures.update)
    there = {
        field: getattr(context, field).to(SIM) for field in ("measured", "base") if getattr(context, field) is not None
    }
    result = chosen.apply(taus.to(SIM), options, dataclasses.replace(context, **there))
    waits = list(machine.waits)
    assert result.device == SIM
    assert len(waits) <= bound(name, values, figures), waits
    assert_same(name, values, result, chosen.apply(taus, options, context))


def assert_same(name: str, values: dict[str, Any], there: Tensor, here: Tensor) -> None:
    """The same bits; where polar factors are found by products, or rows summed otherwise, to float32's precision."""
    if {name, values.get("of")} & {"iso-c", "iso-cts", "tsv-m", "apgd"}:
        assert float((there.cpu() - here).norm()) <= (1e-5 if name == "apgd" else 1e-6) * float(here.norm())
    else:
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.load(name).matrices])
def test_factors_on_a_simulated_device(name: str, machine: Machine) -> None:
    chosen, generator = registry.load(name), torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(SHAPE[0], 3, generator=generator), torch.randn(3, SHAPE[1], generator=generator)) for _ in range(3)
    ]
    taus, options = torch.stack([left @ right for left, right in pairs]), chosen.options()
    context = context_of(chosen, options, taus, factors=tuple(pairs))
    fields = {field: getattr(context, field) for field in ("measured", "base")}
    there = {field: value.to(SIM) for field, value in fields.items() if value is not None}
    moved = dataclasses.replace(context, factors=tuple((a.to(SIM), b.to(SIM)) for a, b in pairs), **there)
    result = chosen.apply(taus.to(SIM), options, moved)
    assert_same(name, {}, result, chosen.apply(taus, options, context))


# Batches: the same of several matrices at once. Waits are those of all of them together.
BATCHES: dict[str, tuple[int, float, str]] = {
    "apgd": (
        6,
        1 / 8,
        f"norms; {_LOW}, before weights and after; the residual, now and then; the iterations; by how much each is "
        "shortened",
    ),
    "apgd published": (3, 1 / 8, "norms; the residual, now and then; the iterations"),
    "iso-c": (2, 0, f"{_LOW}; {_FULL}"),
    "kron": (4, 1 / 8, f"norms; {_LOW}; the residual, now and then; the iterations"),
    "tsv-m": (3, 0, f"{_LOW}; {_FULL}, twice"),
    "wudi": (2, 0, f"norms; {_LOW}"),
    "wudi spectral": (2, 0, f"norms; {_LOW}"),
}
AT_ONCE = 6
Pairs = tuple[tuple[Tensor, Tensor], ...]


def matrices(kind: str, shape: tuple[int, int]) -> list[tuple[Tensor, Pairs | None]]:
    """Task vectors of several matrices, and their factors."""
    generator, made = torch.Generator().manual_seed(0), list[tuple[Tensor, Pairs | None]]()
    m, n = shape
    for _ in range(AT_ONCE):
        taus, pairs = 1e-2 * torch.randn(3, m, n, generator=generator), None
        if kind in ("factors", "products"):
            pairs = tuple(
                (torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)) for _ in taus
            )
            taus = torch.stack([left @ right for left, right in pairs]) * 1e-2
            pairs = tuple((left * 1e-2, right) for left, right in pairs) if kind == "factors" else None
        if kind == "one absent":
            taus[1] = 0.0
        if kind == "rows absent":
            taus[:, : m // 3] = 0.0
        made.append((taus, pairs))
    return made


@pytest.mark.parametrize("shape", [(24, 18), (18, 40)], ids=str)
@pytest.mark.parametrize("kind", ["whole", "factors", "products", "one absent", "rows absent"])
@pytest.mark.parametrize("asked", BATCHES)
def test_batches_on_a_simulated_device(asked: str, kind: str, shape: tuple[int, int], machine: Machine) -> None:
    """The CPU's results of each matrix, for the waits of one."""
    name, _, choice = asked.partition(" ")
    if choice == "published" and kind in ("products", "rows absent"):
        pytest.skip("as published, missing directions are filled up with any, by the last digits of rounding")
    values = {"published": {"published": True, "solver": "exact", "density": 1.0}, "spectral": {"solver": choice}}
    chosen = registry.load(name)
    options = make_options(chosen, name, values.get(choice, {}))
    assert chosen.batches(options)
    want, figures, contexts = [], [], []
    for taus, pairs in matrices(kind, shape):
        figures.append(dict[str, float]())
        contexts.append(context_of(chosen, options, taus, factors=pairs, weights=(1.0, 0.5, 2.0), measured=None))
        want.append(chosen.apply(taus, options, dataclasses.replace(contexts[-1], tell=figures[-1].update)))
    result, figure_lists, waits = in_a_batch(
        chosen, options, [taus for taus, _ in matrices(kind, shape)], contexts, machine
    )
    for there, here in zip(result, want, strict=True):
        assert float((there - here).norm()) <= 1e-5 * float(here.norm())
    for i, each in enumerate(figures):
        mine = {figure: values[i] for figure, values in figure_lists.items() if values[i] is not None}
        assert mine == pytest.approx(each, rel=1e-5)
    most, each_iteration, _ = BATCHES[asked]
    lows = {"factors": 2, "products": 2 + 3}.get(kind, 0) if choice != "published" else 0  # spans, and spectra
    assert len(waits) <= most + lows + math.ceil(each_iteration * max(figure_lists.get("iterations", [0]))), waits


def in_a_batch(
    chosen: Method, options: Any, taus: list[Tensor], contexts: list[Context], machine: Machine
) -> tuple[Tensor, dict[str, list[Any]], list[str]]:
    """The merged matrices [B, m, n], on the host; their figures; where the device was waited for."""
    figures: dict[str, list[Any]] = {}
    first, together = contexts[0], torch.stack(taus, dim=1).to(SIM)
    bases = [context.base for context in contexts if context.base is not None]
    factors = None
    if first.factors is not None:
        each = zip(*(context.factors or () for context in contexts), strict=True)
        factors = tuple(tuple(torch.stack(side).to(SIM) for side in zip(*pairs, strict=True)) for pairs in each)
    base = torch.stack(bases).to(SIM) if bases else None
    machine.forget()
    result = chosen.apply(
        together, options, dataclasses.replace(first, base=base, factors=factors, tell=figures.update)
    )
    return result.cpu(), figures, machine.waits[:-1]


@pytest.mark.parametrize(("absent", "decompositions"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("shape", [SHAPE, (18, 40), (20, 200)], ids=str)
def test_polar_factors_are_found_by_products_where_they_can_be(
    shape: tuple[int, int], absent: int, decompositions: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch, if all of it has full rank, and is not too oblong."""
    calls, eigen = list[Tensor](), linalg._eigen
    monkeypatch.setattr(linalg, "_eigen", lambda gram, rank: calls.append(gram) or eigen(gram, rank))
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    x[2, :absent] = 0.0
    x[2, :, :absent] = 0.0
    factor, mean = linalg.polar(x.to(SIM))
    assert len(calls) == (1 if shape == (20, 200) else decompositions)
    for i in range(4):
        there, here = (factor[i].cpu(), float(mean[i])), linalg.polar(x[i])
        assert float((there[0] - here[0]).norm()) <= 1e-9
        assert there[1] == pytest.approx(float(here[1]), rel=1e-9)


@pytest.mark.parametrize(("fall", "rank", "decomposed"), [(0.0, 64, False), (1.5, 64, False), (0.5, 80, True),
                                                          (math.inf, 64, True)])  # fmt: skip
def test_leading_triplets_are_found_by_products_where_they_can_be(
    fall: float, rank: int, decomposed: bool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch, if no direction is missing, whether or not singular values fall; up to an eighth of them."""
    sides, eigh = list[int](), torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sides.append(gram.shape[-1]) or eigh(gram))
    x = torch.randn(2, 512, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if fall:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        places = torch.arange(1, 513, dtype=torch.float64)
        x = (u * torch.where(places <= 40, 1.0, 0.0 if fall == math.inf else places**-fall)) @ v
    left, values, right = linalg.leading_triplets(x.to(SIM), rank)
    assert (512 in sides) == decomposed
    assert len(machine.waits) <= 6
    for i in range(2):
        u, s, v = linalg.leading_triplets(x[i], rank)
        merged, want = (left[i] * values[i][None]) @ right[i], (u * s) @ v
        assert float((values[i].cpu()[: len(s)] - s).norm() / s.norm()) <= 1e-9
        assert float((merged.cpu() - want).norm() / want.norm()) <= 1e-7


@pytest.mark.parametrize("asked", ["apgd", "kron", "wudi", "iso-c"])
def test_a_batch_that_is_not_alike_is_refused(asked: str, machine: Machine) -> None:
    """An expert that changed one matrix and not the other; an adapter beside full fine-tuning."""
    chosen = registry.load(asked)
    options = chosen.options()
    whole, low = matrices("whole", SHAPE)[0][0], matrices("products", SHAPE)[0][0]
    contexts = [context_of(chosen, options, whole)] * 2
    others = [low] if asked == "iso-c" else [low, matrices("one absent", SHAPE)[0][0]]
    for other in others:
        with pytest.raises(Apart):
            in_a_batch(chosen, options, [whole, other], contexts, machine)


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if registry.load(name).moments(registry.load(name).options(), {})]
)
def test_moments_on_a_simulated_device(name: str, machine: Machine) -> None:
    """What a tensor is measured by, at once and in blocks of which a sample comes first."""
    chosen = registry.load(name)
    moments = chosen.moments(chosen.options(), {})
    assert moments is not None
    generator = torch.Generator().manual_seed(0)
    taus, base = (
        torch.randn(takes(name, EXPERTS), 30_000, generator=generator),
        torch.randn(30_000, generator=generator),
    )
    at_once = measured_at_once(moments, taus.to(SIM), base.to(SIM))
    assert torch.equal(at_once.cpu(), measured_at_once(moments, taus, base))
    in_blocks = measured_in_blocks(moments, taus.to(SIM), base.to(SIM), 10_000, 1_000)
    assert torch.equal(in_blocks.cpu(), measured_in_blocks(moments, taus, base, 10_000, 1_000))


@pytest.mark.parametrize(
    "name", [name for name in registry.names() if registry.load(name).survey(registry.load(name).options(), {})]
)
@pytest.mark.parametrize("sampled", [threshold.SAMPLED, 1])
def test_surveys_on_a_simulated_device(
    name: str, sampled: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the whole model is measured by, from a sample first and at once."""
    monkeypatch.setattr(threshold, "SAMPLED", sampled)
    generator = torch.Generator().manual_seed(5)
    chosen, taus = (
        registry.load(name),
        torch.randn(takes(name, EXPERTS), 1 << 18, generator=generator).round(decimals=3),
    )
    survey = chosen.survey(chosen.options(), {})
    assert survey is not None
    assert torch.equal(surveyed(survey, taus.to(SIM)).cpu(), surveyed(survey, taus))
