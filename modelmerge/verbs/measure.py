"""How `search` measures candidates, `SUITE:WHAT[,SETTING=VALUE...]`, and which of them is the best.

What counts is the mean over all tasks, each counted once, as they are: not normalised by experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from modelmerge.checkpoint.digest import sha256
from modelmerge.errors import ModelMergeError, UsageError, named, suggestion
from modelmerge.evaluation import image_tasks
from modelmerge.evaluation.custom import Metric, find_script
from modelmerge.evaluation.report import ModelRow
from modelmerge.evaluation.scores import summarise
from modelmerge.progress import Reporter
from modelmerge.verbs.evaluate import evaluate

Scores = Mapping[str, Mapping[str, Any]]  # by task, as a report has them
_SUITES = ("custom", "clip", "lm")
_FORMS = "write it like custom:FILE:FUNCTION, clip:TASK or lm:TASK"
_LEFT_OUT = ("items", "ids", "normalised")  # of a score
_REPORTED = "test"  # the split that `eval` reports where there is one
# What can be said of each suite behind commas, by the words of `eval`: how it is read.
_SETTINGS: dict[str, dict[str, Callable[[str], Any]]] = {
    "custom": {"task": str, "seed": int},
    "clip": {
        "limit": int, "seed": int, "batch_size": int, "split": str, "config": str, "classes": str, "template": str,
        "image_column": str, "label_column": str, "heads": str, "base": str,
    },
    "lm": {
        "limit": float, "seed": int, "batch_size": str, "num_fewshot": int, "metric": str, "dtype": str,
        "include_path": str, "apply_chat_template": bool, "confirm_run_unsafe_code": bool,
    },
}  # fmt: skip
_REPEATED = {"task": "tasks", "template": "templates", "metric": "metrics"}  # may come several times; the suite's word


@dataclass(frozen=True, slots=True)
class Measure:
    """What candidates are measured with: a suite and its options, and the texts that say so, as they were typed."""

    suite: str
    options: Mapping[str, Any]
    texts: tuple[str, ...]

    def scores(self, models: Sequence[str], device: str, progress: Reporter, **more: Any) -> tuple[list[Scores], Any]:
        """The scores of models, in their order, and the report; `more` are options for where none is named.

        Raises:
            ModelMergeError: As for `evaluate`.
        """
        options = {**more, **self.options}
        report = evaluate(models, suite=self.suite, device=device, progress=progress, **options)
        rows = [row["scores"] for row in report["models"] if row["role"] == "model"]
        kept: list[Scores] = [
            {task: {k: v for k, v in score.items() if k not in _LEFT_OUT} for task, score in row.items()}
            for row in rows
        ]
        return kept, report


def read_measures(on: Sequence[str], metric: Metric | str | None) -> tuple[Measure, ...]:
    """What is asked for; tasks of one suite with the same settings together, so that a model is loaded once for them.

    Raises:
        UsageError: Nothing is asked for, or what there is not.
    """
    single = [parse_on(text) for text in on]
    if metric is not None:
        label = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
        single.append(Measure("custom", {"metric": metric}, (label,)))
    if not single:
        raise UsageError(f"a search needs something to measure with: {named('on')}", hint=_FORMS)
    if len({text for each in single for text in each.texts}) < len(single):
        raise UsageError("names the same thing twice", option="on")
    joined: list[Measure] = []
    for each in single:
        before = joined[-1] if joined else None
        if before is not None and each.suite == before.suite != "custom" and _settings(each) == _settings(before):
            options = {**before.options, **{n: (*before.options.get(n, ()), *each.options[n]) for n in _whats(each)}}
            joined[-1] = Measure(each.suite, options, (*before.texts, *each.texts))
        else:
            joined.append(each)
    return tuple(joined)


def check_files(measures: Sequence[Measure]) -> None:
    """Refuse a function whose file is not there.

    Raises:
        ModelMergeError: One is not.
    """
    for each in measures:
        file = str(each.options.get("metric", "")).rpartition(":")[0]
        if file.endswith(".py") and not Path(file).expanduser().is_file():
            raise ModelMergeError(f"{named('on')} {each.texts[0]}: no such file: {file}")


def identity(measures: Sequence[Measure], *, kept: bool) -> list[Any]:
    """What is measured with, as plain data that another run can compare: the texts, and sha256 of the functions' files.

    Raises:
        UsageError: Scores are to be `kept` for another run, and a function has no file.
    """
    entries: list[Any] = []
    for each in measures:
        metric = each.options.get("metric") if each.suite == "custom" else None
        if callable(metric) and kept:
            what = "takes up what a function has measured, and one that is no FILE:FUNCTION could be another by now"
            raise UsageError(what, option="resume", hint="name it by its file, as in metric.py:accuracy")
        file = find_script(metric)[2] if isinstance(metric, str) else None
        entries.append([each.texts, sha256(file) if file is not None else None])
    return entries


def _whats(measure: Measure) -> list[str]:
    return [name for name in measure.options if name in ("data", "tasks")]


def _settings(measure: Measure) -> dict[str, Any]:
    return {name: value for name, value in measure.options.items() if name not in _whats(measure)}


def parse_on(text: str) -> Measure:
    """What `SUITE:WHAT[,SETTING=VALUE...]` says; the settings are the options of `eval SUITE`, without their dashes.

    Raises:
        UsageError: It is not of that form, there is no such suite or setting, or it is what is reported afterwards.
    """
    suite, _, rest = text.partition(":")
    if suite not in _SUITES or not rest:
        hint = suggestion(
            suite, [each for each in _SUITES if each != suite], also=_FORMS, show=lambda near: f"{near}:..."
        )
        if suite == "weights":
            hint = f"figures of weights explain conflicts, and do not say how well a model does: {_FORMS}"
        raise UsageError(f"'{text}' is not SUITE:WHAT", option="on", hint=hint)
    what, *words = rest.split(",")
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        reader = _SETTINGS[suite].get(name)
        if reader is None or (reader is bool) == bool(equals):
            have = ", ".join(each.replace("_", "-") for each in _SETTINGS[suite])
            others = _SETTINGS[suite].keys() - {name}
            hint = suggestion(name, sorted(others), f"there are: {have}", show=lambda near: near.replace("_", "-"))
            raise UsageError(f"'{text}': '{word}' is no setting of {suite}", option="on", hint=hint)
        if name in options and name not in _REPEATED:
            raise UsageError(f"'{text}': '{name}' comes twice", option="on")
        try:
            setting = True if reader is bool else reader(value)
        except ValueError:
            raise UsageError(f"'{text}': '{word}' is no number", option="on") from None
        options[name] = (*options.get(name, ()), setting) if name in _REPEATED else setting
    options = {_REPEATED.get(name, name): value for name, value in options.items()}
    return Measure(suite, {**options, **_what(suite, what, text, options)}, (text,))


def _what(suite: str, what: str, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a suite that say what it measures at."""
    if suite == "custom":
        file, _, name = what.rpartition(":")
        if not file or not name.isidentifier():
            raise UsageError(
                f"'{text}' is not custom:FILE:FUNCTION", option="on", hint="as in custom:metric.py:accuracy"
            )
        return {"metric": what}
    if suite == "lm":
        return {"tasks": (what,), "held_out": True}
    name, _, split = what.partition(":")
    tasks = {*image_tasks.publication()["tasks"], *image_tasks.groups()}
    if _REPORTED in (split, options.get("split")):
        raise UsageError(
            f"'{text}': the split '{_REPORTED}' is what `eval clip` reports; who chooses by it reports too much",
            option="on",
            hint="without a split the validation split is taken, or else the training split",
        )
    published = name.lower() in tasks or not (any(sign in what for sign in "/=~") or Path(what).exists())
    return {"tasks" if published else "data": (what,), "held_out": True}


