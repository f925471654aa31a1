"""RAM and RAM+ by tensor against their definitions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.methods import merged


def sparse(experts: int, seed: int = 0) -> Tensor:
    """Task vectors that are zero in most entries, and so small in some that they count for none."""
    generator = torch.Generator().manual_seed(seed)
    taus = 1e-2 * torch.randn(experts, 24, 18, generator=generator)
    taus *= torch.rand(taus.shape, generator=generator) < 0.4
    return torch.where(torch.rand(taus.shape, generator=generator) < 0.1, 1e-6, taus)


def want(taus: Tensor, weights: list[float], gain: float, limit: float) -> Tensor:
    total = torch.zeros(taus.shape[1:], dtype=torch.float64)
    changed = taus.abs() > 1e-5
    for i, tau in enumerate(taus.double()):
        alone = changed[i] & (changed.sum(0) == 1)
        shared = changed[i] & (changed.sum(0) > 1)
        factor = 1 + gain * min(int(shared.sum()) / max(int(alone.sum()), 1e-5), limit)
        total += weights[i] * tau * (alone * factor + shared / changed.sum(0).clamp(min=1))
    return total


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_ram_agrees_with_float64(experts: int, weighted: bool) -> None:
    taus, weights = sparse(experts), [0.5, 1.0, 2.0, 1.0, 1.5][:experts] if weighted else [1.0] * experts
    got = merged("ram", taus, tuple(weights), scale=0.7)
    assert (got.double() - 0.7 * want(taus, weights, 0.0, 0.0)).norm() <= 1e-6 * got.norm()


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("limit", [0.2, 10.0])
def test_ramplus_tl_agrees_with_float64(experts: int, limit: float) -> None:
    taus, weights = sparse(experts), [0.5, 1.0, 2.0, 1.0, 1.5][:experts]
    got = merged("ramplus-tl", taus, tuple(weights), gain=0.3, limit=limit)
    assert (got.double() - want(taus, weights, 0.3, limit)).norm() <= 1e-6 * got.norm()
    assert (experts == 1) == torch.allclose(got, merged("ram", taus, tuple(weights)))


def test_an_expert_that_changes_nothing_alone_is_no_division_by_zero() -> None:
    taus = torch.stack([torch.full((3, 3), 0.1), torch.full((3, 3), 0.3)])
    assert torch.allclose(merged("ramplus-tl", taus), torch.full((3, 3), 0.2))


def test_the_threshold_is_in_units_of_the_weights() -> None:
    taus = torch.tensor([[0.1, 0.01, 0.0], [0.2, 0.5, 0.0]])
    assert torch.allclose(merged("ram", taus, threshold=0.05), torch.tensor([0.15, 0.5, 0.0]))
