"""Scores in the model cards of the models that were evaluated: a table, a picture, and what the Hub indexes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelmerge.charts import drawing
from modelmerge.charts.figures import of_report
from modelmerge.checkpoint.output import CARD, replace_file
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.evaluation.report import ModelRow, Report
from modelmerge.progress import Reporter
from modelmerge.record import card
from modelmerge.record.loading import task_of

PICTURE = "evaluation.png"
_TASKS = {"clip": "zero-shot-image-classification"}  # whatever the model, by the suite
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def refuse_cardless(models: Sequence[Reference]) -> None:
    """Refuse models that have no place for a card.

    Raises:
        UsageError: One is no directory on this machine.
    """
    for model in models:
        if not model.is_here or model.adapters or not model.path.is_dir():
            raise UsageError(
                f"'{model.text}' is no directory here, whose card could be written",
                option="update_card",
                hint="evaluate the directory, then push it",
            )


def write_cards(models: Sequence[Reference], report: Report, progress: Reporter) -> None:
    """Put the scores of each model into its card, with a picture of them where one can be drawn.

    Raises:
        ModelMergeError: A card cannot be read.
        OutputError: A file cannot be written.
    """
    try:
        for model in models:
            drawing.check(model.path / PICTURE)
        picture = PICTURE
    except ModelMergeError as error:
        progress.note(f"without a picture in the card: {error.message}; {error.hint}")
        picture = None
    beside = [row for row in report["models"] if row["role"] != "model"]
    for model, row in zip(models, report["models"][-len(models) :], strict=True):
        if picture is not None:
            drawing.save(of_report({**report, "models": [*beside, row]}), model.path / picture)
        place = model.path / CARD
        text = card.read(place) if place.exists() else card.titled(model.name)
        text = card.with_results(text, _results(report, row, model.path), name=model.name, picture=picture)
        replace_file(model.path, CARD, text.encode())


def _results(report: Report, row: ModelRow, directory: Path) -> list[card.Result]:
    kind = _TASKS.get(report["suite"]) or card.front_matter(directory)[0].get("pipeline_tag") or task_of(directory)
    results = []
    for task, score in row["scores"].items():
        if score["score"] is None:
            continue
        detail = [f"{score['count']:,} items" if score["count"] else ""]
        detail += [f"standard error {score['stderr']:.2g}" if score["stderr"] else ""]
        detail += [f"{score['normalised']:.1%} of the expert's" if score["normalised"] is not None else ""]
        data, split = _data(report, task)
        results.append(
            card.Result(
                task=kind or "other", dataset=task, metric=score["metric"], value=score["score"],
                detail=", ".join(part for part in detail if part), dataset_id=data, split=split,
            )
        )  # fmt: skip
    return results


def _data(report: Any, task: str) -> tuple[str | None, str | None]:
    """The data set of a task on the Hub, and its split, as far as the suite says it."""
    parts = report.get("harness", {}).get(task, {}).get("tasks", {})
    entry: dict[str, Any] = report.get("data", {}).get(task) or next(iter(parts.values()), {})
    name = str(entry.get("data")).partition("@")[0]
    return name if _ON_HUB.fullmatch(name) and not Path(name).exists() else None, entry.get("split")
