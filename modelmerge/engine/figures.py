"""What a fitted transform has to say of its work: losses, and inner products before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelmerge.methods.contract import Solution


@dataclass(frozen=True, slots=True)
class Entanglement:
    """One tensor's inner products: float64 [T, T] before and after, and the squared norm of the change.

    The change is the vector that was subtracted, or the matrix that corrects; of several matrices, the mean.
    """

    before: Tensor
    after: Tensor
    change: float

    def __add__(self, other: Entanglement) -> Entanglement:
        """That of two parts together."""
        return Entanglement(self.before + other.before, self.after + other.after, self.change + other.change)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of a fitted transform.

    `losses`: at each step, or before and after. `steps`: how many there were, where it descends. `entanglement`: by
    tensor.
    """

    losses: Sequence[float]
    steps: int | None = None
    entanglement: Mapping[str, Entanglement] = field(default_factory=dict)


def entanglement_of(grams: Tensor, solution: Solution) -> Entanglement:
    """Inner products of all groups together, before and after: with `v_i = tau_i - active_i delta`, U K U^T."""
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    change = identity - solution.active.to(grams.dtype)[:, :, None] * solution.coefficients[:, None, :]
    after = (change @ grams @ change.mT).sum(0)
    square = torch.einsum("gi,gij,gj->", solution.coefficients, grams, solution.coefficients)
    return Entanglement(grams.sum(0).cpu(), after.cpu(), max(float(square), 0.0))
