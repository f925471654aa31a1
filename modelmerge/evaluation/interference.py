"""How task vectors get in one another's way, as numbers: the statistics of the papers, torch in, numbers out.

Shapes: T experts' task vectors of a tensor, [T, *shape]; of a matrix, [T, m, n]; `merge` is one more task vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelmerge.methods import apgd, linalg, presence
from modelmerge.methods.contract import Context
from modelmerge.methods.cores import Pair
from modelmerge.methods.merge import apgd as merge_apgd
from modelmerge.methods.transform import awd

Pairs = Sequence[Pair | None]  # factors [m, r] and [r, n], where they are known

# Of the merged matrix, so much may lie outside of the subspace that counts as its own (Marczak et al.).
SUBSPACE_ERROR = 0.05


def sign_counts(taus: Tensor) -> Tensor:
    """What the signs of [T, *shape] say, int64 [4].

    Entries that some expert changed; of these, those with both signs; changes (an entry of an expert that is not
    zero); of these, those with the sign that fewer experts have at that entry, in a draw one of the two. Sign
    conflicts: TIES-Merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708).
    """
    up = (taus > 0).sum(0, dtype=torch.int32)
    down = (taus < 0).sum(0, dtype=torch.int32)
    fewer = torch.minimum(up, down)
    both = (fewer > 0).sum()
    return torch.stack([((up + down) > 0).sum(), both, up.sum() + down.sum(), fewer.sum()])


def expected_rounding(values: Tensor, dtype: torch.dtype) -> float:
    """The squared distance that rounding to a 16-bit dtype put between values like these and the exact ones, expected.

    A value is rounded to a grid whose step is fixed by its exponent; the error is taken as even over a step, whose
    variance is step^2 / 12 (Bennett 1948). Where changes are much smaller than a step that is too much, for most
    values then stay where they were.
    """
    digits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    smallest = {torch.float16: -13, torch.bfloat16: -125}[dtype]  # exponent of the smallest normal number
    exponents = torch.where(values == 0, smallest, torch.frexp(values).exponent.clamp(min=smallest)) - digits
    return float(torch.pow(4.0, exponents.double()).sum()) / 12.0


def subspace_alignment(taus: Tensor, merge: Tensor, factors: Pair | None = None) -> Tensor:
    """The subspace alignment ratio of each of [T, m, n] with `merge` [m, n], float64 [T]; NaN for a zero matrix.

    `factors`: those of `merge`, [m, r] and [r, n], where they are known.

    `||P tau_i|| / ||tau_i||`, P the projection on the first k left singular vectors of `merge`, as few as leave no
    more than 5 % of its norm outside (Marczak et al., ICML 2025, arXiv 2502.04959).
    """
    norms = torch.linalg.vector_norm(taus, dim=(1, 2), dtype=torch.float64)
    basis, values, _ = linalg.leading_triplets(merge, min(merge.shape), factors)
    if not len(values):
        return torch.full_like(norms, torch.nan)
    squares = values.square()
    outside = squares.sum() - squares.cumsum(0)
    rank = int((outside > SUBSPACE_ERROR**2 * squares.sum()).sum()) + 1
    basis = basis[:, :rank].T.to(taus.dtype).contiguous()
    inside = torch.stack([torch.linalg.vector_norm(basis @ tau, dtype=torch.float64) for tau in taus])
    return inside / norms


def singular_interference(taus: Tensor, factors: Pairs) -> tuple[float, float]:
    """The singular task interference of [T, m, n], as published, and as a share of the sum of singular values.

    `||(U^T U - I) S (V V^T - I)||_1` over all entries: U [m, k], S and V [k, n] are the first min(m, n) / T singular
    triplets of each task vector, side by side; zero where all are orthogonal (Gargiulo et al., CVPR 2025, arXiv
    2412.00081). Directions that a task vector lacks take no part (`linalg.SUPPORT`). A task vector whose `factors`,
    [m, r] and [r, n], are known is decomposed through them.
    """
    rank = max(min(taus.shape[1:]) // len(taus), 1)
    triplets = [
        linalg.leading_triplets(tau, rank, pair) if pair else linalg.quick_triplets(tau, rank)
        for tau, pair in zip(taus, factors, strict=True)
        if bool(tau.any())
    ]
    if not triplets:
        return 0.0, 0.0
    u, s, v = (torch.cat(parts, dim=d) for parts, d in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True))
    identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
    crossing = ((u.T @ u - identity) * s) @ (v @ v.T - identity)
    interference = float(crossing.abs().sum())
    return interference, interference / float(s.sum())


def gap(taus: Tensor, merge: Tensor) -> float:
    """APGD's objective for any merged task vector: `sum_j ||<tau_j, merge - tau_j>||^2`, inner products by row.

    From [T, m, n] and [m, n]; in the optimiser's own terms, `merge` being a task with a factor of one and the
    others with none (Wei et al., ICML 2025, arXiv 2501.01230).
    """
    rows = apgd.rows_of(torch.cat([taus, merge[None]]))
    errors = apgd.targets(rows, [0.0] * len(taus) + [1.0])[:, : len(taus)]
    return float(errors.double().square().sum())


def apgd_gaps(taus: Tensor, base: Tensor, tensor: str, factors: Pairs) -> tuple[float, float]:
    """The gap where APGD starts from, `sum_i lambda_i tau_i`, and where its defaults arrive, for [T, m, n].

    `base` is `theta_0` [m, n]; `factors` are those of the task vectors, where they are known.
    """
    options = merge_apgd.Options()
    context = Context(tensor=tensor, weights=(1.0,) * len(taus), base=base.float(), factors=tuple(factors))
    present = presence.changed(taus, context)
    if not present:
        return 0.0, 0.0
    vectors = taus[list(present)]
    lambdas = apgd.task_lambdas(vectors, list(present.values()), [1.0] * len(present), options)
    start = torch.tensordot(torch.tensor(lambdas, dtype=taus.dtype, device=taus.device), vectors, dims=1)
    return gap(taus, start), gap(taus, merge_apgd.apply(taus, options, context))


def orthogonality(grams: Tensor) -> Tensor:
    """AWD's first term for each of the Gram matrices [G, T, T]: the mean |cosine| of two task vectors, float64 [G].

    Xiong et al., arXiv 2411.18729; its loss where nothing is taken out.
    """
    still = awd.Options(steps=0)
    return torch.stack([awd.solve(gram[None], still).losses[0] for gram in grams])
