"""The options of methods: declare one, check a value, read a value from text."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from typing import Any, Literal

from modelmerge.errors import UsageError
from modelmerge.methods.contract import Method, TransformSpec

MOST = 10_000  # values of an option in a range, and candidates of a search; more are a slip of the keyboard


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    varies: Literal["tensor", "expert"] | None = None,
    linear: bool = False,
) -> Any:
    """A field of a method's options: its default, its help, and its bounds (`above` excludes the bound itself).

    A number that `varies` by tensor can be another one in each tensor (`--vary`), for it is used in `apply` alone. One
    that varies by expert is read by `context.each`; where the method surveys, it can differ between the experts alone,
    and the survey is given a tuple of one for each in its place.

    One that is `linear` multiplies the merged task vector, in float32, as the last thing that `apply` does: the result
    is this number times the one at 1, bit for bit, and one pass over the models serves all its values (`--search`).
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum}
    return field(default=default, metadata={"help": help, **bounds, "varies": varies, "linear": linear})


def bounds(spec: dataclasses.Field[Any]) -> str:
    """The bounds of an option in words, empty where there are none."""
    low = spec.metadata["minimum"] if spec.metadata["minimum"] is not None else spec.metadata["above"]
    words = []
    if low is not None:
        words.append(f"{'at least' if spec.metadata['minimum'] is not None else 'above'} {low:g}")
    if spec.metadata["maximum"] is not None:
        words.append(f"at most {spec.metadata['maximum']:g}")
    return " and ".join(words)


def option_types(options: type) -> dict[str, Any]:
    """The type of each option: int, float, str, bool, a Literal of choices, or one of them with None."""
    return typing.get_type_hints(options)


def make_options(method: Method | TransformSpec, name: str, values: Mapping[str, Any]) -> Any:
    """The method's options with `values` in place of defaults, checked.

    Raises:
        UsageError: An option the method does not have, of the wrong type or out of bounds.
    """
    specs = {spec.name: spec for spec in dataclasses.fields(method.options)}
    types = option_types(method.options)
    checked = {}
    for key, value in values.items():
        if key not in specs:
            near = get_close_matches(key, specs, n=1)
            have = f"it has: {', '.join(specs)}" if specs else "it has no options"
            raise UsageError(f"'{name}' has no option '{key}'", hint=f"did you mean '{near[0]}'?" if near else have)
        checked[key] = _check(specs[key], types[key], value)
    try:
        return method.options(**checked)
    except ValueError as error:  # options that exclude one another
        raise UsageError(f"'{name}': {error}") from error


def is_linear(method: Method, option: str) -> bool:
    """Whether the merged task vector is this option times what it is at 1, to the bit."""
    return any(spec.name == option and spec.metadata["linear"] for spec in dataclasses.fields(method.options))


def check_option(method: Method | TransformSpec, option: str, value: Any) -> Any:
    """The value, if the option can have it.

    Raises:
        UsageError: It is of the wrong type or out of bounds.
    """
    spec = next(spec for spec in dataclasses.fields(method.options) if spec.name == option)
    return _check(spec, option_types(method.options)[option], value)


def _check(spec: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    flag = "--" + spec.name.replace("_", "-")
    if type(None) in typing.get_args(kind):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UsageError(f"{flag} must be one of {', '.join(typing.get_args(kind))}, not {value!r}")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{flag} must be {'an integer' if kind is int else f'a {kind.__name__}'}, not {value!r}")
    if kind in (int, float):
        low, above, high = (spec.metadata[k] for k in ("minimum", "above", "maximum"))
        inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        if not math.isfinite(value) or not inside:
            raise UsageError(f"{flag} must be {bounds(spec) or 'finite'}, not {value:g}")
    return value


def written(value: float) -> str:
    """A number in as few digits as tell it apart."""
    return short if float(short := f"{value:g}") == value else repr(value)


def read_values(flag: str, text: str, kind: Any) -> tuple[Any, ...]:
    """The values that `START:STOP:STEP`, `V,V...`, or both with commas between, stand for; STOP is one of them.

    Raises:
        UsageError: One is no value of that kind.
    """
    return tuple(value for part in text.split(",") for value in _read_part(flag, part.strip(), kind))


def _read_part(flag: str, part: str, kind: Any) -> Iterator[Any]:
    kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    number = next((each for each in kinds if each in (int, float)), None)
    if part == "none" and type(None) in kinds:
        yield None
    elif bool in kinds and part in ("true", "false"):
        yield part == "true"
    elif number is None:
        yield part  # of choices: whether it is one is asked later
    else:
        try:
            # In decimals: 0.1:1.0:0.1 has the ten numbers that one would type.
            told = [Decimal(word) for word in part.split(":")]
            if not all(word.is_finite() for word in told):
                raise InvalidOperation
        except InvalidOperation:
            told = []
        if len(told) not in (1, 3):
            raise UsageError(
                f"--search {flag}: '{part}' is no number and no range",
                hint="a range is START:STOP:STEP, as 0.1:1.0:0.1",
            )
        if len(told) == 3 and (not told[2] or (told[1] - told[0]) / told[2] < 0):
            raise UsageError(f"--search {flag}: '{part}' leads nowhere", hint="a range is START:STOP:STEP")
        steps = int((told[1] - told[0]) / told[2]) if len(told) == 3 else 0
        if steps > MOST:
            raise UsageError(f"--search {flag}: '{part}' has more than {MOST:,} values")
        for i in range(steps + 1):
            value = told[0] + i * told[2] if len(told) == 3 else told[0]
            if number is int and value != int(value):
                raise UsageError(f"--search {flag}: {value} is no whole number")
            yield number(value)
