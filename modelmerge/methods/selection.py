"""Exact order statistics of one tensor's numbers, from a sample and one pass over its blocks.

Between two numbers of a sample that lie some standard errors below and above the wanted one there are few others, ties
and all: each block tells how many of its numbers lie at either end and above, and hands over those between (Floyd and
Rivest, Expected time bounds for selection, CACM 1975). Where the sample's runs differ too much for that, or the wanted
number lies outside after all, two passes that count find it, as they do for whole models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelmerge.methods import order, threshold
from modelmerge.methods.blocks import blocks
from modelmerge.methods.contract import Gathered, Look, Tensor

_ERRORS = 5.0  # standard errors on either side
GATHERED = 1 / 32  # where more of a tensor's numbers may lie between, all are counted
MOST = 1 << 22  # and where a window might need memory for more than that
_LOWEST, _INFINITE, _HIGHEST = -1, 0x7F800000, (1 << 31) - 1  # as bits

Numbers = Callable[[Tensor], Iterable[Tensor]]  # task vectors [T, n] -> R rows [n] of numbers >= 0, which are new
Places = Callable[[int, int], Sequence[int]]  # of a row, by its number, with so many numbers: k places from the top


@dataclass(frozen=True, slots=True)
class _Window:
    """The numbers between two others, all by their bits, and what lies beside each of them: [1 + k, n]."""

    low: int
    high: int
    inner: Gathered

    def look(self, bits: Tensor, beside: Tensor | None = None) -> list[Tensor | int]:
        """How many entries of a block are above the high end, at least that, between, and at least the low end."""
        if beside is None:
            inner = threshold.within(bits, self.low + 1, self.high)[None]
        else:
            places = threshold.places(bits, self.low + 1, self.high)
            inner = torch.cat([bits[None, places], beside[:, places].view(torch.int32)])
        self.inner.add(inner)
        above = 0 if self.high == _HIGHEST else threshold.at_least(bits, self.high + 1)
        return [above, threshold.at_least(bits, self.high), inner.shape[1], threshold.at_least(bits, self.low)]

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
            bits = inner[:1] if len(inner) == 1 else inner[:1].clone()  # which is put in another order
            return int(threshold.smallest(bits.view(torch.float32), rank).view(torch.int32))
        return self.low if from_high + between < place <= from_low else None


def by_place(numbers: Numbers, places: Places, numel: int, *, at_once: bool) -> Generator[Look, Any, Tensor]:
    """The numbers of these places among `numel`, counted from 1, [R, k] float32; infinite for a place of 0."""
    if at_once:
        found = yield Look(lambda taus, base: [_directly(numbers(taus), places)])
        return found[0]
    sample = yield Look(lambda taus, base: [torch.stack(list(numbers(taus)))], sampled=True)
    windows, device = _around(torch.stack(sample, dim=1), places, numel), sample[0].device
    wanted = [places(row, numel) for row in range(len(sample[0]))]
    del sample  # others of its kind are on their way
    if windows is not None:
        seen = yield Look(lambda taus, base: _look(numbers(taus), windows))
        found = _entries(windows, wanted, seen)
        if found is not None:
            return found.to(device)
    return (yield from _counted(numbers, wanted, numel))


def largest(
    number: Callable[[Tensor], Tensor], share: float, numel: int, *, at_once: bool
) -> Generator[Look, Any, tuple[float, Tensor]]:
    """The least of the largest positive numbers, and what the task vectors have there.

    Args:
        number: Task vectors [T, n] -> [n] numbers >= 0, which are new.
        share: Of the positive numbers, so many are taken, rounded down; infinite is the least of none.
        numel: How many there are.
        at_once: They come as one block.

    Returns:
        The least that is taken, and the task vectors' sums of squares [T], float64, where the number is no less.
    """

    def places(row: int, count: int) -> tuple[int]:
        return (int(share * count),)

    def in_memory(taus: Tensor, base: Tensor) -> list[tuple[float, Tensor]]:
        row = number(taus)
        limit = float(_directly([row.clone()], lambda i, count: places(i, int(row.count_nonzero()))))
        return [(limit, squares(taus, row, limit))]

    if at_once:
        return (yield Look(in_memory))[0]
    sample = yield Look(lambda taus, base: [(number(taus), len(taus))], sampled=True)
    windows = _around(torch.stack([row for row, _ in sample])[None], places, numel, positive=True, beside=sample[0][1])
    del sample  # others of its kind are on their way
    limit = total = None
    if windows is not None:
        [[window]] = windows
        seen = yield Look(lambda taus, base: _look_beside(number, taus, window))
        *counts, count = map(int, seen[:5].tolist())
        limit, total = _with_squares(window, places(0, count)[0], counts, seen[5:])
    else:
        count = int((yield Look(lambda taus, base: number(taus).count_nonzero())))
    if limit is None:
        limit = float((yield from _counted(lambda taus: [number(taus)], [places(0, count)], numel)))
    if total is None:
        total = yield Look(lambda taus, base: squares(taus, number(taus), limit))
    return limit, total


def squares(taus: Tensor, numbers: Tensor | None = None, least: float = 0.0) -> Tensor:
    """The sums of squares [T], float64, of [T, n] where the numbers [n], if there are any, are no less than that."""
    total = torch.zeros(len(taus), dtype=torch.float64, device=taus.device)
    for block in blocks(taus):
        chosen = None if numbers is None else threshold.from_least(numbers[block], least)
        for tau, square in zip(taus[:, block], total, strict=True):
            part = (tau if chosen is None else tau.index_select(0, chosen)).double()
            square.add_(torch.dot(part, part))
    return total


def _directly(rows: Iterable[Tensor], places: Places) -> Tensor:
    """The numbers of these places in rows that are in memory, and lose their order."""
    found = []
    for i, row in enumerate(rows):
        wanted = places(i, row.numel())
        values = threshold.smallest(row.reshape(1, -1), *(row.numel() - max(place, 1) + 1 for place in wanted))[0]
        found.append(torch.where(torch.tensor(wanted, device=row.device) > 0, values, torch.inf))
    return torch.stack(found)


def _around(
    sample: Tensor, places: Places, numel: int, *, positive: bool = False, beside: int = 0
) -> list[list[_Window]] | None:
    """Windows around these places' numbers, going by a sample [R, runs, n]; None where one would hold too many.

    With `positive` the places are those among the positive numbers. So many others lie `beside` each number.
    """
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
            inner = Gathered(torch.empty(1 + beside, int(2 * share * numel), dtype=torch.int32, device=row.device))
            windows[-1].append(_Window(int(ends[0]), int(ends[1]), inner))
    return windows


def _sorted(bits: Tensor) -> Tensor:
    if bits.device.type != "cpu":
        return bits.sort().values
    ordered = bits.clone()
    ordered.numpy().sort()  # in a tenth of torch's time
    return ordered


def _look(rows: Iterable[Tensor], windows: Sequence[Sequence[_Window]]) -> Tensor:
    """What the windows [R][k] tell of a block: int64 [R, k, 4]."""
    each = zip(rows, windows, strict=True)
    return torch.tensor([[window.look(row.view(torch.int32)) for window in some] for row, some in each])


def _look_beside(number: Callable[[Tensor], Tensor], taus: Tensor, window: _Window) -> Tensor:
    """What the window tells of a block, how many numbers are positive, and `squares` from its high end on: [5 + T]."""
    total = torch.zeros(5 + len(taus), dtype=torch.float64)
    high = math.inf if window.high == _HIGHEST else _number(window.high)
    for block in blocks(taus):  # all while it is in the processor's cache
        part = taus[:, block]
        row = number(part)
        bits = row.view(torch.int32)
        counts = [*window.look(bits, part), threshold.at_least(bits, 1)]
        total += torch.cat([total.new_tensor(counts), squares(part, row, high).cpu()])
    return total


def _with_squares(
    window: _Window, place: int, counts: Sequence[int], total: Tensor
) -> tuple[float | None, Tensor | None]:
    """The number of this place, and the squares from it on; None for what the window does not tell."""
    entry, inner = window.entry(place, counts), window.inner.values
    if entry is None or inner is None or entry == window.low:
        return None if entry is None else _number(entry), None
    kept = inner[1:, inner[0] >= entry] & 0x7FFFFFFF
    # The blocks came in any order, and the sum shall not depend on it.
    return _number(entry), total + squares(torch.stack([_sorted(row) for row in kept]).view(torch.float32)).cpu()


def _number(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _entries(windows: Sequence[Sequence[_Window]], places: Sequence[Sequence[int]], seen: Tensor) -> Tensor | None:
    """The numbers of these places [R, k], where blocks give so much [R, k, 4]; None if one is outside its window."""
    bits = []
    for row, wanted, counts in zip(windows, places, seen.tolist(), strict=True):
        bits += [window.entry(place, four) for window, place, four in zip(row, wanted, counts, strict=True)]
    if None in bits:
        return None
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).view(len(windows), -1)


def _counted(numbers: Numbers, places: Sequence[Sequence[int]], numel: int) -> Generator[Look, Any, Tensor]:
    """The numbers of these places, [R, k], by counting all."""
    ranks = [[numel - max(place, 1) + 1 for place in row] for row in places]
    search = order.by_rank(numbers, ranks)
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
