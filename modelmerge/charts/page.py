"""A report as one HTML file: its tables, charts, settings and notes; light and dark, on screen and on paper.

Charts are HTML and SVG of their own here, not drawings: their words wrap, follow the reader's type and colours, and
can be searched; heatmaps are tables. The file asks for nothing: its policy forbids every request and every script but
its own, whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2 import UndefinedError as Incomplete
from markupsafe import Markup, escape

from modelmerge.charts import colours, tables
from modelmerge.charts.figures import Chart, Heatmap, Scores, Series, of_report, ticks
from modelmerge.charts.names import clean, wrap
from modelmerge.checkpoint.staging import replace_file
from modelmerge.evaluation.report import Input, Report

__all__ = ["Incomplete", "render", "write"]  # Incomplete: what render raises of what is no report
_HERE = Path(__file__).parent
# Of a report, what is in its tables, charts and notes; all else are settings.
_NO_SETTINGS = {
    "suite", "format", "created", "device", "versions", "tasks", "models", "notes", "comparison", "gate", "base",
    "experts", "model", "layer_types", "tensors", "remark", "own_experts",
}  # fmt: skip
# Of a model, what is in the tables, or stands for what is.
_OF_INPUTS = {
    "name", "role", "reference", "path", "files", "scores", "average", "average_stderr", "normalised", "digest",
    "cached",
}  # fmt: skip
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",  # a disc, a square, a diamond
    "M-4-4h8v8h-8Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M0-5L5 4H-5Z",  # triangles
    "M0 5L5-4H-5Z",
    "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3Z",  # crosses
    "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
    "M0-6L1.8-1.9L6-1.5L2.8 1.4L3.8 6L0 3.6L-3.8 6L-2.8 1.4L-6-1.5L-1.8-1.9Z",  # a star
)
_DOT = "M-2.5 0a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0 -5 0Z"


def write(report: Report, file: Path) -> None:
    """Write a report's page; what is there is replaced.

    Raises:
        OutputError: The file cannot be written.
    """
    replace_file(file.parent, file.name, render(report).encode())


def render(report: Report) -> str:
    """A report's page."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.tests["best"] = lambda cell: isinstance(cell, tables.Best)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    charts = of_report(report)
    names = [model["name"] for model in report["models"] if model.get("role", "model") == "model"]
    return environment.get_template("page.html").render(
        report=report, title=f"{report['suite']}: {', '.join(map(clean, names))}", script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"), palette=_palette(),
        figures=[_figure(chart) for chart in charts], tables=tables.of_report(report), scores=_every_score(report),
        files=_files(report),
        beside=[(entry["name"], [(k, *_setting(v)) for k, v in entry.items() if v and k not in _OF_INPUTS])
                for entry in _inputs(report)],
        settings_of_report=[(name, *_setting(value)) for name, value in report.items() if name not in _NO_SETTINGS],
    )  # fmt: skip


def _breakable(name: str) -> Markup:
    """A name that a line may end in, after a sign."""
    return Markup("<wbr>").join(escape(part) for part in re.findall(r".*?[_/.:-]+(?=\w)|.+", name, flags=re.DOTALL))


def _palette() -> dict[str, list[tuple[str, str, str]]]:
    """Of light and of dark: a name of a class, its colour, and the ink on it."""
    return {
        mode: [
            *((f"s{i}", colour, colours.ink_on(colour)) for i, colour in enumerate(series)),
            *((f"h{step}", colours.shade(step, dark=dark), colours.ink_on(colours.shade(step, dark=dark)))
              for step in range(-colours.STEPS, colours.STEPS + 1)),
        ]
        for mode, series, dark in (("light", colours.SERIES, False), ("dark", colours.SERIES_DARK, True))
    }  # fmt: skip


def _figure(chart: Chart) -> dict[str, Any]:
    """What the template shows of a chart."""
    if isinstance(chart, Heatmap):
        return {"kind": "heatmap", "chart": chart, "cells": _cells(chart), "scale": _scale(chart)}
    looks = _looks(chart.series)
    low, high = chart.reach()
    radar = _radar(chart) if chart.round() else None
    return {"kind": "scores", "chart": chart, "looks": looks, "bars": _bars(chart), "radar": radar, "ticks": [
        (100 * (tick - low) / (high - low), chart.tick(tick)) for tick in ticks(low, high)
    ]}  # fmt: skip


def _looks(series: Iterable[Series]) -> list[dict[str, str]]:
    """What each series looks like: the classes of its fill, the path of its marker."""
    looks, counts = [], {"base": 0, "expert": 0, "model": 0}
    for each in series:
        i = counts[each.role]
        counts[each.role] += 1
        count = len(colours.SERIES)
        if each.role == "model":
            marker = _MARKERS[i % len(_MARKERS)]
            looks.append({"fill": f"s{i % count} hatch{i // count % 4}", "marker": marker})
        else:
            looks.append({"fill": f"{each.role} hatch{i % 4}", "marker": _DOT})
    return looks


def _bars(chart: Scores) -> list[list[dict[str, Any]]]:
    """For each task the bar of each series, in per cent of the axis."""
    low, high = chart.reach()

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 3)

    lanes = []
    for i in range(len(chart.tasks)):
        lane = []
        for series in chart.series:
            value, error = series.values[i], series.errors[i]
            bar: dict[str, Any] = {"series": series.name, "text": chart.text(value, error)}
            bar |= {"missing": value is None}
            bar["end"] = place(0.0 if value is None else max(value + (error or 0.0), 0.0))
            if value is not None:
                start, end = sorted((place(0.0), place(value)))
                bar |= {"start": start, "width": round(end - start, 3)}
            if value is not None and error is not None:
                bar["whisker"] = (place(value - error), round(place(value + error) - place(value - error), 3))
            lane.append(bar)
        lanes.append(lane)
    return lanes


