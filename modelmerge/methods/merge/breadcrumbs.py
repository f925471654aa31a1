"""Trim both ends of each task vector, small entries and outliers, then add up.

Model Breadcrumbs (Davari and Belilovsky, ECCV 2024). Of each tensor of each task vector (`--scope tensor`, the paper's
layers) or each row (as in the authors' code), the largest `--gamma` of the entries are taken for outliers and set to
zero, the next `--density` are kept, and the rest is set to zero too. What is left is merged by task arithmetic
(`--consensus linear`, the paper's), or by TIES's sign election (`--consensus ties`), which takes the sum or mean of
what agrees. With --weight a task vector is multiplied by its expert's weight before, and the mean is one by those
weights. `--rescale norm` multiplies what is left of each tensor of a task vector by what gives it the L1 norm that it
had. The defaults are the point that the authors' search starts from.

Of n entries int(density n), and at least one, are kept below the int(gamma n) outliers, of which there are fewer where
both do not fit; entries that equal the smallest or the largest that is kept are kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import norms, signs, threshold
from modelmerge.methods.blocks import in_blocks
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Model Breadcrumbs."""

    density: float = option(0.15, "Share of the entries that is kept.", above=0.0, maximum=1.0, varies="expert")
    gamma: float = option(
        0.006, "Share of the largest entries that is dropped.", minimum=0.0, maximum=1.0, varies="expert"
    )
    scale: float = option(0.2, "Factor on the merged task vector.", varies="tensor", linear=True)
    consensus: Literal["linear", "ties"] = option("linear", "Add everything up, or only what agrees in sign.")
    scope: Literal["tensor", "row"] = option("tensor", "Where the shares are counted: in each tensor, or each row.")
    reduce: Literal["sum", "mean"] = option("sum", "Add what is left up, or take its mean by the weights.")
    rescale: Literal["none", "norm"] = option("none", "Give each tensor its L1 norm back.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the trimmed task vectors, merged and scaled."""
    each = zip(context.each("density", options.density), context.each("gamma", options.gamma), strict=True)
    if options.scope == "row" and taus.ndim > 2:
        rows = taus.flatten(2)
        limits = [ends(tau.abs(), *shares) for tau, shares in zip(rows, each, strict=True)]
        factors = context.weights
        if options.rescale == "norm":
            kept = [norms.norm(middle(tau, limit)) for tau, limit in zip(rows, limits, strict=True)]
            factors = tuple(w * norms.ratio(norms.norm(tau), k) for w, tau, k in zip(factors, taus, kept, strict=True))
        return _merged(rows, limits, factors, options, context).view(taus.shape[1:])
    sizes = torch.empty_like(taus[0]).view(1, -1)
    limits = [ends(torch.abs(tau.reshape(1, -1), out=sizes), *shares) for tau, shares in zip(taus, each, strict=True)]
    factors = context.weights
    if options.rescale == "norm":
        factors = norms.restored(taus, factors, lambda i, block: middle(block[None], limits[i]))
    return in_blocks(taus, lambda block: _merged(block[:, None], limits, factors, options, context)[0])


def _merged(
    taus: Tensor, limits: Sequence[Tensor], factors: Sequence[float], options: Options, context: Context
) -> Tensor:
    """[T, m, n] with the ends [m, 2] of each and a factor on what lies between -> [m, n]."""
    each = zip(taus, limits, factors, strict=True)
    trimmed = (signs.times(middle(tau, limit), factor) for tau, limit, factor in each)
    merged = signs.consensus(trimmed, context.weights, taus[0], options.consensus, options.reduce)
    return merged.mul_(options.scale)


def ends(sizes: Tensor, density: float, gamma: float) -> Tensor:
    """The least and the largest magnitude that is kept of each row of magnitudes [m, n], which lose their order."""
    count = sizes.shape[1]
    kept = max(int(density * count), 1)
    top = count - min(int(gamma * count), count - kept)
    return threshold.smallest(sizes, top - kept + 1, top)


def middle(rows: Tensor, limits: Tensor) -> Tensor:
    """A copy of [m, n] with what lies outside each row's limits [m, 2] set to zero."""
    # By products with 1 and 0: torch compares into booleans, and selects by them, several times slower.
    sizes = rows.abs()
    kept = torch.ge(sizes, limits[:, :1], out=torch.empty_like(rows))
    return kept.mul_(torch.le(sizes, limits[:, 1:], out=sizes)).mul_(rows)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2312.06795",
    citation=Citation(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "MohammadReza Davari and Eugene Belilovsky",
        "ECCV 2024",
    ),
    blockwise=lambda options: False,
    by_rows=lambda options: options.scope == "row" and options.rescale == "none",
    workspace=lambda tasks: 3.0,
)
