"""Sum of the task vectors, where enough tasks want the same entries: TALL masks.

Consensus merging (Wang et al., ICML 2024). With the multi-task vector `tau_m = sum_i tau_i`, task i wants the entries
where `|tau_i| > --tall-lambda * |tau_m - tau_i|`: its TALL mask. Entries that fewer than `--min-tasks` tasks want stay
at the base (wanted by none: catastrophic; by one: selfish); the others are those of `tau_m`, times `--scale`. With
--weight a task vector is multiplied by its expert's weight first.

The authors choose lambda for each task on validation data, from 0.2 to 0.6; here it is one for all. The comparison is
strict, as in their code; the paper's is not. A single expert has only itself to agree with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import PUBLISHED_SCALE, follow_sum, option, scale_of, sum_scale
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of consensus merging."""

    tall_lambda: float = option(
        0.4, "How far an entry must stand out from the other tasks' to be wanted.", minimum=0.0, varies="tensor"
    )
    min_tasks: int = option(2, "Entries are kept that so many tasks want.", minimum=0)
    scale: float | None = sum_scale(0.3)
    published: bool = option(False, PUBLISHED_SCALE)

    def __post_init__(self) -> None:
        follow_sum(self, 0.3)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the scaled sum, where the consensus holds."""
    total = weighted_sum(taus, context.weights)
    votes, part = torch.zeros_like(total), torch.empty_like(total)
    for tau, weight in zip(taus, context.weights, strict=True):
        votes.add_(tall_mask(tau if weight == 1.0 else torch.mul(tau, weight, out=part), total, options.tall_lambda))
    mask = torch.ge(votes, min(options.min_tasks, len(taus)), out=votes)
    return total.mul_(mask).mul_(scale_of(options, len(taus)))


def tall_mask(tau: Tensor, total: Tensor, tall_lambda: float) -> Tensor:
    """1.0 for the entries of the multi-task vector `total` that the task of `tau` wants, else 0.0: [*shape]."""
    others = torch.sub(total, tau).abs_().mul_(tall_lambda)
    # Into floats at once: torch makes booleans several times slower.
    return torch.gt(tau.abs(), others, out=others)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2405.07813",
    citation=Citation(
        "Localizing Task Information for Improved Model Merging and Compression", "Ke Wang and others", "ICML 2024"
    ),
    workspace=lambda options, tasks: 7.0,
)
