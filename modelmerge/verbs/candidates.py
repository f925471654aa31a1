"""What a search merges: a candidate for every combination of the values that are tried."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
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
from modelmerge.methods.options import MOST, as_text, check_option, is_linear, option_types, read_values
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.transforms import parse_transform, with_option
from modelmerge.verbs import adapted
from modelmerge.verbs.auto import AUTO
from modelmerge.verbs.measure import Measure, Scores, check_files, read_measures
from modelmerge.verbs.prepare import Prepared, prepare

Values = Sequence[Any] | str  # of an option: themselves, or as they are typed


@dataclass(slots=True)
class Candidate:
    """A merge with values of its own: by option, or by TRANSFORM.OPTION."""

    values: Mapping[str, Any]
    prepared: Prepared
    place: Path | None = None  # where it lies, as long as it does
    manifest: dict[str, Any] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its values in words: `scale=0.3 density=0.2`."""
        return label_of(self.values)


@dataclass(frozen=True, slots=True)
class Search:
    """A search that is ready to run: every candidate planned, nothing written and nothing measured."""

    candidates: tuple[Candidate, ...]
    axes: Mapping[str, tuple[Any, ...]]
    measures: tuple[Measure, ...]
    linear: str | None  # the option of which one pass serves all values
    device: str

    @property
    def first(self) -> Prepared:
        """The first candidate, whose inputs are those of all."""
        return self.candidates[0].prepared

    def groups(self) -> list[list[Candidate]]:
        """The candidates, those together that one pass over the models serves."""
        if self.linear is None:
            return [[candidate] for candidate in self.candidates]
        groups: dict[tuple[Any, ...], list[Candidate]] = {}
        for candidate in self.candidates:
            key = tuple(value for name, value in candidate.values.items() if name != self.linear)
            groups.setdefault(key, []).append(candidate)
        return list(groups.values())

    def candidate_bytes(self) -> int:
        """The most bytes of weights that a candidate has."""
        size = adapted.size_of(self.first.recipe)
        if size is None:
            return max(each.prepared.job.plan.bytes_written for each in self.candidates)
        return max(adapted.most_bytes(each.prepared.job, each.prepared.recipe, size) for each in self.candidates)

    def describe(self) -> dict[str, Any]:
        """The plan: that of one merge, and what the search adds; bytes are those of all."""
        plan, groups, each = self.first.describe(), self.groups(), self.candidate_bytes()
        plan["bytes"]["read"] = sum(
            bytes_read(group[0].prepared.job, group[0].prepared.job.plan.in_order()) for group in groups
        )
        plan["bytes"]["write"] = each * len(self.candidates)
        plan["search"] = {
            "options": {name: list(values) for name, values in self.axes.items()},
            "on": [text for measure in self.measures for text in measure.texts],
            "candidates": len(self.candidates),
            "merges": len(groups),
            "disk": {"all": each * len(self.candidates), "least": each * min(2, len(self.candidates))},
        }
        return plan

    def close(self) -> None:
        """Let go of the inputs."""
        for candidate in self.candidates:
            candidate.prepared.close()


