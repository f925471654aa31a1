"""Scores of models at tasks: what one is, what they come to, how two reports differ, whether a gate is passed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from modelmerge.errors import ModelMergeError, UsageError, named
from modelmerge.evaluation.report import ModelRow, Report, ScoreEntry

_KEYS = ("score", "correct", "items", "count", "stderr", "ids", "metric")  # of a score that is a mapping
_EXACT = 1000  # so many discordant items are counted exactly; more are as good as normal


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a model does at a task; more is better, except where `lower` is set.

    `value` is None where there is no number, as of a correlation with a constant. `count` is the number of items,
    `stderr` the standard error over the draw of the items. `items` are the scores of each, and `ids` their names.
    `metric` is the name of the number, and `figures` are those of other metrics.
    """

    value: float | None
    count: int | None = None
    stderr: float | None = None
    items: tuple[float, ...] | None = None
    ids: tuple[str, ...] | None = None
    metric: str = "score"
    lower: bool = False
    figures: Mapping[str, float | None] | None = None

    def to_dict(self) -> ScoreEntry:
        """As plain data; `lower` and `figures` only where they say something."""
        entry = {"score": self.value, "count": self.count, "stderr": self.stderr, "metric": self.metric}
        lists = {"items": self.items and list(self.items), "ids": self.ids and list(self.ids)}
        more = {**lists, "lower": self.lower or None, "figures": self.figures and dict(self.figures)}
        return cast(ScoreEntry, entry | {name: value for name, value in more.items() if value is not None})


def read_score(result: Any, where: str) -> Score:
    """The score that somebody's function returned.

    Args:
        result: A number; or a mapping with `items`, the score of each item (their mean is the score); or with `correct`
            and `count` (their ratio); or with `score` and, if known, `count` and `stderr`. `metric` names the number,
            and `ids` the items.
        where: What errors call it.

    Raises:
        ModelMergeError: It is none of these, or not finite.
    """
    if not isinstance(result, Mapping):
        return Score(value=_number(result, where))
    odd = [key for key in result if key not in _KEYS]
    ways = [key for key in ("items", "correct", "score") if result.get(key) is not None]
    if odd or not ways:
        hint = f"a score is a number, or a mapping with some of: {', '.join(_KEYS)}"
        raise ModelMergeError(f"{where}: {'unknown key ' + repr(odd[0]) if odd else 'no score in it'}", hint=hint)
    metric, ids = str(result.get("metric") or "score"), result.get("ids")
    count = None if result.get("count") is None else _count(result["count"], where)
    stderr = None if result.get("stderr") is None else _number(result["stderr"], f"{where}, stderr")
    if ways[0] == "items":
        items = tuple(_number(item, f"{where}, item {i}") for i, item in enumerate(result["items"]))
        if not items:
            raise ModelMergeError(f"{where}: there are no items", hint="is the data set empty?")
        if ids is not None and len(ids) != len(items):
            raise ModelMergeError(f"{where}: {len(items)} items, and {len(ids)} ids")
        spread = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
        return Score(
            value=statistics.fmean(items), count=len(items), stderr=spread, items=items, metric=metric,
            ids=None if ids is None else tuple(map(str, ids)),
        )  # fmt: skip
    if ways[0] == "correct":
        correct = _number(result["correct"], f"{where}, correct")
        if not count or not 0 <= correct <= count:
            hint = "give correct and count of all items"
            raise ModelMergeError(f"{where}: {correct:g} correct of {count}", hint=hint)
        share = correct / count
        return Score(value=share, count=count, stderr=math.sqrt(share * (1 - share) / count), metric=metric)
    return Score(value=_number(result["score"], where), count=count, stderr=stderr, metric=metric)


def _number(value: Any, where: str) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of torch or numpy
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = "return a number, or a mapping of tasks to numbers"
        raise ModelMergeError(f"{where}: {type(value).__name__} {str(value)[:60]!r} is no number", hint=hint)
    if not math.isfinite(value):
        raise ModelMergeError(f"{where}: the score is {value}", hint="a score must be a finite number")
    return float(value)


def _count(value: Any, where: str) -> int:
    number = _number(value, f"{where}, count")
    if number < 1 or number != int(number):
        raise ModelMergeError(f"{where}: a count of {number:g}", hint="the count is the number of items looked at")
    return int(number)


def plain(name: str) -> str:
    """A name for comparison: in lower case, whatever is between the words a space."""
    return re.sub(r"[\W_]+", " ", name).strip().lower()


def listing(names: Sequence[str], count: int = 6) -> str:
    """The first few of the names, in quotes."""
    text = ", ".join(f"'{name}'" for name in names[:count])
    return f"{text} and {len(names) - count} more" if len(names) > count else text


