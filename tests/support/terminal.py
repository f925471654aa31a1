"""Commands in a terminal of their own, as a person sees them."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.processes import PATIENCE, running


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


class Shell:
    """A shell in a terminal, which lives as long as the block; it is typed into.

    Args:
        name: bash or zsh.
        place: Where it is started.
        environment: Its variables.
    """

    def __init__(self, name: str, place: Path, environment: Mapping[str, str]) -> None:
        self.name, self._place, self._environment = name, place, dict(environment)

    def __enter__(self) -> Shell:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [self.name, "-i"], cwd=self._place, env=self._environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def completed(self, line: str) -> list[str]:
        """The words of a line after a tab behind it, as the shell itself takes them."""
        start_of_line = "\x01"
        os.write(self._ours, f"{line}\t{start_of_line}printf '<%s>' \n".encode())
        said = self._read(r"<modelmerge>(<[^<>\n]*>)*")
        return re.findall(r"<([^<>]*)>", said)

    def shown(self, line: str, until: str) -> str:
        """What the shell shows after a tab behind a line, until it shows that pattern."""
        os.write(self._ours, f"{line}\t".encode())
        return self._read(f"(?s:.*){until}")

    def _read(self, pattern: str) -> str:
        said, end = "", time.monotonic() + PATIENCE
        while (found := re.search(pattern, said)) is None:
            assert select.select([self._ours], [], [], max(end - time.monotonic(), 0))[0], said
            said += os.read(self._ours, 4096).decode()
        return found[0]
