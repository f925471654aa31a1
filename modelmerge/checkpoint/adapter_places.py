"""Where in a base an adapter's tensors belong, though names may differ by words in front."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from modelmerge.checkpoint.adapter_config import MERGE_FIRST, PREFIX, Adapter
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.matching import is_vocabulary
from modelmerge.checkpoint.names import front_of, moved
from modelmerge.checkpoint.tables import HEADS
from modelmerge.errors import PlanError, named


class Places:
    """Finds where in the base an adapter's tensors belong.

    A rule takes words off the front of a name and puts others on; one set of words must hold the other, so that
    `model.language_model.layers` may be `language_model.model.layers`, and nothing becomes something else.
    """

    def __init__(self, adapter: Adapter, base: Mapping[str, TensorInfo], table: str | None) -> None:
        self._adapter = adapter
        self._base = base
        self.table = table  # the embedding that is the head as well
        self._rules: set[tuple[int, str]] = {(0, "")}  # words taken off, words put on

    def find(self, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> dict[str, str]:
        """The base's tensor for each name, given the shapes it may have.

        Raises:
            PlanError: A name fits nowhere, or in several places.
        """
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in shapes:
            groups.setdefault(front_of(name), []).append(name)
        places: dict[str, str] = {}
        for front, names in groups.items():
            if all(name in self._base for name in names):
                places |= {name: name for name in names}
                continue
            tied = self.table if all(name.split(".")[-2] in HEADS for name in names) else None
            if tied is not None and not any(name in self._base for name in names):
                places |= dict.fromkeys(names, tied)
                continue
            rules = self._candidates(front, names[0])
            fitting = [rule for rule in rules if all(self._fits(moved(name, rule), shapes[name]) for name in names)]
            rule = self._only(names, fitting, rules)
            self._rules.add(rule)
            places |= {name: moved(name, rule) for name in names}
        return places

    def of_whole(self, name: str, info: TensorInfo) -> str | None:
        """The base's tensor that a whole one replaces; its own name where the base has none and the config says why.

        None for a table or a head that the base has under the name of its one table.

        Raises:
            PlanError: It fits in several places, or nowhere and nothing says why it is there.
        """
        if name in self._base:
            return name
        rules = {rule for rule in self._rules if moved(name, rule) in self._base}
        if not rules:
            rules = {
                rule for rule in self._candidates(front_of(name), name) if self._fits(moved(name, rule), (info.shape,))
            }
        if len(rules) > 1:
            raise self._ambiguous(info.name, sorted(moved(name, rule) for rule in rules))
        if rules:
            return moved(name, next(iter(rules)))
        if self.table is not None and is_vocabulary(name) and name.endswith(".weight"):
            return None
        has_reason = is_saved(self._adapter, name)
        has_reason |= name.endswith(".bias") and self._adapter.config.get("bias") == "all"
        if not has_reason:
            raise self._unplaced(info.name)
        return name

    def _fits(self, name: str, shapes: Sequence[tuple[int, ...]]) -> bool:
        return name in self._base and self._base[name].shape in shapes

    def _candidates(self, front: tuple[str, ...], name: str) -> list[tuple[int, str]]:
        words = name.split(".")
        rules = []
        for count in range(min(len(front), len(words) - 2) + 1):
            off, rest = words[:count], ".".join(words[count:])
            for other in self._base:
                if other != rest and not other.endswith(f".{rest}"):
                    continue
                front_of_other = other[: len(other) - len(rest)]
                on = front_of_other.split(".")[:-1]
                more, fewer = Counter(on), Counter(off)
                if (on and off and on[-1] == off[-1]) or not (more <= fewer or fewer <= more):
                    continue
                rules.append((count, front_of_other))
        return rules

    def _only(
        self, names: Sequence[str], fits: Sequence[tuple[int, str]], tried: Sequence[tuple[int, str]]
    ) -> tuple[int, str]:
        """The one rule that fits; of several, the one that speaks of the class the adapter was trained on."""
        if len(fits) > 1:
            trained_on = str((self._adapter.config.get("auto_mapping") or {}).get("base_model_class", "")).lower()
            of_class = [rule for rule in fits if any(w in trained_on for w in _telling(rule[1]))]
            if len(of_class) != 1:
                raise self._ambiguous(names[0], sorted(moved(names[0], rule) for rule in fits))
            return of_class[0]
        if not fits:
            nearest = max(tried, key=lambda rule: sum(moved(n, rule) in self._base for n in names), default=(0, ""))
            absent = [name for name in names if moved(name, nearest) not in self._base]
            if not absent:
                return nearest  # the names fit: the shapes are complained of with the shapes in hand
            raise self._unplaced(PREFIX + absent[0])
        return fits[0]

    def _ambiguous(self, key: str, places: Sequence[str]) -> PlanError:
        return PlanError(
            f"{self._adapter.file.parent}: '{key}' may be any of {', '.join(places)} of the base", hint=MERGE_FIRST
        )

    def _unplaced(self, key: str) -> PlanError:
        ours = next((n for n in self._base if n.rpartition(".")[0].rpartition(".")[2] == key.split(".")[-2]), None)
        ours = ours or next(iter(self._base), "nothing")
        trained_on = f" (it was trained on '{self._adapter.base}')" if self._adapter.base else ""
        return PlanError(
            f"{self._adapter.file.parent}: the base has no tensor for its key '{key}'; its names are like '{ours}'",
            hint=f"is it an adapter of this base{trained_on}? If it is, leave the key out with {named('exclude')} "
            f"'{key}'; or {MERGE_FIRST}",
        )


def is_saved(adapter: Adapter, name: str) -> bool:
    """Whether a whole tensor is there because peft trained its module apart."""
    module = name.rpartition(".")[0]
    return any(f".{word}." in f".{module}." for word in adapter.config.get("modules_to_save") or ())


def _telling(words: str) -> Iterable[str]:
    """The parts of names that may stand in a class's name: vision and model of `vision_model.`, but not model."""
    return (part for part in re.split(r"[._]", words.lower()) if len(part) > 2 and part != "model")
