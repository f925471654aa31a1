"""The L1 norm that a task vector loses where entries of it are dropped, given back by one factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from modelmerge.methods.blocks import blocks
from modelmerge.methods.contract import Tensor

_NOTHING = 1e-7  # norms below that are left as they are, as mergekit does


def ratio(before: float, after: float) -> float:
    """The factor that brings one L1 norm to another."""
    return before / after if min(before, after) >= _NOTHING else 1.0


def norm(values: Tensor) -> float:
    """The L1 norm."""
    return float(torch.linalg.vector_norm(values, ord=1, dtype=torch.float64))


def restored(taus: Tensor, weights: Sequence[float], kept: Callable[[int, Tensor], Tensor]) -> tuple[float, ...]:
    """The weights, times what gives back to what is kept of each of [T, *shape] the norm that it had.

    `kept(i, block)` is what is kept of a block [n] of the i-th.
    """
    flat = taus.reshape(len(taus), -1)
    factors = []
    for i, weight in enumerate(weights):
        before = after = 0.0
        for block in blocks(flat):
            before, after = before + norm(flat[i, block]), after + norm(kept(i, flat[i, block]))
        factors.append(weight * ratio(before, after))
    return tuple(factors)
