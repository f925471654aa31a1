"""What every method costs, and what mergekit's and fusion_bench's cost where they have the method, in one run.

`python -m tests.benchmarks.mergekit_speed` makes Llama-shaped checkpoints, installs mergekit and fusion_bench into
environments of their own (or takes `--python` and `--fusion-python`, ones that have them), merges with all three as a
user would, in child processes, measures time and memory from outside, and writes RESULTS-mergekit.md. Linux only:
memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.methods import registry
from tests.benchmarks import merge_speed
from tests.benchmarks.merge_speed import Inputs, Usage
from tests.support import mergekit_runs

MODULE = "tests.benchmarks.mergekit_speed"
RESULTS = Path(__file__).parent / "RESULTS-mergekit.md"
PEERS = ("mergekit", "fusion_bench")
FUSION_VERSION = "0.2.33"
# What it needs to be imported, besides what this environment has: the rest of what it asks for is for training.
FUSION_NEEDS = ("omegaconf", "hydra-core", "bidict", "lightning", "datasets", "matplotlib", "scipy", "h5py", "pillow")
FUSION_RUN = Path(__file__).parent / "fusion_runs.py"
START = "import mergekit.merge, mergekit.config"
FUSION_START = (
    "import transformers.models.llama.modeling_llama; from fusion_bench.modelpool import CausalLMPool; "
    "from fusion_bench.method import TaskArithmeticAlgorithm"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mergekit:
    """A method of mergekit, with its parameters for each model and for all."""

    name: str
    each: str = "weight: 1"
    shared: str = ""

    def __str__(self) -> str:
        told = ", ".join(filter(None, (self.each, self.shared)))
        return f"`{self.name}`" + (f" ({told})" if told else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """A class of fusion_bench with its options; `dtype` is what the models are loaded in."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"`{self.name}({told})`, {self.dtype}"


@dataclass(frozen=True, slots=True)
class Trio:
    """A method here with its options, and what it is elsewhere."""

    name: str
    options: tuple[str, ...] = ()
    mergekit: Mergekit | None = None
    fusion: Fusion | None = None
    most: int | None = None  # experts

    @property
    def title(self) -> str:
        """The words of the command."""
        return " ".join((self.name, *self.options))


_TIES = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
_DARE = {"scaling_factor": 0.3, "sparsity_ratio": 0.9, "only_on_linear_weights": False}
_ENDS = ["model.embed_tokens.weight", "lm_head.weight"]
_INSIDE = ("--exclude", "lm_head*")  # the embedding is no linear layer's weight to begin with
BY_ELEMENT = (
    Trio("average", (), Mergekit(name="linear"), Fusion(name="SimpleAverageAlgorithm")),
    Trio(
        "task-arithmetic", (), Mergekit(name="task_arithmetic", shared="lambda: 0.3"),
        Fusion(name="TaskArithmeticAlgorithm", options={"scaling_factor": 0.3}),
    ),
    Trio("ties", (), None, Fusion(name="TiesMergingAlgorithm", options=_TIES)),
    Trio(
        "ties", ("--trim-scope", "tensor", "--reduce", "mean"),
        Mergekit(name="ties", each="weight: 1, density: 0.2", shared="lambda: 0.3"),
    ),
    Trio(
        "dare", (), Mergekit(name="dare_linear", each="weight: 1, density: 0.1", shared="lambda: 0.3"),
        Fusion(name="DareTaskArithmetic", options=_DARE),
    ),
    Trio(
        "dare", ("--consensus", "ties"),
        Mergekit(name="dare_ties", each="weight: 1, density: 0.1", shared="lambda: 0.3"),
    ),
    Trio("della", (), Mergekit(name="della", each="weight: 1, density: 0.7, epsilon: 0.07", shared="lambda: 1.1")),
    Trio(
        "breadcrumbs", (),
        Mergekit(name="breadcrumbs", each="weight: 1, density: 0.15, gamma: 0.006", shared="lambda: 0.2"),
    ),
    Trio("sce", (), Mergekit(name="sce", each="", shared="select_topk: 0.1")),
    Trio("model-stock", (), Mergekit(name="model_stock", each=""), Fusion(name="ModelStock")),
    Trio("karcher", (), Mergekit(name="karcher", each="")),
    Trio(
        "slerp", (), Mergekit(name="slerp", each="", shared="t: 0.5"),
        Fusion(name="SlerpMergeAlgorithm", options={"t": 0.5}), most=1,
    ),
    Trio("nearswap", (), Mergekit(name="nearswap", each="", shared="t: 0.0001"), most=1),
    Trio("consensus"),
    Trio("pcb"),
)  # fmt: skip
BY_MATRIX = (
    Trio(
        "tsv-m", _INSIDE, None,
        Fusion(name="TaskSingularVectorMerging", options={"alpha": 1.0, "exclude_keys": _ENDS}, dtype="float32"),
    ),
    Trio(
        "iso-c", _INSIDE, None,
        Fusion(name="ISO_C_Merge", options={"scaling_factor": 1.0, "exclude_keys": _ENDS}, dtype="float32"),
    ),
    Trio(
        "iso-cts", _INSIDE, None,
        Fusion(
            name="ISO_CTS_Merge", dtype="float32",
            options={"scaling_factor": 1.0, "common_space_fraction": 0.8, "exclude_keys": _ENDS},
        ),
    ),
    Trio(
        "wudi", (*_INSIDE, "--solver", "adam", "--steps", "20"), None,
        Fusion(name="WUDIMerging", options={"iter_num": 20, "exclude_keys": _ENDS}, dtype="float32"),
    ),
    Trio("wudi", _INSIDE),
    Trio("knots", _INSIDE),
    Trio("kron", _INSIDE),
    Trio("apgd", _INSIDE),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="160MB", help="bytes of one model (default: 160MB)")
    parser.add_argument("--matrix-size", default="80MB", help="the same for methods that take matrices (default: 80MB)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--runs", type=int, default=1, help="runs of each thing; the median counts (default: 1)")
    parser.add_argument("--methods", nargs="+", choices=registry.data_free(), help="only these")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="beside these (default: both)")
    parser.add_argument("--python", help="a Python that has mergekit")
    parser.add_argument("--fusion-python", help="a Python that has fusion_bench")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    told = parser.parse_args(argv)
    tables = []
    with merge_speed.work_directory(told.workdir) as work, tempfile.TemporaryDirectory() as scratch:
        given = (told.python, told.fusion_python)
        install = (mergekit_runs.installed, fusion_installed)
        peers = tuple(
            (python or install[i](Path(scratch) / name)) if name in told.peers else None
            for i, (name, python) in enumerate(zip(PEERS, given, strict=True))
        )
        told.family, told.clip_experts = "llama", 0
        for title, size, known in (
            ("Element by element", told.size, BY_ELEMENT),
            ("Matrix by matrix", told.matrix_size, BY_MATRIX),
        ):
            trios = [trio for trio in known if not told.methods or trio.name in told.methods]
            if trios:
                told.size = size
                inputs = merge_speed.generated(work, "llama", told)[0]
                tables.append((title, inputs, _measure(work, inputs, trios, told, peers)))
        text = _report(tables, told, sys.argv[1:] if argv is None else argv)
    told.results.write_text(text, encoding="utf-8")
    print(text)


