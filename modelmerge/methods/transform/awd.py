"""Subtract one redundant vector from all task vectors, so that they become orthogonal.

Adaptive Weight Disentanglement (Xiong et al., arXiv 2411.18729). With `v_i = tau_i - delta`, delta minimises

    L(delta) = 1/(T(T-1)) * sum_{i != j} |cos(v_i, v_j)| + alpha * ||delta||

by plain gradient descent from zero; each expert's disentangled task vector is `v_i`. What one delta is shared by is
the granularity: a row of a weight (as the authors' code has it), a whole weight, or the whole model (as the paper
reads). With the L2 norm a step moves delta by a combination of the task vectors and of delta itself, so delta never
leaves their span: `delta = sum_k a_k tau_k`, and the T x T Gram matrix K of the task vectors is all that the descent
needs: it iterates on the T numbers a and is streamed, whatever the size of the models.

Defaults, from five sets of small experts (`tests/benchmarks/choose.py`, RESULTS-disentangle.md there): by row, by
tensor and by model, AWD and task arithmetic end within noise of one another at their best scale (means over the sets
74.1, 74.2, 74.1), and at twice that scale by row and by tensor gain the same. By tensor costs a hundredth of by row,
and was nowhere below plain task arithmetic at large scales; so `tensor` is the default. The authors' code goes by
row.

Units: task vectors are measured in units of their own size s, the root mean square of their norms in the group: the
objective is that of `tau / s`, so that multiplying all task vectors by ten multiplies delta by ten, and a step is no
longer than lr * s. `--published` is the published form: one group, the whole model, and task vectors as they are.

Deviations: of all iterates, zero included, the one with the lowest loss is kept, since a fixed step oscillates about
the kinks of |cos|: the result is never worse than doing nothing. A task vector that is (nearly) zero in a group has
no direction; it takes no part there and stays as it is. The norm's gradient at zero is taken as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge import interrupts
from modelmerge.methods.contract import Citation, SharedVector, Solution, Tensor, TransformSpec, Watch
from modelmerge.methods.options import PUBLISHED, follow, option

# A task vector shorter than this share of the longest one of its group has no direction worth the name.
NEGLIGIBLE = 1e-3
_TINY = 1e-30  # keeps the squares of norms off zero; far below any float32 task vector's


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of AWD; the granularity follows from `published` where none is named."""

    published: bool = option(False, PUBLISHED)
    alpha: float = option(0.1, "Weight of ||delta|| against the mean |cosine|.", minimum=0.0)
    lr: float = option(0.01, "Length of a step, in units of the task vectors' size; as published, absolute.", above=0.0)
    steps: int = option(300, "Steps of gradient descent.", minimum=0)
    granularity: Literal["row", "tensor", "model"] | None = option(
        None, "What shares one redundant vector. Default: tensor; model as published."
    )

    def __post_init__(self) -> None:
        follow(self, granularity="model" if self.published else "tensor")

    def describe(self) -> dict[str, str]:
        """What follows from the options, in words."""
        return {"units": "absolute" if self.published else "relative"}


def measure(taus: Tensor) -> Tensor:
    """[T, G, n] -> float64 [G, T, T]: the Gram matrix of each group."""
    groups = taus.transpose(0, 1).double()
    return groups @ groups.mT


def solve(grams: Tensor, options: Options, watch: Watch | None = None) -> Solution:
    """Gradient descent on coefficients: float64 [G, T, T] -> coefficients [G, T]."""
    problem = _Problem(grams, options, watch)
    coefficients = torch.zeros_like(problem.size)[:, None].repeat(1, grams.shape[1])
    for _ in range(options.steps):
        interrupts.check()
        projections = (problem.gram @ coefficients[:, :, None]).squeeze(2)
        pull = problem.look(coefficients, projections, (coefficients * projections).sum(1))
        step = pull.along_delta[:, None] * coefficients - pull.along_taus
        length = (step[:, None, :] @ problem.gram @ step[:, :, None]).flatten()
        coefficients = coefficients - problem.stride(length)[:, None] * step
    projections = (problem.gram @ coefficients[:, :, None]).squeeze(2)
    problem.look(coefficients, projections, (coefficients * projections).sum(1))
    return problem.solution()


