"""Fit each task vector on the inputs that it tells of, by least squares.

ACTMat (Hameed et al., arXiv 2604.01329). A task vector is a sum of outer products of gradients and inputs, so that
`C_i = tau_i^T tau_i` stands for the covariance of the inputs that expert i was trained on. Per weight [m, n] the merged
task vector is the one that differs least from every `w_i tau_i` on these inputs,

    M = (sum_i w_i tau_i C_i) (sum_i C_i)^+

times `scale`. It is WUDI's objective without the division by ||tau_i||^2, so that long task vectors count more, and
without a start at their sum: where no input points, nothing is added. With a `density` below 1 it is TACT (appendix C
of the paper): C_i is that of the largest entries of tau_i, in each weight.

The tensors that are not weights of linear layers are averaged, as in the authors' code.

Deviation: the pseudo-inverse takes eigenvalues below `cutoff` times the largest for zero, by default 0.01. The authors'
code has torch's default in float32, max(m, n) 2^-23 (1e-4 to 4e-4 for CLIP): on small real experts that costs
accuracy, for weak directions carry noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modelmerge import interrupts
from modelmerge.methods import cores, linalg, threshold, trims, work
from modelmerge.methods.contract import Citation, Context, Moments, Tensor, matrix_method
from modelmerge.methods.merge import ties
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ACTMat."""

    density: float = option(
        1.0, "Share of each task vector's entries that tell of its inputs; TACT: 0.5.", above=0.0, maximum=1.0
    )
    cutoff: float = option(0.01, "Eigenvalues below this share of the largest count as zero.", minimum=0.0, maximum=1.0)
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    if options.density >= 1.0:
        core = cores.of(taus, context)
        return core.whole(_fitted(core.taus, options, context)).mul_(options.scale)
    return _fitted(taus, options, context).mul_(options.scale)


def _fitted(taus: Tensor, options: Options, context: Context) -> Tensor:
    """The least-squares solution [m, n], from task vectors [T, m, n]."""
    ends = None if context.measured is None else trims.ends_and_factors(context.measured, context.weights)[0]
    trimmed = (threshold.trim(tau, None if ends is None else ends[i, 0]) for i, tau in enumerate(taus))

    def inverse(values: Tensor) -> Tensor:
        return torch.where(values > options.cutoff * values[-1:], 1.0 / values, 0.0)

    tasks, m, n = taus.shape
    if n <= tasks * m:
        covariances, pull = (taus.new_zeros(size, n, dtype=torch.float64) for size in (n, m))
        for tau, kept, weight in zip(taus, trimmed, context.weights, strict=True):
            interrupts.check()
            covariance = kept.double().T @ kept.double()
            covariances += covariance
            pull.addmm_(tau.double(), covariance, alpha=weight)
        return linalg.through_eigenvalues(pull, covariances, inverse).float()
    # Few rows: the same by the rows' own Gram matrix, A (A^T A)^+ = (A A^T)^+ A.
    rows = torch.cat([kept.double() for kept in trimmed])
    each = zip(taus, rows.split(m), context.weights, strict=True)
    pull = torch.cat([tau.double() @ kept.T * weight for tau, kept, weight in each], dim=1)
    return (linalg.through_eigenvalues(pull, rows @ rows.T, inverse) @ rows).float()


def _moments(options: Options, each: Mapping[str, tuple[float, ...]]) -> Moments | None:
    return ties.METHOD.moments(ties.Options(density=options.density, trim_scope="tensor"), {})


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    if n <= tasks * m:
        return (work.fine_product(n, m, n) + work.fine_product(m, n, n)) * tasks + work.through_eigenvalues(m, n)
    rows = tasks * m
    return work.fine_product(rows, n, rows) * 2.0 + work.through_eigenvalues(m, rows) + work.fine_product(m, rows, n)


def _work_of_products(options: Options, m: int, n: int, tasks: int, k: int) -> work.Work:
    if options.density < 1.0:  # what is trimmed is no product any more
        return _work(options, m, n, tasks)
    return work.through_cores(_work)(options, m, n, tasks, k)


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2604.01329",
    citation=Citation(
        "Model Merging via Data-Free Covariance Estimation", "Marawan Gamal Abdel Hameed and others", "2026"
    ),
    wants_base=True,
    moments=_moments,
    workspace=lambda options, tasks: 12.0,
    squares=lambda options, m, n, tasks: 6.0 * min(n, tasks * m) ** 2,
    work=_work,
    work_of_products=_work_of_products,
)
