"""Recipes of format 1 as this version says them: `vary`, `rule` and `layer_scale` become overrides.

There, several variations could apply to a tensor and the last one counted, and a rule for linear layers passed over
what is none; here the first override that matches decides alone. So every tensor's setting is worked out by the old
rules, and tensors of the same setting are named together.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from modelmerge.checkpoint.documents import check, parse_json, shown
from modelmerge.checkpoint.names import layer_type
from modelmerge.errors import RecipeError
from modelmerge.methods import registry
from modelmerge.methods.options import as_text, option_types
from modelmerge.plan.overrides import BASE, WEIGHT, Curve, Override, curve_text, depths, layer_of


class Entries(TypedDict, total=False):
    """What this version does not have, or has otherwise."""

    method: str
    options: dict[str, Any]
    vary: list[str]
    rule: list[str]
    rest: str | None
    layer_scale: str | None
    task_lambda: str | float | None
    disentangle: str | None
    disentangle_options: dict[str, Any]


OLD = ("vary", "rule", "layer_scale", "task_lambda", "disentangle", "disentangle_options")
# Methods whose result is the same when weights are multiplied instead of task vectors.
_SCALED_BY_WEIGHT = frozenset({
    "breadcrumbs", "consensus", "dare", "iso-c", "iso-cts", "kron", "task-arithmetic", "tsv-m", "wudi",
})  # fmt: skip
_APGD_ONLY = {"inner": "row", "trim_scope": "model", "task_rank": "None", "relative_lr": "None", "tolerance": "1e-11"}


@dataclass(frozen=True, slots=True)
class Variation:
    """Another value of an option or weight, for one expert or all, tensors of such names or all, over the layers.

    With `steps` a tensor has one value: words go from one to the next, numbers lie on straight lines within `ends`.
    """

    option: str
    values: tuple[Any, ...]
    expert: str | None = None
    tensors: str | None = None
    steps: bool = False
    ends: tuple[float, float] = (-math.inf, math.inf)

    def matches(self, tensor: str) -> bool:
        """Is it for the tensor of that name?"""
        return self.tensors is None or fnmatch.fnmatchcase(tensor, self.tensors)

    def at(self, depth: float) -> tuple[Any, ...]:
        """What a tensor at that depth is given: all values over the layers, or its own."""
        if not self.steps:
            return self.values
        if isinstance(self.values[0], str):
            return (self.values[int(depth * (len(self.values) - 1))],)
        return (min(max(Curve(self.values).at(depth), self.ends[0]), self.ends[1]),)


def read_variation(text: str) -> Variation:
    """What `[EXPERT:]OPTION=V[,V...][@GLOB]` says."""
    head, _, tensors = text.partition("@")
    target, _, numbers = head.partition("=")
    expert, _, option = target.rpartition(":")
    values = _numbers("vary", numbers)
    return Variation(option.replace("-", "_"), values, expert or None, tensors or None)


def merged_overrides(
    tensors: Sequence[str],
    variations: Sequence[Variation],
    method_of: Callable[[str], str | None] = lambda tensor: None,
    has_option: Callable[[str, str], bool] = lambda tensor, option: True,
) -> list[Override]:
    """Overrides that give each tensor what the last matching variation of each option says, and its method.

    Args:
        tensors: The names of all tensors of the base.
        variations: In their order; of those for the same option and expert, the last that matches counts.
        method_of: The method of a tensor with its options, as an override says them; None for the merge's own.
        has_option: Does the method of a tensor have an option? Variations of others do not concern the tensor.
    """
    depth = depths(tensors)
    settings = {
        tensor: _setting(tensor, depth[tensor], [v for v in variations if has_option(tensor, v.option)],
                         method_of(tensor))
        for tensor in tensors
    }  # fmt: skip
    overrides: list[tuple[Override, list[str]]] = []
    open_tensors = dict.fromkeys(tensors)
    globs = dict.fromkeys(v.tensors for v in reversed(variations) if v.tensors is not None)
    # What globs do not tell apart goes by the first word; then by names but for the numbers of layers; then by these.
    parts = dict.fromkeys(f"{tensor.partition('.')[0]}.*" for tensor in tensors)
    places = dict.fromkeys(f"{place[0]}.{place[1]}.*" for tensor in tensors if (place := layer_of(tensor)))
    for glob in dict.fromkeys([*globs, "*", *parts, *map(layer_type, tensors), *places, *tensors]):
        here = [tensor for tensor in open_tensors if tensor == glob or fnmatch.fnmatchcase(tensor, glob)]
        if here and all(settings[tensor] == settings[here[0]] for tensor in here):
            method, each = settings[here[0]]
            if not any(map(layer_of, here)):  # nothing goes over layers there
                each = tuple((expert, option, values[:1]) for expert, option, values in each)
            overrides.append((_override(glob, (method, each)), here))
            open_tensors = {tensor: None for tensor in open_tensors if tensor not in here}
    needed: list[Override] = []
    for override, here in reversed(overrides):  # what says nothing is for tensors that others behind it would take
        if override != Override(override.tensors) or any(o.matches(tensor) for o in needed for tensor in here):
            needed.insert(0, override)
    return needed


_Setting = tuple[str | None, tuple[tuple[str | None, str, tuple[Any, ...]], ...]]


def _setting(tensor: str, depth: float, variations: Sequence[Variation], method: str | None) -> _Setting:
    values: dict[tuple[str | None, str], tuple[Any, ...]] = {}
    for variation in variations:
        if variation.matches(tensor):
            if variation.expert is None:
                values = {key: each for key, each in values.items() if key[1] != variation.option}
            values[variation.expert, variation.option] = variation.at(depth)
    return method, tuple((expert, option, each) for (expert, option), each in sorted(values.items(), key=str))


def _override(glob: str, setting: _Setting) -> Override:
    method, values = setting
    name, _, options = (method or "").partition(" ")
    words = dict(word.partition("=")[::2] for word in options.split())
    plain = options_of(name, {option.replace("-", "_"): value for option, value in words.items()})
    plain = {option: as_text(value) for option, value in plain.items()}
    plain |= {option: ",".join(map(as_text, each)) for expert, option, each in values if expert is None}
    experts = {(expert, option): curve_text(each) for expert, option, each in values if expert is not None}
    return Override(glob, name or None, plain, experts)


def options_of(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options of format 1: APGD's knobs that are gone had one value in nearly all recipes.

    Raises:
        RecipeError: One had another.
    """
    if method != "apgd":
        return dict(options)
    values = {option: value for option, value in options.items() if value is not None}
    for option, usual in _APGD_ONLY.items():
        if str(values.pop(option, usual)) != usual:
            raise _gone(option)
    mode = values.pop("lambda_mode", "matched")
    if mode == "relative":
        raise _gone("lambda_mode")
    return {**values, **({"published": True} if mode == "paper" else {})}


