"""The parameters of a mergekit configuration as options: what one is for which tensors and models, by its rules.

The nearest place in the file that has a value for a tensor decides. A value may be a list over the layers (numbers lie
on straight lines between them, anything else steps from one to the next) or a list of conditions, of which the first
that matches a tensor counts.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelmerge.checkpoint.documents import check, shown
from modelmerge.checkpoint.experts import in_memory
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import check_option
from modelmerge.plan.format_1 import Variation
from modelmerge.plan.mergekit_methods import FLATTEN, KNOWN, NOTHING, REQUIRED, ROW_WISE, Parameter, Row
from modelmerge.plan.overrides import WEIGHT

Scopes = Sequence[tuple[str, Mapping[str, Any]]]  # paths in the file and the parameters there, from near to far
Complain = Callable[[str, str], None]  # hears of a path in the file, and why what is there cannot be honoured
_TRUE, _FALSE = {"1", "on", "t", "true", "y", "yes"}, {"0", "off", "f", "false", "n", "no"}


def read_options(
    row: Row, shared: Scopes, experts: Mapping[str, Scopes], complain: Complain
) -> tuple[dict[str, Any], dict[str, float], list[Variation]]:
    """The options and weights for all tensors, and what differs for some.

    Args:
        row: The method.
        shared: The parameters for all models.
        experts: By the expert's name, those for it.
        complain: Hears what cannot be honoured.
    """
    options: dict[str, Any] = {}
    weights: dict[str, float] = {}
    variations: list[Variation] = []
    for parameter in _of_scope(row, shared, complain) if FLATTEN in row.parameters else row.parameters:
        takers = [*experts.items()] if parameter.per_model else [(None, shared)]
        for expert, scopes in takers:
            plain, some = _settle(row, parameter, scopes, expert, complain)
            variations += some
            if parameter.option is None or plain is None:
                continue
            if expert is None:
                options[parameter.option] = plain
            elif parameter.option == WEIGHT:
                weights[expert] = plain
            elif plain == NOTHING or options.setdefault(parameter.option, plain) != plain:
                variations.insert(0, Variation(parameter.option, (plain,), expert))
    return options, weights, variations


def _of_scope(row: Row, shared: Scopes, complain: Complain) -> list[Parameter]:
    """The parameters, with one for nuslerp's two that say together what has an angle of its own."""
    others = [parameter for parameter in row.parameters if parameter not in (FLATTEN, ROW_WISE)]
    whole, wholes = _settle(row, FLATTEN, shared, None, complain)
    lines, some = _settle(row, ROW_WISE, shared, None, complain)
    if not wholes:
        return [*others, FLATTEN if whole == "tensor" else ROW_WISE]
    if some:
        complain(f"parameters.{ROW_WISE.key}", f"must be one value for all tensors where {FLATTEN.key} is not")
    return [*others, dataclasses.replace(FLATTEN, words={True: "tensor", False: lines})]


@dataclass(frozen=True, slots=True)
class Filtered(Variation):
    """A variation whose glob is for the names that mergekit sees: those of experts in memory."""

    def matches(self, tensor: str) -> bool:
        """Is it for the tensor of that name in files?"""
        return Variation.matches(self, in_memory(tensor))


def strays(row: Row, shared: Scopes, nearest: Scopes) -> list[str]:
    """Remarks on parameters that the method does not have, and on those of a model that are one for all models."""
    has = {parameter.key: parameter.per_model for parameter in row.parameters}
    others = [f"{path}.{key} has no effect on this method in mergekit, nor here."
              for path, scope in [*shared, *nearest] for key in scope if key in KNOWN and key not in has]  # fmt: skip
    return others + [f"{path}.{key} has no effect in mergekit, nor here: all models have it from one place."
                     for path, scope in nearest for key in scope if has.get(key) is False]  # fmt: skip


