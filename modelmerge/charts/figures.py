"""What charts show, as plain data, whoever draws it: scores of models at tasks, and figures by row and column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelmerge.evaluation.report import ModelRow, Report, Role
from modelmerge.evaluation.scores import mean, mean_error, plain, ranked, score_text
from modelmerge.methods.coefficients import Options

AVERAGE = "average"
RADAR = range(3, 21)  # so many tasks a radar chart can show
_MOST = 8  # models in bars or on a radar: more are dots, a row for each
_LEAST = 0.1  # cosines nearer to 0 than this are no conflict, and pale


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A model's values, one for each task, None where there is none; `errors` are their standard errors."""

    name: str
    role: Role
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The values of models at tasks that one axis can show.

    `shares`: all are between 0 and 1, and shown in per cent. `average`: the last of `tasks` is the mean of the others.
    """

    title: str
    tasks: tuple[str, ...]
    series: tuple[Series, ...]
    shares: bool
    lower: bool = False
    average: bool = False

    def ranks(self) -> list[int]:
        """Each series' place among those of its role."""
        roles = [series.role for series in self.series]
        return [roles[:i].count(role) for i, role in enumerate(roles)]

    def spokes(self) -> tuple[str, ...]:
        """The tasks that a radar chart shows: all but the average."""
        return self.tasks[:-1] if self.average else self.tasks

    def round(self) -> bool:
        """Whether a radar chart can show it."""
        return len(self.spokes()) in RADAR and self.shares

    def many(self) -> bool:
        """Whether there are so many models that their colours would look alike."""
        return sum(series.role == "model" for series in self.series) > _MOST

    def sorted(self) -> list[Series]:
        """The series by their last value, which is the average where there is one, the best first."""
        sign = 1 if self.lower else -1
        return sorted(self.series, key=lambda each: (each.values[-1] is None, sign * (each.values[-1] or 0.0)))

    def text(self, value: float | None, error: float | None = None) -> str:
        """A value for people, with its standard error if there is one."""
        return score_text(value, error, share=self.shares)

    def tick(self, value: float) -> str:
        """What stands at a tick of the axis."""
        return f"{100 * value:g}" if self.shares else f"{value:g}"

    def reach(self) -> tuple[float, float]:
        """The ends of the axis, round numbers, with zero between them."""
        ends = [
            value + way * (error or 0.0)
            for series in self.series
            for value, error in zip(series.values, series.errors, strict=True)
            if value is not None
            for way in (-1, 1)
        ]
        low, high = min([0.0, *ends]), max([0.0, *ends])
        if self.shares:  # a standard error may reach beyond what a share can be
            return 0.0, _round_up(min(high, 1.0)) or 1.0
        return -_round_up(-low), _round_up(high) or (1.0 if not low else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Figures by row and column, None where there is none.

    Shades reach their ends at `limit` above `centre`, and as far below it where a value is. Without `diagonal`, row and
    column of the same place have nothing to say of one another.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    limit: float
    centre: float = 0.0
    diagonal: bool = True
    what: str = ""  # what a value is, in a word or two

    def has_negative(self) -> bool:
        """Whether a value is below the centre."""
        return any(value is not None and value < self.centre for row in self.values for value in row)

    def text(self, value: float | None) -> str:
        """A figure for people, with as many digits as the shades need."""
        return "n/a" if value is None else f"{value:.{max(0, 2 - math.floor(math.log10(self.limit)))}f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """A search: the mean of each candidate, in the order in which they were merged, NaN where there is none.

    `best` is that of the best so far; `base` the base's.
    """

    title: str
    values: tuple[float, ...]
    best: tuple[float, ...]
    base: float | None

    def reach(self) -> tuple[float, float]:
        """The ends of the axis, with a little room."""
        ends = [v for v in (*self.values, self.base) if v is not None and not math.isnan(v)] or [0.0]
        room = 0.05 * (max(ends) - min(ends)) or 0.5
        return min(ends) - room, max(ends) + room


Chart = Scores | Heatmap | Course


def heatmap(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    what: str = "",
    limit: float | None = None,
    centre: float = 0.0,
    diagonal: bool = True,
) -> Heatmap:
    """A heatmap of values `[rows][columns]`; NaN counts as missing. Without `limit`, the shades reach what is there."""
    cells = tuple(tuple(None if v is None or not math.isfinite(v) else float(v) for v in row) for row in values)
    largest = max((abs(value - centre) for row in cells for value in row if value is not None), default=0.0)
    return Heatmap(
        title=title, rows=tuple(rows), columns=tuple(columns), values=cells, what=what, centre=centre,
        limit=(_round_up(largest) or 1.0) if limit is None else limit, diagonal=diagonal,
    )  # fmt: skip


def of_report(report: Report) -> list[Chart]:
    """The charts of a report of `modelmerge eval` or of a search."""
    if report["suite"] == "weights":
        return [*of_weights(report)]
    return [*([of_search(report["searched"])] if "searched" in report else []), *of_scores(report)]


def of_scores(report: Report) -> list[Scores]:
    """The scores of a report: one chart of the tasks that are shares, one for each other metric."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for task in report["tasks"]:
        scores = [model["scores"][task] for model in report["models"]]
        values = [score["score"] for score in scores if score["score"] is not None]
        lower = bool(scores[0].get("lower"))
        shares = not lower and all(0.0 <= value <= 1.0 for value in values)
        groups.setdefault(("" if shares else scores[0]["metric"], lower), []).append(task)
    charts = []
    for (_, lower), tasks in groups.items():
        chart = _scores(report, tasks, lower)
        # Dots in a row are of one scale and one order: without an average, a chart for each task.
        charts += [chart] if chart.average or not chart.many() else [_scores(report, [t], lower) for t in tasks]
    return charts


def _scores(report: Report, tasks: Sequence[str], lower: bool) -> Scores:
    base = [model for model in report["models"] if model["role"] == "base"]
    rows = [
        *(_of_model(model, tasks) for model in base), *_of_experts(report, tasks),
        *(_of_model(model, tasks) for model in ranked(report)),
    ]  # fmt: skip
    average = len(tasks) > 1 and not lower
    if average:
        rows = [_with_average(series) for series in rows]
    values = [value for series in rows for value in series.values if value is not None]
    shares = not lower and all(0.0 <= value <= 1.0 for value in values)
    metrics = sorted({model["scores"][task]["metric"] for model in report["models"] for task in tasks})
    words = [", ".join(metrics), *(["less is better"] if lower else []), *(["per cent"] if shares else [])]
    if any(error is not None for series in rows for error in series.errors):
        words.append("± standard error")
    title = ", ".join(words)
    rising = [task for task in report["tasks"] if not report["models"][0]["scores"][task].get("lower")]
    label = AVERAGE if len(tasks) == len(rising) else f"{AVERAGE} of these"
    return Scores(
        title=title[0].upper() + title[1:], tasks=(*tasks, label) if average else (*tasks,), series=tuple(rows),
        shares=shares, lower=lower, average=average,
    )  # fmt: skip


def _of_model(model: ModelRow, tasks: Sequence[str]) -> Series:
    scores = [model["scores"][task] for task in tasks]
    return Series(
        name=model["name"], role=model["role"], values=tuple(score["score"] for score in scores),
        errors=tuple(score["stderr"] for score in scores),
    )  # fmt: skip


def _of_experts(report: Report, tasks: Sequence[str]) -> list[Series]:
    """The experts: those that are for one of the tasks as one series, each at its own task; others as they are."""
    experts = {plain(model["name"]): model for model in report["models"] if model["role"] == "expert"}
    owners = report.get("own_experts") or {task: task for task in report["tasks"]}  # what older reports leave out
    by_task = {task: experts.get(plain(owners.get(task, ""))) for task in report["tasks"]}
    names = {model["name"] for model in by_task.values() if model is not None}
    others = [model for model in report["models"] if model["role"] == "expert" and model["name"] not in names]
    rows = [_of_model(model, tasks) for model in others]
    scores = [None if (model := by_task[task]) is None else model["scores"][task] for task in tasks]
    if any(score is not None for score in scores):
        rows.insert(0, Series(
            name="each task's expert", role="expert",
            values=tuple(None if score is None else score["score"] for score in scores),
            errors=tuple(None if score is None else score["stderr"] for score in scores),
        ))  # fmt: skip
    return rows


def _with_average(series: Series) -> Series:
    average = mean(series.values)
    error = None if average is None else mean_error(series.errors)
    return Series(
        name=series.name, role=series.role, values=(*series.values, average), errors=(*series.errors, error)
    )  # fmt: skip


def of_weights(report: Report) -> list[Heatmap]:
    """The cosines of a report: of the experts with one another, and of each model with each expert, by layer."""
    whole = report["model"]
    experts, cosines = list(whole["experts"]["norms"]), whole["experts"]["cosines"]
    maps = []
    if len(experts) > 1:
        # The ones along the diagonal say nothing, and would leave the others pale.
        others = [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(cosines)]
        sizes = [abs(v) for row in others for v in row if v is not None]
        title = "Cosines of the experts' task vectors with one another"
        maps.append(heatmap(title, experts, experts, others, what="cosine", limit=_reach(sizes), diagonal=False))
    layers: dict[str, Any] = {"whole model": whole, **report["layer_types"], **report.get("tensors", {})}
    by_model = {
        name: [[layer["models"][name]["experts"][e]["cosine"] for e in experts] for layer in layers.values()]
        for name in whole["models"]
    }
    # The cosine of what has but one entry is 1 or -1, whatever it is.
    wide = [layer["entries"] > 1 for layer in layers.values()]
    sizes = [
        abs(v) for rows in by_model.values() for row, more in zip(rows, wide, strict=True) for v in row
        if more and v is not None
    ]  # fmt: skip
    limit = _reach(sizes)  # the same for all models, so that shades compare
    for name, rows in by_model.items():
        title = f"Cosines of {name} with each expert, by layer"
        maps.append(heatmap(title, [*layers], experts, rows, what="cosine", limit=limit))
    return maps


def _reach(sizes: Sequence[float]) -> float:
    """How far the shades of cosines of these sizes go."""
    return max(_round_up(max(sizes, default=1.0)), _LEAST)


def of_coefficients(recipe: Mapping[str, Any]) -> Heatmap:
    """The coefficients of a manifest's recipe by tensor and expert; shades say how far they are from their start."""
    coefficients: Mapping[str, Mapping[str, float]] = recipe["coefficients"]
    experts = list(next(iter(coefficients.values())))
    rows = {tensor: [row[expert] for expert in experts] for tensor, row in coefficients.items()}
    if all(row == next(iter(rows.values())) for row in rows.values()):
        rows = {"all tensors": next(iter(rows.values()))}
    start = {"init": Options().init, **recipe["unlabelled"], **recipe["options"]}["init"]
    title = f"Coefficients found on unlabelled data, which started at {start:g}"
    return heatmap(title, [*rows], experts, [*rows.values()], what="coefficient", centre=start)


def of_search(searched: Mapping[str, Any]) -> Course:
    """The course of a search, of a manifest's `searched`."""
    values = [math.nan if each["average"] is None else each["average"] for each in searched["results"]]
    better = np.fmin if searched["less_is_better"] else np.fmax
    on = ", ".join(text for each in searched["on"] for text in each["on"])
    less = ", less is better" if searched["less_is_better"] else ""
    title = f"Mean score on {on}{less}: of each candidate, and the best so far"
    base = searched["base"] and searched["base"]["average"]
    return Course(title=title, values=tuple(values), best=tuple(better.accumulate(values).tolist()), base=base)


def ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from one to the other, zero among them where it lies between."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if s * power >= least * (1 - 1e-9))
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten; 0 of 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 20) if s * power >= value * (1 - 1e-9))
