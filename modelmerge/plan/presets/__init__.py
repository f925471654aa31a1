"""Presets: published sets of a base and its experts, with the settings that the papers give for them.

A preset is one JSON file here: `summary`, `base`, `experts` (name to reference) and `methods` (method to its options,
and `include` where the paper merges fewer tensors than the method would take). It stands for references and options;
a recipe holds those, and never the preset's name.

Sources: the expert collections of FusionBench (https://arxiv.org/abs/2406.03280) and MergeBench
(https://arxiv.org/abs/2505.10833); the settings are those of the methods' own papers for such models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.errors import UsageError, suggestion

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Preset:
    """A base, experts by name, and by method the options that differ from task to task."""

    name: str
    summary: str
    base: str
    experts: Mapping[str, str]
    methods: Mapping[str, Mapping[str, Any]]


def names() -> tuple[str, ...]:
    """The presets there are, by their files."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def load(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: There is no such preset.
    """
    if name not in names():
        hint = suggestion(name, names(), also=f"there are: {', '.join(names())}")
        raise UsageError(f"there is no preset '{name}'", hint=hint)
    return Preset(name, **json.loads((_FOLDER / f"{name}.json").read_bytes()))
