"""Transforms as they are typed: `NAME [OPTION=V ...]`, such as `awd alpha=0.2`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import TransformSpec
from modelmerge.methods.options import make_options, read_option

_FORM = "write it like 'awd alpha=0.2'"


def parse_transform(text: str) -> tuple[str, TransformSpec, Any]:
    """The name, the declaration and the options that `NAME [OPTION=V ...]` stands for.

    Raises:
        UsageError: It is not of that form, there is no such transform or option, or the option cannot have a value.
    """
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise UsageError(f"'{text}': {error}", option="disentangle", hint=_FORM) from None
    if not name or "=" in name:
        raise UsageError(f"'{text}' does not begin with a transform's name", option="disentangle", hint=_FORM)
    try:
        spec = registry.load(name, "transform")
        values: dict[str, Any] = {}
        for word in words:
            option, equals, value = word.partition("=")
            option = option.replace("-", "_")
            if not equals or not option or option in values:
                raise UsageError(f"'{word}' {'comes twice' if option in values else 'is not OPTION=V'}", hint=_FORM)
            values[option] = read_option(spec, name, option, value)
        return name, spec, make_options(spec, name, values)
    except UsageError as error:
        raise error.within("disentangle", text) from error


def as_typed(name: str, options: Any) -> str:
    """A transform as it is typed, with every option that has a value."""
    values = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    return shlex.join([name, *(_word(key, value) for key, value in values.items())])


def with_option(text: str, option: str, value: Any) -> str:
    """A transform as it is typed, with another value of an option."""
    name, *words = shlex.split(text)
    kept = [word for word in words if word.partition("=")[0].replace("-", "_") != option]
    return shlex.join([name, *kept, *([] if value is None else [_word(option, value)])])


def _word(option: str, value: Any) -> str:
    return f"{option.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
