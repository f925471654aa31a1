"""What storing costs: the distance from the merged weights to the stored ones, beside the size of the merge itself.

Fine-tuning moves weights by less than bfloat16 can tell apart: of a merge that is stored so, a good part can be lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelmerge.checkpoint.header import HALF_DTYPES
from modelmerge.plan.tensors import Plan

_RUN = 1 << 18  # so many products are added up in float32 before float64 takes over


@dataclass(slots=True)
class Rounding:
    """Squares that add up over all merged tensors, from any thread and in any order: their sums are exact.

    `errors`: of the distance from the merged values to the stored ones. `squares`: of the merged task vectors.
    """

    errors: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def relative_error(self) -> float | None:
        """`||stored - merged|| / ||merged task vector||`; None where nothing changed or nothing was measured."""
        whole = math.fsum(self.squares)
        return math.sqrt(math.fsum(self.errors) / whole) if whole else None


def stored_narrow(plan: Plan) -> list[str]:
    """The 16-bit safetensors dtypes that merged tensors are stored in."""
    return sorted({t.out_dtype for t in plan.tensors.values() if t.action != "copy"} & set(HALF_DTYPES))


def squared(values: Tensor) -> float:
    """The squared norm of values of any shape."""
    if values.is_cuda:
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    # On the CPU a product of float32 vectors takes a tenth of that time, and is exact enough for runs of this length.
    runs = values.reshape(-1).split(_RUN)
    return math.fsum(torch.stack([torch.dot(run, run) for run in runs]).tolist())
