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

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelmerge.methods import selection, threshold
from modelmerge.methods.blocks import MANY_STEPS, blocks, in_blocks
from modelmerge.methods.contract import Citation, Context, Look, Method, Moments, Tensor
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum
from modelmerge.methods.work import by_entry


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
    assert context.measured is not None
    limit, *squares = context.measured[: 1 + len(taus)].tolist()
    places = context.measured[1 + len(taus) :]
    # The share of the largest, so that no weight underflows however small the task vectors are.
    most = max(squares)
    shares = [w * square / most if most else 0.0 for w, square in zip(context.weights, squares, strict=True)]
    if limit < 0:
        return in_blocks(taus, lambda block: _agreeing(block, shares)).mul_(options.scale)
    flat = taus.reshape(len(taus), -1)
    merged = torch.zeros_like(flat[0])
    # Few are selected, as a rule: what is done with these alone costs less than a product of all with 1 and 0.
    for block in blocks(flat, MANY_STEPS):
        part = flat[:, block]
        if len(places):
            start = context.start + block.start
            first, stop = torch.searchsorted(places, places.new_tensor([start, start + part.shape[1]])).tolist()
            selected = places[first:stop].sub(start).long().to(taus.device)
        else:
            selected = threshold.from_least(variance(part), limit)
        agreeing = _agreeing([tau.index_select(0, selected) for tau in part], shares)
        merged[block].index_copy_(0, selected, agreeing.mul_(options.scale))
    return merged.view(taus.shape[1:])


def _agreeing(taus: Tensor | Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The means [n] of the entries [T, n] that have their sum's sign, weighted by the shares."""
    sign = weighted_sum(taus, (1.0,) * len(taus)).sign_()
    merged, divisor, part = torch.zeros_like(sign), torch.zeros_like(sign), torch.empty_like(sign)
    for tau, share in zip(taus, shares, strict=True):
        agrees = torch.mul(tau, sign, out=part)
        agrees = torch.gt(agrees, 0.0, out=part).mul_(share)
        divisor.add_(agrees)
        merged.add_(agrees.mul_(tau))
    return merged.div_(divisor.add_(torch.eq(divisor, 0.0, out=part)))


def variance(taus: Tensor) -> Tensor:
    """Over the experts, times their number, [T, n] -> [n]; that of a single one, of which all is selected, is 1."""
    if len(taus) == 1:
        return torch.ones_like(taus[0])
    mean, part = weighted_sum(taus, (1.0,) * len(taus)).div_(len(taus)), torch.empty_like(taus[0])
    squares = torch.sub(taus[0], mean)
    squares.mul_(squares)
    for tau in taus[1:]:
        squares.add_(torch.sub(tau, mean, out=part).mul_(part))
    return squares


def _moments(options: Options, each: Mapping[str, tuple[float, ...]]) -> Moments:
    """Measures the least variance that is selected, -1 for all, the experts' sums of squares there, and where it is.

    That is [1 + T + k] with the places of k entries in their order; with none if they may be many.
    """

    def find(numel: int, at_once: bool) -> Generator[Look, Any, Tensor]:
        if options.density < 1.0:
            measured, squares = yield from selection.largest(variance, options.density, numel, at_once=at_once)
        else:
            squares = yield Look(lambda taus, base: selection.squares(taus))
            measured = torch.cat([squares.new_tensor([-1.0]), squares])
            squares = measured[1:]
        if float(squares.sum()) < options.equal_below * numel:
            squares.fill_(1.0)
        return measured

    return find


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2408.07990",
    citation=Citation("FuseChat: Knowledge Fusion of Chat Models", "Fanqi Wan and others", "arXiv 2024"),
    moments=_moments,
    work=by_entry(160.0),
    workspace=lambda options, tasks: 8.0,
)
