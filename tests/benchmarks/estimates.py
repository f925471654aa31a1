"""How near the time that a plan tells comes to the time that the merge takes: `python -m tests.benchmarks.estimates`.

Models with the shapes of ViT-B/32's layers, and task vectors whose singular values fall as those of fine-tuning do, are
merged by every method; so are adapters of rank 16 on the same base. The plan's `seconds` are compared with the
merge's CPU seconds, without the program's start: run it with OMP_NUM_THREADS=1, or they are those of several
processors. Writes RESULTS-estimates.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path

import torch
from safetensors.torch import save_file

import modelmerge
from tests.benchmarks import merge_speed

MODULE = "tests.benchmarks.estimates"
RESULTS = Path(__file__).parent / "RESULTS-estimates.md"
# By set: the width, the inner width, the layers, the experts, and the rank of those that are adapters.
SETS = {"narrow": (256, 1024, 1, 4, 0), "ViT-B/32": (768, 3072, 1, 8, 0), "LoRA": (768, 3072, 1, 8, 16)}
METHODS: dict[str, dict[str, object]] = {
    "task-arithmetic": {}, "tsv-m": {}, "iso-c": {}, "iso-cts": {}, "knots": {}, "wudi": {}, "kron": {}, "apgd": {},
    "svc": {}, "actmat": {}, "ace": {},
    "apgd --published": {"published": True}, "wudi --published": {"published": True},
    "ties --disentangle apgd": {"disentangle": ["apgd"]},
    **{name: {} for name in ("average", "ties", "breadcrumbs", "consensus", "dare", "della", "pcb", "sce")},
    **{name: {} for name in ("model-stock", "karcher", "multislerp", "ram", "ramplus-tl")},
    "average --as-lora 16": {"as_lora": 16}, "ties --as-lora 16": {"as_lora": 16},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write (default: beside this one)")
    asked = parser.parse_args(argv)
    words = [shlex.quote(word) for word in (sys.argv[1:] if argv is None else argv)]
    rows = ["| models | method | plan, s | merge, CPU s | plan / merge |", "|---|---|---:|---:|---:|"]
    with merge_speed.work_directory(None) as work:
        for name in asked.sets:
            models = made(work / name.replace("/", "-"), *SETS[name])
            for method in asked.methods:
                plain = {"method": method.partition(" ")[0], **METHODS[method]}
                told = modelmerge.merge(models[0], models[1:], work / "none", dry_run=True, **plain)["seconds"]
                took = inf
                for _ in range(2):  # the first finds libraries and hashes
                    before = time.process_time()
                    modelmerge.merge(models[0], models[1:], work / "out", force=True, **plain)
                    took = min(took, time.process_time() - before)
                rows.append(f"| {name} | `{method}` | {told:.2f} | {took:.2f} | {told / took:.2f} |")
                print(rows[-1], flush=True)
    parts = ["# The time that a plan tells, and that a merge takes", merge_speed.made_by(words, MODULE),
             merge_speed.machine(), "\n".join(rows)]  # fmt: skip
    asked.results.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def made(place: Path, width: int, inner: int, layers: int, experts: int, rank: int) -> list[Path]:
    """A base and its experts, as adapters if a rank is given."""
    shapes = {"q_proj": (width, width), "k_proj": (width, width), "v_proj": (width, width), "o_proj": (width, width),
              "fc1": (inner, width), "fc2": (width, inner)}  # fmt: skip
    base = {
        f"encoder.layers.{layer}.{name}.weight": torch.randn(shape).mul(0.05)
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    directories = []
    for i in range(experts + 1):
        if i and rank:
            directories.append(adapter(place / f"expert_{i}", base, rank))
            continue
        state = {name: t + task_vector(*t.shape) if i else t for name, t in base.items()}
        directories.append(place / (f"expert_{i}" if i else "base"))
        directories[-1].mkdir(parents=True)
        save_file(state, directories[-1] / "model.safetensors")
        (directories[-1] / "config.json").write_text('{"model_type": "clip"}')
    return directories


def adapter(directory: Path, base: Mapping[str, torch.Tensor], rank: int) -> Path:
    """A LoRA adapter of all of the base's weights."""
    state, names = {}, sorted({name.split(".")[-2] for name in base})
    for name, weight in base.items():
        m, n = weight.shape
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        state |= {f"{key}A.weight": torch.randn(rank, n) * 0.02, f"{key}B.weight": torch.randn(m, rank) * 0.02}
    directory.mkdir(parents=True)
    save_file(state, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def task_vector(m: int, n: int) -> torch.Tensor:
    """[m, n]: one with singular values that fall about as i^-0.7; how many steps a solver takes depends on it."""
    k = min(m, n)
    return (torch.randn(m, k) * torch.arange(1, k + 1).float() ** -0.7) @ torch.randn(k, n) * (0.1 / k)


if __name__ == "__main__":
    main()