def join(before: Scores, scores: Scores, measure: Measure) -> Scores:
    """The scores of several measures.

    Raises:
        UsageError: Two have a task of one name.
    """
    twice = before.keys() & scores.keys()
    if twice:
        raise UsageError(
            f"{measure.texts[0]}: another {named('on')} has a task called '{min(twice)}' too", option="on",
            hint="leave one of them out",
        )  # fmt: skip
    return {**before, **scores}


def sign_of(scores: Scores) -> int:
    """Whether more is better, 1, or less, -1.

    Raises:
        UsageError: It is so at some tasks, and otherwise at others.
    """
    lower = [task for task, score in scores.items() if score.get("lower")]
    if lower and len(lower) < len(scores):
        other = next(task for task in scores if task not in lower)
        raise UsageError(
            f"at '{lower[0]}' less is better, and at '{other}' more is: there is no mean of both to choose by",
            hint=f"leave one of them out of {named('on')}, or choose another metric for it, as in lm:TASK,metric=acc",
        )
    return -1 if lower else 1


def average(scores: Scores) -> dict[str, Any]:
    """The mean over the tasks and its standard error, as a report has them."""
    # Where less is better at all of them the mean is one as well.
    alike = {task: {key: v for key, v in score.items() if key != "lower"} for task, score in scores.items()}
    row = cast(ModelRow, {"name": "", "role": "model", "scores": alike})
    summarise(list(alike), [row])
    return {"average": row["average"], "average_stderr": row["average_stderr"]}


def best(candidates: Sequence[Scores]) -> int | None:
    """The place of the candidate with the best mean, the first of equal ones; None where none has a mean."""
    sign = sign_of(candidates[0])
    means = [average(scores)["average"] for scores in candidates]
    places = [place for place, mean in enumerate(means) if mean is not None]
    return max(places, key=lambda place: sign * means[place]) if places else None


def describe(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of what was looked at."""
    left_out = ("format", "created", "device", "models", "notes")
    about = {key: value for key, value in report.items() if key not in left_out}
    if "data" in about:
        about["data"] = {
            name: {key: value for key, value in each.items() if key not in ("classes", "templates")}
            for name, each in about["data"].items()
        }
    about["notes"] = [note for note in report["notes"] if "were measured before" not in note]
    if report["suite"] == "custom":
        about["notes"].append("what the function looks at is its own: report on other items than these")
    return about
