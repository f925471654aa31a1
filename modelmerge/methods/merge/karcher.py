"""Mean of any number of models on the sphere: directions by their Karcher mean, lengths by their mean.

The Karcher (Frechet) mean of directions is the one whose squared angles to them, weighted by --weight, add up to least
(Grove and Karcher, 1973); for two models it is half the way of slerp. Tensor by tensor, of the weights themselves, as
in mergekit's karcher, or of the task vectors, which its multislerp approximates by one step. The iteration runs on the
inner products of the models until it stands still: two passes over the tensor however many steps it takes. mergekit
ends after ten steps, or at one below 1e-5, which is the same mean but for models that lie far apart.
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
    """Options of the Karcher mean."""

    points: Literal["weights", "task-vectors"] = option("weights", "What is averaged.")
    steps: int = option(100, "The most steps of the iteration.", minimum=0)
    tolerance: float = option(1e-12, "The angle below which a step is the last.", minimum=0.0)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the task vector of the mean."""
    assert context.measured is not None
    moments = tuple(context.measured.tolist())
    shares = tuple(weight / sum(context.weights) for weight in context.weights)
    end = (options.steps, options.tolerance)
    coefficients = sphere.mean_of(moments, shares, options.points, sphere.centre, *end)
    return sphere.merged(taus, context, options.points, coefficients)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://doi.org/10.1007/BF01425453",
    citation=Citation(
        "How to conjugate C1-close group actions",
        "Karsten Grove and Hermann Karcher",
        "Mathematische Zeitschrift 132, 1973",
    ),
    normalises=lambda options: True,
    wants_base=True,
    on_weights=lambda options: options.points == "weights",
    moments=lambda options, each: summed(sphere.moments),
    work=by_entry(60.0),
    workspace=lambda options, tasks: tasks + 4.0,
)
