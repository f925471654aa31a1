"""Exact order statistics of a whole model's numbers, by counting, in two passes.

The bits of a float32, with those of negative ones turned round, sort like the float itself. The first pass counts the
upper 16 bits, which tells the bucket of each wanted rank; the second counts the lower 16 bits within those buckets.
Of a large model the first counts only those near the buckets that a sample tells, and how many lie below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import torch

from modelmerge.methods import threshold
from modelmerge.methods.contract import Pass, Tensor

_BITS = 16
_BUCKETS = 1 << _BITS
_INFINITE = 0xFF80  # its bucket
# Standard errors on either side, of a sample of independent entries: those of a run are alike.
_ERRORS = 20.0


def by_rank(
    numbers: Callable[[Tensor], Iterable[Tensor]], ranks: Sequence[int] | Sequence[Sequence[int]],
    large: int | None = None,
) -> Generator[Pass, Tensor, Tensor]:  # fmt: skip
    """The numbers of these ranks, counted from 1, that `numbers` makes of task vectors [T, n]: T rows [n]. [T, ranks].

    The rows come one by one, as memory for all of them at once would be new for each block. The ranks are the same for
    all rows, or some for each. A `large` model with so many entries is sampled first.
    """

    def count_high(taus: Tensor, total: Tensor) -> None:
        for row, count in zip(numbers(taus), total, strict=True):
            count.add_(torch.bincount(_buckets(_sorting(row)), minlength=_BUCKETS))

    found = None
    if large is not None:
        sample = yield Pass(count_high, _BUCKETS, threshold.SHARE)
        places = torch.tensor(ranks, device=sample.device).expand(len(sample), -1)
        ranges = _around(sample, places / large)
        near = yield Pass(
            lambda taus, total: _count_near(numbers(taus), ranges, total), len(ranges[0]) * (_BUCKETS + 1)
        )
        found = _found_near(near.view(len(near), -1, _BUCKETS + 1), places)
    if found is None:
        high = yield Pass(count_high, _BUCKETS)
        cumulative = high.cumsum(1)
        places = torch.tensor(ranks, device=high.device).expand(len(high), -1).contiguous()
        places = torch.minimum(places, cumulative[:, -1:])
        buckets = torch.searchsorted(cumulative, places)
        found = buckets, places - (cumulative - high).gather(1, buckets)
    buckets, within = found

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


def _around(sample: Tensor, shares: Tensor) -> list[list[tuple[int, int]]]:
    """The first and the last bucket, near enough, of the numbers below which these shares [T, ranks] lie."""
    cumulative = sample.cumsum(1)
    size = cumulative[:, -1:].double()
    margin = _ERRORS * (shares * (1 - shares) * size).sqrt() + _ERRORS
    first = torch.searchsorted(cumulative, (shares * size - margin).clamp(min=0).long())
    last = torch.searchsorted(cumulative, (shares * size + margin).long()).clamp(max=_INFINITE)
    return [list(zip(*each, strict=True)) for each in zip(first.tolist(), last.tolist(), strict=True)]


def _count_near(rows: Iterable[Tensor], ranges: Sequence[Sequence[tuple[int, int]]], total: Tensor) -> None:
    """Adds to total [T, ranks (2^16 + 1)] how many of T rows lie in each bucket of a range; last, how many below it."""
    for row, some, counts in zip(rows, ranges, total, strict=True):
        bits = _sorting(row, min(some)[0])
        for (first, last), count in zip(some, counts.view(-1, _BUCKETS + 1), strict=True):
            inside = _buckets(threshold.within(bits, _first(first), _first(last + 1))).sub_(first)
            count[first : last + 1] += torch.bincount(inside, minlength=last + 1 - first)
            count[-1] += len(bits) - threshold.at_least(bits, _first(first))


def _found_near(near: Tensor, places: Tensor) -> tuple[Tensor, Tensor] | None:
    """The buckets of these places, and the places within them [T, ranks]; None if one is outside its range."""
    counts, within = near[:, :, :-1], places - near[:, :, -1]
    cumulative = counts.cumsum(2)
    if not bool(((within > 0) & (within <= cumulative[:, :, -1])).all()):
        return None
    buckets = torch.searchsorted(cumulative, within[:, :, None])
    return buckets.squeeze(2), within - (cumulative - counts).gather(2, buckets).squeeze(2)


def _first(bucket: int) -> int:
    """The least bits, as sorted, of a bucket."""
    return (bucket - _BUCKETS // 2) << _BITS


def _buckets(bits: Tensor) -> Tensor:
    return (bits >> _BITS).add_(_BUCKETS // 2)


def _sorting(numbers: Tensor, least: int = 0) -> Tensor:
    """Integers that sort as the float32 numbers do; below the bucket `least`, those below 0 may be in another order."""
    bits = numbers.view(torch.int32)
    return bits if least >= _BUCKETS // 2 else _turned(bits)


def _turned(bits: Tensor) -> Tensor:
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
