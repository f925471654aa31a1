"""TIES against its definition, written out plainly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge.methods import threshold
from modelmerge.methods import threshold as thresholds
from tests.support.float64 import ties
from tests.support.methods import counted, merged, surveyed, taus_of


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.001, 0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3, 1.0, 2.0, 0.0, -0.4]])
def test_agrees_with_float64(density: float, scope: str, reduce: str, weights: list[float]) -> None:
    taus = taus_of(5)
    got = merged("ties", taus, tuple(weights), density=density, scale=0.7, reduce=reduce, trim_scope=scope)
    want = ties(taus, density, 0.7, reduce, scope, weights)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_what_is_trimmed_is_made_up_for_by_the_norm(scope: str) -> None:
    taus, options = taus_of(3), {"density": 0.2, "scale": 1.0, "trim_scope": scope}
    alone = [merged("ties", tau[None], **options) for tau in taus]
    ratios = [
        float(tau.abs().double().sum() / kept.abs().double().sum()) for tau, kept in zip(taus, alone, strict=True)
    ]
    assert all(ratio > 1.5 for ratio in ratios)
    for tau, kept, ratio in zip(taus, alone, ratios, strict=True):
        assert torch.allclose(merged("ties", tau[None], rescale="norm", **options), kept * ratio, rtol=1e-6)
    # The mean is by the weights, not by the factors.
    want = merged("ties", taus, tuple(ratios), reduce="sum", **options)
    assert torch.allclose(merged("ties", taus, rescale="norm", reduce="sum", **options), want, atol=1e-7)


def test_entries_that_cancel_exactly_elect_no_sign() -> None:
    taus = torch.tensor([[[0.5, 0.5]], [[-0.5, 0.25]]])
    assert merged("ties", taus, density=1.0, scale=1.0).tolist() == [[0.0, 0.75]]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999])
def test_the_streamed_threshold_is_the_exact_order_statistic(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many magnitudes, ties, zeros, denormals and both signs.
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([
        torch.randn(5000, generator=generator) * 10.0 ** torch.randint(-40, 3, (5000,), generator=generator),
        torch.full((700,), -0.25), torch.zeros(300), torch.randn(2000, generator=generator).bfloat16().float(),
    ])[None]  # fmt: skip
    survey = thresholds.survey(density)
    assert survey is not None
    rank = max(thresholds.dropped(values.shape[1], density), 1)
    want = values.abs().kthvalue(rank).values.item()
    assert surveyed(survey, values).item() == want
    # Through a sample, whether the window around its threshold holds the true one or not.
    monkeypatch.setattr(threshold, "SAMPLED", 1)
    assert surveyed(survey, values).item() == want
    assert surveyed(survey, values[:, torch.randperm(values.shape[1])]).item() == want


def shares_of(values: Tensor, density: float) -> tuple[list[int], Tensor]:
    """The shares of the passes that the survey makes over values [1, n], and the threshold it finds."""
    survey, shares = thresholds.survey(density), []
    assert survey is not None
    search = survey.find(values.shape[1])
    wanted = next(search)
    while True:
        shares.append(wanted.share)
        try:
            wanted = search.send(counted(wanted, values[:, :: wanted.share]))
        except StopIteration as found:
            return shares, found.value


def test_a_sample_saves_a_pass_and_misses_are_made_good() -> None:
    even = torch.randn(1, thresholds.SAMPLED, generator=torch.Generator().manual_seed(1))
    odd = even.clone()
    odd[:, ::32] *= 3  # what the sample sees is not what there is
    for values, passes in ((even, [32, 32, 1]), (odd, [32, 32, 1, 1, 1]), (even[:, 1:], [1, 1])):
        shares, threshold = shares_of(values, 0.2)
        assert threshold == values.abs().kthvalue(thresholds.dropped(values.shape[1], 0.2)).values
        assert shares == passes


def test_trim_keeps_what_equals_the_threshold() -> None:
    tau = torch.tensor([0.1, -0.2, 0.2, 0.3, 0.0])
    assert thresholds.trim(tau, torch.tensor(0.2)).tolist() == pytest.approx([0.0, -0.2, 0.2, 0.3, 0.0])
    assert torch.equal(thresholds.trim(tau, torch.tensor(0.0)), tau)
