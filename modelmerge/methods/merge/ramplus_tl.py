"""RAM, with what one expert alone changed made larger where it shares much.

RAM+ (Yuan et al., 2026) makes up for what averaging takes from an expert: its entries that nobody else changed are
multiplied by `1 + --gain * min(shared / alone, --limit)`, of the numbers of its entries that others changed as well
and that they did not. The paper counts over the whole model; this counts in each tensor, as mergekit's ramplus_tl does.
All else is as in `ram`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods.contract import Context, Method, Tensor, summed
from modelmerge.methods.merge.ram import CITATION, PAPER, changed, combined
from modelmerge.methods.options import option
from modelmerge.methods.work import by_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of RAM+ by tensor."""

    gain: float = option(0.1, "How much larger entries of one expert become.", varies="tensor")
    limit: float = option(0.2, "The most that shared / alone counts for.", minimum=0.0, varies="tensor")
    threshold: float = option(
        1e-5, "An entry has changed where it differs by more, in units of the weights.", minimum=0.0
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the entries of one expert, made larger, and the means over several."""
    assert context.measured is not None
    shared, alone = context.measured.view(2, len(taus)).tolist()
    gains = (
        options.gain * min(both / one if one else 0.0, options.limit) for both, one in zip(shared, alone, strict=True)
    )
    larger = tuple(weight * (1.0 + gain) for weight, gain in zip(context.weights, gains, strict=True))
    return combined(taus, options.threshold, context.weights, larger).mul_(options.scale)


def _counts(taus: Tensor, threshold: float) -> Tensor:
    """Of [T, n], for each expert the entries that others changed, too, and those that it alone did: float64 [2 T]."""
    changes = torch.stack([changed(tau, threshold) for tau in taus])
    several = torch.gt(changes.sum(0), 1.0)
    both = (changes * several).sum(1, dtype=torch.float64)
    return torch.cat([both, changes.sum(1, dtype=torch.float64) - both])


METHOD = Method(
    options=Options,
    apply=apply,
    paper=PAPER,
    citation=CITATION,
    moments=lambda options, each: summed(lambda taus, base: _counts(taus, options.threshold)),
    work=by_entry(500.0),
    workspace=lambda options, tasks: tasks + 6.0,
)
