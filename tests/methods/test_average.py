"""The average against its definition."""

from __future__ import annotations

import pytest
import torch

from modelmerge.methods.registry import load
from tests.support.methods import context_of, merged, taus_of


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5), (1.0, -1.0, 0.0), (0.7, 0.5, -0.2), (-1.0, -1.0, 1.0)])
def test_the_sum_is_that_of_the_experts(weights: tuple[float, ...]) -> None:
    taus = taus_of(3)
    base = context_of(load("average"), None, taus).base.double()
    want = sum(weight * (base + tau.double()) for weight, tau in zip(weights, taus, strict=True)) - base
    assert (merged("average", taus, weights, reduce="sum").double() - want).norm() <= 1e-6 * want.norm()
    if sum(weights) == 1.0:
        assert torch.allclose(merged("average", taus, weights), merged("average", taus, weights, reduce="sum"))
