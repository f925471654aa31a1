"""The first of many singular directions: of a large matrix, they are found quicker than all.

By subspace iteration, which finds most of what they hold (`iterated`); or to rounding: on a CPU by float32 that float64
corrects (`refined`), on a device by products alone (`by_products`). Both give None where they do not pay or fail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelmerge import interrupts
from modelmerge.methods.contract import Tensor
from modelmerge.methods.products import multiplier

# Subspace iteration: vectors beyond the rank, the side from which on it pays, the gain in the squared norm that is kept
# below which it stops, and a bound on the iterations.
_SPARE, LARGE, _GAIN, _ITERATIONS = 16, 512, 1e-4, 20
# Leading eigenvectors by products on a device: products in a round, rounds, how far off they may be in units of the
# last eigenvalue, and from where on nothing comes of it.
_PRODUCTS, _ROUNDS, _SETTLED, _LOST = 16, 6, 2e-9, 0.3
# Vectors of float32: the share of the largest eigenvalue that theirs have to have, how far off they may be, how near
# they are brought, and in how many corrections.
_FLAT, _NEAR, _EXACT, _CORRECTIONS = 2e-3, 3e-3, 1e-9, 3


def iterates(shape: Sequence[int], rank: int) -> bool:
    """Whether subspace iteration pays for so many singular vectors of such a matrix."""
    return min(shape[-2:]) >= max(LARGE, 4 * (rank + _SPARE))


def iterated(x: Tensor, rank: int, iterations: int = _ITERATIONS) -> tuple[Tensor, Tensor, Tensor]:
    """About the first `rank` singular triplets of x [m, n]: orthonormal U [m, rank], s [rank], V [rank, n], float64.

    By subspace iteration with a few more vectors (Halko et al., arXiv 0909.4061), from a fixed start that is the same
    on every device, until the squared norm that the subspace keeps grows by less than 1e-4 of itself. Three iterations
    hold 85 % of what the best subspace holds of white noise, and 98 % and more where singular values fall
    (tests/methods/test_linalg.py).
    """
    basis, start = _iterate(x, rank, iterations)
    right, upper = torch.linalg.qr(start.double())
    u, values, vh = torch.linalg.svd(upper.mT)
    return basis @ u[..., :rank], values[..., :rank], vh[..., :rank, :] @ right.mT


def leading_directions(x: Tensor, rank: int, iterations: int) -> Tensor:
    """The span of `iterated`'s U [m, rank], in float64 but orthonormal to the rounding of x, in half the time.

    What the products have rounded away already no decomposition brings back, and neither s nor V is asked for.
    """
    basis, start = _iterate(x, rank, iterations, quick=True)
    start = start.double()
    return basis.double() @ torch.linalg.eigh(start.mT @ start).eigenvectors.flip(-1)[..., :rank]


def _iterate(x: Tensor, rank: int, iterations: int, *, quick: bool = False) -> tuple[Tensor, Tensor]:
    """Orthonormal directions Q [m, k] that hold most of x [m, n], and `x^T Q` [n, k]; k is a few more than the rank.

    Q is float64; with `quick`, of the precision of x.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape[-1], rank + _SPARE, generator=generator).to(x.device)
    forth, back = (multiplier(x), multiplier(x.mT)) if quick else (x.__matmul__, x.mT.__matmul__)
    kept, precision = x.new_zeros((), dtype=torch.float64), x.dtype if quick else torch.float64
    for _ in range(iterations):
        interrupts.check()
        basis = torch.linalg.qr(forth(start.to(x.dtype)).to(precision)).Q  # [m, k]
        start = back(basis.to(x.dtype))  # [n, k]: x is basis @ start^T, but for what is not in the basis
        before, kept = kept, start.double().square().sum((-2, -1))
        if bool((kept - before <= _GAIN * kept).all()):
            break
    return basis, start


def refined(gram: Tensor, rank: int) -> Tensor | None:
    """The first `rank` eigenvectors of a Gram matrix, float64 [m, rank] of [m, m]; None where it does not pay or work.

    By float32, which takes half the time. What its vectors lack of being an invariant subspace shows in float64 to
    first order (Ogita and Aishima, Japan J. Indust. Appl. Math. 2018), and is added until the next is below 1e-9. A few
    more vectors keep those that are asked for well apart from the rest.
    """
    kept = rank + 2 * _SPARE
    if gram.dim() > 2 or gram.device.type != "cpu" or len(gram) < max(LARGE, 9 * kept // 2):
        return None
    gram = gram / gram.trace().clamp(min=torch.finfo(gram.dtype).tiny)
    single, start = gram.float(), torch.randn(len(gram), kept, generator=torch.Generator().manual_seed(0))
    sizes = torch.linalg.qr(single @ start, mode="r").R.diagonal().abs()  # about those of the eigenvalues
    if not sizes.min() > _FLAT * sizes.max():
        return None
    values, vectors = torch.linalg.eigh(single)
    rest, lead = vectors[:, :-kept], torch.linalg.qr(vectors[:, -kept:].double()).Q
    worst = 0.0
    for _ in range(_CORRECTIONS):
        image = gram @ lead
        ritz, turn = torch.linalg.eigh(lead.T @ image)
        lead, image = lead @ turn, image @ turn
        lacking = (rest.T @ (image - lead * ritz).float()) / (ritz - values[:-kept, None]).float()
        error = float(torch.linalg.vector_norm(lacking[:, -rank:]))
        worst = max(error, worst)  # what is no number stays so
        if not worst < _NEAR:
            return None
        lead = torch.linalg.qr(lead + rest @ lacking).Q
        if error * worst < _EXACT:
            return lead[:, -rank:].flip(-1)
    return None


def by_products(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The last eigenvalues [k], rising, and eigenvectors [s, k] of a Gram matrix on a device; None if that fails.

    Subspace iteration of twice as many vectors, which Cholesky factors make orthonormal: one to six rounds of some
    11 s^3 FLOP for an eighth of the directions, at the rate of products, where an eigendecomposition has 9 s^3 at less
    than 3 % of an H100's (Wang et al., arXiv 2410.02170). To residuals of 2e-9 of the least of these values. It fails
    where directions are missing, and is not tried for more than an eighth of them.
    """
    side, width = gram.shape[-1], 2 * rank + _SPARE
    if gram.device.type == "cpu" or side < LARGE or 4 * width > side + 4 * _SPARE:
        return None
    x = torch.randn(side, width, generator=torch.Generator().manual_seed(0), dtype=gram.dtype).to(gram.device)
    for _ in range(_ROUNDS):
        interrupts.check()
        for _ in range(_PRODUCTS):
            x = _orthonormal(gram @ x)
        x = _orthonormal(x)
        image = gram @ x
        values, turn = torch.linalg.eigh(x.mT @ image)
        x, values, vectors = x @ turn, values[..., -rank:], x @ turn[..., -rank:]
        lacking = torch.linalg.vector_norm(image @ turn[..., -rank:] - vectors * values[..., None, :], dim=-2)
        worst = float((lacking.amax(-1) / values[..., 0]).max())
        if worst <= _SETTLED:
            return values, vectors
        if not worst < _LOST:  # or no number
            break
    return None


def _orthonormal(x: Tensor) -> Tensor:
    """Columns [m, k] of the same span, orthonormal as far as one Cholesky factor makes them so."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(x.mT @ x).L.mT, x, upper=True, left=False)
