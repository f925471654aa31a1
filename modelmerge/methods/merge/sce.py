"""Keep the entries the experts differ in most, weigh experts by what is left of them, drop minority signs.

SCE: select, calculate, erase (Wan et al., FuseChat 2.0). In each tensor: keep the share `--density` of the entries
whose variance over the experts is largest; weigh each expert by the mean square of what it has there; at each entry
leave out the experts whose sign is not that of the sum; the merged entry is the weighted mean of the others, times
`--scale`. --weight multiplies an expert's weight.

Of the entries that changed at all, int(density * count) are kept, and those equal to the smallest of them. mergekit
takes experts for equal where their mean squares add up to less than 1e-6, as those of small task vectors always do
(`--equal-below`), and divides by at least 1e-6. The authors' code selects only for the weights and merges all entries;
the paper merges the selected ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modelmerge.methods import threshold
from modelmerge.methods.blocks import blocks
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of SCE."""

    density: float = option(
        0.1, "Share of each tensor's entries that is selected.", minimum=0.0, maximum=1.0, varies="tensor"
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)
    equal_below: float = option(
        0.0, "Experts count alike in a tensor where their mean squares add up to less; in mergekit 1e-6.", minimum=0.0
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the selected entries' weighted means over the experts that agree in sign."""
    flat = taus.reshape(len(taus), -1)
    mask = selected(flat, options.density) if options.density < 1.0 and len(taus) > 1 else None
    squares = [0.0] * len(flat)
    for block in blocks(flat):
        for i, tau in enumerate(flat[:, block]):
            kept = tau.double() if mask is None else torch.mul(tau, mask[block]).double()
            squares[i] += float(torch.dot(kept, kept))
    if sum(squares) < options.equal_below * flat.shape[1]:
        squares = [1.0] * len(squares)
    # The share of the largest, so that no weight underflows however small the task vectors are.
    most = max(squares)
    shares = [w * square / most if most else 0.0 for w, square in zip(context.weights, squares, strict=True)]
    merged = torch.empty_like(flat[0])
    for block in blocks(flat):
        merged[block] = _agreeing(flat[:, block], None if mask is None else mask[block], shares)
    return merged.mul_(options.scale).view(taus.shape[1:])


def _agreeing(taus: Tensor, mask: Tensor | None, shares: Sequence[float]) -> Tensor:
    """The means [n] of the entries [T, n] that have their sum's sign, weighted by the shares, where `mask` is 1."""
    sign = weighted_sum(taus, (1.0,) * len(taus)).sign_()
    if mask is not None:
        sign.mul_(mask)
    merged, divisor, part = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for tau, share in zip(taus, shares, strict=True):
        agrees = torch.mul(tau, sign, out=part)
        agrees = torch.gt(agrees, 0.0, out=part).mul_(share)
        divisor.add_(agrees)
        merged.add_(agrees.mul_(tau))
    return merged.div_(divisor.add_(torch.eq(divisor, 0.0, out=part)))


def selected(taus: Tensor, density: float) -> Tensor:
    """1.0 where the variance over the experts [T, n] is among the largest, 0.0 elsewhere: [n]."""
    variance, changed = torch.empty_like(taus[0]), 0
    for block in blocks(taus):
        part = taus[:, block]
        mean, here = part.mean(0), variance[block].zero_()
        for tau in part:
            here.add_((tau - mean).square_())
        changed += int(here.count_nonzero())
    count = int(changed * density)
    if count == 0:
        return variance.zero_()
    limit = threshold.smallest(variance[None].clone(), variance.numel() - count + 1)[0, 0]
    return torch.ge(variance, limit, out=variance)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2408.07990",
    citation=Citation("FuseChat: Knowledge Fusion of Chat Models", "Fanqi Wan and others", "arXiv 2024"),
    blockwise=lambda options: False,
    workspace=lambda tasks: 8.0,
)
