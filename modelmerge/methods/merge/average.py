"""Mean of the experts, weighted by --weight: the plain baseline.

`theta_0 + sum_i w_i tau_i / sum_i w_i`, which is the (weighted) mean of the experts' weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The average has no options."""


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the mean of the task vectors."""
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
    normalises=True,
)
