"""What trimming tensor by tensor costs beside `ties`, which trims over the whole model.

`python -m tests.benchmarks.trims` makes two sets of checkpoints, merges them with each method that trims in child
processes as a user would, measures time and memory from outside, and writes RESULTS-trims.md. Linux only: memory is
read from /proc.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks import merge_speed
from tests.benchmarks.merge_speed import Inputs, Usage

MODULE = "tests.benchmarks.trims"
RESULTS = Path(__file__).parent / "RESULTS-trims.md"
MOST = 4  # experts
# By set: what it is stored in, the rows of its tables, and how many layers and tables it has; all are 1024 wide.
SETS = {"llama": ("bfloat16", 32_000, 6, 2), "table": ("float32", 63_488, 2, 1)}
WIDTH, INNER = 1024, 2816
METHODS = {
    "ties": ("ties",),
    "ties --trim-scope tensor": ("ties", "--trim-scope", "tensor"),
    "breadcrumbs": ("breadcrumbs",),
    "breadcrumbs --scope row": ("breadcrumbs", "--scope", "row"),
    "sce": ("sce",),
    "della": ("della",),
    "pcb": ("pcb",),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each thing; the median counts (default: 3)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--experts", nargs="+", type=int, default=[2, MOST])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="`ties` runs always")
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    asked = parser.parse_args(argv)
    methods = ["ties", *(name for name in asked.methods if name != "ties")]
    words = [shlex.quote(word) for word in (sys.argv[1:] if argv is None else argv)]
    parts = ["# Trims by tensor beside the trim of the whole model",
             merge_speed.made_by(words, MODULE), merge_speed.machine(),
             _EXPLANATION.strip()]  # fmt: skip
    with merge_speed.work_directory(asked.workdir) as work:
        for name in asked.sets:
            made(work, name)
            for experts in asked.experts:
                models = tuple(work / name / model for model in names()[: experts + 1])
                inputs = Inputs(name, "single", models)
                parts += [f"## {_title(name, inputs)}", _table(_measure(work, inputs, methods, asked.runs), methods)]
    text = "\n\n".join(parts) + "\n"
    asked.results.write_text(text, encoding="utf-8")
    print(text)


def names() -> list[str]:
    return ["base", *(f"expert_{i + 1}" for i in range(MOST))]


def made(work: Path, name: str) -> None:
    """The set of that name, made unless it is there."""
    directory = work / name
    if (directory / "complete").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    words = (str(directory), *map(str, SETS[name]))
    # A child: this process imports no torch, lest a child's peak begins with what that takes.
    subprocess.run([sys.executable, "-c", f"from {MODULE} import make; make()", *words], check=True)
    (directory / "complete").touch()
    time.sleep(2.5)  # modelmerge remembers no digest of a file younger than 2 s


def make() -> None:
    """In a child: write a base and its experts. Arguments: DIR DTYPE ROWS LAYERS TABLES."""
    import torch
    from safetensors.torch import save_file

    directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    rows, layers, tables = map(int, sys.argv[3:])
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (WIDTH, INNER), f"{layer}.input_layernorm.weight": (WIDTH,)}
    ends = ("model.embed_tokens.weight", "lm_head.weight")[:tables]
    shapes |= dict.fromkeys(ends, (rows, WIDTH))

    def drawn(seed: int, std: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {key: torch.empty(shape).normal_(0.0, std, generator=generator) for key, shape in shapes.items()}

    base = {key: value.to(dtype) for key, value in drawn(0, 0.02).items()}
    for i, name in enumerate(names()):
        values = base if i == 0 else {key: (base[key] + value).to(dtype) for key, value in drawn(i, 1e-3).items()}
        (directory / name).mkdir()
        save_file(values, directory / name / "model.safetensors", metadata={"format": "pt"})
        (directory / name / "config.json").write_text("{}\n")


def _measure(work: Path, inputs: Inputs, methods: Sequence[str], runs: int) -> dict[str, list[Usage]]:
    """In every round each thing runs once, so that a busy minute hits all alike."""
    used: dict[str, list[Usage]] = {name: [] for name in ("start", *methods)}
    with merge_speed.cache(work) as environment:
        environment["OMP_NUM_THREADS"] = "1"
        merge_speed.run_merge(work, inputs, "average", environment)  # unmeasured: page cache and digests
        for number in range(runs):
            merge_speed.say(f"{inputs.family}, {len(inputs.models) - 1} experts: round {number + 1} of {runs}")
            used["start"].append(merge_speed.run([sys.executable, "-c", merge_speed.START], environment))
            for name in methods:
                word, *options = METHODS[name]
                used[name].append(merge_speed.run_merge(work, inputs, word, environment, options))
    return used


def _table(used: dict[str, list[Usage]], methods: Sequence[str]) -> str:
    cpu = {name: statistics.median(run.cpu for run in runs) for name, runs in used.items()}
    whole = cpu["ties"] - cpu["start"]
    lines = [("", "CPU s", "lowest to highest", "net s", "x ties", "wall s", "anonymous MB")]
    for name in ("start", *methods):
        times, net = [run.cpu for run in used[name]], cpu[name] - cpu["start"]
        lines.append((
            name, f"{cpu[name]:.2f}", f"{min(times):.2f} to {max(times):.2f}", f"{net:.2f}", f"{net / whole:.2f}",
            f"{statistics.median(run.wall for run in used[name]):.2f}",
            f"{max(run.anonymous for run in used[name]) / 1e6:.0f}",
        ))  # fmt: skip
    return merge_speed.table(lines, left=(0,))


def _title(name: str, inputs: Inputs) -> str:
    dtype, rows, layers, tables = SETS[name]
    each = inputs.nbytes / len(inputs.models)
    of = f"{layers} layers and {tables} table{'s' if tables > 1 else ''} of {rows * WIDTH / 1e6:.0f} M entries"
    return f"{dtype}: base and {len(inputs.models) - 1} experts of {each / 1e6:.0f} MB, {of}"


_EXPLANATION = """
**CPU s** is user and system time of the whole process on one thread of OpenMP's, the median of its runs; **net** leaves
out what importing costs (**start**), and **x ties** is net over that of `ties`, which trims over the whole model. The
digests of the inputs are remembered; the output is hashed and synced to the disk. **anonymous** is the highest
anonymous memory of the process in any run. In a round every row runs once, one after the other.
"""


if __name__ == "__main__":
    main()
