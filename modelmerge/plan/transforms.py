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
    name, *words = shlex.split(text) or [""]
    if not name or "=" in name:
        raise UsageError(f"--disentangle '{text}' does not begin with the name of a transform", hint=_FORM)
    spec = registry.load(name, "transform")
    values: dict[str, Any] = {}
    for word in words:
        option, equals, value = word.partition("=")
        option = option.replace("-", "_")
        if not equals or not option or option in values:
            trouble = "comes twice" if option in values else "is not OPTION=V"
            raise UsageError(f"--disentangle '{text}': '{word}' {trouble}", hint=_FORM)
        values[option] = read_option(spec, name, option, value)
    return name, spec, make_options(spec, name, values)


def as_typed(name: str, options: Any) -> str:
    """A transform as it is typed, with every option that has a value."""
    values = {key: value for key, value in dataclasses.asdict(options).items() if value is not None}
    return shlex.join([name, *(f"{key.replace('_', '-')}={value}" for key, value in values.items())])


def with_option(text: str, option: str, value: Any) -> str:
    """A transform as it is typed, with another value of an option."""
    name, *words = shlex.split(text)
    kept = [word for word in words if word.partition("=")[0].replace("-", "_") != option]
    return shlex.join([name, *kept, *([] if value is None else [f"{option.replace('_', '-')}={value}"])])
