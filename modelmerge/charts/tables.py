"""The tables of a report of `modelmerge eval`, as plain text in rows, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Best(str):
    """A cell that is the best of its column."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first `left` columns are words, the others numbers; `foot` are rows that are not like the others."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[tuple[str, ...], ...] = ()
    left: int = 1

    def sortable(self) -> bool:
        """Whether each row stands for itself, wherever it is."""
        return len(self.rows) > 1 and all(row[0] for row in self.rows)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A table without a foot."""
    return Table(title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)), left=left)


def of_report(report: Mapping[str, Any], *, widest: int | None = None) -> list[Table]:
    """The tables of a report; with more than `widest` experts, without a column for each of them where one could be."""
    if report["suite"] == "weights":
        return of_weights(report, widest)
    return [of_scores(report), *([of_differences(report)] if "comparison" in report else [])]


def in_shares(report: Mapping[str, Any]) -> bool:
    """Whether all scores are between 0 and 1, and are told in per cent."""
    return all(0.0 <= told["score"] <= 1.0 for told in _known(report["models"]))


def of_scores(report: Mapping[str, Any]) -> Table:
    """A row for each model, a column for each task."""
    tasks, models = report["tasks"], report["models"]
    share = in_shares(report)
    lower = [task for task in tasks if models[0]["scores"][task].get("lower")]
    normalised = any(model["normalised"] is not None for model in models)
    best = {
        task: _best(models, [model["scores"][task]["score"] for model in models], least=task in lower) for task in tasks
    }
    best_average = _best(models, [model["average"] for model in models])
    best_normalised = _best(models, [model["normalised"] for model in models])
    rows: list[list[str]] = []
    for model in models:
        told = model["scores"]
        row = [model["name"] if model["role"] == "model" else f"{model['role']} {model['name']}"]
        row += [_cell(told[task]["score"], told[task]["stderr"], share, best=model is best[task]) for task in tasks]
        row.append(_cell(model["average"], model["average_stderr"], share, best=model is best_average))
        if normalised:
            row.append(_cell(model["normalised"], None, share=True, best=model is best_normalised))
        rows.append(row)
    columns = [
        "",
        *(f"{task} (less is better)" if task in lower else task for task in tasks),
        "average",
        *(["normalised"] if normalised else []),
    ]
    counts = {task: [model["scores"][task]["count"] for model in models] for task in tasks}
    foot: tuple[str, ...] = ()
    if all(each == own[0] and each is not None for own in counts.values() for each in own):
        foot = ("items", *(f"{own[0]:,}" for own in counts.values()), *[""] * (1 + normalised))
    metrics = {model["scores"][task]["metric"] for model in models for task in tasks}
    title = (
        f"{', '.join(sorted(metrics))}{', per cent' if share else ''}{', ± standard error' if _errors(models) else ''}"
    )
    return Table(
        title=title[0].upper() + title[1:], columns=tuple(columns), rows=tuple(map(tuple, rows)),
        foot=(foot,) if foot else (),
    )  # fmt: skip


def _known(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [score for model in models for score in model["scores"].values() if score["score"] is not None]


def _errors(models: list[dict[str, Any]]) -> bool:
    return any(score["stderr"] is not None for model in models for score in model["scores"].values())


def _best(models: list[dict[str, Any]], values: list[float | None], *, least: bool = False) -> dict[str, Any] | None:
    """Of several models that are no base and no expert, the one with the largest value, or the least."""
    own = [(-value if least else value, i) for i, value in enumerate(values)
           if models[i]["role"] == "model" and value is not None]  # fmt: skip
    return models[max(own)[1]] if len(own) > 1 else None


def _cell(value: float | None, error: float | None, share: bool, *, best: bool) -> str:
    if value is None:
        return "n/a"
    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
    if error is not None:
        shown += f" ±{100 * error:.1f}" if share else f" ±{error:.2g}"
    return Best(shown) if best else shown


def of_differences(report: Mapping[str, Any]) -> Table:
    """A row for each task of each model that an earlier report has too."""
    comparison, share = report["comparison"], in_shares(report)
    rows, unit = [], 100 if share else 1
    for pair in comparison["models"]:
        names = pair["model"] if pair["model"] == pair["other"] else f"{pair['model']} - {pair['other']}"
        for task, told in {**pair["tasks"], "average": pair["average"]}.items():
            error = "" if told["stderr"] is None else f"±{unit * told['stderr']:.2g}"
            p = "-" if told["p"] is None else "< 0.001" if told["p"] < 0.001 else f"{told['p']:.3f}"
            way = {True: "paired", False: "unpaired", None: ""}[told.get("paired")]
            difference = "n/a" if told["difference"] is None else f"{unit * told['difference']:+.3g}"
            rows.append([names, task, difference, error, p, way])
            names = ""
    title = f"Differences to {comparison['with']}" + (", percentage points" if share else "")
    return table(title, ["", "task", "difference", "", "p", ""], rows, left=2)


def of_weights(report: Mapping[str, Any], widest: int | None = None) -> list[Table]:
    """The experts, their conflicts, the models beside them, and each model by layer."""
    model, kinds = report["model"], report["layer_types"]
    experts, models = list(model["experts"]["norms"]), list(model["models"])
    own = model["experts"]
    shown = experts if widest is None or len(experts) <= widest else []
    rows = [
        [name, _size(own["norms"][name]), _percent(own["relative_norms"][name]),
         *(_number(own["cosines"][i][experts.index(other)]) for other in shown)]
        for i, name in enumerate(experts)
    ]  # fmt: skip
    tables = [
        table("Experts' task vectors", ["", "norm", "of the base's", *(f"cos {name}" for name in shown)], rows),
        table(
            "Conflicts between the experts",
            ["", "sign conflict", "minority signs", "mean |cos|", "after AWD", "interference", "APGD's start", "end"],
            [_conflicts(name, told["experts"]) for name, told in {"whole model": model, **kinds}.items()],
        ),
        table("Merged models", ["", *models], _compared(model["models"], experts, report["models"])),
    ]
    for name in models:
        groups = {**kinds, **report.get("tensors", {})}
        table_rows = [_layer(kind, told["models"][name], experts) for kind, told in groups.items()]
        columns = ["", "norm", "APGD's gap", *(f"cos {expert}" for expert in shown), "mean cos", "mean alignment"]
        tables.append(table(f"{name}, by layer", columns, [row if shown else _without(row) for row in table_rows]))
    return tables


def _conflicts(name: str, told: Mapping[str, Any]) -> list[str]:
    interference, awd, apgd = (
        told[key] or {} for key in ("singular_task_interference", "awd_orthogonality", "apgd_gap")
    )
    return [
        name, _percent(told["sign_conflict"]), _percent(told["minority_sign_share"]), _number(awd.get("before")),
        _number(awd.get("after")), _number(interference.get("relative")), _number(apgd.get("start")),
        _number(apgd.get("solved")),
    ]  # fmt: skip


def _compared(models: Mapping[str, Any], experts: list[str], inputs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each figure, a column for each model."""
    told = list(models.values())
    measured = [model["measured_rounding"] for model in inputs]
    rounding = [
        _percent(exact) if exact is not None else _about(model["expected_rounding"])
        for exact, model in zip(measured, told, strict=True)
    ]
    rows = [
        ["norm", *(_size(model["norm"]) for model in told)],
        ["of the base's", *(_percent(model["relative_norm"]) for model in told)],
        ["lost to rounding", *rounding],
        ["APGD's gap (base: 1)", *(_number(model["apgd_gap"]) for model in told)],
    ]
    for label, key in (("cosine", "cosine"), ("distance", "relative_distance"), ("alignment", "subspace_alignment")):
        for expert in experts:
            rows.append([f"{label} {expert}", *(_number(model["experts"][expert][key]) for model in told)])
    return rows


def _layer(name: str, told: Mapping[str, Any], experts: list[str]) -> list[str]:
    own = [told["experts"][expert] for expert in experts]
    return [
        name, _size(told["norm"]), _number(told["apgd_gap"]), *(_number(each["cosine"]) for each in own),
        _number(_mean([each["cosine"] for each in own])),
        _number(_mean([each["subspace_alignment"] for each in own])),
    ]  # fmt: skip


def _without(row: list[str]) -> list[str]:
    """A layer's row with none of the cosines but their mean."""
    return [*row[:3], *row[-2:]]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def _about(value: float | None) -> str:
    return "-" if value is None else f"about {_percent(value)}"
