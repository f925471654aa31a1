"""Optimise one shared correction per linear layer, off the subspace the tasks share, so that each expert is kept.

Adaptive Projective Gradient Descent (Wei et al., ICML 2025; its code calls it DOGE). Per weight [m, n], in float32:

1. `lambda_i = eta * w_i / ||tau_i||` from the untrimmed task vectors (w_i is --weight); with `--lambda-mode relative`,
   `lambda_i = scale * w_i * mean_j ||tau_j|| / ||tau_i||`, which does not depend on the task vectors' size.
2. B: basis of the subspace the tasks share (`_linalg.shared_subspace`).
3. D [m, n] minimises `sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row)^2` off B. `--solver adam` is the
   published descent: Adam from zero on the gradient without its part in B. `--solver exact` goes to the shortest
   minimiser at once: D = (I - B B^T) A with A in the span of the task vectors, row by row, by preconditioned
   conjugate gradients in the coefficients [m, T].
4. mask_i keeps the largest entries of tau_i, counted over the whole task vector or each tensor.
5. merged task vector: `sum_i lambda_i mask_i (tau_i + D)`.

Where paper and code differ, the code is followed: the paper gives one rank for both steps of B (`--shared-rank` equal
to `--task-rank` restores that), and projects the gradient, not the update, so that Adam's element-wise step leaves
the complement of B a little. `--inner matrix` takes the inner product over the whole weight rather than per row, as a
port of the code does. Adam stops once the loss has fallen below --tolerance of its first value, which is below what
float32 can resolve; the published loop runs all steps (--tolerance 0). The loss has many minimisers, and the two
solvers end at different ones. An expert that (nearly) did not change a weight would get a boundless lambda there: it
is left out of that weight, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods import _linalg, _threshold

if TYPE_CHECKING:
    from torch import Tensor

# A task vector shorter than this share of the longest one, on one weight, counts as unchanged there.
NEGLIGIBLE = 1e-3


# Losses are looked at every so many steps of Adam: looking waits for a GPU.
_LOOK = 10
# Conjugate gradients: relative residual in the preconditioner's norm, and a bound on the iterations.
_RESIDUAL, _ITERATIONS = 1e-6, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What APGD can be told."""

    solver: Literal["adam", "exact"] = option("adam", "adam: the published descent; exact: the shortest minimiser.")
    lambda_mode: Literal["paper", "relative"] = option("paper", "lambda_i = eta / ||tau_i||, or free of scale.")
    eta: float = option(0.07, "With --lambda-mode paper: size of each task's share. 0.15 for language.", above=0.0)
    scale: float = option(0.35, "With --lambda-mode relative: factor on task vectors of even length.", above=0.0)
    density: float = option(0.3, "Share of each task vector's entries that is kept.", above=0.0, maximum=1.0)
    trim_scope: Literal["model", "tensor"] = option(
        "model", "Where the share is counted: over the whole task vector, or in each tensor."
    )
    task_rank: int | None = option(None, "Directions taken from each task. Default: min(m, n) / T.", minimum=0)
    shared_rank: int | None = option(None, "Dimension of the shared subspace. Default: min(m, n) / 6.", minimum=0)
    inner: Literal["row", "matrix"] = option("row", "Where the inner product of the loss is taken.")
    steps: int = option(400, "Steps of Adam at most.", minimum=0)
    lr: float = option(1e-4, "Learning rate of Adam, in units of the weights.", above=0.0)
    relative_lr: float | None = option(None, "Learning rate in units of rms(tau), instead of --lr; try 0.3.", above=0.0)
    tolerance: float = option(1e-11, "Adam stops once loss / first loss is below; 0: all steps.", minimum=0.0)
    ridge: float = option(1e-4, "exact: ridge, in units of a row's mean squared norm.", minimum=0.0)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    merged = torch.zeros_like(taus[0])
    norms = torch.linalg.vector_norm(taus, dim=(1, 2), dtype=torch.float64).tolist()
    if max(norms) == 0.0:
        return merged
    active = []
    for i, norm in enumerate(norms):
        if norm == 0.0 or norm < NEGLIGIBLE * max(norms):
            context.leave_out(i, "it did not change this weight" if norm == 0.0 else "it hardly changed this weight")
        elif context.weights[i] != 0.0:
            active.append(i)
    if not active:
        return merged
    lambdas = task_lambdas([norms[i] for i in active], [context.weights[i] for i in active], options)
    thresholds = context.measured
    if options.trim_scope == "tensor":
        thresholds = _threshold.per_tensor(taus, [options.density] * len(taus))

    vectors = taus if len(active) == len(taus) else taus[active]
    basis = task_basis(list(vectors), options)
    if options.solver == "exact":
        correction = solve(vectors, lambdas, basis, options, context)
    else:
        correction = descend(vectors, lambdas, basis, options, context)
    for i, lam in zip(active, lambdas, strict=True):
        part = taus[i] + correction
        if thresholds is not None:
            part.mul_(taus[i].abs() >= thresholds[i])
        merged.add_(part.mul_(lam))
    return merged


def task_lambdas(norms: list[float], weights: list[float], options: Options) -> list[float]:
    """The factor of each task vector."""
    mean = sum(norms) / len(norms)
    size = options.eta if options.lambda_mode == "paper" else options.scale * mean
    return [size * weight / norm for norm, weight in zip(norms, weights, strict=True)]


def task_basis(taus: list[Tensor], options: Options) -> Tensor:
    """Basis of the shared subspace with the ranks asked for, float32 [m, k]."""
    smaller = min(taus[0].shape)
    task_rank = smaller // len(taus) if options.task_rank is None else min(options.task_rank, smaller)
    shared_rank = smaller // 6 if options.shared_rank is None else options.shared_rank
    return _linalg.shared_subspace(taus, task_rank, shared_rank).float()


