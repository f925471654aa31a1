"""What follows from the task vectors' lengths and angles: `--weight balanced`, as `auto` has it, and a sum's scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelmerge.engine.lengths import FAR, Balance, balance, look_bytes, overlap_scale, products
from modelmerge.errors import UsageError
from modelmerge.methods.options import written
from modelmerge.plan.recipe import BALANCED

if TYPE_CHECKING:
    from modelmerge.plan.tensors import Plan


def balanced(plan: Plan, *, look: bool) -> tuple[dict[str, float], str]:
    """The weights of the experts by name, and a sentence that says why; none yet where it may not look.

    Args:
        plan: All that is merged.
        look: Read weights on the Hub too, over ranges; otherwise say that they are to be read.

    Raises:
        UsageError: A model is merged before, so that its weights are not there yet.
        CheckpointError: A weight cannot be read.
    """
    if stage := next((model.name for model in plan.models if model.reference.is_stage), None):
        raise UsageError(
            f"{BALANCED} measures the experts before they are merged, and '{stage}' is made by another merge first",
            option="weights", hint="give its weight as NAME=W",
        )  # fmt: skip
    if not look and any(model.streamed for model in plan.models):
        size = look_bytes(plan) / 1e6
        return {}, (
            f"An expert that turns out to have gone more than {FAR:g} times as far from the base as the one in the "
            f"middle, when the merge looks at some {size:.1f} MB of them on the Hub, will have a smaller weight."
        )
    balances = dict(zip((expert.name for expert in plan.experts), balance(plan), strict=True))
    return {name: each.weight for name, each in balances.items()}, _sentence(balances)


def overlap_of(plan: Plan, *, look: bool) -> tuple[float | None, list[str]]:
    """The scale of a sum by how much the experts overlap, if it is theirs to tell, and what there is to say of it.

    None where a model is merged before, so that its weights are not there yet, and where it may not look.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    if len(plan.experts) < 2 or any(model.reference.is_stage for model in plan.models):
        return None, []
    if not look and any(model.streamed for model in plan.models):
        return None, [
            "The scale will be smaller where the experts turn out to overlap, when the merge looks at some "
            f"{look_bytes(plan) / 1e6:.1f} MB of them on the Hub."
        ]
    return overlap_scale(products(plan)), []


def _sentence(balances: dict[str, Balance]) -> str:
    """How far each expert went, and what it counts."""
    far = {name: each for name, each in balances.items() if each.weight != 1.0}
    others = sorted(each.ratio for name, each in balances.items() if name not in far)
    reach = " to ".join(dict.fromkeys(map(written, (others[0], others[-1])))) if others else ""
    if not far:
        return f"All experts went about as far from the base, {reach} times as the one in the middle: all weigh 1."
    each = "; ".join(
        f"'{name}' went {written(one.ratio)} times as far from the base as the expert in the middle and weighs "
        f"{written(one.weight)}"
        for name, one in far.items()
    )
    return f"{each}. The others, at {reach} times, weigh 1."
