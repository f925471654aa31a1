"""Weighted mean of the models' directions, as long as they are on average.

Multi-SLERP (Goddard, 2025): barycentric interpolation on the sphere, tensor by tensor. Each model is brought to length
one; the direction of the sum, weighted by --weight, has the weighted mean of the lengths. That is the first step of
the Karcher mean (`karcher`), which goes on until it stands still. Of the task vectors, as in mergekit's multislerp with
a base model, or of the weights themselves (without one).

mergekit adds the mean of the tangents at that direction, which is zero by construction, and to each length 1e-8 before
it divides (`--soften`). Deviation: where the directions cancel, it ends in an error for more than two models; here the
result is the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelmerge.methods import sphere
from modelmerge.methods.contract import Citation, Context, Method, Tensor, summed
from modelmerge.methods.options import option
from modelmerge.methods.work import by_entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Multi-SLERP."""

    points: Literal["weights", "task-vectors"] = option("task-vectors", "What is averaged.")
    reduce: Literal["sum", "mean"] = option("mean", "Take the mean of the lengths by the weights, or add them up.")
    soften: float = option(
        0.0, "Added to the length that a model is divided by; in mergekit 1e-8.", minimum=0.0, varies="tensor"
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the task vector of the mean."""
    assert context.measured is not None
    moments = tuple(context.measured.tolist())
    total = sum(context.weights) if options.reduce == "mean" else 1.0
    weights = tuple(weight / total for weight in context.weights)
    coefficients = sphere.mean_of(moments, weights, options.points, sphere.direction, options.soften)
    return sphere.merged(taus, context, options.points, coefficients)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    citation=Citation("Multi-SLERP", "Charles Goddard", "goddard.blog 2025"),
    normalises=lambda options: options.reduce == "mean",
    wants_base=True,
    on_weights=lambda options: options.points == "weights",
    moments=lambda options, each: summed(sphere.moments),
    work=by_entry(50.0),
    workspace=lambda options, tasks: tasks + 4.0,
)
