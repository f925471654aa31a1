"""What a search merges: a candidate for every combination of the values that are tried, or those of its trials."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.opening import open_models
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.devices import find_device
from modelmerge.engine.memory import bytes_read
from modelmerge.errors import UsageError, named, suggestion
from modelmerge.evaluation.custom import Metric
from modelmerge.methods import registry
from modelmerge.methods.contract import Method, TransformSpec
from modelmerge.methods.options import (
    MOST,
    Range,
    as_key,
    as_text,
    as_word,
    check_option,
    is_linear,
    option_types,
    read_range,
    read_values,
)
from modelmerge.methods.words import parse_transform, with_option
from modelmerge.plan.overrides import WEIGHT, Setting
from modelmerge.plan.recipe import BALANCED, Recipe
from modelmerge.verbs import adapted
from modelmerge.verbs.auto import AUTO
from modelmerge.verbs.measure import Measure, Scores, average, check_files, read_measures, sign_of
from modelmerge.verbs.prepare import Prepared, prepare
from modelmerge.verbs.trials import Axis, is_numbers, require_optuna, trials

Values = Sequence[Any] | str  # of an option: themselves, or as they are typed
_ALL = "*"  # all experts
_PROBES = 256  # combinations of choices that are planned before the trials


@dataclass(slots=True)
class Candidate:
    """A merge with values of its own: by option, by TRANSFORM.OPTION, or by EXPERT.weight."""

    values: Mapping[str, Any]
    prepared: Prepared
    place: Path | None = None  # where it lies, as long as it does
    manifest: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its values in words: `scale=0.3 density=0.2`."""
        return label_of(self.values)


@dataclass(slots=True)
class Search:
    """A search that is ready to run, nothing written and nothing measured.

    Args:
        planned: The candidates; of one with trials some, with all choices and with the ends of all numbers.
        axes: What is tried of each option.
        measures: How good a candidate is.
        linear: The option of which one pass serves all values, if any.
        device: Where candidates are made and measured.
        plan: Plans a candidate.
        budget: How many candidates there may be.
        trials: How many of them are asked for one by one; None where all combinations are merged.
        defaults: What options and weights are if nobody says otherwise, as far as that is known.
        candidates: Those there are.
    """

    planned: tuple[Candidate, ...]
    axes: Mapping[str, Axis]
    measures: tuple[Measure, ...]
    linear: str | None
    device: str
    plan: Callable[[Mapping[str, Any]], Candidate]
    budget: int | None
    trials: int | None
    defaults: Mapping[str, Any]
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def first(self) -> Prepared:
        """A candidate, whose inputs are those of all."""
        return self.planned[0].prepared

    @property
    def count(self) -> int:
        """How many candidates there will be."""
        return self.trials or len(self.planned)

    def groups(self) -> Iterator[list[Candidate]]:
        """The candidates, those together that one pass over the models serves. A trial asks for the scores before."""
        if self.trials is None:
            self.candidates = [*self.planned]
            yield from _served_by_one_pass(self.candidates, self.linear)
            return
        asked = trials(self.axes, self.defaults, self.trials, self.first.job.seed)
        values = next(asked, None)
        while values is not None:
            self.candidates.append(self.plan(values))
            yield self.candidates[-1:]
            scores = self.candidates[-1].scores
            mean = average(scores)["average"]
            try:
                values = asked.send(None if mean is None else sign_of(scores) * mean)
            except StopIteration:
                return

    @property
    def merges(self) -> int:
        """How many passes over the models there are."""
        return self.trials or len(_served_by_one_pass(self.planned, self.linear))

    def candidate_bytes(self) -> int:
        """The most bytes of weights that a candidate has."""
        size = adapted.size_of(self.first.recipe)
        if size is None:
            return max(each.prepared.job.plan.bytes_written for each in self.planned)
        return max(adapted.most_bytes(each.prepared.job, each.prepared.recipe, size) for each in self.planned)

    def remarks(self) -> list[str]:
        """What a person should know beforehand."""
        if self.budget is None or self.trials is not None:
            return []
        return [f"All {self.count} combinations are merged: the budget of {self.budget} is no smaller."]

    def describe(self) -> dict[str, Any]:
        """The plan: that of one merge, and what the search adds; bytes are those of all."""
        plan, each = self.first.describe(), self.candidate_bytes()
        groups = [self.planned[:1]] * self.trials if self.trials else _served_by_one_pass(self.planned, self.linear)
        plan["bytes"]["read"] = sum(
            bytes_read(group[0].prepared.job, group[0].prepared.job.plan.in_order()) for group in groups
        )
        plan["bytes"]["write"] = each * self.count
        plan["remarks"] += self.remarks()
        plan["search"] = {
            "options": self.options(),
            "on": [text for measure in self.measures for text in measure.texts],
            "candidates": self.count,
            "merges": self.merges,
            "disk": {"all": each * (min(2, self.count) if self.trials else self.count),
                     "least": each * min(2, self.count)},
        }  # fmt: skip
        return plan

    def options(self) -> dict[str, Any]:
        """What is tried of each option, as JSON has it."""
        return {
            name: dataclasses.asdict(axis) if isinstance(axis, Range) else list(axis)
            for name, axis in self.axes.items()
        }

    def close(self) -> None:
        """Let go of the inputs."""
        for candidate in (*self.planned, *self.candidates):
            candidate.prepared.close()


