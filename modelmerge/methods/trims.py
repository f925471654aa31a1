"""Trims of a tensor by magnitude: between which of its entries each task vector is kept, and what that loses."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from modelmerge.methods import norms
from modelmerge.methods.contract import Look, Moments, Tensor
from modelmerge.methods.selection import Places, by_place


def of_tensor(places: Places, kept: Callable[[Tensor, Tensor], Tensor], rescale: str) -> Moments:
    """The magnitudes of these places of each task vector, and a factor on what is kept: float64 [T, k + 1].

    Args:
        places: Of a task vector, by its number, with so many entries: k places, from the largest.
        kept: What is kept of entries [n] where the magnitudes [k] are its ends.
        rescale: With `norm`, the factor gives back the L1 norm.
    """

    def find(numel: int, at_once: bool) -> Generator[Look, Any, Tensor]:
        ends = yield from by_place(lambda taus: (tau.abs() for tau in taus), places, numel, at_once=at_once)
        factors = torch.ones(len(ends), 1, dtype=torch.float64, device=ends.device)
        if rescale == "norm":
            limits = ends.cpu()
            sums = yield Look(lambda taus, base: norms.sums(taus, lambda i, block: kept(block, limits[i])))
            factors = factors.new_tensor([[norms.ratio(*each)] for each in sums.tolist()])
        return torch.cat([ends.double(), factors], dim=1)

    return find


def ends_and_factors(measured: Tensor, weights: Sequence[float]) -> tuple[Tensor, tuple[float, ...]]:
    """The ends, float32 [T, k] on the host, and the weights times the factors, of what `of_tensor` has measured."""
    measured = measured.cpu()
    factors = measured[:, -1].tolist()
    return measured[:, :-1].float(), tuple(w * factor for w, factor in zip(weights, factors, strict=True))
