"""Methods of the literature beside `kron`: SVC behind other methods, SWUDI, ACTMat and ACE, on small real experts.

    python -m tests.benchmarks.literature --keep DIR                     seeds 0 and 1, on which defaults were chosen
    python -m tests.benchmarks.literature --seeds 2 3 --out FILE         the confirmation

The table goes to `RESULTS-literature.md` beside this file, or to `--out`; `literature.md` says what follows from it.
The best scale is a factor on the weights of linear layers, as `--scale` is, chosen on the validation split by climbing
and reported on the test split; the other tensors are averaged. With `--keep DIR` trained experts and figures stay
there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.choose import State, merged, vectors_of
from tests.benchmarks.experts import SETS, ExpertSet, build
from tests.benchmarks.grid import SCALES, Accuracies, accuracies, accuracy, behind, overall

HERE = Path(__file__).parent
OF = ("task-arithmetic", "ties", "tsv-m", "iso-c", "wudi", "kron", "apgd")
# By label, a method with its options.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in OF},
    **{f"svc --of {name}": ("svc", {"of": name}) for name in OF},
    "svc --published": ("svc", {"published": True}),
    "svc --floor 0.5": ("svc", {"floor": 0.5}),
    "wudi --solver spectral": ("wudi", {"solver": "spectral"}),
    "actmat": ("actmat", {}),
    "actmat --cutoff 1e-4": ("actmat", {"cutoff": 1e-4}),
    "actmat --density 0.5": ("actmat", {"density": 0.5}),
    "ace": ("ace", {}),
    "ace --published": ("ace", {"published": True}),
}
Figures = dict[str, dict[str, Accuracies]]  # by label, `defaults` and `best`


def tuned(expert_set: ExpertSet, rest: State, base: State, delta: Mapping[str, Tensor]) -> State:
    """The model at the scale at which validation is best, by climbing from 1."""

    def at(place: int) -> State:
        return rest | {key: base[key] + SCALES[place] * change for key, change in delta.items()}

    seen = {-1: -1.0, len(SCALES): -1.0}

    def look(place: int) -> float:
        if place not in seen:
            seen[place] = accuracy(expert_set, at(place), "validation")
        return seen[place]

    place = SCALES.index(1.0)
    while (there := max((place - 1, place, place + 1), key=look)) != place:
        place = there
    return at(place)


def figures_of(name: str, seed: int, keep: Path | None, *, scales: bool) -> Figures:
    """The figures of a set and a seed; those that lie in `keep` are not measured again."""
    file = keep / f"literature-{name}-{seed}.json" if keep else None
    known: Figures = json.loads(file.read_text()) if file and file.exists() else {}
    wanted = {"defaults", "best"} if scales else {"defaults"}
    missing = [label for label in ROWS if not wanted <= known.get(label, {}).keys()]
    if missing:
        expert_set = build(name, seed, keep)
        vectors = vectors_of(expert_set)
        rest = merged(vectors, "average")
        for label in missing:
            method, options = ROWS[label]
            made = merged(vectors, method, **options)
            state = rest | {key: made[key] for key in vectors.linear}
            known[label] = {"defaults": accuracies(expert_set, state)}
            if scales:
                delta = {key: made[key] - vectors.base[key] for key in vectors.linear}
                known[label]["best"] = accuracies(expert_set, tuned(expert_set, rest, vectors.base, delta))
        if file:
            file.write_text(json.dumps(known))
    return known


def table(columns: Mapping[str, Sequence[Figures]], form: str) -> list[str]:
    """Mean accuracies, and how far each row is ahead of `kron`, with the standard error of that."""
    lines = ["| | " + " | ".join(columns) + " | mean |", "|---|" + "---:|" * (len(columns) + 1)]
    for label in ROWS:
        cells, means = [], []
        for seeds in columns.values():
            own, kron = ([figures[row][form] for figures in seeds] for row in (label, "kron"))
            means.append(overall(own))
            gap, error = behind(own, kron)
            cells.append(f"{means[-1]:.1f}" + ("" if label == "kron" else f" ({gap:+.1f} ± {error:.1f})"))
        lines.append(f"| `{label}` | " + " | ".join(cells) + f" | {mean(means):.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["digits", "digits-strong", "many", "text", "lora"]
    parser.add_argument("--sets", nargs="+", default=usual, choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--scales", action="store_true", help="at the best scale too")
    parser.add_argument("--out", type=Path, default=Path("RESULTS-literature.md"), help="the file beside this one")
    parser.add_argument("--keep", type=Path, help="directory for trained experts and figures")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    columns = {
        name: [figures_of(name, seed, asked.keep, scales=asked.scales) for seed in asked.seeds] for name in asked.sets
    }
    words = f"--sets {' '.join(asked.sets)} --seeds {' '.join(map(str, asked.seeds))}{' --scales' * asked.scales}"
    lines = [
        "# Methods of the literature",
        "",
        f"Written by `python -m tests.benchmarks.literature {words} --out {asked.out}`.",
        "Mean accuracy over the tasks on the test split, per cent, mean over seeds; in brackets how far the row is",
        "ahead of `kron`, mean ± standard error over tasks and seeds.",
        "",
        "## At the defaults",
        "",
        *table(columns, "defaults"),
    ]
    if asked.scales:
        lines += ["", "## At the best scale, chosen on the validation split", "", *table(columns, "best")]
    (HERE / asked.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
