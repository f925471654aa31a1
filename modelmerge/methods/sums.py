"""Sums of task vectors, whose bits do not depend on where a tensor is cut, and their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelmerge.methods.contract import Tensor


def weighted_sum(taus: Tensor, weights: Sequence[float]) -> Tensor:
    """`sum_i weights[i] * taus[i]`, [T, *shape] -> [*shape], added up in the order given.

    Product and sum are two steps: torch fuses `add(alpha=...)` into one rounding in vector lanes but not in the rest
    of a block, so that the bits would depend on where the block ends.
    """
    total = taus[0] * weights[0]
    product = torch.empty_like(total)
    for tau, weight in zip(taus[1:], weights[1:], strict=True):
        total.add_(tau if weight == 1.0 else torch.mul(tau, weight, out=product))
    return total


_RUN = 1 << 12  # so many products are added up in float32 before float64 takes over


def gram(vectors: Tensor) -> Tensor:
    """The inner products of float32 vectors [m, n]: float64 [m, m], on the host."""
    count = len(vectors)
    whole = vectors.shape[1] // _RUN * _RUN
    runs = vectors[:, :whole].view(count, -1, _RUN).transpose(0, 1)
    rest = vectors[:, whole:]
    return (torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64) + (rest @ rest.T).double()).cpu()
