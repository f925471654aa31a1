"""Few of a set's experts."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from torch import Tensor

from tests.benchmarks.experts.training import ExpertSet, shelved
from tests.benchmarks.experts.vision import build_vision


def subset(expert_set: ExpertSet, names: Collection[str]) -> ExpertSet:
    """The set with the experts of these names only, judged on their tasks only."""
    experts = {name: expert for name, expert in expert_set.experts.items() if name in names}

    def evaluate(state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        return {name: value for name, value in expert_set.evaluate(state, split).items() if name in experts}

    about = f"{len(experts)} experts of {expert_set.name}: {', '.join(experts)}"
    loras = {name: factors for name, factors in expert_set.loras.items() if name in experts}
    return ExpertSet(f"{expert_set.name}-few-{len(experts)}", about, expert_set.base, experts, evaluate, loras)


def build_vision_few(seed: int, count: int) -> ExpertSet:
    """`count` experts of `vision`, drawn by the seed."""
    whole = shelved("vision", seed, build_vision)
    return subset(whole, random.Random(seed).sample(list(whole.experts), count))
