"""Sets of small real experts, trained on the spot, on which the defaults of the merging methods are chosen.

Each set has its own network, tasks and strength of fine-tuning, so that a default that wins on all of them is not
one that fits a single model. The data come with scikit-learn, matplotlib and Python itself: nothing is downloaded. A
set is the same for a seed on one machine; the text also changes with the version of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.benchmarks.experts.decoders import build_small_lora, build_text
from tests.benchmarks.experts.encoders import build_encoder, build_encoder_lora
from tests.benchmarks.experts.few import build_vision_few, subset
from tests.benchmarks.experts.perceptrons import build_digits_strong, build_many
from tests.benchmarks.experts.training import ExpertSet, save, shelved
from tests.benchmarks.experts.views import build_digits, build_lora
from tests.benchmarks.experts.vision import build_unequal, build_vision, build_vision_2

__all__ = ["SETS", "ExpertSet", "build", "save", "subset"]

SETS: dict[str, Callable[[int], ExpertSet]] = {
    "digits": build_digits,
    "digits-strong": build_digits_strong,
    "text": build_text,
    "many": build_many,
    "lora": build_lora,
    "vision": build_vision,
    "vision-2": build_vision_2,
    "unequal": build_unequal,
    "unequal-2": partial(build_unequal, far=2),
    "vision-few-2": partial(build_vision_few, count=2),
    "vision-few-3": partial(build_vision_few, count=3),
    "vision-few-4": partial(build_vision_few, count=4),
    "small-lora": build_small_lora,
    "encoder": build_encoder,
    "encoder-lora": build_encoder_lora,
}


def build(name: str, seed: int, cache: Path | None = None) -> ExpertSet:
    """The set of that name; with a directory `cache`, trained once and then read from there.

    Empty it when the training changes: files are known by set and seed only.
    """
    return shelved(name, seed, SETS[name], cache)
