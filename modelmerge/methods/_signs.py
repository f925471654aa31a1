"""Sign election: entries that disagree with the majority stay out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor


def elect(parts: Iterable[Tensor], weights: Sequence[float], like: Tensor, reduce: Literal["sum", "mean"]) -> Tensor:
    """Sum or mean of the entries that have the sign of the sum over all parts; zero where that sum is zero.

    The parts [*shape] come one by one, each with its weight in it, by which the mean is one; `like` [*shape] tells
    shape and device.
    """
    # The sums of the positive and of the negative entries are all that election and reduction need: no [T, ...] masks.
    ups, downs, part = (torch.zeros_like(like) for _ in range(3))
    up_share, down_share = torch.zeros_like(ups), torch.zeros_like(ups)
    for kept, weight in zip(parts, weights, strict=True):
        ups.add_(torch.clamp(kept, min=0.0, out=part))
        downs.add_(torch.clamp(kept, max=0.0, out=part))
        if reduce == "mean":
            # Into floats at once: adding booleans to floats takes torch several times longer.
            up_share.add_(torch.gt(kept, 0.0, out=part).mul_(weight))
            down_share.add_(torch.lt(kept, 0.0, out=part).mul_(weight))
    elected = torch.add(ups, downs, out=part).sign_()
    if reduce == "mean":
        ups.div_(up_share.masked_fill_(up_share == 0.0, 1.0))
        downs.div_(down_share.masked_fill_(down_share == 0.0, 1.0))
    # By products with 1, 0 and -1, for torch selects by mask several times slower than it multiplies.
    ups.mul_(torch.clamp(elected, min=0.0))
    downs.mul_(elected.clamp_(max=0.0))
    return ups.sub_(downs)
