"""The tables of a report of `modelmerge eval`, as plain text in rows, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelmerge.charts.figures import score_text
from modelmerge.evaluation.report import ModelRow, Report


class Best(str):
    """A cell that is the best of its column."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first `words` columns are words, the others numbers; `foot` are rows apart from the others."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[tuple[str, ...], ...] = ()
    words: int = 1

    def sortable(self) -> bool:
        """Whether each row stands for itself, wherever it is."""
        return len(self.rows) > 1 and all(row[0] for row in self.rows)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> Table:
    """A table without a foot."""
    return Table(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)), words=words)


def of_report(report: Report, *, widest: int | None = None) -> list[Table]:
    """The tables of a report; with more than `widest` experts, without a column for each of them where one could be."""
    if report["suite"] == "weights":
        return of_weights(report, widest)
    return [of_scores(report), *([of_differences(report)] if "comparison" in report else [])]


def _in_shares(report: Report) -> bool:
    """Whether all scores are between 0 and 1, and are shown in per cent."""
    scores = [score["score"] for model in report["models"] for score in model["scores"].values()]
    return all(0.0 <= score <= 1.0 for score in scores if score is not None)


def of_scores(report: Report) -> Table:
    """A row for each model, a column for each task."""
    tasks, models = report["tasks"], report["models"]
    share = _in_shares(report)
    lower = [task for task in tasks if models[0]["scores"][task].get("lower")]
    has_shares = any(model["normalised"] is not None for model in models)
    names = [model["name"] if model["role"] == "model" else f"{model['role']} {model['name']}" for model in models]
    heads, columns = [""], [names]
    for task in tasks:
        scores = [model["scores"][task] for model in models]
        heads.append(f"{task} (less is better)" if task in lower else task)
        columns.append(_column(models, [(s["score"], s["stderr"]) for s in scores], share, least=task in lower))
    heads.append("average")
    columns.append(_column(models, [(model["average"], model["average_stderr"]) for model in models], share))
    if has_shares:
        heads.append("normalised")
        columns.append(_column(models, [(model["normalised"], None) for model in models], share=True))
    counts = {task: [model["scores"][task]["count"] for model in models] for task in tasks}
    foot: tuple[str, ...] = ()
    if all(each == row[0] and each is not None for row in counts.values() for each in row):
        foot = ("items", *(f"{row[0]:,}" for row in counts.values()), *[""] * (1 + has_shares))
    metrics = {model["scores"][task]["metric"] for model in models for task in tasks}
    error = any(score["stderr"] is not None for model in models for score in model["scores"].values())
    title = ", ".join(sorted(metrics)) + (", per cent" if share else "") + (", ± standard error" if error else "")
    return Table(
        title=title[0].upper() + title[1:], columns=tuple(heads), rows=tuple(zip(*columns, strict=True)),
        foot=(foot,) if foot else (),
    )  # fmt: skip


def _column(
    models: list[ModelRow], values: list[tuple[float | None, float | None]], share: bool, *, least: bool = False
) -> list[str]:
    """A value with its standard error for each model; the best of several that are no base and no expert stands out."""
    places = [(-value if least else value, i) for i, (value, _) in enumerate(values)
              if models[i]["role"] == "model" and value is not None]  # fmt: skip
    best = max(places)[1] if len(places) > 1 else None
    texts = [score_text(value, error, share=share) for value, error in values]
    return [Best(text) if i == best else text for i, text in enumerate(texts)]


def of_differences(report: Report) -> Table:
    """A row for each task of each model that an earlier report has too."""
    comparison, share = report["comparison"], _in_shares(report)
    rows, unit = [], 100 if share else 1
    for pair in comparison["models"]:
        names = pair["model"] if pair["model"] == pair["other"] else f"{pair['model']} - {pair['other']}"
        for task, step in {**pair["tasks"], "average": pair["average"]}.items():
            error = "" if step["stderr"] is None else f"±{unit * step['stderr']:.2g}"
            p = "-" if step["p"] is None else "< 0.001" if step["p"] < 0.001 else f"{step['p']:.3f}"
            way = {True: "paired", False: "unpaired", None: ""}[step.get("paired")]
            difference = "n/a" if step["difference"] is None else f"{unit * step['difference']:+.3g}"
            rows.append([names, task, difference, error, p, way])
            names = ""
    title = f"Differences to {comparison['with']}" + (", percentage points" if share else "")
    return table(title, ["", "task", "difference", "", "p", ""], rows, words=2)


