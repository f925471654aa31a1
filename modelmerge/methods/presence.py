"""Which experts changed a weight."""

from __future__ import annotations

import torch

from modelmerge.methods.contract import Context, Tensor

# A task vector shorter than this share of the longest one, on one weight, counts as unchanged there.
NEGLIGIBLE = 1e-3


def changed(taus: Tensor, context: Context) -> dict[int, float]:
    """The norms of the task vectors [T, *shape] by expert, without the negligible ones, of which the user hears."""
    # One by one: all at once they would be widened together.
    norms = torch.stack([torch.linalg.vector_norm(tau, dtype=torch.float64) for tau in taus]).tolist()
    kept = {}
    for i, norm in enumerate(norms):
        if norm == 0.0 or norm < NEGLIGIBLE * max(norms):
            context.leave_out(i, "it did not change this weight" if norm == 0.0 else "it hardly changed this weight")
        else:
            kept[i] = norm
    return kept
