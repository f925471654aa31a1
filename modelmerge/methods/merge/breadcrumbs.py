"""Trim both ends of each task vector, the small entries and the outliers, then add up.

Model Breadcrumbs (Davari and Belilovsky, ECCV 2024). Of each tensor of each task vector (`--scope tensor`, the paper's
layers) or each row (as in the authors' code), the largest `--gamma` of the entries are taken for outliers and set to
zero, the next `--density` are kept, and the rest is set to zero too. What is left is merged by task arithmetic
(`--consensus linear`, the paper's), or by TIES's sign election (`--consensus ties`), which takes the sum of what
agrees. With --weight a task vector is multiplied by its expert's weight before. The defaults are the point that the
authors' search starts from.

Of n entries int(density n), and at least one, are kept below the int(gamma n) outliers, of which there are fewer where
both do not fit; entries that equal the smallest or the largest that is kept are kept too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods import _signs, _threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What Model Breadcrumbs can be told."""

    density: float = option(0.15, "Share of the entries that is kept.", above=0.0, maximum=1.0, varies="expert")
    gamma: float = option(
        0.006, "Share of the largest entries that is dropped.", minimum=0.0, maximum=1.0, varies="expert"
    )
    scale: float = option(0.2, "Factor on the merged task vector.", varies="tensor")
    consensus: Literal["linear", "ties"] = option("linear", "Add everything up, or only what agrees in sign.")
    scope: Literal["tensor", "row"] = option("tensor", "Where the shares are counted: in each tensor, or each row.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the trimmed task vectors, merged and scaled."""
    densities, gammas = context.each("density", options.density), context.each("gamma", options.gamma)

    def trimmed() -> Iterator[Tensor]:
        for tau, weight, density, gamma in zip(taus, context.weights, densities, gammas, strict=True):
            rows = tau.flatten(1) if options.scope == "row" and tau.ndim > 1 else tau.reshape(1, -1)
            kept = middle(rows, density, gamma).view_as(tau)
            yield kept if weight == 1.0 else kept.mul_(weight)

    if options.consensus == "ties":
        return _signs.elect(trimmed(), context.weights, taus[0], "sum").mul_(options.scale)
    parts = trimmed()
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total.mul_(options.scale)


def middle(rows: Tensor, density: float, gamma: float) -> Tensor:
    """A copy of [m, n] with the outliers and the small entries of each row set to zero."""
    count = rows.shape[1]
    kept = max(int(density * count), 1)
    top = count - min(int(gamma * count), count - kept)
    sizes = rows.abs()
    limits = _threshold.smallest(sizes, top - kept + 1, top)
    return rows * (sizes >= limits[:, :1]).logical_and_(sizes <= limits[:, 1:])


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
    workspace=lambda tasks: 8.0,
)
