"""What storing costs: the distance from the merged weights to the stored ones, beside the size of the merge itself.

Fine-tuning moves weights by less than bfloat16 can tell apart: of a merge that is stored so, a good part can be lost.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelmerge.checkpoint.header import HALF_DTYPES
from modelmerge.plan.tensors import Plan

_RUN = 1 << 18  # so many products are added up in float32 before float64 takes over


class ExactSum:
    """A sum of numbers that are added from any thread and in any order. It is exact, and no larger for more of them."""

    def __init__(self) -> None:
        self._units = 0  # of the smallest number that float64 has, 2^-1074: every other is a multiple of it
        self._beyond = 0.0  # NaN and Inf
        self._mutex = threading.Lock()

    def add(self, value: float) -> None:
        """Add a number."""
        with self._mutex:
            if math.isfinite(value):
                numerator, denominator = value.as_integer_ratio()
                self._units += numerator << (1075 - denominator.bit_length())
            else:
                self._beyond += value

    def __str__(self) -> str:
        """The sum itself, as `join` takes it."""
        return f"{self._units:x} {self._beyond!r}"

    def join(self, text: str) -> None:
        """Add the sum of other numbers."""
        units, beyond = text.split()
        with self._mutex:
            self._units += int(units, 16)
            self._beyond += float(beyond)

    def __float__(self) -> float:
        """The sum, rounded once."""
        return self._beyond or self._units / (1 << 1074)


@dataclass(slots=True)
class Rounding:
    """Squares that add up over all merged tensors.

    `errors`: of the distance from the merged values to the stored ones. `squares`: of the merged task vectors.
    """

    errors: ExactSum = field(default_factory=ExactSum)
    squares: ExactSum = field(default_factory=ExactSum)

    def relative_error(self) -> float | None:
        """`||stored - merged|| / ||merged task vector||`; None where nothing changed or nothing was measured."""
        whole = float(self.squares)
        return math.sqrt(float(self.errors) / whole) if whole else None

    def to_list(self) -> list[str]:
        """Both sums as text."""
        return [str(self.errors), str(self.squares)]

    def add(self, sums: list[str]) -> None:
        """Add those of other tensors."""
        for each, text in zip((self.errors, self.squares), sums, strict=True):
            each.join(text)


def stored_narrow(plan: Plan) -> list[str]:
    """The 16-bit safetensors dtypes that merged tensors are stored in."""
    return sorted({t.out_dtype for t in plan.tensors.values() if t.action != "copy"} & set(HALF_DTYPES))


def squared(values: Tensor) -> float:
    """The squared norm of values of any shape."""
    if values.device.type != "cpu":
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    # On the CPU a product of float32 vectors takes a tenth of that time, and is exact enough for runs of this length.
    runs = values.reshape(-1).split(_RUN) if values.numel() > _RUN else (values.reshape(-1),)
    return math.fsum(float(torch.dot(run, run)) for run in runs)
