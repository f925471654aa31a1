"""From an expert's names to the base's, by groups of layers.

Models go by several names: those on the Hub, those they have in memory, those of a model inside another. What follows
from the names alone is done without asking what family the model is of: words in front of a group of layers that come
or go, and the older ends of norms. What families call otherwise within their layers is a table, `families.json`: facts
about the names of checkpoints and of the modules in transformers (5.24), which a test compares with its own mapping.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.experts import in_layout_of
from modelmerge.checkpoint.header import TensorInfo, joined, rows
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError

Tensors = dict[str, TensorInfo]
# Of norms as BERT came from TensorFlow, and of torch's weight norm before it became a parametrisation.
_OLD_ENDS = (
    (".gamma", ".weight"), (".beta", ".bias"),
    (".weight_g", ".parametrizations.weight.original0"), (".weight_v", ".parametrizations.weight.original1"),
)  # fmt: skip
_OLD = tuple(old for old, _ in _OLD_ENDS)  # a name of either side ends so, where anything goes by an old name
_ANY = "model"  # a word that says nothing of what is meant
_SAMPLE = 32  # names of a group that are looked at for ways to move it
_TABLE = Path(__file__).with_name("families.json")


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether any of the globs matches a tensor's name."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def layer_type(name: str) -> str:
    """A tensor's name with the numbers of its layers left open: `model.layers.*.q_proj.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def front_of(name: str) -> tuple[str, ...]:
    """The words of a name before its first number, or before the module's own."""
    words = name.split(".")
    number = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 2)
    return tuple(words[: max(number, 0)])


def moved(name: str, rule: tuple[int, str]) -> str:
    """A name with so many words taken off its front and others put on; nothing where it has no more words."""
    count, front = rule
    words = name.split(".", count)
    return front + words[count] if len(words) > count else ""


def by_base_names(base: Checkpoint, expert: Checkpoint) -> tuple[Tensors, list[str]]:
    """The expert's tensors by the base's names and in the base's layout, and remarks on what was matched how.

    What has no match keeps its own name.

    Raises:
        PlanError: The names of some layers could be the base's in several ways.
    """
    theirs, remarks = in_layout_of(base.tensors, expert.tensors)
    matched = {name: info for name, info in theirs.items() if name in base.tensors}
    open_ours = {name: info for name, info in base.tensors.items() if name not in matched}
    open_theirs = {name: info for name, info in theirs.items() if name not in matched}
    if not open_ours or not open_theirs:
        return theirs, remarks
    family = family_of(base.config, expert.config)
    if not base.config and not expert.config:
        family = _likely(open_ours, open_theirs)
    ours, theirs_open = _by(family.name, open_ours), _by(family.name, open_theirs)
    rest, count = family.in_parts_of(ours, theirs_open)
    total = len(theirs)
    if count:
        remarks.append(f"{count} of its layers are joined or cut as the base's are")
    places = {name: name for name in rest if name in ours}
    if places:
        remarks.append(f"{len(places)} of its {total} tensors have other names in files than in memory, or the reverse")
    old = _by_old_ends(ours, rest)
    if old:
        remarks.append(
            f"{len(old)} of its {total} tensors have older or newer names than the base's: gamma and beta are weight "
            "and bias, weight_g and weight_v are original0 and original1"
        )
    groups = _Groups(expert.name, ours.keys() - places.keys() - set(old.values()), ours, rest)
    others = groups.find([name for name in rest if name not in places and name not in old])
    groups.refuse_others({family.name(name): info for name, info in matched.items()})
    names = dict(zip(ours, open_ours, strict=True))
    remarks += [
        f"its names are the base's {how}: {count} of its {total} tensors are matched so"
        for how, count in _changes({rest[name].name: names[place] for name, place in others.items()}).items()
    ]
    placed = {**places, **old, **others}
    for name, info in rest.items():
        place = placed.get(name)
        own = info.name if place is None else names[place]
        matched[own] = replace(info, name=own)
    return matched, remarks


def _changes(places: Mapping[str, str]) -> Counter[str]:
    """What stands in front of names where that differs, in words, with the number of such names."""
    count: Counter[str] = Counter()
    for name, place in places.items():
        words, others = name.split("."), place.split(".")
        while words and others and words[-1] == others[-1]:
            words.pop()
            others.pop()
        front, other = ".".join(words), ".".join(others)
        if front and other:
            count[f"with '{other}.' in place of '{front}.'"] += 1
        else:
            count[f"with '{other}.' in front" if other else f"without '{front}.' in front"] += 1
    return count


# --- groups of layers ---


