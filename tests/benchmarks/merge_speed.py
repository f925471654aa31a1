"""What a merge costs, beside what reading and writing the same bytes costs.

`python -m tests.benchmarks.merge_speed` makes checkpoints, merges them with every method in child processes as a user
would, measures time and memory from outside, and writes RESULTS.md. Linux only: memory is read from /proc.

This process imports no torch: a child's peak RSS, as the kernel counts it, begins with that of the process that
started it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.methods import registry

MODULE = "tests.benchmarks.merge_speed"
RESULTS = Path(__file__).parent / "RESULTS.md"
LAYOUTS = {"llama": ("single", "sharded"), "clip": ("single",)}
SHARD_SIZE = {"single": "5GB", "sharded": "200MB"}  # of the output; that of the inputs is generate.SHARD_BYTES
_SHOWN = {"single": "one file", "sharded": "200 MB shards"}
_POLL = 0.02  # seconds between two looks at a child's memory
_SETTLED = 2.5  # seconds: modelmerge remembers no digest of a file younger than 2 s
_PLACES = ("--workdir", "--results", "--python", "--fusion-python")  # options that name places of this machine
# As the command does before anything else, and at its end.
START = "import gc, os; gc.set_threshold(500_000); import modelmerge.cli, modelmerge.verbs.merge; os._exit(0)"
# Of an installed program the modules are compiled.
_COMPILED = tempfile.TemporaryDirectory(prefix="modelmerge-compiled-")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one child process used: seconds, and bytes at the peak."""

    wall: float
    cpu: float
    rss: int
    anonymous: int  # without mapped files


@dataclass(frozen=True, slots=True)
class Inputs:
    """A base and its experts, on disk."""

    family: str
    layout: str
    models: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.stat().st_size for model in self.models for file in model.glob("*.safetensors"))


@dataclass(slots=True)
class Row:
    """The runs of one thing on one set of inputs; `digests` is cold or warm, empty for the floor and the start."""

    family: str
    layout: str
    what: str
    digests: str
    input_bytes: int
    promised: int | None = None  # peak anonymous memory, by --dry-run
    runs: list[Usage] = field(default_factory=list)

    @property
    def cpu(self) -> float:
        """Median CPU seconds."""
        return statistics.median(run.cpu for run in self.runs)

    @property
    def wall(self) -> float:
        """Median wall seconds."""
        return statistics.median(run.wall for run in self.runs)

    @property
    def anonymous(self) -> int:
        """The highest peak of all runs: a promise holds always or not at all."""
        return max(run.anonymous for run in self.runs)

    @property
    def rss(self) -> int:
        """The highest peak of all runs."""
        return max(run.rss for run in self.runs)


def main(argv: Sequence[str] | None = None) -> None:
    told = _parse(argv)
    with work_directory(told.workdir) as work:
        rows = [row for family in _families(told.family) for row in _measure_family(work, family, told)]
    text = _report(rows, told, sys.argv[1:] if argv is None else argv)
    told.results.write_text(text, encoding="utf-8")
    print(json.dumps(_as_json(rows), indent=2) if told.json else text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    known = registry.data_free()
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1GB", help="bytes of one Llama (default: 1GB)")
    parser.add_argument("--experts", type=int, default=4, help="experts of the Llama (default: 4)")
    parser.add_argument("--clip-experts", type=int, default=8, help="experts of the CLIP (default: 8)")
    parser.add_argument("--family", choices=("llama", "clip", "both"), default="both")
    parser.add_argument("--runs", type=int, default=3, help="runs of each thing (default: 3)")
    parser.add_argument("--methods", nargs="+", choices=known, default=["average", "task-arithmetic", "ties", "dare"])
    parser.add_argument("--apgd", action="store_true", help="run apgd on the CLIP too, once: it takes minutes")
    parser.add_argument("--apgd-steps", type=int, default=20, help="steps of that run (default: 20)")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    parser.add_argument("--json", action="store_true", help="print every run as JSON instead of the tables")
    return parser.parse_args(argv)


def _families(name: str) -> tuple[str, ...]:
    return tuple(LAYOUTS) if name == "both" else (name,)


@contextmanager
def work_directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="modelmerge-benchmark-") as directory:
        yield Path(directory)


