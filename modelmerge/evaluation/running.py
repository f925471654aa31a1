"""What all suites share: the models beside those evaluated, and how a suite runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelmerge.progress import SILENT, Reporter

Models = Sequence[str | Path] | Mapping[str, str | Path]  # `[NAME=]REF` each, or a mapping of name to reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What every suite takes besides the models and its own options; `weights` uses four of them.

    Args:
        base: The base. Suites of scores evaluate it too; adapters and task vectors need it.
        experts: The experts. Suites of scores evaluate them too, and normalise a task's scores by the expert of its
            name.
        seed: Seed of all random numbers; None is the suite's default.
        cache: Reuse scores that were measured before in the same way.
        compare: File of an earlier report; the report has the differences to it, with their significance.
        fail_under: Least values, `avg=0.70`, `normalized=0.95` or `TASK=0.8`. `gate` in the report says whether every
            model reaches them.
        update_card: Write the scores into each model's card. The models must be local directories.
        device: Where models run: cpu, cuda, cuda:N or auto.
        progress: Receives progress and notes.
    """

    base: str | Path | None = None
    experts: Models = ()
    seed: int | None = None
    cache: bool = True
    compare: str | Path | None = None
    fail_under: Sequence[str] = ()
    update_card: bool = False
    device: str = "auto"
    progress: Reporter = SILENT
