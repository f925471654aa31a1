"""Methods and transforms inside an option, as they are typed: `NAME [OPTION=V ...]`, such as `awd alpha=0.2`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any, Literal

from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Method, TransformSpec
from modelmerge.methods.options import make_options, read_option


def parse_transform(text: str) -> tuple[str, TransformSpec, Any]:
    """The name, the declaration and the options that `NAME [OPTION=V ...]` stands for.

    Raises:
        UsageError: It is not of that form, there is no such transform or option, or the option cannot have a value.
    """
    return _parse(text, "transform", "disentangle", "awd alpha=0.2")


def parse_method(text: str, option: str) -> tuple[str, Method, Any]:
    """The same of a merge method that an option names.

    Raises:
        UsageError: As for `parse_transform`.
    """
    return _parse(text, "merge", option, "ties density=0.2")


def _parse(text: str, kind: Literal["merge", "transform"], option: str, example: str) -> tuple[str, Any, Any]:
    form = f"write it like '{example}'"
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise UsageError(f"'{text}': {error}", option=option, hint=form) from None
    if not name or "=" in name:
        noun = {"merge": "method", "transform": "transform"}[kind]
        raise UsageError(f"'{text}' does not begin with a {noun}'s name", option=option, hint=form)
    try:
        spec: Method | TransformSpec = registry.load(name, kind)
        values: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            key = key.replace("-", "_")
            if not equals or not key or key in values:
                raise UsageError(f"'{word}' {'comes twice' if key in values else 'is not OPTION=V'}", hint=form)
            values[key] = read_option(spec, name, key, value)
        return name, spec, make_options(spec, name, values)
    except UsageError as error:
        raise error.within(option, text) from error


def as_typed(name: str, options: Any) -> str:
    """A method or a transform as it is typed, with every option that has a value."""
    values = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    return shlex.join([name, *(_word(key, value) for key, value in values.items())])


def with_option(text: str, option: str, value: Any) -> str:
    """A transform as it is typed, with another value of an option."""
    name, *words = shlex.split(text)
    kept = [word for word in words if word.partition("=")[0].replace("-", "_") != option]
    return shlex.join([name, *kept, *([] if value is None else [_word(option, value)])])


def _word(option: str, value: Any) -> str:
    return f"{option.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