def fusion_installed(environment: Path) -> str:
    """A new environment with fusion_bench in it; its Python."""
    python = mergekit_runs.new_environment(environment)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", f"fusion-bench=={FUSION_VERSION}"], check=True)
    subprocess.run([*pip, *FUSION_NEEDS], check=True)
    return python


@dataclass(slots=True)
class Row:
    """The runs of one thing: here, by mergekit and by fusion_bench; `failed` are those of them that could not."""

    title: str
    trio: Trio | None = None
    runs: tuple[list[Usage], list[Usage], list[Usage]] = field(default_factory=lambda: ([], [], []))
    failed: set[int] = field(default_factory=set)


def _measure(
    work: Path, inputs: Inputs, trios: Sequence[Trio], told: argparse.Namespace, peers: Sequence[str | None]
) -> list[Row]:
    """In every round each thing runs once, so that a busy minute hits all alike."""
    theirs = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start, floor = Row("start"), Row("floor")
    rows = [Row(trio.title, trio) for trio in trios]
    starts = ((sys.executable, merge_speed.START), (peers[0], START), (peers[1], FUSION_START))

    def begin() -> None:
        for i, (python, imports) in enumerate(starts):
            if python is None:
                continue
            start.runs[i].append(merge_speed.run([python, "-c", imports], theirs if i else None))

    with merge_speed.cache(work) as ours:
        merge_speed.run_merge(work, inputs, "average", ours)  # unmeasured: page cache and digests
        begin()
        for number in range(told.runs):
            begin()
            floor.runs[0].append(merge_speed.run_floor(work, inputs))
            for row in rows:
                merge_speed.say(f"round {number + 1}: {row.title}")
                _run(work, inputs, row, peers, ours, theirs, told.experts)
        begin()  # the least of them all is taken off: at the end, too, lest one busy minute decides
    return [start, floor, *rows]


def _run(
    work: Path,
    inputs: Inputs,
    row: Row,
    peers: Sequence[str | None],
    ours: dict[str, str],
    theirs: dict[str, str],
    most: int,
) -> None:
    trio = row.trio
    assert trio is not None, "start and floor are no merges"
    some = Inputs(inputs.family, inputs.layout, inputs.models[: (trio.most or most) + 1])
    row.runs[0].append(merge_speed.run_merge(work, some, trio.name, ours, trio.options))
    out = work / "out-theirs"
    for i, (peer, command) in enumerate(zip((trio.mergekit, trio.fusion), (_mergekit, _fusion), strict=True), 1):
        python = peers[i - 1]
        if peer is None or python is None or i in row.failed:
            continue
        try:
            row.runs[i].append(merge_speed.run(command(work, some, peer, python, out), theirs))  # type: ignore[operator]
        except RuntimeError as error:  # a peer that cannot is a finding, not the end
            merge_speed.say(str(error)[-2000:])
            row.failed.add(i)
        finally:
            shutil.rmtree(out, ignore_errors=True)