def _served_by_one_pass(candidates: Sequence[Candidate], linear: str | None) -> list[list[Candidate]]:
    """Candidates, those together that differ in the linear option alone."""
    if linear is None:
        return [[candidate] for candidate in candidates]
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in candidates:
        key = tuple(value for name, value in candidate.values.items() if name != linear)
        groups.setdefault(key, []).append(candidate)
    return list(groups.values())


def prepare_search(
    recipe: Recipe,
    tries: Mapping[str, Values],
    on: Sequence[str] = (),
    metric: Metric | str | None = None,
    *,
    budget: int | None = None,
    device: str = "auto",
    stream: bool = False,
    look: bool = True,
) -> Search:
    """Plan the candidates, or those at the ends of what is tried; nothing is written, and nothing is measured.

    Args:
        recipe: The merge; what it says of the options that are tried does not count.
        tries: As for `search`.
        on: As for `search`.
        metric: As for `search`.
        budget: As for `search`.
        device: As for `search`.
        stream: As for `merge`.
        look: As for `prepare`.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read.
    """
    find_device(device)  # one, of which all candidates are
    measures = read_measures(on, metric)
    if not tries:
        raise UsageError(f"a search needs values: {named('tries')}", hint="as in scale=0.1:1.0:0.1")
    if budget is not None and not 1 <= budget <= MOST:
        raise UsageError(f"must be 1 to {MOST:,}, not {budget}", option="budget")
    if recipe.unlabelled or (recipe.method != AUTO and registry.load(recipe.method).on_data):
        raise UsageError(
            f"'{recipe.method}' finds its coefficients on unlabelled data, and is not searched besides",
            hint="search another method, or run it alone",
        )
    opened = open_models(recipe.base, recipe.experts, recipe.exclude)
    first = prepare(recipe, device=device, stream=stream, opened=opened, look=look)
    resolved = dataclasses.replace(
        recipe, method=first.recipe.method, base=first.recipe.base, experts=first.recipe.experts,
        options=first.recipe.options if recipe.method == AUTO else recipe.options,
        weights=first.recipe.weights, overlap=first.recipe.overlap,
    )  # fmt: skip
    experts = [expert.name for expert in first.job.plan.experts]
    axes = _axes(resolved, tries, experts, experts if recipe.weights == BALANCED else list(recipe.weights))
    between = next((name for name, axis in axes.items() if isinstance(axis, Range)), None)
    if between is not None and budget is None:
        what = f"'{as_word(between)}={axes[between]}' is all numbers between two"
        hint = f"say how many to try, {named('budget')} N, or name them, FIRST:LAST:STEP"
        raise UsageError(what, option="tries", hint=hint)
    lists = [axis for axis in axes.values() if not isinstance(axis, Range)]
    count = math.prod(map(len, lists))
    one_by_one = budget is not None and (between is not None or budget < count)
    if count > MOST and not one_by_one:
        raise UsageError(f"{count:,} candidates are more than {MOST:,}", option="tries")
    if one_by_one:
        require_optuna()

    def plan(values: Mapping[str, Any]) -> Candidate:
        return _candidate(resolved, values, first, opened, {"device": device, "stream": stream, "look": look})

    combinations = _probes(axes) if one_by_one else itertools.product(*lists)
    planned = tuple(plan(dict(zip(axes, values, strict=True))) for values in combinations)
    for name in axes:
        _refuse_idle(name, planned, experts)
    check_files(measures)
    method = registry.load(resolved.method)
    linear = next((name for name in axes if is_linear(method, name)), None)
    defaults = {**first.recipe.options, **{f"{expert}.{WEIGHT}": 1.0 for expert in experts}}
    return Search(
        planned, axes, measures, linear if recipe.as_lora is None else None, device, plan, budget,
        budget if one_by_one else None, defaults,
    )  # fmt: skip


def _probes(axes: Mapping[str, Axis]) -> Iterator[tuple[Any, ...]]:
    """Combinations with all choices, and with both ends of all numbers: what any of them breaks shows beforehand."""
    choices: list[tuple[Any, ...]] = []
    ends: list[Any] = []
    for axis in axes.values():
        values = (axis.low, axis.high) if isinstance(axis, Range) else axis
        choices.append(values[:1] if is_numbers(values) else values)
        ends.append(values[-1])
    first = [values[0] for values in choices]
    yield from itertools.islice(itertools.product(*choices), _PROBES)
    for place, end in enumerate(ends):
        if end != first[place]:
            yield (*first[:place], end, *first[place + 1 :])


