"""Exact order statistics of one tensor's numbers, from a sample and one pass over its blocks.

Between two numbers of a sample that lie some standard errors below and above the wanted one there are few others, ties
and all: each block tells how many of its numbers lie at either end and above, and hands over those between (Floyd and
Rivest, Expected time bounds for selection, CACM 1975). Where the sample's runs differ too much for that, or the wanted
number lies outside after all, two passes that count find it, as they do for whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelmerge.methods import order, threshold
from modelmerge.methods.contract import Gathered, Look, Tensor

_ERRORS = 5.0  # standard errors on either side
GATHERED = 1 / 32  # where more of a tensor's numbers may lie between, all are counted
MOST = 1 << 22  # and where a window might need memory for more than that
_LOWEST, _INFINITE, _HIGHEST = -1, 0x7F800000, (1 << 31) - 1  # as bits

Numbers = Callable[[Tensor], Iterable[Tensor]]  # task vectors [T, n] -> R rows [n] of numbers >= 0, which are new
Places = Callable[[int, int], Sequence[int]]  # of a row, by its number, with so many numbers: k places from the top


@dataclass(frozen=True, slots=True)
class _Window:
    """The numbers between two others, all by their bits."""

    low: int
    high: int
    inner: Gathered

    def look(self, bits: Tensor) -> list[Tensor | int]:
        """How many entries of a block are above the high end, at least that, between, and at least the low end."""
        inner = threshold.within(bits, self.low + 1, self.high)
        self.inner.add(inner)
        above = 0 if self.high == _HIGHEST else threshold.at_least(bits, self.high + 1)
        return [above, threshold.at_least(bits, self.high), len(inner), threshold.at_least(bits, self.low)]

    def entry(self, place: int, counts: Sequence[int]) -> int | None:
        """The bits of the entry of that place from the top, where `look` has counted so many; None if it is outside."""
        above, from_high, between, from_low = counts
        if place == 0:
            return _INFINITE
        if above < place <= from_high:
            return self.high
        inner = self.inner.values
        if from_high < place <= from_high + between and inner is not None:
            rank = from_high + between - place + 1
            return int(threshold.smallest(inner.view(torch.float32)[None], rank).view(torch.int32))
        return self.low if from_high + between < place <= from_low else None


def by_place(
    numbers: Numbers, places: Places, numel: int, *, at_once: bool, positive: bool = False
) -> Generator[Look, Any, Tensor]:
    """The numbers of these places among `numel`, counted from 1, [R, k] float32; infinite for a place of 0.

    With `positive` the places are those among the positive numbers of one row.
    """
    if at_once:
        found = yield Look(lambda taus, base: [_directly(numbers(taus), places, positive)])
        return found[0]
    sample = yield Look(lambda taus, base: [torch.stack(list(numbers(taus)))], sampled=True)
    rows, device, count = len(sample[0]), sample[0].device, numel
    windows = _around(torch.stack(sample, dim=1), places, numel, positive=positive)
    del sample  # others of its kind are on their way
    if windows is not None:
        seen = yield Look(lambda taus, base: _look(numbers(taus), windows, positive=positive))
        count = int(seen[0, -1]) if positive else numel
        found = _entries(windows, [places(row, count) for row in range(rows)], seen)
        if found is not None:
            return found.to(device)
    elif positive:
        count = int((yield Look(lambda taus, base: next(iter(numbers(taus))).count_nonzero())))
    return (yield from _counted(numbers, [places(row, count) for row in range(rows)], numel))


def _directly(rows: Iterable[Tensor], places: Places, positive: bool) -> Tensor:
    """The numbers of these places in rows that are in memory, and lose their order."""
    found = []
    for i, row in enumerate(rows):
        wanted = places(i, int(row.count_nonzero()) if positive else row.numel())
        values = threshold.smallest(row.reshape(1, -1), *(row.numel() - max(place, 1) + 1 for place in wanted))[0]
        found.append(torch.where(torch.tensor(wanted, device=row.device) > 0, values, torch.inf))
    return torch.stack(found)


def _around(sample: Tensor, places: Places, numel: int, *, positive: bool = False) -> list[list[_Window]] | None:
    """Windows around these places' numbers, going by a sample [R, runs, n]; None where one would hold too many."""
    windows: list[list[_Window]] = []
    runs, size = sample.shape[1], sample[0].numel()
    for i, row in enumerate(sample):
        ordered = _sorted(row.flatten().view(torch.int32))
        shares = (row > 0).double().mean(1) if positive else row.new_ones(runs, dtype=torch.float64)
        count = max(round(float(shares.mean()) * size), 1)
        windows.append([])
        for place in places(i, count):
            middle = size - max(place, 1)
            # A run's numbers may be alike: how the runs differ tells how far off the sample may be.
            part = (row >= ordered[middle].view(torch.float32)).double().mean(1)
            error = (float(part.std()) + place / count * float(shares.std())) / runs**0.5
            margin = _ERRORS * size * max(error, (place / size * (1 - place / size) / size) ** 0.5) + 4
            low, high = int(middle - margin), int(middle + margin) + 1
            share = (min(high, size) - max(low, 0)) / size
            if share > GATHERED or 2 * share * numel > MOST:
                return None
            ends = ordered[low] if low >= 0 else _LOWEST, ordered[high] if high < size else _HIGHEST
            inner = Gathered(torch.empty(int(2 * share * numel), dtype=torch.int32, device=row.device))
            windows[-1].append(_Window(int(ends[0]), int(ends[1]), inner))
    return windows


def _sorted(bits: Tensor) -> Tensor:
    if bits.device.type != "cpu":
        return bits.sort().values
    ordered = bits.clone()
    ordered.numpy().sort()  # in a tenth of torch's time
    return ordered


def _look(rows: Iterable[Tensor], windows: Sequence[Sequence[_Window]], *, positive: bool = False) -> Tensor:
    """What the windows [R][k] tell of a block, and how many numbers of each row are positive: int64 [R, 4 k + 1]."""
    counts: list[list[Tensor | int]] = []
    for row, each in zip(rows, windows, strict=True):
        bits = row.view(torch.int32)
        counts.append([count for window in each for count in window.look(bits)])
        counts[-1].append(threshold.at_least(bits, 1) if positive else 0)
    return torch.tensor(counts)


def _entries(windows: Sequence[Sequence[_Window]], places: Sequence[Sequence[int]], seen: Tensor) -> Tensor | None:
    """The numbers of these places [R, k], where blocks give so much [R, 4 k + 1]; None if one is outside its window."""
    bits = []
    for row, wanted, counts in zip(windows, places, seen[:, :-1].unflatten(1, (-1, 4)).tolist(), strict=True):
        bits += [window.entry(place, four) for window, place, four in zip(row, wanted, counts, strict=True)]
    if None in bits:
        return None
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).view(len(windows), -1)


def _counted(numbers: Numbers, places: Sequence[Sequence[int]], numel: int) -> Generator[Look, Any, Tensor]:
    """The numbers of these places, [R, k], by counting all."""
    ranks = [[numel - max(place, 1) + 1 for place in row] for row in places]
    search = order.by_rank(lambda taus: torch.stack(list(numbers(taus))), ranks)
    trip = next(search)

    def counted(taus: Tensor, base: Tensor) -> Tensor:
        total = torch.zeros(len(ranks), trip.counters, dtype=torch.int64, device=taus.device)
        trip.measure(taus, total)
        return total

    while True:
        total = yield Look(counted)
        try:
            trip = search.send(total)
        except StopIteration as end:
            found: Tensor = end.value
            return torch.where(torch.tensor(places, device=found.device) > 0, found, torch.inf)
