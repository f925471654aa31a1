"""Exact order statistics of a whole model's numbers, by counting, in two passes.

The bits of a float32, with those of negative ones turned round, sort like the float itself. The first pass counts the
upper 16 bits, which tells the bucket of each wanted rank; the second counts the lower 16 bits within those buckets.

Of a large model a sample tells about where the wanted numbers are, and one pass is enough: it hands over the numbers
near a rank that few lie beyond, or counts a window of neighbouring floats and how many are more. Where the sample is
too far off, the two passes follow. The result is exact either way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import torch

from modelmerge.methods import threshold
from modelmerge.methods.contract import Pass, Tensor

_BITS = 16
_BUCKETS = 1 << _BITS
# Standard errors on either side, of a sample of independent entries: those of a run are alike.
_ERRORS = 20.0
_WINDOW = 1 << 18  # floats that are counted around a sample's number
_MOST = 1 << 22  # numbers that are handed over

Numbers = Callable[[Tensor], Iterable[Tensor]]  # of task vectors [T, n]: T rows [n], one by one


def by_rank(numbers: Numbers, ranks: Sequence[int] | Sequence[Sequence[int]]) -> Generator[Pass, Tensor, Tensor]:
    """The numbers of these ranks, counted from 1, that `numbers` makes of task vectors [T, n]: T rows [n]. [T, ranks].

    The rows come one by one, as memory for all of them at once would be new for each block. The ranks are the same for
    all rows, or some for each.
    """
    high = yield _histogram(numbers, 1)
    cumulative = high.cumsum(1)
    places = torch.minimum(torch.tensor(ranks, device=high.device), cumulative[:, -1:])
    buckets = torch.searchsorted(cumulative, places)
    within = places - (cumulative - high).gather(1, buckets)

    def count_low(taus: Tensor, total: Tensor) -> None:
        for row, chosen, count in zip(numbers(taus), buckets.tolist(), total, strict=True):
            bits = _sorting(row, min(chosen))
            for bucket, part in zip(chosen, count.view(-1, _BUCKETS), strict=True):
                inside = threshold.within(bits, _first(bucket), _first(bucket + 1)) & (_BUCKETS - 1)
                part.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int64))

    low = yield Pass(count_low, within.shape[1] * _BUCKETS)
    lower = (low.view(len(low), -1, _BUCKETS).cumsum(2) < within[:, :, None]).sum(2)
    bits = (((buckets - _BUCKETS // 2) << _BITS) | lower).to(torch.int32)
    return _turned(bits).view(torch.float32)


def _histogram(numbers: Numbers, share: int) -> Pass:
    """How many numbers there are in each bucket."""

    def count(taus: Tensor, total: Tensor) -> None:
        for row, part in zip(numbers(taus), total, strict=True):
            buckets = (_sorting(row) >> _BITS).add_(_BUCKETS // 2)
            part.index_add_(0, buckets, torch.ones_like(buckets, dtype=torch.int64))

    return Pass(count, _BUCKETS, share)


def tails(numel: int, low: int, high: int) -> Generator[Pass, Any, Tensor | None]:
    """The magnitudes of two ranks near either end, counted from 1, of a large model's task vectors: [T, 2].

    None where the sample is too far off.
    """
    cumulative = (yield _histogram(torch.abs, threshold.SHARE)).cumsum(1)
    size = cumulative[:, -1:].double()
    shares = size.new_tensor([low, high]) / numel
    margin = _ERRORS * ((size * shares * (1 - shares)).sqrt() + 1)
    near = torch.stack([size * shares - margin, size * shares + margin], 2).flatten(1).clamp(min=0).long()
    buckets = torch.searchsorted(cumulative, near).clamp(max=_BUCKETS - 2)
    edges = (buckets + buckets.new_tensor([0, 1, 0, 1]) - _BUCKETS // 2) << _BITS
    # Most often many entries did not change, and the lower one is 0: to count some of those is enough.
    edges[:, :2] *= cumulative[:, _BUCKETS // 2, None] < 16 * size * shares[0]
    each, room = edges.tolist(), 4 * threshold.SHARE * int(margin.sum())
    if room > _MOST or any(stop > start for _, stop, start, _ in each):
        return None

    def look(taus: Tensor, total: Tensor) -> Tensor:
        keys = []
        for i, (tau, (_, stop, start, _), count) in enumerate(zip(taus, each, total, strict=True)):
            bits = tau.view(torch.int32) & 0x7FFFFFFF
            count[0] += 0 if stop else len(bits) // 8 - threshold.at_least(bits[: len(bits) // 8], 1)
            outer = threshold.within(bits, start, stop + (1 << 32)) if stop else bits[threshold.from_least(bits, start)]
            places = torch.bucketize(outer, edges[i].int(), right=True)
            count += torch.bincount(places, minlength=5)
            keys.append(outer[places % 2 == 1].long() + (i << 32))
        return torch.cat(keys)

    counts, keys = yield Pass(look, 5, room=room)
    found = []
    for i, ((_, stop, *_), (below, lower, _, upper, above)) in enumerate(zip(each, counts.tolist(), strict=True)):
        values, rank, place = _of_task(keys, i), low - below, lower + upper + above + high - numel
        if not (0 < rank <= lower if stop else rank <= 0) or not lower < place <= lower + upper <= len(values):
            return None
        pair = threshold.smallest(values.view(torch.float32)[None], rank if stop else place, place)[0]
        found.append(pair * values.new_tensor([min(stop, 1), 1]))
    return torch.stack(found)


def top(numbers: Numbers, numel: int, rank: int) -> Generator[Pass, Any, Tensor | None]:
    """The number of this rank, counted from 1, and the largest that `numbers` makes of a large model: [T, 2].

    None where the sample is too far off.
    """
    below = (yield _histogram(numbers, threshold.SHARE)).cumsum(1)
    size = below[:, -1:].double()
    buckets = torch.searchsorted(below, torch.cat([(size * (rank / numel)).ceil(), size], 1).long())
    each = [(_first(bucket) - 3 * _BUCKETS // 2, _first(last)) for bucket, last in buckets.tolist()]

    def look(taus: Tensor, total: Tensor) -> Tensor:
        keys = [total[:0, 0]]
        for i, (row, (start, peak), count) in enumerate(zip(numbers(taus), each, total, strict=True)):
            bits = _sorting(row, (start >> _BITS) + _BUCKETS // 2)
            inside = threshold.within(bits, start, start + _WINDOW).sub_(start)
            count.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int64))
            count[-1] += threshold.at_least(bits, start + _WINDOW)
            if bits.device.type != "cpu" or int(bits.numpy().max()) >= peak:  # to ask a device is to wait
                keys.append(bits[threshold.from_least(bits, peak)].long() + (i << 32))
        return torch.cat(keys)

    counts, keys = yield Pass(look, _WINDOW + 1, room=_MOST)
    within = rank - (numel - counts.sum(1))
    inside = (counts[:, :-1].cumsum(1) < within[:, None]).sum(1)
    largest = [_of_task(keys, i) for i in range(len(counts))]
    if not bool(((within > 0) & (inside < _WINDOW)).all()) or not all(map(len, largest)):
        return None
    ends = torch.stack([counts.new_tensor(each)[:, 0] + inside, torch.stack([bits.max() for bits in largest])], 1)
    return _turned(ends.int()).view(torch.float32)


def _of_task(keys: Tensor, task: int) -> Tensor:
    """The bits that were handed over as that task's."""
    return (keys[(keys + (1 << 31)) >> 32 == task] - (task << 32)).to(torch.int32)


def _first(bucket: int) -> int:
    """The least bits, as sorted, of a bucket."""
    return (bucket - _BUCKETS // 2) << _BITS


def _sorting(numbers: Tensor, least: int = 0) -> Tensor:
    """Integers that sort as the float32 numbers do; below the bucket `least`, those below 0 may be in another order."""
    bits = numbers.view(torch.int32)
    return bits if least >= _BUCKETS // 2 else _turned(bits)


def _turned(bits: Tensor) -> Tensor:
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
