"""Merges that three processes share out while some of them are killed or stopped: `python -m tests.soak --merges 100`.

Method, options and moments are drawn. A worker is killed, or stopped beyond its lease and woken again, before one of
its file operations; another comes in its place. Every weight file must have the sha256 of one process's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.engine import corrections, shared_vector, survey, units, vectors
from modelmerge.methods import registry
from tests.soak import PATIENCE, Running, Strike, content, weights
from tests.support.checkpoints import family

LEASE = 0.6  # seconds
WORKERS = 3
STRIKES = 2  # of a merge: what three processes have died of ends it, rightly
FRONTS = ("awd alpha=0.2", "awd granularity=model", "apgd", "apgd correction=task")


@dataclass
class Worker:
    """A process that takes part, and what befalls it."""

    running: Running
    strike: Strike
    asleep: float | None = None  # since when

    def poll(self) -> int | None:
        """Its exit code once it has ended; wake it when it has slept beyond its lease."""
        pid, status = os.waitpid(self.running.pid, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            self.asleep = time.monotonic()
        elif pid:
            return os.waitstatus_to_exitcode(status)
        if self.asleep is not None and time.monotonic() - self.asleep > 1.5 * LEASE:
            self.asleep = None
            os.kill(self.running.pid, signal.SIGCONT)
        return None


@dataclass
class SharedSoak:
    """The merges, and what has come of them."""

    root: Path
    draw: random.Random
    merges: int = 0
    kills: int = 0
    stops: int = 0
    bits: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ["MODELMERGE_LEASE"] = str(LEASE)
        for module in (units, survey, shared_vector, corrections, vectors):  # as large models have them
            for name in ("LITTLE", "MUCH"):
                if hasattr(module, name):
                    setattr(module, name, 1)
        self.models = family(self.root / "models", experts=3)

    def merge(self) -> str | None:
        """One merge, of which a line is printed; what is wrong with it, if anything is."""
        self.merges += 1
        place = self.root / f"merge-{self.merges}"
        place.mkdir()
        words, want = self._drawn(place)
        started, lines, workers = time.monotonic(), [], []
        strikes = [self._strike() for _ in range(self.draw.randint(0, STRIKES))]
        number = 0

        def begin() -> None:
            nonlocal number
            strike = strikes.pop() if strikes else Strike("nothing")
            log = place / f"log-{number}"
            number += 1
            command = [*words, "-o", str(place / "out"), "--cluster", "files"]
            workers.append(Worker(Running(command, place, log, strike), strike))

        for _ in range(WORKERS):
            begin()
        wrong = None
        while workers and wrong is None:
            for worker in [*workers]:
                was_awake, code = worker.asleep is None, worker.poll()
                if worker.asleep is not None and was_awake:
                    self.stops += 1
                    lines.append(f"stopped at operation {worker.strike.at}")
                if code is None:
                    continue
                workers.remove(worker)
                if code == -signal.SIGKILL and worker.strike.number == signal.SIGKILL:
                    self.kills += 1
                    lines.append(f"killed at operation {worker.strike.at}")
                    begin()
                elif code:
                    wrong = f"a worker ends with {code}: {worker.running.said()}"
            if time.monotonic() - started > PATIENCE:
                wrong = f"hangs: {[worker.running.said() for worker in workers]}"
            time.sleep(0.005)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.running.pid, signal.SIGKILL)
                os.waitpid(worker.running.pid, 0)
        wrong = wrong or self._judged(place, want)
        how = ", ".join(lines) or "undisturbed"
        what = " ".join(word for word in words if word not in map(str, self.models))
        line = f"{self.merges}: {what}: {how}: {time.monotonic() - started:.1f} s"
        print(f"{line}: {wrong or f'{len(want)} files the same'}", flush=True)
        if wrong is None:
            shutil.rmtree(place)
        return wrong

    def _judged(self, place: Path, want: dict[str, str]) -> str | None:
        out = place / "out"
        found = content(out)
        if weights(found) != want:
            differ = sorted(name for name in want.keys() | weights(found).keys() if want.get(name) != found.get(name))
            return f"other bytes in {differ}"
        manifest = json.loads((out / MANIFEST).read_bytes())
        if found.keys() != {*manifest["files"], MANIFEST} or not manifest["workers"]:
            return f"not what its manifest says: {found.keys() ^ {*manifest['files'], MANIFEST}}"
        beside = sorted(path.name for path in place.iterdir() if path.name.startswith("."))
        return f"there are {beside} beside it" if beside else None

    def _strike(self) -> Strike:
        number = self.draw.choice([signal.SIGKILL, signal.SIGSTOP])
        return Strike("signal", self.draw.randint(1, self.draw.choice([20, 60, 200])), number=number)

    def _drawn(self, place: Path) -> tuple[list[str], dict[str, str]]:
        """A command line that one process can do, without its output, and the weights that it writes."""
        while True:
            words = self._words()
            if tuple(words) not in self.bits:
                alone = Running([*words, "-o", str(place / "alone")], place, place / "log", Strike("nothing")).end()
                if alone.code not in (0, 1, 2):
                    raise AssertionError(f"{' '.join(words)} ends with {alone.code}: {alone.err}")
                self.bits[tuple(words)] = weights(content(place / "alone")) if alone.code == 0 else {}
                shutil.rmtree(place / "alone", ignore_errors=True)
            if self.bits[tuple(words)]:  # else the method has no such options
                return words, self.bits[tuple(words)]

    def _words(self) -> list[str]:
        size = ("--max-shard-size", self.draw.choice(["1kB", "2kB", "4kB"]))
        if self.draw.random() < 0.2:
            low: Sequence[str] = self.draw.choice([(), ("--rank", "2"), ("--energy", "0.9")])
            return ["extract", *map(str, self.models), *size, *low]
        method = self.draw.choice(registry.data_free())
        most = registry.load(method).most_experts or 3
        words = ["merge", method, *map(str, self.models[: 1 + most]), *size]
        words += ["--dtype", "bfloat16"] if self.draw.random() < 0.3 else []
        words += ["--seed", str(self.draw.randint(0, 3))] if self.draw.random() < 0.3 else []
        return words + (["--disentangle", self.draw.choice(FRONTS)] if most > 1 and self.draw.random() < 0.3 else [])


def soak(root: Path, merges: int, seconds: float, seed: int) -> int:
    """Share merges out until there are so many or the time is over; 1 at the first that is wrong, which is kept."""
    trials, end = SharedSoak(root, random.Random(seed)), time.monotonic() + seconds
    wrong = None
    while trials.merges < merges and time.monotonic() < end and wrong is None:
        wrong = trials.merge()
    print(f"{trials.merges} merges, seed {seed}: {trials.kills} kills, {trials.stops} stops, {int(bool(wrong))} wrong")
    if wrong is None:
        shutil.rmtree(root, ignore_errors=True)
    else:
        print(f"what there is of it is in {root}")
    return int(wrong is not None)
