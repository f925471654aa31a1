"""Means on a sphere of whole tensors, through the inner products of the few points that span them.

The points are the experts' weights `theta_0 + tau_i`, or the task vectors themselves. Whatever moves along great
circles between them stays in their span: T coefficients stand for a tensor, and the inner products of base and task
vectors are all that is needed to find them. Of points close to one another they tell the angles better than the inner
products of the points themselves would, which are all nearly the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch

from modelmerge.methods.contract import Context, Tensor
from modelmerge.methods.sums import combined, gram

# Below this angle a great circle is a straight line, to float64's rounding.
_STRAIGHT = 1e-7
# Directions whose mean is shorter than this cancel, to the rounding of inner products of float32.
_CANCELLED = 1e-3


def moments(taus: Tensor, base: Tensor) -> Tensor:
    """What `inner_products` needs to know of a block [T, n] and its base [n], flat."""
    return gram(torch.cat([base.to(taus.dtype)[None], taus])).flatten()


def inner_products(moments: Tensor, *, weights: bool) -> Tensor:
    """Inner products of the points `base + tau_i` (`weights`), or `tau_i`, of moments [..., k]: float64 [..., T, T]."""
    count = math.isqrt(moments.shape[-1])
    products = moments.view(*moments.shape[:-1], count, count)
    taus, cross = products[..., 1:, 1:], products[..., 0, 1:]
    return taus + cross[..., :, None] + cross[..., None, :] + products[..., :1, :1] if weights else taus


Mean = Callable[..., tuple[float, ...]]  # of inner products, the points' weights, and what else it takes


def merged(taus: Tensor, context: Context, points: str, coefficients: Sequence[float]) -> Tensor:
    """The task vector of a combination of weights, or of task vectors, [T, *shape] -> [*shape]."""
    return combined(taus, context.base if points == "weights" else None, coefficients)


@functools.lru_cache(maxsize=64)  # every block of a tensor asks for the same
def mean_of(
    moments: tuple[float, ...], weights: tuple[float, ...], points: str, mean: Mean, *more: float
) -> tuple[float, ...]:
    """Coefficients of a mean of weights, or of task vectors; the plain one where nothing changed, to the last digit."""
    sums = torch.tensor(moments, dtype=torch.float64)
    if not bool(inner_products(sums, weights=False).any()):
        return weights
    return mean(inner_products(sums, weights=points == "weights"), weights, *more)


def between(products: Tensor, t: float, straight_above: float = 1.0, *, upright: bool = False) -> Tensor:
    """Coefficients [..., 2] of two points, of inner products [..., 2, 2], for the share t of the way between them.

    Along a straight line where the points lie in one line with zero, or the size of their angle's cosine is above
    `straight_above`. A point of no length lies in one line with any other, or at a right angle to it (`upright`).
    """
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt().prod(-1)
    nothing = lengths == 0
    cosines = (products[..., 0, 1] / torch.where(nothing, 1.0, lengths)).clamp(-1.0, 1.0)
    angles = torch.arccos(torch.where(nothing, 0.0 if upright else 1.0, cosines))
    straight = (angles.sin() < _STRAIGHT) | ((cosines.abs() > straight_above) & ~nothing)
    ways = torch.tensor([1.0 - t, t], dtype=products.dtype, device=products.device)
    arcs = (ways * angles[..., None]).sin() / torch.where(straight, 1.0, angles.sin())[..., None]
    return torch.where(straight[..., None], ways, arcs)


def direction(products: Tensor, weights: Sequence[float], soften: float) -> tuple[float, ...]:
    """Coefficients of the direction of the points' weighted directions, as long as the weighted sum of their lengths.

    Their weighted sum where the directions cancel. `soften` is added to the lengths that points are divided by, and the
    result goes so far along a tangent of no length.
    """
    norms = products.diagonal().sqrt()
    alphas = torch.tensor(weights, dtype=torch.float64)
    units = torch.where(norms > 0, alphas / torch.where(norms > 0, norms + soften, 1.0), 0.0)
    square = float(units @ products @ units)
    if square <= max(_CANCELLED * float(alphas.abs().sum()), soften) ** 2:
        return tuple(weights)
    return tuple((float((alphas * norms).sum()) * math.cos(soften) / square**0.5 * units).tolist())


def centre(products: Tensor, weights: Sequence[float], steps: int, tolerance: float) -> tuple[float, ...]:
    """Coefficients of the points' Karcher mean with the points' mean length; `weights` add up to one.

    The direction is that from which the weighted logarithms of the points' directions add up to zero. A point of no
    length has no direction, but counts in the mean length. It is sought in so many steps at most; one of an angle
    within the tolerance is the last, and a direction within it pulls no more.
    """
    norms = products.diagonal().sqrt()
    alphas = torch.tensor(weights, dtype=torch.float64)
    length = float((alphas * norms).sum())
    alphas = torch.where(norms > 0, alphas, 0.0)
    if float(alphas.sum()) == 0.0:
        return (0.0,) * len(norms)
    alphas = alphas / alphas.sum()
    safe = torch.where(norms > 0, norms, 1.0)
    cosines = products / safe[:, None] / safe[None, :]
    at = _unit(alphas, cosines)
    if at is None:  # the directions cancel: any is as good
        at = torch.nn.functional.one_hot(alphas.argmax(), len(alphas)).double()
    for _ in range(steps):
        dots = (cosines @ at).clamp(-1.0, 1.0)
        angles = torch.arccos(dots)
        stretch = torch.where(angles.sin() > _STRAIGHT, angles / angles.sin(), 1.0) * alphas * (angles >= tolerance)
        tangent = stretch - (stretch * dots).sum() * at
        step = float((tangent @ cosines @ tangent).clamp(min=0.0).sqrt())
        if step <= tolerance:
            break
        at = _unit(math.cos(step) * at + math.sin(step) / step * tangent, cosines)
        assert at is not None, "a point of a great circle has length one"
    return tuple((length * at / safe).tolist())


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients of the same direction with length one; None if there is nothing left of it."""
    square = float(coefficients @ cosines @ coefficients)
    return coefficients / square**0.5 if square > _STRAIGHT**2 else None
