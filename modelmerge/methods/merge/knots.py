"""TIES in directions that the experts share, instead of on single entries: made for LoRA experts.

KnOTS-TIES (Stoica et al., ICLR 2025). Per weight [m, n]: with `[tau_1 ... tau_T] = U S [V_1 ... V_T]` the singular
value decomposition of the task vectors side by side, U [m, k] is a basis in which the updates of all experts are
aligned. The coordinates `S V_i` [k, n] are trimmed and elected as in `ties`, and the result is rotated back by U.
The default density, scale and the mean of the agreeing entries are those of the authors' configuration for vision.

The tensors that are not weights of linear layers: LoRA does not change them, and the authors' code leaves them at the
base (`--rest base`).

Deviations: the share of entries kept is counted in each weight, as in Panariello et al.'s code of the method
(arXiv 2509.17786); the authors' code counts it over the whole model. Singular values below 1e-5 of the largest count
as missing; theirs drops those below 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from modelmerge.methods import cores, linalg, work
from modelmerge.methods.contract import Citation, Context, Tensor, matrix_method, measured_at_once
from modelmerge.methods.merge import ties
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of KnOTS."""

    density: float = option(0.2, "Share of the coordinates that is kept.", above=0.0, maximum=1.0)
    scale: float = option(0.6, "Factor on the merged task vector.", varies="tensor", linear=True)
    reduce: Literal["sum", "mean"] = option("mean", "What becomes of the coordinates that agree in sign.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    core = cores.of(taus, context, right=False)
    basis = linalg.joint_left_vectors(core.taus).float()
    coordinates = torch.stack([basis.T @ tau for tau in core.taus])
    trim = ties.Options(density=options.density, scale=1.0, reduce=options.reduce, trim_scope="tensor")
    if not coordinates.numel():  # nothing has changed
        return torch.zeros_like(taus[0])
    moments = ties.METHOD.moments(trim, {})
    limits = moments and measured_at_once(moments, coordinates.flatten(1), coordinates[0].flatten())
    merged = basis @ ties.apply(coordinates, trim, replace(context, measured=limits))
    return core.whole(merged).mul_(options.scale)


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    smaller = min(m, tasks * n)
    basis = work.triplets(m, tasks * n, m if m > tasks * n else 0)
    trim = work.Work(moved=100.0 * tasks * smaller * n)  # which counts how many entries are above each of many limits
    return basis + work.product(smaller, m, n) * tasks + trim + work.product(m, smaller, n)


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2410.19735",
    citation=Citation("Model merging with SVD to tie the Knots", "George Stoica and others", "ICLR 2025"),
    wants_base=True,
    workspace=lambda options, tasks: 8.0 * tasks + 16.0,
    work=_work,
    work_of_products=work.through_cores(_work, right=False),
)
