"""Find one coefficient for each expert and tensor by minimising the entropy of predictions on unlabelled data.

AdaMerging (Yang et al., ICLR 2024): `theta = theta_0 + sum_i c_i w_i tau_i` (w_i is --weight), where the coefficients
c_i are those of each tensor (`--granularity layer`, layer-wise) or of the whole model (`--granularity task`,
task-wise). They start at `--init`, and Adam lowers the sum over the tasks of the mean entropy of the predictions on a
batch of each task's data. Labels are never looked at; the classifiers stay as they are.

It is task arithmetic at scale 1 behind the coefficients, which multiply the experts' weights. The same coefficients
can stand before any method: `modelmerge.merge(..., method="ties", unlabelled={...})`.

The authors' code draws two batches of each task per step and keeps coefficients in [0, 1]; here it is one batch, and
they are free, as in FusionBench (which takes 1000 steps).
"""

from __future__ import annotations

from modelmerge.methods.coefficients import Options
from modelmerge.methods.contract import Citation, Context, Method, Tensor
from modelmerge.methods.sums import weighted_sum


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, *shape] -> [*shape]: the sum of the task vectors by their weights, which the coefficients have multiplied."""
    return weighted_sum(taus, context.weights)


METHOD = Method(
    options=Options,
    apply=apply,
    on_data=True,
    paper="https://arxiv.org/abs/2310.02575",
    citation=Citation(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning", "Enneng Yang and others", "ICLR 2024"
    ),
)
