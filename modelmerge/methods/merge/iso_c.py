"""Sum the task vectors of each linear layer, with all singular values equal.

Iso-C (Marczak et al., ICML 2025). With `U S V^T` the singular value decomposition of `sum_i w_i tau_i` [m, n], the
merged task vector is `scale * mean(S) * U V^T`: a few directions that the tasks share no longer drown the others.

The tensors that are not weights of linear layers: the authors' code averages them (`--rest average`); they choose the
scale by validation, about 1.3 for eight vision tasks.

Deviation: singular values below 1e-5 of the largest count as missing, stay zero and do not enter the mean. The
authors' code gives the mean to arbitrary vectors there. The two are the same where the sum has full rank; for low-rank
updates (LoRA) this is Iso-C in the space that the updates span (Panariello et al., arXiv 2509.17786).
"""

from __future__ import annotations

from dataclasses import dataclass

from modelmerge.methods import cores, linalg, work
from modelmerge.methods.contract import Citation, Context, Tensor, matrix_method
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of Iso-C."""

    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    core = cores.of(taus, context)
    factor, mean = linalg.polar(weighted_sum(core.taus, context.weights))
    return core.whole(factor.mul_(mean[..., None, None])).float().mul_(options.scale)


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    return work.polar(m, n)


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2502.04959",
    citation=Citation(
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Daniel Marczak and others",
        "ICML 2025",
    ),
    wants_base=True,
    workspace=lambda options, tasks: 16.0,
    work=_work,
    work_of_products=work.through_cores(_work),
    batches=lambda options: True,
)
