"""Change files of strangers at random and have them read, in a process that is watched.

    python -m tests.fuzz --seconds 600 --seed 1

Whatever is read, the outcome is to be a result or a `ModelMergeError`, within seconds and a gigabyte. All else is
counted and kept: exceptions of other kinds, messages without end, a process that dies, takes too much, or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from modelmerge.errors import ModelMergeError

SECONDS = 5.0  # of a processor, or six times as long by the clock
MEMORY = 1 << 30
LONGEST = 30_000  # letters of a message and its hint
_KEPT = 3  # inputs for each kind of failure


def main(words: Sequence[str] | None = None) -> int:
    """Run it; 1 where anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="the same seed changes the same files in the same way")
    parser.add_argument("--inputs", type=int, help="stop after so many files, whatever the time")
    parser.add_argument("--target", help="one of the targets alone")
    options = parser.parse_args(words)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    from tests.fuzz.targets import TARGETS

    if options.target is not None and options.target not in TARGETS:
        parser.error(f"there is no target '{options.target}'; there are: {', '.join(TARGETS)}")
    names = [options.target] if options.target else list(TARGETS)
    kept = Path(tempfile.mkdtemp(prefix="modelmerge-fuzz-kept-"))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where nothing waits for a disk
    with tempfile.TemporaryDirectory(prefix="modelmerge-fuzz-", dir=memory) as place:
        os.environ["MODELMERGE_CACHE"] = f"{place}/cache"
        count, kinds, hung = _run(options, names, Path(place), kept)
    for kind, number in kinds.most_common():
        print(f"{number:6} {kind}")
    if kinds:
        print(f"kept in {kept}")
    else:
        shutil.rmtree(kept)
    wrong = sum(kinds.values()) - hung
    print(f"{count} inputs over {len(names)} targets, {wrong} not deliberate, {hung} hung")
    return 1 if kinds else 0


def _run(options: argparse.Namespace, names: Sequence[str], place: Path, kept: Path) -> tuple[int, Counter[str], int]:
    """How many inputs were read, what went wrong how often, and how many hung."""
    kinds: Counter[str] = Counter()
    count = hung = 0
    worker = _Worker(place)
    if not worker.ask("build", None, 120.0).startswith("good"):
        raise SystemExit("the models cannot be made")
    end = time.monotonic() + options.seconds
    while count < options.inputs if options.inputs is not None else time.monotonic() < end:
        name = names[count % len(names)]
        outcome = worker.ask(name, f"{options.seed}/{count}", SECONDS)
        count += 1
        if outcome == "good":
            continue
        hung += outcome == "hung"
        kind = f"{name}: {outcome}"
        kinds[kind] += 1
        if kinds[kind] <= _KEPT:
            folder = kept / f"{name}-{count}"
            shutil.copytree(place / "input", folder, symlinks=True, ignore_dangling_symlinks=True)
            (folder / "STACK").write_text((place / "STACK").read_text())
            (folder / "OUTCOME").write_text(f"{kind}\n--seed {options.seed}, input {count - 1}\n", errors="replace")
    worker.stop()
    return count, kinds, hung


class _Worker:
    """A process that reads inputs, and is started anew where it hangs or dies."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._process: Any = None

    def ask(self, name: str, seed: str | None, seconds: float) -> str:
        """Have it make and read an input: good, or what went wrong."""
        if self._process is None:
            context = multiprocessing.get_context("fork")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._place), daemon=True)
            self._process.start()
            theirs.close()
        self._pipe.send((name, seed))
        start, used = time.monotonic(), self._used()[0]
        while not self._pipe.poll(0.25):
            now, memory = self._used()
            if now - used > seconds or time.monotonic() - start > 6 * seconds:
                os.kill(self._process.pid, signal.SIGUSR1)  # where it is, goes beside the input
                time.sleep(0.5)
                self.stop()
                return "hung"
            if memory > 2 * MEMORY:
                self.stop()
                return "takes more than a gigabyte"
        try:
            outcome: str = self._pipe.recv()
        except EOFError:
            self._process.join(5)
            outcome = f"the process died, exit code {self._process.exitcode}"
            self.stop()
        if outcome.startswith("takes"):
            self.stop()  # a peak stays
        return outcome

    def _used(self) -> tuple[float, int]:
        """Seconds of processors and bytes of memory that the process uses."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
            return ticks, int(words[21]) * os.sysconf("SC_PAGE_SIZE")
        return 0.0, 0

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Connection, place: Path) -> None:
    """Answer until the other side is gone. Nothing is to be seen of it."""
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    faulthandler.register(signal.SIGUSR1, (place / "STACK").open("w"), all_threads=True)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            name, seed = pipe.recv()
            pipe.send(_build(place) if seed is None else _read(place, name, seed))


def _build(place: Path) -> str:
    from tests.fuzz.targets import build

    work = place / "input"
    work.mkdir()
    os.chdir(work)
    build()
    shutil.copytree(work, place / "whole")
    return "good"


def _read(place: Path, name: str, seed: str) -> str:
    """Change one or two files of a target, have them read, and put them back."""
    from tests.fuzz.targets import TARGETS

    work, target, rng = place / "input", TARGETS[name], Random(f"{seed}/{name}")
    os.chdir(work)
    for file in {file for each in TARGETS.values() for file in each.files}:
        if (place / "changed").exists() or not (work / file).exists():
            shutil.copyfile(place / "whole" / file, work / file)
    (place / "changed").touch()
    files = list(target.files)
    for file in rng.sample(files, rng.choice((1, min(2, len(files))))):
        (work / file).write_bytes(target.files[file]((place / "whole" / file).read_bytes(), rng))
    try:
        target.read(rng.random() < 0.7)
        outcome = "good"
    except ModelMergeError as error:
        length = len(f"{error.message} {error.hint}")
        outcome = "good" if length <= LONGEST else f"a message of {length} letters ({type(error).__name__})"
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/modelmerge/" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "nowhere"
        outcome = f"{type(error).__name__} in {where}: {str(error)[:100]!r}"
        (place / "input" / "TRACEBACK").write_text(traceback.format_exc(), errors="replace")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
        return "takes more than a gigabyte"
    return outcome


if __name__ == "__main__":
    sys.exit(main())
