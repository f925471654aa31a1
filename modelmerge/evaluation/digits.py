"""Small real experts for the demo: six ways of looking at handwritten digits.

The data are scikit-learn's 1797 digit images (8x8 pixels), which need no download. Each task shows the same
images through another view (mirrored, rotated, ...) and asks for the digit. One small transformer answers them
all: its classifier holds ten rows for each task and stays frozen while an expert trains, as the text-made
classifiers of CLIP do, so that only what comes before it has to be merged.

The base has seen a few images per digit, so it is a mediocre generalist; an expert has studied one view on the
whole training set. Images of the test split are in no view's training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelmerge.engine.parallel import threads

State = dict[str, Tensor]

_DIGITS = 10
_IMAGE = 8
_PATCH = 4
_PATCHES = (_IMAGE // _PATCH) ** 2
_HIDDEN = 96
_LAYERS = 3
_HEADS = 4

_TEST_SHARE = 0.3
_BASE_SHOTS = 2  # More images per digit make a better base, and leave the experts and their merges less to gain.
_BASE_STEPS, _BASE_RATE = 300, 1e-3
_EXPERT_STEPS, _EXPERT_RATE = 150, 2e-3  # Small and short: task vectors add up well only near the base.
_BATCH = 64


def _stripe(images: Tensor) -> Tensor:
    stripes = images.clone()
    stripes[:, 1::2] = 1 - stripes[:, 1::2]
    return stripes


# No two views differ by a half turn: a 6 in the one would be a 9 in the other.
_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda images: 1 - images,  # dark digits on a bright ground
    "striped": _stripe,  # every second row of pixels inverted
    "rotated": lambda images: images.rot90(1, (1, 2)),  # turned left by 90 degrees
    "mirrored": lambda images: images.flip(2),
    "swapped": lambda images: images.roll(_IMAGE // 2, 2),  # left and right halves exchanged
    "transposed": lambda images: images.transpose(1, 2),
}

TASKS: tuple[str, ...] = tuple(_VIEWS)

CONFIG: dict[str, object] = {
    "model_type": "modelmerge-digits", "image_size": _IMAGE, "patch_size": _PATCH, "hidden_size": _HIDDEN,
    "intermediate_size": 2 * _HIDDEN, "num_hidden_layers": _LAYERS, "num_attention_heads": _HEADS,
    "labels_per_task": _DIGITS, "tasks": list(TASKS),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Task:
    """One view of the digits.

    Attributes:
        index: Place of the task in `TASKS`; it says which rows of the classifier answer.
        train_x: Training images, of shape (images, 8, 8), with values from 0 to 1.
        train_y: The digit in each training image.
        test_x: Test images, which no training sees in any view.
        test_y: The digit in each test image.
    """

    index: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class _Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(_HIDDEN)
        self.q_proj = nn.Linear(_HIDDEN, _HIDDEN)
        self.k_proj = nn.Linear(_HIDDEN, _HIDDEN)
        self.v_proj = nn.Linear(_HIDDEN, _HIDDEN)
        self.out_proj = nn.Linear(_HIDDEN, _HIDDEN)
        self.layer_norm2 = nn.LayerNorm(_HIDDEN)
        self.fc1 = nn.Linear(_HIDDEN, 2 * _HIDDEN)
        self.fc2 = nn.Linear(2 * _HIDDEN, _HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.layer_norm1(tokens)
        query, key, value = (
            projection(inputs).unflatten(2, (_HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out_proj(heads.transpose(1, 2).flatten(2))
        grown: Tensor = self.fc2(functional.gelu(self.fc1(self.layer_norm2(tokens))))
        return tokens + grown


class _Embeddings(nn.Module):
    """Cuts an image into square patches and embeds each with its position."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(_PATCH * _PATCH, _HIDDEN)
        self.position = nn.Parameter(0.5 * torch.randn(_PATCHES, _HIDDEN))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, _PATCH, _PATCH).unfold(2, _PATCH, _PATCH).reshape(-1, _PATCHES, _PATCH * _PATCH)
        tokens: Tensor = self.patch(patches)
        return tokens + self.position


