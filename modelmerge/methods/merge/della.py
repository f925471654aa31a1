"""Drop entries at random, small ones more readily than large ones, rescale, elect signs, average what agrees.

DELLA (Deep et al., 2024). In each row of each task vector the entries are ranked by magnitude; the chance to be kept
rises evenly with the rank, from `--density - --epsilon` for the smallest to `--density + --epsilon` for the largest,
and an entry that is kept is divided by its own chance (MagPrune). What is left is merged by TIES's sign election and
the mean of what agrees (`--consensus ties`, the paper's), or by task arithmetic (`--consensus linear`), times
`--scale`. With --weight a task vector is multiplied by its expert's weight before, and a mean is one by those weights.
The defaults are those of the authors' example: drop rate 0.3, window 0.14, lambda 1.1.

Rows are those of a weight [out, in]; a vector is one row, and a convolution [out, in, h, w] has rows of in h w entries.
Equal magnitudes rank by their place. Where density +- epsilon would leave 0 to 1, epsilon is smaller; a row of one
entry has nothing to rank. Draws are those of `dare`, and a chance is a multiple of 2^-16. mergekit divides nothing, but
scales what is kept of each tensor to the L1 norm it had before (`--rescale norm`), which favours large entries.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import norms, random, signs
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import follow, option
from modelmerge.methods.work import by_entry

_SPARE = 29  # lowest bits of a float64, which are zero where it was a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of DELLA."""

    density: float = option(0.7, "Share of the entries that is kept: 1 - p.", above=0.0, maximum=1.0, varies="expert")
    epsilon: float = option(
        0.07, "How far chances reach below and above the density.", minimum=0.0, maximum=0.5, varies="expert"
    )
    scale: float = option(1.1, "Factor on the merged task vector.", varies="tensor", linear=True)
    consensus: Literal["ties", "linear"] = option("ties", "Add up only what agrees in sign, or everything.")
    reduce: Literal["sum", "mean"] | None = option(
        None, "Take the mean of what is left by the weights, or add it up. Default: mean; sum with consensus linear."
    )
    rescale: Literal["chance", "norm", "none"] = option(
        "chance", "Make up for what is dropped: by each entry's chance to be kept, by each tensor's L1 norm, or not."
    )

    def __post_init__(self) -> None:
        follow(self, reduce="mean" if self.consensus == "ties" else "sum")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the pruned and rescaled task vectors, merged and scaled."""
    each = zip(context.each("density", options.density), context.each("epsilon", options.epsilon), strict=True)
    pruned = (
        signs.times(pruned_by_rank(taus[i], i, density, epsilon, context, options.rescale), context.weights[i])
        for i, (density, epsilon) in enumerate(each)
    )
    assert options.reduce is not None, "it follows from the consensus"
    merged = signs.consensus(pruned, context.weights, taus[0], options.consensus, options.reduce)
    return merged.mul_(options.scale * (random.LEVELS if options.rescale == "chance" else 1.0))


def pruned_by_rank(
    tau: Tensor, expert: int, density: float, epsilon: float, context: Context, rescale: str = "chance"
) -> Tensor:
    """MagPrune of one task vector [*shape], kept entries divided by their chance in units of 2^-16, or by nothing."""
    rows = tau.flatten(1) if tau.ndim > 1 else tau.reshape(1, -1)
    level = by_rank(rows, chances(rows.shape[1], density, epsilon).to(tau.device))
    drawn = random.uniform(context, expert, torch.empty_like(rows))
    mask = torch.gt(level, drawn, out=drawn)
    if rescale == "chance":
        return torch.div(rows, level, out=level).mul_(mask).view_as(tau)
    kept = mask.mul_(rows)
    return (kept if rescale == "none" else kept.mul_(norms.ratio(norms.norm(rows), norms.norm(kept)))).view_as(tau)


@functools.lru_cache(maxsize=4)  # what all rows of a tensor need
def chances(count: int, density: float, epsilon: float) -> Tensor:
    """The chance of each rank in a row of so many to be kept, in units of 2^-16, -1 for none: [count]."""
    width = min(epsilon, density, 1.0 - density) if count > 1 else 0.0
    rise = 2 * width * random.LEVELS / max(count - 1, 1)
    level = torch.arange(count, dtype=torch.float32).mul_(rise).add_((density - width) * random.LEVELS).round_()
    return torch.where(level > 0, level, -1.0)  # what is never kept is divided, too


def by_rank(rows: Tensor, values: Tensor) -> Tensor:
    """For each entry of rows [m, n] the value [n] of its magnitude's rank in its row, the smallest first: [m, n]."""
    count = rows.shape[1]
    assert count <= 1 << _SPARE, "a row's places have to fit"
    # A magnitude's bits sort like itself; with the place below them no two are equal, and the sorted places are there.
    keys = rows.double().abs_().view(torch.int64).bitwise_or_(torch.arange(count, device=rows.device))
    if rows.device.type == "cpu":
        keys.numpy().sort(axis=1)  # numpy sorts integers ten times faster than torch
    else:
        keys = keys.sort(dim=1).values
    return torch.empty_like(rows).scatter_(1, keys.bitwise_and_((1 << _SPARE) - 1), values.expand_as(rows))


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
    by_rows=lambda options: options.rescale != "norm",
    work=by_entry(300.0),
    workspace=lambda options, tasks: 32.0,  # as measured: the keys that are sorted leave gaps in the heap
)
