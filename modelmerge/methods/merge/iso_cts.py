"""Iso-C whose weakest directions make room for those that single tasks add to it.

Iso-CTS (Marczak et al., ICML 2025). Per weight [m, n], with r = min(m, n): the first c = `common_fraction` * r
singular triplets of `sum_i w_i tau_i`; from each `w_i tau_i` without its part in those left vectors, the first
(r - c) / T triplets; all side by side, left and right vectors are replaced by the orthogonal matrices nearest to them,
and every singular value by the mean of all, times `scale`. As in the authors' code c is such that the tasks' shares
come out even: (r - c) / T is rounded to the nearest integer first, and may be none.

The tensors that are not weights of linear layers: the authors' code averages them (`--rest average`); they choose the
scale by validation.

Deviation: as in `iso-c` and `tsv-m`, singular values below 1e-5 of a matrix's largest bring no triplet and do not
enter the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods import cores, linalg, products, work
from modelmerge.methods.contract import Context, Tensor, matrix_method
from modelmerge.methods.merge import iso_c
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Iso-CTS."""

    common_fraction: float = option(
        0.8, "Share of the directions that are taken from the sum of the task vectors.", minimum=0.0, maximum=1.0
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    core = cores.of(taus, context)
    taus = core.taus
    common, specific = ranks(min(taus.shape[1:]), len(taus), options.common_fraction)
    total = weighted_sum(taus, context.weights)
    triplets = [linalg.leading_triplets(total, common)]
    shared, largest = triplets[0][0], torch.linalg.vector_norm(taus, dim=(1, 2)).max()
    for tau, weight in zip(taus, context.weights, strict=True):
        rest = products.remove_subspace(tau.double() * weight, shared)
        if not specific or torch.linalg.vector_norm(rest) <= linalg.SUPPORT * largest:
            continue  # what remains is rounding
        triplets.append(linalg.leading_triplets(rest, specific))
    lefts, values, rights = zip(*triplets, strict=True)
    mean = torch.cat(list(values)).mean() if any(map(len, values)) else 0.0
    left, right = linalg.nearest_orthogonal(lefts, rights)
    return core.whole((left @ right).mul_(mean)).float().mul_(options.scale)


def ranks(smaller: int, tasks: int, fraction: float) -> tuple[int, int]:
    """How many triplets come from the sum, and how many from each task; together `smaller`."""
    specific = min(round((smaller - int(smaller * fraction)) / tasks), smaller // tasks)
    return smaller - specific * tasks, specific


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    smaller = min(m, n)
    common, specific = ranks(smaller, tasks, options.common_fraction)
    each = work.fine_product(m, n, 2 * common) + work.triplets(m, n, specific)
    nearest = work.polar(m, smaller) + work.polar(smaller, n) + work.fine_product(m, smaller, n)
    return work.triplets(m, n, common) + each * (tasks if specific else 0) + nearest


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper=iso_c.METHOD.paper,
    citation=iso_c.METHOD.citation,
    wants_base=True,
    workspace=lambda options, tasks: 25.0,
    work=_work,
    work_of_products=work.through_cores(_work),
)
