"""Every merge method on every set of small real experts: at its defaults, at its best scale, behind AWD.

    python -m tests.benchmarks.grid                            all methods, all sets, seeds 0 to 3
    python -m tests.benchmarks.grid --keep DIR                 trained experts and figures stay in DIR between runs
    python -m tests.benchmarks.grid --methods kron wudi --sets many

The table goes to `RESULTS-grid.md` beside this file, or to `--out`. The best scale is a factor on the merged task
vector, chosen on the validation split and reported on the test split, by climbing from 1 through `SCALES`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from modelmerge import method
from tests.benchmarks.choose import State, Vectors, cell, disentangled, merged, own_scores, vectors_of
from tests.benchmarks.experts import SETS, ExpertSet, build

HERE = Path(__file__).parent
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
VARIANTS = ("defaults", "defaults, rest base", "best scale", "behind AWD")
TITLES = {
    "defaults": "At its defaults, with `--rest average` for methods that take linear layers only",
    "defaults, rest base": "At its defaults, everything but linear layers left at the base",
    "best scale": "At the best scale, chosen on the validation split",
    "behind AWD": "At its defaults behind `--disentangle awd`, with `--rest average`",
}
Figures = dict[str, dict[str, float]]  # variant -> method -> accuracy, per cent


def accuracy(expert_set: ExpertSet, state: Mapping[str, Tensor], split: str = "test") -> float:
    """Mean over the tasks, per cent."""
    return 100 * mean(expert_set.evaluate(state, split).values())


def full(vectors: Vectors, name: str) -> State:
    """The model that a method makes, the mean in place of what it leaves."""
    made = merged(vectors, name)
    if not method.load(name).matrices:
        return made
    return merged(vectors, "average") | {key: made[key] for key in vectors.linear}


def scaled(base: State, state: State, scale: float) -> State:
    return {key: base[key] + scale * (state[key] - base[key]) if base[key].is_floating_point() else base[key]
            for key in base}  # fmt: skip


def best_scale(expert_set: ExpertSet, base: State, state: State) -> float:
    """The scale at which validation is best, by climbing."""
    seen: dict[int, float] = {}

    def look(place: int) -> float:
        if not 0 <= place < len(SCALES):
            return -1.0
        if place not in seen:
            seen[place] = accuracy(expert_set, scaled(base, state, SCALES[place]), "validation")
        return seen[place]

    at = SCALES.index(1.0)
    while True:
        there = max((at - 1, at, at + 1), key=look)
        if there == at:
            return SCALES[at]
        at = there


def look(expert_set: ExpertSet, names: list[str]) -> Figures:
    vectors = vectors_of(expert_set)
    apart = disentangled(vectors)
    found: Figures = {variant: {} for variant in VARIANTS}
    found["defaults"]["(base)"] = accuracy(expert_set, vectors.base)
    found["defaults"]["(each expert on its own task)"] = own_scores(expert_set, vectors)
    for name in names:
        chosen = method.load(name)
        if len(expert_set.experts) > (chosen.most_experts or len(expert_set.experts)):
            continue
        state = full(vectors, name)
        found["defaults"][name] = accuracy(expert_set, state)
        if chosen.matrices:
            base = vectors.base | {key: state[key] for key in vectors.linear}
            found["defaults, rest base"][name] = accuracy(expert_set, base)
        scale = best_scale(expert_set, vectors.base, state)
        found["best scale"][name] = accuracy(expert_set, scaled(vectors.base, state, scale))
        found["behind AWD"][name] = accuracy(expert_set, full(apart, name))
    return found


def table(columns: Mapping[str, list[Figures]], variant: str) -> list[str]:
    """One variant's figures, best mean over the sets first."""
    names = {name for column in columns.values() for figures in column for name in figures[variant]}
    rows = []
    for name in names:
        cells = [[figures[variant][name] for figures in column if name in figures[variant]]
                 for column in columns.values()]  # fmt: skip
        if all(cells):
            overall = mean(mean(values) for values in cells)
            rows.append((name.startswith("("), overall, name, [cell(values) for values in cells]))
    lines = ["| | " + " | ".join(columns) + " | mean |", "|---|" + "---:|" * (len(columns) + 1)]
    for _, overall, name, cells in sorted(rows, key=lambda row: (not row[0], -row[1])):
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {overall:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(method.data_free()), choices=list(method.data_free()))
    parser.add_argument("--out", default="RESULTS-grid.md", help="name of the table's file beside this one")
    parser.add_argument("--keep", type=Path, help="directory for trained experts and figures; empty it to start anew")
    told = parser.parse_args()
    torch.set_num_threads(1)
    columns: dict[str, list[Figures]] = {}
    for seed in told.seeds:
        for name in told.sets:
            file = told.keep / f"figures-{name}-{seed}.json" if told.keep else None
            found: Figures = json.loads(file.read_text()) if file and file.exists() else {v: {} for v in VARIANTS}
            missing = [m for m in told.methods if m not in found["defaults"]]
            if missing:
                started = time.monotonic()
                news = look(build(name, seed, told.keep), missing)
                found = {variant: found[variant] | news[variant] for variant in VARIANTS}
                print(f"{name} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            if file:
                file.write_text(json.dumps(found))
            columns.setdefault(name, []).append(
                {v: {m: x for m, x in figures.items() if m[0] == "(" or m in told.methods}
                 for v, figures in found.items()}
            )  # fmt: skip
    command = f"--sets {' '.join(told.sets)} --seeds {' '.join(map(str, told.seeds))}"
    if len(told.methods) < len(method.data_free()):
        command += f" --methods {' '.join(told.methods)} --out {told.out}"
    lines = [
        "# Every method on every set",
        "",
        f"Written by `python -m tests.benchmarks.grid {command}`.",
        "Mean accuracy over the tasks on the test split, per cent; mean and standard deviation over seeds (each seed",
        "changes data split and training); without one, a single seed. The last column is the mean over the sets; the",
        "rows are ordered by it.",
    ]
    for variant in VARIANTS:
        lines += ["", f"## {TITLES[variant]}", "", *table(columns, variant)]
    (HERE / told.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
