"""Which experts changed a weight."""

from __future__ import annotations

from typing import Any

import torch

from modelmerge.methods.contract import Context, Tensor, alike

# A task vector shorter than this share of the longest one, on one weight, counts as unchanged there.
NEGLIGIBLE = 1e-3


def changed(taus: Tensor, context: Context) -> dict[int, Any]:
    """The norms of the task vectors [T, *shape] by expert, without the negligible ones, of which the user hears.

    Floats; of a batch [T, B, m, n] float64 tensors [B, 1, 1], if the same experts are kept in all of its matrices.
    """
    dims = (-2, -1) if taus.dim() == 4 else None
    # One by one: all at once they would be widened together.
    norms = torch.stack([torch.linalg.vector_norm(tau, dim=dims, dtype=torch.float64) for tau in taus])
    table = norms.view(len(taus), -1).T.tolist()
    kinds = ([(norm == 0.0, norm < NEGLIGIBLE * max(row)) for norm in row] for row in table)
    kept = {}
    for i, (absent, negligible) in enumerate(alike(kinds)):
        if absent or negligible:
            context.leave_out(i, "it did not change this weight" if absent else "it hardly changed this weight")
        else:
            kept[i] = norms[i, :, None, None] if dims else table[0][i]
    return kept
