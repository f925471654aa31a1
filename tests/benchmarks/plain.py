"""What simple merges cost beside the same arithmetic on whole models in memory, and beside mergekit.

`python -m tests.benchmarks.plain` makes Llama-shaped checkpoints in bfloat16 and in float32, merges them here, by
mergekit (installed into an environment of its own, or `--python`, one that has it), and by a few lines of torch in the
models' own dtype, as fusion_bench's classes have them. A last table tells where the time of larger merges goes, beside
bare calls that do the same. It writes RESULTS-plain.md. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.benchmarks import merge_speed, mergekit_speed, phases
from tests.benchmarks.merge_speed import Inputs, Usage
from tests.support import mergekit_runs

MODULE = "tests.benchmarks.plain"
RESULTS = Path(__file__).parent / "RESULTS-plain.md"
METHODS = ("average", "task-arithmetic", "slerp", "model-stock")
IN_MEMORY_START = f"import {MODULE}, torch, safetensors.torch"
_PEERS = {trio.name: trio.mergekit for trio in mergekit_speed.BY_ELEMENT if not trio.options}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="160MB", help="bytes of one bfloat16 model (default: 160MB)")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--runs", type=int, default=5, help="runs of each thing; the median counts (default: 5)")
    parser.add_argument("--phases-size", default="1GB", help="bytes of one model of the phases (default: 1GB)")
    parser.add_argument("--phases-runs", type=int, default=3, help="runs of each of them (default: 3)")
    parser.add_argument("--python", help="a Python that has mergekit")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    words = parser.parse_args(argv)
    tables = []
    with merge_speed.work_directory(words.workdir) as work, tempfile.TemporaryDirectory() as scratch:
        python = words.python or mergekit_runs.installed(Path(scratch) / "mergekit")
        for dtype in ("bfloat16", "float32"):
            inputs = _generated(work, dtype, words.size, words.experts)
            tables.append((dtype, inputs.nbytes / len(inputs.models), _measure(work, inputs, words.runs, python)))
        large = _generated(work, "bfloat16", words.phases_size, words.experts)
        parts = _phases_report(large, _phases(work, large, words.phases_runs))
    text = _report(tables, words, sys.argv[1:] if argv is None else argv) + f"\n{parts}\n"
    words.results.write_text(text, encoding="utf-8")
    print(text)


def _generated(work: Path, dtype: str, size: str, experts: int) -> Inputs:
    directory = work / f"{dtype}-{size}-{experts}"
    if not directory.exists():
        command = [sys.executable, "-m", "tests.benchmarks.generate", "llama", str(directory), "--dtype", dtype]
        subprocess.run([*command, "--size", size, "--experts", str(experts)], check=True)
        shutil.rmtree(directory / "sharded")
        time.sleep(merge_speed._SETTLED)
    names = ("base", *(f"expert_{i + 1}" for i in range(experts)))
    return Inputs("llama", "single", tuple(directory / "single" / name for name in names))


Runs = dict[tuple[str, str], list[Usage]]  # by what is run, and by whom


def _measure(work: Path, inputs: Inputs, runs: int, python: str) -> Runs:
    """In every round each thing runs once, so that a busy minute hits all alike."""
    one = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    out = work / "out-theirs"
    measured: Runs = {}

    def add(what: str, who: str, run: Callable[[], Usage]) -> None:
        measured.setdefault((what, who), []).append(run())
        shutil.rmtree(out, ignore_errors=True)

    with merge_speed.cache(work) as environment:
        ours = {**environment, "OMP_NUM_THREADS": "1"}
        merge_speed.run_merge(work, inputs, "average", ours)  # unmeasured: page cache and digests
        for number in range(runs):
            merge_speed.say(f"{inputs.models[0].parts[-3]}: round {number + 1} of {runs}")
            add("start", "ours", lambda: merge_speed.run([sys.executable, "-c", merge_speed.START], ours))
            add("start", "mergekit", lambda: merge_speed.run([python, "-c", mergekit_speed.START], one))
            add("start", "in memory", lambda: merge_speed.run([sys.executable, "-c", IN_MEMORY_START], one))
            for name in METHODS:
                some = Inputs("llama", "single", inputs.models[:2] if name == "slerp" else inputs.models)
                models = [str(model) for model in some.models]
                program = f"from {MODULE} import in_memory; in_memory()"
                command = [sys.executable, "-c", program, name, str(out), *models]
                peer = _PEERS[name]
                assert peer is not None, "mergekit has all of these"
                add(name, "ours", lambda name=name, some=some: merge_speed.run_merge(work, some, name, ours))
                add(name, "floor", lambda some=some: _floor(work / "floor", some))
                add(name, "in memory", lambda command=command: merge_speed.run(command, one))
                merged = mergekit_speed._mergekit(work, some, peer, python, out)
                add(name, "mergekit", lambda merged=merged: merge_speed.run(merged, one))
    return measured


def _floor(out: Path, inputs: Inputs) -> Usage:
    """What it costs to read all models, and to write, hash and sync one, a block at a time in one buffer."""
    wall, cpu = time.monotonic(), time.process_time()
    files = [(model / "model.safetensors").open("rb", buffering=0) for model in inputs.models]
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 19))
    with out.open("wb", buffering=0) as stream:
        while counts := [count for file in files if (count := file.readinto(buffer))]:
            stream.write(buffer[: counts[0]])
            digest.update(buffer[: counts[0]])
        os.fdatasync(stream.fileno())
    usage = Usage(time.monotonic() - wall, time.process_time() - cpu, 0, 0)
    for file in files:
        file.close()
    out.unlink()
    return usage


def _phases(work: Path, inputs: Inputs, runs: int) -> dict[tuple[str, str], list[dict[str, float]]]:
    """What `phases` tells of each method, merged and by bare calls; the first round is not counted."""
    spent: dict[tuple[str, str], list[dict[str, float]]] = {}
    out = work / "out-phases"
    with merge_speed.cache(work) as environment:
        environment["OMP_NUM_THREADS"] = "1"
        for number in range(runs + 1):
            merge_speed.say(f"phases: round {number} of {runs}")
            for name in METHODS:
                models = [str(model) for model in (inputs.models[:2] if name == "slerp" else inputs.models)]
                for who in ("merged", "bare"):
                    program = f"from {phases.__name__} import {who}; {who}()"
                    command = [sys.executable, "-c", program, name, str(out), *models]
                    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
                    shutil.rmtree(out, ignore_errors=True)
                    if number:
                        spent.setdefault((name, who), []).append(json.loads(text))
    return spent


def _phases_report(inputs: Inputs, spent: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    lines = [("", *phases.PHASES, "rest", "all", "faults")]
    for (name, who), runs in spent.items():
        numbers = [statistics.median(run.get(column, 0.0) for run in runs) for column in lines[0][1:]]
        title = name if who == "merged" else f"{name}, bare"
        lines.append((title, *(f"{number:.2f}" for number in numbers[:-1]), f"{numbers[-1]:,.0f}"))
    each = inputs.nbytes / len(inputs.models)
    head = f"## Where the time goes\n\nBase and {len(inputs.models) - 1} bfloat16 experts of {each / 1e6:.0f} MB each."
    return "\n\n".join([head, merge_speed.table(lines, left=(0,)), _PHASES.strip()])


def in_memory() -> None:
    """In a child: the arithmetic on whole models, in their dtype. Arguments: METHOD OUT BASE EXPERT..."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    name, out, *models = sys.argv[1:]
    base, *experts = [load_file(Path(model) / "model.safetensors") for model in models]
    merged = {key: _FORMULAS[name](base[key], [expert[key] for expert in experts]) for key in base}
    Path(out).mkdir()
    save_file(merged, Path(out) / "model.safetensors", metadata={"format": "pt"})


