"""Keep the entries the experts differ in most, weigh experts by what is left of them, drop minority signs.

SCE: select, calculate, erase (Wan et al., FuseChat 2.0). In each tensor: keep the share `--density` of the entries
whose variance over the experts is largest; weigh each expert by the mean square of what it has there; at each entry
leave out the experts whose sign is not that of the sum; the merged entry is the weighted mean of the others, times
`--scale`. --weight multiplies an expert's weight.

Of the entries that changed at all, int(density * count) are kept, and those equal to the smallest of them. Deviations
of mergekit: it takes all experts for equal where their mean squares sum to less than 1e-6, which small task vectors do
always, and divides by at least 1e-6. The authors' code selects only for the weights and merges all entries; the paper
merges the selected ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods import _threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What SCE can be told."""

    density: float = option(
        0.1, "Share of each tensor's entries that is selected.", above=0.0, maximum=1.0, varies="tensor"
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the selected entries' weighted means over the experts that agree in sign."""
    mask = selected(taus, options.density) if options.density < 1.0 and len(taus) > 1 else None
    total = torch.zeros_like(taus[0])
    squares = []
    for tau in taus:
        kept = tau if mask is None else tau * mask
        squares.append(float(kept.double().square_().sum()))
        total.add_(kept)
    sign = total.sign_()
    if mask is not None:
        sign.mul_(mask)
    merged, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for tau, weight, square in zip(taus, context.weights, squares, strict=True):
        # The share of the largest, so that no weight underflows however small the task vectors are.
        share = weight * square / max(squares) if max(squares) else 0.0
        agrees = (tau * sign > 0).to(sign.dtype).mul_(share)
        divisor.add_(agrees)
        merged.add_(agrees.mul_(tau))
    return torch.where(divisor != 0, merged.div_(divisor), 0.0).mul_(options.scale)


def selected(taus: Tensor, density: float) -> Tensor:
    """1.0 where the variance over the experts [T, *shape] is among the largest, 0.0 elsewhere: [*shape]."""
    mean = taus.mean(0)
    variance = torch.zeros_like(mean)
    for tau in taus:
        variance.add_((tau - mean).square_())
    count = int(int(variance.count_nonzero()) * density)
    if count == 0:
        return torch.zeros_like(variance)
    limit = _threshold.smallest(variance.reshape(1, -1).clone(), variance.numel() - count + 1)[0, 0]
    return (variance >= limit).to(variance.dtype)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2408.07990",
    citation=Citation("FuseChat: Knowledge Fusion of Chat Models", "Fanqi Wan and others", "arXiv 2024"),
    blockwise=lambda options: False,
    workspace=lambda tasks: 8.0,
)
