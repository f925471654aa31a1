"""What `search` measures candidates with: `SUITE:WHAT[,SETTING=VALUE...]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modelmerge.errors import UsageError
from modelmerge.evaluation import image_tasks
from modelmerge.evaluation.custom import Metric

_SUITES = ("custom", "clip", "lm")


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
    """What candidates are measured with: a suite, and what it is told; `texts` as they were typed."""

    suite: str
    told: Mapping[str, Any]
    texts: tuple[str, ...]


def _measures(on: Sequence[str], metric: Metric | str | None) -> tuple[Measure, ...]:
    """What is asked for; tasks of one suite with the same settings together, so that a model is loaded once for them.

    Raises:
        UsageError: Nothing is asked for, or what there is not.
    """
    found = [parse_on(text) for text in on]
    if metric is not None:
        found.append(Measure("custom", {"metric": metric}, (metric if isinstance(metric, str) else _name_of(metric),)))
    if not found:
        raise UsageError(
            "--search needs something to measure with",
            hint="--on custom:FILE:FUNCTION, --on clip:TASK or --on lm:TASK",
        )
    if len({text for each in found for text in each.texts}) < len(found):
        raise UsageError("--on names the same thing twice")
    joined: list[Measure] = []
    for each in found:
        before = joined[-1] if joined else None
        if before is not None and each.suite == before.suite != "custom" and _settings(each) == _settings(before):
            told = dict(before.told)
            for name in _whats(each):
                told[name] = (*told.get(name, ()), *each.told[name])
            joined[-1] = Measure(each.suite, told, (*before.texts, *each.texts))
        else:
            joined.append(each)
    return tuple(joined)


def _name_of(metric: Metric) -> str:
    return getattr(metric, "__name__", "metric")


def _whats(measure: Measure) -> list[str]:
    return [name for name in measure.told if name in ("data", "tasks")]


def _settings(measure: Measure) -> dict[str, Any]:
    return {name: value for name, value in measure.told.items() if name not in _whats(measure)}


def parse_on(text: str) -> Measure:
    """What `SUITE:WHAT[,SETTING=VALUE...]` says; the settings are the options of `eval SUITE`, without their dashes.

    Raises:
        UsageError: It is not of that form, there is no such suite or setting, or it is what is reported afterwards.
    """
    suite, _, rest = text.partition(":")
    if suite not in _SUITES or not rest:
        hint = "--on custom:FILE:FUNCTION, --on clip:TASK or --on lm:TASK"
        near = get_close_matches(suite, _SUITES, n=1)
        if suite == "weights":
            hint = "figures of weights explain conflicts, and do not say how well a model does: " + hint
        elif near and near[0] != suite:
            hint = f"did you mean {near[0]}:...? {hint}"
        raise UsageError(f"--on '{text}' is not SUITE:WHAT", hint=hint)
    what, *words = rest.split(",")
    told: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        reader = _SETTINGS[suite].get(name)
        if reader is None or (reader is bool) == bool(equals):
            have = ", ".join(each.replace("_", "-") for each in _SETTINGS[suite])
            near = get_close_matches(name, _SETTINGS[suite], n=1)
            raise UsageError(
                f"--on '{text}': '{word}' is no setting of {suite}",
                hint=f"did you mean '{near[0].replace('_', '-')}'?"
                if near and near[0] != name
                else f"there are: {have}",
            )
        if name in told and name not in _REPEATED:
            raise UsageError(f"--on '{text}': '{name}' comes twice")
        try:
            read = True if reader is bool else reader(value)
        except ValueError:
            raise UsageError(f"--on '{text}': '{word}' is no number") from None
        told[name] = (*told.get(name, ()), read) if name in _REPEATED else read
    told = {_REPEATED.get(name, name): value for name, value in told.items()}
    return Measure(suite, {**told, **_what(suite, what, text, told)}, (text,))


def _what(suite: str, what: str, text: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What a suite is told to measure at."""
    if suite == "custom":
        where, _, name = what.rpartition(":")
        if not where or not name.isidentifier():
            raise UsageError(f"--on '{text}' is not custom:FILE:FUNCTION", hint="as in --on custom:metric.py:accuracy")
        return {"metric": what}
    if suite == "lm":
        return {"tasks": (what,), "held_out": True}
    name, _, split = what.partition(":")
    known = {*image_tasks.publication()["tasks"], *image_tasks.groups()}
    if _REPORTED in (split, told.get("split")):
        raise UsageError(
            f"--on '{text}': the split '{_REPORTED}' is what `eval clip` reports; who chooses by it reports too much",
            hint="without a split the validation split is taken, or else the training split",
        )
    published = name.lower() in known or not (any(sign in what for sign in "/=~") or Path(what).exists())
    return {"tasks" if published else "data": (what,), "held_out": True}
