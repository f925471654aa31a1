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
    return float(_norm(values))


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, ord=1, dtype=torch.float64)


def sums(taus: Tensor, kept: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The norms of each of [T, *shape], and of what `kept(i, block)` keeps of a block [n] of it: float64 [T, 2]."""
    flat = taus.reshape(len(taus), -1)
    totals = torch.zeros(len(flat), 2, dtype=torch.float64, device=flat.device)
    for block in blocks(flat):
        for i, total in enumerate(totals):
            part = flat[i, block]
            total.add_(torch.stack([_norm(part), _norm(kept(i, part))]))
    return totals


def restored(taus: Tensor, weights: Sequence[float], kept: Callable[[int, Tensor], Tensor]) -> tuple[float, ...]:
    """The weights, times what gives back to what is kept of each of [T, *shape] the norm that it had."""
    return tuple(w * ratio(*each) for w, each in zip(weights, sums(taus, kept).tolist(), strict=True))
