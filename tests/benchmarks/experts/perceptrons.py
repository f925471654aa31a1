"""`digits-strong` and `many`: residual MLPs on images of digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.experts.training import SPLITS, Batch, ExpertSet, accuracy, adam, reproducible, train


class _Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, 2 * hidden)
        self.fc2 = nn.Linear(2 * hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.fc2(functional.relu(self.fc1(self.layer_norm(features))))


class _Perceptron(nn.Module):
    """A residual MLP with a frozen head per task, as in the demo: only what comes before is fine-tuned."""

    def __init__(self, pixels: int, hidden: int, layers: int, tasks: int, labels: int) -> None:
        super().__init__()
        self.embed_pixels = nn.Linear(pixels, hidden)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block(hidden) for _ in range(layers))
        self.encoder.layer_norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, tasks * labels, bias=False)
        nn.init.orthogonal_(self.classifier.weight, gain=2.0)
        self.classifier.requires_grad_(False)
        self.shape = (tasks, labels)

    def forward(self, images: Tensor, owners: Tensor) -> Tensor:
        features = self.embed_pixels(images.flatten(1))
        for layer in self.encoder.layers:
            features = layer(features)
        scores = self.classifier(self.encoder.layer_norm(features)).unflatten(1, self.shape)
        return scores[torch.arange(len(images)), owners]


@dataclass(frozen=True)
class _Digits:
    """The digits in three parts: for training, for validation and for the test."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]

    @classmethod
    def load(cls, seed: int) -> _Digits:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32) / 16
        labels = torch.tensor(data.target)
        shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts = dict(zip(("train", *SPLITS), shuffled.split([897, 300, 600]), strict=True))
        return cls({k: images[v] for k, v in parts.items()}, {k: labels[v] for k, v in parts.items()})


# What is asked about two digits. Sum and product are taken modulo ten, so that every answer is one of ten labels.
_PAIR_TASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "left": lambda left, right: left,
    "right": lambda left, right: right,
    "sum": lambda left, right: (left + right) % 10,
    "difference": lambda left, right: (left - right).abs(),
    "larger": torch.maximum,
    "smaller": torch.minimum,
    "order": lambda left, right: 1 + (left - right).sign(),
    "parities": lambda left, right: left % 2 * 2 + right % 2,
}
# The base sees few images, so that it is mediocre; the rate is high, so that the experts go far from it.
_PAIR_BASE_IMAGES, _PAIR_BASE_STEPS, _PAIR_BASE_RATE = 30, 200, 1e-3
_PAIR_STEPS, _PAIR_RATE, _PAIR_BATCH = 500, 2e-3, 128


def build_digits_strong(seed: int) -> ExpertSet:
    """A residual MLP that answers questions about two digits side by side, fine-tuned long with Adam."""
    data = _Digits.load(seed)

    def pairs(part: str, owners: Tensor, order: torch.Generator, first: int | None = None) -> Batch:
        images, labels = data.images[part][:first], data.labels[part][:first]
        left, right = torch.randint(len(labels), (2, len(owners)), generator=order)
        answers = torch.stack([ask(labels[left], labels[right]) for ask in _PAIR_TASKS.values()])
        return torch.cat([images[left], images[right]], 2), owners, answers[owners, torch.arange(len(owners))]

    with reproducible(seed):
        network = _Perceptron(128, 160, 4, len(_PAIR_TASKS), 10)
        fixed = torch.Generator().manual_seed(seed)
        judged = {
            split: {task: pairs(split, torch.full((2000,), index), fixed) for index, task in enumerate(_PAIR_TASKS)}
            for split in SPLITS
        }

        def mixed(order: torch.Generator) -> Batch:
            owners = torch.randint(len(_PAIR_TASKS), (_PAIR_BATCH,), generator=order)
            return pairs("train", owners, order, _PAIR_BASE_IMAGES)

        base = train(network, adam(network, _PAIR_BASE_RATE), mixed, _PAIR_BASE_STEPS, seed)
        experts = {}
        for index, task in enumerate(_PAIR_TASKS):
            network.load_state_dict(base)

            def sample(order: torch.Generator, index: int = index) -> Batch:
                return pairs("train", torch.full((_PAIR_BATCH,), index), order)

            experts[task] = train(network, adam(network, _PAIR_RATE), sample, _PAIR_STEPS, seed)
    return ExpertSet(
        "digits-strong",
        "residual MLP, eight questions about two digits, long fine-tuning with Adam",
        base,
        experts,
        lambda state, split: accuracy(network, state, judged[split]),
    )


_GEOMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "left": lambda images: images.rot90(1, (1, 2)),
    "right": lambda images: images.rot90(-1, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "tumbled": lambda images: images.flip(1),
    "transposed": lambda images: images.transpose(1, 2),
    "swapped": lambda images: images.roll(4, 2),
    "stacked": lambda images: images.roll(4, 1),
}
_INKS: dict[str, Callable[[Tensor], Tensor]] = {"bright": lambda images: images, "dark": lambda images: 1 - images}
_MANY_BASE_IMAGES, _MANY_BASE_STEPS, _MANY_BASE_RATE = 30, 200, 1e-3
_MANY_STEPS, _MANY_RATE, _MANY_BATCH = 150, 3e-4, 64


def build_many(seed: int) -> ExpertSet:
    """Sixteen views of the digits for a residual MLP, each fine-tuned weakly: many small task vectors to share."""
    data = _Digits.load(seed)
    views = {
        f"{geometry}-{ink}": (lambda images, turn=turn, tint=tint: tint(turn(images)))
        for geometry, turn in _GEOMETRIES.items()
        for ink, tint in _INKS.items()
    }
    seen = {part: torch.stack([view(images) for view in views.values()]) for part, images in data.images.items()}
    judged = {
        split: {task: (seen[split][index], torch.full_like(labels, index), labels) for index, task in enumerate(views)}
        for split, labels in data.labels.items()
        if split in SPLITS
    }

    def draw(owners: Tensor, images: int, order: torch.Generator) -> Batch:
        chosen = torch.randint(images, owners.shape, generator=order)
        return seen["train"][owners, chosen], owners, data.labels["train"][chosen]

    def mixed(order: torch.Generator) -> Batch:
        return draw(torch.randint(len(views), (2 * _MANY_BATCH,), generator=order), _MANY_BASE_IMAGES, order)

    with reproducible(seed):
        network = _Perceptron(64, 160, 3, len(views), 10)
        base = train(network, adam(network, _MANY_BASE_RATE), mixed, _MANY_BASE_STEPS, seed)
        experts = {}
        for index, task in enumerate(views):
            network.load_state_dict(base)

            def sample(order: torch.Generator, index: int = index) -> Batch:
                return draw(torch.full((_MANY_BATCH,), index), len(data.labels["train"]), order)

            experts[task] = train(network, adam(network, _MANY_RATE), sample, _MANY_STEPS, seed)
    return ExpertSet(
        "many",
        "residual MLP, sixteen views of digits, short fine-tuning with Adam",
        base,
        experts,
        lambda state, split: accuracy(network, state, judged[split]),
    )
