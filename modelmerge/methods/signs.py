"""Sign election: entries that disagree with the majority stay out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from modelmerge.methods.contract import Tensor
from modelmerge.methods.sums import divisor


def consensus(
    parts: Iterable[Tensor],
    weights: Sequence[float],
    like: Tensor,
    kind: Literal["linear", "ties"],
    reduce: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Sum or mean of all parts [*shape], or with `ties` what `elect` makes of them; each has its weight in it."""
    if kind == "ties":
        return elect(parts, weights, like, reduce)
    total = torch.zeros_like(like)
    for part in parts:
        total.add_(part)
    return total.div_(divisor(weights)) if reduce == "mean" else total


def elect(parts: Iterable[Tensor], weights: Sequence[float], like: Tensor, reduce: Literal["sum", "mean"]) -> Tensor:
    """Sum or mean of the entries that have the sign of the sum over all parts; zero where that sum is zero.

    The parts [*shape] come one by one, each with its weight in it, by which the mean is one; `like` [*shape] tells
    shape and device.
    """
    # The sums of the positive and of the negative entries are all that election and reduction need: no [T, ...] masks.
    ups, downs, part = torch.zeros_like(like), torch.zeros_like(like), torch.empty_like(like)
    mean = reduce == "mean"
    up_share, down_share = (torch.zeros_like(ups), torch.zeros_like(ups)) if mean else (ups, downs)
    for kept, weight in zip(parts, weights, strict=True):
        ups.add_(torch.clamp(kept, min=0.0, out=part))
        downs.add_(torch.clamp(kept, max=0.0, out=part))
        if mean:
            # Into floats at once: adding booleans to floats takes torch several times longer.
            up_share.add_(times(torch.gt(kept, 0.0, out=part), weight))
            down_share.add_(times(torch.lt(kept, 0.0, out=part), weight))
    # By products with 1, 0 and -1, for torch selects by mask several times slower than it multiplies.
    down = torch.add(ups, downs, out=part).sign_()
    up = torch.clamp(down, min=0.0)
    down.clamp_(max=0.0)
    elected = ups.mul_(up).sub_(downs.mul_(down))
    if not mean:
        return elected
    share = up_share.mul_(up).sub_(down_share.mul_(down))
    return elected.div_(share.add_(torch.eq(share, 0.0, out=up)))


def times(values: Tensor, weight: float) -> Tensor:
    """The values times a weight, in place; with the weight 1 as they are."""
    return values if weight == 1.0 else values.mul_(weight)
