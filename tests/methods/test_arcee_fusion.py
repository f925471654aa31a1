"""Arcee Fusion against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge.methods.merge import arcee_fusion
from modelmerge.methods.registry import load
from tests.support.methods import context_of, merged, taus_of


def want(tau: Tensor, base: Tensor, fence: float) -> Tensor:
    expert = base.double() + tau.double()
    p, q = (each.softmax(-1) + 1e-8 for each in (expert, base.double()))
    importance = tau.double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    low, median, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return tau * (importance >= median + fence * (high - low))


@pytest.mark.parametrize("fence", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("shape", [(24, 18), (50,), (6, 3, 2, 2)])
def test_agrees_with_float64(shape: tuple[int, ...], fence: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arcee_fusion, "_BLOCK", 40)
    tau = 0.3 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    chosen = load("arcee-fusion")
    base = context_of(chosen, chosen.options(), tau).base
    assert base is not None
    got = merged("arcee-fusion", tau, fence=fence)
    assert torch.equal(got, want(tau[0], base, fence))
    assert 0 < int(got.count_nonzero()) < got.numel()


def test_weights_multiply_what_is_taken() -> None:
    taus = taus_of(1)
    assert torch.equal(merged("arcee-fusion", taus, (0.5,)), 0.5 * merged("arcee-fusion", taus))


def test_a_number_is_taken_as_it_is() -> None:
    assert merged("arcee-fusion", torch.tensor([0.25])) == 0.25
