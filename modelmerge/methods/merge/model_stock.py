"""Mean of the experts, drawn back to the base by as much as the experts disagree.

Model Stock (Jang et al., ECCV 2024): with N experts whose task vectors stand at the angle theta to one another,
`theta_0 + t * mean_i tau_i` with `t = N cos theta / (1 + (N - 1) cos theta)` is the point nearest to the centre that
the experts scatter around. It is made for experts of one task, trained from different seeds or data; experts of
different tasks are nearly orthogonal and end up close to the base.

The paper states the case of equal angles; cos theta is the mean over all pairs, as in mergekit, for each tensor
(`--scope tensor`, the paper's layers), each row, or each line along the last axis (mergekit's filter_wise), which for
kernels of convolutions is less than a row. The mean is weighted by --weight. Where cos
theta is negative, so would t be, and the paper's picture does not hold: the base is kept. An expert that did not change
a tensor has no angle there and is left out of it; a single expert stays as it is. With `--unbounded` the formula goes
on, as in mergekit: to the other side of the base, and with a cosine of zero to an expert that changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods.contract import Citation, Context, Method, Tensor, summed
from modelmerge.methods.options import option
from modelmerge.methods.sums import gram, grams, weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Model Stock."""

    scope: Literal["tensor", "row", "line"] = option(
        "tensor", "Where the angles are taken: in each tensor, each row, or each line along the last axis."
    )
    unbounded: bool = option(False, "Keep to the formula where experts disagree, or one changed nothing.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the mean, times the ratio t of each group."""
    count, by_row = len(taus), options.scope != "tensor" and taus.ndim > 2
    grouped = taus.reshape(count, 1, -1)
    if by_row:
        grouped = taus.flatten(2) if options.scope == "row" else taus.flatten(1, -2)
    products = grams([*grouped]) if context.measured is None else context.measured.view(1, count, count)
    lengths = products.diagonal(dim1=1, dim2=2).any(0).tolist()
    moved = [i for i, length in enumerate(lengths) if options.unbounded or length]
    for i in range(count):
        if i not in moved and context.start == 0:
            context.leave_out(i, "it did not change this tensor")
    total = sum(context.weights[i] for i in moved)
    if total == 0.0:
        return torch.zeros_like(taus[0])
    ratio = (formula if options.unbounded else stock_ratio)(products[:, moved][:, :, moved])
    if not by_row:
        context.tell({"ratio": float(ratio)})
    mean = weighted_sum(grouped if len(moved) == count else grouped[moved], [context.weights[i] / total for i in moved])
    return mean.mul_(ratio[:, None].to(mean)).reshape(taus.shape[1:])


def stock_ratio(products: Tensor) -> Tensor:
    """The ratio t of each group, of its inner products [G, N, N]: float64 [G]."""
    count = products.shape[1]
    if count == 1:
        return torch.ones_like(products[:, 0, 0])
    cosine = _cosine(products, 0.0).clamp(0.0, 1.0)
    return count * cosine / (1 + (count - 1) * cosine)


def formula(products: Tensor) -> Tensor:
    """The same without bounds, as mergekit has it; 0 where there is no such point."""
    count = products.shape[1]
    if count == 1:
        return torch.ones_like(products[:, 0, 0])
    cosine = _cosine(products, 1e-6)
    under = 1 + (count - 1) * cosine
    return torch.where(under.abs() < 1e-6, 0.0, count * cosine / under)


def _cosine(products: Tensor, least: float) -> Tensor:
    """The mean of the cosines of all pairs, whose lengths' product counts as `least` at least: [G]."""
    count = products.shape[1]
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    lengths = (norms[:, :, None] * norms[:, None, :]).clamp(min=least)
    cosines = torch.where(lengths > 0, products / lengths, 0.0).clamp(-1.0, 1.0)
    return cosines.tril(-1).sum((1, 2)) / (count * (count - 1) / 2)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2403.19522",
    citation=Citation(
        "Model Stock: All we need is just a few fine-tuned models", "Dong-Hwan Jang and others", "ECCV 2024"
    ),
    normalises=lambda options: True,
    blockwise=lambda options: options.scope == "tensor",
    moments=lambda options, each: (
        summed(lambda taus, base: gram(taus).flatten()) if options.scope == "tensor" else None
    ),
    workspace=lambda options, tasks: 4.0,
)