def say(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


# Inputs


def generated(work: Path, family: str, told: argparse.Namespace) -> list[Inputs]:
    """The family's inputs in every layout; made now unless they are there."""
    experts = told.experts if family == "llama" else told.clip_experts
    directory = work / (f"llama-{told.size}-{experts}" if family == "llama" else f"clip-{experts}")
    complete = directory / "complete"
    if not complete.exists():
        say(f"{family}: making a base and {experts} experts")
        shutil.rmtree(directory, ignore_errors=True)
        command = [sys.executable, "-m", "tests.benchmarks.generate", family, str(directory)]
        subprocess.run([*command, "--size", told.size, "--experts", str(experts)], check=True)
        complete.touch()
        time.sleep(_SETTLED)
    names = ["base", *(f"expert_{i + 1}" for i in range(experts))]
    return [Inputs(family, lay, tuple(directory / lay / name for name in names)) for lay in LAYOUTS[family]]


# Measuring


def _measure_family(work: Path, family: str, told: argparse.Namespace) -> list[Row]:
    return [row for inputs in generated(work, family, told) for row in _measure(work, inputs, told)]


def _measure(work: Path, inputs: Inputs, told: argparse.Namespace) -> list[Row]:
    """All rows of one set of inputs. In every round each thing runs once, so that a busy minute hits all alike."""
    start, floor = (_row(inputs, what) for what in ("start", "floor"))
    merges = {name: (_row(inputs, name, "cold"), _row(inputs, name, "warm")) for name in told.methods if name != "apgd"}
    for name, pair in merges.items():
        pair[0].promised = pair[1].promised = _promise(work, inputs, name)
    run_floor(work, inputs)  # unmeasured: brings the inputs into the page cache
    for number in range(told.runs):
        say(f"{inputs.family}, {_SHOWN[inputs.layout]}: round {number + 1} of {told.runs}")
        start.runs.append(run([sys.executable, "-c", START]))
        floor.runs.append(run_floor(work, inputs))
        for name, pair in merges.items():
            for row, usage in zip(pair, run_merges(work, inputs, name), strict=True):
                row.runs.append(usage)
    rows = [start, floor, *(row for pair in merges.values() for row in pair)]
    if inputs.family == "clip" and (told.apgd or "apgd" in told.methods):
        rows.append(_measure_apgd(work, inputs, told.apgd_steps))
    return rows


def _row(inputs: Inputs, what: str, digests: str = "") -> Row:
    return Row(inputs.family, inputs.layout, what, digests, inputs.nbytes if what != "start" else 0)


def _measure_apgd(work: Path, inputs: Inputs, steps: int) -> Row:
    """One run only: it takes minutes, and its time is not that of reading and writing."""
    say(f"{inputs.family}: apgd with {steps} steps")
    options = ("--published", "--steps", str(steps))
    row = _row(inputs, f"apgd --published, {steps} steps", "cold")
    row.promised = _promise(work, inputs, "apgd", options)
    with cache(work) as environment:
        row.runs.append(run_merge(work, inputs, "apgd", environment, options))
    return row


def _merge_command(work: Path, inputs: Inputs, name: str, options: Sequence[str] = ()) -> list[str]:
    models = [str(model) for model in inputs.models]
    shards = ["--max-shard-size", SHARD_SIZE[inputs.layout]]
    command = [sys.executable, "-m", "modelmerge", "merge", name, *models, "-o", str(work / "out"), *shards]
    return [*command, "--device", "cpu", *options]


def _promise(work: Path, inputs: Inputs, name: str, options: Sequence[str] = ()) -> int:
    """The peak memory that the plan names, in bytes."""
    command = [*_merge_command(work, inputs, name, options), "--dry-run", "--json"]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return int(json.loads(told)["plan"]["peak_memory"]["host"])


def run_merges(work: Path, inputs: Inputs, name: str) -> tuple[Usage, Usage]:
    """A merge that has to hash its inputs, and the same again now that their digests are remembered."""
    with cache(work) as environment:
        cold = run_merge(work, inputs, name, environment)
        return cold, run_merge(work, inputs, name, environment)


@contextmanager
def cache(work: Path) -> Iterator[dict[str, str]]:
    """The environment of a modelmerge that remembers no digest yet."""
    with tempfile.TemporaryDirectory(prefix="cache-", dir=work) as directory:
        yield {**_installed(), "MODELMERGE_CACHE": directory}


def _installed() -> dict[str, str]:
    """The environment of a program whose modules are compiled once, though they lie in a folder of sources."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": _COMPILED.name}


def run_merge(
    work: Path, inputs: Inputs, name: str, environment: Mapping[str, str], options: Sequence[str] = ()
) -> Usage:
    try:
        return run([*_merge_command(work, inputs, name, options), "-f", "-q"], environment)
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)


def run_floor(work: Path, inputs: Inputs) -> Usage:
    models = [str(model) for model in inputs.models]
    try:
        return run([sys.executable, "-c", f"from {MODULE} import floor; floor()", str(work / "out"), *models])
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)


def floor() -> None:
    """In a child: read all models with safetensors alone, and write the last one. Arguments: OUT MODEL...

    The imports are those of `START`, so that the same start is taken off the floor and off a merge.
    """
    import gc

    gc.set_threshold(500_000)
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    import modelmerge.cli
    import modelmerge.verbs.merge  # noqa: F401

    torch.set_num_threads(1)  # copies are bound by memory; OpenMP's waiting threads would count as CPU time
    out, models = Path(sys.argv[1]), sys.argv[2:]
    out.mkdir()
    for model in models:
        for file in sorted(Path(model).glob("*.safetensors")):
            state = {}
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    state[name] = opened.get_tensor(name).clone()  # the tensor itself is a mapped file, unread
            if model == models[-1]:
                save_file(state, out / file.name, metadata={"format": "pt"})
            del state
    os._exit(0)


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a child to its end, watching its memory; modelmerge, where no environment is named.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment or _installed())
        watch = _Watch(child.pid)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        anonymous = watch.stop()
        child.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it too
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}:\n{errors.read().decode()}")
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, anonymous)


class _Watch:
    """Follows the anonymous memory of a process and its children, from a thread."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._over = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.wait(_POLL):
            self._peak = max(self._peak, sum(_anonymous(pid) for pid in _tree(self._pid)))

    def stop(self) -> int:
        """The highest sum seen, in bytes."""
        self._over.set()
        self._thread.join()
        return self._peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = listing.read_text().split()
        except OSError:  # the thread has ended meanwhile
            continue
        for child in children:
            yield from _tree(int(child))


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


# Telling


def _ratio(row: Row, rows: Sequence[Row]) -> float:
    """CPU seconds of a row over those of the floor, both without the interpreter's start."""
    beside = {r.what: r.cpu for r in rows if (r.family, r.layout) == (row.family, row.layout)}
    return (row.cpu - beside["start"]) / (beside["floor"] - beside["start"])


def _as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(row) | ({} if row.what == "start" else {"cpu_over_floor": _ratio(row, rows)}) for row in rows
    ]


