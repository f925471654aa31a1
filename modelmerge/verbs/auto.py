"""`merge auto`: which method, from what the models are and how long it may take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modelmerge.errors import UsageError, named
from modelmerge.text import duration

if TYPE_CHECKING:
    from modelmerge.checkpoint.reader import Checkpoint
    from modelmerge.plan.tensors import Plan

AUTO = "auto"
SUMMARY = "Choose the method by what the models are, and say which and why."
Kind = Literal["one", "full", "low-rank", "far low-rank"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A method with the options that are not its defaults, and what speaks for it."""

    method: str
    reason: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a sentence has it."""
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} with {options}" if options else self.method


# What is taken for experts of a kind: the best first, then what takes less time. The figures are those of
# `python -m tests.benchmarks.grid` (tests/benchmarks/RESULTS-grid.md, and RESULTS-auto-confirmed.md for low rank).
CHOICES: Mapping[Kind, tuple[Choice, ...]] = {
    "one": (Choice("task-arithmetic", "there is one expert: base and task vector add up to it", {"scale": 1.0}),),
    "full": (
        Choice("kron", "of all methods at their defaults it kept most of what small networks can do, or as much"),
        Choice("wudi", "of the faster methods it kept most of what small networks can do"),
        Choice("task-arithmetic", "it takes as long as reading the models, and kept less of what small ones can do"),
    ),
    "low-rank": (
        Choice("apgd", "on adapters of small networks it was the best at its defaults, or up to a point behind"),
        Choice("task-arithmetic", "it takes as long as reading the models, and kept less of what small ones can do"),
    ),
    "far low-rank": (
        Choice("kron", "on adapters that change small networks a lot it was level with the best at its defaults"),
        Choice("task-arithmetic", "it takes as long as reading the models, and kept less of what small ones can do"),
    ),
}  # fmt: skip
# Adapters whose product is as long as so much of the weights go far. On the sets that were measured it is 3 to 10 %, or
# 40 to 50 %.
_FAR = 0.2
_LANGUAGE = (
    "These are language models, and the figures behind the choice are of small networks: on large ones with many "
    "public checkpoints task arithmetic alone gained reliably (arXiv 2511.21437). Measure both."
)


def kind_of(shared: Plan, *, look: bool) -> tuple[Kind, str]:
    """What the experts are, and a sentence for who reads of it.

    From headers and, where those do not tell, some rows of a few matrices: kilobytes to a few megabytes.

    Args:
        shared: A plan of all that the models share.
        look: Look at weights on the Hub too, over ranges; otherwise say what that might change.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    # It takes torch; help has the name `auto` from here.
    from modelmerge.engine.lengths import look_bytes as sample_bytes
    from modelmerge.engine.lengths import reach
    from modelmerge.engine.lowrank import is_low_rank, look_bytes

    if len(shared.experts) == 1:
        return "one", ""
    whole = [i for i, expert in enumerate(shared.experts) if not _is_adapter(expert)]
    if not look and any(shared.base.streamed or shared.experts[i].streamed for i in whole):
        return "full", (
            f"Should all experts turn out to be of low rank, when the merge looks at {look_bytes(shared) / 1e6:.1f} "
            f"MB of them on the Hub, the method will be {CHOICES['low-rank'][0]}."
        )
    if not all(is_low_rank(shared, i) for i in whole):
        return "full", ""
    what = "All experts are of low rank, as LoRA adapters are"
    if not look and any(model.streamed for model in shared.models):
        return "low-rank", (
            f"{what}. Should they turn out to go far, when the merge looks at {sample_bytes(shared) / 1e6:.1f} MB of "
            f"the models on the Hub, the method will be {CHOICES['far low-rank'][0]}."
        )
    if any(model.reference.is_stage for model in shared.models) or (share := reach(shared)) <= _FAR:
        return "low-rank", f"{what}."
    return "far low-rank", f"{what}, and they go far: the one in the middle changes the weights by {share:.0%}."


def sentence(choices: Sequence[Choice], seconds: Sequence[float | None], within: float | None, device: str) -> str:
    """Why the last of these was taken, of which each before it takes too long; `within` so many minutes."""
    choice, long = choices[-1], [f"about {duration(each)}" if each is not None else "a time" for each in seconds]
    text = f"The method is {choice}: {choice.reason}. It takes {long[-1]} on {device}"
    if len(choices) > 1:
        slower = ", ".join(f"{each.method} {time}" for each, time in zip(choices[:-1], long, strict=False))
        text += f"; {within:g} minutes are too short for what is better: {slower}"
    if within is not None and seconds[-1] is not None and seconds[-1] > within * 60:
        text += "; nothing that is known here takes less"
    return f"{text}."


def about_language(config: Mapping[str, Any]) -> list[str]:
    """What the literature says beside the choice, where a model's config is a language model's."""
    names = config.get("architectures")
    causal = isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)
    return [_LANGUAGE] if causal else []


def refuse_within(method: str, within: float | None, ways: Mapping[str, Any]) -> None:
    """Refuse a limit of time where there is no choice, or where processes would choose differently.

    `ways`: by name, how the work is divided.

    Raises:
        UsageError: There is one.
    """
    if within is None:
        return
    if method != AUTO:
        raise UsageError(f"is for '{AUTO}', which chooses the method", option="within", hint="leave it out")
    if not (math.isfinite(within) and within > 0):
        raise UsageError(f"must be above 0, not {within:g}", option="within", hint="give minutes, such as 30")
    if way := next((name for name, value in ways.items() if value), None):
        raise UsageError(
            f"has no place beside {named(way)}: each process would choose by its own speed", option="within",
            hint="name the method that a dry run chooses",
        )  # fmt: skip


def _is_adapter(model: Checkpoint) -> bool:
    """Whether factors make it up: a LoRA adapter, or a low-rank task vector."""
    return any(info.change is not None and info.change.factored for info in model.tensors.values())
