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

OUTLINES = "modelmerge-hub-"  # how the temporary directories begin in which repositories of the Hub are shown
_OUTLINE = re.compile(rf"\S*/{OUTLINES}[^/]+/")


class ModelMergeError(Exception):
    """An error with a sentence for the user and, where there is one, a hint that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = _OUTLINE.sub("hf://", message)  # what is shown there is told by the name it has for everybody
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ModelMergeError):
    """An option or an argument that cannot be meant."""

    exit_code = 2


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