def _report(rows: Sequence[Row], told: argparse.Namespace, argv: Sequence[str]) -> str:
    parts = ["# Merge speed and memory", made_by(argv), machine(), _EXPLANATION.strip()]
    for family, layout in dict.fromkeys((row.family, row.layout) for row in rows):
        some = [row for row in rows if (row.family, row.layout) == (family, layout)]
        parts += [f"## {_title(some, told)}", table([_HEAD, *(_cells(row, rows) for row in some)])]
    return "\n\n".join(parts) + "\n"


def made_by(argv: Sequence[str], module: str = MODULE) -> str:
    """The command, without the options that name places of this machine."""
    words, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] not in _PLACES:
            words.append(word)
        skip = word in _PLACES
    return f"Written by `{' '.join(['python -m', module, *words])}`; do not edit."


def machine() -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors"))
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"Machine: {_cpu_model()}, {cores} cores, {memory:.0f} GiB; Python {platform.python_version()}, {packages}."


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _title(rows: Sequence[Row], told: argparse.Namespace) -> str:
    first, total = rows[0], max(row.input_bytes for row in rows)
    experts = told.experts if first.family == "llama" else told.clip_experts
    shape = "Llama-shaped, bfloat16" if first.family == "llama" else "CLIP ViT-B/32 vision tower, float32"
    each = f"{total / (experts + 1) / 1e9:.2f} GB each, {total / 1e9:.2f} GB together"
    return f"{shape}: base and {experts} experts, {each}, {_SHOWN[first.layout]}"


_HEAD = (
    "", "digests", "CPU s", "lowest to highest", "x floor", "wall s", "GB/s", "anonymous MB", "promised MB", "kept",
    "RSS MB",
)  # fmt: skip


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    times = [run.cpu for run in row.runs]
    speed = "" if row.what == "start" else f"{row.input_bytes / row.wall / 1e9:.2f}"
    ratio = "" if row.what == "start" else f"{_ratio(row, rows):.2f}"
    promised = "" if row.promised is None else f"{row.promised / 1e6:.0f}"
    kept = "" if row.promised is None else "yes" if row.anonymous <= row.promised else "**no**"
    return (
        row.what, row.digests, f"{row.cpu:.2f}", f"{min(times):.2f} to {max(times):.2f}", ratio, f"{row.wall:.2f}",
        speed, f"{row.anonymous / 1e6:.0f}", promised, kept, f"{row.rss / 1e6:.0f}",
    )  # fmt: skip


def table(lines: Sequence[Sequence[str]], left: Sequence[int] = (0, 1)) -> str:
    """A Markdown table that can be read as plain text too: words to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    body = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in [body[0], rule, *body[1:]])


_EXPLANATION = """
How to read it:

- Each row is a process of its own. **CPU s** is user and system time of that process, the median of its runs, with the
  lowest and the highest beside it; on a machine that others use too it says more than the wall time does.
- **start** only imports what a merge imports, torch above all. **floor** imports the same, reads every tensor of
  base and experts with safetensors alone (one thread, each tensor copied out of the mapped file), and saves the last
  model: what no merge that holds a model at a time can do without. **x floor** is (CPU - start) / (floor - start).
- **digests**: a merge records the sha256 of its inputs. *cold*: it has not seen them before and hashes them; *warm*: it
  remembers their digests. The output is hashed and synced to the disk (fsync) in both; the floor does neither.
- **GB/s** is the size of all inputs, counted once, over the wall time of the whole process. The inputs are read
  once before the first round, so most of them come from the page cache; the kernel may drop some in between.
- **anonymous** is the highest anonymous memory of the process in any run, looked at every 20 ms: mapped files and the
  page cache are not in it. **promised** is what `--dry-run` said it would be at most. **RSS** also counts mapped files,
  libraries among them. MB and GB are 10^6 and 10^9 bytes.
- In a round every row runs once, one after the other, so that other load on the machine hits all alike; apgd runs
  once in all, for few steps, to see whether its promise of memory holds.
"""


if __name__ == "__main__":
    main()
