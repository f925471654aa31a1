"""Model Breadcrumbs against its definition, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge.methods import threshold
from modelmerge.methods.merge.breadcrumbs import middle, places
from tests.support.methods import merged, taus_of


def reference(rows: Tensor, density: float, gamma: float) -> Tensor:
    count = rows.shape[1]
    kept = max(int(density * count), 1)
    outliers = min(int(gamma * count), count - kept)
    order = rows.abs().argsort(1, descending=True)[:, outliers : outliers + kept]
    return torch.zeros_like(rows).scatter(1, order, rows.gather(1, order))


@pytest.mark.parametrize("consensus", ["linear", "ties"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("rescale", ["none", "norm"])
@pytest.mark.parametrize(("density", "gamma"), [(0.15, 0.006), (0.5, 0.2), (0.9, 0.5), (1.0, 0.1), (0.001, 0.0)])
def test_agrees_with_float64(
    density: float, gamma: float, rescale: str, reduce: str, scope: str, consensus: str
) -> None:
    taus, weights = taus_of(5), (1.0, 0.5, 2.0, 1.0, 1.0)
    told = {"density": density, "gamma": gamma, "scope": scope, "consensus": consensus}
    got = merged("breadcrumbs", taus, weights, scale=0.7, reduce=reduce, rescale=rescale, **told)
    rows = [tau.double() if scope == "row" else tau.double().reshape(1, -1) for tau in taus]
    kept = torch.stack([reference(row, density, gamma).view_as(taus[0]) for row in rows])
    if rescale == "norm":
        kept *= (taus.double().abs().sum((1, 2)) / kept.abs().sum((1, 2)))[:, None, None]
    wide = torch.tensor(weights).double()[:, None, None]
    kept *= wide
    agreeing = torch.where(kept.sign() == kept.sum(0).sign(), kept, 0.0) if consensus == "ties" else kept
    share = (wide * (agreeing != 0)).sum(0) if consensus == "ties" else wide.sum()
    want = 0.7 * agreeing.sum(0) / (torch.where(share == 0, 1.0, share) if reduce == "mean" else 1)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def kept(row: Tensor, density: float, gamma: float) -> Tensor:
    count = row.shape[1]
    ends = threshold.smallest(row.abs(), *(count - place + 1 for place in places(count, density, gamma)))
    several = middle(torch.cat([row, row]), torch.cat([ends, ends]))
    assert torch.equal(several[:1], middle(row, ends))  # one row takes a road of its own
    return middle(row, ends)


def test_the_middle_is_kept_with_what_equals_its_ends() -> None:
    row = torch.tensor([[5.0, -4.0, 3.0, -3.0, 2.0, 1.0, -1.0, 0.0, 0.0, 0.0]])
    assert kept(row, 0.3, 0.1).tolist() == [[0.0, -4.0, 3.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert kept(row, 0.2, 0.2).tolist() == [[0.0, 0.0, 3.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert torch.equal(kept(row, 1.0, 0.5), row)


def test_entries_by_rank_are_those_of_a_sort() -> None:
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs()
    values[0, :500] = 0.0
    want = values.sort(1).values
    for ranks in ((1,), (1000,), (1, 1000), (700, 700), (200, 900), (900, 3, 501)):
        assert torch.equal(threshold.smallest(values.clone(), *ranks), want[:, [rank - 1 for rank in ranks]])
