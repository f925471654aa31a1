"""PCB-Merging against its definition, written out plainly in float64, and whole-model order statistics."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import order, threshold
from modelmerge.methods.contract import Pass, Survey
from modelmerge.methods.merge import pcb
from tests.support.methods import counted, merged, surveyed, taus_of


def between(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Each row cut off at the entries of these places in its order, and the same from 0 to 1."""
    order = values.sort(1).values
    cut = values.clamp(order[:, low, None], order[:, high, None])
    return cut, (cut - order[:, low, None]) / (order[:, high, None] - order[:, low, None])


def reference(taus: Tensor, weights: Tensor, ratio: float) -> Tensor:
    flat = taus.double().flatten(1)
    tasks, count = flat.shape
    sizes, matters = between(flat.abs(), int(count * 1e-4), int(count * (1 - 1e-4) - 1))
    score = (tasks * matters**2).exp() * (flat * flat.sum(0)).tanh()
    _, share = between(score, min(int(count * (1 - ratio)), count - 1), count - 1)
    total = (share * flat.sign() * sizes * weights[:, None]).sum(0) / share.sum(0).clamp(min=1e-12)
    return total.view(taus.shape[1:])


@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 50.0])
def test_agrees_with_float64(size: float, ratio: float) -> None:
    taus, weights = taus_of(5) * size, torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    got = merged("pcb", taus, tuple(weights.tolist()), ratio=ratio, scale=0.7)
    want = 0.7 * reference(taus, weights.double(), ratio)
    assert (got.double() - want).norm() <= 1e-4 * want.norm()


def test_scores_do_not_depend_on_where_a_block_ends() -> None:
    taus = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    limits = torch.tensor([[0.1, 2.0]]).repeat(3, 1)
    whole = torch.stack([*pcb.scores(taus, pcb.ends_of(limits))])
    for first, last in ((0, 1), (1, 8), (3, 777), (999, 1000), (17, 33)):
        part = torch.stack([*pcb.scores(taus[:, first:last].contiguous(), pcb.ends_of(limits))])
        assert torch.equal(part, whole[:, first:last])


def test_tanh_of_small_numbers_is_not_missed() -> None:
    """They are their own, so that a block without it has the scores that it has beside large ones."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(1 << 16, generator=generator) * 10.0 ** torch.randint(-40, -3, (1 << 16,), generator=generator)
    small = torch.cat([small[small < pcb.ITSELF], torch.tensor(pcb.ITSELF).nextafter(torch.zeros(()))[None]])
    assert torch.equal(small.tanh(), small)
    assert torch.equal((-small).tanh(), -small)
    taus = torch.randn(3, 4096, generator=generator) * 1e-3
    ends = pcb.ends_of(torch.tensor([[1e-4, 2e-3]]).repeat(3, 1))
    beside = torch.cat([taus, torch.full((3, 64), 1.0)], dim=1)
    alone, together = (torch.stack([*pcb.scores(each, ends)]) for each in (taus, beside))
    assert torch.equal(alone, together[:, :4096])


@pytest.mark.parametrize("least", [-1.0, 0.0, 0.1, 0.3])
def test_entries_below_the_lower_limit_are_raised_to_it_where_they_are_kept(least: float) -> None:
    taus = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    ends = pcb.ends_of(torch.tensor([[0.5, 2.0]])), pcb.ends_of(torch.tensor([[least, 3.0]]))
    [score] = pcb.scores(taus, ends[0])
    raised = taus[0].sign() * taus[0].abs().clamp(0.5, 2.0)
    clear = (score - least).abs() > 1e-6
    want = torch.where(score > least, raised, 0.0)[clear]
    assert bool(((score > least) & (taus[0].abs() < 0.5)).any()) == (least < 0.25)
    assert torch.allclose(pcb._merged(taus, *ends, (1.0,))[clear], want)


def test_numbers_by_rank_are_those_of_a_sort() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([
        torch.randn(2, 5000, generator=generator) * 10.0 ** torch.randint(-40, 30, (2, 5000), generator=generator),
        torch.full((2, 300), -0.25), torch.zeros(2, 200),
    ], dim=1)  # fmt: skip
    ranks = (1, 2, 600, 2500, 2501, 5499, 5500, 600)
    found = surveyed(Survey(find=lambda numel: order.by_rank(lambda v: v, ranks), reads=lambda numel: 2.0), values)
    assert torch.equal(found, values.sort(1).values[:, [rank - 1 for rank in ranks]])


def searched(search: Generator[Pass, Any, Any], values: Tensor, odd: float = 1.0) -> tuple[Any, list[int]]:
    """What a search finds of values [T, n], and the shares of its passes; a sample sees them times that."""
    trip, shares = next(search), []
    while True:
        shares.append(trip.share)
        try:
            seen = values if trip.share == 1 else values[:, :: trip.share] * odd
            trip = search.send(counted(trip, seen))
        except StopIteration as end:
            return end.value, shares


MANY = 1 << 20


def large(kind: str) -> Tensor:
    values = torch.randn(3, MANY, generator=torch.Generator().manual_seed(4)) * 1e-3
    values[1] *= torch.linspace(0.5, 2.0, MANY)
    if kind == "rounded":  # many zeros, and many that are alike
        return (values * 4096).round() / 4096
    return values


@pytest.mark.parametrize("kind", ["smooth", "rounded"])
def test_the_tails_of_a_large_model_are_those_of_a_sort(kind: str) -> None:
    values, low, high = large(kind), 105, MANY - 105
    want = values.abs().sort(1).values[:, [low - 1, high - 1]]
    found, shares = searched(order.tails(MANY, low, high), values)
    assert torch.equal(found, want)
    assert shares == [32, 1]
    for odd in (0.3, 3.0):  # the sample is far off
        found, shares = searched(order.tails(MANY, low, high), values, odd)
        assert found is None or torch.equal(found, want)
    assert found is None


@pytest.mark.parametrize("rank", [MANY // 5, MANY * 4 // 5])
@pytest.mark.parametrize("kind", ["smooth", "rounded"])
def test_the_top_of_a_large_model_is_that_of_a_sort(kind: str, rank: int) -> None:
    values = large(kind) + 1.0 if kind == "smooth" else large(kind)  # close floats: a sample tells much
    found, shares = searched(order.top(lambda taus: taus, MANY, rank), values)
    assert torch.equal(found, values.sort(1).values[:, [rank - 1, -1]])
    assert shares == [32, 1]
    assert searched(order.top(lambda taus: taus, MANY, rank), values, 3.0)[0] is None


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["smooth", "rounded", "unchanged", "alike"])
def test_a_sample_changes_no_threshold(kind: str, ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = large("rounded" if kind == "rounded" else "smooth")
    if kind == "unchanged":
        values[1] = 0
    elif kind == "alike":
        values[1] = values[1].sign()
    survey = pcb._survey(pcb.Options(ratio=ratio), {})
    want = surveyed(survey, values)
    monkeypatch.setattr(threshold, "SAMPLED", 1)
    got, shares = searched(survey.find(MANY), values)
    assert torch.equal(got, want)
    assert shares[:3] == ([32, 1, 32] if kind in ("smooth", "rounded") else [32, 1, 1])
    assert torch.equal(searched(survey.find(MANY), values, 3.0)[0], want)


def test_experts_without_a_change_have_no_say() -> None:
    taus = taus_of(3)
    taus[1] = 0
    got = merged("pcb", taus)
    assert (got != 0).double().mean() <= 0.4
