"""Magnitude trimming: the exact threshold over a whole model, found in two streaming passes.

The bits of a non-negative float32 sort like the float itself. Counting the upper 15 bits of every |x| tells the bucket
that holds the wanted magnitude; counting the lower 16 bits inside that bucket tells the magnitude: exact, ties and
all, with 98,304 counters per task instead of a sort of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modelmerge.method import Survey

if TYPE_CHECKING:
    from torch import Tensor

_LOW_BITS = 16
_HIGH_BUCKETS = 1 << 15
_LOW_BUCKETS = 1 << _LOW_BITS


def dropped(numel: int, density: float) -> int:
    """How many of `numel` entries lie below the threshold when the share `density` is kept (ties apart).

    The rule of the TIES and APGD code: the threshold is the (d - int(density * d))-th smallest magnitude and entries
    equal to it are kept, which makes int(density * d) + 1 of them.
    """
    return numel - int(numel * density)


def survey(density: float) -> Survey | None:
    """The survey that finds each task's threshold over all its entries [T]; none where everything is kept."""
    if density >= 1.0:
        return None
    return Survey(
        passes=(_count_high, lambda taus, totals: _count_low(taus, _bucket(totals[0], density)[0])),
        conclude=lambda totals: _thresholds(totals, density),
    )


def per_tensor(taus: Tensor, density: float) -> Tensor | None:
    """The thresholds [T] of one whole tensor [T, *shape]; None where everything is kept."""
    if density >= 1.0:
        return None
    flat = taus.flatten(1).abs()
    rank = dropped(flat.shape[1], density)
    return flat.kthvalue(max(rank, 1), dim=1).values if flat.shape[1] else flat.new_zeros(len(flat))


def trim(tau: Tensor, threshold: Tensor | None) -> Tensor:
    """`tau` with every entry whose magnitude is below `threshold` (0-d) set to zero."""
    if threshold is None:
        return tau.clone()
    # hardshrink keeps |x| > limit in one pass over memory; |x| >= t is |x| > the next float below t.
    limit = float(torch.nextafter(threshold, torch.full_like(threshold, -1.0)))
    return torch.nn.functional.hardshrink(tau, limit)


def _magnitude_bits(tau: Tensor) -> Tensor:
    return tau.view(torch.int32) & 0x7FFFFFFF


def _count_high(taus: Tensor, totals: tuple[Tensor, ...]) -> Tensor:
    high = (_magnitude_bits(tau).bitwise_right_shift_(_LOW_BITS) for tau in taus)
    return torch.stack([torch.bincount(bits, minlength=_HIGH_BUCKETS) for bits in high])


def _count_low(taus: Tensor, buckets: Tensor) -> Tensor:
    counts = []
    for tau, bucket in zip(taus, buckets.tolist(), strict=True):
        offset = _magnitude_bits(tau).sub_(bucket << _LOW_BITS)
        counts.append(torch.bincount(_inside(offset), minlength=_LOW_BUCKETS))
    return torch.stack(counts)


def _inside(offset: Tensor) -> Tensor:
    """The entries of the bucket, int32: those of lower buckets are negative, of higher ones at least _LOW_BUCKETS."""
    if offset.device.type != "cpu":
        return offset[(offset >> _LOW_BITS) == 0]
    # On a CPU numpy selects five times faster than torch; as unsigned, one comparison finds both ends.
    values = offset.numpy()
    return torch.from_numpy(values[values.view("uint32") < _LOW_BUCKETS])


def _bucket(high: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """The bucket that holds each task's threshold [T], and the threshold's rank within it, counted from 1 [T]."""
    numel = int(high[0].sum())
    rank = max(dropped(numel, density), 1)
    cumulative = high.cumsum(1)
    bucket = (cumulative < rank).sum(1)
    before = (cumulative - high).gather(1, bucket[:, None]).squeeze(1)
    return bucket, rank - before


def _thresholds(totals: tuple[Tensor, ...], density: float) -> Tensor:
    high, low = totals
    bucket, rank = _bucket(high, density)
    within = (low.cumsum(1) < rank[:, None]).sum(1)
    return ((bucket << _LOW_BITS) | within).to(torch.int32).view(torch.float32)
