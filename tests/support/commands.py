"""Command lines: run in this process, and scripts about what a new process does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelmerge.cli import main
from tests.support.guides import ROOT


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """The exit code of `modelmerge WORDS...`, and what it writes to stdout and to stderr."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """The error and the hint of a command that fails as it should: one line each."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 2, err
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def script(text: str) -> Any:
    """A Python program in a new process, to its end."""
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)


def program(folder: Path) -> dict[str, str]:
    """The variables of a shell in which `modelmerge` is the one that is tested; it is put into that folder."""
    folder.mkdir(exist_ok=True)
    file = folder / "modelmerge"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -m modelmerge "$@"\n')
    file.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def import_no_torch(*lines: Sequence[str]) -> None:
    """Fail unless `modelmerge WORDS...` of each line leaves torch alone, in a process where nothing imported it."""
    done = script(
        "import sys, modelmerge.cli\n"
        f"for words in {[list(words) for words in lines]}:\n"
        "    modelmerge.cli.main(words)\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    assert done.returncode == 0, done.stderr
