"""Commands in a terminal of their own, as a person sees them."""

from __future__ import annotations

import os
import pty
import threading
from collections.abc import Sequence

from tests.support.processes import running


def seen(words: Sequence[str]) -> tuple[str, str, int]:
    """What `modelmerge WORDS...` shows in a terminal on stderr, what it writes to stdout, and its exit code."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                shown.append(part)
        except OSError:  # the terminal's other end closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with running(words, terminal=os.ttyname(theirs), environment={"TERM": "xterm", "COLUMNS": "160"}) as run:
            code, out = run.end(), run.out()
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return b"".join(shown).decode(), out, code
