"""DARE against its definition, with the masks it drew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge.methods import random
from modelmerge.methods.contract import Context
from tests.support.methods import SHAPE, merged, taus_of


def reference(taus: Tensor, masks: Tensor, weights: Tensor, density: float, consensus: str, reduce: str) -> Tensor:
    kept = taus.double() * masks * weights[:, None, None] / density
    if consensus == "linear":
        return kept.sum(0) / (weights.sum() if reduce == "mean" else 1)
    agreeing = torch.where(kept.sign() == kept.sum(0).sign(), kept, 0.0)
    share = ((agreeing != 0) * weights[:, None, None]).sum(0)
    return agreeing.sum(0) / (torch.where(share == 0, 1.0, share) if reduce == "mean" else 1)


@pytest.mark.parametrize("consensus", ["linear", "ties"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("rescale", ["chance", "none"])
def test_agrees_with_float64(rescale: str, density: float, reduce: str, consensus: str) -> None:
    taus, weights = taus_of(5), (0.5, 1.0, 2.0, 1.0, 1.0)
    options = {"density": density, "reduce": reduce, "consensus": consensus, "rescale": rescale}
    got = merged("dare", taus, weights, seed=3, scale=0.7, **options)
    context = Context(tensor="w", weights=weights, experts=tuple(f"e{i}" for i in range(5)), seed=3)
    masks = [random.keep(context, i, density, torch.empty(SHAPE)) for i in range(5)]
    chance = random.share(density) if rescale == "chance" else 1.0
    want = 0.7 * reference(taus, torch.stack(masks), torch.tensor(weights), chance, consensus, reduce)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_the_expectation_is_that_of_task_arithmetic() -> None:
    taus = torch.ones(1, 1 << 20)
    got = merged("dare", taus, density=0.1, scale=1.0)
    assert got.unique().tolist() == [0.0, pytest.approx(10, rel=1e-3)]
    assert abs(got.mean() - 1) < 5 * 3 / 1024


def test_the_seed_and_the_names_draw() -> None:
    taus = taus_of()
    drawn = [merged("dare", taus), merged("dare", taus, seed=1), merged("dare", taus, experts=("a", "b", "c", "d"))]
    assert not any(torch.equal(one, two) for i, one in enumerate(drawn) for two in drawn[:i])
