"""What the methods are worth on small real experts: the figures behind the defaults.

    python -m tests.benchmarks.choose disentangle     AWD in front of task arithmetic and TIES, by scale
    python -m tests.benchmarks.choose apgd            solver, lambda mode, density and shared rank of APGD

Every set of `tests/benchmarks/experts.py` is trained with each seed, merged by the package's own mathematics, and
judged on its test split. The mean over tasks is given, averaged over seeds, with the standard deviation over seeds.
Written to `RESULTS-disentangle.md` and `RESULTS-apgd.md` beside this file. Defaults were chosen on digits,
digits-strong and text; many and lora were kept aside to confirm them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor

from modelmerge import method
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.method import Context
from modelmerge.plan import is_linear
from tests.benchmarks.experts import SETS, ExpertSet
from tests.test_every_method import surveyed

HERE = Path(__file__).parent
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Vectors:
    """A set's task vectors by tensor [T, *shape]; `linear` names the weights of linear layers."""

    base: State
    taus: State
    linear: frozenset[str]


def vectors_of(expert_set: ExpertSet) -> Vectors:
    base, experts = expert_set.base, expert_set.experts.values()
    floating = [name for name, tensor in base.items() if tensor.is_floating_point()]
    taus = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in floating}
    linear = {name for name in floating if is_linear(TensorInfo(name, "F32", tuple(base[name].shape), HERE, 0, 0), ())}
    return Vectors(base, taus, frozenset(linear))


def disentangled(vectors: Vectors, **options: Any) -> Vectors:
    """The task vectors after AWD, as `disentangle awd` makes them."""
    awd = method.load("awd", "disentangle")
    told = method.make_options(awd, "awd", options)
    names = sorted(name for name in vectors.linear if vectors.taus[name].any())
    flat = {name: vectors.taus[name].flatten(1)[:, None, :] for name in names}
    if told.granularity == "row":
        found = {name: awd.solve(awd.measure(vectors.taus[name]), told) for name in names}
    elif told.granularity == "tensor":
        found = {name: awd.solve(awd.measure(flat[name]), told) for name in names}
    else:
        one = awd.solve(sum(awd.measure(part) for part in flat.values()), told)
        found = dict.fromkeys(names, one)
    taus = dict(vectors.taus)
    for name, solution in found.items():
        grouped = taus[name] if told.granularity == "row" else flat[name]
        delta = torch.einsum("gt,tgn->gn", solution.coefficients.float(), grouped)
        taus[name] = (grouped - delta * solution.active.T[:, :, None].float()).view_as(taus[name])
    return Vectors(vectors.base, taus, vectors.linear)


def merged(vectors: Vectors, name: str, **options: Any) -> State:
    """The merged model, as `merge NAME` makes it."""
    chosen = method.load(name)
    told = method.make_options(chosen, name, options)
    taken = {key: taus for key, taus in vectors.taus.items() if key in vectors.linear or not chosen.matrices}
    survey, measured = chosen.survey(told), None
    tasks = len(next(iter(taken.values())))
    if survey is not None:
        measured = surveyed(survey, torch.cat([taus.reshape(tasks, -1) for taus in taken.values()], dim=1))
    state = dict(vectors.base)
    for key, taus in taken.items():
        context = Context(
            tensor=key, weights=(1.0,) * tasks, experts=tuple(map(str, range(tasks))), measured=measured,
            base=vectors.base[key] if chosen.wants_base else None,
        )  # fmt: skip
        state[key] = vectors.base[key] + chosen.apply(taus, told, context)
    return state


def score(expert_set: ExpertSet, state: Mapping[str, Tensor]) -> float:
    """Mean accuracy over the tasks, per cent."""
    return 100 * mean(expert_set.evaluate(state, "test").values())


def own_scores(expert_set: ExpertSet, vectors: Vectors) -> float:
    """Mean over the experts of the accuracy of base + task vector on the expert's own task, per cent."""
    scores = []
    for i, task in enumerate(expert_set.experts):
        state = vectors.base | {name: vectors.base[name] + taus[i] for name, taus in vectors.taus.items()}
        scores.append(100 * expert_set.evaluate(state, "test")[task])
    return mean(scores)