def _mergekit(work: Path, inputs: Inputs, told: Mergekit, python: str, out: Path) -> list[str]:
    """mergekit's command on a configuration like the one its users write."""
    config = work / "config.yml"
    lines = ["models:"]
    listed = inputs.models if told.name == "slerp" else inputs.models[1:]
    for model in listed:
        lines += [f"  - model: {model}", f"    parameters: {{{told.each}}}"]
    lines += [f"merge_method: {told.name}", f"parameters: {{{told.shared}}}"]
    lines += [f"base_model: {inputs.models[0]}"] if told.name not in ("linear", "karcher") else []
    config.write_text("\n".join(lines) + "\n")
    return [python, "-m", "mergekit.scripts.run_yaml", str(config), str(out), "--no-copy-tokenizer", "--quiet"]


def _fusion(work: Path, inputs: Inputs, told: Fusion, python: str, out: Path) -> list[str]:
    """The script that a user of fusion_bench would write."""
    words = [told.name, json.dumps(told.options), told.dtype, str(out), *map(str, inputs.models)]
    return [python, str(FUSION_RUN), *words]


_HEAD = ("modelmerge", "CPU s", "wall s", "MB", "mergekit CPU s", "wall s", "MB", "fusion_bench CPU s", "wall s", "MB",
         "x mergekit", "net", "x fusion_bench", "net")  # fmt: skip


def _report(tables: Sequence[tuple[str, Inputs, list[Row]]], told: argparse.Namespace, argv: Sequence[str]) -> str:
    parts = ["# Every method beside mergekit and fusion_bench", merge_speed.made_by(argv, MODULE),
             merge_speed.machine(), _EXPLANATION.strip()]  # fmt: skip
    for title, inputs, rows in tables:
        each = inputs.nbytes / len(inputs.models)
        head = f"Base and {told.experts} Llama-shaped bfloat16 experts of {each / 1e6:.0f} MB each."
        starts = tuple(min((run.cpu for run in runs), default=0.0) for runs in rows[0].runs)
        lines = [_HEAD, *(_line(row, starts) for row in rows)]
        parts += [f"## {title}", head, merge_speed.table(lines, left=(0,))]
    parts += ["## What the others were told", "\n".join(_told(row.trio) for _, _, rows in tables for row in rows[2:])]
    return "\n\n".join(parts) + "\n"


def _line(row: Row, starts: Sequence[float]) -> tuple[str, ...]:
    cells = [row.title]
    for i, runs in enumerate(row.runs):
        cells += _cells(runs) if runs else (("fails", "", "") if i in row.failed else ("", "", ""))
    own = _middle(row.runs[0]).cpu
    for i in (1, 2):
        if row.runs[i] and row.trio is not None:
            other = _middle(row.runs[i]).cpu
            net = (other - starts[i]) / max(own - starts[0], 1e-9)
            cells += [f"{other / own:.1f}", f"{net:.1f}"]
        else:
            cells += ["", ""]
    return tuple(cells)


def _told(trio: Trio | None) -> str:
    assert trio is not None, "start and floor are told nothing"
    others = [f"{name}: {peer}" for name, peer in (("mergekit", trio.mergekit), ("fusion_bench", trio.fusion)) if peer]
    return f"- `{trio.title}`: {'; '.join(others) or 'they have no such method'}"


def _middle(runs: Sequence[Usage]) -> Usage:
    """The run of median CPU time."""
    return sorted(runs, key=lambda run: run.cpu)[len(runs) // 2]


def _cells(runs: Sequence[Usage]) -> tuple[str, str, str]:
    used = _middle(runs)
    return f"{used.cpu:.1f}", f"{used.wall:.1f}", f"{used.anonymous / 1e6:.0f} / {used.rss / 1e6:.0f}"


_EXPLANATION = f"""
mergekit {mergekit_runs.VERSION} computes in the models' bfloat16, as it does unless told otherwise. fusion_bench
{FUSION_VERSION} runs on models that transformers loads and saves, in their bfloat16, or in float32 where it decomposes
matrices, which torch cannot do in bfloat16 on a CPU. Both run on one thread of OpenMP's, which costs them the least
CPU time, and write no hashes. modelmerge computes in float32, hashes its output and syncs it to the disk; the inputs'
hashes it remembers. **CPU s** is user and system time of the whole process with its children, **MB** its anonymous
memory at the peak, which is what it needs, and its whole resident set with mapped files. **x** is the other's CPU time
over modelmerge's; **net** leaves out what importing costs either (**start**). **floor** imports as modelmerge does,
reads all tensors with safetensors and writes one model. Where **fails** stands the other ends in an error. `ties`
without options trims over the whole model, which mergekit does not offer; slerp and nearswap take one expert. A machine
that others use too makes all slower, not always alike: runs next to one another in the table ran next to one another in
time. fusion_bench's APGD (`DOGE_TA_Algorithm`) takes CLIP encoders only: RESULTS-apgd-speed.md has it.
"""


if __name__ == "__main__":
    main()