def prepare_search(
    recipe: Recipe,
    tries: Mapping[str, Values],
    on: Sequence[str] = (),
    metric: Metric | str | None = None,
    *,
    device: str = "auto",
    stream: bool = False,
    look: bool = True,
) -> Search:
    """Plan every candidate; nothing is written, and nothing is measured.

    Args:
        recipe: The merge; what it says of the options that are tried does not count.
        tries: As for `search`.
        on: As for `search`.
        metric: As for `search`.
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
    if recipe.unlabelled or (recipe.method != AUTO and registry.load(recipe.method).on_data):
        raise UsageError(
            f"'{recipe.method}' finds its coefficients on unlabelled data, and is not searched besides",
            hint="search another method, or run it alone",
        )
    opened = open_models(recipe.base, recipe.experts, recipe.exclude)
    first = prepare(recipe, device=device, stream=stream, opened=opened, look=look)
    resolved = dataclasses.replace(
        recipe, method=first.recipe.method, base=first.recipe.base, experts=first.recipe.experts,
        options=first.recipe.options if recipe.method == AUTO else recipe.options, weights=first.recipe.weights,
    )  # fmt: skip
    axes = {name.replace("-", "_"): _axis(resolved, name, values) for name, values in tries.items()}
    count = math.prod(map(len, axes.values()))
    if count > MOST:
        raise UsageError(f"{count:,} candidates are more than {MOST:,}", option="tries")
    candidates = tuple(
        _candidate(resolved, dict(zip(axes, values, strict=True)), first, opened, device, stream)
        for values in itertools.product(*axes.values())
    )
    for name in axes:
        _refuse_idle(name, candidates)
    check_files(measures)
    method = registry.load(resolved.method)
    linear = next((name for name in axes if is_linear(method, name)), None)
    return Search(candidates, axes, measures, linear if recipe.as_lora is None else None, device)


def _candidate(
    recipe: Recipe,
    values: Mapping[str, Any],
    first: Prepared,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]],
    device: str,
    stream: bool,
) -> Candidate:
    options, transforms, places = dict(recipe.options), list(recipe.disentangle), _transforms(recipe)
    for name, value in values.items():
        transform, dot, option = name.rpartition(".")
        if dot:
            place, _ = places[transform]
            transforms[place] = with_option(transforms[place], option, value)
        else:
            options[option] = value
    changed = dataclasses.replace(recipe, options=options, disentangle=tuple(transforms))
    try:
        prepared = prepare(changed, device=device, remarks=first.remarks, stream=stream, opened=opened)
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


def _refuse_idle(name: str, candidates: Sequence[Candidate]) -> None:
    """Refuse to try an option that overrides set for every tensor."""
    if "." in name:
        return
    values: dict[str, set[Any]] = {}
    for candidate in candidates:
        for tensor, setting in candidate.prepared.job.settings.items():
            values.setdefault(tensor, set()).add(getattr(setting.options, name, None))
    tried = {candidate.values[name] for candidate in candidates}
    if len(tried) > 1 and not any(len(each) > 1 for each in values.values()):
        raise UsageError(
            f"'{name.replace('_', '-')}' has no effect: {named('at')} says what it is for every tensor",
            option="tries", hint="leave one of them out",
        )  # fmt: skip


def _axis(recipe: Recipe, name: str, values: Values) -> tuple[Any, ...]:
    """The values of an option, each one that it can have.

    Raises:
        UsageError: There is no such option, or a value is none it can have, or comes twice.
    """
    method = registry.load(recipe.method)
    words: dict[str, tuple[Method | TransformSpec, str]] = {o: (method, o) for o in option_types(method.options)}
    for transform, (_, spec) in _transforms(recipe).items():
        words |= {f"{transform}.{option}": (spec, option) for option in option_types(spec.options)}
    flag, text = name.replace("_", "-"), values if isinstance(values, str) else ", ".join(map(as_text, values))
    if name.replace("-", "_") not in words:
        typed = {word: word.replace("_", "-") for word in words}
        have = f"it has: {', '.join(typed.values())}" if words else ""
        hint = suggestion(name.replace("-", "_"), words, have, show=typed.__getitem__)
        raise UsageError(f"'{recipe.method}' has no option '{flag}'", hint=hint).within("tries", f"{flag}={text}")
    owner, option = words[name.replace("-", "_")]
    try:
        each = read_values(option, values, option_types(owner.options)[option]) if isinstance(values, str) else values
        checked = tuple(check_option(owner, option, value) for value in each)
        if not checked:
            raise UsageError("there is no value")
        if len(set(checked)) < len(checked):
            raise UsageError(f"{as_text(next(v for i, v in enumerate(checked) if v in checked[:i]))} comes twice")
    except UsageError as error:
        raise error.within("tries", f"{flag}={text}") from error
    return checked


def label_of(values: Mapping[str, Any]) -> str:
    """Values of options in words."""
    return " ".join(f"{name.replace('_', '-')}={as_text(value)}" for name, value in values.items())
