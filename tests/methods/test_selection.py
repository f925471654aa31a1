"""Order statistics of a tensor through samples and windows: those of a sort, whatever the sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import selection
from modelmerge.methods.contract import Look

GENERATOR = torch.Generator().manual_seed(0)
SMOOTH = torch.randn(2, 60_000, generator=GENERATOR)
# As of 16-bit checkpoints: few magnitudes, each many times; zeros, denormals, and all that is alike.
STEPS = (SMOOTH * 8).round() / 8
WIDE = SMOOTH * 10.0 ** torch.randint(-40, 30, SMOOTH.shape, generator=GENERATOR)
ALIKE = torch.full_like(SMOOTH, 0.25)
MOSTLY_ZERO = torch.where(SMOOTH > 1.5, SMOOTH, 0.0)
KINDS = {"smooth": SMOOTH, "steps": STEPS, "wide": WIDE, "alike": ALIKE, "mostly zero": MOSTLY_ZERO}


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "GATHERED", 1 / 8)  # samples of so small tensors are small, and say little


def magnitudes(taus: Tensor) -> Iterator[Tensor]:
    return (tau.abs() for tau in taus)


def found(values: Tensor, places: Any, sample: Tensor, *, positive: bool = False) -> tuple[Tensor, list[bool]]:
    """What is found in blocks when a sample [R, runs, n] is seen, and which looks were samples."""
    search = selection.by_place(magnitudes, places, values.shape[1], at_once=False, positive=positive)
    look, looks = next(search), []
    while True:
        looks.append(look.sampled)
        parts = sample.unbind(1) if look.sampled else values.split(7000, dim=1)
        total: Any = None
        for part in parts:
            sums = look.measure(part.contiguous(), part[0])
            total = sums if total is None else total + sums
        try:
            look = search.send(total)
        except StopIteration as end:
            return end.value, looks


def spread(values: Tensor) -> Tensor:
    return values[:, : 40 * 1500].reshape(len(values), 40, 1500)[:, :, :400]


@pytest.mark.parametrize("places", [(1,), (60_000,), (12_000,), (9_360, 361), (30_000, 30_001), (59_000, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_by_place_are_those_of_a_sort(kind: str, places: tuple[int, ...]) -> None:
    values = KINDS[kind]
    want = values.abs().sort(1, descending=True).values[:, [place - 1 for place in places]]
    got, looks = found(values, lambda row, count: [max(place * count // 60_000, 1) for place in places], spread(values))
    assert torch.equal(got, want)
    assert looks == [True, False]


def test_what_a_sample_misses_is_counted() -> None:
    want = SMOOTH.abs().sort(1, descending=True).values[:, 11_999, None]
    wrong = spread(SMOOTH) * 3
    uneven = spread(SMOOTH) * torch.linspace(0, 2, 40)[:, None]  # its runs differ: its windows would hold too much
    for sample, looks in ((wrong, [True, False, False, False]), (uneven, [True, False, False])):
        assert found(SMOOTH, lambda row, count: [count // 5], sample)[0].equal(want)
        assert found(SMOOTH, lambda row, count: [count // 5], sample)[1] == looks


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0, 0.0])
@pytest.mark.parametrize("odd", [1.0, 3.0])
def test_places_among_positive_entries_are_those_of_a_sort(share: float, odd: float) -> None:
    values = MOSTLY_ZERO[:1]
    place = int(share * int(values.count_nonzero()))
    got, _ = found(values, lambda row, count: [int(share * count)], spread(values) * odd, positive=True)
    assert got.item() == (values.sort(1, descending=True).values[0, place - 1] if place else torch.inf)


def test_a_tensor_that_is_there_as_a_whole_is_not_sampled() -> None:
    search = selection.by_place(magnitudes, lambda row, count: [3], 60_000, at_once=True)
    look: Look = next(search)
    assert not look.sampled
    with pytest.raises(StopIteration) as end:
        search.send(look.measure(SMOOTH, SMOOTH[0]))
    assert torch.equal(end.value.value[:, 0], SMOOTH.abs().sort(1).values[:, -3])
