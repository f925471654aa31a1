"""Signals that stop a run: each comes through at once, and none is lost.

A KeyboardInterrupt in the main thread is the fast way. Libraries swallow it now and then, and the main thread may be
deep in a product of matrices; so a thread of its own notes the signal too, and the work looks at that with `check`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from types import FrameType
from typing import Any, NoReturn, TypeVar

MEANINGS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
Result = TypeVar("Result")
_LOOK = 0.1  # seconds between two looks at whether a signal has come
_ECHO = 0.2  # seconds: `timeout`, shells and service managers send one signal, or two of these, twice
_received: list[int] = []
_moment = 0.0  # when the first came
_installed = _raised = _finished = False
_held = 0
_acknowledge: Callable[[], None] | None = None


def install() -> None:
    """Handle the signals of this process; those that it ignores, as under nohup, it goes on ignoring."""
    global _installed
    _installed = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    # Between a fork and its own settings a signal would be taken for its parent's.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, MEANINGS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANINGS),
        after_in_child=_leave_to_parent,
    )
    sys.unraisablehook = _say_unraisable
    for number in MEANINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def on_first(acknowledge: Callable[[], None] | None) -> None:
    """Call this when the first signal comes, from the thread that notes it; None: nothing."""
    global _acknowledge
    _acknowledge = acknowledge


def received() -> int | None:
    """The signal that stops this run, if one has come."""
    return _received[0] if _received else None


def check() -> None:
    """Go no further once a signal has come.

    Raises:
        KeyboardInterrupt: It has.
    """
    if _received:
        raise KeyboardInterrupt


def abandonable(work: Callable[[], Result]) -> Result:
    """What `work` returns; it is waited for no longer once a signal has come.

    It runs on a thread of its own, which ends with the process. Where no signals are handled, as in a notebook,
    nothing would end it: there it runs here.

    Raises:
        KeyboardInterrupt: A signal has come.
    """
    if not _installed:
        return work()
    outcome: futures.Future[Result] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not futures.wait([outcome], _LOOK).done:
        check()
    return outcome.result()


def finish(code: int) -> NoReturn:
    """Exit with that code. From now on a signal ends the process at once: nothing is left to be cleared up."""
    global _finished
    _finished = True
    # Python would take down all objects one by one, which takes as long as a small merge. And it would end by SIGINT,
    # whatever the code, if a KeyboardInterrupt has come through any `exec`.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Finish what is begun in the block whatever signal comes; the next `check` raises then."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


def quit_now(number: int) -> None:
    """End this process here, as that signal does, with the terminal as it was."""
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # a bar that is drawn hides the cursor
    os._exit(128 + number)


def _note(number: int) -> None:
    """Keep the first signal; a second one that is no echo of it ends the process."""
    global _moment
    if not _received:
        _moment = time.monotonic()
        _received.append(number)
        if _acknowledge is not None:
            _acknowledge()
    elif time.monotonic() - _moment > _ECHO:
        os.write(2, f"error: {MEANINGS[number]}\n".encode())
        quit_now(number)
    if _finished:
        quit_now(_received[0])


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 1):
        if numbers[0] in MEANINGS:
            _note(numbers[0])


def _handle(number: int, frame: FrameType | None) -> Any:
    global _raised
    if not _received:  # the thread has not got to it yet, or something else has taken its pipe
        _note(number)
    if not _raised and not _held:
        _raised = True
        raise KeyboardInterrupt


def _leave_to_parent() -> None:
    """What a fork is sent, as a worker that loads data is by its end, is its own; the pipe is its parent's."""
    signal.set_wakeup_fd(-1)
    _received.clear()
    for number in MEANINGS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANINGS)


def _say_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Python's own words, but for an interrupt that comes while an object is cleared away: `check` raises it again."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
