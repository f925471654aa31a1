"""Sums of task vectors, whose bits do not depend on where a tensor is cut, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from modelmerge.methods.contract import Tensor


def weighted_sum(taus: Tensor | Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i weights[i] * taus[i]`, [T, *shape] -> [*shape], added up in the order given.

    Product and sum are two steps: torch fuses `add(alpha=...)` into one rounding in vector lanes but not in the rest
    of a block, so that the bits would depend on where the block ends.
    """
    first = taus[0]
    total = first if weights[0] == 1.0 else first * weights[0]
    product = None
    for tau, weight in zip(taus[1:], weights[1:], strict=True):
        if weight != 1.0:
            tau = product = torch.mul(tau, weight, out=product)
        total = total + tau if total is first else total.add_(tau)
    return first.clone() if total is first else total


def combined(taus: Tensor, base: Tensor | None, coefficients: Sequence[float]) -> Tensor:
    """The task vector of `sum_i c_i p_i` of the points p_i, [T, *shape] -> [*shape].

    Coefficients beyond T come first and are of the base itself.
    """
    merged = weighted_sum(taus, coefficients[-len(taus) :])
    excess = math.fsum(coefficients) - 1.0
    # What is left of the base; not as a difference of weights, in which a small task vector would drown.
    return merged if base is None or abs(excess) < 1e-15 else merged.add_((base * excess).to(merged.dtype))


def divisor(weights: Sequence[float]) -> float:
    """What a sum by these weights is divided by to be a mean: their sum, or 1 where they cancel."""
    total = sum(weights)
    return total if abs(total) > 1e-8 else 1.0


_RUN = 1 << 12  # so many products are added up in float32 before float64 takes over


def gram(vectors: Tensor) -> Tensor:
    """The inner products of float32 vectors [m, n]: float64 [m, m], on the host."""
    count = len(vectors)
    whole = vectors.shape[1] // _RUN * _RUN
    runs = vectors[:, :whole].view(count, -1, _RUN).transpose(0, 1)
    rest = vectors[:, whole:]
    return (torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64) + (rest @ rest.T).double()).cpu()


def grams(vectors: Sequence[Tensor]) -> Tensor:
    """The inner products of each group of N tensors [G, n]: float64 [G, N, N]."""
    count, groups = len(vectors), len(vectors[0])
    products = torch.empty(groups, count, count, dtype=torch.float64, device=vectors[0].device)
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors[: i + 1]):
            products[:, i, j] = products[:, j, i] = (one * other).sum(1, dtype=torch.float64)
    return products
