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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2 import UndefinedError as Incomplete
from markupsafe import Markup, escape

from modelmerge.charts import colours, tables
from modelmerge.charts.figures import Chart, Course, Heatmap, Scores, Series, of_report, ticks
from modelmerge.charts.names import clean, wrap
from modelmerge.evaluation.conclusions import conclusion, verdicts
from modelmerge.evaluation.report import Report, command
from modelmerge.evaluation.scores import in_shares, score_text
from modelmerge.record.redaction import published_report
from modelmerge.text import visible_lines

__all__ = ["Incomplete", "render"]  # Incomplete: what render raises of what is no report
_HERE = Path(__file__).parent
# Of a report, what is in its tables, charts and notes; all else are settings.
_NO_SETTINGS = {
    "suite", "format", "created", "device", "versions", "tasks", "models", "notes", "comparison", "gate", "base",
    "experts", "model", "layer_types", "tensors", "remark", "own_experts", "searched",
}  # fmt: skip
# Of a model, what is in the tables, or stands for what is.
_OF_INPUTS = {
    "name", "role", "reference", "path", "files", "scores", "average", "average_stderr", "normalised", "digest",
    "cached",
}  # fmt: skip


def render(report: Report) -> str:
    """A report's page: to be shown to others, and so without the folders that files lie in here."""
    report = cast(Report, published_report(report))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_as_text,
    )  # fmt: skip
    environment.filters["breakable"] = _breakable
    environment.tests["best"] = lambda cell: isinstance(cell, tables.Best)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    names = [model["name"] for model in report["models"] if model.get("role", "model") == "model"]
    head, *more = conclusion(report) or [f"{report['suite']}: {', '.join(map(clean, names))}"]
    return environment.get_template("page.html").render(
        report=report, title=head.removesuffix("."), conclusion=more, verdicts=verdicts(report), script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"), colours=colours,
        figures=[_figure(chart, report) for chart in of_report(report)], command=command(report),
        tables=tables.of_report(report), scores=_every_score(report),
        files=_files(report),
        beside=[(entry["name"], [(k, *_setting(v)) for k, v in entry.items() if v and k not in _OF_INPUTS])
                for entry in _inputs(report)],
        settings_of_report=[(name, *_setting(value)) for name, value in report.items() if name not in _NO_SETTINGS],
    )  # fmt: skip


def _as_text(value: Any) -> Any:
    """What the template shows, whoever it is from: jinja escapes the marks, and this what steers and does not show."""
    return visible_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breakable(name: str) -> Markup:
    """A name that a line may end in, after a sign."""
    parts = re.findall(r".*?[_/.:-]+(?=\w)|.+", visible_lines(name), flags=re.DOTALL)
    return Markup("<wbr>").join(map(escape, parts))


def _figure(chart: Chart, report: Report) -> dict[str, Any]:
    """What the template shows of a chart."""
    if isinstance(chart, Heatmap):
        return {"chart": chart}
    return _course(chart, in_shares(report)) if isinstance(chart, Course) else _scores(chart)


def _course(chart: Course, share: bool) -> dict[str, Any]:
    """A search, in SVG's coordinates: the candidates from left to right, the best so far as steps."""
    low, high = chart.reach()
    count = len(chart.values)

    def across(place: float) -> float:
        return round(60 + 640 * (place + 0.5) / count, 2)

    def down(value: float) -> float:
        return round(10 + 240 * (high - value) / (high - low), 2)

    best = [(i, value) for i, value in enumerate(chart.best) if not math.isnan(value)]
    steps = "H".join(f"{across(i)}V{down(value)}" for i, value in best) + f"H{across(count - 0.5)}"
    points = [(across(i), down(v), i + 1, score_text(v, share=share))
              for i, v in enumerate(chart.values) if not math.isnan(v)]  # fmt: skip
    return {
        "chart": chart, "path": f"M{across(best[0][0])} {down(best[0][1])}H{steps}" if best else "", "points": points,
        "base": None if chart.base is None else down(chart.base),
        "rules": [(down(tick), score_text(tick, share=share)) for tick in ticks(low, high)],
        "places": [(across(int(i) - 1), int(i)) for i in ticks(1, count) if i == int(i)] if count > 1 else [],
    }  # fmt: skip


