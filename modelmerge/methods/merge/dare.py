"""Drop entries of the task vectors at random, rescale the others, then add up.

DARE (Yu et al., ICML 2024). Each entry of each task vector is dropped with probability 1 - `--density` (the paper's
drop rate p), and those that are kept are divided by the density, so that their expectation stays. What is left is
merged by task arithmetic (`--consensus linear`), or by TIES's sign election (`--consensus ties`): the sum, or the mean,
of everything or of the entries that agree. With --weight a task vector is multiplied by its expert's weight before, and
the mean is one by those weights. With `--rescale none` what is kept is not divided.

An entry's draw depends on `--seed`, the tensor's name, the expert's name and the entry's place in the tensor, and on
nothing else. The density is rounded to a multiple of 2^-16, and the rescaling is by the rounded one.

Deviations: the authors' TIES also trims to the largest 20 % of what is left, which at their density 0.1 is everything;
here it does not. mergekit scales what is kept of each tensor to the L1 norm it had before instead, and its election
gives entries that cancel exactly to the positive side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods import random, signs
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of DARE."""

    density: float = option(0.1, "Share of the entries that is kept: 1 - p.", above=0.0, maximum=1.0, varies="expert")
    scale: float = option(0.3, "Factor on the merged task vector.", varies="tensor", linear=True)
    consensus: Literal["linear", "ties"] = option("linear", "Add everything up, or only what agrees in sign.")
    reduce: Literal["sum", "mean"] = option("sum", "Add what is left up, or take its mean by the weights.")
    rescale: Literal["chance", "none"] = option(
        "chance", "Make up for what is dropped: by the chance to be kept, or not."
    )


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the dropped and rescaled task vectors, merged and scaled."""
    part, densities = torch.empty_like(taus[0]), context.each("density", options.density)
    # Rescaled by the first density at the end, all together; here is what is missing of it.
    chances = [random.share(density) if options.rescale == "chance" else 1.0 for density in densities]
    rests = [w * (chances[0] / chance) for w, chance in zip(context.weights, chances, strict=True)]
    if options.consensus == "linear" and options.reduce == "sum" and all(rest == 1.0 for rest in rests):
        total = torch.zeros_like(part)
        for i, tau in enumerate(taus):  # a product with 1 or 0 is exact, fused with the sum or not
            total.addcmul_(tau, random.keep(context, i, densities[i], part))
    else:
        dropped = (
            signs.times(random.keep(context, i, density, part).mul_(taus[i]), rest)
            for i, (density, rest) in enumerate(zip(densities, rests, strict=True))
        )
        total = signs.consensus(dropped, context.weights, part, options.consensus, options.reduce)
    return total.mul_(1.0 / chances[0]).mul_(options.scale)


METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2311.03099",
    citation=Citation(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Le Yu and others",
        "ICML 2024",
    ),
    workspace=lambda options, tasks: 10.0,
)
