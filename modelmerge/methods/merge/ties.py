"""Trim small entries, elect each entry's sign, add up what agrees with it.

TIES-Merging (Yadav et al., NeurIPS 2023). Each task vector keeps its largest entries (share `--density` of the whole
task vector, or of each tensor); an entry's elected sign is that of the sum over the experts; the merged entry is the
sum (or mean) of the trimmed entries that have that sign, times `--scale`. With --weight a trimmed task vector is
multiplied by its expert's weight before the election, and the mean is one by those weights. With
`--trim-scope tensor --reduce mean --scale 1` this is mergekit's. `--rescale norm` multiplies what is left of each
tensor of a task vector by what gives it the L1 norm that it had.

Deviation: where the sum is exactly zero the paper's sgn(0) = 0 elects no sign and the entry stays at the base; the
authors' code gives such entries the sign that won most elections in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelmerge.methods import norms, signs, threshold, trims
from modelmerge.methods.blocks import in_blocks
from modelmerge.methods.contract import Citation, Context, Method, Moments, Tensor
from modelmerge.methods.options import PUBLISHED_SCALE, follow_sum, option, scale_of, sum_scale
from modelmerge.methods.work import by_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of TIES."""

    density: float = option(0.2, "Share of the entries that is kept.", above=0.0, maximum=1.0, varies="expert")
    scale: float | None = sum_scale(0.3, overlapping=True)
    published: bool = option(False, PUBLISHED_SCALE)
    reduce: Literal["sum", "mean"] = option("sum", "Sum, or mean with scale 1, of entries that agree in sign.")
    trim_scope: Literal["model", "tensor"] = option(
        "model", "Where the share is counted: over the whole task vector, or in each tensor."
    )
    rescale: Literal["none", "norm"] = option("none", "Give each tensor its L1 norm back.")

    def __post_init__(self) -> None:
        follow_sum(self, 0.3)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the trimmed entries that agree with the elected sign, reduced and scaled."""
    # On the host once, not one by one where each is needed.
    thresholds, factors = context.measured if context.measured is None else context.measured.cpu(), context.weights
    if thresholds is not None and options.trim_scope == "tensor":
        ends, factors = trims.ends_and_factors(thresholds, factors)
        thresholds = ends[:, 0]
    elif thresholds is not None and options.rescale == "norm":
        factors = norms.restored(taus, factors, lambda i, block: threshold.trim(block, thresholds[i]))
    return in_blocks(taus, lambda block: _merged(block, thresholds, factors, options, context))


def _merged(
    taus: Tensor, thresholds: Tensor | None, factors: Sequence[float], options: Options, context: Context
) -> Tensor:
    trimmed = (
        signs.times(threshold.trim(taus[i], None if thresholds is None else thresholds[i]), factor)
        for i, factor in enumerate(factors)
    )
    return signs.elect(trimmed, context.weights, taus[0], options.reduce).mul_(scale_of(options, len(taus)))


def _moments(options: Options, each: Mapping[str, tuple[float, ...]]) -> Moments | None:
    """In a tensor int(density * n) entries are kept, and at least one (ties apart), as all do who trim by tensor."""
    densities = each.get("density", (options.density,))
    if options.trim_scope == "model" or min(densities) >= 1.0:
        return None

    def places(task: int, count: int) -> tuple[int]:
        return (max(int(count * densities[task % len(densities)]), 1),)

    return trims.of_tensor(places, lambda tau, ends: threshold.trim(tau, ends[0]), options.rescale)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2306.01708",
    citation=Citation(
        "TIES-Merging: Resolving Interference When Merging Models", "Prateek Yadav and others", "NeurIPS 2023"
    ),
    blockwise=lambda options: options.trim_scope == "tensor" or options.rescale == "none",
    survey=lambda options, each: (
        threshold.survey(each.get("density", options.density)) if options.trim_scope == "model" else None
    ),
    moments=_moments,
    work=by_entry(120.0),
    workspace=lambda options, tasks: 8.0,
)