def _candidate(
    recipe: Recipe,
    values: Mapping[str, Any],
    first: Prepared,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]],
    how: Mapping[str, Any],
) -> Candidate:
    options, transforms, places = dict(recipe.options), list(recipe.disentangle), _transforms(recipe)
    assert not isinstance(recipe.weights, str), "balanced weights are those of the first"
    weights = dict(recipe.weights)
    for name, value in values.items():
        owner, dot, option = name.rpartition(".")
        if _is_weight(name):
            weights[owner] = value
        elif dot:
            place, _ = places[owner]
            transforms[place] = with_option(transforms[place], option, value)
        else:
            options[option] = value
    changed = dataclasses.replace(
        recipe, options=options, weights=weights, disentangle=tuple(transforms),
        overlap=None if "scale" in values else recipe.overlap,
    )  # fmt: skip
    try:
        prepared = prepare(changed, remarks=first.remarks, opened=opened, **how)
    except UsageError as error:
        raise error.within("tries", label_of(values)) from error
    return Candidate(values, prepared)


def _transforms(recipe: Recipe) -> dict[str, tuple[int, TransformSpec]]:
    """The transforms in front by name, with their places; of two of one name the first."""
    transforms: dict[str, tuple[int, TransformSpec]] = {}
    for place, text in enumerate(recipe.disentangle):
        name, spec, _ = parse_transform(text)
        transforms.setdefault(name, (place, spec))
    return transforms


def _is_weight(name: str) -> bool:
    """Whether it is an expert's weight; no transform has an option of that name."""
    return name.endswith(f".{WEIGHT}")


def _refuse_idle(name: str, candidates: Sequence[Candidate], experts: Sequence[str]) -> None:
    """Refuse to try an option, or a weight, that overrides set for every tensor."""
    owner = name.rpartition(".")[0]
    if owner and not _is_weight(name):
        return

    def here(setting: Setting) -> Any:
        return setting.weights[experts.index(owner)] if owner else getattr(setting.options, name, None)

    values: dict[str, set[Any]] = {}
    for candidate in candidates:
        for tensor, setting in candidate.prepared.job.settings.items():
            values.setdefault(tensor, set()).add(here(setting))
    tried = {candidate.values[name] for candidate in candidates}
    if len(tried) > 1 and not any(len(each) > 1 for each in values.values()):
        raise UsageError(
            f"'{as_word(name)}' has no effect: {named('at')} says what it is for every tensor",
            option="tries", hint="leave one of them out",
        )  # fmt: skip


def _axes(
    recipe: Recipe, tries: Mapping[str, Values], experts: Sequence[str], weighted: Sequence[str]
) -> dict[str, Axis]:
    """What is tried of each option, of one that is for all experts of each of them; `weighted` are given their weights.

    Raises:
        UsageError: See `_axis`; or an expert's weight is given besides, or named twice.
    """
    axes: dict[str, Axis] = {}
    for word, values in tries.items():
        key = as_key(word)
        names = [f"{expert}.{WEIGHT}" for expert in experts] if key == f"{_ALL}.{WEIGHT}" else [key]
        for name in names:
            if name in axes or (_is_weight(name) and name.rpartition(".")[0] in weighted):
                what = "tried twice" if name in axes else "given, and tried"
                raise UsageError(f"'{as_word(name)}' is {what}", hint="leave one of them out")
            axes[name] = _axis(recipe, name, values, experts)
    return axes


def _axis(recipe: Recipe, name: str, values: Values, experts: Sequence[str]) -> Axis:
    """What is tried of an option: each value one that it can have.

    Raises:
        UsageError: There is no such option, or a value is none it can have, or comes twice.
    """
    method = registry.load(recipe.method)
    words: dict[str, tuple[Method | TransformSpec, str]] = {o: (method, o) for o in option_types(method.options)}
    for transform, (_, spec) in _transforms(recipe).items():
        words |= {f"{transform}.{option}": (spec, option) for option in option_types(spec.options)}
    text = values if isinstance(values, str) else ", ".join(map(as_text, values))
    weights = [f"{expert}.{WEIGHT}" for expert in experts]
    if name not in (*words, *weights):
        have = f"it has: {', '.join(map(as_word, (*words, *weights)))}"
        hint = suggestion(name, (*words, *weights), have, show=as_word)
        error = UsageError(f"'{recipe.method}' has no option '{as_word(name)}'", hint=hint)
        raise error.within("tries", f"{as_word(name)}={text}")
    owner, option = words.get(name, (None, WEIGHT))
    kind = float if owner is None else option_types(owner.options)[option]

    def check(value: Any) -> Any:
        return read_values(option, str(value), kind)[0] if owner is None else check_option(owner, option, value)

    try:
        between = read_range(option, values, kind) if isinstance(values, str) else None
        if between is not None:
            return dataclasses.replace(between, low=check(between.low), high=check(between.high))
        each = read_values(option, values, kind) if isinstance(values, str) else values
        checked = tuple(check(value) for value in each)
        if not checked:
            raise UsageError("there is no value")
        if len(set(checked)) < len(checked):
            raise UsageError(f"{as_text(next(v for i, v in enumerate(checked) if v in checked[:i]))} comes twice")
    except UsageError as error:
        raise error.within("tries", f"{as_word(name)}={text}") from error
    return checked


def label_of(values: Mapping[str, Any]) -> str:
    """Values of options in words."""
    return " ".join(f"{as_word(name)}={as_text(value)}" for name, value in values.items())