def descend(taus: Tensor, lambdas: list[float], basis: Tensor, options: Options, context: Context) -> Tensor:
    """The correction D [m, n] where Adam stops, from task vectors [T, m, n] and the shared basis [m, k].

    The gradient needs no autograd: with `e_jr = <tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row r`, that of row r is
    `2 sum_i lambda_i * sum_j e_jr tau_j[r]`.
    """
    # The loss in units of the task vectors' size is the same loss: D scales with them. Adam's eps is then small too.
    unit = 1.0 if options.relative_lr is None else float(taus.square().mean().sqrt())
    rate = options.lr if options.relative_lr is None else options.relative_lr
    total = sum(lambdas)
    rows = side_by_side(taus, options)
    if unit != 1.0:
        rows = rows / unit
    # What e is at D = 0.
    offset = -wanted(rows, lambdas)
    correction = torch.zeros_like(taus[0])
    adam = torch.optim.Adam([correction], lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    enough = options.tolerance * float(offset.square().sum())
    taken = 0
    for taken in range(1, options.steps + 1):
        errors = torch.bmm(correction.view(len(rows), 1, -1), rows.mT).mul_(total).add_(offset.mT)
        if taken % _LOOK == 0 and options.tolerance and float(errors.square().sum()) < enough:
            taken -= 1
            break
        gradient = torch.bmm(errors, rows).mul_(2.0 * total).view_as(correction)
        correction.grad = _linalg.remove_subspace(gradient, basis)
        adam.step()
    context.tell({"steps": taken})
    return correction.mul_(unit)


def solve(taus: Tensor, lambdas: list[float], basis: Tensor, options: Options, context: Context) -> Tensor:
    """The shortest D [m, n] off the basis [m, k] that minimises the loss, from task vectors [T, m, n].

    With V the rows' task vectors and P = I - B B^T, zero loss asks `V P D = c`; the shortest solution is `P V^T a`
    where `(V P V^T + ridge) a = c`, a [m, T]: conjugate gradients, preconditioned by the rows' own T x T systems, which
    are the whole answer where there is no basis. The ridge makes it the least-squares solution where zero loss is
    out of reach (more tasks than columns, experts that contradict one another); a much smaller one would let float32's
    rounding of the products through, magnified by its inverse.
    """
    rows = side_by_side(taus, options)
    shape = taus[0].shape
    target = (wanted(rows, lambdas) / sum(lambdas)).double()
    if options.inner == "matrix" and basis.shape[1]:
        off = torch.stack([_linalg.remove_subspace(tau.clone(), basis) for tau in taus]).flatten(1)[None]
        grams = (off @ off.mT).double()
    else:
        grams = (rows @ rows.mT).double()
    # Rows that no task changed have nothing to solve: any positive shift gives them zero.
    shift = grams.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    shift = torch.where(shift > 0, shift, 1.0) * max(options.ridge, 1e-14)
    inverse = torch.linalg.inv(grams + shift * torch.eye(len(taus), dtype=grams.dtype, device=grams.device))

    def spread(a: Tensor) -> Tensor:
        """P V^T a: [m, T, 1] -> [m, n]."""
        return _linalg.remove_subspace((a.float().mT @ rows).view(shape), basis)

    solution = inverse @ target
    if not basis.shape[1] or options.inner == "matrix":
        return spread(solution)

    def system(a: Tensor) -> Tensor:
        return (rows @ spread(a)[:, :, None]).double() + shift * a

    residual = target - system(solution)
    scale = float((target * (inverse @ target)).sum())
    toward = inverse @ residual
    direction = toward
    square = float((residual * toward).sum())
    taken = 0
    while square > _RESIDUAL**2 * scale and taken < _ITERATIONS:
        image = system(direction)
        length = square / float((direction * image).sum())
        solution = solution + length * direction
        residual = residual - length * image
        toward = inverse @ residual
        square, before = float((residual * toward).sum()), square
        direction = toward + (square / before) * direction
        taken += 1
    context.tell({"iterations": taken})
    return spread(solution)


def side_by_side(taus: Tensor, options: Options) -> Tensor:
    """Per row, [m, T, n]: the T vectors of a row together, for batched products. Per matrix, [1, T, m * n]."""
    return taus.transpose(0, 1).contiguous() if options.inner == "row" else taus.flatten(1)[None]


def wanted(rows: Tensor, lambdas: list[float]) -> Tensor:
    """What `sum_i lambda_i <tau_j, D>` has to be for zero loss: `<tau_j, tau_j - sum_i lambda_i tau_i>`, [b, T, 1]."""
    weights = torch.tensor(lambdas, dtype=rows.dtype, device=rows.device)
    merged = torch.matmul(weights, rows)[:, :, None]
    squares = torch.linalg.vector_norm(rows, dim=2, keepdim=True).square_()
    return squares - torch.matmul(rows, merged)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2501.01230",
    citation=Citation(
        "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
        "Yongxian Wei and others",
        "ICML 2025",
    ),
    matrices=True,
    blockwise=lambda options: False,
    survey=lambda options: _threshold.survey(options.density) if options.trim_scope == "model" else None,
    # The descent holds the task vectors twice and Adam's state; the bases before it, the eigendecomposition of a
    # float64 Gram matrix with LAPACK's workspace (measured on square and oblong matrices: tests/test_memory.py).
    workspace=lambda tasks: max(2.0 * tasks + 8.0, 26.0),
)
