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

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelmerge.methods import order, threshold
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

Ends = tuple[float, float, float]  # of a range, and one over its length; 0 where they are one


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
    merged, divisor = taus.new_zeros(2, -(-taus.shape[1] // _LANES) * _LANES)
    scored = _scored(taus, limits, [least for least, _, _ in ends])
    for weight, (least, _, factor), (score, cut) in zip(weights, ends, scored, strict=True):
        share = score.sub_(least).relu_()
        divisor.add_(share, alpha=factor)
        merged.addcmul_(share, cut, value=factor * weight)
    return merged.div_(divisor.clamp_(min=1e-12))[: taus.shape[1]]


def ends_of(pairs: Tensor) -> list[Ends]:
    """Two ends of each task [T, 2], and their `Ends`: on the host at once, not where each is used."""
    each = torch.cat([pairs, pairs.diff(dim=1)], dim=1).tolist()
    # Nothing made of float32 numbers shall overflow.
    return [(low, high, 1 / max(reach, 2.0**-100) if reach else 0.0) for low, high, reach in each]


def scores(taus: Tensor, limits: Sequence[Ends]) -> Iterator[Tensor]:
    """Each task's scores [n], from task vectors [T, n] and the ends of their magnitudes."""
    return (score[: taus.shape[1]] for score, _ in _scored(taus, limits, [torch.inf] * len(taus)))


def _scored(taus: Tensor, limits: Sequence[Ends], least: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each task's scores, and its entries, cut off where the score is above the least; both [n] and some more.

    What is cut off lies in memory that the next ones take.
    """
    padded = torch.nn.functional.pad(taus, (0, -taus.shape[1] % _LANES)) if taus.shape[1] % _LANES else taus
    total = weighted_sum(padded, (1.0,) * len(padded))
    most, largest, cut = _most(total), _most(padded), torch.empty_like(total)
    for tau, (low, high, factor), bound in zip(padded, limits, least, strict=True):
        torch.clamp(tau, -high, high, out=cut)
        root = math.sqrt(len(taus) / math.log(2)) * factor
        matters = torch.nn.functional.softshrink(cut, low).mul_(root) if low else cut * root
        matters.square_().exp2_()  # on a CPU in a quarter of the time of powers of e
        score = tau * total
        # Task vectors are small, and on a CPU tanh takes longer than all else.
        if most * largest >= ITSELF * 0.999:
            score.tanh_()
        if low * most * 1.001 > bound:  # entries below the lower limit may score more
            cut.abs_().clamp_(min=low).mul_(tau.sign())
        yield matters.mul_(score), cut


def _most(values: Tensor) -> float:
    """The largest magnitude; on a device infinity, as to ask is to wait."""
    numbers: Any = values.numpy() if values.device.type == "cpu" else None
    return float("inf") if numbers is None else float(max(numbers.max(), -numbers.min()))


def _survey(options: Options, each: Mapping[str, tuple[float, ...]]) -> Survey:
    def find(numel: int) -> Generator[Pass, Any, Tensor]:
        low, high = int(numel * _TAIL) + 1, max(int(numel * (1 - _TAIL) - 1), 0) + 1
        kept = min(int(numel * (1 - options.ratio)) + 1, numel)
        large = numel >= threshold.SAMPLED
        limits = (yield from order.tails(numel, low, high)) if large else None
        if limits is None:
            limits = yield from order.by_rank(lambda taus: (tau.abs() for tau in taus), (low, high))
        inside = ends_of(limits)
        ends = (yield from order.top(lambda taus: scores(taus, inside), numel, kept)) if large else None
        if ends is None:
            ends = yield from order.by_rank(lambda taus: scores(taus, inside), (kept, numel))
        return torch.cat([limits, ends], dim=1)

    return Survey(find=find, reads=lambda numel: 4.0 if numel < threshold.SAMPLED else 2.0 + 2.0 / threshold.SHARE)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2410.02396",
    citation=Citation("Parameter Competition Balancing for Model Merging", "Guodong Du and others", "NeurIPS 2024"),
    survey=_survey,
    work=by_entry(250.0),
    workspace=lambda options, tasks: tasks + 8.0,
)
