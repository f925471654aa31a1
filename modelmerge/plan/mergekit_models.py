"""Which layers of which models a mergekit configuration names: `models`, `slices`, or `modules`.

Models stand side by side over all their layers, which is one slice; or slices stack layers. A slice has parameters of
its own, and a list of values goes over its layers alone. What comes before the layers has the first slice's parameters
and what comes after them the last one's, both at the start of a list.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from modelmerge.checkpoint.documents import shown
from modelmerge.checkpoint.reference import STAGE
from modelmerge.errors import suggestion
from modelmerge.plan.format_1 import Variation
from modelmerge.plan.mergekit_methods import KNOWN, NOTHING
from modelmerge.plan.mergekit_parameters import Complain, Filtered, Scopes, read_as
from modelmerge.plan.modules import holds, is_after, list_of_layers
from modelmerge.plan.overrides import BASE, WEIGHT, Curve, layer_of

_ALIKE = 0.75  # how like a key another is that was probably meant: a note on it would be overlooked


@dataclass(frozen=True, slots=True)
class Source:
    """A model in a slice: the reference, its settings from near to far, and its layers, None for all."""

    reference: str
    scopes: Scopes
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Models side by side: where that stands, the settings for all of them from near to far, their base, and a module.

    The module is the one that this is for, or empty for the whole model.
    """

    path: str
    shared: Scopes
    sources: tuple[Source, ...]
    base: str | None = None
    module: str = ""

    @property
    def count(self) -> int:
        """The number of its layers; 0 where models stand side by side."""
        return next((source.span[1] - source.span[0] for source in self.sources if source.span is not None), 0)

    def is_of(self, model: str | None) -> bool:
        """Whether it is a module of that model alone, as it is: without a passthrough's `scale`."""
        alone = bool(self.module) and all((s.reference, s.span) == (model, None) for s in self.sources)
        return alone and not any("scale" in parameters for s in self.sources for _, parameters in s.scopes)


