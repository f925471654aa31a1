"""Runs that are killed, stopped and starved of room by the hundred, and what they leave: `python -m tests.soak`.

One process imports torch, and every run is a fork of it that goes on as `python -m modelmerge` does. A run is struck
at a random moment or before one of its file operations: it is killed, sent a signal, told that the disk is full, or has
an input changed under it; or another run writes into the same output. What lies at the output afterwards must be
nothing, the old content, or the whole new one, and the next run must succeed, with the right bits and nothing beside.
With `--merges` three processes share each merge out instead: `tests.soak_shared`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads cannot be forked

import argparse
import contextlib
import errno
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.__main__ import run as run_program
from modelmerge.checkpoint import publication
from modelmerge.checkpoint.output import is_recorded
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from tests.support.checkpoints import base_state, family, write

MODELS = ("{models}/base", "{models}/expert_0", "{models}/expert_1")
CASES: dict[str, tuple[str, ...]] = {
    "ties": ("merge", "ties", *MODELS, "--max-shard-size", "2kB"),
    "average": ("merge", "average", *MODELS),
    "apgd": ("merge", "apgd", *MODELS, "--max-shard-size", "2kB"),
    "awd, then ties": ("merge", "ties", *MODELS, "--disentangle", "awd alpha=0.2", "--max-shard-size", "2kB"),
    "mergekit": ("merge", "--recipe", "{models}/mergekit.yaml"),
    "adapter": ("merge", "task-arithmetic", *MODELS, "--as-lora", "4", "--include", "*layers*"),
    "extract": ("extract", *MODELS, "--max-shard-size", "2kB"),
    "extract, low-rank": ("extract", *MODELS, "--rank", "4"),
    "disentangle": ("disentangle", "awd", *MODELS, "--experts"),
    "search": ("search", "task-arithmetic", *MODELS, "--try", "scale=0.2,0.4", "--on", "custom:{models}/metric.py:f"),
}  # fmt: skip
CARD_CASE = "card and report"  # of an output that is there: eval writes into it
FLAGS = ((), ("--force",), ("--resume",), ("--force", "--resume"))
NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PATIENCE = 60.0  # seconds until a run counts as hanging
LAST = 40  # operations of a run, among which it puts its output in place


@dataclass
class Strike:
    """What befalls a run: `what` at the `at`th of its file operations, or after `seconds`."""

    what: str  # nothing, kill, signal, full, change
    at: int = 0
    seconds: float | None = None
    number: int = signal.SIGKILL
    file: Path | None = None


@dataclass
class End:
    """How a run ended: its exit code, negative for a signal, and its stderr."""

    code: int
    err: str
    operations: int
    seconds: float


# --- a run ---


class Operations:
    """Counts a process's file operations at a place, and strikes before one of them."""

    def __init__(self, place: Path, strike: Strike) -> None:
        self._place, self._strike = str(place), strike
        self._mutex = threading.Lock()
        self.count = 0

    def watch(self) -> None:
        """From now on."""
        sys.addaudithook(self._hear)
        for name in ("pwrite", "fsync", "posix_fallocate", "ftruncate"):
            setattr(os, name, self._counted(getattr(os, name)))
        publication._exchange = self._counted(publication._exchange)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any) -> Any:
            self._step(writes=True)
            return call(*words)

        return counted

    def _hear(self, event: str, words: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return
        path = os.fsdecode(words[0]) if isinstance(words[0], (str, bytes, os.PathLike)) else ""
        if not path.startswith(self._place) and (event == "open" or path.startswith("/")):
            return  # of others' files; what goes by a name alone is in a directory that is being removed
        if event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._step(writes=event in ("open", "os.mkdir", "os.rename"))

    def _step(self, *, writes: bool) -> None:
        with self._mutex:
            self.count += 1
            now = self.count >= self._strike.at > 0 if self._strike.what == "full" else self.count == self._strike.at
        if not now:
            return
        if self._strike.what in ("kill", "signal"):
            os.kill(os.getpid(), self._strike.number)
        elif self._strike.what == "change":
            assert self._strike.file is not None
            content = bytearray(self._strike.file.read_bytes())
            content[-1] ^= 1
            self._strike.file.write_bytes(content)
        elif self._strike.what == "full" and writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Running:
    """A fork of this process that runs a command line."""

    def __init__(self, words: Sequence[str], place: Path, log: Path, strike: Strike, *, exchange: bool = True) -> None:
        self._log, self._started = log, time.monotonic()
        log.write_bytes(b"")
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                code = self._become(words, place, strike, exchange)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.flush()
                os._exit(code)
        self._strike = strike

    def _become(self, words: Sequence[str], place: Path, strike: Strike, exchange: bool) -> int:
        for descriptor, name in ((0, Path(os.devnull)), (1, Path(os.devnull)), (2, self._log)):
            opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(opened, descriptor)
            os.close(opened)
        for number in NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not exchange:
            publication._exchange = lambda *paths: False
        operations = Operations(place, strike)
        operations.watch()
        sys.argv = ["modelmerge", *words]
        try:
            run_program()
        except SystemExit as end:
            self._log.with_suffix(".count").write_text(str(operations.count))
            return int(end.code or 0)
        raise AssertionError("a program ends by SystemExit")

    def said(self) -> str:
        """What it has written to stderr so far."""
        return self._log.read_text(errors="replace")

    def end(self) -> End:
        """Strike, if that is to be from here, and wait for the end."""
        if self._strike.seconds is not None:
            time.sleep(max(self._started + self._strike.seconds - time.monotonic(), 0))
            os.kill(self.pid, self._strike.number)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - self._started > PATIENCE:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return End(-1000, f"hangs: {self._log.read_text(errors='replace')}", 0, PATIENCE)
            time.sleep(0.002)
        count, err = self._log.with_suffix(".count"), self._log.read_text(errors="replace")
        operations = int(count.read_text()) if count.exists() else 0
        count.unlink(missing_ok=True)
        return End(os.waitstatus_to_exitcode(status), err, operations, time.monotonic() - self._started)


# --- what is left ---


def content(directory: Path) -> dict[str, str]:
    """By place, the sha256 of every file below a directory."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def weights(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


@dataclass
class Soak:
    """The trials, and what has come of them."""

    root: Path
    draw: random.Random
    kills: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    bits: dict[str, dict[str, str]] = field(default_factory=dict)  # by case, the weights that are right
    lengths: dict[Any, End] = field(default_factory=dict)  # by case, flags and exchange, a run that nothing befell
    broken: int = 0
    lost: int = 0
    strays: int = 0
    trials: int = 0

    def __post_init__(self) -> None:
        self.models, self.old = self.root / "models", self.root / "old"
        family(self.models, experts=2)
        write(self.old, base_state(seed=9), shards=2)
        (self.old / "sub").mkdir()
        (self.old / "sub" / "precious").write_text("mine")
        self.old_content = content(self.old)
        (self.models / "metric.py").write_text(
            "def f(model):\n    return float(sum(t.double().abs().sum() for t in model.values() if t.numel()))\n"
        )
        slices = "".join(f"  - model: {self.models}/expert_{i}\n" for i in range(2))
        (self.models / "mergekit.yaml").write_text(
            f"merge_method: task_arithmetic\nbase_model: {self.models}/base\nmodels:\n{slices}"
            "parameters:\n  weight: 0.5\n"
        )
        self.done = self.root / "done" / "out"  # what cards are written into
        code = main(["merge", "average", *(word.format(models=self.models) for word in MODELS), "-o", str(self.done)])
        assert code == 0

    # one trial

    def trial(self) -> None:
        """One output, struck once or a few times, and the run after that."""
        self.trials += 1
        case = self.draw.choice([*CASES, CARD_CASE])
        place = self.root / f"trial-{self.trials}"
        place.mkdir()
        try:
            if case == CARD_CASE:
                self._card(place)
            else:
                flags = self.draw.choice(FLAGS if case != "search" else FLAGS[:2])
                self._output(case, flags, place, exchange=self.draw.random() < 0.6)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _output(self, case: str, flags: Sequence[str], place: Path, *, exchange: bool) -> None:
        usual = self._usual(case, flags, exchange)
        out, models = place / "out", self.models
        # A YAML names its models itself: others that lie here it does not see.
        chances = [12, 3, 3, int(case != "mergekit"), 1]
        what = self.draw.choices(["kill", "signal", "full", "change", "two"], chances)[0]
        if what == "change":
            models = place / "models"
            shutil.copytree(self.models, models)
        words = [*(word.format(models=models) for word in CASES[case]), *flags, "-o", str(out)]
        if "--force" in flags:
            shutil.copytree(self.old, out)
        label = f"{case} {' '.join(flags)} {'exchange' if exchange else 'renames'}"
        for _ in range(self.draw.choice([1, 1, 1, 2, 3]) if what == "kill" else 1):
            if not flags and self._state(case, out) == "new":
                break  # the next would be refused
            strike = self._drawn(what, usual, models)
            self.counts[what] += 1
            runs = [Running(words, place, self.root / "log", strike, exchange=exchange)]
            if what == "two":
                runs.append(Running(words, place, self.root / "log2", Strike("nothing"), exchange=exchange))
            ends = [run.end() for run in runs]
            self._judge_strike(f"{label} {strike}", case, flags, place, strike, ends)
        self._next(label, case, flags, place, words, exchange)

    def _next(
        self, label: str, case: str, flags: Sequence[str], place: Path, words: Sequence[str], exchange: bool
    ) -> None:
        """The run after all that."""
        before = self._state(case, place / "out")
        end = Running(words, place, self.root / "log", Strike("nothing"), exchange=exchange).end()
        changed = (place / "models").exists()
        # Rightly: the run before had put the whole output in place.
        refused = before == "new" and (not flags or (changed and "--force" not in flags))
        if refused != (end.code == 1) or end.code not in (0, 1):
            self._blame("broken", f"the run after {label} ends with {end.code}: {end.err}")
        state = self._state(case, place / "out", bits=not changed)
        if state != "new":
            self._blame("broken", f"after the run after {label} the output is {state}")
        beside = self._beside(place)
        if beside:
            self._blame("strays", f"after the run after {label} (before: {before}) there are {beside}")

    def _judge_strike(
        self, label: str, case: str, flags: Sequence[str], place: Path, strike: Strike, ends: Sequence[End]
    ) -> None:
        out, codes = place / "out", [end.code for end in ends]
        killed = -signal.SIGKILL in codes
        self.kills += killed
        state = self._state(case, out)
        if killed and state == "new":
            self.counts["kills after the output was in place"] += 1
        allowed = ["old", "new"] if "--force" in flags else ["absent", "new"]
        if state not in allowed:
            beside = place / ".out.modelmerge-old"
            if state != "absent":
                self._blame("broken", f"after {label} the output is {state}: {codes}")
            elif content(beside) != self.old_content or not (killed or f"is in {beside}" in ends[0].err):
                self._blame("lost", f"after {label} the old content is gone: {codes}")
        if killed:
            return
        said = "".join(end.err for end in ends)
        if "Traceback" in said or "Exception ignored" in said:
            self._blame("broken", f"{label} says {said}")
        expected = {"kill": {0}, "signal": {0, NUMBERS.get(signal.Signals(strike.number))}, "full": {0, 1},
                    "change": {0, 1}, "two": {0, 1}}[strike.what]  # fmt: skip
        if not expected.issuperset(codes) or (strike.what == "two" and 0 not in codes):
            self._blame("broken", f"{label} ends with {codes}: {said}")
        if strike.what == "change" and codes == [1] and "expert_1" not in said:
            self._blame("broken", f"{label} does not name the file: {said}")
        if 0 in codes and state != "new":
            self._blame("broken", f"{label} ends with {codes}, and the output is {state}")
        beside = self._beside(place)
        allowed = [".out.modelmerge"] * ("--resume" in flags) + [".out.modelmerge-old"] * (state == "absent")
        if not set(beside) <= set(allowed):
            self._blame("strays", f"after {label} with {codes} there are {beside}")

    def _drawn(self, what: str, usual: End, models: Path) -> Strike:
        first = max(1, usual.operations - LAST) if self.draw.random() < 0.5 else 1
        at = self.draw.randint(first, usual.operations)
        number = signal.SIGKILL if what == "kill" else self.draw.choice(list(NUMBERS))
        if what == "kill" and self.draw.random() < 0.3:
            return Strike(what, seconds=self.draw.uniform(0, usual.seconds))
        if what == "signal" and self.draw.random() < 0.3:  # later than the handlers are there
            return Strike(what, seconds=self.draw.uniform(0.05, 0.05 + usual.seconds), number=number)
        if what == "two":
            return Strike(what, seconds=self.draw.uniform(0, usual.seconds), number=signal.SIGCONT)
        return Strike(what, at, number=number, file=models / "expert_1" / "model.safetensors")

    def _usual(self, case: str, flags: Sequence[str], exchange: bool) -> End:
        """A run that nothing befalls: how many operations it has, how long it takes, and which bits are right."""
        key = (case, tuple(flags), exchange)
        if key not in self.lengths:
            place = self.root / "usual"
            place.mkdir()
            if "--force" in flags:
                shutil.copytree(self.old, place / "out")
            words = [*(word.format(models=self.models) for word in CASES[case]), *flags, "-o", str(place / "out")]
            end = Running(words, place, self.root / "log", Strike("nothing"), exchange=exchange).end()
            assert end.code == 0, end.err
            bits = weights(content(place / "out"))
            assert self.bits.setdefault(case, bits) == bits, f"{key}: other bits"
            assert self._state(case, place / "out") == "new"
            shutil.rmtree(place)
            self.lengths[key] = end
        return self.lengths[key]

    def _state(self, case: str, out: Path, *, bits: bool = True) -> str:
        if not out.exists() or not any(out.iterdir()):
            return "absent"
        found = content(out)
        if found == self.old_content:
            return "old"
        try:
            files = json.loads((out / MANIFEST).read_bytes())["files"]
            wrong = [name for name, entry in files.items() if not is_recorded(out / name, entry)]
        except (OSError, ValueError, KeyError) as error:
            return f"neither old nor new ({error}): {sorted(found)}"
        if found.keys() != {*files, MANIFEST} or wrong:
            return f"not what its manifest says: {wrong or found.keys() ^ {*files, MANIFEST}}"
        return "new" if not bits or weights(found) == self.bits[case] else "of other bits"

    def _beside(self, place: Path) -> list[str]:
        return sorted({file.name for file in place.iterdir()} - {"out", "models", "page.html"})

    # cards and reports

    def _card(self, place: Path) -> None:
        """A finished output, whose card gets scores."""
        out, page = place / "out", place / "page.html"
        shutil.copytree(self.done, out)
        script = f"{self.models / 'metric.py'}:f"
        words = ["eval", "custom", str(out), "--script", script, "--update-card", "--report", str(page), "--json"]
        self.counts["kill"] += 1
        strike = Strike("kill", self.draw.randint(1, 24))
        end = Running(words, place, self.root / "log", strike).end()
        self.kills += end.code == -signal.SIGKILL
        self._judge_card(f"{CARD_CASE} {strike}", out, page, strays=False)
        end = Running(words, place, self.root / "log", Strike("nothing")).end()
        if end.code:
            self._blame("broken", f"the run after {CARD_CASE} {strike} ends with {end.code}: {end.err}")
        self._judge_card(f"the run after {CARD_CASE} {strike}", out, page, strays=True)

    def _judge_card(self, label: str, out: Path, page: Path, *, strays: bool) -> None:
        files = json.loads((out / MANIFEST).read_bytes())["files"]
        wrong = [name for name, entry in files.items() if not is_recorded(out / name, entry)]
        if wrong or (page.exists() and not page.read_text().rstrip().endswith("</html>")):
            self._blame("broken", f"after {label} {wrong or page.name} is damaged")
        beside = self._beside(out.parent) + sorted(content(out).keys() - {*files, MANIFEST})
        if strays and beside:
            self._blame("strays", f"after {label} there are {beside}")

    def _blame(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        print(f"{kind}: {what}", flush=True)


def _room() -> Path:
    """A folder, with a cache and a place for temporary files in it that this process and its forks have."""
    root = Path(tempfile.mkdtemp(prefix="modelmerge-soak-"))  # no TemporaryDirectory: forks would clear it at exit
    os.environ |= {"MODELMERGE_CACHE": f"{root}/cache", "TMPDIR": f"{root}/tmp"}
    (root / "tmp").mkdir()
    tempfile.tempdir = None
    return root


def soak(kills: int, seconds: float, seed: int) -> int:
    """Strike until there are so many kills or the time is over; 1 if anything was wrong."""
    root = _room()
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            trials, end = Soak(root, random.Random(seed)), time.monotonic() + seconds
        while trials.kills < kills and time.monotonic() < end:
            trials.trial()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(trials.counts.items()))
    print(f"{trials.trials} trials, seed {seed}: {counts}")
    print(f"{trials.kills} kills, {trials.broken} broken outputs, {trials.lost} lost, {trials.strays} strays")
    return int(bool(trials.broken or trials.lost or trials.strays))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="end after so many runs that were killed")
    parser.add_argument("--merges", type=int, help="share merges out, and end after so many")
    parser.add_argument("--minutes", type=float, default=60, help="or after so long")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.merges is None:
        sys.exit(soak(options.kills, 60 * options.minutes, options.seed))
    from tests import soak_shared

    sys.exit(soak_shared.soak(_room(), options.merges, 60 * options.minutes, options.seed))
