"""What an expert that was trained much farther than the others costs, and what `--weight balanced` gives back.

    python -m tests.benchmarks.balanced --keep DIR      digits-strong, many and vision, seeds 0 and 1

Each set is merged with its experts as they are, and with one of them trained on until its task vector is seven times
as long as the others (of `vision`, as far as the set `unequal` has it), both without and with balanced weights. Written
to `RESULTS-balanced.md` beside this file. `balanced.md` has the reasons.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median_high, stdev
from typing import Any

import torch
from torch import Tensor, nn

from modelmerge.engine.lengths import weigh
from modelmerge.methods import registry
from tests.benchmarks.choose import Vectors, merged, vectors_of
from tests.benchmarks.experts import ExpertSet, build, perceptrons
from tests.benchmarks.experts.training import Sampler, State, adam, keep, shelved, train

HERE = Path(__file__).parent
METHODS = ("kron", "wudi", "tsv-m", "apgd", "ties", "task-arithmetic")
_TIMES, _ROUNDS, _STEPS = 7.0, 40, 200


def far_twin(even: ExpertSet, seed: int, cache: Path | None) -> ExpertSet:
    """The set with one of its experts trained much farther."""
    if even.name == "vision":
        return build("unequal", seed, cache)
    return shelved(f"{even.name}-far", seed, lambda seed: _trained_on(even, seed), cache)


def _trained_on(even: ExpertSet, seed: int) -> ExpertSet:
    names = list(even.experts)
    place = (3 * seed + 1) % len(names)
    usual = median_high(_length(expert, even.base) for expert in even.experts.values())
    states = iter([even.base, *even.experts.values()])

    def in_place(network: nn.Module, optimizer: torch.optim.Optimizer, sample: Sampler, *others: Any) -> State:
        """Hand out what is trained already, but for the one expert."""
        state = next(states)
        return _far(network, even.base, usual, optimizer, sample) if state is even.experts[names[place]] else state

    perceptrons.train, builder = in_place, getattr(perceptrons, f"build_{even.name.replace('-', '_')}")
    try:
        return builder(seed)
    finally:
        perceptrons.train = train


@keep
def _far(network: nn.Module, base: State, usual: float, optimizer: torch.optim.Optimizer, sample: Sampler) -> State:
    """Train at rising rates until the weights are so many times as far from the base as is usual."""
    rate, state = optimizer.param_groups[0]["lr"], base
    for i in range(_ROUNDS):
        state = train.__wrapped__(network, adam(network, rate * (1.5 + i / 2)), sample, _STEPS, 100 + i)
        if _length(state, base) >= _TIMES * usual:
            break
    return state


def _length(state: State, base: State) -> float:
    matrices = [name for name, tensor in base.items() if tensor.dim() == 2 and name.startswith("encoder")]
    return sum(float((state[name] - base[name]).double().square().sum()) for name in matrices) ** 0.5


def weighed(vectors: Vectors, weights: Sequence[float]) -> Vectors:
    """The task vectors times the experts' weights, which is what methods for linear layers make of weights."""
    factors = torch.tensor(weights)
    taus = {name: tau * factors.view(-1, *[1] * (tau.dim() - 1)) for name, tau in vectors.taus.items()}
    return replace(vectors, taus=taus)


def look(expert_set: ExpertSet, method: str, *, balanced: bool) -> list[float]:
    """Accuracy of a merge on each task, per cent."""
    vectors = vectors_of(expert_set)
    squares = sum(vectors.taus[name].flatten(1).double().square().sum(1) for name in vectors.linear)
    assert isinstance(squares, Tensor), "there are linear layers"
    weights = [each.weight for each in weigh(squares.sqrt().tolist())] if balanced else [1.0] * len(expert_set.experts)
    state = merged(weighed(vectors, weights), method)
    if registry.load(method).matrices:  # the mean of the rest is one by the weights
        rest = merged(weighed(vectors, [w * len(weights) / sum(weights) for w in weights]), "average")
        state = rest | {name: state[name] for name in vectors.linear}
    scores = expert_set.evaluate(state, "test")
    return [100 * scores[task] for task in expert_set.experts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=["digits-strong", "many", "vision"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--keep", type=Path, help="directory in which trained experts are kept between runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| set | method | even | balanced even | one far | balanced | beside even |", "|---|---|" + "---:|" * 5]
    for name in options.sets:
        cells: dict[str, list[list[list[float]]]] = {method: [] for method in METHODS}
        for seed in options.seeds:
            even = build(name, seed, options.keep)
            far = far_twin(even, seed, options.keep)
            for method in METHODS:
                both = [look(each, method, balanced=b) for each in (even, far) for b in (False, True)]
                cells[method].append(both)
            print(f"{name} seed {seed}", flush=True)
        for method, seeds in cells.items():
            columns = [[score for seed in seeds for score in seed[i]] for i in range(4)]
            lost = [after - before for before, after in zip(columns[0], columns[3], strict=True)]
            error = stdev(lost) / len(lost) ** 0.5
            figures = " | ".join(f"{mean(column):.1f}" for column in columns)
            lines.append(f"| {name} | `{method}` | {figures} | {mean(lost):+.1f} ± {error:.1f} |")
    seeds = " ".join(map(str, options.seeds))
    head = (
        "# Experts that went far\n\nWritten by `python -m tests.benchmarks.balanced --sets "
        f"{' '.join(options.sets)} --seeds {seeds}`.\nMean accuracy over tasks and seeds, per cent. Even: all experts "
        "trained alike. The last column is the mean of the\ndifferences between balanced and even over tasks and "
        "seeds, with its standard error.\n"
    )
    (HERE / "RESULTS-balanced.md").write_text("\n".join([head, *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
