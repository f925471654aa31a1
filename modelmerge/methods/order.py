"""Exact order statistics of a whole model's numbers, by counting, in two passes.

The bits of a float32, with those of negative ones turned round, sort like the float itself. The first pass counts the
upper 16 bits, which tells the bucket of each wanted rank; the second counts the lower 16 bits within those buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from modelmerge.methods.contract import Pass, Tensor

_BITS = 16
_BUCKETS = 1 << _BITS


def by_rank(
    numbers: Callable[[Tensor], Tensor], ranks: Sequence[int] | Sequence[Sequence[int]]
) -> Generator[Pass, Tensor, Tensor]:
    """The numbers of these ranks, counted from 1, that `numbers` makes of task vectors [T, n] -> [T, n]: [T, ranks].

    The ranks are the same for all rows, or some for each.
    """

    def count_high(taus: Tensor, total: Tensor) -> None:
        for sorted_bits, count in zip(_sorting(numbers(taus)), total, strict=True):
            count.add_(torch.bincount((sorted_bits >> _BITS).add_(_BUCKETS // 2), minlength=_BUCKETS))

    high = yield Pass(count_high, _BUCKETS)
    cumulative = high.cumsum(1)
    places = torch.tensor(ranks, device=high.device).expand(len(high), -1).contiguous()
    places = torch.minimum(places, cumulative[:, -1:])
    buckets = torch.searchsorted(cumulative, places)
    before = (cumulative - high).gather(1, buckets)

    def count_low(taus: Tensor, total: Tensor) -> None:
        for sorted_bits, chosen, count in zip(_sorting(numbers(taus)), buckets.tolist(), total, strict=True):
            place = (sorted_bits >> _BITS).add_(_BUCKETS // 2)
            for bucket, part in zip(chosen, count.view(-1, _BUCKETS), strict=True):
                inside = sorted_bits[place == bucket] & (_BUCKETS - 1)
                part.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int64))

    low = yield Pass(count_low, places.shape[1] * _BUCKETS)
    within = low.view(len(low), -1, _BUCKETS).cumsum(2)
    lower = (within < (places - before)[:, :, None]).sum(2)
    bits = (((buckets - _BUCKETS // 2) << _BITS) | lower).to(torch.int32)
    return _turned(bits).view(torch.float32)


def _sorting(numbers: Tensor) -> Tensor:
    """Integers that sort as the float32 numbers do."""
    return _turned(numbers.view(torch.int32))


def _turned(bits: Tensor) -> Tensor:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
