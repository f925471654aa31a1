"""What coefficients found on unlabelled images are worth on the demo's experts, beside methods that see no data.

    python -m tests.benchmarks.adamerging                      seeds 0 to 3
    python -m tests.benchmarks.adamerging --keep DIR           trained experts stay in DIR between runs

AdaMerging is shown images without labels: of the validation split, which no expert has seen, or, as it was published,
those of the test split, which everything is judged on. Written to `RESULTS-adamerging.md` beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modelmerge.evaluation import digits
from modelmerge.evaluation.custom import draws
from modelmerge.methods.coefficients import Mixture, Options
from tests.benchmarks.choose import (
    SCALES,
    State,
    Vectors,
    cell,
    corrected,
    disentangled,
    merged,
    own_scores,
    score,
    vectors_of,
)
from tests.benchmarks.experts import ExpertSet, build
from tests.benchmarks.grid import accuracy, full

HERE = Path(__file__).parent


def adapted(vectors: Vectors, seed: int, split: str = "validation", **told: object) -> State:
    """The model that AdaMerging makes of the task vectors, on unlabelled images of a split."""
    options = Options(**told)  # type: ignore[arg-type]
    names = [name for name, taus in vectors.taus.items() if taus.any()]
    mixture = Mixture({name: (vectors.base[name], vectors.taus[name]) for name in names}, options)
    network = digits._build(0)
    losses = []
    for name, task in digits.load_tasks(seed).items():
        images = task.test_x if split == "test" else task.train_x[-(len(task.train_x) // 4) :]
        order = draws(len(images), options.batch_size, seed, name)

        def loss(images: Tensor = images, index: int = task.index, order: object = order) -> Tensor:
            batch = images[next(order)]  # type: ignore[call-overload]
            state = {**vectors.base, **mixture.values}
            owners = torch.full((len(batch),), index)
            return mixture.loss(torch.func.functional_call(network, state, (batch, owners)))

        losses.append(loss)
    for _ in mixture.steps(losses):
        pass
    return {**vectors.base, **{name: value.detach() for name, value in mixture.values.items()}}


def look(expert_set: ExpertSet, seed: int, told: Mapping[str, object]) -> dict[str, float]:
    """The figures of one seed, by row."""
    vectors = vectors_of(expert_set)
    scale = max(SCALES, key=lambda s: accuracy(expert_set, merged(vectors, "task-arithmetic", scale=s), "validation"))
    made: dict[str, Callable[[], State]] = {
        "base": lambda: dict(vectors.base),
        "task-arithmetic, scale 0.3": lambda: merged(vectors, "task-arithmetic", scale=0.3),
        "task-arithmetic, best scale": lambda: merged(vectors, "task-arithmetic", scale=scale),
        "kron": lambda: full(vectors, "kron"),
        "adamerging --granularity task": lambda: adapted(vectors, seed, granularity="task", **told),
        "adamerging": lambda: adapted(vectors, seed, **told),
        "adamerging, on the test images": lambda: adapted(vectors, seed, "test", **told),
        "adamerging --disentangle awd": lambda: adapted(disentangled(vectors), seed, **told),
        "adamerging --disentangle 'apgd correction=task'": lambda: adapted(
            corrected(vectors, correction="task"), seed, **told
        ),
    }
    return {"each expert on its own task": own_scores(expert_set, vectors)} | {
        label: score(expert_set, make()) for label, make in made.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=Options().steps)
    parser.add_argument("--lr", type=float, default=Options().lr)
    parser.add_argument("--keep", type=Path, help="directory for trained experts; empty it to start anew")
    told = parser.parse_args()
    torch.set_num_threads(1)
    columns = []
    for seed in told.seeds:
        started = time.process_time()
        columns.append(look(build("digits", seed, told.keep), seed, {"steps": told.steps, "lr": told.lr}))
        print(f"seed {seed}: {time.process_time() - started:.0f} s of processor time", flush=True)
    lines = [
        "# Coefficients found on unlabelled images",
        "",
        f"Written by `python -m tests.benchmarks.adamerging --seeds {' '.join(map(str, told.seeds))} "
        f"--steps {told.steps} --lr {told.lr:g}`.",
        "The demo's experts: mean accuracy over the six tasks on the test split, per cent; mean and standard deviation",
        "over seeds (each seed changes data split and training). AdaMerging sees unlabelled images of the validation",
        "split (314 of each task) where nothing else is said.",
        "",
        "| | accuracy |",
        "|---|---:|",
        *(f"| {label} | {cell([column[label] for column in columns])} |" for label in columns[0]),
    ]
    (HERE / "RESULTS-adamerging.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
