"""Act like each expert on the inputs that it was trained on.

WUDI-Merging (Cheng et al., ICML 2025). The rows of a task vector lie in the span of the inputs it was trained on, so
tau_i^T tau_i stands for their covariance, without data. Per weight [m, n], with `C_i = tau_i^T tau_i / ||tau_i||^2`,
the merged task vector M minimises

    sum_i tr (M - w_i tau_i) C_i (M - w_i tau_i)^T          from  M0 = sum_i w_i tau_i

and is multiplied by `scale`.

`--published`, or `--solver adam`, is the published descent: 300 steps of Adam of 1e-5 from M0. The objective is
quadratic and needs only two matrices that do not depend on the number of experts, so a step costs 2 m n^2 FLOP, not 4 T
m^2 n and a backward pass. Adam's constants fit task vectors of CLIP's size; `--relative-lr` fits any.

`--solver exact`, the default, replaces the steps by a ridge towards M0: `r ||M - M0||^2` is added, and M follows from
one Cholesky factorisation, whatever the size of the task vectors. r is `ridge` times the mean eigenvalue of
`sum_i C_i`, which is T / n, so that wide and narrow weights are treated alike. Where all experts are of low rank
(`modelmerge.methods.cores`), n counts the directions that one of them takes up, on average, and M is damped as kron's
is where it is as large as the weight, and no longer than the task vectors are on average:

    M = M0 + sum_i (w_i tau_i - M0) C_i (sum_i C_i + r)^-1

`--solver spectral` is SWUDI (Wei et al., arXiv 2606.07289): gradient flow from M0 for a `time` t, which follows an
eigenvalue l of `sum_i C_i` by `f = 1 - exp(-l t)`, and not at all but for the leading `share` of the n eigenvalues.
With `sum_i C_i = V diag(l) V^T`,

    M = M0 + sum_i (w_i tau_i - M0) C_i V diag(f / l) V^T

The defaults are the authors' for CLIP; for language models they take a share of 0.85 and a time of 300.

The tensors that are not weights of linear layers are averaged, as fusion_bench's code does; the authors' script for
vision leaves them at the base (`--rest base`).

Paper and code: the paper divides by ||tau_i||^2, as here; one of the authors' scripts divides by ||tau_i||.

Deviation: an expert that did not change a weight has no inputs to speak of there (the published loss is 0 / 0): it is
left out of that weight, with a remark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge import interrupts
from modelmerge.errors import named
from modelmerge.methods import cores, linalg, presence, products, work
from modelmerge.methods.contract import Citation, Context, Tensor, Vectors, matrix_method
from modelmerge.methods.options import PUBLISHED, follow, option, refuse_idle
from modelmerge.methods.sums import weighted_sum

# Of experts of low rank, which alone want it: what full fine-tuning leaves is too short here already.
_DAMPING = 1.25
_ROUNDING = 1e-12  # eigenvalues below this share of the largest are none
_OF_SOLVERS = {"exact": ["ridge"], "spectral": ["time", "share"], "adam": ["steps", "lr", "relative_lr"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of WUDI. Where no value is named, one follows from the others; None is left where none has an effect.

    Raises:
        UsageError: An option has no effect with the solver.
    """

    solver: Literal["exact", "adam", "spectral"] | None = option(
        None, "exact: a ridge solve; spectral: SWUDI; adam: the published descent. Default: exact; adam as published."
    )
    published: bool = option(False, PUBLISHED)
    ridge: float | None = option(
        None,
        "exact: pull towards the sum of the task vectors, in units of the mean eigenvalue. Default: 0.3.",
        minimum=1e-9,
    )
    time: float | None = option(None, "spectral: how long to descend. Default: 1300.", above=0.0)
    share: float | None = option(
        None, "spectral: share of the eigenvalues that is descended along. Default: 0.65.", above=0.0, maximum=1.0
    )
    steps: int | None = option(None, "adam: steps. Default: 300.", minimum=0)
    lr: float | None = option(None, "adam: learning rate, in units of the weights. Default: 1e-5.", above=0.0)
    relative_lr: float | None = option(
        None, "adam: learning rate in units of rms(tau), in place of the other; try 0.1. Default: none.", above=0.0
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)

    def __post_init__(self) -> None:
        follow(self, solver="adam" if self.published else "exact")
        for solver, names in _OF_SOLVERS.items():
            if solver != self.solver:
                refuse_idle(self, names, f"with {named('solver')} {self.solver}")
        if self.solver == "exact":
            follow(self, ridge=0.3)
            return
        if self.solver == "spectral":
            follow(self, time=1300.0, share=0.65)
            return
        follow(self, steps=300)
        if self.relative_lr is None:
            follow(self, lr=1e-5)
        else:
            refuse_idle(self, ["lr"], f"with {named('relative_lr')}")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    norms = presence.changed(taus, context)
    if not norms:
        return torch.zeros_like(taus[0])
    weights = [context.weights[i] for i in norms]
    vectors = taus if len(norms) == len(taus) else taus[list(norms)]
    if options.solver == "adam":
        start = weighted_sum(vectors, weights)
        return descend(vectors, list(norms.values()), weights, start, options).mul_(options.scale)
    core = cores.of(vectors, context, list(norms))
    width, low = float(core.taus.shape[-1]), core.rank is not None and options.solver == "exact"
    if low:  # the filter is as published
        width = sum(pair[0].shape[-1] for pair in core.pairs if pair) / len(norms)
    merged = solve(core.taus, list(norms.values()), weights, weighted_sum(core.taus, weights), options, width)
    if low:
        merged = core.shortened(cores.damped(merged, context.base, _DAMPING), norms.values(), weights)
    return core.whole(merged).mul_(options.scale)