def summarise(
    tasks: Sequence[str], models: Sequence[ModelRow], experts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Add to each model its `average`, its standard error, and scores `normalised` by the task's expert, in place.

    A task's expert is the one of the task's name, or of the name that `experts` has for it. A model's own `normalised`
    is the mean over the tasks that have one. Tasks where less is better are in neither mean; a model that lacks a
    score, whose mean would be over fewer tasks than that of others, has none. Returned is each task's expert.
    """
    by_name = {plain(model["name"]): model for model in models if model["role"] == "expert"}
    owners = {task: by_name.get(plain((experts or {}).get(task, task))) for task in tasks}
    for model in models:
        shares = []
        for task, owner in owners.items():
            score = model["scores"][task]
            best = owner["scores"][task]["score"] if owner is not None and not score.get("lower") else None
            score["normalised"] = score["score"] / best if best and score["score"] is not None else None
            shares += [score["normalised"]] if best else []
        rising = [model["scores"][task] for task in tasks if not model["scores"][task].get("lower")]
        model["average"] = mean([score["score"] for score in rising])
        model["average_stderr"] = None
        if model["average"] is not None:
            model["average_stderr"] = mean_error([score["stderr"] for score in rising])
        model["normalised"] = mean(shares)
    return {task: owner["name"] for task, owner in owners.items() if owner is not None}


def ranked(report: Report) -> list[ModelRow]:
    """The models that are no base and no expert, the best first: by their averages, or at their only task."""
    tasks = report["tasks"]

    def rank(model: ModelRow) -> tuple[bool, float]:
        value, score = model["average"], model["scores"][tasks[0]]
        if value is None and len(tasks) == 1 and score["score"] is not None:  # an average is never of what is lower
            value = -score["score"]
        return value is None, -(value or 0.0)

    return sorted((model for model in report["models"] if model["role"] == "model"), key=rank)


def in_shares(report: Report) -> bool:
    """Whether all scores are between 0 and 1, and are shown in per cent."""
    scores = [score["score"] for model in report["models"] for score in model["scores"].values()]
    return all(0.0 <= score <= 1.0 for score in scores if score is not None)


def score_text(value: float | None, error: float | None = None, *, share: bool) -> str:
    """A value for people, with its standard error if there is one; a share in per cent."""
    if value is None:
        return "n/a"
    if share:
        return f"{100 * value:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")
    return f"{value:.4g}" + ("" if error is None else f" ±{error:.2g}")


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing, or all are."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers and len(numbers) == len(values) else None


def mean_error(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent numbers with these; None where one is unknown."""
    numbers = [error for error in errors if error is not None]
    return math.hypot(*numbers) / len(numbers) if numbers and len(numbers) == len(errors) else None


@dataclass(frozen=True, slots=True)
class Gate:
    """A least value: of the average, of the normalised average, or of a task."""

    what: str
    least: float

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.what}={self.least:g}"


