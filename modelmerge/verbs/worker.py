"""A process that takes part in a merge for another one, which has started it: see `modelmerge.verbs.driver`."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from modelmerge import interrupts
from modelmerge.errors import ModelMergeError
from modelmerge.progress import Silent
from modelmerge.verbs.driver import Message, Work
from modelmerge.verbs.merge import execute
from modelmerge.verbs.prepare import prepare

_EVERY = 0.2  # seconds between words on how far a stage is


class Relay(Silent):
    """A progress that goes to the driver, a word now and then."""

    def __init__(self, send: Callable[[Message], object]) -> None:
        self._send, self._mutex = send, threading.Lock()
        self._amount, self._item, self._spoken = 0, "", 0.0

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        """Say it."""
        with self._mutex:
            if self._amount:
                self._say()
            self._send({"stage": [label, total, unit]})

    def begin(self, item: str) -> None:
        """Say it, if nothing has been said for a while."""
        self.advance(0, item)

    def advance(self, amount: int, item: str) -> None:
        """Say it, if nothing has been said for a while, and else with the next."""
        interrupts.check()
        with self._mutex:
            self._amount, self._item = self._amount + amount, item
            if time.monotonic() - self._spoken >= _EVERY:
                self._say()

    def _say(self) -> None:
        self._spoken = time.monotonic()
        self._send({"advance": [self._amount, self._item]})
        self._amount = 0


def take_part(work: Work, device: str, send: Callable[[Message], object]) -> Message:
    """Take part in a merge until its output is complete, and `send` how far it is; the last message."""
    try:
        from modelmerge.hub.upload import Uploader

        prepared = prepare(
            work.recipe, device=device, recorded=work.recorded, remarks=work.remarks, stream=work.stream,
            script=work.script,
        )  # fmt: skip
        progress = Relay(send)
        with contextlib.ExitStack() as stack:
            uploader = work.push and stack.enter_context(Uploader(work.push, progress))
            how: dict[str, Any] = {"force": work.force, "uploader": uploader, "progress": progress}
            return {"manifest": execute(prepared, work.out, cluster="files", **how)}
    except ModelMergeError as error:
        return {"error": error.to_dict()}


def main() -> None:
    """Do the work that stdin has, and say how far it is on stdout; the end of stdin is that of the driver."""
    interrupts.install()
    code = 0
    try:
        channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a function of the user's prints is no message
        work, device = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_follow, daemon=True).start()

        def send(message: Message) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        send(take_part(work, device, send))
    except KeyboardInterrupt:
        code = 128 + (interrupts.received() or signal.SIGINT)
    except OSError:  # nobody listens any more
        code = 1
    interrupts.finish(code)


def _follow() -> None:
    """End when the driver ends, however it does."""
    while os.read(0, 1 << 10):  # not by a file, which Python would wait for at exit
        pass
    os.kill(os.getpid(), signal.SIGTERM)
