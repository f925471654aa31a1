"""The options of methods: declare one, check a value, read a value from text.

Errors name options by `errors.named`, so that whoever shows one spells the option as its reader types it. The words of
a value are the same everywhere: on the command line, in `--at`, in `--try` and in presets.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from modelmerge.errors import UsageError, named, suggestion
from modelmerge.methods.contract import Method, TransformSpec

MOST = 10_000  # values of an option in a range, and candidates of a search; more are a slip of the keyboard
PUBLISHED = "The published algorithm with its constants; options named beside it win."
PUBLISHED_SCALE = "The scale of the paper."
_DIGITS = 308  # no float64 has more before the point
_RANGE = "a range is START:STOP:STEP, as 0.1:1.0:0.1"
_BETWEEN = "write it like 0.1..1.5, or 1e-4..1e-1:log"


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    varies: Literal["tensor", "expert"] | None = None,
    linear: bool = False,
    overlapping: bool = False,
) -> Any:
    """A field of a method's options: its default, its help, and its bounds (`above` excludes the bound itself).

    A number that `varies` by tensor can be another one in each tensor (`--vary`), for it is used in `apply` alone. One
    that varies by expert is read by `context.each`; where the method surveys, it can differ between the experts alone,
    and the survey is given a tuple of one for each in its place.

    One that is `linear` multiplies the merged task vector, in float32, as the last thing that `apply` does: the result
    is this number times the one at 1, bit for bit, and one pass over the models serves all its values (`--search`).

    A default of None follows from the other options, or from each tensor; with `overlapping`, from how much the
    experts overlap (`modelmerge.engine.lengths`). The help then ends with it: "Default: 1.", or
    "Default: 1; 0.3 as published." `follow` puts it in place.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum}
    return field(
        default=default,
        metadata={"help": help, **bounds, "varies": varies, "linear": linear, "overlapping": overlapping},
    )


def bounds(spec: dataclasses.Field[Any]) -> str:
    """The bounds of an option in words, empty where there are none."""
    low = spec.metadata["minimum"] if spec.metadata["minimum"] is not None else spec.metadata["above"]
    words = [] if low is None else [f"{'at least' if spec.metadata['minimum'] is not None else 'above'} {low:g}"]
    words += [] if spec.metadata["maximum"] is None else [f"at most {spec.metadata['maximum']:g}"]
    return " and ".join(words)


def option_types(options: type) -> dict[str, Any]:
    """The type of each option: int, float, str, bool, a Literal of choices, or one of them with None."""
    return typing.get_type_hints(options)