class Reader:
    """Reads which models there are.

    Args:
        complain: Hears what cannot be honoured.
        reference: `(entry, path) -> reference`, by which a model is read.
    """

    def __init__(self, complain: Complain, reference: Callable[[Any, str], str]) -> None:
        self._complain, self._reference = complain, reference
        self.remarks: list[str] = []

    def read(self, config: Mapping[str, Any]) -> list[Slice]:
        """The slices of a configuration; one without layers where models stand side by side."""
        return self._read(config, "", (), ("models", "slices", "modules"))

    def _read(
        self, config: Mapping[str, Any], front: str, outer: Scopes, kinds: Sequence[str], module: str = ""
    ) -> list[Slice]:
        path = f"{front}parameters"
        shared = [(path, self._parameters(config.get("parameters"), path)), *outer]
        here = [key for key in kinds if config.get(key)]
        path = front + (" and ".join(here) or kinds[0])
        if len(here) != 1:
            self._complain(path, f"mergekit takes exactly one of {', '.join(kinds)}")
            return []
        entries: Any = config[here[0]]
        kind: Any = dict if here == ["modules"] else list
        if not isinstance(entries, kind):
            self._complain(path, "is no mapping" if here == ["modules"] else "is no list")
            return []
        if here == ["models"]:
            return [Slice(path, shared, self._sources(entries, path, shared, ranged=False), module=module)]
        if here == ["slices"]:
            return [self._slice(entry, f"{path}[{i}]", shared, module) for i, entry in enumerate(entries)]
        slices: list[Slice] = []
        for name, entry in entries.items():
            inside = self._known(entry, {*kinds[:2], "parameters"}, f"modules.{name}")
            slices += self._read(inside, f"modules.{name}.", shared, kinds[:2], str(name))
        return slices

    def _slice(self, entry: Any, path: str, shared: Scopes, module: str) -> Slice:
        entry = self._known(entry, {"sources", "parameters", "base_model", "residual_weight"}, path)
        if entry.get("residual_weight") is not None:
            self.remarks.append(f"{path}.residual_weight has no effect in mergekit, nor here.")
        here: Scopes = [(f"{path}.parameters", self._parameters(entry.get("parameters"), f"{path}.parameters"))]
        base = self._reference(entry["base_model"], f"{path}.base_model") if entry.get("base_model") else None
        sources = entry.get("sources")
        if not isinstance(sources, list) or not sources:
            self._complain(f"{path}.sources", "is no list of models")
            sources = []
        read = self._sources(sources, f"{path}.sources", [*here, *shared], ranged=True)
        spans = {source.span[1] - source.span[0] for source in read if source.span is not None}
        if len(spans) > 1:
            self._complain(f"{path}.sources", "all need as many layers as the others")
        return Slice(path, [*here, *shared], read, base, module)

    def _sources(self, entries: Sequence[Any], path: str, shared: Scopes, *, ranged: bool) -> tuple[Source, ...]:
        sources: list[Source] = []
        keys = {"model", "parameters"} | ({"layer_range"} if ranged else set())
        for i, entry in enumerate(entries):
            here = f"{path}[{i}]"
            if not isinstance(entry, dict) or "model" not in entry:
                self._complain(here, "has no 'model'")
                continue
            self._known(entry, keys, here)
            reference = self._reference(entry["model"], f"{here}.model")
            mine = self._parameters(entry.get("parameters"), f"{here}.parameters")
            if reference and reference in (source.reference for source in sources):
                self._complain(f"{here}.model", f"'{reference}' is listed twice, and mergekit takes a model once")
            span = self._span(entry.get("layer_range"), f"{here}.layer_range") if ranged else None
            sources.append(Source(reference, ((f"{here}.parameters", mine), *shared), span))
        return tuple(sources)

    def _span(self, entry: Any, path: str) -> tuple[int, int]:
        try:
            first, last = (read_as(int, number) for number in (entry if isinstance(entry, list) else ()))
        except ValueError:
            first, last = 1, 0
        if not 0 <= first <= last:
            self._complain(path, f"must be [FIRST, LAST], the LAST not being part of it, not {shown(entry)}")
            return 0, 1
        return first, last

    def _known(self, entry: Any, keys: set[str], path: str) -> Mapping[str, Any]:
        if not isinstance(entry, dict):
            self._complain(path, "is no mapping")
            return {}
        check_keys(entry, keys, f"{path}.", self._complain, self.remarks.append)
        return entry

    def _parameters(self, entry: Any, path: str) -> Mapping[str, Any]:
        if entry is not None and not isinstance(entry, dict):
            self._complain(path, "is no mapping")
            return {}
        check_keys(entry or {}, KNOWN, f"{path}.", self._complain, self.remarks.append)
        return entry or {}


def check_keys(
    entry: Iterable[Any], known: Collection[str], place: str, complain: Complain, remark: Callable[[str], None]
) -> None:
    """Complain of keys that look misspelt, and remark on others that mergekit does not know: it ignores both.

    Args:
        entry: The keys.
        known: Those that mergekit has.
        place: What stands before a key in an error.
        complain: Hears what was probably meant.
        remark: Hears what has no effect.
    """
    for key in entry:
        if key in known:
            continue
        meant = get_close_matches(str(key), known, n=1, cutoff=_ALIKE)
        if meant:
            complain(f"{place}{key}", f"mergekit has no such key; did you mean '{meant[0]}'?")
        else:
            remark(f"{place}{key} is no key of mergekit; it has no effect there, nor here.")


def near(word: str, words: Iterable[str]) -> str:
    """What was probably meant, as the end of a complaint."""
    hint = suggestion(word, sorted(words))
    return f"; {hint}" if hint else ""


def names_of(references: Iterable[str], *, sliced: bool) -> dict[str, str]:
    """A name for each model: the last part of its path or repository, in the letters that a name may have.

    Where they are `sliced` none is called base, which is the base's name there.
    """
    names: dict[str, str] = {}
    seen = Counter([BASE] * sliced)
    for reference in dict.fromkeys(references):
        name = _name(reference)
        seen[name] += 1
        names[reference] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    return names