def solve(
    taus: Tensor, norms: list[float], weights: list[float], start: Tensor, options: Options, width: float
) -> Tensor:
    """The minimiser [m, n] with the ridge or the filter, from task vectors [T, m, n] and their sum.

    `width` is how many directions the unit of the ridge is a mean over.
    """
    tasks, (m, n) = len(taus), taus.shape[-2:]
    shift = (options.ridge or 0.0) * tasks / width  # the filter has none
    if isinstance(taus, Vectors):
        return _solve_one_by_one(taus, norms, weights, start, shift)
    origin = start.double()
    if n <= tasks * m:
        inner, covariance = (origin.new_zeros(*origin.shape[:-2], n, n) for _ in range(2))
        pull = torch.zeros_like(origin)
        for tau, norm, weight in zip(taus, norms, weights, strict=True):
            interrupts.check()
            unit = tau.double().div_(norm)
            torch.matmul(unit.mT, unit, out=covariance)
            inner += covariance
            products.added(pull, unit.mul_(weight * norm).sub_(origin), covariance)
        del covariance, unit
        return origin.add_(_divided(pull, inner, shift, options, n)).float()
    # Few rows: the same by the rows' own Gram matrix, A^T A + r = (A A^T + r) on the other side.
    rows = torch.cat([tau.double() / norm for tau, norm in zip(taus, norms, strict=True)], dim=-2)
    inner = rows @ rows.mT
    each = zip(rows.split(m, dim=-2), norms, weights, strict=True)
    pull = torch.cat([(unit * (weight * norm) - origin) @ unit.mT for unit, norm, weight in each], dim=-1)
    return products.added(origin, _divided(pull, inner, shift, options, n), rows).float()


def _solve_one_by_one(taus: Vectors, norms: list[float], weights: list[float], start: Tensor, shift: float) -> Tensor:
    """`solve` with the ridge `shift`, beside one matrix [n, n] and a few [m, n]."""
    pull = torch.zeros_like(start, dtype=torch.float64)
    inner = pull.new_zeros(taus.shape[2], taus.shape[2])
    inner.diagonal().add_(shift)
    for tau, norm, weight in zip(taus, norms, weights, strict=True):
        interrupts.check()
        unit = tau.double().div_(norm)
        inner.addmm_(unit.T, unit)
        pull += torch.linalg.multi_dot([(unit * (weight * norm)).sub_(start), unit.T, unit])
    del tau, unit
    linalg.factor_in_place(inner)
    pull = torch.linalg.solve_triangular(inner, pull.T, upper=False)
    return torch.linalg.solve_triangular(inner.T, pull, upper=True).T.float().add_(start)


