"""Trim small entries, elect each entry's sign, add up the task vectors that agree with it.

TIES-Merging (Yadav et al., NeurIPS 2023). Each task vector keeps its largest entries (share `--density` of the whole
task vector, or of each tensor); an entry's elected sign is that of the sum over the experts; the merged entry is the
sum (or mean) of the trimmed entries that have that sign, times `--scale`. With --weight a trimmed task vector is
multiplied by its expert's weight before the election.

Deviation: where the sum is exactly zero the paper's sgn(0) = 0 elects no sign and the entry stays at the base; the
authors' code gives such entries the sign that won most elections in the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Context, Method, option
from modelmerge.methods import _threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What TIES can be told."""

    density: float = option(0.2, "Share of the entries that is kept.", above=0.0, maximum=1.0)
    scale: float = option(0.3, "Factor on the merged task vector.")
    reduce: Literal["sum", "mean"] = option("sum", "What becomes of the entries that agree in sign.")
    trim_scope: Literal["model", "tensor"] = option(
        "model", "Where the share is counted: over the whole task vector, or in each tensor."
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the trimmed entries that agree with the elected sign, reduced and scaled."""
    thresholds = context.measured
    if options.trim_scope == "tensor":
        thresholds = _threshold.per_tensor(taus, options.density)
    # The sums of the positive and of the negative entries are all that election and reduction need: no [T, ...] masks.
    ups, downs, part = (torch.zeros_like(taus[0]) for _ in range(3))
    up_count, down_count = torch.zeros_like(ups), torch.zeros_like(ups)
    for i, weight in enumerate(context.weights):
        kept = _threshold.trim(taus[i], None if thresholds is None else thresholds[i])
        if weight != 1.0:
            kept.mul_(weight)
        ups.add_(torch.clamp(kept, min=0.0, out=part))
        downs.add_(torch.clamp(kept, max=0.0, out=part))
        if options.reduce == "mean":
            up_count.add_(kept > 0)
            down_count.add_(kept < 0)
    elected = torch.add(ups, downs, out=part).sign_()
    if options.reduce == "mean":
        ups.div_(up_count.clamp_(min=1.0))
        downs.div_(down_count.clamp_(min=1.0))
    # By products with 1, 0 and -1, for torch selects by mask several times slower than it multiplies.
    ups.mul_(torch.clamp(elected, min=0.0))
    downs.mul_(elected.clamp_(max=0.0))
    return ups.sub_(downs).mul_(options.scale)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2306.01708",
    blockwise=lambda options: options.trim_scope == "model",
    survey=lambda options: _threshold.survey(options.density) if options.trim_scope == "model" else None,
    workspace=lambda tasks: 8.0,
)
