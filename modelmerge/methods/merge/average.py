"""Mean of the experts, weighted by --weight: the plain baseline.

`theta_0 + sum_i w_i tau_i / sum_i w_i`, which is the (weighted) mean of the experts' weights. With `--reduce sum` it is
`sum_i w_i theta_i`, whatever the weights add up to, without the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option
from modelmerge.methods.sums import combined, weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the average."""

    reduce: Literal["mean", "sum"] = option("mean", "Take the experts' mean by the weights, or add them up.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the task vector of the experts' mean or sum."""
    if options.reduce == "sum":
        return combined(taus, context.base, context.weights)
    return weighted_sum(taus, context.weights).div_(sum(context.weights))


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2203.05482",
    citation=Citation(
        "Model soups: averaging weights of multiple fine-tuned models "
        "improves accuracy without increasing inference time",
        "Mitchell Wortsman and others",
        "ICML 2022",
    ),
    normalises=lambda options: options.reduce == "mean",
    linear=lambda options: options.reduce == "mean",
    wants_base=True,
    on_weights=lambda options: True,
    checked_after=True,
)