def _name(reference: str) -> str:
    pieces = [piece.removeprefix("hf://").removeprefix(STAGE).partition("@")[0] for piece in reference.split("+")]
    last = "-".join(piece.rstrip("/").rpartition("/")[2].removesuffix(".safetensors") for piece in pieces)
    return re.sub(r"[^\w.\-]", "-", last).lstrip("_.-") or "model"


def with_ends(slices: Sequence[Slice], needed: str | None) -> list[Slice]:
    """The slices, with one of no layers behind the last of a module where that has more models than the first.

    mergekit makes what comes after the layers from as many models as the first slice has, unless that leaves out the
    model that is needed.
    """
    found: list[Slice] = []
    for module in dict.fromkeys(each.module for each in slices):
        own = [each for each in slices if each.module == module]
        few = tuple(replace(s, span=s.span and (s.span[1], s.span[1])) for s in own[-1].sources[: len(own[0].sources)])
        shorter = bool(own[0].sources) and len(few) < len(own[-1].sources) and few[0].span is not None
        ends = [replace(own[-1], sources=few)] if shorter and needed in (None, *(s.reference for s in few)) else []
        found += [*own, *ends]
    return found


def keeps_nothing(variation: Variation) -> bool:
    """Whether it is a density of 0."""
    return variation.option == "density" and min(variation.values) <= NOTHING


def runs_of(slices: Sequence[Slice], names: Mapping[str, str], base: str | None) -> tuple[str, ...]:
    """The slices as `--layers` says them; `base` is that of the whole."""
    runs = []
    for each in slices:
        words = [f"{each.module}:"] if each.module else []
        for source in each.sources:
            is_base = source.reference == each.base
            name = BASE if is_base and each.base == base else f"{BASE}=" * is_base + names[source.reference]
            words.append(f"{name}:{source.span[0]}-{source.span[1]}" if source.span else name)
        runs.append(shlex.join(words))
    return tuple(runs)


# --- parameters of several slices ---

Read = tuple[dict[str, Any], dict[str, float], Sequence[Variation]]  # of a slice: options, weights, what differs


@dataclass(frozen=True, slots=True)
class InSlice:
    """A value, or several over its layers, that an option or weight has in one slice.

    Args:
        variation: The value; its filter goes by the names that tensors have in the expert, if it is one's.
        module: The module that it is for, or empty for the whole model.
        total: The number of that module's layers in the output.
        first: The slice's first layer in the output.
        count: The number of its layers.
        shift: How far the expert's layers lie behind the output's.
        ends: Whether the slice is the output's first, and its last.
    """

    variation: Variation
    module: str
    total: int
    first: int
    count: int
    shift: int
    ends: tuple[bool, bool]

    @property
    def option(self) -> str:
        """The option."""
        return self.variation.option

    @property
    def expert(self) -> str | None:
        """The expert that it is for, if it is one's."""
        return self.variation.expert

    def depth(self, tensor: str, prefix: str) -> float | None:
        """How deep in the slice a tensor lies; None for one of another."""
        front, number = layer_of(tensor) or (None, 0)
        if front != prefix:
            return 0.0 if self.ends[is_after(tensor, prefix)] else None
        place = number - self.first
        if not 0 <= place < self.count:
            return None
        return place / (self.count - 1) if self.count > 1 else 1.0

    def spread(self, tensors: Mapping[str, float], prefix: str) -> list[Variation]:
        """The same, tensor by tensor; `tensors` are those of the slice, by their depth."""
        values: dict[tuple[tuple[str, int] | None, Any], list[str]] = defaultdict(list)
        for tensor, depth in tensors.items():
            place = layer_of(tensor)
            theirs = tensor
            if place is not None and place[0] == prefix:
                theirs = tensor.replace(f"{prefix}.{place[1]}.", f"{prefix}.{place[1] + self.shift}.", 1)
            if self.variation.matches(theirs):
                (value,) = at if len(at := self.variation.at(depth)) == 1 else (Curve(at).at(depth),)
                values[place, value].append(tensor)
        only = self.variation.tensors
        return [
            _Named(self.option, (value,), self.expert, _glob(place, only), names=frozenset(names))
            for (place, value), names in values.items()
        ]