def transforms_of(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """The transforms of a recipe of format 1; both of AWD's solvers found the same vector."""
    name, values = stored.get("disentangle"), dict(stored.get("disentangle_options", {}))
    if name == "apgd":
        values = options_of("apgd", values)
    if name == "awd":
        values.pop("solver", None)
        values["published"] = "true" if values.pop("units", None) == "absolute" else None
    words = [f"{option.replace('_', '-')}={as_text(value)}" for option, value in values.items() if value is not None]
    return (" ".join([name, *words]),) if name else ()


def overrides_of(stored: Mapping[str, Any], tensors: Mapping[str, bool]) -> tuple[str, ...]:
    """The overrides of a recipe of format 1; `tensors` says by name which are weights of linear layers.

    Raises:
        RecipeError: The recipe asks for what this version cannot say.
    """
    method = stored["method"]
    if stored.get("task_lambda"):
        raise _gone("task_lambda")
    variations = [read_variation(text) for text in stored.get("vary", ())]
    rest = stored.get("rest") or BASE
    if stored.get("layer_scale") and registry.load(method).matrices and rest == "average":
        raise _gone("layer_scale")  # an average does not change with all its weights
    variations += _layer_scale(stored.get("layer_scale"), method, list(tensors))
    rules = []
    for text in stored.get("rule", ()):
        head, _, words = text.partition(" ")
        glob, _, name = head.rpartition("=")
        rules.append((glob, name, words))

    def method_of(tensor: str) -> str | None:
        here = [(name, words) for glob, name, words in rules if fnmatch.fnmatchcase(tensor, glob)]
        for name, words in here:
            if tensors[tensor] or not registry.load(name).matrices:
                return f"{name} {words}".strip()
        return rest if here and registry.load(method).matrices and not tensors[tensor] else None

    def has_option(tensor: str, option: str) -> bool:
        merger = registry.load((method_of(tensor) or method).partition(" ")[0])
        goes_to_rest = merger.matrices and not tensors[tensor]
        return option == WEIGHT or (not goes_to_rest and option in option_types(merger.options))

    return tuple(map(str, merged_overrides(list(tensors), variations, method_of, has_option)))


def _layer_scale(text: str | None, method: str, tensors: Sequence[str]) -> list[Variation]:
    """Factors on all task vectors as weights, where the method's result is the same."""
    if text is None:
        return []
    if text == "larv" or method not in _SCALED_BY_WEIGHT:
        raise _gone("layer_scale")
    entries: Any = {"*": list(_numbers("layer_scale", text))} if not text.lstrip().startswith("{") else None
    try:
        entries = entries or check(parse_json(text.encode()), dict[str, float | list[float]])
    except ValueError as error:
        raise RecipeError(f"the recipe's layer_scale is malformed: {error}") from error
    variations: list[Variation] = []
    for glob, values in reversed(list(entries.items())):  # there the first glob that matched counted
        numbers = tuple(float(value) for value in (values if isinstance(values, list) else [values]))
        outside = [tensor for tensor in tensors if layer_of(tensor) is None and fnmatch.fnmatchcase(tensor, glob)]
        variations.append(Variation(WEIGHT, numbers, None, glob))
        if len(numbers) > 1:  # a list left what lies outside all layers as it was
            variations += [Variation(WEIGHT, (1.0,), None, tensor) for tensor in outside]
    return variations


def _numbers(entry: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(check(float(word), float) for word in text.split(","))
    except ValueError as error:
        raise RecipeError(f"the recipe's {entry} has what are no numbers: {shown(text)}") from error


def _gone(entry: str) -> RecipeError:
    return RecipeError(
        f"the recipe was made by modelmerge 0.1.0 with '{entry}', which this version does not have",
        hint="replay it with modelmerge 0.1.0",
    )
