"""Scoring of STS-B: numbers read from generated text, ranked against the labels.

Of the task in `tasks/flan_t5_glue_stsb.yaml`, by its name there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from scipy.stats import rankdata

Pair = tuple[float, float]  # of the number that a model wrote and the label


def pair(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Pair]:
    """The number that the text is, 0 where it is none, and the label, both as text to one decimal has it.

    Raises:
        ValueError: The label is hidden, as those of test splits are.
    """
    if not doc["label"] >= 0:
        raise ValueError(f"the label is {doc['label']}: it is hidden")
    return {"spearman": (_number(results[0]), float(f"{doc['label']:.1f}"))}


def rho(pairs: Sequence[Pair]) -> float:
    """Spearman's rank correlation; NaN where all numbers, or all labels, are the same."""
    numbers, labels = (numpy.array(values) for values in zip(*pairs, strict=True))
    if numpy.ptp(numbers) == 0 or numpy.ptp(labels) == 0:
        return math.nan
    return float(numpy.corrcoef(rankdata(numbers), rankdata(labels))[0, 1])


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0
