"""Task-aware lambda: how long each task's share of a merged weight is made, from the task vectors' inner products.

Of APGD (Wei et al., ICML 2025, arXiv 2501.01230), for any method that takes weights. With n_i the norm of expert i's
task vector on one weight:

- `relative`: `mean_j n_j / n_i`: all shares are as long as the task vectors are on average.
- `matched`: the same times the factor, 1 at most, at which the sum of the shares is so long.
- `paper`: `0.07 / n_i`, the published form and value for vision; a method's scale multiplies it.

On small real experts of like strength it changes nothing, and where strengths differ it costs two points: there the
long task vectors are those that need their length (`python -m tests.benchmarks.layers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.methods.presence import NEGLIGIBLE

if TYPE_CHECKING:
    from torch import Tensor

ETA = 0.07
Mode = Literal["relative", "matched", "paper"]


def task_lambdas(gram: Tensor, mode: Mode) -> tuple[float, ...]:
    """Each expert's factor on one weight, from the Gram matrix [T, T] of its task vectors, float64.

    An expert that (nearly) did not change the weight gets 0; where none did, all get 1.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    active = (norms > 0) & (norms >= NEGLIGIBLE * norms.max())
    if not bool(active.any()):
        return (1.0,) * len(norms)
    even = torch.where(active, 1 / norms, 0.0)
    if mode == "paper":
        return tuple((ETA * even).tolist())
    length = float((even @ gram @ even).clamp(min=0).sqrt()) if mode == "matched" else 1.0
    return tuple((even * float(norms[active].mean()) / max(length, 1.0)).tolist())