def of_weights(report: Report, widest: int | None = None) -> list[Table]:
    """The experts, their conflicts, the models beside them, and each model by layer."""
    model, kinds = report["model"], report["layer_types"]
    experts, models = list(model["experts"]["norms"]), list(model["models"])
    vectors = model["experts"]
    columns = experts if widest is None or len(experts) <= widest else []
    rows = [
        [name, _size(vectors["norms"][name]), _percent(vectors["relative_norms"][name]),
         *(_number(vectors["cosines"][i][experts.index(other)]) for other in columns)]
        for i, name in enumerate(experts)
    ]  # fmt: skip
    tables = [
        table("Experts' task vectors", ["", "norm", "of the base's", *(f"cos {name}" for name in columns)], rows),
        table(
            "Conflicts between the experts",
            ["", "sign conflict", "minority signs", "mean |cos|", "after AWD", "interference", "APGD's start", "end"],
            [_conflicts(name, each["experts"]) for name, each in {"whole model": model, **kinds}.items()],
        ),
        table("Merged models", ["", *models], _comparison(model["models"], experts, report["models"])),
    ]
    for name in models:
        groups = {**kinds, **report.get("tensors", {})}
        table_rows = [_layer(kind, each["models"][name], experts) for kind, each in groups.items()]
        heads = ["", "norm", "APGD's gap", *(f"cos {expert}" for expert in columns), "mean cos", "mean alignment"]
        tables.append(table(f"{name}, by layer", heads, [row if columns else _without(row) for row in table_rows]))
    return tables


def _conflicts(name: str, figures: Mapping[str, Any]) -> list[str]:
    interference, awd, apgd = (
        pair or {}
        for pair in (figures["singular_task_interference"], figures["awd_orthogonality"], figures["apgd_gap"])
    )
    return [
        name, _percent(figures["sign_conflict"]), _percent(figures["minority_sign_share"]), _number(awd.get("before")),
        _number(awd.get("after")), _number(interference.get("relative")), _number(apgd.get("start")),
        _number(apgd.get("solved")),
    ]  # fmt: skip


def _comparison(models: Mapping[str, Any], experts: list[str], inputs: list[ModelRow]) -> list[list[str]]:
    """A row for each figure, a column for each model."""
    figures = list(models.values())
    rounding = [
        _percent(exact) if (exact := entry["measured_rounding"]) is not None else _about(model["expected_rounding"])
        for entry, model in zip(inputs, figures, strict=True)
    ]
    rows = [
        ["norm", *(_size(model["norm"]) for model in figures)],
        ["of the base's", *(_percent(model["relative_norm"]) for model in figures)],
        ["lost to rounding", *rounding],
        ["APGD's gap (base: 1)", *(_number(model["apgd_gap"]) for model in figures)],
    ]
    for label, key in {"cosine": "cosine", "distance": "relative_distance", "alignment": "subspace_alignment"}.items():
        for expert in experts:
            rows.append([f"{label} {expert}", *(_number(model["experts"][expert][key]) for model in figures)])
    return rows


def _layer(name: str, figures: Mapping[str, Any], experts: list[str]) -> list[str]:
    rows = [figures["experts"][expert] for expert in experts]
    return [
        name, _size(figures["norm"]), _number(figures["apgd_gap"]), *(_number(each["cosine"]) for each in rows),
        _number(_mean([each["cosine"] for each in rows])),
        _number(_mean([each["subspace_alignment"] for each in rows])),
    ]  # fmt: skip


def _without(row: list[str]) -> list[str]:
    """A layer's row with none of the cosines but their mean."""
    return [*row[:3], *row[-2:]]


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _about(value: float | None) -> str:
    return "-" if value is None else f"about {_percent(value)}"
