"""`merge auto`: which method, from what the models are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelmerge.checkpoint.reader import Checkpoint
    from modelmerge.plan.tensors import Plan

AUTO = "auto"
SUMMARY = "Choose the method by what the models are, and say which and why."


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with the options that are not its defaults, and the reason."""

    method: str
    options: Mapping[str, Any]
    reason: str


def choose(shared: Plan, *, look: bool) -> Choice:
    """The method that did best at its defaults on sets of small real experts of this kind.

    From headers and, where those do not tell, some rows of a few matrices: kilobytes to a few megabytes. The figures
    are those of `python -m tests.benchmarks.grid` (tests/benchmarks/RESULTS-grid.md).

    Args:
        shared: A plan of all that the models share.
        look: Look at weights on the Hub too, over ranges; otherwise say what that might change.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    # It takes torch; help has the name `auto` from here.
    from modelmerge.engine.lowrank import is_low_rank, look_bytes

    if len(shared.experts) == 1:
        return Choice("task-arithmetic", {"scale": 1.0}, "there is one expert: base and task vector add up to it")
    whole = [i for i, expert in enumerate(shared.experts) if not _is_adapter(expert)]
    best = "of all methods at their defaults it kept most of what the experts can do"
    far = [i for i in whole if shared.base.streamed or shared.experts[i].streamed]
    if far and not look:
        size = look_bytes(shared)
        return Choice("kron", {}, f"{best}; should all experts turn out to be of low rank when the merge looks at some "
                      f"{size / 1e6:.1f} MB of them on the Hub, it will be task-arithmetic with scale=0.3")  # fmt: skip
    if not all(is_low_rank(shared, i) for i in whole):
        return Choice("kron", {}, best)
    kind = "are low-rank adapters" if not whole else "are of low rank, as merged LoRA adapters are"
    reason = f"all experts {kind}, for which no other method was better at its defaults"
    return Choice("task-arithmetic", {"scale": 0.3}, reason)


def _is_adapter(model: Checkpoint) -> bool:
    """Whether factors make it up: a LoRA adapter, or a low-rank task vector."""
    return any(info.change is not None and info.change.factored for info in model.tensors.values())
