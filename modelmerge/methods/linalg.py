"""Singular subspaces and polar factors of tall, wide and rank-deficient matrices, without a full SVD.

Everything goes through the float64 eigendecomposition of a Gram matrix on the smaller side. That squares the condition
number, which float64 can afford: singular values down to 1e-7 of the largest keep apart. For x [m, n] with s the
smaller side it costs 2 m n s + 9 s^3 FLOP, where a full SVD costs two to ten times as much. A decomposition cannot be
broken off: what takes several looks for a signal before each, so that one that nobody waits for any more ends soon.

What does not name T takes batches on a device, too: [B, m, n] for [m, n]. Singular triplets that one matrix would be
without are zero there, for those of a batch keep one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from modelmerge import interrupts
from modelmerge.methods import leading
from modelmerge.methods.contract import Tensor

# The polar factor by products: it pays for matrices that are no more oblong; powers that find the largest singular
# value, a factor that makes it an upper bound, and how far from orthonormal rows a factor may be.
_OBLONG, _POWERS, _ABOVE, _ORTHONORMAL = 8, 20, 1.1, 1e-9
_HALLEY = (6164.5, 18.445, 3.4475, 3.0005, 3.0)  # the weights a of its steps


def left_singular_vectors(x: Tensor, rank: int, *, refine: bool = False) -> Tensor:
    """The first `rank` left singular vectors of x [m, n], float64 [m, rank], orthonormal to rounding.

    From the eigenvectors of the Gram matrix on the smaller side, in float64: a Gram matrix squares the condition
    number, which float32 cannot afford. Where x has fewer than `rank` singular values above rounding, the remaining
    columns are some orthonormal completion, as those of an SVD are. With `refine`, those of a large matrix on a CPU
    come from float32 by `leading.refined` where that works, and their span is right to 1e-8.
    """
    interrupts.check()
    x = x.double()
    m, n = x.shape[-2:]
    gram = _gram(x if m <= n else x.mT)
    vectors = leading.refined(gram, rank) if refine else None
    if vectors is None:
        interrupts.check()
        vectors = (leading.by_products(gram, rank) or torch.linalg.eigh(gram))[1].flip(-1)[..., :rank]
    # x v_k = s_k u_k: the columns are orthogonal already; QR normalises them and completes those with s_k = 0.
    return vectors.contiguous() if m <= n else torch.linalg.qr(x @ vectors).Q


def _gram(x: Tensor) -> Tensor:
    """`x x^T`, [m, m] of x [m, n]; of large ones on a CPU one half by columns, and the other is its mirror image."""
    if x.dim() > 2 or x.device.type != "cpu" or len(x) < leading.LARGE:
        return x @ x.mT
    gram, width = x.new_empty(len(x), len(x)), -(-len(x) // 4)
    for first in range(0, len(x), width):
        stop = first + width
        gram[first:, first:stop] = x[first:] @ x[first:stop].T
        gram[first:stop, stop:] = gram[stop:, first:stop].T
    return gram


def left_singular_vectors_of_product(left: Tensor, right: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of left @ right, [m, r] and [r, n], float64 [m, k], orthonormal.

    In O((m + n) r^2), from QR decompositions of both factors and the SVD of what is left between them, [r, r] at most;
    the product itself is never made. k is `rank`, or the product's rank where that is less: what an SVD of the product
    would complete the columns with has no meaning.
    """
    q, upper = torch.linalg.qr(left.double())
    lower = torch.linalg.qr(right.double().mT).R.mT
    u, values, _ = torch.linalg.svd(upper @ lower, full_matrices=False)
    noise = values[..., :1] * max(left.shape[-2], right.shape[-1]) * torch.finfo(torch.float64).eps
    if u.dim() > 2:
        return q @ (u * (values > noise)[..., None, :])[..., :rank]
    return q @ u[:, : min(rank, int((values > noise).sum()))]


def shared_subspace(
    taus: Tensor | Sequence[Tensor],
    task_rank: int,
    shared_rank: int,
    factors: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    *,
    approximate: bool = False,
) -> Tensor:
    """Basis of the directions the tasks share, float64 [m, k] with k <= shared_rank, orthonormal.

    The first `task_rank` left singular vectors of each task vector [m, n], side by side; of that [m, T * task_rank],
    the first `shared_rank` left singular vectors (Wei et al., arXiv 2501.01230, and their code). A task vector whose
    `factors` are known is decomposed through them, and gives no more directions than it has. With `approximate`, large
    matrices go through `leading.iterated`: at 768 x 768 the decompositions take longer than all else that APGD does, at
    4096 ten seconds each.
    """
    if min(task_rank, shared_rank) == 0:
        return taus[0].new_zeros((*taus[0].shape[:-1], 0), dtype=torch.float64)

    def directions(x: Tensor, rank: int) -> Tensor:
        if approximate and leading.iterates(x.shape, rank):
            return leading.leading_directions(x.float(), rank, 3)
        return left_singular_vectors(x, rank, refine=True)

    bases = [
        left_singular_vectors_of_product(*pair, task_rank) if pair else directions(tau, task_rank)
        for tau, pair in zip(taus, factors or [None] * len(taus), strict=True)
    ]
    beside = torch.cat(bases, dim=-1)
    rank = min(shared_rank, *beside.shape[-2:])
    if approximate and leading.iterates(beside.shape, rank):
        # Started among the m rows: the signs of the columns, which differ by library and device, then do not matter.
        return leading.iterated(beside.mT.float(), rank, 3)[2].mT.contiguous()
    return left_singular_vectors(beside, rank, refine=True)