def _fronts(names: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """Names by what stands in front."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        groups[front_of(name)].append(name)
    return groups


class _Groups:
    """Finds where in the base the layers of a group belong: other words stand in front of all of them.

    One set of words must hold the other, or they have one in common, but for `model`: `model.language_model.layers` may
    be `language_model.model.layers`, and nothing becomes something else.
    """

    def __init__(self, expert: str, free: set[str], ours: Tensors, theirs: Tensors) -> None:
        self._free = free
        self._rules: set[tuple[int, str]] = set()  # words taken off, words put on
        self._expert, self._ours, self._theirs = expert, ours, theirs
        self._ends: dict[str, list[str]] = defaultdict(list)  # by every end of a name between dots, the names
        for name in sorted(free):
            place = 0
            while place >= 0:
                self._ends[name[place:]].append(name)
                place = name.find(".", place) + 1 or -1

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """The base's name of each of these, where there is one.

        Raises:
            PlanError: A group could lie in several places.
        """
        places: dict[str, str] = {}

        def take(pairs: Mapping[str, str]) -> None:
            self._free -= set(pairs.values())
            places.update(pairs)

        def move(group: Sequence[str], rule: tuple[int, str]) -> None:
            self._rules.add(rule)
            take({name: place for name in group if self._fits(name, place := moved(name, rule))})

        unsure = []
        for front, group in _fronts(names).items():
            rules = self._ways(front, group)
            if len(rules) == 1:
                move(group, rules[0])
            elif rules:
                unsure.append((front, group))
        for front, group in unsure:  # where others have gone before
            rules = self._ways(front, group)
            usual = [rule for rule in rules if rule in self._rules] or rules
            if len(usual) > 1:
                raise self._ambiguous(group[0], [moved(group[0], rule) for rule in usual])
            for rule in usual:
                move(group, rule)
        for name in (name for name in names if name not in places):  # alone, what is so short could be anything
            others = {place for rule in self._rules if self._fits(name, place := moved(name, rule))}
            if len(others) == 1:
                take({name: others.pop()})
        return places

    def refuse_others(self, matched: Tensors) -> None:
        """Refuse names that are the base's as they stand, and under the rule of all others another of the base's.

        Raises:
            PlanError: There is such a name.
        """
        for name, info in matched.items():
            for place in {moved(name, rule) for rule in self._rules}:
                if place in self._free and self._ours[place].shape == info.shape:
                    raise self._ambiguous(name, [name, place])

    def _ambiguous(self, name: str, places: list[str]) -> PlanError:
        return PlanError(
            f"'{self._expert}': its '{name}' could be the base's {' or '.join(map(repr, places))}; "
            "which is meant cannot be told",
            hint="save it under the base's names",
        )

    def _fits(self, name: str, place: str) -> bool:
        """Whether the base's tensor may be the expert's, by its shape."""
        return place in self._free and self._ours[place].shape == self._theirs[name].shape

    def _ways(self, front: tuple[str, ...], names: list[str]) -> list[tuple[int, str]]:
        """How the names of a group become the base's: the way that takes in most, and all that take in others."""
        some = names[:: -(-len(names) // _SAMPLE)]  # of many layers, a few have all the ways there are
        rules = {rule for name in some for rule in self._candidates(front, name)}
        fitting: dict[frozenset[tuple[str, str]], tuple[int, str]] = {}
        for rule in sorted(rules):
            pairs = ((name, moved(name, rule)) for name in names)
            places = frozenset((n, p) for n, p in pairs if self._fits(n, p))
            if places:
                fitting[places] = rule
        if not fitting:
            return []
        best = max(fitting, key=len)
        fit = {name for name, _ in best}
        rivals = [places for places in fitting if places != best and not {name for name, _ in places} < fit]
        return [fitting[best], *(fitting[places] for places in rivals)]

    def _candidates(self, front: tuple[str, ...], name: str) -> Iterator[tuple[int, str]]:
        words = name.split(".")
        for count in range(max(min(len(front), len(words) - 2), 0) + 1):
            off, rest = words[:count], ".".join(words[count:])
            for place in self._ends.get(rest, ()):
                ahead = place[: len(place) - len(rest)]
                on = ahead.split(".")[:-1]
                more, fewer = (Counter(word for word in side if word != _ANY) for side in (on, off))
                if on and off and on[-1] == off[-1]:
                    continue
                if more <= fewer or fewer <= more or more & fewer:
                    yield count, ahead


def _by_old_ends(ours: Tensors, theirs: Tensors) -> dict[str, str]:
    """The base's name of tensors whose last words have changed over the years."""
    places: dict[str, str] = {}
    if not any(name.endswith(_OLD) for side in (ours, theirs) for name in side):
        return places
    for name in theirs:
        for left, right in (*_OLD_ENDS, *(ends[::-1] for ends in _OLD_ENDS)):
            other = name.removesuffix(left) + right
            if name.endswith(left) and other in ours and name not in ours and other not in theirs:
                places[name] = other
    return places


# --- families ---


class Family:
    """What a family of models calls otherwise in files than in memory; both become the names in memory.

    Args:
        names: What stands in names in files, and in its place in memory, in order; `^` is the start of a name, `#` a
            number.
        joins: By the end of the name of one tensor, those of the several that it is in rows, one below the other.
    """

    def __init__(self, names: Iterable[tuple[str, str]], joins: Mapping[str, list[str]]) -> None:
        self._rules = [(old.strip("^#").partition("#")[0], _pattern(old, new), _put(new)) for old, new in names]
        self._joins = dict(joins)
        self._cache: dict[str, str] = {}

    def speaks(self, text: str) -> bool:
        """Whether any of its words are in a text of names."""
        return any(hint in text for hint, _, _ in self._rules)

    def name(self, name: str) -> str:
        """The name in memory of a name in a file, or in memory already."""
        if name not in self._cache:
            new = name
            for hint, pattern, put in self._rules:
                if hint in new:
                    new = pattern.sub(put, new)
            self._cache[name] = new
        return self._cache[name]

    def in_parts_of(self, ours: Tensors, theirs: Tensors) -> tuple[Tensors, int]:
        """The expert's tensors, joined or cut where the base has them so, and how often."""
        tensors = dict(theirs)
        count = 0
        for whole, parts in self._joins.items():
            for name in theirs:
                end = next((end for end in (whole, *parts) if _is_end(name, end)), None)
                if end is None or name not in tensors or name in ours:
                    continue
                front, _, behind = name.rpartition(end)
                names = [f"{front}{part}{behind}" for part in parts]
                joint = f"{front}{whole}{behind}"
                if end == whole and all(part in ours for part in names):
                    tensors |= _cut(tensors.pop(name), [(part, ours[part].shape) for part in names])
                    count += 1
                elif joint in ours and all(part in theirs for part in names):
                    each = [tensors.pop(part) for part in names]
                    shape = (sum(part.shape[0] for part in each), *each[0].shape[1:])
                    tensors[joint] = joined(joint, shape, each)
                    count += 1
        return tensors, count


def _is_end(name: str, end: str) -> bool:
    return name.endswith((end, f"{end}.weight", f"{end}.bias"))


def _cut(info: TensorInfo, parts: list[tuple[str, tuple[int, ...]]]) -> Tensors:
    tensors, first = {}, 0
    for name, shape in parts:
        tensors[name] = replace(rows(info, first, first + shape[0]), name=name)
        first += shape[0]
    return tensors


def _pattern(old: str, new: str) -> re.Pattern[str]:
    text = r"(\d+)".join(map(re.escape, old.removeprefix("^").split("#")))
    if old.startswith("^"):
        return re.compile(f"^{text}")
    # Where the new words hold the old ones, a name that has the new ones stays.
    before, _, behind = new.partition(old) if old in new else ("", "", "")
    ahead, back = f"(?<!{re.escape(before)})" if before else "", f"(?!{re.escape(behind)})" if behind else ""
    return re.compile(f"{ahead}{text}{back}")


def _put(new: str) -> str:
    count = iter(range(1, 10))
    return re.sub("#", lambda match: rf"\g<{next(count)}>", new)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return {family: row for row in json.loads(_TABLE.read_bytes()) for family in row["families"]}


def family_of(*configs: Mapping[str, Any]) -> Family:
    """The family of models with these configs: their own, and those of the models inside them."""
    outer = [str(config.get("model_type")) for config in configs]
    inner = [kind for config in configs for kind in _types(config)]
    return _family(tuple(dict.fromkeys(outer)), tuple(dict.fromkeys([*outer, *inner])))


@functools.cache
def _family(outer: tuple[str, ...], types: tuple[str, ...]) -> Family:
    names: dict[str, str] = {}
    joins: dict[str, list[str]] = {}
    for kind in types:
        row = _table().get(kind, {})
        # Where a name starts is another matter for the model inside.
        names |= {o: n for o, n in row.get("names", {}).items() if not o.startswith("^") or kind in outer}
        joins |= row.get("joins", {})
    return Family(names.items(), joins)


def _likely(ours: Tensors, theirs: Tensors) -> Family:
    """The family that most names are of, where no config says it: other families' words are in none of them."""
    text = " ".join((*ours, *theirs))
    best, most = Family((), {}), 0
    for row in {id(row): row for row in _table().values()}.values():
        family = Family(row.get("names", {}).items(), row.get("joins", {}))
        if family.speaks(text):
            mine = {(family.name(name), info.shape) for name, info in ours.items()}
            count = sum((family.name(name), info.shape) in mine for name, info in theirs.items())
            if count > most:
                best, most = family, count
    return best


def _types(config: Any) -> Iterator[str]:
    """The model types that a config names, at any depth."""
    if isinstance(config, dict):
        if isinstance(config.get("model_type"), str):
            yield config["model_type"]
        for value in config.values():
            yield from _types(value)


def _by(name_of: Callable[[str], str], tensors: Tensors) -> Tensors:
    """Tensors by other names; their own where two would get the same."""
    names = {name: name_of(name) for name in tensors}
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    return {name if names[name] in twice else names[name]: info for name, info in tensors.items()}
