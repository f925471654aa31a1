"""What a second thread costs: processor seconds of whole merges with one and two threads, alone and beside a busy loop.

    python -m tests.benchmarks.threads                  writes RESULTS-threads.md beside this file

Every figure is the median of some runs of the command line: seconds of processor time of the process, the start of
Python and torch included, and seconds on the clock. `busy` is beside one process that only counts. Two threads sleep
while they wait, as the command line has it, or spin, as libgomp does by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from tests.benchmarks.apgd_speed import task_vectors

HERE = Path(__file__).parent
METHODS = {
    "apgd": ["apgd"],
    "apgd, 60 steps of adam": ["apgd", "--solver", "adam", "--steps", "60"],
    "kron, to a tenth": ["kron", "--tolerance", "0.1"],
    "tsv-m": ["tsv-m"],
    "ties": ["ties"],
}
# ViT-B/32's, which are merged side by side, and one that is merged with all threads.
SHAPES, EXPERTS = ((768, 768), (3072, 768), (4608, 960)), 4
WAYS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 that spin": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
}


def write_models(folder: Path) -> list[str]:
    """A base and its experts; what the command line calls them."""
    shapes = {f"layers.{i}.weight": shape for i, shape in enumerate(SHAPES)}
    generator, models = torch.Generator().manual_seed(0), [dict[str, torch.Tensor]() for _ in range(EXPERTS + 1)]
    for name, (m, n) in shapes.items():
        base = torch.randn(m, n, generator=generator) * 0.02
        for model, tau in zip(models, [0.0, *task_vectors(EXPERTS, m, n, torch.device("cpu"))], strict=True):
            model[name] = base + tau
    for i, model in enumerate(models):
        (folder / f"{i}").mkdir()
        save_file(model, folder / f"{i}" / "model.safetensors", metadata={"format": "pt"})
    return [f"{'base' if not i else f'expert{i}'}={folder / str(i)}" for i in range(len(models))]


def merge(method: list[str], models: list[str], out: Path, environment: Mapping[str, str]) -> tuple[float, float, str]:
    """Seconds of processor time and on the clock of one merge, and the digest of what it wrote."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-m", "modelmerge", "merge", *method, models[0].partition("=")[2], *models[1:], "-q"]
    policies = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in policies}
    words += ["-f", "-o", str(out), "--device", "cpu"]
    subprocess.run(words, env={**kept, **environment}, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, wall, hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def row(name: str, models: list[str], folder: Path, repeats: int) -> list[str]:
    """The cells of a method: processor seconds, seconds on the clock, and whether both forms of two threads agree."""
    words = METHODS[name]
    runs = [[merge(words, models, folder / "out", way) for _ in range(repeats)] for way in WAYS.values()]
    figures = [f"{median(run[figure] for run in each):.1f}" for figure in (0, 1) for each in runs]
    return [*figures, "yes" if len({run[2] for each in runs[1:] for run in each}) == 1 else "no"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    columns = [f"{what}, {way}" for what in ("CPU s", "wall s") for way in WAYS]
    lines = [
        "# What a second thread costs\n",
        f"Written by `python -m tests.benchmarks.threads --repeats {repeats}` on {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} processors, torch {torch.__version__}. At the start "
        f"{os.getloadavg()[0]:.1f} other processes were running.\n",
        f"| | {' | '.join(columns)} | same bits with two |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    with tempfile.TemporaryDirectory() as place:
        models = write_models(Path(place))
        for name in METHODS:
            for load in ("", ", busy"):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if load else None
                try:
                    lines.append(f"| {name}{load} | {' | '.join(row(name, models, Path(place), repeats))} |")
                finally:
                    if other is not None:
                        other.kill()
                        other.wait()
                print(lines[-1], flush=True)
                (HERE / "RESULTS-threads.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
