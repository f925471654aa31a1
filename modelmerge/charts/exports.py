"""A report as Markdown, for pull requests and summaries of jobs, and as a table of comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, cast

from modelmerge.charts import tables
from modelmerge.evaluation.conclusions import conclusion, verdicts
from modelmerge.evaluation.report import Report, command
from modelmerge.record.markdown import table, words
from modelmerge.record.redaction import published_report


def markdown(report: Report) -> str:
    """What a report comes to, its gates, tables and notes: to be shown to others, and so without folders of here."""
    report = cast(Report, published_report(report))
    parts = [f"### {command(report)}", " ".join(map(words, conclusion(report)))]
    if "gate" in report:
        failures = verdicts(report)
        said = "; ".join(failures or report["gate"]["gates"])
        parts.append(f"{'❌ **Failed**' if failures else '✅ **Passed**'}: {words(said)}")
    for each in tables.of_report(report):
        rows = [
            [f"**{words(cell)}**" if isinstance(cell, tables.Best) else words(cell) for cell in row]
            for row in (*each.rows, *each.foot)
        ]
        numbers = range(each.words, len(each.columns))
        parts += [f"**{words(each.title)}**", table([*map(words, each.columns)], rows, right=numbers)]
    parts += ["\n".join(f"- {words(note)}" for note in report["notes"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def values(report: Report) -> str:
    """All figures as comma-separated values, unrounded: a row for each score, or for each layer, model and expert."""
    rows = [*(_layers(report) if report["suite"] == "weights" else _scores(report))]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _scores(report: Report) -> Iterator[dict[str, Any]]:
    for model in report["models"]:
        for task, score in model["scores"].items():
            named = ("metric", "score", "stderr", "count", "normalised")
            yield {
                "model": model["name"], "role": model["role"], "task": task,
                **{name: score.get(name) for name in named}, **(score.get("figures") or {}),
            }  # fmt: skip


def _layers(report: Report) -> Iterator[dict[str, Any]]:
    layers = {"whole model": report["model"], **report["layer_types"], **report.get("tensors", {})}
    for layer, figures in layers.items():
        shared = {name: figures["experts"][name] for name in ("sign_conflict", "minority_sign_share")}
        for model, own in figures["models"].items():
            for expert, closeness in own["experts"].items():
                alone = {name: own[name] for name in ("norm", "apgd_gap")}
                yield {"layer": layer, **shared, "model": model, **alone, "expert": expert, **closeness}
