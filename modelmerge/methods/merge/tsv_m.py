"""Keep each task's leading singular directions, orthogonal to the other tasks'.

Task Singular Vectors, TSV-Merge (Gargiulo et al., CVPR 2025). Per weight [m, n]: the first `min(m, n) / T` singular
triplets of each `w_i tau_i`, side by side: U [m, k], S, V [k, n]; U and V are replaced by the orthogonal matrices
nearest to them (Procrustes), and the merged task vector is `scale * U S V`.

The tensors that are not weights of linear layers: the authors' code averages them (`--rest average`).

Deviations, both where the published rule leaves things to chance: singular values below 1e-5 of a task's largest (an
expert that did not change the weight, LoRA) bring no triplet, where the authors' code lets arbitrary vectors take part
in the orthogonalisation; directions that several tasks share exactly are halved between them instead of one being
replaced by an arbitrary vector. With more tasks than min(m, n), each still keeps one triplet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modelmerge.methods import cores, linalg, work
from modelmerge.methods.contract import Citation, Context, Tensor, matrix_method
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of TSV-Merge."""

    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    rank = max(min(taus.shape[-2:]) // len(taus), 1)
    core = cores.of(taus, context)
    # The factors of cores would be no smaller than they are.
    pairs = core.pairs if core.left is core.right is None else (None,) * len(taus)
    triplets = [linalg.leading_triplets(tau, rank, pair) for tau, pair in zip(core.taus, pairs, strict=True)]
    lefts, values, rights = zip(*triplets, strict=True)
    left, right = linalg.nearest_orthogonal(lefts, rights)
    weighted = [s * weight for s, weight in zip(values, context.weights, strict=True)]
    return core.whole((left * torch.cat(weighted, dim=-1)[..., None, :]) @ right).float().mul_(options.scale)


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    smaller = min(m, n)
    each = work.triplets(m, n, max(smaller // tasks, 1)) * tasks
    return each + work.polar(m, smaller) + work.polar(smaller, n) + work.fine_product(m, smaller, n)


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2412.00081",
    citation=Citation(
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Antonio Andrea Gargiulo and others",
        "CVPR 2025",
    ),
    wants_base=True,
    workspace=lambda options, tasks: 22.0,
    work=_work,
    work_of_products=work.through_cores(_work),
    batches=lambda options: True,
)
