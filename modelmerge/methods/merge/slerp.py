"""Two models, a share of the way along the arc between them, not the chord.

Spherical linear interpolation (Shoemake, SIGGRAPH 1985), tensor by tensor: with the angle omega between the two,
`(sin((1 - t) omega) a + sin(t omega) b) / sin omega`. With two experts, from the first to the second; with one, from
the base to it. Of the weights themselves, as in mergekit, or of the task vectors (its nuslerp with a base model).

With two experts, --weight w_a and w_b shift the share to `t w_b / ((1 - t) w_a + t w_b)`: at `--t 0.5` they decide.
Deviation: mergekit's slerp goes straight where the cosine exceeds 0.9995, as it does between most fine-tuned models of
one base; here the arc is followed however short it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import sphere
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of slerp."""

    t: float = option(
        0.5, "Share of the way from the first model to the second.", minimum=0.0, maximum=1.0, varies="tensor"
    )
    points: Literal["weights", "task-vectors"] = option("weights", "What is interpolated.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[2, *shape] or [1, *shape] -> [*shape]: the task vector of the model on the way."""
    assert context.measured is not None
    coefficients = _coefficients(tuple(context.measured.tolist()), context.weights, options)
    return sphere.merged(taus, context, options.points, coefficients)


@functools.lru_cache(maxsize=64)  # every block of a tensor asks for the same
def _coefficients(moments: tuple[float, ...], weights: tuple[float, ...], options: Options) -> tuple[float, float]:
    sums = torch.tensor(moments, dtype=torch.float64)
    share = options.t
    if len(weights) == 1:  # from the base, as a model whose task vector is zero
        sums = sums.view(2, 2)
        sums = torch.stack([sums[0], torch.zeros(2), sums[1]])
        sums = torch.stack([sums[:, 0], torch.zeros(3), sums[:, 1]], dim=1).flatten()
    else:
        first, second = (1.0 - options.t) * weights[0], options.t * weights[1]
        share = second / (first + second) if first + second else options.t
    return sphere.between(sphere.inner_products(sums, weights=options.points == "weights"), share)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://doi.org/10.1145/325165.325242",
    citation=Citation("Animating rotation with quaternion curves", "Ken Shoemake", "SIGGRAPH 1985"),
    most_experts=2,
    normalises=True,
    wants_base=True,
    moments=lambda options: sphere.moments,
    workspace=lambda tasks: tasks + 4.0,
)
