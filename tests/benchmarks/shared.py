"""What it costs to share a merge out, and what is lost with a process: `python -m tests.benchmarks.shared`.

Real processes of `merge --cluster files` on one machine, each with one thread. Bytes, memory and processor seconds hold
on a busy machine too; seconds of the clock are said beside the load under which they were taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.generate import generate
from tests.benchmarks.merge_speed import machine
from tests.benchmarks.promises import shapes
from tests.support.checkpoints import write

LEASE = 3.0
# Runs the command line, and writes down what the process has used.
RUNNER = """
import json, os, sys
from modelmerge.__main__ import run
place, sys.argv = sys.argv[1], ["modelmerge", *sys.argv[2:]]
leave = os._exit
def end(code):
    read, times = int(open("/proc/self/io").readline().split()[1]), os.times()
    with open(place, "w") as file:
        json.dump({"read": read, "cpu": times.user + times.system}, file)
    leave(code)
os._exit = end
try:
    run()
except SystemExit as error:
    end(error.code or 0)
"""


@dataclass
class Worker:
    """A process that runs a command line, and the most anonymous memory it was seen with."""

    place: Path
    process: subprocess.Popen[str]
    peak: int = 0

    def look(self) -> bool:
        """Whether it is still there."""
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            anonymous = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            self.peak = max([self.peak, *anonymous])
        return self.process.poll() is None

    @property
    def used(self) -> dict[str, float]:
        found: dict[str, float] = json.loads(self.place.read_text())
        return found


@dataclass
class Trip:
    """A run of one or more processes."""

    workers: list[Worker]
    seconds: float = 0.0
    peaks: list[int] = field(default_factory=list)

    def total(self, what: str) -> float:
        return sum(worker.used[what] for worker in self.workers)


def start(words: Sequence[object], place: Path) -> Worker:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MODELMERGE_LEASE": str(LEASE),
                   "MODELMERGE_CACHE": str(place.parent / f"cache-{place.name}")}  # fmt: skip
    words = [*words, *([] if "--json" in words else ["--quiet"])]
    command = [sys.executable, "-c", RUNNER, str(place), *map(str, words)]
    return Worker(place, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))


def go(words: Sequence[object], count: int, root: Path, watch: Callable[[list[Worker]], object] = len) -> Trip:
    """Run the same line so many times at once; `watch` sees the processes every few milliseconds."""
    begun = time.monotonic()
    workers = [start(words, root / f"used-{time.monotonic_ns()}-{i}") for i in range(count)]
    while sum(worker.look() for worker in workers):
        watch(workers)
        time.sleep(0.005)
    return Trip(workers, time.monotonic() - begun, [worker.peak for worker in workers])


def promised(words: Sequence[object], root: Path) -> tuple[int, float]:
    """The memory that the plan promises, and the bytes that a process reads to make a plan."""
    worker = start([*words, "-n", "--json"], root / f"used-{time.monotonic_ns()}")
    plan = json.loads(worker.process.communicate()[0])["plan"]
    return plan["peak_memory"]["host"], worker.used["read"]


def merge(method: str, models: Sequence[Path], out: Path, *more: object) -> list[object]:
    return ["merge", method, *models, "-o", out, "--device", "cpu", *more]


def bytes_and_memory(root: Path, models: Sequence[Path], method: str, count: int) -> str:
    """A row: what `count` processes read and hold against one."""
    words = merge(method, models, root / "out", "--max-shard-size", "20MB")
    host, beside = promised(words, root)
    trips = []
    for number in (1, count):
        trips.append(go([*words, "--cluster", "files"], number, root))
        shutil.rmtree(root / "out")
    one, several = (trip.total("read") - len(trip.workers) * beside for trip in trips)
    peak = max(peak for trip in trips for peak in trip.peaks)
    return (f"| `{method}` | {count} | {one / 1e6:.0f} | {several / 1e6:.0f} | {several / one:.3f} | {peak / 1e6:.0f} "
            f"| {host / 1e6:.0f} | {trips[0].total('cpu'):.1f} | {trips[1].total('cpu'):.1f} |")  # fmt: skip


def speed_up(root: Path, models: Sequence[Path], times: int) -> str:
    """Rows: two processes of kron against one."""
    rows = []
    for _ in range(times):
        trips = []
        for number in (1, 2):
            words = merge("kron", models, root / "out", "--max-shard-size", "2MB", "--cluster", "files")
            trips.append(go(words, number, root))
            workers = json.loads((root / "out" / "modelmerge.json").read_text())["workers"]
            shutil.rmtree(root / "out")
        one, two = trips
        busy = " + ".join(f"{worker['seconds']:.1f}" for worker in workers)
        load = os.getloadavg()[0]
        cells = (one.seconds, two.seconds, one.seconds / two.seconds, one.total("cpu"), two.total("cpu"))
        rows.append(f"| {' | '.join(f'{cell:.2f}' for cell in cells)} | {busy} | {load:.1f} |")
    return "\n".join(rows)


def finish(root: Path, files: int) -> str:
    """From the last of so many weight files to the finished output."""
    models = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        state = {f"layers.{j}.fc.weight": torch.randn(64, 64, generator=generator).bfloat16() for j in range(files)}
        models.append(write(root / f"small-{i}", state))
    out, last, there = root / "out", 0.0, 0.0
    units = root / ".out.modelmerge-work" / "units"

    def watch(workers: list[Worker]) -> None:
        nonlocal last, there
        if out.exists():
            there = there or time.time()
            return
        with contextlib.suppress(OSError):
            last = max([last, *(file.stat().st_mtime for file in units.glob("shard*.json"))])

    trip = go(merge("ties", models, out, "--max-shard-size", "9kB", "--cluster", "files"), 2, root, watch)
    written = len(list(out.glob("*.safetensors")))
    shutil.rmtree(out)
    took = f"{there - last:.2f} s from the last of them to the output, {trip.seconds:.1f} s in all"
    return f"{written} weight files: {took}, at a load of {os.getloadavg()[0]:.1f}."


def death(root: Path, models: Sequence[Path]) -> str:
    """One of two processes is killed in the middle of a weight file."""
    out, killed, theirs, taken, longest = root / "out", 0.0, "", 0.0, 0.0
    units = root / ".out.modelmerge-work" / "units"

    def watch(workers: list[Worker]) -> None:
        nonlocal killed, theirs, taken, longest
        with contextlib.suppress(OSError, json.JSONDecodeError):
            for file in units.glob("shard*.claim-*"):
                marker = file.with_name(file.name.partition(".claim-")[0] + ".json")
                if marker.exists():
                    continue
                long = time.time() - _birth(file)
                longest = max(longest, long if file.name != theirs else 0.0)
                if not killed and long > 0.3 and f"-{workers[0].process.pid}-" in file.read_text():
                    workers[0].process.send_signal(signal.SIGKILL)
                    killed, theirs = time.time(), file.name
            if killed and not taken and (units / theirs.replace(".claim-1", ".claim-2")).exists():
                taken = time.time()

    words = merge("kron", models, out, "--max-shard-size", "2MB", "--cluster", "files")
    begun = time.monotonic()
    go(words, 2, root, watch)
    took = time.monotonic() - begun
    manifest = json.loads((out / "modelmerge.json").read_text())
    workers = [f"{worker['units']} units" for worker in manifest["workers"]]
    shutil.rmtree(out)
    return (f"One of two is killed at a weight file: {taken - killed:.1f} s later the other takes that file over; the "
            f"lease is {LEASE:g} s, the longest file took {longest:.1f} s. {took:.1f} s in all; "
            f"in the manifest: {', '.join(workers)}.")  # fmt: skip


_births: dict[str, float] = {}


def _birth(file: Path) -> float:
    """When the file was first seen: its own time is moved on while its unit is done."""
    return _births.setdefault(f"{file}-{file.stat().st_ino}", time.time())


def sparse(directory: Path, files: int, tensors: dict[str, tuple[int, ...]]) -> Path:
    """A bfloat16 model in so many files whose data is a hole."""
    directory.mkdir(parents=True)
    place: dict[str, str] = {}
    for i in range(files):
        header: dict[str, Any] = {}
        end, filename = 0, f"model-{i + 1:05}-of-{files:05}.safetensors"
        for name in list(tensors)[i::files]:
            first, end = end, end + 2 * prod(tensors[name])
            header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [first, end]}
            place[name] = filename
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / filename).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    (directory / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return directory


def planning(root: Path) -> str:
    """Processor seconds of a plan for a model of 405B, beside the imports."""
    tensors = shapes(16384, 53248, 126, 1024)
    models = [sparse(root / f"sparse-{i}", 191, tensors) for i in range(9)]
    small = [sparse(root / f"tiny-{i}", 1, {"layers.0.fc.weight": (64, 64)}) for i in range(9)]
    rows = []
    for method in ("task-arithmetic", "ties", "kron"):
        took = []
        for each in (small, models):
            worker = start([*merge(method, each, root / "out"), "-n", "--json"], root / f"used-{time.monotonic_ns()}")
            worker.process.communicate()
            took.append(worker.used["cpu"])
        rows.append(f"`{method}` {took[1] - took[0]:.2f} s ({took[0]:.2f} s where there is one small tensor)")
    return f"405B, {len(tensors)} tensors and 191 files for each of nine models: {', '.join(rows)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the results go; else they are printed")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="modelmerge-shared-"))
    try:
        generate("llama", root / "large", size=250_000_000, experts=2)
        large = [root / "large" / "single" / name for name in ("base", "expert_1", "expert_2")]
        narrow = []
        for i in range(4):
            generator = torch.Generator().manual_seed(i)
            state = {f"layers.{j}.fc.weight": torch.randn(512, 1024, generator=generator).mul(0.02) for j in range(12)}
            narrow.append(write(root / f"narrow-{i}", state))
        text = "\n".join([
            "# What it costs to share a merge out\n",
            "Written by `python -m tests.benchmarks.shared`; do not edit.\n", f"{machine()}\n", "## Bytes and memory\n",
            "Processes of `--cluster files`, a Llama of 0.25 GB and two experts. MB that are read, beside those of a"
            "\nplan; the most memory of any process, and what the plan promises; processor seconds of all.\n",
            "| | processes | one reads | they read | ratio | peak | promise | CPU s of one | of all |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
            *(bytes_and_memory(root, large, method, 3) for method in ("task-arithmetic", "ties", "della")),
            "\n## Two processes of `kron`\n",
            "Twelve weights of 512 x 1024 and three experts, a thread for each process, two processors.\n",
            "| one, s | two, s | speed-up | CPU s of one | of two | s of their units | load |",
            "|---:|---:|---:|---:|---:|---|---:|", speed_up(root, narrow, options.times),
            "\n## The end, and a death\n", finish(root, 191), "", death(root, narrow),
            "\n## A plan\n", planning(root),
        ]) + "\n"  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(text) if options.out is None else options.out.write_text(text)


if __name__ == "__main__":
    main()