def _radar(chart: Scores) -> dict[str, Any]:
    """A radar chart in SVG's coordinates: a pixel is a hundredth of the drawing's inch."""
    tasks, high = chart.spokes(), chart.reach()[1]
    radius = max(190.0, 16.0 * len(tasks))
    labels = [wrap(task, 16, 3).split("\n") for task in tasks]
    beside = 14 + 9 * max(len(line) for lines in labels for line in lines)
    width, height = 2 * (radius + beside), 2 * (radius + 24 + 15 * max(map(len, labels)))
    x, y = width / 2, height / 2
    turns = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    ways = [(math.sin(turn), -math.cos(turn)) for turn in turns]  # clockwise from the top
    spokes = []
    for (across, down), words, task in zip(ways, labels, tasks, strict=True):
        half = 15 * len(words) / 2
        anchor = "middle" if abs(across) < 1e-6 else "start" if across > 0 else "end"
        top = y + down * (radius + 14 + half) - half
        spokes.append({"x": round(x + across * radius, 2), "y": round(y + down * radius, 2), "anchor": anchor,
                       "label": round(x + across * (radius + 14), 2), "task": task,
                       "lines": [(round(top + 15 * i + 11.5, 2), line) for i, line in enumerate(words)]})  # fmt: skip

    def point(value: float, turn: int) -> tuple[float, float]:
        across, down = ways[turn]
        return round(x + across * radius * value / high, 2), round(y + down * radius * value / high, 2)

    lines: list[dict[str, Any]] = []
    for series in chart.series:
        scores = [(i, v, series.errors[i]) for i, v in enumerate(series.values[: len(tasks)]) if v is not None]
        points: dict[int, dict[str, Any]] = {
            i: {"at": point(value, i), "label": f"{series.name}, {tasks[i]}: {chart.text(value, error)}",
                "reach": None if error is None else (*point(value - error, i), *point(value + error, i))}
            for i, value, error in scores
        }  # fmt: skip
        # A line from each point to the next; none from or to where there is no score.
        pairs = [
            (points[i]["at"], points[(i + 1) % len(tasks)]["at"]) for i in points if (i + 1) % len(tasks) in points
        ]
        path = " ".join(f"M{a[0]} {a[1]}L{b[0]} {b[1]}" for a, b in pairs)
        lines.append({"path": path, "points": list(points.values())})
    rings = [(round(tick / high * radius, 2), chart.tick(tick)) for tick in ticks(0.0, high) if tick > 0]
    return {"width": round(width, 1), "height": round(height, 1), "x": round(x, 2), "y": round(y, 2), "rings": rings,
            "spokes": spokes, "lines": lines}  # fmt: skip


def _cells(chart: Heatmap) -> list[list[tuple[str, str]]]:
    """For each cell its class and its text."""
    return [
        [("none" if value is None else f"h{colours.step(value, chart.limit)}", chart.text(value)) for value in row]
        for row in chart.values
    ]


def _scale(chart: Heatmap) -> list[tuple[str, str]]:
    """The shades from one end to the other, with the figures at the ends and in the middle."""
    first = -colours.STEPS if chart.has_negative() else 0
    figures = {first: f"{-chart.limit if first else 0:g}", 0: "0", colours.STEPS: f"{chart.limit:g}"}
    return [(f"h{step}", figures.get(step, "")) for step in range(first, colours.STEPS + 1)]


def _every_score(report: Report) -> tables.Table | None:
    """All figures of every model at every task, unrounded but for noise."""
    if report["suite"] == "weights":
        return None
    others: dict[str, None] = {}
    for model in report["models"]:
        for score in model["scores"].values():
            others |= dict.fromkeys(score.get("figures") or ())
    rows = []
    for model in report["models"]:
        for task in report["tasks"]:
            score = model["scores"][task]
            figures = score.get("figures") or {}
            rows.append([
                model["name"], model["role"], task, score["metric"], _exact(score["score"]),
                _exact(score["stderr"], "-"), "-" if score["count"] is None else f"{score['count']:,}",
                _exact(score.get("normalised"), "-"),
                *(_exact(figures[name]) if name in figures else "-" for name in others),
            ])  # fmt: skip
    columns = ["model", "role", "task", "metric", "score", "standard error", "items", "normalised", *others]
    return tables.table("Every score", columns, rows, words=4)


def _exact(value: float | None, none: str = "n/a") -> str:
    return none if value is None else f"{value:.6g}"


def _inputs(report: Report) -> list[Mapping[str, Any]]:
    if report["suite"] != "weights":
        return [*report["models"]]
    roles: list[tuple[str, Sequence[Input]]] = [
        ("base", [report["base"]]),
        ("expert", report["experts"]),
        ("model", report["models"]),
    ]
    return [{**entry, "role": role} for role, entries in roles for entry in entries]


def _files(report: Report) -> tables.Table:
    """What was read: each file of each model with its digest."""
    rows = [
        [entry["name"], entry["role"], entry["reference"], name, file["sha256"], f"{file['bytes']:,}"]
        for entry in _inputs(report)
        for name, file in entry["files"].items()
    ]
    return tables.table("Files", ["model", "role", "reference", "file", "sha256", "bytes"], rows, words=5)


def _setting(value: Any) -> tuple[str, str]:
    """A value on a line, and, where it does not fit there, in full."""
    if value is None:
        return "-", ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= 100 and not isinstance(value, dict):
        return text, ""
    size, what = (len(value), "value") if isinstance(value, list | dict) else (len(text), "character")
    return f"{size} {what}{'s' * (size != 1)}", value if isinstance(value, str) else json.dumps(
        value, ensure_ascii=False, indent=1
    )