def singular_values(x: Tensor) -> Tensor:
    """All singular values of x [m, n], largest first, float64 [min(m, n)]; those below 1e-8 of the first are noise."""
    interrupts.check()
    x = x.double()
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0.0).sqrt()


def spectral_norm(x: Tensor) -> Tensor:
    """The largest singular value of x [m, n], float64 scalar."""
    return singular_values(x)[..., 0]


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


# Singular values below this share of the largest are rounding of stored weights, or the missing directions of a
# low-rank update: they carry no direction.
SUPPORT = 1e-5


def leading_triplets(
    x: Tensor, rank: int, factors: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular triplets of x [m, n]: U [m, k], s [k] and V [k, n], float64, at most `rank` of them.

    Fewer where x has fewer singular values that count (`SUPPORT`): k is 0 for a zero matrix. Where x is known to be
    the product of factors [m, r] and [r, n], x itself is not looked at: 4 (m + n) r^2 FLOP.
    """
    if factors is not None and factors[0].shape[-1] < min(x.shape[-2:]):
        (outer, left), (across, right) = (torch.linalg.qr(f.double()) for f in (factors[0], factors[1].mT))
        inner, s, last = torch.linalg.svd(left @ right.mT)
        s, inner, last = _that_count(s[..., :rank], inner[..., :rank], last.mT[..., :rank])
        return outer @ inner, s, last.mT @ across.mT
    x = x.double()
    if x.shape[-2] > x.shape[-1]:
        right, s, left = leading_triplets(x.mT, rank)
        return left.mT, s, right.mT
    s, left = _eigen(x @ x.mT, rank)
    return left, s, (left.mT @ x).div_(_divisor(s)[..., None])


def quick_triplets(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """`leading_triplets`, but by subspace iteration where that is quicker: large matrices, ranks small beside them.

    Iterated, the triplets keep all but some 1e-4 of the squared norm that the best ones of that rank keep.
    """
    if not leading.iterates(x.shape, rank):
        return leading_triplets(x, rank)
    left, s, right = leading.iterated(x, rank)
    s, left, right = _that_count(s, left, right.mT)
    return left, s, right.mT


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor `U V^T` of x [m, n] over its singular directions, and their mean singular value, float64.

    The orthogonal matrix nearest to x where x has full rank; else the partial isometry that leaves out the missing
    directions (`SUPPORT`), which an SVD would fill in at random. On a device, what has full rank goes through products.
    """
    x = x.double()
    wide = x.shape[-2] <= x.shape[-1]
    if x.device.type != "cpu" and max(x.shape[-2:]) <= _OBLONG * min(x.shape[-2:]):
        rows = x if wide else x.mT
        factor, sound = polar_by_products(rows)
        if bool(sound.all()):
            return (factor if wide else factor.mT), torch.linalg.vecdot(factor, rows).mean(-1)
        del factor
    s, vectors = _eigen(x @ x.mT if wide else x.mT @ x, min(x.shape[-2:]))
    whitened = (vectors / _divisor(s)[..., None, :]) @ vectors.mT
    return (whitened @ x if wide else x @ whitened), s.sum(-1) / (s > 0).sum(-1).clamp(min=1)


def polar_by_products(x: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor of x [m, n], m <= n, float64, and whether it is one: not where a direction is missing.

    By Halley's iteration with weights for singular values down to `SUPPORT`, each step through a Cholesky factor of
    `1 + c x x^T` (Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 2010; Nakatsukasa and Higham, SIAM J. Sci.
    Comput. 2013). Five steps, 22 m^3 FLOP for a square, where an eigendecomposition has 9 m^3, but at less than 3 % of
    an H100's rate (Wang et al., arXiv 2410.02170). Within 1e-9 of the exact factor, relative.
    """
    gram, vector = x @ x.mT, torch.randn(x.shape[-2], 1, generator=torch.Generator().manual_seed(0)).to(x)
    for _ in range(_POWERS):
        vector = torch.nn.functional.normalize(gram @ vector, dim=-2)
    square = vector.mT @ gram @ vector  # of the largest singular value: a little less
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    full = torch.linalg.cholesky_ex(gram - SUPPORT**2 * square * eye).info == 0
    gram, factor = gram.div_(_ABOVE**2 * square), x / (_ABOVE * square.sqrt())
    for a in _HALLEY:  # x (a + b x^2) / (1 + c x^2), with b and c so that 1 stays 1
        b, c = (a - 1.0) ** 2 / 4.0, (a - 1.0) * (a + 3.0) / 4.0
        step = torch.cholesky_solve(factor, torch.linalg.cholesky_ex(gram.mul_(c).add_(eye)).L)
        factor = factor.mul_(b / c).add_(step, alpha=a - b / c)
        gram = torch.matmul(factor, factor.mT, out=gram)
    return factor, full & (gram.sub_(eye).abs().amax((-2, -1)) < _ORTHONORMAL)


def nearest_orthogonal(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The orthogonal matrices nearest to U_i [m, k_i] side by side, and to V_i [k_i, n] below one another."""
    return polar(torch.cat(list(lefts), dim=-1))[0], polar(torch.cat(list(rights), dim=-2))[0]


def joint_left_vectors(taus: Tensor) -> Tensor:
    """The left singular vectors of task vectors [T, m, n] side by side, float64 [m, k], without the missing ones."""
    tasks, m, n = taus.shape
    if m > tasks * n:
        return leading_triplets(torch.cat(list(taus), dim=1), m)[0]
    gram = taus.new_zeros((m, m), dtype=torch.float64)
    for tau in taus:
        interrupts.check()
        wide = tau.double()
        gram.addmm_(wide, wide.T)
    return _eigen(gram, m)[1]


def _eigen(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first singular values behind a Gram matrix, [k], and its eigenvectors [s, k]: those that count."""
    interrupts.check()
    squares, vectors = leading.by_products(gram, rank) or torch.linalg.eigh(gram)
    # Copies: views would keep all the vectors in memory.
    squares, vectors = (each[..., max(each.shape[-1] - rank, 0) :].flip(-1) for each in (squares, vectors))
    s, vectors = _that_count(squares.clamp(min=0.0).sqrt(), vectors)
    return s, vectors


def _that_count(s: Tensor, *sides: Tensor) -> list[Tensor]:
    """Singular values [k] and vectors [m, k], without those that do not count (`SUPPORT`)."""
    counting = s > SUPPORT * s[..., :1]
    if s.dim() > 1:
        return [s * counting, *(side * counting[..., None, :] for side in sides)]
    count = int(counting.sum())
    return [each[..., :count] for each in (s, *sides)]


def _divisor(s: Tensor) -> Tensor:
    """Singular values, to divide by: 1 where there is none."""
    return s + (s == 0)


def through_eigenvalues(x: Tensor, gram: Tensor, factors: Callable[[Tensor], Tensor]) -> Tensor:
    """`x V diag(f) V^T` of x [m, k] and the Gram matrix V diag(l) V^T [k, k], float64; `factors(l)` are f, l rising."""
    interrupts.check()
    values, vectors = torch.linalg.eigh(gram)
    return (x @ vectors).mul_(factors(values)[..., None, :]) @ vectors.mT


def factor_in_place(x: Tensor, width: int = 4096) -> None:
    """The Cholesky factor of x [k, k] in place of its lower triangle; what is above means nothing any more."""
    for first in range(0, len(x), width):
        interrupts.check()
        stop = first + width
        block, below, rest = x[first:stop, first:stop], x[stop:, first:stop], x[stop:, stop:]
        block.copy_(torch.linalg.cholesky(block))
        if len(below):
            below.copy_(torch.linalg.solve_triangular(block, below.T, upper=False).T)
            rest.addmm_(below, below.T, alpha=-1.0)


def balanced(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [m, rank] and [rank, n] of the best approximation of x [m, n], float64, neither larger than the other.

    Each has the square roots of the singular values. Where the rank is small beside x, the best is found by subspace
    iteration, to a relative loss of some 1e-4 of the squared norm that is kept.
    """
    if leading.iterates(x.shape, rank):
        u, values, v = leading.iterated(x, rank)
        roots = values.sqrt()
        return u * roots, roots[:, None] * v
    left, right = low_rank(x, rank)
    wide = x.shape[0] <= x.shape[1]
    values = torch.linalg.vector_norm(right, dim=1) if wide else torch.linalg.vector_norm(left, dim=0)
    roots = values.sqrt()
    inverse = torch.where(roots > 0, 1 / roots, 0.0)
    return (left * roots, right * inverse[:, None]) if wide else (left * inverse, right * roots[:, None])
