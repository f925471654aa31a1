"""Order statistics of a tensor through samples and windows: those of a sort, whatever the sample."""

from __future__ import annotations

import functools
import operator
from collections.abc import Generator, Iterator
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


def found(
    values: Tensor, search: Generator[Look, Any, Any], sample: Tensor, *, backwards: bool = False
) -> tuple[Any, list[bool]]:
    """What is found in blocks, seen in this order, when a sample [R, runs, n] is, and which looks were samples."""
    look, looks = next(search), []
    while True:
        looks.append(look.sampled)
        parts = [part.contiguous() for part in (sample.unbind(1) if look.sampled else values.split(7000, dim=1))]
        order = range(len(parts))[:: -1 if backwards else 1]
        sums = {i: look.measure(parts[i], parts[i][0]) for i in order}
        try:
            look = search.send(functools.reduce(operator.add, (sums[i] for i in range(len(parts)))))
        except StopIteration as end:
            return end.value, looks


def placed(values: Tensor, places: Any, sample: Tensor) -> tuple[Tensor, list[bool]]:
    return found(values, selection.by_place(magnitudes, places, values.shape[1], at_once=False), sample)


def spread(values: Tensor) -> Tensor:
    return values[:, : 40 * 1500].reshape(len(values), 40, 1500)[:, :, :400]


@pytest.mark.parametrize("places", [(1,), (60_000,), (12_000,), (9_360, 361), (30_000, 30_001), (59_000, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_entries_by_place_are_those_of_a_sort(kind: str, places: tuple[int, ...]) -> None:
    values = KINDS[kind]
    want = values.abs().sort(1, descending=True).values[:, [place - 1 for place in places]]
    got, looks = placed(
        values, lambda row, count: [max(place * count // 60_000, 1) for place in places], spread(values)
    )
    assert torch.equal(got, want)
    assert looks == [True, False]


def test_what_a_sample_misses_is_counted() -> None:
    want = SMOOTH.abs().sort(1, descending=True).values[:, 11_999, None]
    wrong = spread(SMOOTH) * 3
    uneven = spread(SMOOTH) * torch.linspace(0, 2, 40)[:, None]  # its runs differ: its windows would hold too much
    for sample, looks in ((wrong, [True, False, False, False]), (uneven, [True, False, False])):
        assert placed(SMOOTH, lambda row, count: [count // 5], sample)[0].equal(want)
        assert placed(SMOOTH, lambda row, count: [count // 5], sample)[1] == looks


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0, 0.0])
@pytest.mark.parametrize("odd", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["smooth", "steps", "alike", "mostly zero"])
def test_the_largest_and_what_lies_beside_them_are_those_of_a_sort(kind: str, share: float, odd: float) -> None:
    values = KINDS[kind]
    numbers = values[0].clamp(min=0)
    place = int(share * int(numbers.count_nonzero()))
    search = selection.largest(lambda taus: taus[0].clamp(min=0), share, values.shape[1], at_once=False)
    (measured, squares), _ = found(values, search, spread(values) * odd)
    limit, places = measured[0], measured[1 + len(squares) :]
    assert limit == (numbers.sort(descending=True).values[place - 1] if place else torch.inf)
    assert torch.allclose(squares, torch.where(numbers >= limit, values.double(), 0.0).square().sum(1), rtol=1e-12)
    assert len(places) or (kind, share, odd) != ("smooth", 0.1, 1.0)
    if len(places):
        assert torch.equal(places.long(), (numbers >= limit).nonzero().flatten())


def test_sums_do_not_depend_on_which_block_is_done_first() -> None:
    def with_squares(*, backwards: bool) -> Tensor:
        search = selection.largest(lambda taus: taus[0].abs(), 0.2, 60_000, at_once=False)
        (measured, _), looks = found(SMOOTH, search, spread(SMOOTH), backwards=backwards)
        assert looks == [True, False]
        return measured

    assert torch.equal(with_squares(backwards=False), with_squares(backwards=True))


def test_a_tensor_that_is_there_as_a_whole_is_not_sampled() -> None:
    search = selection.by_place(magnitudes, lambda row, count: [3], 60_000, at_once=True)
    look: Look = next(search)
    assert not look.sampled
    with pytest.raises(StopIteration) as end:
        search.send(look.measure(SMOOTH, SMOOTH[0]))
    assert torch.equal(end.value.value[:, 0], SMOOTH.abs().sort(1).values[:, -3])