def cell(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {pstdev(values):.1f}" if len(values) > 1 else "")


def rows_of(columns: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    return [(label, cell([column[label] for column in columns])) for label in columns[0]]


def look_at_disentangling(expert_set: ExpertSet) -> dict[str, float]:
    plain = vectors_of(expert_set)
    found = {"base": score(expert_set, plain.base), "experts on their own task": own_scores(expert_set, plain)}
    forms = {"": plain}
    for granularity in ("row", "tensor", "model"):
        forms[f"AWD {granularity}"] = disentangled(plain, granularity=granularity)
        found[f"experts after AWD {granularity}"] = own_scores(expert_set, forms[f"AWD {granularity}"])
    found["average"] = score(expert_set, merged(plain, "average"))
    for scale in SCALES:
        for label, form in forms.items():
            name = f"{label} + TA {scale}" if label else f"TA {scale}"
            found[name] = score(expert_set, merged(form, "task-arithmetic", scale=scale))
    for label, form in forms.items():
        found[f"{label} + TIES" if label else "TIES"] = score(expert_set, merged(form, "ties"))
        best = max(value for key, value in found.items() if key.startswith(f"{label} + TA" if label else "TA "))
        found[f"{label} + TA, best scale" if label else "TA, best scale"] = best
    return found


def look_at_apgd(expert_set: ExpertSet) -> dict[str, float]:
    vectors = vectors_of(expert_set)
    tuned = max(score(expert_set, merged(vectors, "task-arithmetic", scale=scale)) for scale in SCALES)
    found = {
        "base": score(expert_set, vectors.base),
        "experts on their own task": own_scores(expert_set, vectors),
        "average": score(expert_set, merged(vectors, "average")),
        "TA 0.3": score(expert_set, merged(vectors, "task-arithmetic")),
        "TA, best scale": tuned,
        "TIES": score(expert_set, merged(vectors, "ties")),
    }
    adam: dict[str, Any] = {"solver": "adam", "lambda_mode": "paper", "density": 0.3}
    found["APGD as published"] = score(expert_set, merged(vectors, "apgd", **adam, tolerance=0.0))
    found["published, D = 0"] = score(expert_set, merged(vectors, "apgd", **adam | {"steps": 0}))
    found["published, no trim"] = score(expert_set, merged(vectors, "apgd", **adam | {"density": 1.0}))
    relative = {"solver": "adam", "lambda_mode": "relative", "relative_lr": 0.3, "density": 1.0}
    found["adam, relative, no trim"] = score(expert_set, merged(vectors, "apgd", **relative))
    for density in (0.3, 1.0):
        for share in (6, 3):
            for scale in (0.25, 0.35, 0.5):
                label = f"exact, relative {scale}, density {density:g}, shared rank min/{share}"
                found[label] = score(expert_set, _with_shared_rank(vectors, share, density=density, scale=scale))
    best: dict[str, Any] = {"solver": "exact", "lambda_mode": "relative", "density": 1.0}
    for rest in ("average", "task-arithmetic"):
        state = merged(vectors, rest) | {
            name: tensor for name, tensor in merged(vectors, "apgd", **best).items() if name in vectors.linear
        }
        found[f"exact, relative 0.35, density 1, shared rank min/6, rest {rest}"] = score(expert_set, state)
        published = merged(vectors, "apgd", **adam)
        state = merged(vectors, rest) | {name: published[name] for name in vectors.linear}
        found[f"APGD as published, rest {rest}"] = score(expert_set, state)
    return found


def _with_shared_rank(vectors: Vectors, share: int, **options: Any) -> State:
    """Exact, scale-free APGD with the shared rank at one `share`-th of the smaller side of each weight."""
    state = dict(vectors.base)
    for name in vectors.linear:
        rank = min(vectors.base[name].shape) // share
        part = Vectors({name: vectors.base[name]}, {name: vectors.taus[name]}, frozenset({name}))
        told = {"solver": "exact", "lambda_mode": "relative", "trim_scope": "tensor", "shared_rank": rank, **options}
        state |= merged(part, "apgd", **told)
    return state


LOOKS: dict[str, Callable[[ExpertSet], dict[str, float]]] = {
    "disentangle": look_at_disentangling,
    "apgd": look_at_apgd,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=LOOKS)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    told = parser.parse_args()
    torch.set_num_threads(1)
    columns: dict[str, list[dict[str, float]]] = {}
    for name in told.sets:
        for seed in told.seeds:
            started = time.monotonic()
            expert_set = SETS[name](seed)
            trained = time.monotonic()
            columns.setdefault(name, []).append(LOOKS[told.what](expert_set))
            seconds = trained - started, time.monotonic() - trained
            print(f"{name} seed {seed}: trained in {seconds[0]:.0f} s, merged in {seconds[1]:.0f} s", flush=True)
    tables = {name: dict(rows_of(found)) for name, found in columns.items()}
    lines = ["| | " + " | ".join(tables) + " |", "|---|" + "---:|" * len(tables)]
    for label in next(iter(tables.values())):
        lines.append(f"| {label} | " + " | ".join(rows[label] for rows in tables.values()) + " |")
    seeds = " ".join(map(str, told.seeds))
    head = (
        f"# {told.what}\n\nWritten by `python -m tests.benchmarks.choose {told.what} --sets {' '.join(told.sets)} "
        f"--seeds {seeds}`.\nMean accuracy over the tasks on the test split, per cent; mean and standard deviation "
        "over seeds\n(each seed changes data split and training).\n"
    )
    (HERE / f"RESULTS-{told.what}.md").write_text("\n".join([head, *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
