"""The machine that changes files of strangers at random: it runs for a while, and what is planted is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

PLANTED = """
import sys
from modelmerge.verbs import verify
from tests.fuzz.__main__ import main
right = verify.read_manifest

def wrong(file, kind):
    return right(file, kind)["inputs"]["nothing"]

def slow(file, kind):
    while True:
        pass

verify.read_manifest = {reader}
import tests.fuzz.__main__ as machine
machine.SECONDS = 0.5
sys.exit(main(["--inputs", "{inputs}", "--target", "verify"]))
"""


def fuzz(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, env=environment)


def test_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "-m", "tests.fuzz", "--seconds", "10", "--seed", str(os.getpid()))
    last = re.fullmatch(rf"(\d+) inputs over {len(TARGETS)} targets, 0 not deliberate, 0 hung", done.stdout.strip())
    assert last is not None, done.stdout + done.stderr
    assert done.returncode == 0
    assert int(last[1]) >= len(TARGETS)


def test_an_error_that_nobody_meant_is_found(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "-c", PLANTED.format(reader="wrong", inputs=30))
    assert done.returncode == 1, done.stderr
    assert "KeyError in " in done.stdout
    count = int(re.search(r"30 inputs over 1 targets, (\d+) not deliberate, 0 hung", done.stdout)[1])  # type: ignore[index]
    assert count > 0
    (kept,) = tmp_path.glob("modelmerge-fuzz-kept-*")
    outcomes = [file.read_text() for file in kept.glob("verify-*/OUTCOME")]
    assert any("KeyError" in outcome for outcome in outcomes)


@pytest.mark.slow
def test_a_reader_that_hangs_is_found_and_the_run_goes_on(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "-c", PLANTED.format(reader="slow", inputs=2))
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("2 inputs over 1 targets, 0 not deliberate, 2 hung\n")


def test_there_are_targets_enough() -> None:
    assert len(TARGETS) >= 10
