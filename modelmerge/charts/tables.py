"""The tables of a report of `modelmerge eval`, as plain text in rows, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelmerge.charts.colours import STEPS
from modelmerge.evaluation.report import ModelRow, Report
from modelmerge.evaluation.scores import in_shares, ranked, score_text

_CONFLICTS = {
    "sign conflict": "of the entries that experts change, those with changes of both signs",
    "minority signs": "of all changes, those against the majority's sign",
    "mean |cos|": "of two experts' task vectors in a layer", "after AWD": "the same behind AWD's defaults",
    "interference": "how far the experts' leading directions overlap, 0 where they do not",
    "APGD's start": "how far the sum of the task vectors is from what each expert does, the base being 1",
    "end": "the same behind APGD's defaults",
}  # fmt: skip
_LEGEND = {
    "norm": "the length of a task vector", "of the base's": "the same as a share of the base's length",
    "cos": "the cosine of two task vectors: 0 where they do not meet, negative where they pull apart",
}  # fmt: skip
_COMPARISON = {
    "lost to rounding": "of the merged task vector, by 16-bit storage",
    "APGD's gap": "how far the merge is from what each expert does, the base being 1",
    "cosine": "with the expert's task vector, 1 where all is kept",
    "distance": "to the expert, 1 being as far as the expert is from the base",
    "alignment": "the part of the expert's task vector in the merge's leading directions, 1 being all",
}  # fmt: skip


class Best(str):
    """A cell that is the best of its column."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table: the first `words` columns are words, the others numbers; `foot` are rows apart from the others.

    `shades` are those of the rows, by cell, from 0 for the worst of a column to `colours.STEPS` for the best. `legend`
    says what the columns are.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    foot: tuple[tuple[str, ...], ...] = ()
    words: int = 1
    shades: tuple[tuple[int | None, ...], ...] = ()
    legend: tuple[str, ...] = ()

    def sortable(self) -> bool:
        """Whether each row stands for itself, wherever it is."""
        return len(self.rows) > 1 and all(row[0] for row in self.rows)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int = 1,
    legend: Mapping[str, str] | None = None,
) -> Table:
    """A table without a foot; its legend says of the columns, or else the rows, that it has and that tell something."""
    heads = [*columns, *(row[0] for row in rows)] if rows else []
    return Table(
        title=title, columns=tuple(columns), rows=tuple(map(tuple, rows)), words=words,
        legend=tuple(f"{n}: {text}" for n, text in (legend or {}).items() if any(h.startswith(n) for h in heads)),
    )  # fmt: skip


def of_report(report: Report, *, widest: int | None = None) -> list[Table]:
    """The tables of a report.

    `widest` is for a terminal: with more experts than that, none has a column of its own, and the layers of each model
    are left out but where every tensor was asked for.
    """
    if report["suite"] == "weights":
        return of_weights(report, widest)
    return [of_scores(report), *([of_differences(report)] if "comparison" in report else [])]


def of_scores(report: Report) -> Table:
    """A row for each model, the best merge first, then experts and base; a column for each task."""
    tasks, share = report["tasks"], in_shares(report)
    models = ranked(report) + [m for role in ("expert", "base") for m in report["models"] if m["role"] == role]
    lower = [task for task in tasks if models[0]["scores"][task].get("lower")]
    roles = ["" if model["role"] in ("model", model["name"]) else f"{model['role']} " for model in models]
    names = [role + model["name"] for role, model in zip(roles, models, strict=True)]
    heads, columns = [""], [names]
    shades: list[list[int | None]] = [[None] * len(models)]

    def add(head: str, values: list[tuple[float | None, float | None]], share: bool, *, least: bool = False) -> None:
        heads.append(head)
        columns.append(_column(models, values, share, least=least))
        shades.append(_shades(values, least=least))

    for task in tasks:
        scores = [model["scores"][task] for model in models]
        head = f"{task} (less is better)" if task in lower else task
        add(head, [(score["score"], score["stderr"]) for score in scores], share, least=task in lower)
    add("average", [(model["average"], model["average_stderr"]) for model in models], share)
    has_shares = any(model["normalised"] is not None for model in models)
    if has_shares:
        add("normalised", [(model["normalised"], None) for model in models], True)
    counts = {task: [model["scores"][task]["count"] for model in models] for task in tasks}
    foot: tuple[str, ...] = ()
    if all(each == row[0] and each is not None for row in counts.values() for each in row):
        foot = ("items", *(f"{row[0]:,}" for row in counts.values()), *[""] * (1 + has_shares))
    metrics = {model["scores"][task]["metric"] for model in models for task in tasks}
    error = any(score["stderr"] is not None for model in models for score in model["scores"].values())
    title = ", ".join(sorted(metrics)) + (", per cent" if share else "") + (", ± standard error" if error else "")
    return Table(
        title=title[0].upper() + title[1:], columns=tuple(heads), rows=tuple(zip(*columns, strict=True)),
        foot=(foot,) if foot else (), shades=tuple(zip(*shades, strict=True)),
    )  # fmt: skip


def _shades(values: list[tuple[float | None, float | None]], *, least: bool) -> list[int | None]:
    """Where each value lies between the worst and the best of its column; what errors explain is no difference."""
    numbers = [-value if least else value for value, _ in values if value is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    span = max([high - low, *(4 * error for _, error in values if error is not None)])
    return [
        None if value is None else round(STEPS * ((-value if least else value) - low) / span) if span else 0
        for value, _ in values
    ]


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
    comparison, share = report["comparison"], in_shares(report)
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
    conflicts = _filled(
        ["", *_CONFLICTS], [_conflicts(name, each["experts"]) for name, each in {"whole model": model, **kinds}.items()]
    )
    chance = 100 * (1 - 2.0 ** (1 - len(experts)))
    signs = f"{_CONFLICTS['sign conflict']}; random changes of all entries have {chance:.3g} %"
    comparison = _comparison(model["models"], experts, report["models"])
    comparison = [row for row in comparison if set(row[1:]) != {"-"}]
    heads = ["", "norm", "of the base's", *(f"cos {name}" for name in columns)]
    tables = [
        table("Experts' task vectors", heads, rows, legend=_LEGEND),
        table("Conflicts between the experts", *conflicts, legend={**_CONFLICTS, "sign conflict": signs}),
        table("Merged models", ["", *models], comparison, legend=_COMPARISON),
    ]
    for name in models if widest is None or "tensors" in report else ():
        groups = {**kinds, **report.get("tensors", {})}
        layers = [_layer(kind, each["models"][name], experts) for kind, each in groups.items()]
        layers = layers if columns else [[*row[:3], *row[-2:]] for row in layers]
        heads = ["", "norm", "APGD's gap", *(f"cos {expert}" for expert in columns), "mean cos", "mean alignment"]
        tables.append(table(f"{name}, by layer", *_filled(heads, layers)))
    return tables


def _filled(heads: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Columns without those that have no figure in any row."""
    places = [i for i in range(len(heads)) if any(row[i] != "-" for row in rows)]
    return [heads[i] for i in places], [[row[i] for i in places] for row in rows]


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


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(value: float) -> str:
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{f'{100 * value:#.3g}'.rstrip('.')} %"


def _about(value: float | None) -> str:
    return "-" if value is None else f"about {_percent(value)}"
