"""Commands in a terminal of their own, as a person sees them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Sequence


def seen(words: Sequence[str]) -> tuple[str, str, int]:
    """What `modelmerge WORDS...` shows in a terminal on stderr, what it writes to stdout, and its exit code."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "modelmerge", *words]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True, env=environment) as child:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the terminal's other end closed
            pass
        out = child.communicate()[0]
    os.close(ours)
    return shown.decode(), out, child.returncode
