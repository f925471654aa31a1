"""`merge auto`: which method, from what the models are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelmerge.checkpoint.reader import Checkpoint

AUTO = "auto"
SUMMARY = "Choose the method by what the models are, and say which and why."


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with the options that are not its defaults, and the reason."""

    method: str
    options: Mapping[str, Any]
    reason: str


def choose(experts: Sequence[Checkpoint]) -> Choice:
    """The method that did best at its defaults on sets of small real experts of this kind.

    From headers alone. The figures are those of `python -m tests.benchmarks.grid` (tests/benchmarks/RESULTS-grid.md).
    """
    if len(experts) == 1:
        return Choice("task-arithmetic", {"scale": 1.0}, "there is one expert: base and task vector add up to it")
    if all(_low_rank(expert) for expert in experts):
        reason = "all experts are low-rank adapters, for which no other method was better at its defaults"
        return Choice("task-arithmetic", {"scale": 0.3}, reason)
    return Choice("kron", {}, "of all methods at their defaults it kept most of what the experts can do")


def _low_rank(model: Checkpoint) -> bool:
    """Whether it is told by factors: a LoRA adapter, or a low-rank task vector."""
    return any(info.change is not None and info.change.factors is not None for info in model.tensors.values())
