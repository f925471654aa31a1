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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import norms, signs, threshold, trims
from modelmerge.methods.blocks import in_blocks
from modelmerge.methods.contract import Citation, Context, Method, Moments, Tensor
from modelmerge.methods.options import PUBLISHED_SCALE, follow_sum, option, scale_of, sum_scale
from modelmerge.methods.work import by_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Model Breadcrumbs."""

    density: float = option(0.15, "Share of the entries that is kept.", above=0.0, maximum=1.0, varies="expert")
    gamma: float = option(
        0.006, "Share of the largest entries that is dropped.", minimum=0.0, maximum=1.0, varies="expert"
    )
    scale: float | None = sum_scale(0.2)
    published: bool = option(False, PUBLISHED_SCALE)
    consensus: Literal["linear", "ties"] = option("linear", "Add everything up, or only what agrees in sign.")
    scope: Literal["tensor", "row"] = option("tensor", "Where the shares are counted: in each tensor, or each row.")
    reduce: Literal["sum", "mean"] = option("sum", "Add what is left up, or take its mean (with scale 1).")
    rescale: Literal["none", "norm"] = option("none", "Give each tensor its L1 norm back.")

    def __post_init__(self) -> None:
        follow_sum(self, 0.2)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the trimmed task vectors, merged and scaled."""
    if context.measured is not None:  # of the whole tensor, which may have been cut
        limits, factors = trims.ends_and_factors(context.measured, context.weights)
        return in_blocks(taus, lambda block: _merged(block[:, None], limits[:, None], factors, options, context)[0])
    rows = taus.flatten(2) if taus.ndim > 2 else taus.reshape(len(taus), 1, -1)
    each = zip(context.each("density", options.density), context.each("gamma", options.gamma), strict=True)
    ends = [
        threshold.smallest(tau.abs(), *(tau.shape[1] - place + 1 for place in places(tau.shape[1], *shares)))
        for tau, shares in zip(rows, each, strict=True)
    ]
    factors = context.weights
    if options.rescale == "norm":
        kept = [norms.norm(middle(tau, limit)) for tau, limit in zip(rows, ends, strict=True)]
        factors = tuple(w * norms.ratio(norms.norm(tau), k) for w, tau, k in zip(factors, taus, kept, strict=True))
    return _merged(rows, ends, factors, options, context).view(taus.shape[1:])


def _merged(
    taus: Tensor, limits: Sequence[Tensor] | Tensor, factors: Sequence[float], options: Options, context: Context
) -> Tensor:
    """[T, m, n] with the ends [m, 2] of each and a factor on what lies between -> [m, n]."""
    each = zip(taus, limits, factors, strict=True)
    trimmed = (signs.times(middle(tau, limit), factor) for tau, limit, factor in each)
    merged = signs.consensus(trimmed, context.weights, taus[0], options.consensus, options.reduce)
    return merged.mul_(scale_of(options, len(taus)))


def places(count: int, density: float, gamma: float) -> tuple[int, int]:
    """Of so many magnitudes, the places of the least and the largest that is kept, from the largest, which is 1."""
    kept = max(int(density * count), 1)
    outliers = min(int(gamma * count), count - kept)
    return outliers + kept, outliers + 1


def middle(rows: Tensor, limits: Tensor) -> Tensor:
    """A copy of [m, n] with what lies outside each row's limits [m, 2] set to zero."""
    if len(rows) == 1:  # what is no less than the one, without what is more than the other
        least, largest = limits[0]
        return threshold.trim(rows, least).sub_(torch.nn.functional.hardshrink(rows, float(largest)))
    # By products with 1 and 0: torch compares into booleans, and selects by them, several times slower.
    sizes = rows.abs()
    kept = torch.ge(sizes, limits[:, :1], out=torch.empty_like(rows))
    return kept.mul_(torch.le(sizes, limits[:, 1:], out=sizes)).mul_(rows)


def _moments(options: Options, each: Mapping[str, tuple[float, ...]]) -> Moments | None:
    if options.scope == "row":
        return None
    densities, gammas = each.get("density", (options.density,)), each.get("gamma", (options.gamma,))

    def of_task(task: int, count: int) -> tuple[int, int]:
        return places(count, densities[task % len(densities)], gammas[task % len(gammas)])

    return trims.of_tensor(of_task, lambda tau, ends: middle(tau[None], ends[None])[0], options.rescale)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2312.06795",
    citation=Citation(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "MohammadReza Davari and Eugene Belilovsky",
        "ECCV 2024",
    ),
    blockwise=lambda options: options.scope == "tensor",
    by_rows=lambda options: options.rescale == "none",
    moments=_moments,
    work=by_entry(280.0),
    workspace=lambda options, tasks: 4.0,
)
