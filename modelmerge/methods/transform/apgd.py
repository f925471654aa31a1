"""Add APGD's correction to the task vectors of each linear layer, so that any merge method can follow it.

Adaptive Projective Gradient Descent (Wei et al., ICML 2025, arXiv 2501.01230) finds a correction D for each weight, off
the subspace the tasks share, with which the sum of the task vectors keeps what each expert needs (`merge apgd`, whose
mathematics this is). Here the task vectors become `mask_i o (tau_i + D)`, and another method merges them.

`--correction shared` is one D for all tasks. `--correction task` is one D_i for each, as in front of AdaMerging: of all
D_i for which `sum_i lambda_i D_i` meets the loss the shortest, `D_i = lambda_i (sum_k lambda_k) / (sum_k lambda_k^2) D`
with the D that is shared; and with `--solver adam` the published descent on all of them. Both of its ranks are
min(m, n) / T. `--published` is the algorithm as published in all else: Adam, `lambda_i = eta / ||tau_i||`, 30 % of the
entries. The gradient of D_i is lambda_i times one that is the same for all, and Adam divides by its size: but for
Adam's eps the descent moves all D_i alike.

The lambdas count inside the loss only. `--lengths lambda` makes each task vector lambda_i times as long besides: then
the plain sum of the shared form (`task-arithmetic --scale 1`) is what `merge apgd` makes, without its bound on the
norm; and with `--ridge 1e9`, that is D = 0, it is the task-aware lambda alone, in front of any method.

It makes task vectors longer and more alike, which sums and means gain from; methods that see to interference themselves
do not. `python -m tests.benchmarks.grid --fronts` measures what it is worth in front of each method.

An expert that (nearly) did not change a weight keeps its task vector there; with `--lengths lambda`, where its lambda
would be boundless, it is left out, as in `merge apgd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import apgd, threshold
from modelmerge.methods.contract import Context, Corrected, Correction, Tensor, TransformSpec
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(apgd.CorrectionOptions):
    """Options of APGD's correction. Where no value is named, one follows from the others.

    Raises:
        UsageError: An option has no effect with the solver, or without `published`.
    """

    shared_rank: int | None = option(
        None,
        "Dimension of the shared subspace; of a correction for each task, min(m, n) / T. Default: min(m, n) / 12; "
        "min(m, n) / 6 as published.",
        minimum=0,
    )
    correction: Literal["shared", "task"] = option("shared", "One correction for all tasks, or one for each.")
    lengths: Literal["own", "lambda"] = option(
        "own", "lambda: each task vector times its lambda too, so that their sum is what `merge apgd` makes."
    )

    @property
    def rank_divisor(self) -> int | None:
        """The shared rank of a weight is min(m, n) divided by this, where none is named; None: by the tasks."""
        return None if self.correction == "task" else 6 if self.published else 12

    @property
    def descends_on_each(self) -> bool:
        """Whether there is a matrix for each task; otherwise each one's correction is a multiple of one matrix."""
        return self.correction == "task" and self.solver == "adam"


def find(taus: Tensor, options: Options, context: Context) -> Corrected:
    """[T, m, n] -> the correction [1, m, n], or one for each task, and for each (threshold, part of it, length)."""
    each = options.descends_on_each
    fit = apgd.fit(taus, options, context, each=each)
    absent = 0.0 if options.lengths == "lambda" else 1.0  # the length of a task vector that takes no part
    if fit is None:
        return Corrected(torch.zeros_like(taus if each else taus[:1]), ((0.0, 0.0, absent),) * len(taus), (0.0, 0.0))
    active = list(fit.active)
    lambdas, total = fit.lambdas, sum(fit.lambdas)
    parts = [1.0] * len(active)
    if options.correction == "task" and not each:
        parts = [lam * total / sum(lam**2 for lam in lambdas) for lam in lambdas]
    lengths = lambdas if options.lengths == "lambda" else (1.0,) * len(active)
    factors = dict(zip(active, zip(parts, lengths, strict=True), strict=True))
    thresholds = [0.0] * len(taus) if fit.thresholds is None else fit.thresholds.tolist()
    numbers = tuple((limit, *factors.get(i, (0.0, absent))) for i, limit in enumerate(thresholds))
    if not each:
        matrices, summed = fit.correction[None], total * fit.correction
    else:
        matrices = torch.zeros_like(taus)
        matrices[active] = fit.correction
        summed = torch.tensordot(torch.tensor(lambdas).to(taus), fit.correction, dims=1)
    return Corrected(matrices, numbers, _losses(taus if len(active) == len(taus) else taus[active], fit, summed))


def _losses(taus: Tensor, fit: apgd.Fit, summed: Tensor) -> tuple[float, float]:
    """The loss without and with corrections that add up to [m, n]."""
    rows = apgd.rows_of(taus)
    missing = apgd.targets(rows, list(fit.lambdas))
    before = float(missing.square().sum())
    return before, float((missing - rows @ summed.view(len(rows), -1, 1)).square().sum())


def correct(taus: Tensor, matrices: Tensor, numbers: tuple[tuple[float, ...], ...]) -> None:
    """`tau_i <- length_i * mask_i o (tau_i + part_i * D)` in place: [T, n], from D [1 or T, n]."""
    for i, (limit, part, length) in enumerate(numbers):
        tau, matrix = taus[i], matrices[i if len(matrices) > 1 else 0]
        mask = tau.abs() >= limit if limit > 0 else None
        if part:
            tau.add_(matrix, alpha=part)
        if mask is not None:
            tau.mul_(mask)
        if length != 1.0:
            tau.mul_(length)


METHOD = TransformSpec(
    options=Options,
    by=Correction(
        find=find,
        correct=correct,
        matrices=lambda options, tasks: tasks if options.descends_on_each else 1,
        survey=lambda options: threshold.survey(options.density),
        # Beside what `merge apgd` needs, the loss takes the task vectors once more; with a matrix for each, Adam's
        # state, gradients and the result are as many.
        workspace=lambda options, tasks: apgd.workspace(tasks) + (5.0 * tasks if options.descends_on_each else 1),
        work=apgd.work_of,
    ),
    paper=apgd.PAPER,
    citation=apgd.CITATION,
)
