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
from modelmerge.methods.blocks import MANY_STEPS, blocks, in_blocks
from modelmerge.methods.contract import Gathered, Look, Tensor

_ERRORS = 5.0  # standard errors on either side
GATHERED = 1 / 32  # where more of a tensor's numbers may lie between, all are counted
MOST = 1 << 22  # and where a window might need memory for more than that
KEPT = 1 / 8  # where no more may be among the largest, their places are kept, up to half as many
_LOWEST, _INFINITE, _HIGHEST = -1, 0x7F800000, (1 << 31) - 1  # as bits

Numbers = Callable[[Tensor], Iterable[Tensor]]  # task vectors [T, n] -> R rows [n] of numbers >= 0, which are new
Places = Callable[[int, int], Sequence[int]]  # of a row, by its number, with so many numbers: k places from the top


@dataclass(frozen=True, slots=True)
class _Window:
    """The numbers between two others, all by their bits, and what lies beside each of them: [1 + k, n]."""

    low: int
    high: int
    inner: Gathered

    def look(self, bits: Tensor, rows: Tensor | None = None) -> list[Tensor | int]:
        """How many entries of a block are above the high end, at least that, between, and at least the low end.

        Of the rows [1 + k, n], or of the bits alone, it keeps what lies between.
        """
        between = threshold.places(bits, self.low + 1, self.high)
        inner = _chosen(bits[None] if rows is None else rows, between)
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
) -> Generator[Look, Any, tuple[Tensor, Tensor]]:
    """The least of the largest positive numbers, what the task vectors have there, and where that is.

    Args:
        number: Task vectors [T, n] -> [n] numbers >= 0, which are new.
        share: Of the positive numbers, so many are taken, rounded down; infinite is the least of none.
        numel: How many there are.
        at_once: They come as one block.

    Returns:
        Float64 [1 + T + k]: the least that is taken; the task vectors' sums of squares where the number is no less; and
        these places in their order, or none where they may be many. And the [T] of it alone.
    """

    def places(row: int, count: int) -> tuple[int]:
        return (int(share * count),)

    def in_memory(taus: Tensor, base: Tensor) -> list[tuple[Tensor, Tensor]]:
        row = in_blocks(taus, number)
        limit = _directly([row.clone()], lambda i, count: places(i, int(row.count_nonzero())))
        measured = torch.cat([limit[0].double(), _beside(taus, row, float(limit))])
        return [(measured, measured[1 : 1 + len(taus)])]

    if at_once:
        return (yield Look(in_memory))[0]
    sample = yield Look(lambda taus, base: [(number(taus), len(taus))], sampled=True)
    row, tasks = torch.stack([row for row, _ in sample]), sample[0][1]
    del sample  # others of its kind are on their way
    windows, kept, limit, total = _around(row[None], places, numel, positive=True, beside=tasks), None, None, None
    if windows is not None:
        window = windows[0][0]
        near = float((row.view(torch.int32) >= window.low).double().mean())
        room = int(1.1 * near * numel) if near <= KEPT and 2 * near * numel <= MOST else 0
        kept = memory = Gathered(torch.empty(2, room, dtype=torch.int32, device=row.device))
        seen = yield Look(lambda taus, base: [_look_beside(number, taus, window, memory)])
        totals, runs = sum(each for each, _ in seen), [run for _, each in seen for run in each]
        *counts, count = map(int, totals[:5].tolist())
        limit, total = _with_squares(window, places(0, count)[0], counts, totals[5:])
    else:
        count = int((yield Look(lambda taus, base: number(taus).count_nonzero())))
    if limit is None:
        kept = None  # it may be below all of these
        limit = float((yield from _counted(lambda taus: [number(taus)], [places(0, count)], numel)))
    if total is None:
        total = yield Look(lambda taus, base: _beside(taus, number(taus), limit)[:tasks])
    measured = torch.cat([total.new_tensor([limit]), total]).cpu()
    if kept is not None and kept.values is not None:
        measured = _joined(measured, kept.values, runs)
    return measured, measured[1 : 1 + tasks]


def squares(taus: Tensor) -> Tensor:
    """The sums of squares [T], float64, of [T, n]."""
    total = torch.zeros(len(taus), dtype=torch.float64, device=taus.device)
    for block in blocks(taus):
        for tau, square in zip(taus[:, block], total, strict=True):
            part = tau.double()
            square.add_(torch.dot(part, part))
    return total


def _beside(taus: Tensor, row: Tensor, least: float) -> Tensor:
    """The sums of squares of [T, n] where the numbers [n] are no less than that, and these places: [T + k]."""
    found = [torch.zeros(len(taus), dtype=torch.float64, device=taus.device)]
    for block in blocks(taus):
        places = threshold.from_least(row[block], least)
        found[0] += squares(_chosen(taus[:, block], places))
        found.append(places.double().add_(block.start))
    return torch.cat(found)


def _chosen(rows: Iterable[Tensor], places: Tensor) -> Tensor:
    """What R rows [n] have at these places [k]: [R, k]."""
    return torch.stack([row.index_select(0, places) for row in rows])  # in half the time of one step


def _joined(head: Tensor, kept: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
    """The head, and the places of numbers no less than its first, of those that are kept, with their bits [2, n]."""
    joined, start, used = head.new_empty(len(head) + kept.shape[1]), 0, len(head)
    joined[:used] = head
    for size, first, count in runs:
        places, bits = kept[:, first : first + count]
        places = places.index_select(0, threshold.from_least(bits.view(torch.float32), float(head[0])))
        torch.add(places.cpu(), start, out=joined[used : used + len(places)])
        start, used = start + size, used + len(places)
    return joined[:used]


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


def _look_beside(
    number: Callable[[Tensor], Tensor], taus: Tensor, window: _Window, kept: Gathered
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """What the window tells of a block, how many numbers are positive, and `squares` from its high end on: [5 + T].

    And for each part of it how long it is, and where how many of its places are kept: those from the low end on.
    """
    total, runs = torch.zeros(5 + len(taus), dtype=torch.float64), []
    for block in blocks(taus, MANY_STEPS):  # all while it is in the processor's cache
        part = taus[:, block]
        bits = number(part).view(torch.int32)
        places = threshold.from_least(bits, window.low)
        rows = _chosen((bits, *part.view(torch.int32)), places)
        counts = [*window.look(rows[0], rows), threshold.at_least(bits, 1)]
        runs.append((len(bits), kept.add(torch.stack([places.int(), rows[0]])), len(places)))
        above = rows[1:].view(torch.float32).mul_(rows[0] >= window.high)  # in place: `rows` are not needed any more
        total += torch.cat([total.new_tensor(counts), squares(above).cpu()])
    return total, runs


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
