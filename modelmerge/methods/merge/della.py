"""Drop entries at random, small ones more readily than large ones, rescale, elect signs, average what agrees.

DELLA (Deep et al., 2024). In each row of each task vector the entries are ranked by magnitude; the chance to be kept
rises evenly with the rank, from `--density - --epsilon` for the smallest to `--density + --epsilon` for the largest,
and an entry that is kept is divided by its own chance (MagPrune). What is left is merged by TIES's sign election and
the mean of what agrees (`--consensus ties`, the paper's), or by task arithmetic (`--consensus linear`), times
`--scale`. With --weight a task vector is multiplied by its expert's weight before, and the mean is one by those
weights. The defaults are those of the authors' example: drop rate 0.3, window 0.14, lambda 1.1.

Rows are those of a weight [out, in]; a vector is one row, and a convolution [out, in, h, w] has rows of in h w entries.
Equal magnitudes rank by their place. Where density +- epsilon would leave 0 to 1, epsilon is smaller; a row of one
entry has nothing to rank. Draws are those of `dare`, and a chance is a multiple of 2^-16. Deviation of mergekit: it
divides nothing, but scales what is kept of each tensor to the L1 norm it had before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods import _random, _signs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What DELLA can be told."""

    density: float = option(0.7, "Share of the entries that is kept: 1 - p.", above=0.0, maximum=1.0, varies="expert")
    epsilon: float = option(
        0.07, "How far chances reach below and above the density.", minimum=0.0, maximum=0.5, varies="expert"
    )
    scale: float = option(1.1, "Factor on the merged task vector.", varies="tensor", linear=True)
    consensus: Literal["ties", "linear"] = option("ties", "Add up only what agrees in sign, or everything.")
    reduce: Literal["mean", "sum"] = option("mean", "With --consensus ties: what becomes of the entries that agree.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the pruned and rescaled task vectors, merged and scaled."""
    each = zip(context.each("density", options.density), context.each("epsilon", options.epsilon), strict=True)

    def pruned() -> Iterator[Tensor]:
        for i, (density, epsilon) in enumerate(each):
            part = pruned_by_rank(taus[i], i, density, epsilon, context)
            yield part if context.weights[i] == 1.0 else part.mul_(context.weights[i])

    if options.consensus == "ties":
        return _signs.elect(pruned(), context.weights, taus[0], options.reduce).mul_(options.scale)
    total = torch.zeros_like(taus[0])
    for part in pruned():
        total.add_(part)
    return total.mul_(options.scale)


def pruned_by_rank(tau: Tensor, expert: int, density: float, epsilon: float, context: Context) -> Tensor:
    """MagPrune of one task vector [*shape], kept entries divided by their chance."""
    rows = tau.flatten(1) if tau.ndim > 1 else tau.reshape(1, -1)
    drawn = _random.draws(context, expert, tau.numel(), tau.device).view(rows.shape).float()
    level = chances(rows, density, epsilon)
    mask = level.gt(drawn.add_(_random.LEVELS // 2))
    kept = torch.div(rows, level.clamp_(min=1.0).mul_(1 / _random.LEVELS), out=drawn)
    return kept.mul_(mask).view_as(tau)


def chances(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """Each entry's chance to be kept, by its rank in its row, in units of 2^-16: [m, n]."""
    width = min(epsilon, density, 1.0 - density)
    last = rows.shape[1] - 1
    if last == 0:
        return torch.full_like(rows, round(density * _random.LEVELS))
    rise = 2 * width * _random.LEVELS / last
    return ranks(rows).mul_(rise).add_((density - width) * _random.LEVELS).round_()


def ranks(rows: Tensor) -> Tensor:
    """The rank of each entry by its magnitude in its row, from 0 for the smallest, as float32 [m, n]."""
    places = torch.arange(rows.shape[1], device=rows.device)
    # A magnitude's bits sort like itself; with the place below them no two are equal, and the sorted places are there.
    keys = rows.abs().view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(places)
    if rows.device.type == "cpu":
        keys.numpy().sort(axis=1)  # numpy sorts integers ten times faster than torch
    else:
        keys = keys.sort(dim=1).values
    order = keys.bitwise_and_((1 << 32) - 1)
    return torch.empty_like(rows).scatter_(1, order, places.to(rows.dtype).expand_as(rows))


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2406.11617",
    citation=Citation(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Pala Tej Deep and others",
        "arXiv 2024",
    ),
    blockwise=lambda options: False,
    by_rows=lambda options: True,
    workspace=lambda tasks: 14.0,
)
