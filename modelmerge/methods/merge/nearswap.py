"""Take an expert's small changes whole and cut its large ones off at a limit.

NearSwap (alchemonaut): each weight of the base moves towards the expert's by `min(1, t / distance)` of their distance,
which is the task vector cut off at plus and minus `--t`. One expert, times its --weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelmerge.methods.contract import Context, Method, Tensor
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of NearSwap."""

    t: float = option(1e-4, "The most that a weight changes, in units of the weights.", minimum=0.0, varies="tensor")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[1, *shape] -> [*shape]: the task vector, cut off."""
    return taus[0].clamp(-options.t, options.t).mul_(context.weights[0])


METHOD = Method(
    options=Options, apply=apply, paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", most_experts=1
)
