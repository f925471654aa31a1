"""Consensus merging against its definition, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.methods import merged, taus_of


@pytest.mark.parametrize("tall_lambda", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("min_tasks", [0, 1, 2, 5])
def test_agrees_with_float64(min_tasks: int, tall_lambda: float) -> None:
    taus, weights = taus_of(5), (1.0, 0.5, 2.0, 1.0, 1.0)
    got = merged("consensus", taus, weights, tall_lambda=tall_lambda, min_tasks=min_tasks, scale=0.7)
    wide = taus.double() * torch.tensor(weights).double()[:, None, None]
    masks = wide.abs() > tall_lambda * (wide.sum(0) - wide).abs()
    want = 0.7 * wide.sum(0) * (masks.sum(0) >= min_tasks)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_a_task_alone_agrees_with_itself() -> None:
    taus = taus_of(1)
    assert torch.allclose(merged("consensus", taus, scale=1.0), taus[0])


def test_no_task_wanting_enough_leaves_the_base() -> None:
    assert not merged("consensus", torch.ones(4, 3, 3), tall_lambda=10.0).any()