def parse_gate(text: str) -> Gate:
    """A gate: `avg=0.70`, `normalized=95%` or `TASK=0.8`.

    Raises:
        UsageError: It is not of that form.
    """
    what, equals, least = text.rpartition("=")
    try:
        number = float(least.removesuffix("%")) / (100 if least.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not equals or not what or not math.isfinite(number):
        raise UsageError(f"'{text}' is no name and number", option="fail_under", hint="as in avg=0.7 or normalized=0.9")
    names = {"average": "avg", "normalised": "normalized"}
    return Gate(names.get(what, what), number)


def check_gates(
    gates: Sequence[Gate], tasks: Sequence[str], models: Sequence[ModelRow], experts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Whether the models that are no base and no expert reach every gate, and where they do not.

    A value that there is none of reaches no gate. `experts` as for `summarise`.

    Raises:
        UsageError: A gate names no task, or what was not measured.
    """
    failures: list[dict[str, Any]] = []
    least = [task for task in tasks if not models[0]["scores"][task].get("lower")]
    for gate in gates:
        if gate.what not in ("avg", "normalized", *tasks):
            hint = f"there are avg, normalized, {', '.join(tasks)}"
            raise UsageError(f"names '{gate.what}', which is no task", option="fail_under", hint=hint)
        if not least or gate.what in {*tasks} - {*least}:
            hint = f"there are avg, normalized, {', '.join(least)}" if least else "name another metric"
            raise UsageError(f"{gate}: less is better, and the gate is a least value", option="fail_under", hint=hint)
        for model in (model for model in models if model["role"] == "model"):
            if gate.what == "avg":
                value = model["average"]
            elif gate.what == "normalized":
                value = _normalised_average(model, least, experts or {})
            else:
                value = model["scores"][gate.what]["score"]
            if value is None or value < gate.least:
                failures.append({"model": model["name"], "gate": str(gate), "value": value})
    return {"gates": [str(gate) for gate in gates], "passed": not failures, "failures": failures}


def _normalised_average(model: ModelRow, tasks: Sequence[str], experts: Mapping[str, str]) -> float | None:
    scores = {task: model["scores"][task] for task in tasks}
    lacking = [t for t, score in scores.items() if score["normalised"] is None and score["score"] is not None]
    if lacking:
        name = experts.get(lacking[0], lacking[0])
        raise UsageError(
            f"normalized: there is no expert called '{name}' with a score at that task",
            option="fail_under",
            hint=f"name it: {named('experts')} {name}=REF",
        )
    return model["normalised"]


def differences(ours: Report, theirs: Report) -> list[dict[str, Any]]:
    """The differences of our models to theirs of the same name, or of the only one here to the only one there.

    Raises:
        UsageError: No model or no task is in both.
    """
    mine, other = ([m for m in report["models"] if m["role"] == "model"] for report in (ours, theirs))
    by_name = {model["name"]: model for model in theirs["models"]}
    pairs = [(model, by_name[model["name"]]) for model in ours["models"] if model["name"] in by_name]
    if not any(model["role"] == "model" for model, _ in pairs) and len(mine) == len(other) == 1:
        pairs.append((mine[0], other[0]))
    tasks = [task for task in ours["tasks"] if task in theirs["tasks"]]
    if not pairs or not tasks:
        hint = "models go by their names: NAME=REF gives one"
        raise UsageError(f"no {'task' if pairs else 'model'} is in both reports", option="compare", hint=hint)
    same = all(ours.get(key) == theirs.get(key) for key in ("metric", "seed"))
    return [compared(model, before, tasks, same_items=same) for model, before in pairs]


def compared(model: ModelRow, before: ModelRow, tasks: Sequence[str], *, same_items: bool) -> dict[str, Any]:
    """The differences of a model to another at each of the tasks and on average, where `same_items`: item by item.

    Raises:
        UsageError: They have different metrics.
    """
    steps = {}
    for task in tasks:
        ours, theirs = model["scores"][task], before["scores"][task]
        if ours["metric"] != theirs["metric"]:
            raise UsageError(f"'{task}' is {ours['metric']} here, and {theirs['metric']} there", option="compare")
        steps[task] = _difference(ours, theirs, same_items)
    rising = [step for task, step in steps.items() if not model["scores"][task].get("lower")]
    average, error = mean([step["difference"] for step in rising]), mean_error([step["stderr"] for step in rising])
    p = None if average is None else _two_sided(average, error)
    total = {"difference": average, "stderr": error, "p": p}
    return {"model": model["name"], "other": before["name"], "tasks": steps, "average": total}


def _difference(ours: ScoreEntry, theirs: ScoreEntry, same_items: bool) -> dict[str, Any]:
    """Ours less theirs, its standard error, and how likely so much is by chance (two-sided p).

    Paired where the items are the same: those with the same ids, or, without any, as many by the same function. Items
    that are all 0 or 1 go through McNemar's test, exact for few discordant ones; others are taken as normal.
    """
    if ours["score"] is None or theirs["score"] is None:
        return {"difference": None, "stderr": None, "p": None, "paired": False}
    difference = ours["score"] - theirs["score"]
    mine, other = ours.get("items") or [], theirs.get("items") or []
    same = ours.get("ids") == theirs.get("ids") and (same_items or ours.get("ids") is not None)
    if not mine or len(mine) != len(other) or not same:
        errors = [score["stderr"] for score in (ours, theirs) if score["stderr"] is not None]
        error = math.hypot(*errors) if len(errors) == 2 else None
        return {"difference": difference, "stderr": error, "p": _two_sided(difference, error), "paired": False}
    steps = [a - b for a, b in zip(mine, other, strict=True)]
    error = statistics.stdev(steps) / math.sqrt(len(steps)) if len(steps) > 1 else None
    binary = all(item in (0.0, 1.0) for item in (*mine, *other))
    p = mcnemar(sum(s > 0 for s in steps), sum(s < 0 for s in steps)) if binary else _two_sided(difference, error)
    return {"difference": difference, "stderr": error, "p": p, "paired": True}


def mcnemar(gains: int, losses: int) -> float:
    """The two-sided p of so many items gained and lost, were both equally likely (McNemar 1947; exact: binomial)."""
    discordant, fewer = gains + losses, min(gains, losses)
    if not discordant:
        return 1.0
    if discordant > _EXACT:
        return math.erfc(max(abs(gains - losses) - 1, 0) / math.sqrt(2 * discordant))
    return min(1.0, 2 * sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant)


def _two_sided(difference: float, error: float | None) -> float | None:
    """How likely a normal variable of that standard error is as far from zero; None where the error is not known."""
    if difference == 0.0 or not error:
        return 1.0 if difference == 0.0 else None
    return math.erfc(abs(difference) / (error * math.sqrt(2)))