class _Encoder(nn.Module):
    """The layers, whose last tokens are averaged into one vector per image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.layer_norm = nn.LayerNorm(_HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        image: Tensor = self.layer_norm(tokens.mean(1))
        return image


class _Network(nn.Module):
    """A transformer that gives the ten digit scores of the task asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        self.encoder = _Encoder()
        self.classifier = nn.Linear(_HIDDEN, _DIGITS * len(TASKS), bias=False)
        # Orthogonal rows keep what one expert writes for its own rows out of the other tasks' scores. They are
        # twice unit length because the frozen rows cannot grow to make the scores sharp.
        nn.init.orthogonal_(self.classifier.weight, gain=2.0)
        self.classifier.requires_grad_(False)

    def forward(self, images: Tensor, owners: Tensor) -> Tensor:
        scores = self.classifier(self.encoder(self.embeddings(images))).unflatten(1, (len(TASKS), _DIGITS))
        answers: Tensor = scores[torch.arange(len(images)), owners]
        return answers


def load_tasks(seed: int = 0) -> dict[str, Task]:
    """Loads the digits and shows them in every task's view.

    Args:
        seed: Decides which images are for testing; the share of each digit is the same in both splits.

    Returns:
        The tasks by name, in the order of `TASKS`.

    Raises:
        ImportError: If scikit-learn, an optional dependency, is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The images are split before any view is made, so a test image is not seen in training in another view.
    parts = train_test_split(
        digits.images, digits.target, test_size=_TEST_SHARE, stratify=digits.target, random_state=seed
    )
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) / 16 for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return {
        name: Task(index, view(train_x), train_y, view(test_x), test_y)
        for index, (name, view) in enumerate(_VIEWS.items())
    }


def train_base(tasks: Mapping[str, Task], *, seed: int = 0) -> State:
    """Trains the base from scratch on a few images of each digit, shown in every view.

    Args:
        tasks: The tasks from `load_tasks`.
        seed: Decides the first weights and the order of the images.

    Returns:
        The base's state dict.
    """
    labels = next(iter(tasks.values())).train_y
    shots = torch.cat([(labels == digit).nonzero().flatten()[:_BASE_SHOTS] for digit in range(_DIGITS)])
    images = torch.cat([task.train_x[shots] for task in tasks.values()])
    owners = torch.tensor([task.index for task in tasks.values()]).repeat_interleave(len(shots))
    network = _build(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=_BASE_RATE)
    return _train(network, optimizer, images, labels[shots].repeat(len(tasks)), owners, _BASE_STEPS, seed)


def train_expert(base: Mapping[str, Tensor], task: Task, *, seed: int = 0) -> State:
    """Fine-tunes the base on one task's training split; the classifier stays as it is.

    Args:
        base: The base's state dict, which is left unchanged.
        task: The task to become good at.
        seed: Decides the order of the images.

    Returns:
        The expert's state dict.
    """
    network = _build(seed)
    network.load_state_dict(base)
    # Plain momentum, for Adam moves every weight about as far as any other: its task vectors have no large entries
    # for the trimming methods (TIES, APGD) to keep.
    optimizer = torch.optim.SGD(network.parameters(), lr=_EXPERT_RATE, momentum=0.9)
    owners = torch.full_like(task.train_y, task.index)
    return _train(network, optimizer, task.train_x, task.train_y, owners, _EXPERT_STEPS, seed)


def accuracy(state: Mapping[str, Tensor], task: Task) -> float:
    """Measures a base, an expert or a merge on one task's test split.

    Args:
        state: The model's state dict.
        task: The task to measure on.

    Returns:
        The share of images answered right, from 0 to 1.
    """
    return int(right(state, task).sum()) / len(task.test_y)


def right(state: Mapping[str, Tensor], task: Task) -> Tensor:
    """Which images of a task's test split a model answers right, bool [n]."""
    network = _build(seed=0)
    network.load_state_dict(state)
    with torch.no_grad(), threads(1):  # the network is too small to share out
        answers = network(task.test_x, torch.full_like(task.test_y, task.index)).argmax(1)
    return answers == task.test_y


def scores(model: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """A model's scores at all tasks, image by image, as a function of suite `custom`."""
    answers = {name: right(model, task).int().tolist() for name, task in load_tasks().items()}
    return {name: {"items": items, "metric": "accuracy"} for name, items in answers.items()}


def unlabelled(expert: Any) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network and its task's training images, as a function of unlabelled data."""
    task = load_tasks()[expert.name]
    return _build(seed=0), (task.train_x, torch.full_like(task.train_y, task.index))


def _build(seed: int) -> _Network:
    # Forking keeps the caller's random numbers as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Network()


def _train(
    network: _Network, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, owners: Tensor, steps: int,
    seed: int,
) -> State:  # fmt: skip
    # A short warm-up, then a straight line to zero: the last steps settle, so less noise is left in a task vector.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images), (_BATCH,), generator=order)
        loss = functional.cross_entropy(network(images[batch], owners[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}
