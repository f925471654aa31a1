"""What the library says while it works: a protocol that the command line fulfils, and silence."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run. Called from worker threads; must be quick and thread-safe."""

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        """A stage begins that will process `total` bytes, or steps, or whatever `unit` is.

        The unit `work` is for what takes time in unequal measure, and means nothing to a person but as a share.
        """

    def begin(self, item: str) -> None:
        """Work on an item begins that may take long; `advance` with its name ends it."""

    def advance(self, amount: int, item: str) -> None:
        """So much more of the stage is done; `item` is the tensor or file at hand, or how far the loss has come."""

    def note(self, message: str) -> None:
        """Something a person should know, in one line."""


class Silent:
    """A progress that says nothing."""

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        """Ignore it."""

    def begin(self, item: str) -> None:
        """Ignore it."""

    def advance(self, amount: int, item: str) -> None:
        """Ignore it."""

    def note(self, message: str) -> None:
        """Ignore it."""


SILENT = Silent()
