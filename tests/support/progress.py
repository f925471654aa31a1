"""What a run says while it works, for tests to look at."""

from __future__ import annotations


class Ear:
    """Hears the progress: of each item, whether it was begun, and how much of the last stage it was."""

    def __init__(self) -> None:
        self.begun: set[str] = set()
        self.done: dict[str, int] = {}

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.begun, self.done = set(), {}

    def begin(self, item: str) -> None:
        self.begun.add(item)

    def advance(self, amount: int, item: str) -> None:
        self.done[item] = self.done.get(item, 0) + amount

    def note(self, message: str) -> None:
        pass
