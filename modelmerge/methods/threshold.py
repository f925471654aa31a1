"""Magnitude trimming: the exact threshold over a whole model, by counting.

The bits of a non-negative float32 sort like the float itself. Counting the upper 15 bits of every |x| tells the bucket
that holds the wanted magnitude; counting the lower 16 bits inside that bucket tells the magnitude: exact, ties and
all, with 98,304 counters per task instead of a sort of the model.

For a large model both counts are first taken on a sample. The sample's threshold is near the true one, so one pass
over everything that counts a window of 65,536 neighbouring floats around it, and how many entries lie above, is
enough; where the true threshold turns out to lie outside the window, the two full counts follow. The result is exact
either way.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from modelmerge.methods.contract import Pass, Survey, Tensor

_LOW_BITS = 16
_HIGH_BUCKETS = 1 << 15
_LOW_BUCKETS = 1 << _LOW_BITS
# A sample of one in so many entries; below so many entries in all, its threshold would often be too far off.
SHARE = 32
SAMPLED = 1 << 24


def dropped(numel: int, density: float) -> int:
    """How many of `numel` entries lie below the threshold when the share `density` is kept (ties apart).

    The rule of the TIES and APGD code: the threshold is the (d - int(density * d))-th smallest magnitude and entries
    equal to it are kept, which makes int(density * d) + 1 of them.
    """
    return numel - int(numel * density)


def survey(density: float | tuple[float, ...]) -> Survey | None:
    """The survey that finds each task's threshold over all its entries [T]; none where everything is kept.

    The density is one for all tasks, or one for each.
    """
    if density >= 1.0 if isinstance(density, float) else min(density) >= 1.0:
        return None
    return Survey(
        find=lambda numel: _find(numel, density), reads=lambda numel: 2.0 if numel < SAMPLED else 1.0 + 2.0 / SHARE
    )


def _ranks(numel: int, density: float | tuple[float, ...], counts: Tensor) -> Tensor:
    """The ranks [T] of the tasks' thresholds among `numel` magnitudes, counted from 1, where `counts` [T, n] is."""
    densities = [density] * len(counts) if isinstance(density, float) else density
    return torch.tensor([max(dropped(numel, each), 1) for each in densities], device=counts.device)


