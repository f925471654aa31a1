"""What the sets share: how experts are trained, kept, judged and written as checkpoints."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

State = dict[str, Tensor]
# The network's inputs, which task asks, and the right answers. One batch may mix tasks.
Batch = tuple[Tensor, Tensor, Tensor]
Sampler = Callable[[torch.Generator], Batch]
Evaluate = Callable[[Mapping[str, Tensor], str], dict[str, float]]

Built = TypeVar("Built")

SPLITS = ("validation", "test")


@dataclass(frozen=True)
class ExpertSet:
    """A base, its experts and the means to judge their merges.

    `evaluate` takes a state dict and a split, "validation" or "test", and gives the accuracy on each task, from 0
    to 1. No expert has seen either split, so a setting may be chosen on the one and reported on the other. `loras`
    are, where experts are adapters, their factors by expert: `NAME.up` [m, r] and `NAME.down` [r, n].
    """

    name: str
    description: str
    base: State
    experts: dict[str, State]
    evaluate: Evaluate
    loras: dict[str, State] = field(default_factory=dict)


def save(expert_set: ExpertSet, directory: Path) -> None:
    """Writes the set as the checkpoints `base` and `experts/NAME`, for the command line to merge."""
    config = {"model_type": "modelmerge-benchmark", "expert_set": expert_set.name, "tasks": list(expert_set.experts)}
    folders = {"base": expert_set.base} | {f"experts/{name}": state for name, state in expert_set.experts.items()}
    for folder, state in folders.items():
        (directory / folder).mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(weights, directory / folder / "model.safetensors", metadata={"format": "pt"})
        (directory / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    # Sums are split among the threads, so with another number of them the weights would differ in the last bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Shelf:
    """What is trained for a set, in order: handed out again where it is kept."""

    cache: Path | None
    kept: Iterator[State] | None
    trained: list[State] = field(default_factory=list)


_open: list[_Shelf] = []  # a set that is made from another one has that one's shelf above its own


def keep(train: Callable[..., State]) -> Callable[..., State]:
    """Training whose weights are read from the shelf where they lie there."""

    @functools.wraps(train)
    def remembered(*args: Any, **options: Any) -> State:
        shelf = _open[-1] if _open else _Shelf(None, None)
        state = train(*args, **options) if shelf.kept is None else next(shelf.kept)
        shelf.trained.append(state)
        return state

    return remembered


def shelved(name: str, seed: int, builder: Callable[[int], Built], cache: Path | None = None) -> Built:
    """The set of that name, or what else is made; with a directory `cache`, trained once and then read from there.

    A builder that asks for another set shares its cache with it, so that no expert is trained twice.
    """
    cache = cache or (_open[-1].cache if _open else None)
    folder = cache / f"{name}-{seed}" if cache else None
    lies = folder is not None and folder.exists()
    _open.append(
        _Shelf(cache, iter([load_file(file) for file in sorted(folder.iterdir())]) if folder and lies else None)
    )
    try:
        built = builder(seed)
    finally:
        shelf = _open.pop()
    if folder and shelf.trained and not lies:
        _store(shelf.trained, folder)
    return built


def _store(states: Sequence[State], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        whole = Path(unfinished) / folder.name
        whole.mkdir()
        for i, state in enumerate(states):
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, whole / f"{i:02}")
        try:
            whole.rename(folder)
        except OSError:  # another process has trained the same set meanwhile
            if not folder.exists():
                raise


@keep
def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    sample: Sampler,
    steps: int,
    seed: int,
    loras: State | None = None,
) -> State:
    """Trains the weights that the optimizer holds and returns the network's state dict."""
    _fit(network, optimizer, sample, steps, seed, loras)
    if loras is not None:
        network.load_state_dict(with_loras(network.state_dict(), loras))
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}


@keep
def train_adapters(network: nn.Module, loras: State, rate: float, sample: Sampler, steps: int, seed: int) -> State:
    """Trains low-rank updates of a network that stays as it is, and returns them."""
    _fit(network, torch.optim.Adam(loras.values(), lr=rate), sample, steps, seed, loras)
    return {name: factor.detach().clone() for name, factor in loras.items()}


def adapters(network: nn.Module, rank: int, wanted: Callable[[str], bool]) -> State:
    """New low-rank updates of the weights [m, n] of these names: `NAME.up` [m, rank], zero, and `NAME.down`."""
    loras: State = {}
    for name, weight in network.state_dict().items():
        if wanted(name):
            m, n = weight.shape
            loras[f"{name}.up"] = torch.zeros(m, rank, requires_grad=True)
            loras[f"{name}.down"] = (torch.randn(rank, n) / math.sqrt(n)).requires_grad_()
    return loras


def _fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    sample: Sampler,
    steps: int,
    seed: int,
    loras: State | None = None,
) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    order = torch.Generator().manual_seed(seed)
    frozen = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    for _ in range(steps):
        inputs, owners, answers = sample(order)
        if loras is None:
            scores = network(inputs, owners)
        else:
            scores = functional_call(network, with_loras(frozen, loras), (inputs, owners))
        loss = functional.cross_entropy(scores.flatten(0, -2), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()


def with_loras(base: Mapping[str, Tensor], loras: Mapping[str, Tensor]) -> State:
    """The weights with the low-rank updates of some of them added."""
    return {
        name: weight + loras[f"{name}.up"] @ loras[f"{name}.down"] if f"{name}.up" in loras else weight
        for name, weight in base.items()
    }


def adam(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad], lr=rate)


@torch.no_grad()
def accuracy(network: nn.Module, state: Mapping[str, Tensor], batches: Mapping[str, Batch]) -> dict[str, float]:
    network.load_state_dict(state)
    return {
        task: (network(inputs, owners).argmax(-1) == answers).float().mean().item()
        for task, (inputs, owners, answers) in batches.items()
    }
