"""`vision` and `vision-2`: a small vision transformer on eight tasks of pictures each, fully fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.experts import pictures
from tests.benchmarks.experts.training import (
    SPLITS,
    Batch,
    ExpertSet,
    State,
    accuracy,
    adam,
    reproducible,
    shelved,
    train,
)

_HIDDEN, _LAYERS, _PATCH = 96, 4, 4
_POOLS = {"train": 2000, "validation": 250, "test": 500}
_BASE_RATE, _BASE_BATCH, _BATCH = 1e-3, 64, 32
# How many times the steps and the rate of an expert that goes far.
_FAR = (3, 7.0)


@dataclass(frozen=True)
class _Family:
    """Tasks, how strained their pictures are, and how the base and the experts are trained."""

    name: str
    tasks: Mapping[str, pictures.Task]
    base_strain: float
    strain: float
    base_steps: int
    steps: int
    rate: float


_FIRST = _Family("vision", pictures.FIRST, 0.1, 0.3, 320, 150, 3e-4)
_SECOND = _Family("vision-2", pictures.SECOND, 0.1, 0.25, 450, 150, 3e-4)


class _Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(hidden, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (4, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class _EncoderLayer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(hidden)
        self.self_attn = _Attention(hidden)
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(hidden, 2 * hidden)
        self.mlp.fc2 = nn.Linear(2 * hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        return tokens + self.mlp.fc2(functional.gelu(self.mlp.fc1(self.layer_norm2(tokens))))


class _VisionTransformer(nn.Module):
    """A vision transformer with the weight names of a CLIP's image tower, and a frozen head for each task."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__()
        patches = (pictures.SIZE // _PATCH) ** 2
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, _HIDDEN, _PATCH, _PATCH, bias=False)
        self.embeddings.class_embedding = nn.Parameter(0.02 * torch.randn(_HIDDEN))
        self.embeddings.position_embedding = nn.Embedding(patches + 1, _HIDDEN)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_EncoderLayer(_HIDDEN) for _ in range(_LAYERS))
        self.post_layernorm = nn.LayerNorm(_HIDDEN)
        self.classifier = nn.Linear(_HIDDEN, sum(labels), bias=False)
        nn.init.orthogonal_(self.classifier.weight, gain=2.0)
        self.classifier.requires_grad_(False)
        ends = torch.tensor(labels).cumsum(0)
        places = torch.arange(sum(labels))
        # A task is asked for its own labels only.
        self.others = (places >= ends[:, None]) | (places < (ends - torch.tensor(labels))[:, None])
        self.firsts = ends - torch.tensor(labels)

    def forward(self, images: Tensor, owners: Tensor) -> Tensor:
        embedded = self.embeddings.patch_embedding(images - 0.5).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(images), 1, -1)
        tokens = torch.cat([first, embedded], 1) + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            tokens = layer(tokens)
        scores = self.classifier(self.post_layernorm(tokens[:, 0]))
        return scores.masked_fill(self.others[owners], -torch.inf)


class _School:
    """The network and the pictures of a family's tasks, for one seed."""

    def __init__(self, family: _Family, seed: int) -> None:
        self.family, self.seed = family, seed
        self.network = _VisionTransformer([task.labels for task in family.tasks.values()])
        order = torch.Generator().manual_seed(seed)
        self.mixed = self._pools("train", family.base_strain, order)
        self.own = self._pools("train", family.strain, order)
        self.judged = {split: self._pools(split, family.strain, order) for split in SPLITS}

    def _pools(self, part: str, strain: float, order: torch.Generator) -> dict[str, Batch]:
        pools = {}
        for index, (name, task) in enumerate(self.family.tasks.items()):
            images, labels = task.draw(order, _POOLS[part], part, strain)
            pools[name] = images, torch.full_like(labels, index), labels + self.network.firsts[index]
        return pools

    def base(self) -> State:
        pools = [torch.stack(column) for column in zip(*self.mixed.values(), strict=True)]

        def sample(order: torch.Generator) -> Batch:
            tasks = torch.randint(len(self.mixed), (_BASE_BATCH,), generator=order)
            chosen = torch.randint(_POOLS["train"], (_BASE_BATCH,), generator=order)
            images, owners, answers = (pool[tasks, chosen] for pool in pools)
            return images, owners, answers

        return train(self.network, adam(self.network, _BASE_RATE), sample, self.family.base_steps, self.seed)

    def expert(self, base: State, task: str, steps: int = 1, rate: float = 1.0) -> State:
        """The expert of a task, with so many times the family's steps and rate."""
        self.network.load_state_dict(base)

        def sample(order: torch.Generator) -> Batch:
            chosen = torch.randint(_POOLS["train"], (_BATCH,), generator=order)
            images, owners, answers = (pool[chosen] for pool in self.own[task])
            return images, owners, answers

        optimizer = adam(self.network, rate * self.family.rate)
        return train(self.network, optimizer, sample, steps * self.family.steps, self.seed)

    def evaluate(self, state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        return accuracy(self.network, state, self.judged[split])


def _build(family: _Family, seed: int) -> ExpertSet:
    with reproducible(seed):
        school = _School(family, seed)
        base = school.base()
        experts = {task: school.expert(base, task) for task in family.tasks}
    about = "vision transformer, eight tasks of pictures, full fine-tuning with Adam"
    return ExpertSet(family.name, about, base, experts, school.evaluate)


def build_vision(seed: int) -> ExpertSet:
    """Eight tasks on pictures; the base has seen them little strained."""
    return _build(_FIRST, seed)


def build_vision_2(seed: int) -> ExpertSet:
    """Eight other tasks, and a base that has been trained for longer."""
    return _build(_SECOND, seed)


def build_unequal(seed: int, far: int = 1) -> ExpertSet:
    """The experts of `vision`, its even twin, but one or two trained five to nine times as far by norm."""
    fewer = shelved("unequal", seed, build_unequal) if far > 1 else shelved(_FIRST.name, seed, build_vision)
    tasks = list(fewer.experts)
    task = tasks[(seed + 3 * (far - 1)) % len(tasks)]
    with reproducible(seed):
        expert = _School(_FIRST, seed).expert(fewer.base, task, *_FAR)
    about = f"{fewer.description}; {task} trained far further"
    name = "unequal" if far == 1 else f"unequal-{far}"
    return replace(fewer, name=name, description=about, experts=fewer.experts | {task: expert})
