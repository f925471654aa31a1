"""Model Stock against its definition, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch

from modelmerge.methods.registry import load
from tests.support.methods import SHAPE, context_of, merged, taus_of


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("experts", [2, 5])
def test_agrees_with_float64(experts: int, scope: str) -> None:
    taus, weights = taus_of(experts) + 1e-2, (1.0, 0.5, 2.0, 1.0, 1.0)[:experts]
    got = merged("model-stock", taus, weights, scope=scope)
    rows = taus.double() if scope == "row" else taus.double().flatten(1)[:, None]
    pairs = [(i, j) for i in range(experts) for j in range(i)]
    cosine = torch.stack([torch.cosine_similarity(rows[i], rows[j], dim=1) for i, j in pairs]).mean(0)
    ratio = experts * cosine / (1 + (experts - 1) * cosine)
    mean = torch.einsum("t,tgn->gn", torch.tensor(weights).double(), rows) / sum(weights)
    want = (ratio[:, None] * mean).view(SHAPE)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_a_line_of_a_kernel_is_a_row_of_a_matrix() -> None:
    taus = torch.randn(3, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    got = merged("model-stock", taus, scope="line")
    assert torch.equal(got, merged("model-stock", taus.reshape(3, 60, 2), scope="row").reshape(5, 4, 3, 2))
    assert not torch.allclose(got, merged("model-stock", taus, scope="row"))


def test_the_centre_of_experts_around_a_point_is_found() -> None:
    centre, own = torch.ones(1, 100, 100), torch.randn(6, 100, 100, generator=torch.Generator().manual_seed(0))
    merged_at = merged("model-stock", centre + own)
    # The mean lies further from the origin than the centre, by what the experts' own parts leave in it.
    assert 0.98 < (merged_at * centre).sum() / 100**2 * (1 + 1 / 6) < 1.02


def test_experts_that_disagree_leave_the_base() -> None:
    taus = torch.stack([torch.ones(3, 3), -torch.ones(3, 3)])
    assert not merged("model-stock", taus).any()


def test_the_formula_goes_on_beyond_the_base() -> None:
    """Of task vectors at the cosine -1/2, t is 2 cos / (1 + cos) = -2."""
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[-0.5, 0.75**0.5]])
    taus = torch.stack([first, second])
    assert torch.allclose(merged("model-stock", taus, unbounded=True), -2 * taus.mean(0))
    assert not merged("model-stock", taus).any()
    taus = torch.stack([first, -first])
    assert not merged("model-stock", taus, unbounded=True).any()  # the denominator is zero
    still = torch.stack([first, first, 0 * first])
    assert torch.allclose(merged("model-stock", still, unbounded=True), 3 / 3 / (1 + 2 / 3) * still.mean(0))
    assert torch.equal(merged("model-stock", still), first)


def test_an_expert_without_a_change_is_left_out_and_named() -> None:
    chosen, told = load("model-stock"), []
    taus = taus_of(3) + 1e-2
    without = merged("model-stock", taus[1:])
    taus[0] = 0
    options = chosen.options()
    context = context_of(chosen, options, taus, leave_out=lambda i, why: told.append((i, why)))
    assert torch.equal(chosen.apply(taus, options, context), without)
    assert told == [(0, "it did not change this tensor")]
    assert torch.equal(merged("model-stock", taus[2:]), taus[2])
