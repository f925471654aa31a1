"""Weigh each entry of each task vector by how much it matters and how well it agrees, drop the lowest, then average.

PCB-Merging (Du et al., NeurIPS 2024). With T experts, and magnitudes |tau_i| cut off at their 0.01 % quantiles from
either end, over the whole model: an entry scores `exp(T m^2) tanh(tau_i sum_j tau_j)`, where m is its magnitude from 0
(the lower quantile) to 1 (the upper). Each task keeps the share `--ratio` of its highest scores, counted from 0 (the
lowest that is kept) to 1 (the highest); the merged entry is the mean of the cut-off task vectors weighted by these,
times `--scale`. --weight multiplies a task vector in that mean, not its score.

This is what the authors' code does. Their paper instead normalises by a softmax over the parameters, and sums the
agreement over the tasks after it. An expert whose magnitudes or scores are all alike has no say.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from modelmerge.methods import order, signs, threshold
from modelmerge.methods.blocks import in_blocks
from modelmerge.methods.contract import Citation, Context, Method, Pass, Survey, Tensor
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum
from modelmerge.methods.work import by_entry

_TAIL = 1e-4  # the share of the magnitudes that is cut off at either end
# Elements of the widest vector registers, and more: exp and tanh of a whole register and of single numbers differ in
# the last bit, and where a block ends must not matter.
_LANES = 64
ITSELF = 2.0**-12  # below that the float32 next to tanh x is x

Ends = tuple[float, float, float]  # of a range, and its length in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of PCB-Merging."""

    ratio: float = option(0.2, "Share of each task vector's entries that is kept.", above=0.0, maximum=1.0)
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the mean of the task vectors, weighted by the scores that are kept."""
    assert context.measured is not None
    measured = context.measured.cpu()
    limits, ends = ends_of(measured[:, :2]), ends_of(measured[:, 2:])
    return in_blocks(taus, lambda block: _merged(block, limits, ends, context.weights).mul_(options.scale))


def _merged(taus: Tensor, limits: Sequence[Ends], ends: Sequence[Ends], weights: Sequence[float]) -> Tensor:
    merged, divisor, sign = torch.zeros_like(taus[0]), torch.zeros_like(taus[0]), torch.empty_like(taus[0])
    for i, (score, (low, high, _)) in enumerate(zip(scores(taus, limits), limits, strict=True)):
        share = _share(score, *ends[i])
        divisor.add_(share)
        cut = taus[i].abs().clamp_(low, high).mul_(torch.sign(taus[i], out=sign))
        merged.add_(share.mul_(signs.times(cut, weights[i])))
    return merged.div_(divisor.clamp_(min=1e-12))


def ends_of(pairs: Tensor) -> list[Ends]:
    """Two ends of each task [T, 2], and from one to the other: on the host at once, not where each is used."""
    return [(low, high, reach) for low, high, reach in torch.cat([pairs, pairs.diff(dim=1)], dim=1).tolist()]


def scores(taus: Tensor, limits: Sequence[Ends]) -> Iterator[Tensor]:
    """Each task's scores [n], from task vectors [T, n] and the ends of their magnitudes."""
    count = taus.shape[1]
    padded = torch.nn.functional.pad(taus, (0, -count % _LANES)) if count % _LANES else taus
    total, part = weighted_sum(padded, (1.0,) * len(padded)), None
    for tau, ends in zip(padded, limits, strict=True):
        part = torch.abs(tau, out=part)
        matters = _share(part, *ends).square_().mul_(len(taus)).exp_()
        score = tau * total
        # Task vectors are small, and on a CPU tanh takes longer than all else.
        least, most = torch.aminmax(score)
        if score.device.type != "cpu" or max(-float(least), float(most)) >= ITSELF:
            score.tanh_()
        yield score.mul_(matters)[:count]


def _share(values: Tensor, low: float, high: float, reach: float) -> Tensor:
    """Where each value [n] lies between two ends, from 0 to 1; 0 where the ends are one; in place.

    `reach` is from one to the other, in float32.
    """
    return values.clamp_(low, high).sub_(low).div_(reach or torch.inf)


def _survey(options: Options, each: Mapping[str, tuple[float, ...]]) -> Survey:
    def find(numel: int) -> Generator[Pass, Tensor, Tensor]:
        large = numel if numel >= threshold.SAMPLED else None
        tails = (int(numel * _TAIL) + 1, max(int(numel * (1 - _TAIL) - 1), 0) + 1)
        limits = yield from order.by_rank(lambda taus: (tau.abs() for tau in taus), tails, large)
        kept = (min(int(numel * (1 - options.ratio)) + 1, numel), numel)
        inside = ends_of(limits)
        ends = yield from order.by_rank(lambda taus: scores(taus, inside), kept, large)
        return torch.cat([limits, ends], dim=1)

    return Survey(find=find, reads=lambda numel: 4.0 if numel < threshold.SAMPLED else 4.0 + 2.0 / threshold.SHARE)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2410.02396",
    citation=Citation("Parameter Competition Balancing for Model Merging", "Guodong Du and others", "NeurIPS 2024"),
    survey=_survey,
    work=by_entry(650.0),
    workspace=lambda options, tasks: 8.0 * tasks + 8.0,
)
