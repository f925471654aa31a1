"""How much a method has to do on a matrix: what a plan tells the time from, and units their cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What each kind takes beside a FLOP of a float32 product, on machines that have been measured: for costs that are only
# compared with one another.
_USUAL = (1.0, 2.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True)
class Work:
    """Operations by their kinds, which machines do at unlike rates.

    Args:
        single: FLOP of float32 products.
        double: The same in float64, and of factorisations that are made of products.
        eigen: FLOP of float64 eigendecompositions, 9 k^3 each.
        moved: Bytes that are read or written by what is bound by memory.
    """

    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0
    moved: float = 0.0

    @property
    def parts(self) -> tuple[float, float, float, float]:
        """The amounts of each kind; `dataclasses.astuple` copies deeply, which is a second for 40,000 tensors."""
        return self.single, self.double, self.eigen, self.moved

    def __add__(self, other: Work) -> Work:
        return Work(*(one + two for one, two in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(part * times for part in self.parts))

    def seconds(self, rates: Work) -> float:
        """How long it takes where so much of each kind is done in a second."""
        return sum(part / rate for part, rate in zip(self.parts, rates.parts, strict=True))

    @property
    def cost(self) -> float:
        """How much it is beside others, in FLOP of float32 products."""
        return sum(part * factor for part, factor in zip(self.parts, _USUAL, strict=True))


NOTHING = Work()


def by_entry(nbytes: float) -> Callable[[Any, int, int, int], Work]:
    """What moves so many bytes for each entry of each task vector, beside what makes these and adds them up."""
    return lambda options, m, n, tasks: Work(moved=nbytes * tasks * m * n)


def product(m: int, k: int, n: int) -> Work:
    """A float32 product [m, k] times [k, n]."""
    return Work(single=2.0 * m * k * n)


def fine_product(m: int, k: int, n: int) -> Work:
    """The same in float64."""
    return Work(double=2.0 * m * k * n)


def eigen(k: int) -> Work:
    """All eigenvectors of [k, k], in float64."""
    return Work(eigen=9.0 * k**3)


def triplets(m: int, n: int, rank: int) -> Work:
    """`linalg.leading_triplets`, and all other decompositions of [m, n] by a Gram matrix on the smaller side."""
    k, g = sorted((m, n))
    return fine_product(k, g, k) + eigen(k) + fine_product(rank, k, g) + Work(moved=12.0 * m * n)


def spectral_norm(m: int, n: int) -> Work:
    """`linalg.spectral_norm`: eigenvalues take a third of what eigenvectors do."""
    k, g = sorted((m, n))
    return fine_product(k, g, k) + eigen(k) * 0.3


def iterated(m: int, n: int, rank: int) -> Work:
    """`leading.iterated`, three times."""
    return (product(m, n, rank) * 2.0 + Work(double=4.0 * m * rank**2)) * 3.0 + Work(double=8.0 * n * rank**2)


def polar(m: int, n: int) -> Work:
    """`linalg.polar`: a decomposition, and two products."""
    k, g = sorted((m, n))
    return triplets(m, n, 0) + fine_product(k, k, k) + fine_product(k, k, g)


def through_eigenvalues(m: int, k: int) -> Work:
    """`linalg.through_eigenvalues` of [m, k]."""
    return eigen(k) + fine_product(m, k, k) * 2.0


def spectra(m: int, n: int, tasks: int) -> Work:
    """All singular values of each of [T, m, n]."""
    return triplets(m, n, 0) * tasks


def through_cores(
    does: Callable[[Any, int, int, int], Work],
    beside: Callable[[Any, int, int], Work] = lambda options, m, n: NOTHING,
    *,
    left: bool = True,
    right: bool = True,
) -> Callable[[Any, int, int, int, int], Work]:
    """What `does` takes of [T, m, n], where task vectors that are products of k directions go through it as cores.

    `beside` is what looking at the weight [m, n] takes. `left` and `right`: the sides that become as short as that.
    """

    def of_products(options: Any, m: int, n: int, tasks: int, k: int) -> Work:
        whole = product(m, k, n) * 2.0 + Work(moved=16.0 * m * n * tasks)  # made, and made again of what comes out
        whole += beside(options, m, n)
        shape = min(m, k) if left else m, min(n, k) if right else n
        # Bases of the directions: QR of narrow matrices, at a fifth of a product's rate.
        return does(options, *shape, tasks) + Work(double=40.0 * (m + n) * k**2) + whole

    return of_products