@dataclass(slots=True)
class _Pull:
    """The gradient at delta: `along_delta * delta - sum_j along_taus_j tau_j`."""

    along_taus: Tensor  # [G, T]
    along_delta: Tensor  # [G]


class _Problem:
    """G groups of T task vectors in their units, the loss at a delta, and the best delta seen."""

    def __init__(self, grams: Tensor, options: Options, watch: Watch | None) -> None:
        self._options = options
        self._watch = watch
        norms = grams.diagonal(dim1=1, dim2=2)
        largest = norms.amax(1, keepdim=True)
        self.active = (norms > NEGLIGIBLE**2 * largest) & (largest > 0)
        takes_part = self.active.to(grams.dtype)
        count = takes_part.sum(1)
        relative = not options.published
        mean_square = (norms * takes_part).sum(1) / count.clamp(min=1)
        self.size = torch.where(mean_square > 0, mean_square.sqrt(), 1.0) if relative else torch.ones_like(mean_square)
        self.gram = grams * takes_part[:, :, None] * takes_part[:, None, :] / self.size[:, None, None].square()
        identity = torch.eye(grams.shape[1], dtype=torch.bool, device=grams.device)
        pairs = takes_part[:, :, None] * takes_part[:, None, :] * ~identity
        # 1 / (t(t - 1)) for each ordered pair of the t that take part; all zero where there is no pair.
        self._share = pairs / pairs.sum((1, 2), keepdim=True).clamp(min=1)
        self._best = torch.full_like(mean_square, torch.inf)
        self._coefficients = torch.zeros_like(norms)
        self._losses: list[Tensor] = []

    def look(self, coefficients: Tensor, projections: Tensor, square: Tensor) -> _Pull:
        """Take note of the loss at delta, from `<tau_i, delta>` [G, T] and `||delta||^2` [G]; the gradient there."""
        gram, alpha = self.gram, self._options.alpha
        square = square.clamp(min=0.0)
        # <v_i, v_j> = <tau_i, tau_j> - <tau_i, delta> - <tau_j, delta> + ||delta||^2
        inner = gram - projections[:, :, None] - projections[:, None, :] + square[:, None, None]
        inverse = inner.diagonal(dim1=1, dim2=2).clamp(min=_TINY).rsqrt()
        cosines = inner * inverse[:, :, None] * inverse[:, None, :]
        share = self._share
        length = square.sqrt()
        losses = (cosines.abs() * share).sum((1, 2)) + alpha * length
        self._losses.append(losses.sum())
        if self._watch is not None:  # asking for the number waits for a GPU
            self._watch(float(losses.mean()))
        better = losses < self._best
        self._best = torch.where(better, losses, self._best)
        self._coefficients = torch.where(better[:, None], coefficients, self._coefficients)
        # d cos_ij / d v_i = v_j / (|v_i||v_j|) - cos_ij v_i / |v_i|^2, each pair counted from both its ends.
        across = 2.0 * cosines.sign() * share * inverse[:, :, None] * inverse[:, None, :]
        along = 2.0 * (cosines.abs() * share).sum(2) * inverse.square()
        weights = across.sum(1) - along
        norm_pull = torch.where(length > 0, alpha / length.clamp(min=_TINY), 0.0)
        return _Pull(weights, weights.sum(1) + norm_pull)

    def stride(self, square: Tensor) -> Tensor:
        """The factor of a gradient with that squared length [G]: in relative units, a step is at most lr long."""
        if self._options.published:
            return torch.full_like(square, self._options.lr)
        return self._options.lr / square.clamp(min=1.0).sqrt()

    def solution(self) -> Solution:
        """The best coefficients seen."""
        return Solution(self._coefficients, self.active, torch.stack(self._losses))


METHOD = TransformSpec(
    options=Options,
    by=SharedVector(measure=measure, solve=solve),
    paper="https://arxiv.org/abs/2411.18729",
    citation=Citation(
        "Multi-Task Model Merging via Adaptive Weight Disentanglement", "Feng Xiong and others", "arXiv 2024"
    ),
)
