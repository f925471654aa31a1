"""What factors by layer, task-aware lambdas and methods by tensor are worth on small real experts.

    python -m tests.benchmarks.layers                  all sets, seeds 0 to 3
    python -m tests.benchmarks.layers --keep DIR       trained experts and figures stay in DIR between runs

Every merge is made by `modelmerge.merge` from and to files, with `--rest average`. Seeds 0 and 1 were looked at when
LARV's factors were chosen; seeds 2 and 3 confirm them. The table goes to `RESULTS-layers.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import modelmerge
from tests.benchmarks.choose import State
from tests.benchmarks.experts import SETS, ExpertSet, build, save
from tests.benchmarks.grid import accuracy, best_scale, scaled
from tests.support.checkpoints import read

HERE = Path(__file__).parent
METHODS = ("task-arithmetic", "ties", "tsv-m", "iso-c", "kron")
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "--layer-scale 0.8,1.2": {"layer_scale": "0.8,1.2"}}
# Attention by one method, the rest of the linear layers by another; where there is attention.
MIXED = ("ties", "tsv-m", "iso-c", "kron")
ATTENTION = ("*.[qkvo]_proj.weight", "*.out_proj.weight")
WITH_ATTENTION = ("digits", "text")
SLOW = ("text",)  # to judge: at the defaults only
Figures = dict[str, list[float]]  # "method variant" -> per cent at the defaults, and at the best scale


def merged(directory: Path, expert_set: ExpertSet, name: str, **told: Any) -> State:
    experts = {task: directory / "experts" / task for task in expert_set.experts}
    modelmerge.merge(directory / "base", experts, directory / "out", method=name, rest="average", force=True, **told)
    return read(directory / "out")


def look(expert_set: ExpertSet) -> Figures:
    found: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(expert_set, directory)
        for name in METHODS:
            for label, told in VARIANTS.items():
                state = merged(directory, expert_set, name, **told)
                found[f"{name} {label}"] = [accuracy(expert_set, state)]
                if expert_set.name not in SLOW:
                    tuned = scaled(expert_set.base, state, best_scale(expert_set, expert_set.base, state))
                    found[f"{name} {label}"].append(accuracy(expert_set, tuned))
        if expert_set.name in WITH_ATTENTION:
            for name in MIXED:
                for other in MIXED:
                    rule = [f"{glob}={other}" for glob in ATTENTION if any_match(expert_set, glob)]
                    state = merged(directory, expert_set, name, rule=rule)
                    found[f"{name} and {other}"] = [accuracy(expert_set, state)]
    return found


def any_match(expert_set: ExpertSet, glob: str) -> bool:
    return any(Path(name).match(glob) for name in expert_set.base)


def gains(columns: dict[str, list[Figures]], place: int) -> list[str]:
    """Every variant by method, in points over plain, the mean over sets and seeds; first plain itself."""
    lines = ["| | " + " | ".join(METHODS) + " | mean |", "|---|" + "---:|" * (len(METHODS) + 1)]
    for label in VARIANTS:
        cells = []
        for name in METHODS:

            def figure(figures: Figures, method: str = name, variant: str = label) -> float:
                own, plain = figures[f"{method} {variant}"][place], figures[f"{method} plain"][place]
                return own if variant == "plain" else own - plain

            cells.append(mean(mean(map(figure, column)) for column in columns.values()))
        form = "{:.1f}" if label == "plain" else "{:+.1f}"
        lines.append(f"| {label} | " + " | ".join(form.format(cell) for cell in (*cells, mean(cells))) + " |")
    return lines


def by_set(columns: dict[str, list[Figures]], place: int) -> list[str]:
    """Every variant by set, in points over plain, the mean over methods and seeds."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label in list(VARIANTS)[1:]:
        cells = [
            mean(f[f"{name} {label}"][place] - f[f"{name} plain"][place] for f in column for name in METHODS)
            for column in columns.values()
        ]
        lines.append(f"| {label} | " + " | ".join(f"{cell:+.1f}" for cell in cells) + " |")
    return lines


def mixed(columns: dict[str, list[Figures]]) -> list[str]:
    """Accuracy with attention by one method (columns) and everything else by another (rows)."""
    used = [figures for name in WITH_ATTENTION if name in columns for figures in columns[name]]
    lines = ["| the rest by \\ attention by | " + " | ".join(MIXED) + " |", "|---|" + "---:|" * len(MIXED)]
    for name in MIXED:
        cells = [mean(figures[f"{name} and {other}"][0] for figures in used) for other in MIXED]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--keep", type=Path, help="directory for trained experts and figures; empty it to start anew")
    told = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[int, dict[str, Figures]] = {}
    for seed in told.seeds:
        for name in told.sets:
            file = told.keep / f"layers-{name}-{seed}.json" if told.keep else None
            if file and file.exists():
                figures: Figures = json.loads(file.read_text())
            else:
                started = time.monotonic()
                figures = look(build(name, seed, told.keep))
                print(f"{name} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            if file:
                file.write_text(json.dumps(figures))
            found.setdefault(seed, {})[name] = figures
    lines = [
        "# Factors by layer, task-aware lambdas, methods by tensor",
        "",
        f"Written by `python -m tests.benchmarks.layers --sets {' '.join(told.sets)} "
        f"--seeds {' '.join(map(str, told.seeds))}`.",
        "Mean accuracy over the tasks on the test split, per cent, mean over sets and seeds; the variants in points",
        "over plain. The best scale is a factor on the merged task vector, chosen on the validation split; it is not",
        f"looked for on {' '.join(SLOW)}.",
    ]
    for seeds in (told.seeds[:2], told.seeds[2:]):
        columns = {name: [found[seed][name] for seed in seeds] for name in told.sets}
        for place, words in enumerate(("at the defaults", "at the best scale")) if seeds else ():
            shown = {name: column for name, column in columns.items() if not place or name not in SLOW}
            lines += ["", f"## Seeds {' and '.join(map(str, seeds))}, {words}", "", *gains(shown, place)]
            lines += ["", *by_set(shown, place)]
    columns = {name: [found[seed][name] for seed in told.seeds] for name in told.sets}
    if set(WITH_ATTENTION) & set(columns):
        sets = " and ".join(name for name in WITH_ATTENTION if name in columns)
        lines += ["", f"## One method for attention, another for the rest (`--rule`), on {sets}", "", *mixed(columns)]
    (HERE / "RESULTS-layers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
