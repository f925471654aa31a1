"""Every merge method on every set of small real experts: at its defaults and at its best scale, in one table.

    python -m tests.benchmarks.grid --keep DIR --jobs 2        all methods, all sets, seeds 0 and 1
    python -m tests.benchmarks.grid --methods kron wudi --sets many --leads kron
    python -m tests.benchmarks.grid --fronts --out RESULTS-fronts.md      the same behind AWD and APGD

The table goes to `RESULTS-grid.md` beside this file, or to `--out`. The best scale is a factor on the merged task
vector, chosen on the validation split and reported on the test split, by climbing from 1 through `SCALES`. Methods
are compared task by task and seed by seed: what is not beyond two standard errors of the mean difference from the
best method of a set is level with it.

Each set and seed is a job of one thread. With `--keep DIR` the trained experts and the figures stay there: a run that
was stopped goes on, and figures are measured anew once the methods' code has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

import modelmerge.methods
from modelmerge.methods import registry
from tests.benchmarks.choose import State, Vectors, corrected, disentangled, merged, vectors_of
from tests.benchmarks.experts import SETS, ExpertSet, build

HERE = Path(__file__).parent
SCALES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
DEFAULTS, BEST = "defaults", "best scale"
# What stands in front of the methods.
FRONTS: dict[str, Callable[[Vectors], Vectors]] = {
    "": lambda vectors: vectors,
    "awd": disentangled,
    "apgd": corrected,
    "apgd correction=task": partial(corrected, correction="task"),
}
BASE, EXPERTS = "(base)", "(each expert on its own task)"
Accuracies = dict[str, float]  # by task, per cent
# By front, by method, by form (`DEFAULTS` or `BEST`).
Figures = dict[str, dict[str, dict[str, Accuracies]]]


def accuracies(expert_set: ExpertSet, state: State, split: str = "test") -> Accuracies:
    """By task, per cent."""
    return {task: 100 * value for task, value in expert_set.evaluate(state, split).items()}


def accuracy(expert_set: ExpertSet, state: State, split: str = "test") -> float:
    """Mean over the tasks, per cent."""
    return mean(accuracies(expert_set, state, split).values())


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


def look(expert_set: ExpertSet, wanted: Mapping[str, Sequence[str]]) -> Figures:
    """The figures of the methods that are wanted behind each front."""
    plain = vectors_of(expert_set)
    found: Figures = {front: {} for front in wanted}
    for front, names in wanted.items():
        if names:
            vectors = FRONTS[front](plain)
            own = {
                task: 100 * expert_set.evaluate(model(vectors, i), "test")[task]
                for i, task in enumerate(expert_set.experts)
            }
            found[front][BASE] = {DEFAULTS: accuracies(expert_set, plain.base)}
            found[front][EXPERTS] = {DEFAULTS: own}
        for name in names:
            state = full(vectors, name)
            tuned = scaled(plain.base, state, best_scale(expert_set, plain.base, state))
            found[front][name] = {DEFAULTS: accuracies(expert_set, state), BEST: accuracies(expert_set, tuned)}
    return found


def model(vectors: Vectors, i: int) -> State:
    """The base with one task vector."""
    return vectors.base | {key: vectors.base[key] + taus[i] for key, taus in vectors.taus.items()}


def figures_of(name: str, seed: int, methods: Sequence[str], fronts: Sequence[str], keep: Path | None) -> Figures:
    """The figures of a set and a seed, of which those that lie in `keep` are not measured again."""
    torch.set_num_threads(1)
    file = keep / f"figures-{name}-{seed}-{code()}.json" if keep else None
    known: Figures = json.loads(file.read_text()) if file and file.exists() else {}
    missing = {front: [method for method in methods if method not in known.get(front, {})] for front in fronts}
    if any(missing.values()):
        news = look(build(name, seed, keep), missing)
        known |= {front: known.get(front, {}) | figures for front, figures in news.items()}
        if file:
            file.write_text(json.dumps(known))
    return known


def code() -> str:
    """A name for the methods as they are."""
    found = hashlib.sha256()
    for file in sorted(Path(modelmerge.methods.__path__[0]).rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


# --- the table -------------------------------------------------------------------------------------------------------


def behind(best: Sequence[Accuracies], other: Sequence[Accuracies]) -> tuple[float, float]:
    """How far `other` is behind, mean over tasks and seeds, and the standard error of that: seeds in the same order."""
    differences = [a[task] - b[task] for a, b in zip(best, other, strict=True) for task in a]
    return mean(differences), stdev(differences) / math.sqrt(len(differences))


def overall(seeds: Sequence[Accuracies]) -> float:
    return mean(mean(accuracies.values()) for accuracies in seeds)


def level(column: Mapping[str, Sequence[Accuracies]]) -> set[str]:
    """The methods of a set that are not behind its best one by more than two standard errors."""
    best = max(column, key=lambda name: overall(column[name]))
    gaps = {name: behind(column[best], seeds) for name, seeds in column.items()}
    return {name for name, (gap, error) in gaps.items() if gap <= 2 * error}


def noise(column: Mapping[str, Sequence[Accuracies]]) -> float:
    """The usual standard error of a method's distance from the best one."""
    best = max(column, key=lambda name: overall(column[name]))
    errors = sorted(behind(column[best], seeds)[1] for name, seeds in column.items() if name != best)
    return errors[len(errors) // 2]


def table(columns: Mapping[str, Sequence[Figures]], front: str, methods: Sequence[str]) -> list[str]:
    """The figures behind a front, the best mean over the sets first."""
    shown = {
        form: {
            name: {method: [figures[front][method][form] for figures in seeds] for method in methods}
            for name, seeds in columns.items()
        }
        for form in (DEFAULTS, BEST)
    }
    marked = {form: {name: level(column) for name, column in sets.items()} for form, sets in shown.items()}

    def cell(form: str, name: str, method: str) -> str:
        return f"{overall(shown[form][name][method]):.1f}" + "*" * (method in marked[form][name])

    def average(form: str, method: str) -> float:
        return mean(overall(column[method]) for column in shown[form].values())

    lines = ["| | " + " | ".join(columns) + " | mean |", "|---|" + "---:|" * (len(columns) + 1)]
    for label in (EXPERTS, BASE):
        values = [overall([figures[front][label][DEFAULTS] for figures in seeds]) for seeds in columns.values()]
        lines.append(f"| {label} | " + " | ".join(f"{value:.1f}" for value in values) + f" | {mean(values):.1f} |")
    for method in sorted(methods, key=lambda method: -average(DEFAULTS, method)):
        cells = [" / ".join(cell(form, name, method) for form in shown) for name in columns]
        means = " / ".join(f"{average(form, method):.1f}" for form in shown)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {means} |")
    if len(methods) > 1:
        errors = [" / ".join(f"{noise(shown[form][name]):.1f}" for form in shown) for name in columns]
        lines.append("| (standard error) | " + " | ".join(errors) + " | |")
    return lines


def leads(columns: Mapping[str, Sequence[Figures]], front: str, methods: Sequence[str], chosen: str) -> list[str]:
    """How far a method is ahead of each other one, with the standard error, at the defaults / at the best scale."""

    def cell(seeds: Sequence[Figures], other: str) -> str:
        pairs = [
            behind(*([figures[front][method][form] for figures in seeds] for method in (chosen, other)))
            for form in (DEFAULTS, BEST)
        ]
        return " / ".join(f"{lead:+.1f} ± {error:.1f}" for lead, error in pairs)

    lines = [f"| {chosen} less | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for other in methods:
        if other != chosen:
            lines.append(f"| {other} | " + " | ".join(cell(seeds, other) for seeds in columns.values()) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    names = [name for name in registry.data_free() if registry.load(name).most_experts is None]
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--leads", metavar="METHOD", choices=names, help="one of them beside each other one too")
    parser.add_argument("--fronts", action="store_true", help="behind AWD and APGD, in place of the plain methods")
    parser.add_argument("--out", type=Path, default=Path("RESULTS-grid.md"), help="the table's file beside this one")
    parser.add_argument("--keep", type=Path, help="directory for trained experts and figures")
    parser.add_argument("--jobs", type=int, default=1, help="sets and seeds at a time")
    asked = parser.parse_args()
    fronts = list(FRONTS)[1:] if asked.fronts else [""]
    found: dict[tuple[str, int], Figures] = {}
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as processes:
        started = time.monotonic()
        jobs = {
            processes.submit(figures_of, name, seed, asked.methods, fronts, asked.keep): (name, seed)
            for name in asked.sets
            for seed in asked.seeds
        }
        for job in as_completed(jobs):
            name, seed = jobs[job]
            try:
                found[name, seed] = job.result()
                print(f"{name} seed {seed}: there after {time.monotonic() - started:.0f} s", flush=True)
            except ModuleNotFoundError as error:  # of a set whose model is a package
                print(f"left out: {error}", flush=True)
    sets = [name for name in asked.sets if all((name, seed) in found for seed in asked.seeds)]
    columns = {name: [found[name, seed] for seed in asked.seeds] for name in sets}
    command = f"--sets {' '.join(sets)} --seeds {' '.join(map(str, asked.seeds))}"
    if len(asked.methods) < len(names):
        command += f" --methods {' '.join(asked.methods)}"
    command += f" --leads {asked.leads}" if asked.leads else ""
    lines = [
        "# Every method on every set",
        "",
        f"Written by `python -m tests.benchmarks.grid {command}{' --fronts' * asked.fronts} --out {asked.out}`.",
        "Mean accuracy over the tasks on the test split, per cent, mean over seeds (each seed changes data split and",
        "training): at the method's defaults / at the best scale, chosen on the validation split. Methods for linear",
        "layers have `--rest average`. A star: not behind the best method of the set by more than two standard errors",
        "of the difference, task by task and seed by seed. The last row is the median of these standard errors; the",
        "last column is the mean over the sets, by which the rows are ordered.",
    ]
    for front in fronts:
        lines += ["", f'## Behind `--disentangle "{front}"`'] if front else []
        lines += ["", *table(columns, front, asked.methods)]
        lines += ["", *leads(columns, front, asked.methods, asked.leads)] if asked.leads else []
    (HERE / asked.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
