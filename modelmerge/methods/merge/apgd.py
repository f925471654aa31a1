"""Optimise one shared correction per linear layer, off the subspace the tasks share, so that each expert is kept.

Adaptive Projective Gradient Descent (Wei et al., ICML 2025; its code calls it DOGE). Per weight [m, n], in float32:

1. `lambda_i = eta * w_i / ||tau_i||`, from the untrimmed task vectors (w_i is --weight).
2. B: basis of the subspace the tasks share (`_linalg.shared_subspace`).
3. D [m, n], from zero, minimises `sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row)^2` by Adam on the
   gradient without its part in B.
4. mask_i keeps the largest entries of tau_i, counted over the whole task vector or each tensor.
5. merged task vector: `sum_i lambda_i mask_i (tau_i + D)`.

Where paper and code differ, the code is followed: the paper gives one rank for both steps of B (`--shared-rank` equal
to `--task-rank` restores that), and projects the gradient, not the update, so that Adam's element-wise step leaves
the complement of B a little. `--inner matrix` takes the inner product over the whole weight rather than per row, as a
port of the code does. An expert that (nearly) did not change a weight would get a boundless lambda there: it is left
out of that weight, and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Context, Method, option
from modelmerge.methods import _linalg, _threshold

if TYPE_CHECKING:
    from torch import Tensor

# A task vector shorter than this share of the longest one, on one weight, counts as unchanged there.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What APGD can be told; the defaults are the published ones."""

    eta: float = option(
        0.07, "Size of each task's share: lambda_i = eta / ||tau_i||. 0.07 vision, 0.15 language.", above=0.0
    )
    steps: int = option(400, "Steps of Adam.", minimum=0)
    lr: float = option(1e-4, "Learning rate of Adam, in units of the weights.", above=0.0)
    density: float = option(0.3, "Share of each task vector's entries that is kept.", above=0.0, maximum=1.0)
    trim_scope: Literal["model", "tensor"] = option(
        "model", "Where the share is counted: over the whole task vector, or in each tensor."
    )
    task_rank: int | None = option(None, "Directions taken from each task. Default: min(m, n) / T.", minimum=0)
    shared_rank: int | None = option(None, "Dimension of the shared subspace. Default: min(m, n) / 6.", minimum=0)
    inner: Literal["row", "matrix"] = option("row", "Where the inner product of the loss is taken.")
    solver: Literal["adam"] = option("adam", "adam: the published descent.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    merged = torch.zeros_like(taus[0])
    norms = torch.linalg.vector_norm(taus, dim=(1, 2), dtype=torch.float64).tolist()
    if max(norms) == 0.0:
        return merged
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
    lambdas = torch.tensor([options.eta * context.weights[i] / norms[i] for i in active], dtype=torch.float64).tolist()
    thresholds = context.measured
    if options.trim_scope == "tensor":
        thresholds = _threshold.per_tensor(taus, options.density)

    basis = task_basis([taus[i] for i in active], options)
    correction = descend(taus[active], lambdas, basis, options)
    for i, lam in zip(active, lambdas, strict=True):
        part = taus[i] + correction
        if thresholds is not None:
            part.mul_(taus[i].abs() >= thresholds[i])
        merged.add_(part.mul_(lam))
    return merged


def task_basis(taus: list[Tensor], options: Options) -> Tensor:
    """Basis of the shared subspace with the ranks asked for, float32 [m, k]."""
    smaller = min(taus[0].shape)
    task_rank = smaller // len(taus) if options.task_rank is None else min(options.task_rank, smaller)
    shared_rank = smaller // 6 if options.shared_rank is None else options.shared_rank
    return _linalg.shared_subspace(taus, task_rank, shared_rank).float()


def descend(taus: Tensor, lambdas: list[float], basis: Tensor, options: Options) -> Tensor:
    """The correction D [m, n] after all steps, from task vectors [T, m, n] and the shared basis [m, k].

    The gradient needs no autograd: with `e_jr = <tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row r`, that of row r is
    `2 sum_i lambda_i * sum_j e_jr tau_j[r]`.
    """
    total = sum(lambdas)
    # Per row, [m, T, n]: the T vectors of a row side by side, for batched products. Per matrix, [1, T, m * n].
    rows = taus.transpose(0, 1).contiguous() if options.inner == "row" else taus.flatten(1)[None]
    merged = sum_rows(rows, lambdas)
    # <tau_j, sum_i lambda_i tau_i - tau_j>: what e is at D = 0. [m, T, 1]
    offset = torch.matmul(rows, merged) - rows.square().sum(2, keepdim=True)
    correction = torch.zeros_like(taus[0])
    adam = torch.optim.Adam([correction], lr=options.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for _ in range(options.steps):
        errors = torch.bmm(correction.view(len(rows), 1, -1), rows.transpose(1, 2)).mul_(total).add_(offset.mT)
        gradient = torch.bmm(errors, rows).mul_(2.0 * total).view_as(correction)
        correction.grad = _linalg.remove_subspace(gradient, basis)
        adam.step()
    return correction


def sum_rows(rows: Tensor, lambdas: list[float]) -> Tensor:
    """`sum_i lambda_i tau_i` in the layout of `rows` [b, T, c] -> [b, c, 1]."""
    weights = torch.tensor(lambdas, dtype=rows.dtype, device=rows.device)
    return torch.matmul(weights, rows)[:, :, None]


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2501.01230",
    matrices=True,
    blockwise=lambda options: False,
    survey=lambda options: _threshold.survey(options.density) if options.trim_scope == "model" else None,
    # The descent holds the task vectors twice and Adam's state; the bases before it, float64 Gram matrices.
    workspace=lambda tasks: max(2.0 * tasks + 8.0, 18.0),
)
