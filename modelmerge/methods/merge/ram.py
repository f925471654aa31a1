"""Keep what one expert alone changed, average what several changed.

Reinforced Agent Merging (Yuan et al., 2026), for experts whose task vectors are sparse, as reinforcement learning makes
them. An expert has changed an entry where its task vector is larger than `--threshold` there. Entries that one expert
changed are taken as they are; entries that several changed are the mean over those; all others stay at the base. The
result is multiplied by `--scale`. With --weight a task vector is multiplied by its expert's weight; who changed what
follows from the task vectors as they are.

mergekit's ram has no weights and no scale. Experts that were trained in 16 bits change each entry by at least a step
of that format, or not at all: the threshold then only has to be below that step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option

CITATION = Citation("Behavior Knowledge Merge in Reinforced Agentic Models", "Xiangchi Yuan and others", "arXiv 2026")
PAPER = "https://arxiv.org/abs/2601.13572"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of RAM."""

    threshold: float = option(
        1e-5, "An entry has changed where it differs by more, in units of the weights.", minimum=0.0
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the entries of one expert, and the means over several."""
    return combined(taus, options.threshold, context.weights, context.weights).mul_(options.scale)


def combined(taus: Tensor, threshold: float, weights: tuple[float, ...], alone: tuple[float, ...]) -> Tensor:
    """[T, *shape] -> [*shape]: `weights` multiply entries that several changed, `alone` those that one did."""
    single, shared = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    count, part = torch.zeros_like(taus[0]), torch.empty_like(taus[0])
    for tau, weight, factor in zip(taus, weights, alone, strict=True):
        changes = changed(tau, threshold, out=part)
        count.add_(changes)
        changes.mul_(tau)
        shared.add_(changes, alpha=weight)
        single.add_(changes, alpha=factor)
    several = torch.gt(count, 1.0, out=part)
    shared.div_(count.clamp_(min=1.0))
    return single.add_(shared.sub_(single).mul_(several))


def changed(tau: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """1.0 where an expert has changed an entry, else 0.0: [*shape]."""
    sizes = torch.abs(tau, out=out)
    return torch.gt(sizes, threshold, out=sizes)


METHOD = Method(options=Options, apply=apply, paper=PAPER, citation=CITATION, workspace=lambda options, tasks: 6.0)
