"""Overrides: another method or other values for some tensors.

An override is written `GLOB: [METHOD] [OPTION=V[,V...]] [EXPERT.OPTION=V[,V...]]`. `*attn*: tsv-m scale=0.8` merges
tensors of such names by another method; `*mlp*: scale=0.2` keeps the merge's method and changes one of its options;
`*: math.weight=0,0.5,1` gives one expert a weight that rises over the layers: the values are spread evenly from the
first layer to the last, with straight lines between them. The first override whose GLOB matches a tensor decides alone.
`base` is a method: it copies.

A method for linear layers merges their weights only; what its GLOB matches besides goes to the method's rest. What a
method measures over the model, such as the share of the largest entries, it measures over all tensors that it merges
with the same options: they are one group.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from modelmerge.errors import UsageError, named, suggestion
from modelmerge.methods import registry
from modelmerge.methods.contract import Method
from modelmerge.methods.options import (
    as_text,
    asks_overlap,
    change_options,
    check_option,
    make_options,
    no_such_option,
    option_types,
    read_option,
    with_experts,
    written,
)

BASE = "base"  # the method that copies
WEIGHT = "weight"
_LAYER = re.compile(r"\.(\d+)\.")
_FORM = "write it like '*mlp*: scale=0.2', '*attn*: tsv-m' or '*: math.weight=0.5'"


@dataclass(frozen=True, slots=True)
class Curve:
    """A number over the layers: one value, or several from the first layer to the last."""

    values: tuple[float, ...]

    def at(self, depth: float) -> float:
        """The value at a depth from 0, the first layer, to 1, the last."""
        place = depth * (len(self.values) - 1)
        before = int(place)
        after = min(before + 1, len(self.values) - 1)
        return (1 - (place - before)) * self.values[before] + (place - before) * self.values[after]


@dataclass(frozen=True, slots=True)
class Override:
    """What one override says: `values` by option and `experts` by expert and option, as text."""

    tensors: str
    method: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As it is typed."""
        words = [self.method] if self.method else []
        words += [f"{option.replace('_', '-')}={value}" for option, value in self.values.items()]
        words += [f"{expert}.{option.replace('_', '-')}={value}" for (expert, option), value in self.experts.items()]
        return f"{self.tensors}: {shlex.join(words)}"

    def matches(self, tensor: str) -> bool:
        """Does the glob match the name?"""
        return fnmatch.fnmatchcase(tensor, self.tensors)


def parse(text: str) -> Override:
    """The override that a text says.

    Raises:
        UsageError: The text is not of that form.
    """
    glob, colon, rest = text.partition(": ") if ": " in text else (text.removesuffix(":"), text[-1:], "")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"'{text}': {error}", option="at", hint=_FORM) from None
    if colon not in (": ", ":") or not glob:
        raise UsageError(f"'{text}' is not 'GLOB: [METHOD] [OPTION=V] [EXPERT.OPTION=V]'", option="at", hint=_FORM)
    method = words.pop(0) if words and "=" not in words[0] else None
    values: dict[str, str] = {}
    experts: dict[tuple[str, str], str] = {}
    for word in words:
        target, equals, value = word.rpartition("=")
        expert, dot, option = target.rpartition(".")
        if " " in option or "=" in option:  # the words of a value, as of svc's `of`: no option has such a name
            (option, equals, value), expert, dot = word.partition("="), "", ""
        option = option.replace("-", "_")
        if not equals or not option or not value or bool(dot) != bool(expert):
            raise UsageError(f"'{text}': '{word}' is not OPTION=V", option="at", hint=_FORM)
        if (expert, option) in experts or (not expert and option in values):
            raise UsageError(f"'{text}': '{target}' comes twice", option="at", hint=_FORM)
        if expert:
            experts[expert, option] = value
        else:
            values[option] = value
    return Override(glob, method, values, experts)


