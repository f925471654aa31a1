"""Optimise one shared correction per linear layer, off the subspace the tasks share, so that each expert is kept.

Adaptive Projective Gradient Descent (Wei et al., ICML 2025; its code calls it DOGE). Per weight [m, n], in float32:

1. `lambda_i`, each task's factor, and D [m, n], the correction off the subspace that the tasks share, are those of
   `modelmerge.methods.apgd`.
2. mask_i keeps the largest entries of tau_i, counted over the whole task vector.
3. merged task vector: `sum_i lambda_i mask_i (tau_i + D)`, shortened to `norm_cap * sqrt(||tau|| ||theta||)` where
   it is longer (||tau|| and ||theta||: means over the experts, ||theta_i|| taken as ||theta_0|| + ||tau_i||), and
   then times `scale`.

`--published` is the algorithm as published: Adam, `lambda_i = eta / ||tau_i||`, 30 % of the entries, a shared rank of
min(m, n) / 6, no bound on the norm, the rest from the base. By itself the method takes what did best on small real
experts (`python -m tests.benchmarks.choose apgd`): the exact solver with a ridge as large as a row's mean squared norm,
lambdas matched to the task vectors' length, no trim, min(m, n) / 12, the rest averaged. `--solver` changes the
minimiser alone, in either form. The ridge is what matters: the loss is a first-order picture of what a task needs, and
meeting it to the letter makes D long wherever the tasks' rows are nearly dependent. The cap only acts on experts that
went far from the base (from about a seventh of its norm), where all methods want smaller steps than near it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from modelmerge.methods import apgd, cores, threshold
from modelmerge.methods.contract import Context, Tensor, matrix_method
from modelmerge.methods.options import follow, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(apgd.CorrectionOptions):
    """Options of APGD. Where no value is named, one follows from the others; None is left where none has an effect.

    Raises:
        UsageError: An option has no effect with the solver, or without `published`.
    """

    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)
    norm_cap: float | None = option(
        None, "Bound on the merged task vector's norm, before the scale. Default: 0.45; none as published.", above=0.0
    )

    def __post_init__(self) -> None:
        apgd.CorrectionOptions.__post_init__(self)
        if not self.published:
            follow(self, norm_cap=0.45)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    vectors = taus
    if not options.published and any(weight not in (0.0, 1.0) for weight in context.weights):
        # D keeps a weighted task vector then, not the whole of one that shall count less.
        each = [weight or 1.0 for weight in context.weights]
        factors = torch.tensor(each, dtype=taus.dtype, device=taus.device)
        vectors = taus * factors.view(-1, *[1] * (taus.dim() - 1))
        # Who is of low rank shows in what is stored, before it is multiplied.
        pairs = tuple(
            pair and (pair[0] * (weight or 1.0), pair[1])
            for pair, weight in zip(cores.factors(taus, context, range(len(taus))), context.weights, strict=True)
        )
        even = tuple(float(weight != 0.0) for weight in context.weights)
        context = replace(context, weights=even, factors=pairs)
    fit = apgd.fit(vectors, options, context)
    if fit is None:
        return torch.zeros_like(taus[0])
    merged = torch.zeros_like(fit.correction)
    for i, lam in zip(fit.active, fit.lambdas, strict=True):
        part = vectors[i] + fit.correction
        if fit.thresholds is not None:
            part.mul_(taus[i].abs() >= fit.thresholds[i])
        merged.add_(part.mul_(lam))
    if options.norm_cap is not None:
        shorten(merged, fit.lengths, options.norm_cap, context)
    return merged.mul_(options.scale)


def shorten(merged: Tensor, norms: tuple[Any, ...], cap: float, context: Context) -> None:
    """Shorten the merged task vector [m, n] where it is long against the experts' change and the weight; in place.

    From the norms of the task vectors and `context.base`. A step that is the geometric mean of the two norms is far
    outside of what fine-tuning does to a weight that it changes little, and well inside where it changes it a lot.
    """
    assert context.base is not None, "the method asks for the base"
    mean, both = sum(norms) / len(norms), (context.base, merged)
    weight, length = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64) for x in both)
    factor = cap * (mean * (weight + mean)).sqrt() / length
    shares = [share if share < 1.0 else None for share in factor.flatten().tolist()]
    if any(share is not None for share in shares):
        context.tell({"shortened": shares if merged.dim() == 3 else shares[0]})
        merged.mul_(factor.clamp(max=1.0).to(merged.dtype))


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper=apgd.PAPER,
    citation=apgd.CITATION,
    rest=lambda options: "base" if options.published else "average",
    wants_base=True,
    survey=lambda options, each: threshold.survey(each.get("density", options.density)),
    workspace=lambda options, tasks: apgd.workspace(tasks),
    one_by_one=lambda options, m, n, tasks: apgd.one_by_one(m, n, tasks),
    work=apgd.work_of,
    work_of_products=lambda options, m, n, tasks, k: apgd.work_of(
        options, m, n, tasks, k if options.density == 1.0 and not options.published else None
    ),
    batches=lambda options: options.solver == "exact",
)
