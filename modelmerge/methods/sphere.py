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
from modelmerge.methods.sums import gram, weighted_sum

# Below this angle a great circle is a straight line, to float64's rounding.
_STRAIGHT = 1e-7
# Directions whose mean is shorter than this cancel, to the rounding of inner products of float32.
_CANCELLED = 1e-3
# The iteration ends at steps of this angle, or after so many of them.
_STILL, _STEPS = 1e-12, 100


def moments(taus: Tensor, base: Tensor) -> Tensor:
    """What `inner_products` needs to know of a block [T, n] and its base [n], flat."""
    return gram(torch.cat([base.to(taus.dtype)[None], taus])).flatten()


def inner_products(moments: Tensor, *, weights: bool) -> Tensor:
    """Inner products of the points `base + tau_i` (`weights`), or `tau_i`: float64 [T, T]."""
    count = math.isqrt(len(moments))
    products = moments.view(count, count)
    taus, cross = products[1:, 1:], products[0, 1:]
    return taus + cross[:, None] + cross + products[0, 0] if weights else taus


Mean = Callable[[Tensor, Sequence[float]], tuple[float, ...]]  # of inner products and weights that add up to one


def merged(taus: Tensor, context: Context, points: str, coefficients: Sequence[float]) -> Tensor:
    """The task vector of a combination of weights, or of task vectors, [T, *shape] -> [*shape]."""
    return combined(taus, context.base if points == "weights" else None, coefficients)


@functools.lru_cache(maxsize=64)  # every block of a tensor asks for the same
def mean_of(moments: tuple[float, ...], weights: tuple[float, ...], points: str, mean: Mean) -> tuple[float, ...]:
    """Coefficients of a mean of weights, or of task vectors; the plain one where nothing changed, to the last digit."""
    sums = torch.tensor(moments, dtype=torch.float64)
    shares = [weight / sum(weights) for weight in weights]
    if not bool(inner_products(sums, weights=False).any()):
        return tuple(shares)
    return mean(inner_products(sums, weights=points == "weights"), shares)


def combined(taus: Tensor, base: Tensor | None, coefficients: Sequence[float]) -> Tensor:
    """The task vector of `sum_i c_i p_i` of the points p_i, [T, *shape] -> [*shape].

    Coefficients beyond T come first and are of the base itself.
    """
    merged = weighted_sum(taus, coefficients[-len(taus) :])
    excess = math.fsum(coefficients) - 1.0
    # What is left of the base; not as a difference of weights, in which a small task vector would drown.
    return merged if base is None or abs(excess) < 1e-15 else merged.add_((base * excess).to(merged.dtype))


def between(products: Tensor, t: float) -> tuple[float, float]:
    """Coefficients of two points, of inner products [2, 2], for the share t of the way from the first to the second.

    Along a straight line where one of the points is zero, or they lie in one line with it.
    """
    norms = products.diagonal().sqrt()
    if not bool(norms.all()):
        return 1.0 - t, t
    angle = torch.arccos((products[0, 1] / norms.prod()).clamp(-1.0, 1.0))
    if float(angle.sin()) < _STRAIGHT:
        return 1.0 - t, t
    return float(((1.0 - t) * angle).sin() / angle.sin()), float((t * angle).sin() / angle.sin())


def direction(products: Tensor, weights: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of the points' weighted mean direction with their weighted mean length; `weights` add up to one.

    Their weighted mean where the directions cancel.
    """
    norms = products.diagonal().sqrt()
    alphas = torch.tensor(weights, dtype=torch.float64)
    units = torch.where(norms > 0, alphas / torch.where(norms > 0, norms, 1.0), 0.0)
    square = float(units @ products @ units)
    if square <= _CANCELLED**2:
        return tuple(weights)
    return tuple((float((alphas * norms).sum()) / square**0.5 * units).tolist())


def centre(products: Tensor, weights: Sequence[float]) -> tuple[float, ...]:
    """Coefficients of the points' Karcher mean with the points' mean length; `weights` add up to one.

    The direction is that from which the weighted logarithms of the points' directions add up to zero. A point of no
    length has no direction, but counts in the mean length.
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
    for _ in range(_STEPS):
        dots = (cosines @ at).clamp(-1.0, 1.0)
        angles = torch.arccos(dots)
        stretch = torch.where(angles.sin() > _STRAIGHT, angles / angles.sin(), 1.0) * alphas
        tangent = stretch - (stretch * dots).sum() * at
        step = float((tangent @ cosines @ tangent).clamp(min=0.0).sqrt())
        if step < _STILL:
            break
        at = _unit(math.cos(step) * at + math.sin(step) / step * tangent, cosines)
        assert at is not None, "a point of a great circle has length one"
    return tuple((length * at / safe).tolist())


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients of the same direction with length one; None if there is nothing left of it."""
    square = float(coefficients @ cosines @ coefficients)
    return coefficients / square**0.5 if square > _STRAIGHT**2 else None
