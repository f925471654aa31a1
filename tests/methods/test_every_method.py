"""The same questions to every merge method, found by its file."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch

from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import measured_at_once
from modelmerge.methods.options import is_linear, make_options
from tests.support.methods import SHAPE, choices, context_of, counted, measured_in_blocks, merged, takes, taus_of

NAMES = registry.names()


@pytest.mark.parametrize("name", NAMES)
def test_has_a_help_line_and_a_paper(name: str) -> None:
    assert registry.summary(name).endswith(".")
    assert 10 < len(registry.summary(name)) < 120
    assert registry.load(name).paper.startswith("https://")
    if registry.load(name).paper.startswith(("https://arxiv.org", "https://doi.org")):
        assert registry.load(name).citation is not None, "the model card cites it"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_help_and_a_default_that_is_allowed(name: str) -> None:
    chosen = registry.load(name)
    options = chosen.options()
    assert make_options(chosen, name, dataclasses.asdict(options)) == options
    assert all(len(spec.metadata["help"]) > 10 for spec in dataclasses.fields(chosen.options))


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_on_the_merged_task_vector_may_vary_over_tensors(name: str) -> None:
    for spec in dataclasses.fields(registry.load(name).options):
        if spec.name == "scale" and "merged task vector" in spec.metadata["help"]:
            assert spec.metadata["varies"] == "tensor"
            assert spec.metadata["linear"]


LINEAR = [
    (n, spec.name)
    for n in NAMES
    for spec in dataclasses.fields(registry.load(n).options)
    if is_linear(registry.load(n), spec.name)
]


@pytest.mark.parametrize(("name", "option"), LINEAR)
def test_an_option_that_is_declared_linear_multiplies_what_it_is_at_one_to_the_bit(name: str, option: str) -> None:
    chosen, taus = registry.load(name), taus_of(takes(name, 4))
    weights = (0.5, 1.0, 2.0, 1.5)[: len(taus)]
    for values in choices(chosen):
        unit = merged(name, taus, weights, **{**values, option: 1.0})
        assert unit.any()
        for value in (0.3, 1.7, -0.4, 0.0, 0.1 + 0.2):
            assert torch.equal(merged(name, taus, weights, **{**values, option: value}), unit * value), (values, value)


@pytest.mark.parametrize("name", NAMES)
def test_keeps_shape_dtype_and_device(name: str) -> None:
    result = merged(name, taus_of(takes(name, 4)))
    assert result.shape == SHAPE
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"
    assert result.isfinite().all()
    assert result.abs().max() > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in NAMES if registry.load(name).checked_after])
def test_what_is_checked_after_is_not_finite_where_a_task_vector_is_not(name: str, value: float) -> None:
    for values in choices(registry.load(name)):
        for expert in range(4):
            taus = taus_of(4)
            taus[expert, 0, 0] = value
            finite = merged(name, taus, (1.0, 0.5, 2.0, 0.0), **values).isfinite()
            assert not finite[0, 0]
            assert finite.sum() == finite.numel() - 1


@pytest.mark.parametrize("name", NAMES)
def test_leaves_its_input_alone(name: str) -> None:
    taus = taus_of(takes(name, 4))
    before = taus.clone()
    merged(name, taus, weights=(0.5, 1.0, 2.0, 1.0)[: len(taus)])
    assert torch.equal(taus, before)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 2, 2), (1, 1)])
@pytest.mark.parametrize("name", [n for n in NAMES if not registry.load(n).matrices])
def test_tensors_of_any_shape_are_taken(name: str, shape: tuple[int, ...]) -> None:
    taus = torch.randn(takes(name, 3), *shape, generator=torch.Generator().manual_seed(1))
    for values in choices(registry.load(name)):
        result = merged(name, taus, **values)
        assert result.shape == shape
        assert result.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gives_the_same_bits_twice(name: str) -> None:
    count = takes(name, 4)
    assert torch.equal(merged(name, taus_of(count)), merged(name, taus_of(count)))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_experts_changes_nothing_beyond_rounding(name: str) -> None:
    count = takes(name, 4)
    taus, weights, names = taus_of(count), (0.5, 1.0, 2.0, 1.5)[:count], ("a", "b", "c", "d")[:count]
    order = [i for i in (2, 0, 3, 1) if i < count][::-1]
    forth = merged(name, taus, weights, names)
    back = merged(name, taus[order], tuple(weights[i] for i in order), tuple(names[i] for i in order))
    assert (forth - back).norm() <= 2e-5 * forth.norm()


@pytest.mark.parametrize("name", NAMES)
def test_zero_task_vectors_change_nothing(name: str) -> None:
    assert not merged(name, torch.zeros(takes(name, 3), *SHAPE)).any()


@pytest.mark.parametrize("name", NAMES)
def test_one_zero_task_vector_among_others_does_no_harm(name: str) -> None:
    taus = taus_of(takes(name, 4))
    taus[-1] = 0
    result = merged(name, taus)
    assert result.isfinite().all()
    assert result.norm() <= 10 * taus.norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_single_expert_is_accepted(name: str) -> None:
    assert merged(name, taus_of(1)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_count(name: str) -> None:
    taus = taus_of(takes(name, 4))
    even = merged(name, taus)
    uneven = merged(name, taus, weights=(3.0, 1.0, 1.0, 1.0)[: len(taus)])
    assert not torch.equal(even, uneven)


@pytest.mark.parametrize("name", [n for n in NAMES if registry.load(n).blockwise(registry.load(n).options())])
@pytest.mark.parametrize("cut", [1, 7, 64, 300, 431])
def test_cutting_a_tensor_changes_no_bit(name: str, cut: int) -> None:
    chosen = registry.load(name)
    options, taus = chosen.options(), taus_of(takes(name, 4)).flatten(1)
    context = context_of(chosen, options, taus, weights=(0.3, 1.0, 1.7, 1.0)[: len(taus)])
    whole = chosen.apply(taus, options, context)
    parts = []
    for start, stop in ((0, cut), (cut, taus.shape[1])):
        base = None if context.base is None else context.base[start:stop]
        block = dataclasses.replace(context, start=start, base=base)
        parts.append(chosen.apply(taus[:, start:stop].contiguous(), options, block))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("cut", [1, 5, 23])
@pytest.mark.parametrize("name", NAMES)
def test_cutting_a_tensor_between_rows_changes_no_bit(name: str, cut: int) -> None:
    chosen, taus = registry.load(name), taus_of(takes(name, 4))
    for values in choices(chosen):
        options = make_options(chosen, name, values)
        if chosen.blockwise(options) or not chosen.by_rows(options):
            continue
        context = context_of(chosen, options, taus)
        parts = []
        for rows in (slice(0, cut), slice(cut, SHAPE[0])):
            base = None if context.base is None else context.base[rows]
            block = dataclasses.replace(context, start=rows.start * SHAPE[1], base=base)
            parts.append(chosen.apply(taus[:, rows].contiguous(), options, block))
        assert torch.equal(torch.cat(parts), chosen.apply(taus, options, context))


@pytest.mark.parametrize("name", NAMES)
def test_surveys_add_up_over_blocks(name: str) -> None:
    chosen = registry.load(name)
    survey = chosen.survey(chosen.options(), {})
    if survey is None:
        return
    taus = taus_of().flatten(1)
    for numel in (taus.shape[1], 1 << 30):
        search = survey.find(numel)
        wanted = next(search)
        with contextlib.suppress(StopIteration):
            while True:
                whole = counted(wanted, taus)
                parts = [counted(wanted, part) for part in taus.split(100, dim=1)]
                total = whole
                if wanted.room:
                    (total, numbers), handed = whole, torch.cat([more for _, more in parts])
                    parts = [part for part, _ in parts]
                    assert torch.equal(handed.sort().values, numbers.sort().values)
                assert total.any()
                assert torch.equal(torch.stack(parts).sum(0), total)
                wanted = search.send(whole)


@pytest.mark.parametrize("name", NAMES)
def test_moments_add_up_over_blocks(name: str) -> None:
    moments = registry.load(name).moments(registry.load(name).options(), {})
    if moments is None:
        return
    generator = torch.Generator().manual_seed(0)
    taus, base = torch.randn(takes(name, 4), 10_000, generator=generator), torch.randn(10_000, generator=generator)
    whole = measured_at_once(moments, taus, base)
    near = 1e-6 * float(whole.abs().max())  # inner products near zero are sums of float32 products that are not
    assert torch.allclose(measured_in_blocks(moments, taus, base, 3333, 500), whole, rtol=1e-6, atol=near)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name: str) -> None:
    chosen = registry.load(name)
    options, taus = chosen.options(), taus_of(takes(name, 4))
    context = context_of(chosen, options, taus)
    cpu = chosen.apply(taus, options, context)
    moved = {k: v.cuda() for k, v in (("measured", context.measured), ("base", context.base)) if v is not None}
    cuda = chosen.apply(taus.cuda(), options, dataclasses.replace(context, **moved))
    assert (cuda.cpu() - cpu).norm() <= 1e-4 * cpu.norm()


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("ties", {"desnity": 0.5}, "did you mean 'density'"),
        ("average", {"scale": 0.5}, "it has: reduce"),
        ("ties", {"density": 20.0}, "density must be above 0 and at most 1, not 20"),
        ("ties", {"density": -1.0}, "density must be above 0"),
        ("ties", {"density": 0.0}, "density must be above 0"),
        ("ties", {"density": math.nan}, "density must be above 0"),
        ("task-arithmetic", {"scale": math.inf}, "scale must be finite"),
        ("ties", {"reduce": "max"}, "reduce must be one of sum, mean"),
        ("apgd", {"steps": -1}, "steps must be at least 0"),
        ("apgd", {"steps": 1.5}, "steps must be an integer"),
        ("ties", {"trim_scope": "layer"}, "trim_scope must be one of model, tensor"),
    ],
)
def test_wrong_options_are_refused(name: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_options(registry.load(name), name, values)
    assert says in f"{refused.value.message} {refused.value.hint}"


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as refused:
        registry.load("tise")
    assert refused.value.hint == "did you mean 'ties'?"
