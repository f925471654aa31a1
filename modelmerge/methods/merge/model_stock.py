"""Mean of the experts, drawn back to the base by as much as the experts disagree.

Model Stock (Jang et al., ECCV 2024): with N experts whose task vectors stand at the angle theta to one another,
`theta_0 + t * mean_i tau_i` with `t = N cos theta / (1 + (N - 1) cos theta)` is the point nearest to the centre that
the experts scatter around. It is made for experts of one task, trained from different seeds or data; experts of
different tasks are nearly orthogonal and end up close to the base.

The paper states the case of equal angles; cos theta is the mean over all pairs, as in mergekit, for each tensor
(`--scope tensor`, the paper's layers) or each row (mergekit's filter_wise). The mean is weighted by --weight. Where cos
theta is negative, so would t be, and the paper's picture does not hold: the base is kept (mergekit then steps to the
other side of it). An expert that did not change a tensor has no angle there and is left out of it; a single expert
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods._sums import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What Model Stock can be told."""

    scope: Literal["tensor", "row"] = option("tensor", "Where the angles are taken: in each tensor, or each row.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the mean, times the ratio t of each group."""
    moved = [i for i, tau in enumerate(taus) if bool(tau.any())]
    for i in range(len(taus)):
        if i not in moved:
            context.leave_out(i, "it did not change this tensor")
    weights = [context.weights[i] for i in moved]
    if sum(weights) == 0.0:
        return torch.zeros_like(taus[0])
    vectors = taus if len(moved) == len(taus) else taus[moved]
    by_row = options.scope == "row" and taus.ndim > 2
    grouped = vectors.flatten(2) if by_row else vectors.reshape(len(moved), 1, -1)
    ratio = stock_ratio(grouped).to(grouped.dtype)
    if not by_row:
        context.tell({"ratio": float(ratio)})
    mean = weighted_sum(grouped, [weight / sum(weights) for weight in weights])
    return mean.mul_(ratio[:, None]).reshape(taus.shape[1:])


def stock_ratio(taus: Tensor) -> Tensor:
    """The ratio t of each group of task vectors [N, G, n]: float64 [G]."""
    count = len(taus)
    if count == 1:
        return taus.new_ones(taus.shape[1], dtype=torch.float64)
    norms = torch.stack([torch.linalg.vector_norm(tau, dim=1, dtype=torch.float64) for tau in taus])
    cosines = torch.zeros_like(norms[0])
    for i in range(count):
        for j in range(i):
            inner = (taus[i] * taus[j]).sum(1, dtype=torch.float64)
            product = norms[i] * norms[j]
            cosines += torch.where(product > 0, inner / product, 0.0)
    cosine = (cosines / (count * (count - 1) / 2)).clamp(0.0, 1.0)
    return count * cosine / (1 + (count - 1) * cosine)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2403.19522",
    citation=Citation(
        "Model Stock: All we need is just a few fine-tuned models", "Dong-Hwan Jang and others", "ECCV 2024"
    ),
    normalises=True,
    blockwise=lambda options: False,
    workspace=lambda tasks: 4.0,
)
