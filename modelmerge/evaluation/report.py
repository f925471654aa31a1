"""The report of a suite or of a search, as plain data: what `evaluate` returns, and `eval SUITE` prints as JSON."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

Role = Literal["base", "expert", "model"]


class ScoreEntry(TypedDict, total=False):
    """A model's score at a task; `lower` and `figures` are there only where they say something."""

    score: float | None
    count: int | None
    stderr: float | None
    metric: str
    items: list[float]
    ids: list[str]
    lower: bool
    figures: dict[str, float | None]
    normalised: float | None


class ModelRow(TypedDict, total=False):
    """A model that was read, as manifests have it too, and what the suite found.

    Of suites of scores, all from `role` on; `clip` adds what a merge's experts have not seen. Of `weights`,
    `measured_rounding`: what its merge measured.
    """

    name: str
    reference: str
    path: str
    files: dict[str, dict[str, Any]]  # by name, their `sha256` and `bytes`
    role: Role
    digest: str
    scores: dict[str, ScoreEntry]
    cached: list[str]
    average: float | None
    average_stderr: float | None
    normalised: float | None
    normalised_by_published: float | None
    unseen: list[str]
    average_seen: float
    average_unseen: float
    measured_rounding: float | None


class Report(TypedDict, total=False):
    """The report of a suite, with the suite's own entries besides, such as the settings of `lm`.

    Of suites of scores: `seed`, `tasks`; `own_experts`, by task; `comparison` `with` an earlier report: of each of
    `models` the differences at `tasks` and of the `average`; `gate`, whether all models `passed`, and the `failures`.
    Of `weights`: `base`, `experts`, `remark`, `left_out`, and the figures of the `model`, of `layer_types` and of
    `tensors`: those of the `experts` and of each of the `models`. Of a search: `searched`, `base` and `experts` as its
    manifest has them, the `models` being the base and the candidates.
    """

    suite: str
    device: str
    created: str
    versions: dict[str, str]
    notes: list[str]
    models: list[ModelRow]
    seed: int | None
    tasks: list[str]
    own_experts: dict[str, str]
    comparison: dict[str, Any]
    gate: dict[str, Any]
    searched: dict[str, Any]
    published: dict[str, Any]
    base: ModelRow
    experts: list[ModelRow]
    remark: str
    left_out: dict[str, str]
    model: dict[str, Any]
    layer_types: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]


def command(report: Report) -> str:
    """The command that made a report."""
    return "modelmerge search" if "searched" in report else f"modelmerge eval {report['suite']}"