def _scores(chart: Scores) -> dict[str, Any]:
    """What the template shows of scores."""
    low, high = chart.reach()
    places = [(100 * (tick - low) / (high - low), chart.tick(tick)) for tick in ticks(low, high)]
    if chart.many():
        return {"chart": chart, "dots": _dots(chart), "ticks": places}
    radar = _radar(chart) if chart.round() else None
    return {"chart": chart, "looks": _looks(chart), "bars": _bars(chart), "radar": radar, "ticks": places}


def _dots(chart: Scores) -> list[dict[str, Any]]:
    """A row for each series, the best first: its last value as a dot, the others as ticks, in per cent of the axis."""
    rows = []
    for series in chart.sorted():
        value, error = series.values[-1], series.errors[-1]
        tasks = zip(chart.tasks[:-1], series.values, strict=False)
        rows.append({
            "name": series.name, "role": series.role, "text": chart.text(value, error),
            "at": None if value is None else _place(chart, value), "whisker": _whisker(chart, value, error),
            "marks": [(_place(chart, each), f"{t}: {chart.text(each)}") for t, each in tasks if each is not None],
        })  # fmt: skip
    return rows


def _place(chart: Scores, value: float) -> float:
    """Where a value lies on the axis, in per cent of it."""
    low, high = chart.reach()
    return round(100 * (value - low) / (high - low), 3)


def _whisker(chart: Scores, value: float | None, error: float | None) -> tuple[float, float] | None:
    """Where the standard error begins on the axis and how far it goes."""
    if value is None or error is None:
        return None
    start = _place(chart, value - error)
    return start, round(_place(chart, value + error) - start, 3)


def _looks(chart: Scores) -> list[dict[str, Any]]:
    """What each series looks like: the classes of its fill, the place of its marker."""
    looks: list[dict[str, Any]] = []
    count = len(colours.SERIES)
    for each, i in zip(chart.series, chart.ranks(), strict=True):
        if each.role == "model":
            looks.append({"fill": f"s{i % count} hatch{i // count % 4}", "marker": i % 8})
        else:
            looks.append({"fill": f"{each.role} hatch{i % 4}", "marker": -1})
    return looks


def _bars(chart: Scores) -> list[list[dict[str, Any]]]:
    """For each task the bar of each series, in per cent of the axis."""

    def bar(series: Series, task: int) -> dict[str, Any]:
        value, error = series.values[task], series.errors[task]
        start, end = sorted((_place(chart, 0.0), _place(chart, value or 0.0)))
        return {
            "series": series.name, "text": chart.text(value, error), "missing": value is None,
            "start": start, "width": round(end - start, 3), "whisker": _whisker(chart, value, error),
            "end": _place(chart, max((value or 0.0) + (error or 0.0), 0.0)),
        }  # fmt: skip

    return [[bar(series, task) for series in chart.series] for task in range(len(chart.tasks))]


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


def _every_score(report: Report) -> tables.Table | None:
    """All figures of every model at every task, unrounded but for noise."""
    if report["suite"] == "weights":
        return None
    scores = [score for model in report["models"] for score in model["scores"].values()]
    others = dict.fromkeys(name for score in scores for name in score.get("figures") or ())
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
    if "experts" not in report:
        return [*report["models"]]
    models = [] if "searched" in report else report["models"]
    roles = {"base": [report["base"]], "expert": report["experts"], "model": models}
    return [{**entry, "role": role} for role, entries in roles.items() for entry in entries]


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
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return f"{size} {what}{'s' * (size != 1)}", whole