def _average(base: Any, experts: list[Any]) -> Any:
    return sum(experts[1:], experts[0]) / len(experts)


def _task_arithmetic(base: Any, experts: list[Any]) -> Any:
    first, *others = (expert - base for expert in experts)
    return base + 0.3 * sum(others, first)


def _slerp(base: Any, experts: list[Any]) -> Any:
    first, second = base / base.norm(), experts[0] / experts[0].norm()
    angle = (first * second).sum().clamp(-1, 1).arccos()
    half = (0.5 * angle).sin() / angle.sin() if float(angle) > 0 else 0.5
    return half * base + half * experts[0]


def _model_stock(base: Any, experts: list[Any]) -> Any:
    taus, count = [expert - base for expert in experts], len(experts)
    pairs = list(combinations(taus, 2))
    cosine = sum((one * other).sum() / (one.norm() * other.norm()) for one, other in pairs) / len(pairs)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return ratio * _average(base, experts) + (1 - ratio) * base


_FORMULAS = {
    "average": _average, "task-arithmetic": _task_arithmetic, "slerp": _slerp, "model-stock": _model_stock,
}  # fmt: skip

_HEAD = ("", "CPU s", "net", "floor", "wall s", "in memory CPU s", "net", "wall s", "mergekit CPU s", "net",
         "wall s", "x in memory", "x mergekit", "MB", "in memory MB", "mergekit MB")  # fmt: skip


