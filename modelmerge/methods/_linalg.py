"""Leading singular subspaces of tall, wide and rank-deficient matrices, without a full SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def left_singular_vectors(x: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of x [m, n], float64 [m, rank], orthonormal to rounding.

    From the eigenvectors of the Gram matrix on the smaller side, in float64: a Gram matrix squares the condition
    number, which float32 cannot afford. Where x has fewer than `rank` singular values above rounding, the remaining
    columns are some orthonormal completion, as those of an SVD are.
    """
    x = x.double()
    m, n = x.shape
    if m <= n:
        return torch.linalg.eigh(x @ x.T).eigenvectors.flip(1)[:, :rank].contiguous()
    right = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :rank]
    # x v_k = s_k u_k: the columns are orthogonal already; QR normalises them and completes those with s_k = 0.
    return torch.linalg.qr(x @ right).Q


def left_singular_vectors_of_product(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of left @ right, [m, r] and [r, n], float64 [m, k], orthonormal.

    In O((m + n) r^2), from QR decompositions of both factors and the SVD of what is left between them, [r, r] at most;
    the product itself is never made. k is `rank`, or the product's rank where that is less: what an SVD of the product
    would complete the columns with has no meaning.
    """
    q, upper = torch.linalg.qr(left.double())
    lower = torch.linalg.qr(right.double().T).R.T
    u, values, _ = torch.linalg.svd(upper @ lower, full_matrices=False)
    largest = values[:1].sum()
    noise = largest * max(left.shape[0], right.shape[1]) * torch.finfo(torch.float64).eps
    found = int((values > noise).sum())
    return q @ u[:, : min(rank, found)]


def shared_subspace(taus: Sequence[Tensor], task_rank: int, shared_rank: int) -> Tensor:
    """Basis of the directions the tasks share, float64 [m, k] with k <= shared_rank, orthonormal.

    The first `task_rank` left singular vectors of each task vector [m, n], side by side; of that [m, T * task_rank],
    the first `shared_rank` left singular vectors (Wei et al., arXiv 2501.01230, and their code).
    """
    m = taus[0].shape[0]
    shared_rank = min(shared_rank, m, task_rank * len(taus))
    if shared_rank == 0:
        return taus[0].new_zeros((m, 0), dtype=torch.float64)
    bases = torch.cat([left_singular_vectors(tau, task_rank) for tau in taus], dim=1)
    return left_singular_vectors(bases, shared_rank)


def singular_values(x: Tensor) -> Tensor:
    """All singular values of x [m, n], largest first, float64 [min(m, n)]; those below 1e-8 of the first are noise."""
    x = x.double()
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0).sqrt()


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, rank] and [rank, n], float64, of the best approximation of x [m, n] of that rank (Eckart-Young).

    One factor has orthonormal columns or rows, on the smaller side; the other is x projected on them.
    """
    x = x.double()
    if x.shape[0] <= x.shape[1]:
        left = left_singular_vectors(x, rank)
        return left, left.T @ x
    right = left_singular_vectors(x.T, rank).T.contiguous()
    return x @ right.T, right


def remove_subspace(x: Tensor, basis: Tensor) -> Tensor:
    """`x - B (B^T x)`, in place: x [m, n] without its part in the span of the orthonormal basis B [m, k]."""
    return x.sub_(basis @ (basis.T @ x)) if basis.shape[1] else x
