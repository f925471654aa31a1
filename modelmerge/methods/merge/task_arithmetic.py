"""Sum of the task vectors, times one scale.

`theta_0 + scale * sum_i w_i tau_i` (Ilharco et al., ICLR 2023). `--published`: the scale is 0.3, which the paper
found for eight vision tasks; for fewer it is too small. With `--reduce mean` the sum is divided by `sum_i w_i`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import PUBLISHED_SCALE, follow_sum, option, scale_of, sum_scale
from modelmerge.methods.sums import divisor, weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of task arithmetic."""

    scale: float | None = sum_scale(0.3, overlapping=True)
    published: bool = option(False, PUBLISHED_SCALE)
    reduce: Literal["sum", "mean"] = option("sum", "Add the task vectors up, or take their mean (with scale 1).")

    def __post_init__(self) -> None:
        follow_sum(self, 0.3)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the scaled sum or mean of the task vectors."""
    total = weighted_sum(taus, context.weights)
    if options.reduce == "mean":
        total.div_(divisor(context.weights))
    return total.mul_(scale_of(options, len(taus)))


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2212.04089",
    citation=Citation("Editing Models with Task Arithmetic", "Gabriel Ilharco and others", "ICLR 2023"),
    linear=lambda options: True,
    checked_after=True,
)
