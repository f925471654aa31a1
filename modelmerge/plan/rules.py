"""Methods of their own for some tensors: `GLOB=METHOD [OPTION=V ...]`.

`*attn*=tsv-m scale=0.8` hands the tensors of such names to another method than the rest. The first rule that takes a
tensor counts. A method for linear layers takes their weights only: what its glob matches besides goes on to the next
rule and, where none takes it, to the merge's own method. What a method finds out about all its tensors together, such
as the share of the largest entries, is found for each rule apart, over the tensors that it takes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.contract import Method
from modelmerge.methods.options import make_options, option_types

_FORM = "write it like --rule '*attn*=tsv-m scale=0.8'"


@dataclass(frozen=True, slots=True)
class Rule:
    """The tensors of such names go to a method, with its options."""

    tensors: str
    name: str
    method: Method
    options: Any

    def __str__(self) -> str:
        """As it is typed, with every option that has a value."""
        told = {key: value for key, value in dataclasses.asdict(self.options).items() if value is not None}
        words = [f"{key.replace('_', '-')}={str(value).lower() if value is True or value is False else value}"
                 for key, value in told.items()]  # fmt: skip
        return " ".join([f"{self.tensors}={self.name}", *words])

    def matches(self, tensor: str) -> bool:
        """Whether its glob matches the name."""
        return fnmatch.fnmatchcase(tensor, self.tensors)

    def takes(self, tensor: str, *, linear: bool) -> bool:
        """Whether it is for the tensor; `linear`: that is the weight of a linear layer."""
        return self.matches(tensor) and (linear or not self.method.matrices)


def parse(text: str) -> Rule:
    """The rule that `GLOB=METHOD [OPTION=V ...]` says.

    Raises:
        UsageError: It is not of that form, there is no such method or option, or a value is none the option can have.
    """
    head, *told = text.split() or [""]
    tensors, _, name = head.rpartition("=")
    if not tensors or not name:
        raise UsageError(f"--rule '{text}' is not GLOB=METHOD [OPTION=V ...]", hint=_FORM)
    try:
        chosen = registry.load(name)
        values: dict[str, Any] = {}
        for word in told:
            option, equals, value = word.partition("=")
            option = option.replace("-", "_")
            if not equals or not option or option in values:
                raise UsageError(f"'{word}' {'comes twice' if option in values else 'is not OPTION=V'}", hint=_FORM)
            values[option] = _value(chosen, option, value)
        return Rule(tensors, name, chosen, make_options(chosen, name, values))
    except UsageError as error:
        raise UsageError(f"--rule '{text}': {error.template}", hint=error.hint_template) from error


def _value(chosen: Method, option: str, text: str) -> Any:
    """The value as the option's type has it; the text where it is of no such type, for `make_options` to refuse."""
    types: Mapping[str, Any] = option_types(chosen.options)
    kinds = typing.get_args(types.get(option)) or (types.get(option),)
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text
