"""DELLA against its definition, with the draws it made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge.methods import random
from modelmerge.methods.contract import Context
from modelmerge.methods.merge import della
from tests.support.methods import SHAPE, merged, taus_of


def pruned(tau: Tensor, drawn: Tensor, density: float, epsilon: float, rescale: str) -> Tensor:
    rows = tau.double()
    rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1)
    chance = density - epsilon + 2 * epsilon * rank / (rows.shape[1] - 1)
    chance = (chance * 2**16).round() / 2**16
    kept = torch.where((drawn.double() + 2**15) / 2**16 < chance, rows, 0.0)
    if rescale == "norm":
        return kept * rows.abs().sum() / kept.abs().sum()
    return kept / chance if rescale == "chance" else kept


@pytest.mark.parametrize("consensus", ["linear", "ties"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("rescale", ["chance", "norm", "none"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.7, 0.07), (0.3, 0.25), (0.5, 0.0)])
def test_agrees_with_float64(density: float, epsilon: float, rescale: str, reduce: str, consensus: str) -> None:
    taus, weights = taus_of(5), (0.5, 1.0, 2.0, 1.0, 1.0)
    told = {"density": density, "epsilon": epsilon, "reduce": reduce, "consensus": consensus, "rescale": rescale}
    got = merged("della", taus, weights, seed=3, scale=0.7, **told)
    context = Context(tensor="w", weights=weights, experts=tuple(f"e{i}" for i in range(5)), seed=3)
    draws = [random.draws(context, i, taus[0].numel(), taus.device).view(SHAPE) for i in range(5)]
    each = torch.stack([pruned(tau, drawn, density, epsilon, rescale) for tau, drawn in zip(taus, draws, strict=True)])
    wide = torch.tensor(weights).double()[:, None, None]
    kept = each * wide
    want = kept.sum(0) / (wide.sum() if reduce == "mean" else 1)
    if consensus == "ties":
        agrees = (kept.sign() == kept.sum(0).sign()) & (kept != 0)
        shares = (wide * agrees).sum(0)
        want = (kept * agrees).sum(0) / (torch.where(shares == 0, 1.0, shares) if reduce == "mean" else 1)
    assert (got.double() - 0.7 * want).norm() <= 1e-4 * want.norm()


def test_ranks_are_those_of_a_stable_sort() -> None:
    rows = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    rows[0, 10:200] = 0.0
    want = rows.abs().argsort(dim=1, stable=True).argsort(dim=1)
    assert torch.equal(della.by_rank(rows, torch.arange(300.0)).long(), want)


@pytest.mark.parametrize(
    ("density", "epsilon", "least", "most"), [(0.7, 0.07, 0.63, 0.77), (0.9, 0.3, 0.8, 1.0), (0.3, 0.3, -(2**-16), 0.6)]
)
def test_chances_rise_with_the_rank(density: float, epsilon: float, least: float, most: float) -> None:
    chances = della.chances(1001, density, epsilon) / random.LEVELS
    assert chances[[0, 500, -1]].tolist() == pytest.approx([least, density, most], abs=1e-5)
    assert bool((chances.diff() > 0).all())
    assert della.chances(1, density, epsilon).item() == round(density * 2**16)


def test_what_is_kept_is_unbiased_and_favours_the_large() -> None:
    tau = torch.linspace(1.0, 2.0, 100).repeat(5000, 1)
    got = merged("della", tau[None], density=0.5, epsilon=0.4, scale=1.0)
    share = (got != 0).double().mean(0)
    assert share[0] == pytest.approx(0.1, abs=0.02)
    assert share[-1] == pytest.approx(0.9, abs=0.02)
    assert torch.allclose(got.mean(0), tau[0], rtol=0.2)
    assert got.mean() == pytest.approx(1.5, rel=0.01)


def test_the_defaults_follow_the_consensus() -> None:
    taus = taus_of(3)
    for consensus, reduce in (("ties", "mean"), ("linear", "sum")):
        named = merged("della", taus, consensus=consensus, reduce=reduce)
        assert torch.equal(merged("della", taus, consensus=consensus), named)


def test_everything_is_kept_at_density_one() -> None:
    taus = taus_of(1)
    assert torch.allclose(merged("della", taus, density=1.0, scale=1.0), taus[0])
