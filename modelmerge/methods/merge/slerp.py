"""Two models, a share of the way along the arc between them, not the chord.

Spherical linear interpolation (Shoemake, SIGGRAPH 1985): with the angle omega between the two,
`(sin((1 - t) omega) a + sin(t omega) b) / sin omega`. With two experts, from the first to the second; with one, from
the base to it. Of the weights themselves, as in mergekit's slerp, or of the task vectors (its nuslerp with a base
model); of each tensor as a whole, or of each row, column or line along the last axis.

With two experts, --weight w_a and w_b shift the share to `t w_b / ((1 - t) w_a + t w_b)`: at `--t 0.5` they decide.
Weights that add up to nothing there leave it at t. The arc is followed however short it is; mergekit's slerp goes
straight where the cosine is above 0.9995, as it is between most fine-tuned models of one base (`--straight-above`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import sphere
from modelmerge.methods.contract import Citation, Context, Method, Tensor, summed
from modelmerge.methods.options import option
from modelmerge.methods.sums import grams


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of slerp."""

    t: float = option(
        0.5, "Share of the way from the first model to the second; below 0 and above 1 beyond them.", varies="tensor"
    )
    points: Literal["weights", "task-vectors"] = option("weights", "What is interpolated.")
    scope: Literal["tensor", "row", "column", "line"] = option(
        "tensor", "What has an angle of its own: each tensor, row, column, or line along the last axis."
    )
    straight_above: float = option(
        1.0, "Size of the cosine above which the way is straight; in mergekit 0.9995.", minimum=0.0, maximum=1.0
    )
    zeros: Literal["straight", "right-angle"] = option(
        "straight", "The way from and to zeros: straight, or as at a right angle, as in mergekit."
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[2, *shape] or [1, *shape] -> [*shape]: the task vector of the model on the way."""
    if options.scope != "tensor":
        return _by_group(taus, options, context)
    assert context.measured is not None
    coefficients = _of_tensor(tuple(context.measured.tolist()), context.weights, options)
    return sphere.merged(taus, context, options.points, coefficients)


@functools.lru_cache(maxsize=64)  # every block of a tensor asks for the same
def _of_tensor(moments: tuple[float, ...], weights: tuple[float, ...], options: Options) -> tuple[float, ...]:
    return tuple(_coefficients(torch.tensor(moments, dtype=torch.float64), weights, options).tolist())


def _by_group(taus: Tensor, options: Options, context: Context) -> Tensor:
    """The same with an angle for each row, column or line; a vector is one of any."""
    assert context.base is not None
    axes = (0, -2) if options.scope == "line" else (1, -1)
    groups = [t.flatten(*axes) if t.ndim > 1 else t.reshape(1, -1) for t in (context.base.to(taus.dtype), *taus)]
    turned = options.scope == "column" and taus.ndim > 2
    base, *parts = [group.T if turned else group for group in groups]
    factors = _coefficients(grams([base, *parts]).flatten(1), context.weights, options)
    merged = sum(part * factor[:, None].to(part) for part, factor in zip(parts, factors.T[-len(parts) :], strict=True))
    assert isinstance(merged, torch.Tensor), "there is an expert"
    if options.points == "weights":
        merged.add_(base * (factors.sum(1, keepdim=True) - 1.0).to(base))
    return (merged.T if turned else merged).reshape(taus.shape[1:])


def _coefficients(moments: Tensor, weights: tuple[float, ...], options: Options) -> Tensor:
    """Of moments [..., k] the coefficients [..., 2] of the two models."""
    share = options.t
    if len(weights) == 1:  # from the base, as a model whose task vector is zero
        two = moments.new_zeros(*moments.shape[:-1], 3, 3)
        two[..., ::2, ::2] = moments.view(*moments.shape[:-1], 2, 2)
        moments = two.flatten(-2)
    else:
        first, second = (1.0 - options.t) * weights[0], options.t * weights[1]
        share = second / (first + second) if abs(first + second) > 1e-6 else options.t
    products = sphere.inner_products(moments, weights=options.points == "weights")
    return sphere.between(products, share, options.straight_above, upright=options.zeros == "right-angle")


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://doi.org/10.1145/325165.325242",
    citation=Citation("Animating rotation with quaternion curves", "Ken Shoemake", "SIGGRAPH 1985"),
    most_experts=2,
    wants_base=True,
    on_weights=lambda options: options.points == "weights",
    blockwise=lambda options: options.scope == "tensor",
    by_rows=lambda options: options.scope == "row",
    moments=lambda options, each: summed(sphere.moments) if options.scope == "tensor" else None,
    workspace=lambda options, tasks: tasks + 4.0,
)