def _divided(pull: Tensor, inner: Tensor, shift: float, options: Options, width: int) -> Tensor:
    """The pull [m, k] times the inverse of `inner` [k, k], with ridge or filter; its eigenvalues are `sum_i C_i`'s."""
    if options.solver == "exact":
        inner.diagonal(dim1=-2, dim2=-1).add_(shift)
        return torch.cholesky_solve(pull.mT, torch.linalg.cholesky(inner)).mT
    assert options.time is not None and options.share is not None, "the filter has them"  # noqa: PT018
    time, followed = options.time, math.ceil(options.share * width - 1e-9)

    def factors(values: Tensor) -> Tensor:
        # Rounding leaves eigenvalues of none, of either sign: there f / l comes to t.
        quotients = torch.where(values > _ROUNDING * values[..., -1:], -torch.expm1(-time * values) / values, time)
        quotients[..., : max(values.shape[-1] - followed, 0)] = 0.0
        return quotients

    return linalg.through_eigenvalues(pull, inner, factors)


def descend(taus: Tensor, norms: list[float], weights: list[float], start: Tensor, options: Options) -> Tensor:
    """Where Adam stops [m, n], from task vectors [T, m, n] and their sum.

    The gradient is `2 (M sum_i C_i - sum_i w_i tau_i C_i)`.
    """
    merged, rate = start.clone(), options.lr
    if options.relative_lr is not None:
        rate = options.relative_lr * float(taus.square().mean().sqrt())
    assert rate is not None and options.steps is not None, "Adam has them"  # noqa: PT018
    covariances, target = taus.new_zeros(taus.shape[2], taus.shape[2]), torch.zeros_like(start)
    for tau, norm, weight in zip(taus, norms, weights, strict=True):
        covariance = tau.T @ tau / norm**2
        covariances += covariance
        target.addmm_(tau, covariance, alpha=weight)
    adam = torch.optim.Adam([merged], lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for _ in range(options.steps):
        interrupts.check()
        merged.grad = torch.addmm(target, merged, covariances, beta=-2.0, alpha=2.0)
        adam.step()
    return merged


def _one_by_one(options: Options, m: int, n: int, tasks: int) -> float | None:
    if options.solver != "exact" or n > tasks * m:
        return None
    return 10.0 * m * n + 2.0 * n**2 + 2.0 * min(m, n) ** 2


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    if options.solver == "adam":
        step = work.product(m, n, n) + work.Work(moved=28.0 * m * n)
        return work.product(n, m, n) * 2.0 * tasks + step * float(options.steps or 0)
    k = min(n, tasks * m)
    solve = work.Work(double=k**3 / 3) + work.fine_product(m, k, k)
    if options.solver == "spectral":
        solve = work.through_eigenvalues(m, k)
    if n <= tasks * m:
        return work.fine_product(n, m, n) * 2.0 * tasks + solve
    return work.fine_product(k, n, k) + work.fine_product(m, n, k) * 2.0 + solve


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2503.08099",
    citation=Citation(
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "Runxi Cheng and others",
        "ICML 2025",
    ),
    wants_base=True,
    workspace=lambda options, tasks: 12.0,
    one_by_one=_one_by_one,
    squares=lambda options, m, n, tasks: (6.0 if options.solver == "spectral" else 3.0) * min(n, tasks * m) ** 2,
    work=_work,
    work_of_products=work.through_cores(
        _work, lambda options, m, n: work.spectral_norm(m, n) if options.solver == "exact" else work.NOTHING
    ),
    batches=lambda options: options.solver != "adam",
)
