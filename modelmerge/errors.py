"""Every error that modelmerge raises on purpose.

ModelMergeError            one line that names the file, tensor or option; a hint that says what to do
├── UsageError             an option or argument is wrong (exit code 2)
├── ReferenceNotFound      a name leads to no checkpoint, or to a kind that cannot be read
├── HubError               the Hugging Face Hub refuses, or cannot be reached
├── CheckpointError        a file is malformed, truncated or holds values that cannot be merged
├── PlanError              base and experts disagree: all disagreements, in one error
├── DeviceError            the device that was named is not there
├── OutputError            the output cannot be written, or must not be
└── RecipeError            a recipe cannot be replayed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

OUTLINES = "modelmerge-hub-"  # how the temporary directories begin in which repositories of the Hub are shown
_OUTLINE = re.compile(rf"(?<!\S)\S*/{OUTLINES}[^/]+/")  # from where a word begins: elsewhere it is tried in vain
_LONGEST = 20_000  # letters of a message: what a stranger's file says can be of any length

_LONGEST_NAME = 200  # letters of a name that may be meant for another
_LEFT, _RIGHT = "\N{LEFT WHITE SQUARE BRACKET}", "\N{RIGHT WHITE SQUARE BRACKET}"
_NAMED = re.compile(f"{_LEFT}([^{_LEFT}{_RIGHT}]*){_RIGHT}")

Speller = Callable[[str], str]  # an option's Python name -> how the reader types it


def named(option: str) -> str:
    """An option in a message, by its Python name; whoever shows the message spells it as its reader types it."""
    return f"{_LEFT}{option}{_RIGHT}"


def spelled(text: str, spell: Speller = str) -> str:
    """The text with each option in it spelt; by default as Python has it."""
    return _NAMED.sub(lambda match: spell(match[1]), text)


def suggestion(
    name: str, names: Iterable[str], otherwise: str = "", *, also: str = "", show: Callable[[str], str] = str
) -> str | None:
    """The hint for a name that is none of these: the one that is probably meant, or else `otherwise`; and then `also`.

    `show` makes the name as the reader types it.
    """
    near = get_close_matches(name, names, n=1) if len(name) <= _LONGEST_NAME else []
    hint = f"did you mean '{show(near[0])}'?" if near else otherwise
    return f"{hint} {also}".strip() or None


class ModelMergeError(Exception):
    """An error with a sentence for the user and, where there is one, a hint that says what to do.

    Both may mention options by `named`. `message` and `hint` spell them as Python does; the command line passes the
    error's `template` and `hint_template` to `spelled` with its own spelling.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # A sparse copy of a repository is shown by the name that the repository has for everybody.
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        self.template = _OUTLINE.sub("hf://", message)
        self.hint_template = hint
        super().__init__(spelled(self.template))

    def to_dict(self) -> dict[str, Any]:
        """The error as plain data, for another process: `from_dict`."""
        return {"kind": type(self).__name__, "message": self.template, "hint": self.hint_template}

    @property
    def message(self) -> str:
        """The sentence, with options spelt as in Python."""
        return spelled(self.template)

    @property
    def hint(self) -> str | None:
        """What to do about it, with options spelt as in Python."""
        return None if self.hint_template is None else spelled(self.hint_template)


class UsageError(ModelMergeError):
    """An option or an argument that cannot be meant.

    Args:
        message: The sentence; with `option`, the rule that its value breaks: "must be at least 0, not -1".
        option: The option's Python name; the sentence then begins with it.
        hint: What to do.
    """

    exit_code = 2

    def __init__(self, message: str, *, option: str | None = None, hint: str | None = None) -> None:
        super().__init__(message if option is None else f"{named(option)} {message}", hint=hint)
        self.option = option

    def within(self, option: str, text: str) -> UsageError:
        """The same error about words inside an option's value, such as `at "*mlp*: density=2"`; they have no dashes."""
        word = spelled(self.template, lambda name: name.replace("_", "-"))
        hint = self.hint_template and spelled(self.hint_template, lambda name: name.replace("_", "-"))
        return UsageError(f"{named(option)} '{text}': {word}", hint=hint)


class ReferenceNotFound(ModelMergeError):
    """A reference that leads to no checkpoint, or to a kind that cannot be read."""


class HubError(ModelMergeError):
    """The Hugging Face Hub refuses, or cannot be reached."""


class CheckpointError(ModelMergeError):
    """A checkpoint file that is malformed, truncated, or holds values that cannot be merged."""


class PlanError(ModelMergeError):
    """Base and experts disagree; the message lists every disagreement."""


class DeviceError(ModelMergeError):
    """A device that was named and is not there."""


class OutputError(ModelMergeError):
    """An output that cannot be written, or must not be."""


class RecipeError(ModelMergeError):
    """A recipe that cannot be read, or whose inputs are no longer what they were."""


def from_dict(content: Mapping[str, Any], *, host: str | None, hint: str | None = None) -> ModelMergeError:
    """An error that another process met, on another host where one is named; `hint` where it has none."""
    kind: type[ModelMergeError] = globals()[content["kind"]]
    where = f" (on {host})" if host else ""
    return kind(f"{content['message']}{where}", hint=content["hint"] or hint)