@dataclass(frozen=True, slots=True)
class Choice:
    """How tensors are merged: a method with its options, and the curves that differ by layer or expert.

    `override` is the place of the override that says so; None for the merge's own method. With `rest`, the method is
    the one for what a method for linear layers leaves: it runs at its defaults, and only weights differ.
    """

    name: str
    method: Method
    options: Any
    override: int | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    experts: Mapping[tuple[str, str], Curve] = field(default_factory=dict)
    rest: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """How one tensor is merged.

    Args:
        method: The method's name.
        options: Its options here.
        weights: The experts' weights here.
        each: The values of the options that differ between the experts, in their order.
    """

    method: str
    options: Any
    weights: tuple[float, ...]
    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Methods:
    """Which method merges which tensor.

    Args:
        name: The merge's own method.
        options: Its options, as they were given.
        overrides: What differs for some tensors, in the order in which they are asked.
        rest: The method for what methods for linear layers leave; None for the method's own choice.
        experts: The experts' names.
        overlap: The scale of sums that leave it to how much the experts overlap, if that has been measured;
            `asks_overlap` tells whether any does.

    Raises:
        UsageError: There is no such method, option or expert, or a value is out of bounds.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        overrides: Sequence[Override],
        rest: str | None,
        experts: Sequence[str],
        overlap: float | None = None,
    ) -> None:
        method = registry.load(name)
        self.overrides = tuple(overrides)
        self._options, self._rest, self._experts, self._overlap = dict(options), rest, experts, overlap
        self.asks_overlap = False
        self.main = Choice(name, method, self._completed(make_options(method, name, options)))
        self._choices = [self._bound(place, override) for place, override in enumerate(overrides)]

    def _completed(self, options: Any) -> Any:
        """The options with what follows from the experts."""
        self.asks_overlap |= asks_overlap(options)
        return with_experts(options, len(self._experts), self._overlap)

    def _bound(self, place: int, override: Override) -> Choice | None:
        """The override with its values read; None for `base`."""
        try:
            if override.method == BASE:
                if override.values or override.experts:
                    raise UsageError(f"'{BASE}' copies the base and has no options", hint=_FORM)
                return None
            name = override.method or self.main.name
            return self._read(place, override, name, registry.load(name))
        except UsageError as error:
            raise error.within("at", str(override)) from error

    def _read(self, place: int, override: Override, name: str, method: Method) -> Choice:
        types, plain, curves = option_types(method.options), {}, {}
        for option, text in override.values.items():
            if option != WEIGHT and option not in types:
                raise no_such_option(name, option, [WEIGHT, *types])
            values = _numbers(text) if "," in text or option == WEIGHT else None
            if values is None:
                plain[option] = read_option(method, name, option, text)
                continue
            if option != WEIGHT:
                self._check_curve(method, name, option, values)
            curves[option] = Curve(values)
        experts: dict[tuple[str, str], Curve] = {}
        for (expert, option), text in override.experts.items():
            if expert not in self._experts:
                hint = suggestion(expert, self._experts, f"the experts are: {', '.join(self._experts)}")
                raise UsageError(f"'{expert}' is no expert", hint=hint)
            values = _numbers(text)
            if values is None:
                raise UsageError(f"{named(option)} of '{expert}' is no number: '{text}'", hint=_FORM)
            if option != WEIGHT:
                if option not in types:
                    raise no_such_option(name, option, [WEIGHT, *types])
                if _varies(method).get(option) != "expert":
                    raise UsageError(
                        f"{named(option)} of '{name}' is one value for all experts", hint="leave the expert's name out"
                    )
                self._check_curve(method, name, option, values)
            experts[expert, option] = Curve(values)
        same = self._options if override.method is None else {}
        changed = change_options(method, name, same, plain, len(self._experts), self._overlap)
        options = self._completed(changed)
        for option, curve in {**curves, **{option: curve for (_, option), curve in experts.items()}}.items():
            if _varies(method).get(option) == "expert" and len(curve.values) > 1 and method.survey(options, {}):
                raise UsageError(
                    f"with these options of '{name}', {named(option)} is a share of the whole task vector and cannot "
                    "differ between layers",
                    hint="trim-scope=tensor counts the share in each tensor",
                )
        return Choice(name, method, options, place, curves, experts)

    @staticmethod
    def _check_curve(method: Method, name: str, option: str, values: tuple[float, ...]) -> None:
        if len(values) > 1 and option not in _varies(method):
            raise UsageError(f"{named(option)} of '{name}' is one value for all layers", hint="give one value")
        for value in values:
            check_option(method, option, value)

    def place_of(self, tensor: str) -> int | None:
        """The place of the override that decides how the tensor is merged; None where none does."""
        return next((place for place, override in enumerate(self.overrides) if override.matches(tensor)), None)

    def names_matrices(self, tensor: str) -> bool:
        """Whether the override that decides for a tensor names a method for linear layers."""
        place = self.place_of(tensor)
        choice = None if place is None or self.overrides[place].method is None else self._choices[place]
        return choice is not None and choice.method.matrices

    def choose(self, tensor: str, place: int | None, *, linear: bool) -> Choice | None:
        """How the tensor is merged; None: it is copied.

        `place` is that of the override that decides; `linear`: it is the weight of a linear layer.
        """
        choice = self.main if place is None else self._choices[place]
        if choice is None or linear or not choice.method.matrices:
            return choice
        rest = self._rest or choice.method.rest(choice.options)
        if rest == BASE:
            return None
        method = registry.load(rest)
        weights = {WEIGHT: choice.curves[WEIGHT]} if WEIGHT in choice.curves else {}
        experts = {key: curve for key, curve in choice.experts.items() if key[1] == WEIGHT}
        options = self._completed(method.options())
        return Choice(rest, method, options, place, weights, experts, rest=True)

    def recorded(self) -> tuple[str, ...]:
        """The overrides as text; where one names a method, with all its options: defaults may change."""
        texts = []
        for override, choice in zip(self.overrides, self._choices, strict=True):
            values = dict(override.values)
            if choice is not None and override.method is not None:
                options = dataclasses.asdict(choice.options)
                values = {key: as_text(value) for key, value in options.items() if value is not None} | values
            texts.append(str(dataclasses.replace(override, values=values)))
        return tuple(texts)

    def settings(
        self, tensors: Mapping[str, tuple[int | None, bool, tuple[int, ...] | None]], weights: tuple[float, ...]
    ) -> dict[str, Setting]:
        """How each tensor is merged, of those that are.

        By name, the place of its override, whether it is linear, and the places of the experts that it is made from,
        None for all.

        Raises:
            UsageError: A curve goes over layers that are not there, or the weights of an average add up to zero.
        """
        depth, settings = depths(list(tensors)), {}
        numbered = bool(layers(tensors))
        for tensor, (place, linear, sources) in tensors.items():
            choice = self.choose(tensor, place, linear=linear)
            assert choice is not None, "the tensor is merged"
            long = any(len(curve.values) > 1 for curve in (*choice.curves.values(), *choice.experts.values()))
            if long and not numbered:
                assert choice.override is not None, "only overrides have curves"
                raise UsageError(
                    f"'{self.overrides[choice.override]}' goes over layers, and no tensor that is merged "
                    "has a numbered layer in its name",
                    option="at",
                )
            settings[tensor] = self._setting(choice, weights, depth[tensor])
            here = [weight for i, weight in enumerate(settings[tensor].weights) if sources is None or i in sources]
            if here and choice.method.normalises(settings[tensor].options) and abs(sum(here)) < 1e-8:
                raise UsageError(
                    f"in '{tensor}' the weights add up to zero: their average does not exist",
                    hint=f"check {named('weights')}",
                )
        return settings

    def _setting(self, choice: Choice, weights: tuple[float, ...], depth: float) -> Setting:
        plain = {option: curve.at(depth) for option, curve in choice.curves.items() if option != WEIGHT}
        options = dataclasses.replace(choice.options, **plain) if plain else choice.options
        here = [choice.curves[WEIGHT].at(depth)] * len(weights) if WEIGHT in choice.curves else list(weights)
        each: dict[str, list[float]] = {}
        for (expert, option), curve in choice.experts.items():
            place = self._experts.index(expert)
            if option == WEIGHT:
                here[place] = curve.at(depth)
            else:
                each.setdefault(option, [getattr(options, option)] * len(here))[place] = curve.at(depth)
        return Setting(choice.name, options, tuple(here), {option: tuple(values) for option, values in each.items()})

    def refuse_idle(self, tensors: Mapping[str, tuple[bool, bool, int | None]], count: int | None = None) -> None:
        """Refuse overrides that change nothing; by tensor: is it merged, is it linear, which override decides.

        `count`: so many are looked at, from the first on; all if None.

        Raises:
            UsageError: An override matches no tensor, or none that is merged and that no override before it matches.
        """
        for place, override in enumerate(self.overrides[:count]):
            matched = {name: entry for name, entry in tensors.items() if override.matches(name)}
            mine = [(name, *entry) for name, entry in matched.items() if entry[2] == place]
            if not matched:
                raise UsageError(
                    f"'{override}' matches no tensor of the base", option="at",
                    hint=glob_hint(override.tensors, tensors),
                )  # fmt: skip
            choice = self._choices[place]
            if not mine:
                why, hint = "an override before it matches them", "the first override that matches a tensor decides"
            elif choice is None:
                continue
            elif override.method and choice.method.matrices and not any(linear for _, _, linear, _ in mine):
                why = f"they are no weights of linear layers, and '{choice.name}' merges only those"
                hint = "use a method for all tensors, like average"
            elif not any(merged for _, merged, _, _ in mine):
                why, hint = "they are copied from the base", f"check {named('include')} and {named('exclude')}"
            else:
                continue
            raise UsageError(f"'{override}' changes none of the tensors that it matches: {why}", option="at", hint=hint)


def group_key(method: Method, setting: Setting) -> tuple[Any, ...]:
    """What tensors of one group share: the method, and all options that do not differ from tensor to tensor."""
    varies = _varies(method)
    surveys = method.survey(setting.options, setting.each) is not None
    free = {option for option, kind in varies.items() if kind == "tensor" or not surveys}
    names = [spec.name for spec in dataclasses.fields(method.options) if spec.name not in free]
    options = tuple((name, getattr(setting.options, name)) for name in names)
    each = tuple(sorted((option, values) for option, values in setting.each.items() if option not in free))
    return (setting.method, options, each)


def _varies(method: Method) -> dict[str, str]:
    """The options that can vary, and between what: `tensor` or `expert`."""
    specs = dataclasses.fields(method.options)
    return {spec.name: spec.metadata["varies"] for spec in specs if spec.metadata["varies"]}


def _numbers(text: str) -> tuple[float, ...] | None:
    """The finite numbers that a text lists with commas; None where it does not."""
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        return None
    return values if all(abs(value) < float("inf") for value in values) else None


def curve_text(values: Sequence[float]) -> str:
    """Numbers over the layers as they are typed."""
    return ",".join(map(written, values))


def layers(names: Iterable[str]) -> dict[str, int]:
    """How many numbered layers there are below each prefix, such as `model.layers`."""
    count: Counter[str] = Counter()
    for name in names:
        if layer := layer_of(name):
            prefix, number = layer
            count[prefix] = max(count[prefix], number + 1)
    return dict(count)


def layer_of(name: str) -> tuple[str, int] | None:
    """The prefix and the number of the layer that a tensor lies in, if it does: `model.layers`, 3."""
    match = _LAYER.search(name)
    return (name[: match.start()], int(match[1])) if match else None


def depths(names: Sequence[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 in the first layer, 1 in the last (and in an only one), 0 outside all layers."""
    count = layers(names)

    def depth(name: str) -> float:
        prefix, number = layer_of(name) or ("", 0)
        if not prefix:
            return 0.0
        return number / (count[prefix] - 1) if count[prefix] > 1 else 1.0

    return {name: depth(name) for name in names}


def glob_hint(glob: str, names: Iterable[str]) -> str | None:
    """The hint for a glob that matches none of these names: one with a part as names spell it, or some of them."""
    names = list(names)
    words = sorted({word for name in names for word in re.split(r"[./]", name)})
    some = f"its names are like: {', '.join(names[:3])}"
    for part in re.findall(r"[^./*?\[\]]+", glob):
        near = get_close_matches(part, words, n=1, cutoff=0.7)
        other = glob.replace(part, near[0]) if near else glob
        if other != glob and any(fnmatch.fnmatchcase(name, other) for name in names):
            return f"did you mean '{other}'?"
    return some
