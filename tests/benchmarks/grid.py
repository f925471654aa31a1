"""Every merge method on every set of small real experts: at its defaults, at its best scale, behind AWD and APGD.

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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from modelmerge.methods import registry
from tests.benchmarks.choose import State, Vectors, cell, corrected, disentangled, merged, own_scores, vectors_of
from tests.benchmarks.experts import SETS, ExpertSet, build

HERE = Path(__file__).parent
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
# What stands in front of the methods, by the name of a variant.
FRONTS: dict[str, Callable[[Vectors], Vectors]] = {
    "behind AWD": disentangled,
    "behind APGD": corrected,
    "behind APGD of each": partial(corrected, correction="task"),
}
BASE_REST = "defaults, rest base"
TITLES = {
    "defaults": "At its defaults, with `--rest average` for methods that take linear layers only",
    BASE_REST: "At its defaults, everything but linear layers left at the base",
    "best scale": "At the best scale, chosen on the validation split",
    "behind AWD": "At its defaults behind `--disentangle awd`, with `--rest average`",
    "behind APGD": "At its defaults behind `--disentangle apgd`, with `--rest average`",
    "behind APGD of each": "At its defaults behind `--disentangle 'apgd correction=task'`, with `--rest average`",
    "behind APGD, best scale": "At the best scale behind `--disentangle apgd`",
}
VARIANTS = tuple(TITLES)
Figures = dict[str, dict[str, float]]  # variant -> method -> accuracy, per cent


def accuracy(expert_set: ExpertSet, state: Mapping[str, Tensor], split: str = "test") -> float:
    """Mean over the tasks, per cent."""
    return 100 * mean(expert_set.evaluate(state, split).values())


def full(vectors: Vectors, name: str) -> State:
    """The model that a method makes, the mean in place of what it leaves."""
    made = merged(vectors, name)
    if not registry.load(name).matrices:
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


def look(expert_set: ExpertSet, wanted: Mapping[str, list[str]]) -> Figures:
    """The figures of the methods that each variant wants."""
    plain = vectors_of(expert_set)
    found: Figures = {variant: {} for variant in wanted}
    if wanted["defaults"]:
        found["defaults"]["(base)"] = accuracy(expert_set, plain.base)
        found["defaults"]["(each expert on its own task)"] = own_scores(expert_set, plain)
    for front in (None, *FRONTS):
        here = {variant: names for variant, names in wanted.items() if names and front_of(variant) == front}
        vectors = FRONTS[front](plain) if front and here else plain
        for name in sorted({name for names in here.values() for name in names}):
            state = full(vectors, name)
            for variant in (variant for variant, names in here.items() if name in names):
                found[variant][name] = accuracy(expert_set, in_form(expert_set, vectors, state, variant))
    return found


def front_of(variant: str) -> str | None:
    """What a variant has in front of the methods."""
    front = variant.partition(",")[0]
    return front if front in FRONTS else None


def in_form(expert_set: ExpertSet, vectors: Vectors, state: State, variant: str) -> State:
    """A merged model as a variant has it: as it is, with the rest from the base, or at its best scale."""
    if variant == BASE_REST:
        return vectors.base | {key: state[key] for key in vectors.linear}
    if variant.endswith("best scale"):
        return scaled(vectors.base, state, best_scale(expert_set, vectors.base, state))
    return state


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
    # The sets have six experts and more.
    names = [name for name in registry.data_free() if registry.load(name).most_experts is None]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", default="RESULTS-grid.md", help="name of the table's file beside this one")
    parser.add_argument("--keep", type=Path, help="directory for trained experts and figures; empty it to start anew")
    told = parser.parse_args()
    torch.set_num_threads(1)
    columns: dict[str, list[Figures]] = {}
    for seed in told.seeds:
        for name in told.sets:
            file = told.keep / f"figures-{name}-{seed}.json" if told.keep else None
            known: Figures = json.loads(file.read_text()) if file and file.exists() else {}
            found = {variant: known.get(variant, {}) for variant in VARIANTS}
            missing = {variant: [] for variant in VARIANTS} | {
                v: [m for m in told.methods if m not in found[v] and (v != BASE_REST or registry.load(m).matrices)]
                for v in told.variants
            }
            if any(missing.values()):
                started = time.monotonic()
                news = look(build(name, seed, told.keep), missing)
                found = {variant: found[variant] | news[variant] for variant in VARIANTS}
                print(f"{name} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            if file:
                file.write_text(json.dumps(known | found))
            columns.setdefault(name, []).append(
                {v: {m: x for m, x in found[v].items() if m[0] == "(" or m in told.methods} for v in told.variants}
            )
    command = f"--sets {' '.join(told.sets)} --seeds {' '.join(map(str, told.seeds))}"
    if len(told.methods) < len(names):
        command += f" --methods {' '.join(told.methods)}"
    if len(told.variants) < len(VARIANTS):
        command += " --variants " + " ".join(f"'{variant}'" for variant in told.variants)
    command += f" --out {told.out}"
    lines = [
        "# Every method on every set",
        "",
        f"Written by `python -m tests.benchmarks.grid {command}`.",
        "Mean accuracy over the tasks on the test split, per cent; mean and standard deviation over seeds (each seed",
        "changes data split and training); without one, a single seed. The last column is the mean over the sets; the",
        "rows are ordered by it.",
    ]
    for variant in told.variants:
        lines += ["", f"## {TITLES[variant]}", "", *table(columns, variant)]
    (HERE / told.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