@dataclass(frozen=True, slots=True)
class _Named(Filtered):
    """One for tensors that it names; its glob is a short way to say that, where it fits.

    One for a module names those that its glob matches there, once they are known.
    """

    names: frozenset[str] = frozenset()
    module: str = ""

    def matches(self, tensor: str) -> bool:
        return tensor in self.names


def _glob(place: tuple[str, int] | None, only: str | None) -> str | None:
    if place is None or only is None:
        return only
    return f"{place[0]}.{place[1]}.{only}"


def together(
    slices: Sequence[Slice], read: Sequence[Read], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, float], list[InSlice | Variation]]:
    """The options and weights of several slices, and what differs in some.

    A slice that is one model's layers as they are needs none.
    """
    options: dict[str, Any] = {}
    weights: dict[str, float] = {}
    vary: list[InSlice | Variation] = []
    plain = [{(None, o): v for o, v in each[0].items()} | {(e, WEIGHT): w for e, w in each[1].items()} for each in read]
    for key in dict.fromkeys(key for each in plain for key in each):
        value = next(each[key] for each in plain if key in each)
        if key[0] is None:
            options[key[1]] = value
        else:
            weights[str(key[0])] = value
    totals: Counter[str] = Counter()
    for each in slices:
        totals[each.module] += each.count
    modules = [each.module for each in slices]
    first: Counter[str] = Counter()
    for i, (each, settings, (_, _, variations)) in enumerate(zip(slices, plain, read, strict=True)):
        spans = {names.get(source.reference, BASE): source.span for source in each.sources if source.span is not None}
        module, start = each.module, first[each.module]
        first[module] += each.count
        ends = (module not in modules[:i], module not in modules[i + 1 :])
        differ = [Variation(option, (value,), expert) for (expert, option), value in settings.items()
                  if value != (options[option] if expert is None else weights[expert])]  # fmt: skip
        if any(map(keeps_nothing, variations)):  # the mean there is of the models of the slice
            here = {names.get(source.reference) for source in each.sources}
            differ += [Variation(WEIGHT, (0.0,), name) for name in names.values() if name not in here]
        for v in [*differ, *variations]:
            if not spans:
                vary.append(_Named(v.option, v.values, v.expert, v.tensors, v.steps, v.ends, module=module))
                continue
            # Where there is one source, all that is said is said of it.
            source = v.expert if len(spans) > 1 else next(iter(spans))
            shift = spans[source][0] - start if source in spans else 0
            vary.append(InSlice(v, module, totals[module], start, each.count, shift, ends))
    return options, weights, vary


def spread(variations: Iterable[Variation | InSlice], tensors: Sequence[str]) -> list[Variation]:
    """The variations for tensors of these names, each as ones of named tensors."""
    plain: list[Variation] = []
    modules: dict[str, list[str]] = {"": list(tensors)}
    inside: dict[Hashable, tuple[dict[str, float], str]] = {}
    for each in variations:
        if not isinstance(each, InSlice | _Named):
            plain.append(each)
            continue
        if each.module not in modules:
            modules[each.module] = list(filter(holds(each.module, tensors), tensors))
        if isinstance(each, _Named):
            named = [tensor for tensor in modules[each.module] if Filtered.matches(each, tensor)]
            plain.append(replace(each, names=frozenset(named)))
            continue
        slice_ = each.module, each.first, each.ends  # some have no layers
        if slice_ not in inside:
            prefix = list_of_layers(modules[each.module], {}, "the output", each.total)
            deep = {tensor: each.depth(tensor, prefix) for tensor in modules[each.module]}
            inside[slice_] = {tensor: depth for tensor, depth in deep.items() if depth is not None}, prefix
        plain += each.spread(*inside[slice_])
    # What mergekit takes for layers of this module it makes twice, and the last time stays.
    mlp = [tensor for tensor in tensors if tensor.startswith("visual.merger.mlp.")]
    if not mlp:
        return plain
    ends = [_Named(v.option, v.at(1.0)[-1:], v.expert, names=frozenset(filter(v.matches, mlp))) for v in plain]
    return [each for pair in zip(plain, ends, strict=True) for each in pair]
