"""SCE against its definition, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch

from modelmerge.methods.contract import Context, measured_at_once
from modelmerge.methods.merge import sce
from tests.support.methods import merged, taus_of


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_agrees_with_float64(density: float, size: float) -> None:
    taus, weights = taus_of(5) * size, torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    got = merged("sce", taus, tuple(weights.tolist()), density=density, scale=0.7)
    wide = taus.double()
    variance = wide.var(0, unbiased=False).flatten()
    mask = torch.zeros_like(variance)
    mask[variance.argsort(descending=True)[: int(density * variance.numel())]] = 1
    kept = wide * mask.view_as(wide[0])
    shares = weights.double() * kept.square().mean((1, 2))
    agreeing = shares[:, None, None] * (kept.sign() == kept.sum(0).sign()) * (kept != 0)
    want = 0.7 * (agreeing * kept).sum(0) / agreeing.sum(0).clamp(min=1e-300)
    assert (got.double() - want).norm() <= 1e-5 * want.norm()
    assert int((got != 0).sum()) == int(density * variance.numel())


def test_experts_count_alike_where_their_task_vectors_are_small() -> None:
    taus = taus_of(2)
    taus[1] *= 2
    total = float(taus.double().square().mean((1, 2)).sum())
    weighed = merged("sce", taus, density=1.0)
    assert torch.equal(merged("sce", taus, density=1.0, equal_below=0.99 * total), weighed)
    alike = merged("sce", taus, density=1.0, equal_below=1.01 * total)
    agree = taus[0].sign() == taus[1].sign()
    assert torch.allclose(alike[agree], taus.mean(0)[agree])
    assert not torch.allclose(alike, weighed, rtol=0.1)


def test_a_single_expert_keeps_its_task_vector() -> None:
    taus = taus_of(1)
    assert torch.allclose(merged("sce", taus), taus[0])


def test_experts_that_are_alike_leave_nothing_to_select() -> None:
    assert not merged("sce", torch.ones(3, 4, 4)).any()
    assert torch.equal(merged("sce", torch.ones(3, 4, 4), density=1.0), torch.ones(4, 4))


def test_places_that_were_kept_change_no_bit() -> None:
    taus, options = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(0)), sce.Options()
    moments = sce.METHOD.moments(options, {})
    assert moments is not None
    measured = measured_at_once(moments, taus, taus[0])

    def of_block(start: int, measured: torch.Tensor) -> torch.Tensor:
        context = Context(tensor="w", weights=(1.0,) * 4, measured=measured, start=start)
        return sce.apply(taus[:, start : start + 3000], options, context)

    kept, found = (torch.cat([of_block(i, each) for i in range(0, 10_000, 3000)]) for each in (measured, measured[:5]))
    assert int(kept.count_nonzero()) == len(measured) - 5 == 1000
    assert torch.equal(kept, found)
