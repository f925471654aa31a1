"""Take an expert's changes where they stand out from the rest of their tensor.

Arcee Fusion (mergekit), for one expert. The importance of an entry is its change times the Kullback-Leibler divergence
of its row, softmax(expert) from softmax(base), each plus 1e-8. Entries are taken whose importance is at least
`median + --fence (q3 - q1)` of all in the tensor: outliers, in the manner of Tukey. A vector is one row. With
--weight the changes are multiplied by the expert's weight.

Deviations: mergekit computes the divergence in the models' precision and, above a million entries, the quartiles of a
sample drawn anew in every run; here it is float64, and the quartiles are those of all entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods import threshold
from modelmerge.methods.contract import Context, Method, Tensor
from modelmerge.methods.options import option

_EPSILON = 1e-8
_BLOCK = 1 << 17  # elements that are in float64 at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Arcee Fusion."""

    fence: float = option(
        1.5, "So many times the distance of the quartiles above the median lies the limit.", minimum=0.0
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[1, *shape] -> [*shape]: the changes that stand out."""
    tau = taus[0]
    if tau.dim() == 0 or not tau.numel():  # a row of one entry has no divergence: all are alike
        return tau * context.weights[0]
    assert context.base is not None
    importance = _importance(tau.reshape(-1, tau.shape[-1]), context.base.reshape(-1, tau.shape[-1]))
    limit = _limit(importance, options.fence)
    return torch.ge(importance, limit, out=importance).view_as(tau).mul_(tau).mul_(context.weights[0])


def _importance(tau: Tensor, base: Tensor) -> Tensor:
    """[m, n], [m, n] -> [m, n]: changes times the divergence of their rows."""
    importance = torch.empty_like(tau)
    step = max(_BLOCK // tau.shape[1], 1)
    for first in range(0, len(tau), step):
        rows = slice(first, first + step)
        change, before = tau[rows].double(), base[rows].double()
        p, q = ((before + change).softmax(1).add_(_EPSILON), before.softmax(1).add_(_EPSILON))
        divergence = (p * (p / q).log_()).sum(1, keepdim=True).clamp_(min=0.0)
        importance[rows] = change.abs_().mul_(divergence)
    return importance


def _limit(importance: Tensor, fence: float) -> Tensor:
    """From where on an entry stands out [0-d]."""
    count = importance.numel()
    ranks = [int(share * (count - 1)) + 1 for share in (0.25, 0.5, 0.75)]
    low, median, high = threshold.smallest(importance.reshape(1, -1).clone(), *ranks)[0]
    return median + fence * (high - low)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://github.com/arcee-ai/mergekit",
    most_experts=1,
    wants_base=True,
    blockwise=lambda options: False,
    workspace=lambda options, tasks: 4.0,
)