def follow(options: Any, **defaults: Any) -> None:
    """Put defaults that follow from other options in the place of None; for the `__post_init__` of an options class."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            object.__setattr__(options, name, value)  # frozen for everybody else


def sum_scale(published: float, *, overlapping: bool = False) -> Any:
    """The field of the scale of a sum of task vectors, which `follow_sum` and `with_experts` put in place.

    `overlapping`: it is smaller where the task vectors overlap, of which the sum has all or much.
    """
    default = "by number and overlap" if overlapping else "1 / sqrt(experts)"
    words = f"Factor. Default: {default}; {published:g} as published."
    return option(None, words, varies="tensor", linear=True, overlapping=overlapping)


def follow_sum(options: Any, published: float) -> None:
    """Put the scale of a mean, or that of the published sum, in the place of None."""
    if getattr(options, "reduce", "sum") == "mean":
        follow(options, scale=1.0)
    elif options.published:
        follow(options, scale=published)


def scale_of(options: Any, experts: int) -> float:
    """The scale of a sum of task vectors: 1 / sqrt(T) where the options leave it to the number of experts.

    Vectors at right angles that are equally long add up to that length then.
    """
    scale: float | None = options.scale
    return at_right_angles(experts) if scale is None else scale


def at_right_angles(experts: int) -> float:
    """1 / sqrt(T), in three digits, as it is told."""
    return round(max(experts, 1) ** -0.5, 3)


def asks_overlap(options: Any) -> bool:
    """Whether the scale is left to how much the experts overlap."""
    specs = {spec.name: spec for spec in dataclasses.fields(options)}
    return getattr(options, "scale", 1.0) is None and specs["scale"].metadata["overlapping"]


def with_experts(options: Any, experts: int, overlap: float | None = None) -> Any:
    """The options with what follows from the experts in the place of None.

    `overlap` is the scale where it is left to how much they overlap, if that has been measured.
    """
    if getattr(options, "scale", 1.0) is not None:
        return options
    known = overlap is not None and asks_overlap(options)
    return dataclasses.replace(options, scale=overlap if known else scale_of(options, experts))


def refuse_idle(options: Any, names: Sequence[str], reason: str) -> None:
    """Refuse options that have no effect; for the `__post_init__` of an options class.

    Ask before `follow` gives them values.

    Raises:
        UsageError: One of them has a value.
    """
    for name in names:
        if getattr(options, name) is not None:
            raise UsageError(f"has no effect {reason}", option=name)


def make_options(method: Method | TransformSpec, name: str, values: Mapping[str, Any]) -> Any:
    """The method's options with `values` in place of defaults, checked.

    Raises:
        UsageError: An option the method does not have, of the wrong type, out of bounds, or without effect.
    """
    types = option_types(method.options)
    specs = {key: _spec(method, name, key) for key in values}
    return method.options(**{key: _check(specs[key], types[key], value) for key, value in values.items()})


def change_options(
    method: Method | TransformSpec,
    name: str,
    values: Mapping[str, Any],
    changes: Mapping[str, Any],
    experts: int,
    overlap: float | None = None,
) -> Any:
    """The options that `values` make, with `changes` in place, checked; what followed from others follows anew.

    So recorded options, which hold what followed, can be changed: of APGD's exact solver, with its ridge, `solver:
    adam` makes Adam, without one. What followed from the number of `experts`, or from their `overlap`, is None again.

    Raises:
        UsageError: As for `make_options`.
    """
    options = with_experts(make_options(method, name, values), experts, overlap)
    fewest = dataclasses.asdict(options)
    for key in reversed(list(fewest)):
        fewer = {other: value for other, value in fewest.items() if other != key}
        try:
            same = with_experts(method.options(**fewer), experts, overlap) == options
        except UsageError:  # another option has an effect only beside this one
            continue
        fewest = fewer if same else fewest
    return make_options(method, name, {**fewest, **changes})


def describe(options: Any) -> dict[str, Any]:
    """What runs with these options, for plans, manifests and cards: those with a value, and what follows from them.

    An options class may have a method `describe() -> dict[str, str]`: by name, in words, what is no option, such as how
    APGD's lambdas are made, or has a value only in a tensor, such as a rank.
    """
    values = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    return {**values, **(options.describe() if hasattr(options, "describe") else {})}


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


def _spec(method: Method | TransformSpec, name: str, option: str) -> dataclasses.Field[Any]:
    """How an option is declared.

    Raises:
        UsageError: The method of that name does not have it.
    """
    specs = {spec.name: spec for spec in dataclasses.fields(method.options)}
    if option in specs:
        return specs[option]
    raise no_such_option(name, option, specs)


def no_such_option(name: str, option: str, options: Collection[str]) -> UsageError:
    """The error for an option that the method of that name does not have; it has these."""
    have = f"it has: {', '.join(map(named, options))}" if options else "it has no options"
    return UsageError(f"'{name}' has no option '{named(option)}'", hint=suggestion(option, options, have, show=named))


def _check(spec: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    if value is None and type(None) in typing.get_args(kind):
        return None
    kind = _plain(kind)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise UsageError(f"must be one of {', '.join(typing.get_args(kind))}, not {value!r}", option=spec.name)
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"must be {_noun(kind)}, not {value!r}", option=spec.name)
    if kind in (int, float):
        low, above, high = (spec.metadata[k] for k in ("minimum", "above", "maximum"))
        inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        if not math.isfinite(value) or not inside:
            raise UsageError(f"must be {bounds(spec) or 'finite'}, not {value:g}", option=spec.name)
    return value


def _plain(kind: Any) -> Any:
    """The type of an option without its None."""
    if type(None) not in typing.get_args(kind):
        return kind
    return next(each for each in typing.get_args(kind) if each is not type(None))


def _noun(kind: type) -> str:
    return {int: "an integer", bool: "true or false", str: "a word"}.get(kind, f"a {kind.__name__}")


def written(value: float) -> str:
    """A number in as few digits as tell it apart."""
    return short if float(short := f"{value:g}") == value else repr(value)


def as_text(value: Any) -> str:
    """A value as `read_value` reads it back."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return written(value) if isinstance(value, float) else str(value)


def read_option(method: Method | TransformSpec, name: str, option: str, text: str) -> Any:
    """The value of an option of the method `name` that a text stands for, checked.

    Raises:
        UsageError: The method does not have the option, or the option cannot have that value.
    """
    spec, kind = _spec(method, name, option), option_types(method.options)[option]
    return _check(spec, kind, read_value(option, text, kind))


def read_value(option: str, text: str, kind: Any) -> Any:
    """The value of an option's type that a text stands for: a number, `true` or `false`, or one of its choices.

    Of a type with None, `none` is the default that follows from the other options or from each tensor.

    Raises:
        UsageError: It stands for none of that type; the error begins with the option.
    """
    text, plain = text.strip(), _plain(kind)
    if text == "none" and plain is not kind:
        return None
    if plain is bool:
        if text not in ("true", "false"):
            raise UsageError(f"must be {_noun(plain)}, not {text!r}", option=option)
        return text == "true"
    if typing.get_origin(plain) is Literal:
        if text not in typing.get_args(plain):
            raise UsageError(f"must be one of {', '.join(typing.get_args(plain))}, not {text!r}", option=option)
        return text
    return _number(option, _decimal(option, text, plain), plain) if plain in (int, float) else text


def read_values(option: str, text: str, kind: Any) -> tuple[Any, ...]:
    """The values that `START:STOP:STEP`, `V,V...`, or both with commas between, stand for; STOP is one of them.

    Raises:
        UsageError: One is no value of that kind; the error begins with the option.
    """
    return tuple(value for part in text.split(",") for value in _read_part(option, part.strip(), kind))


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """All numbers from `low` to `high`, both included; with `log`, as many in each power of ten."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        """As it is typed."""
        return f"{written(self.low)}..{written(self.high)}{':log' * self.log}"


def read_range(option: str, text: str, kind: Any) -> Range | None:
    """What `LOW..HIGH` or `LOW..HIGH:log` stands for; None where a text, or the option's type, has no such range.

    Raises:
        UsageError: An end is no number of that kind, or there is nothing between them; it begins with the option.
    """
    plain = _plain(kind)
    between, colon, scale = text.strip().partition(":")
    first, dots, last = between.partition("..")
    if not dots or plain not in (int, float):
        return None
    low, high = (_number(option, _decimal(option, word, plain), plain) for word in (first, last))
    if low >= high or (colon and (scale != "log" or low <= 0)):
        what = "leads nowhere" if low >= high else "has no logarithms" if scale == "log" else "is no range"
        raise UsageError(f"'{text}' {what}", option=option, hint=_BETWEEN)
    return Range(low, high, log=bool(colon))


def as_key(word: str) -> str:
    """`OPTION` or `OWNER.OPTION` as typed, with the option's Python name."""
    owner, dot, option = word.strip().rpartition(".")
    return f"{owner}{dot}{option.replace('-', '_')}"


def as_word(key: str) -> str:
    """The same as it is typed."""
    owner, dot, option = key.rpartition(".")
    return f"{owner}{dot}{option.replace('_', '-')}"


def _read_part(option: str, part: str, kind: Any) -> Iterator[Any]:
    plain = _plain(kind)
    words = part.split(":")
    if plain not in (int, float) or len(words) == 1:
        yield read_value(option, part, kind)
        return
    if len(words) != 3:
        raise UsageError(f"'{part}' is no number and no range", option=option, hint=_RANGE)
    # In decimals: 0.1:1.0:0.1 has the ten numbers that one would type.
    start, stop, step = (_decimal(option, word, plain) for word in words)
    if not step or (stop - start) / step < 0:
        raise UsageError(f"'{part}' leads nowhere", option=option, hint=_RANGE)
    steps = int((stop - start) / step)
    if steps > MOST:
        raise UsageError(f"'{part}' has more than {MOST:,} values", option=option)
    for i in range(steps + 1):
        yield _number(option, start + i * step, plain)


def _decimal(option: str, text: str, kind: type) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if value.is_nan():
        raise UsageError(f"must be {_noun(kind)}, not {text!r}", option=option)
    if value.is_infinite() or value.adjusted() >= _DIGITS:
        raise UsageError(f"must be finite, not {text}", option=option)
    return value


def _number(option: str, value: Decimal, kind: type) -> Any:
    if kind is int and value != value.to_integral_value():
        raise UsageError(f"must be {_noun(kind)}, not {value}", option=option)
    return kind(value)
