"""One model's weights as they are, or times a factor: to stack layers (--layers).

`factor * (theta_0 + w tau)`, at factor and weight 1 the model's own bits. Whoever repeats layers to make a model larger
can set the factor to 0 on what a repeated layer adds to the stream (attention and MLP outputs), so that it does nothing
until it is trained: as in LLaMA Pro's block expansion.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of passthrough."""

    factor: float = option(1.0, "Factor on the weights.", varies="tensor")


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[1, *shape] or [0, *shape] -> [*shape]: the model's task vector, or that of the model times the factor.

    Without a task vector the model is the base.
    """
    tau = weighted_sum(taus, context.weights) if len(taus) else taus.sum(0)
    if options.factor == 1.0:
        return tau
    assert context.base is not None
    return (context.base + tau).mul_(options.factor).sub_(context.base)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2401.02415",
    citation=Citation("LLaMA Pro: Progressive LLaMA with block expansion", "Chengyue Wu and others", "ACL 2024"),
    most_experts=1,
    wants_base=True,
    on_weights=lambda options: True,
)
