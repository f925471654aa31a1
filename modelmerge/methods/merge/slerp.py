"""Two models, a share of the way along the arc between them rather than the chord.

Spherical linear interpolation (Shoemake, SIGGRAPH 1985), tensor by tensor: with the angle omega between the two,
`(sin((1 - t) omega) a + sin(t omega) b) / sin omega`. With two experts, from the first to the second; with one, from
the base to it. Of the weights themselves, as in mergekit, or of the task vectors (its nuslerp with a base model).

With two experts, --weight w_a and w_b shift the share to `t w_b / ((1 - t) w_a + t w_b)`: at `--t 0.5` they decide.
Deviation: mergekit's slerp goes straight where the cosine exceeds 0.9995, as it does between most fine-tuned models of
one base; here the arc is followed however short it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.method import Citation, Context, Method, option
from modelmerge.methods import _sphere

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What slerp can be told."""

    t: float = option(
        0.5, "Share of the way from the first model to the second.", minimum=0.0, maximum=1.0, varies="tensor"
    )
    points: Literal["weights", "task-vectors"] = option("weights", "What is interpolated.")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[2, *shape] or [1, *shape] -> [*shape]: the task vector of the model on the way."""
    if not bool(taus.any()):
        return torch.zeros_like(taus[0])
    if len(taus) == 1:  # the base, as a model whose task vector is zero
        taus, share = torch.cat([torch.zeros_like(taus), taus]), options.t
    else:
        first, second = (1.0 - options.t) * context.weights[0], options.t * context.weights[1]
        share = second / (first + second) if first + second else options.t
    base = context.base if options.points == "weights" else None
    products = _sphere.inner_products(taus, base)
    return _sphere.combined(taus, base, _sphere.between(products, share))


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://doi.org/10.1145/325165.325242",
    citation=Citation("Animating rotation with quaternion curves", "Ken Shoemake", "SIGGRAPH 1985"),
    most_experts=2,
    normalises=True,
    wants_base=True,
    blockwise=lambda options: False,
    workspace=lambda tasks: 5.0,
)
