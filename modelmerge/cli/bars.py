"""Progress on stderr: bars in a terminal, and lines now and then where there is none."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from modelmerge import interrupts
from modelmerge.cli.output import Sink, size
from modelmerge.text import visible

_EVERY = 30.0  # seconds between lines where there is no terminal: services stop jobs that say nothing
_SOON = 5.0  # seconds after a line in which a tenth is not worth another
_BAR, _WIDE_BAR, _WIDE = 20, 40, 110  # cells of a bar, and of the terminal from which on it is the wider one
_LEAST = 8  # letters of a name that are worth showing


class Bars:
    """Draws the progress of a run, says lines of it without a terminal, and passes notes to the sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._mutex = threading.Lock()
        self._task: TaskID | None = None
        self._label, self._unit, self._item = "", "bytes", ""
        self._at_work: dict[str, None] = {}  # what has begun and not ended, in that order
        self._done, self._total, self._tenth = 0, 0, 0
        self._begun = self._spoken = time.monotonic()
        self._whole = 0.0  # seconds that the stage takes in all, as far as it can be told
        self._ended = threading.Event()
        self._drawn = sink.margin.is_terminal and sink.form == "human"
        width = _WIDE_BAR if sink.margin.width >= _WIDE else _BAR
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(width), _Figures(sink.margin.width - width), console=sink.margin, disable=not self._drawn,
        )  # fmt: skip

    def __enter__(self) -> Bars:
        self._progress.start()
        if self._sink.form != "quiet":
            interrupts.on_first(self._acknowledge)
            if not self._drawn:
                threading.Thread(target=self._speak_now_and_then, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        interrupts.on_first(None)
        self._ended.set()
        self._progress.stop()

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        """Begin a new bar."""
        with self._mutex:
            self._label, self._unit, self._item = visible(label), unit, ""
            self._at_work.clear()
            self._done, self._total, self._tenth = 0, total, 0
            self._begun, self._whole = time.monotonic(), 0.0
            self._task = self._progress.add_task(self._label, total=total, figures="", whole=0.0, item="")

    def begin(self, item: str) -> None:
        """Say what is at hand from now on."""
        interrupts.check()
        with self._mutex:
            self._at_work[item] = None
            self._draw()

    def advance(self, amount: int, item: str) -> None:
        """Move the bar on."""
        interrupts.check()
        with self._mutex:
            self._done, self._item = self._done + amount, item
            self._at_work.pop(item, None)
            self._whole = (time.monotonic() - self._begun) / (self._share() or math.inf)
            self._draw()
            tenth = 10 * self._done // self._total if self._total else 0
            if tenth > self._tenth:
                self._tenth = tenth
                if not self._drawn and time.monotonic() - self._spoken >= _SOON:
                    self._speak()

    def note(self, message: str) -> None:
        """Say it above the bars."""
        self._sink.note(message)

    @contextlib.contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show that something goes on which cannot be counted; nothing is left of it afterwards."""
        task = self._progress.add_task(label, total=None, figures="", whole=0.0, item="")
        try:
            yield
        finally:
            self._progress.remove_task(task)

    def _draw(self) -> None:
        if self._drawn and self._task is not None:
            self._progress.update(
                self._task, completed=self._done, figures=self._amount(), whole=self._whole, item=self._at_hand()
            )

    def _at_hand(self) -> str:
        """What has been at work for longest; where nothing says that it begins, what was done last."""
        return visible(next(iter(self._at_work), self._item))

    def _share(self) -> float:
        return self._done / self._total if self._total else 0.0

    def _amount(self) -> str:
        if self._unit == "work":
            return f"{self._share():.0%}"
        if self._unit == "bytes":
            return f"{size(self._done)} of {size(self._total)}"
        return f"{self._done} of {self._total} {self._unit}"

    def _speak_now_and_then(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.MEANINGS)  # the main thread shall have them
        while not self._ended.wait(max(self._spoken + _EVERY - time.monotonic(), 0.01)):
            with self._mutex:
                if time.monotonic() - self._spoken >= _EVERY:
                    self._speak()

    def _speak(self) -> None:
        self._spoken = time.monotonic()
        if not self._label:
            return
        elapsed = self._spoken - self._begun
        item = f", {self._at_hand()}" if self._at_hand() else ""
        amount = "" if self._unit == "work" else f" {self._amount()},"
        times = f"{clock(elapsed)} so far{_left(elapsed, self._whole)}"
        self._sink.say(f"{self._label}: {self._share():.0%},{amount} {times}{item}")

    def _acknowledge(self) -> None:
        """Answer a signal at once; the work ends when it next looks."""
        with contextlib.suppress(OSError):
            os.write(2, b"\r\x1b[2Kstopping\n" if self._drawn else b"stopping\n")


class _Figures(ProgressColumn):
    """What is done, the time it took and will take, and, in the room that is left, the end of the item's name."""

    def __init__(self, width: int) -> None:
        self._width = width
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """`1.2 GB of 7.4 GB  0:12, 0:50 left  layers.3.mlp.up_proj.weight`, in the width that is left."""
        elapsed = task.finished_time if task.finished else task.elapsed
        left = "" if task.finished else _left(elapsed or 0.0, task.fields["whole"])
        figures = f"{task.fields['figures']}  {clock(elapsed or 0)}{left}".strip()
        room = self._width - len(task.description) - len(figures) - 4
        item = task.fields["item"]
        item = item if len(item) <= room else f"…{item[len(item) - room + 1 :]}" if room > _LEAST else ""
        return Text.assemble(figures, (f"  {item}" if item else "", "dim"), no_wrap=True, overflow="crop")


def _left(elapsed: float, whole: float) -> str:
    """What is left of the seconds that it takes in all, told when the bar last moved; they run down until it moves."""
    return f", {clock(max(whole - elapsed, 0.0))} left" if whole else ""


def clock(seconds: float) -> str:
    """A time as a clock shows it: 0:07, 12:40, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