def _find(numel: int, density: float | tuple[float, ...]) -> Generator[Pass, Tensor, Tensor]:
    if numel >= SAMPLED:
        guess = yield from _count(density, SHARE)
        first = (guess.view(torch.int32) - _LOW_BUCKETS // 2).clamp(min=0)
        counts = yield Pass(lambda taus, total: _count_window(taus, first, total), _LOW_BUCKETS + 1)
        window, above = counts[:, :-1], counts[:, -1]
        rank = _ranks(numel, density, counts) - (numel - above - window.sum(1))
        within = (window.cumsum(1) < rank[:, None]).sum(1)
        if bool(((rank > 0) & (within < _LOW_BUCKETS)).all()):
            return (first + within).to(torch.int32).view(torch.float32)
    return (yield from _count(density, 1))


def _count(density: float | tuple[float, ...], share: int) -> Generator[Pass, Tensor, Tensor]:
    """The thresholds [T] of the entries that passes of that share see."""
    high = yield Pass(_count_high, _HIGH_BUCKETS, share)
    bucket, rank = _bucket(high, density)
    low = yield Pass(lambda taus, total: _count_window(taus, bucket << _LOW_BITS, total), _LOW_BUCKETS + 1, share)
    within = (low[:, :-1].cumsum(1) < rank[:, None]).sum(1)
    return ((bucket << _LOW_BITS) | within).to(torch.int32).view(torch.float32)


def smallest(values: Tensor, *ranks: int) -> Tensor:
    """The entries of these ranks, counted from 1, in each row of values >= 0 [m, n]: [m, ranks].

    The values are put in another order.
    """
    if values.device.type != "cpu":
        return torch.cat([values.kthvalue(rank, dim=1, keepdim=True).values for rank in ranks], dim=1)
    # numpy partitions ten times faster than torch selects, and integers faster than floats.
    bits = values.view(torch.int32)
    stop = bits.shape[1]
    for rank in sorted(set(ranks), reverse=True):
        bits[:, :stop].numpy().partition(rank - 1, axis=1)
        stop = rank - 1
    return bits[:, [rank - 1 for rank in ranks]].view(torch.float32)


def trim(tau: Tensor, threshold: Tensor | None) -> Tensor:
    """`tau` with every entry whose magnitude is below `threshold` (0-d, on the host) set to zero."""
    if threshold is None:
        return tau.clone()
    # hardshrink keeps |x| > limit in one pass over memory; |x| >= t is |x| > the next float below t.
    limit = float(torch.nextafter(threshold, torch.full_like(threshold, -1.0)))
    return torch.nn.functional.hardshrink(tau, limit)


def _magnitude_bits(tau: Tensor) -> Tensor:
    return tau.view(torch.int32) & 0x7FFFFFFF


def _count_high(taus: Tensor, total: Tensor) -> None:
    """Adds to total [T, 2^15] how many magnitudes of [T, n] have each value of the upper bits."""
    for tau, count in zip(taus, total, strict=True):
        count.add_(torch.bincount(_magnitude_bits(tau).bitwise_right_shift_(_LOW_BITS), minlength=_HIGH_BUCKETS))


def _count_window(taus: Tensor, first: Tensor, total: Tensor) -> None:
    """Adds to total [T, 2^16 + 1] how many magnitudes have the bits first, first + 1, ...; last, how many have more."""
    for tau, start, count in zip(taus, first.tolist(), total, strict=True):
        offset = _magnitude_bits(tau).sub_(start)
        inside = within(offset, 0, _LOW_BUCKETS)
        # Few entries lie in the window: adding them one by one is less work than a histogram that is mostly zeros.
        count.index_add_(0, inside, torch.ones_like(inside, dtype=torch.int64))
        count[-1] += at_least(offset, _LOW_BUCKETS)


def within(bits: Tensor, first: int, stop: int) -> Tensor:
    """The int32 entries from `first` to before `stop`, less than 2^32 above it; after the highest comes the lowest."""
    return bits.index_select(0, places(bits, first, stop))


def places(bits: Tensor, first: int, stop: int) -> Tensor:
    """Where the entries that `within` gives are."""
    # As unsigned, one comparison finds both ends.
    if bits.device.type != "cpu":
        return ((bits - first).long() & 0xFFFFFFFF < stop - first).nonzero().flatten()
    values: Any = bits.numpy() - first if first else bits.numpy()
    return _places(values.view("uint32") < max(stop - first, 0))


def from_least(values: Tensor, least: float) -> Tensor:
    """Where the values [n] are no less than that."""
    if values.device.type != "cpu":
        return (values >= least).nonzero().flatten()
    return _places(values.numpy() >= least)


def _places(hits: Any) -> Tensor:
    """Where numpy's booleans [n] are true."""
    # On a CPU numpy compares seven times faster than torch, and finds what few entries hold. More than a tenth it finds
    # by a way without branches: some more behind bring it there, in a third of the time.
    found = int(np.count_nonzero(hits))
    if found > len(hits) // 32:
        more: Any = torch.ones(len(hits) + len(hits) // 8 + 1, dtype=torch.bool).numpy()
        more[: len(hits)] = hits
        hits = more
    return torch.from_numpy(hits.nonzero()[0][:found])


def at_least(bits: Tensor, bound: int) -> Tensor | int:
    """How many int32 entries are no less than `bound`."""
    if bits.device.type != "cpu":
        return (bits >= bound).sum()
    return int(np.count_nonzero(bits.numpy() >= bound))


def _bucket(high: Tensor, density: float | tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The bucket that holds each task's threshold [T], and the threshold's rank within it, counted from 1 [T]."""
    numel = int(high[0].sum())
    rank = _ranks(numel, density, high)
    cumulative = high.cumsum(1)
    bucket = (cumulative < rank[:, None]).sum(1)
    before = (cumulative - high).gather(1, bucket[:, None]).squeeze(1)
    return bucket, rank - before