def _report(tables: Sequence[tuple[str, float, Runs]], words: argparse.Namespace, argv: Sequence[str]) -> str:
    parts = ["# Simple merges beside arithmetic in memory and mergekit", merge_speed.made_by(argv, MODULE),
             merge_speed.machine(), _EXPLANATION.strip()]  # fmt: skip
    for dtype, each, measured in tables:
        head = f"## {dtype}\n\nBase and {words.experts} Llama-shaped experts of {each / 1e6:.0f} MB each."
        rows = [_HEAD, *(_cells(name, measured) for name in METHODS)]
        starts = ", ".join(f"{who} {_cpu(measured, 'start', who):.2f}" for who in ("ours", "in memory", "mergekit"))
        beside = f"CPU s of a start: {starts}."
        parts += [head, merge_speed.table(rows, left=(0,)), beside]
    return "\n\n".join(parts) + "\n"


def _cpu(measured: Runs, what: str, who: str) -> float:
    return statistics.median(run.cpu for run in measured[what, who])


def _cells(name: str, measured: Runs) -> tuple[str, ...]:
    cells, nets = [name], {}
    for who in ("ours", "in memory", "mergekit"):
        cpu = _cpu(measured, name, who)
        nets[who] = max(cpu - _cpu(measured, "start", who), 1e-9)
        cells += [f"{cpu:.2f}", f"{nets[who]:.2f}"]
        if who == "ours":
            cells.append(f"{_cpu(measured, name, 'floor'):.2f}")
        cells.append(f"{statistics.median(run.wall for run in measured[name, who]):.2f}")
    cells += [f"{nets[who] / nets['ours']:.2f}" for who in ("in memory", "mergekit")]
    cells += [f"{max(r.anonymous for r in measured[name, who]) / 1e6:.0f}" for who in ("ours", "in memory", "mergekit")]
    return tuple(cells)


_EXPLANATION = f"""
**CPU s** is user and system time of the whole process, **net** the same without what a start costs: the interpreter and
all imports. modelmerge computes in float32, finds NaN and Inf, says what storing in 16 bits loses, takes the sha256 of
its output and syncs it to the disk; the inputs' digests it remembers. **floor** is what it costs to read the same files
and to write, hash and sync one, without any arithmetic; slerp and model-stock read their files twice.
**in memory** loads all models with safetensors, does the arithmetic of fusion_bench's class in the models' own dtype
and saves the result; mergekit {mergekit_runs.VERSION} computes in that dtype too. Neither hashes, checks or syncs.
**x** is the other's net CPU time over modelmerge's: above 1, modelmerge takes less. **MB** is anonymous memory at the
peak. Medians; one thread each; slerp takes one expert.
"""

_PHASES = """
CPU seconds of all threads. **import** is since the interpreter began; **widen** is from bfloat16 to float32, less the
base; **round** is back to bfloat16, and what that loses; **hash** is that of the output, **sync** its way to the disk;
**rest** is all else, Python above all; **faults** are minor page faults after the imports. **bare** imports the same,
then makes bare calls of os, hashlib and torch: the same bytes, the same passes, no plan, no checks, no shapes.
Medians; one thread.
"""


if __name__ == "__main__":
    main()
