"""Average task vectors by the covariances of their inputs, lift what is strong.

ACE-Merging (Xu et al., CVPR 2026). As in `actmat` a task vector stands for the covariance of the inputs that an expert
was trained on, without the mean of its rows. Per weight [m, n], with

    Z_i = tau_i - 1 mean(tau_i)^T    C_i = Z_i^T Z_i / ||Z_i||^2    r = ridge / n
    M = (sum_i w_i tau_i (C_i + r)) (sum_i (C_i + r))^-1

and with `U S V^T` the singular value decomposition of `M + sum_i w_i tau_i (C_i - mean_j (C_j + r))`, the first k =
`share` * min(m, n) of its directions are added, all as long as they are on average: the merged task vector is
`scale * (M + mean(S_1..k) U_k V_k^T)`.

`--published` is the authors' code with their constants. There C_i is `Z_i^T Z_i`, r is 0.01, Z_i stands for tau_i in M,
the mean row of `sum_i C_i` is added to every row of what is inverted, and no directions are added. Only where lengths
differ, `var(log ||tau_i||^2) > 0.3 mean(log ||tau_i||^2)^2`, C_i and r are divided by ||Z_i||^2, that row by the mean
of ||tau_i||^2, and 30 % of the directions are added. These constants have units, and task vectors in other units are
merged otherwise; without it, all is free of units.

The tensors that are not weights of linear layers are averaged, as in the authors' code. An expert that did not change a
weight is left out of it, and said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modelmerge import interrupts
from modelmerge.errors import named
from modelmerge.methods import cores, linalg, presence, work
from modelmerge.methods.contract import Citation, Context, Tensor, matrix_method
from modelmerge.methods.options import PUBLISHED, follow, option, refuse_idle

_RIDGE, _UNEVEN = 1e-2, 0.3  # of the authors' code


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ACE-Merging.

    Raises:
        UsageError: `ridge` beside `published`, whose ridge has other units.
    """

    published: bool = option(False, PUBLISHED)
    ridge: float | None = option(
        None, "Pull towards the mean of the task vectors, in units of the mean eigenvalue. Default: 1.", above=0.0
    )
    share: float = option(0.3, "Share of the directions that is added again.", minimum=0.0, maximum=1.0)
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)

    def __post_init__(self) -> None:
        if self.published:
            refuse_idle(self, ["ridge"], f"with {named('published')}")
        else:
            follow(self, ridge=1.0)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    norms = presence.changed(taus, context)
    if not norms:
        return torch.zeros_like(taus[0])
    squares = [norm**2 for norm in norms.values()]
    # The rows have a mean in their own basis alone.
    core = cores.of(taus if len(norms) == len(taus) else taus[list(norms)], context, list(norms), left=False)
    uneven, (tasks, m, n) = not options.published or _are_uneven(squares), core.taus.shape
    covariances, fitted, pull, total = (taus.new_zeros(size, n, dtype=torch.float64) for size in (n, m, m, m))
    ridges = covariances.new_zeros(())
    for i, vector in zip(norms, core.taus, strict=True):
        interrupts.check()
        tau = vector.double()
        centred = tau - tau.mean(0)
        covariance, square = centred.T @ centred, centred.square().sum()
        ridge = square * 0.0 + (_RIDGE if options.published else (options.ridge or 0.0) / n)
        if uneven:
            covariance /= square
            ridge = ridge / square if options.published else ridge
        covariances += covariance
        ridges += ridge
        tau.mul_(context.weights[i])
        fitted.addmm_(tau, covariance)
        total += tau
        pull += tau.mul_(ridge)
    pull += fitted
    row = covariances.mean(0) / (sum(squares) / tasks if uneven else 1.0)
    covariances.diagonal().add_(ridges)
    if options.published:
        merged = torch.linalg.solve(covariances + row, pull - pull.mean(0), left=False)
    else:
        merged = torch.linalg.solve(covariances, pull, left=False)
    count = int(min(m, n) * options.share)
    if uneven and count:
        residual = fitted.add_(merged).addmm_(total, covariances, alpha=-1.0 / tasks)
        left, s, right = linalg.leading_triplets(residual, count)
        merged += (left * s.sum().div(count)) @ right
    return core.whole(merged).float().mul_(options.scale)


def _are_uneven(squares: Sequence[float]) -> bool:
    """Whether the squares of the task vectors' norms differ so much that the authors' code treats them apart."""
    logs = [math.log(square) for square in squares]
    mean = sum(logs) / len(logs)
    return sum((each - mean) ** 2 for each in logs) > _UNEVEN * mean**2 * (len(logs) - 1)


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    solve = work.Work(double=2.0 * n**3 / 3) + work.fine_product(m, n, n) * 2.0
    each = work.fine_product(n, m, n) + work.fine_product(m, n, n)
    return each * tasks + solve + work.triplets(m, n, int(min(m, n) * options.share)) + work.fine_product(m, m, n)


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2603.02945",
    citation=Citation(
        "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation", "Bo Xu and others", "CVPR 2026"
    ),
    wants_base=True,
    workspace=lambda options, tasks: 24.0,
    squares=lambda options, m, n, tasks: 4.0 * n**2,
    work=_work,
    work_of_products=work.through_cores(_work, left=False),
)
