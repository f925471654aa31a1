"""What every method costs, and what mergekit's costs where it has the method, in one run.

`python -m tests.benchmarks.mergekit_speed` makes Llama-shaped checkpoints, installs mergekit into an environment of its
own (or takes `--python`, one that has it), merges with both as a user would, in child processes, measures time and
memory from outside, and writes RESULTS-mergekit.md. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelmerge import method
from tests import mergekit_runs
from tests.benchmarks import merge_speed
from tests.benchmarks.merge_speed import Inputs, Usage

MODULE = "tests.benchmarks.mergekit_speed"
RESULTS = Path(__file__).parent / "RESULTS-mergekit.md"
START = "import mergekit.merge, mergekit.config"


@dataclass(frozen=True, slots=True)
class Pair:
    """A method here with its options; there, with its parameters for each model and for all, if it has it."""

    name: str
    options: tuple[str, ...] = ()
    theirs: str | None = None
    each: str = "weight: 1"
    shared: str = ""
    most: int | None = None  # experts

    @property
    def title(self) -> str:
        """The words of the command."""
        return " ".join((self.name, *self.options))


_TIES = ("--trim-scope", "tensor", "--reduce", "mean")
PAIRS = (
    Pair("average", (), "linear"),
    Pair("task-arithmetic", (), "task_arithmetic", shared="lambda: 0.3"),
    Pair("ties"),
    Pair("ties", _TIES, "ties", "weight: 1, density: 0.2", "lambda: 0.3"),
    Pair("dare", (), "dare_linear", "weight: 1, density: 0.1", "lambda: 0.3"),
    Pair("dare", ("--consensus", "ties"), "dare_ties", "weight: 1, density: 0.1", "lambda: 0.3"),
    Pair("della", (), "della", "weight: 1, density: 0.7, epsilon: 0.07", "lambda: 1.1"),
    Pair("breadcrumbs", (), "breadcrumbs", "weight: 1, density: 0.15, gamma: 0.006", "lambda: 0.2"),
    Pair("sce", (), "sce", "", "select_topk: 0.1"),
    Pair("model-stock", (), "model_stock", ""),
    Pair("karcher", (), "karcher", ""),
    Pair("slerp", (), "slerp", "", "t: 0.5", most=1),
    Pair("nearswap", (), "nearswap", "", "t: 0.0001", most=1),
    Pair("consensus"),
    Pair("pcb"),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="500MB", help="bytes of one model (default: 500MB)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1, help="runs of each thing; the median counts (default: 1)")
    parser.add_argument("--methods", nargs="+", choices=method.data_free(), help="only these")
    parser.add_argument("--python", help="a Python that has mergekit")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    told = parser.parse_args(argv)
    with merge_speed.work_directory(told.workdir) as work, tempfile.TemporaryDirectory() as scratch:
        python = told.python or mergekit_runs.installed(Path(scratch) / "venv")
        told.family, told.clip_experts = "llama", 0
        inputs = merge_speed.generated(work, "llama", told)[0]
        rows = _measure(work, inputs, [p for p in PAIRS if not told.methods or p.name in told.methods], told, python)
    text = _report(rows, told, sys.argv[1:] if argv is None else argv)
    told.results.write_text(text, encoding="utf-8")
    print(text)


Row = tuple[str, list[Usage], str, list[Usage]]


def _measure(work: Path, inputs: Inputs, pairs: Sequence[Pair], told: argparse.Namespace, python: str) -> list[Row]:
    """In every round each thing runs once, so that a busy minute hits all alike."""
    theirs = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    rows: list[Row] = [("start", [], "start", [])]
    rows += [(pair.title, [], pair.theirs or "", []) for pair in pairs]
    with merge_speed.cache(work) as ours:
        merge_speed.run_merge(work, inputs, "average", ours)  # unmeasured: page cache and digests
        for number in range(told.runs):
            rows[0][1].append(merge_speed.run([sys.executable, "-c", merge_speed.START]))
            rows[0][3].append(merge_speed.run([python, "-c", START], theirs))
            for pair, row in zip(pairs, rows[1:], strict=True):
                merge_speed.say(f"round {number + 1}: {pair.title}")
                some = Inputs(inputs.family, inputs.layout, inputs.models[: (pair.most or told.experts) + 1])
                row[1].append(merge_speed.run_merge(work, some, pair.name, ours, pair.options))
                if pair.theirs is not None:
                    row[3].append(_run_theirs(work, some, pair, python, theirs))
    return rows


def _run_theirs(work: Path, inputs: Inputs, pair: Pair, python: str, environment: dict[str, str]) -> Usage:
    """mergekit's command on a configuration like the one its users write."""
    config, out = work / "config.yml", work / "out-mergekit"
    lines = ["models:"]
    listed = inputs.models if pair.theirs == "slerp" else inputs.models[1:]
    for model in listed:
        lines += [f"  - model: {model}", f"    parameters: {{{pair.each}}}"]
    lines += [f"merge_method: {pair.theirs}", f"parameters: {{{pair.shared}}}"]
    lines += [f"base_model: {inputs.models[0]}"] if pair.theirs not in ("linear", "karcher") else []
    config.write_text("\n".join(lines) + "\n")
    command = [python, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer", "--quiet"]
    try:
        return merge_speed.run(command, environment)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _report(rows: Sequence[Row], told: argparse.Namespace, argv: Sequence[str]) -> str:
    starts = [min(run.cpu for run in runs) for runs in (rows[0][1], rows[0][3])]
    table = [("modelmerge", "CPU s", "wall s", "anonymous MB", "mergekit", "CPU s", "wall s", "anonymous MB",
              "x CPU", "x net of start", "x wall", "x memory")]  # fmt: skip
    for ours, mine, theirs, other in rows:
        cells = [ours, *_cells(mine), theirs, *(_cells(other) if other else ("", "", ""))]
        if other and ours != "start":
            a, b = (_middle(runs) for runs in (mine, other))
            net = (b.cpu - starts[1]) / max(a.cpu - starts[0], 1e-9)
            cells += [
                f"{b.cpu / a.cpu:.1f}",
                f"{net:.1f}",
                f"{b.wall / a.wall:.1f}",
                f"{b.anonymous / a.anonymous:.1f}",
            ]
        else:
            cells += [""] * 4
        table.append(tuple(cells))
    head = f"Base and {told.experts} Llama-shaped bfloat16 experts of {told.size} each; slerp and nearswap take one."
    parts = ["# Every method beside mergekit", merge_speed.made_by(argv, MODULE), merge_speed.machine(), head]
    return "\n\n".join([*parts, _EXPLANATION.strip(), merge_speed.table(table, left=(0, 4))]) + "\n"


def _middle(runs: Sequence[Usage]) -> Usage:
    """The run of median CPU time."""
    return sorted(runs, key=lambda run: run.cpu)[len(runs) // 2]


def _cells(runs: Sequence[Usage]) -> tuple[str, str, str]:
    used = _middle(runs)
    return f"{used.cpu:.1f}", f"{used.wall:.1f}", f"{used.anonymous / 1e6:.0f}"


_EXPLANATION = f"""
mergekit {mergekit_runs.VERSION} computes in the models' bfloat16, as it does unless told otherwise, on one thread of
OpenMP's, which costs it the least CPU time, and writes no hashes. modelmerge computes in float32, hashes its output and
syncs it to the disk; the inputs' hashes it remembers. **x** is mergekit's over modelmerge's; **net of start** leaves
out what importing costs either (**start**). `ties` without options trims over the whole model, which mergekit does not
offer. A machine that others use too makes both slower, not always alike: runs next to one another in the table ran
next to one another in time.
"""


if __name__ == "__main__":
    main()