def _settle(
    row: Row, parameter: Parameter, scopes: Scopes, expert: str | None, complain: Complain
) -> tuple[Any, list[Variation]]:
    """The value for all tensors, None if there is none or it was complained of, and those for some.

    Here the last variation that applies decides, so they come from far to near and from the last filter to the first.
    """
    plain = parameter.default if parameter.words is None else parameter.words[parameter.default]
    variations: list[Variation] = []
    for place, parameters in reversed(scopes):
        path, setting = f"{place}.{parameter.key}", parameters.get(parameter.key, REQUIRED)
        for only, value in [] if setting is REQUIRED else reversed(_conditions(setting, path, complain)):
            try:
                values = _values(row, parameter, value)
            except ValueError as error:
                complain(path, str(error))
                plain = None
                continue
            steps = _steps(row, parameter, values)
            if only is None and len(values) == 1:
                plain, variations = values[0], []
            elif parameter.option is not None:
                glob_ = only and f"*{glob.escape(only)}*"
                here: Variation = Filtered(parameter.option, values, expert, glob_, steps, parameter.ends)
                plain, variations = (None, [here]) if only is None else (plain, [*variations, here])
    if plain is REQUIRED:
        for_some = " for tensors that no filter matches" if variations else ""
        complain(f"{scopes[0][0]}.{parameter.key}", f"is missing{for_some}: mergekit insists on it")
        plain = None
    return plain, variations


def _values(row: Row, parameter: Parameter, value: Any) -> tuple[Any, ...]:
    """The value, or the several of a list over the layers.

    Raises:
        ValueError: There is none, or one that cannot be honoured.
    """
    values = tuple(_value(row, parameter, each) for each in (value if isinstance(value, list) else [value]))
    if not values:
        raise ValueError(f"must be {_NOUNS[_kind(parameter)]}, not an empty list")
    return tuple(parameter.bounded(each) for each in values) if len(values) == 1 else values


def _steps(row: Row, parameter: Parameter, values: Sequence[Any]) -> bool:
    """Whether a list over the layers has to be one value for each of them: it does not lie on straight lines here."""
    if parameter.option in (None, WEIGHT):
        return False
    varies = {spec.name: spec.metadata["varies"] for spec in dataclasses.fields(registry.load(row.method).options)}
    return varies[str(parameter.option)] is None or any(value != parameter.bounded(value) for value in values)


def _conditions(setting: Any, path: str, complain: Complain) -> list[tuple[str | None, Any]]:
    """(filter, value) of each part of a setting, in order; those after one without a filter never count."""
    listed = setting if isinstance(setting, list) and setting and isinstance(setting[0], dict) else [setting]
    conditions: list[tuple[str | None, Any]] = []
    for part in [] if setting == [] else listed:  # an empty list says nothing
        only = None
        if isinstance(part, dict):
            if "value" not in part or not set(part) <= {"value", "filter"}:
                complain(path, "a condition has a 'value' and a 'filter' and nothing else")
                continue
            only, part = part.get("filter"), part["value"]
        conditions.append((None if only in (None, "", "*") else str(only), part))
        if conditions[-1][0] is None:
            break
    return conditions


_NOUNS: Mapping[type, str] = {bool: "true or false", int: "an integer", float: "a number or a list of numbers"}


def _kind(parameter: Parameter) -> type:
    return float if parameter.default is REQUIRED else type(parameter.default)


def _value(row: Row, parameter: Parameter, value: Any) -> Any:
    """One value as mergekit takes it, words and booleans for numbers and the other way round; our word for it.

    Raises:
        ValueError: It takes no such value, or there is nothing like it here.
    """
    number = read_as(_kind(parameter), value)
    if parameter.words is not None:
        return parameter.words[number]
    if parameter.option not in (None, WEIGHT):
        try:
            check_option(registry.load(row.method), str(parameter.option), parameter.bounded(number))
        except UsageError as error:
            raise ValueError(error.message) from error
    return number


def read_as(kind: type, value: Any) -> Any:
    """What mergekit takes for a truth, an integer or a number, as that.

    Raises:
        ValueError: It takes it for none.
    """
    try:
        return {bool: _boolean, int: _integer, float: _number}[kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be {_NOUNS[kind]}, not {shown(value)}") from None


def _boolean(value: Any) -> bool:
    text = str(value).lower() if isinstance(value, (bool, str)) else f"{value:g}"
    if text not in _TRUE | _FALSE:
        raise ValueError
    return text in _TRUE


def _number(value: Any) -> float:
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError
    return check(float(value), float)  # no infinity and no nan: no weight of a model is


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)
