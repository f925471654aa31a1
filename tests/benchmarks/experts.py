"""Sets of small real experts, trained on the spot, on which the defaults of the merging methods are chosen.

Each set has its own network, tasks and strength of fine-tuning, so that a default that wins on all of them is not
one that fits a single model. The data come with scikit-learn and Python itself: nothing is downloaded. A set is
the same for a seed on one machine; the text also changes with the version of Python.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import sysconfig
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from modelmerge.evaluation import digits

State = dict[str, Tensor]
# The network's inputs, which task asks, and the right answers. One batch may mix tasks.
Batch = tuple[Tensor, Tensor, Tensor]
Sampler = Callable[[torch.Generator], Batch]
Evaluate = Callable[[Mapping[str, Tensor], str], dict[str, float]]

_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class ExpertSet:
    """A base, its experts and the means to judge their merges.

    `evaluate` takes a state dict and a split, "validation" or "test", and gives the accuracy on each task, from 0
    to 1. No expert has seen either split, so a setting may be chosen on the one and reported on the other.
    """

    name: str
    description: str
    base: State
    experts: dict[str, State]
    evaluate: Evaluate


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
def _reproducible(seed: int) -> Iterator[None]:
    # Sums are split among the threads, so with another number of them the weights would differ in the last bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


_kept: Iterator[State] | None = None  # trained weights to be handed out instead of training
_trained: list[State] = []  # what was trained, in order


def _keep(train: Callable[..., State]) -> Callable[..., State]:
    @functools.wraps(train)
    def remembered(*told: Any, **options: Any) -> State:
        state = train(*told, **options) if _kept is None else next(_kept)
        _trained.append(state)
        return state

    return remembered


def build(name: str, seed: int, cache: Path | None = None) -> ExpertSet:
    """The set of that name; with a directory `cache`, trained once and then read from there.

    Empty it when the training changes: files are known by set and seed only.
    """
    global _kept
    if cache is None:
        return SETS[name](seed)
    shelf = cache / f"{name}-{seed}"
    _trained.clear()
    if shelf.exists():
        _kept = iter([load_file(file) for file in sorted(shelf.iterdir())])
    try:
        expert_set = SETS[name](seed)
    finally:
        _kept = None
    if not shelf.exists():
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            for i, state in enumerate(_trained):
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, Path(unfinished) / f"{i:02}")
            shutil.copytree(unfinished, f"{unfinished}-whole")
        Path(f"{unfinished}-whole").rename(shelf)
    return expert_set


@_keep
def _train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    sample: Sampler,
    steps: int,
    seed: int,
    loras: State | None = None,
) -> State:
    """Trains the weights that the optimizer holds and returns the network's state dict."""
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
            scores = functional_call(network, _with_loras(frozen, loras), (inputs, owners))
        loss = functional.cross_entropy(scores.flatten(0, -2), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
    if loras is not None:
        network.load_state_dict(_with_loras(frozen, loras))
    return {name: weight.detach().clone() for name, weight in network.state_dict().items()}


def _with_loras(base: Mapping[str, Tensor], loras: Mapping[str, Tensor]) -> State:
    return {
        name: weight + loras[f"{name}.up"] @ loras[f"{name}.down"] if f"{name}.up" in loras else weight
        for name, weight in base.items()
    }


def _adam(network: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad], lr=rate)


@torch.no_grad()
def _accuracy(network: nn.Module, state: Mapping[str, Tensor], batches: Mapping[str, Batch]) -> dict[str, float]:
    network.load_state_dict(state)
    return {
        task: (network(inputs, owners).argmax(-1) == answers).float().mean().item()
        for task, (inputs, owners, answers) in batches.items()
    }


# --- digits and lora: the demo's network and views ------------------------------------------------------------------

_LORA_RANK, _LORA_STEPS, _LORA_RATE = 4, 250, 1e-2


def build_digits(seed: int) -> ExpertSet:
    """The demo's experts: a transformer, six views of the digits, short fine-tuning with SGD."""
    tasks, evaluate = _views(seed)
    with _reproducible(seed):
        base = _keep(digits.train_base)(tasks, seed=seed)
        experts = {name: _keep(digits.train_expert)(base, task, seed=seed) for name, task in tasks.items()}
    return ExpertSet("digits", "transformer, six views of digits, short SGD", base, experts, evaluate)


def build_lora(seed: int) -> ExpertSet:
    """The demo's network and views, fine-tuned by low-rank updates of the attention alone."""
    tasks, evaluate = _views(seed)
    with _reproducible(seed):
        base = _keep(digits.train_base)(tasks, seed=seed)
        experts = {}
        for name, task in tasks.items():
            network = digits._build(seed)
            network.load_state_dict(base)
            loras: State = {}
            for weight, value in base.items():
                if weight.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")):
                    # The one half is zero, so that training begins at the base.
                    loras[f"{weight}.up"] = torch.zeros(value.shape[0], _LORA_RANK, requires_grad=True)
                    down = torch.randn(_LORA_RANK, value.shape[1]) / math.sqrt(value.shape[1])
                    loras[f"{weight}.down"] = down.requires_grad_()

            def sample(order: torch.Generator, task: digits.Task = task) -> Batch:
                batch = torch.randint(len(task.train_y), (64,), generator=order)
                return task.train_x[batch], torch.full((64,), task.index), task.train_y[batch]

            optimizer = torch.optim.Adam(loras.values(), lr=_LORA_RATE)
            experts[name] = _train(network, optimizer, sample, _LORA_STEPS, seed, loras)
    return ExpertSet("lora", f"transformer, six views of digits, LoRA of rank {_LORA_RANK}", base, experts, evaluate)


def _views(seed: int) -> tuple[dict[str, digits.Task], Evaluate]:
    # The demo has no validation split: a quarter of its training images becomes one. They are shuffled already.
    tasks: dict[str, digits.Task] = {}
    judged: dict[str, dict[str, digits.Task]] = {split: {} for split in _SPLITS}
    for name, task in digits.load_tasks(seed).items():
        held_out = len(task.train_y) // 4
        tasks[name] = replace(task, train_x=task.train_x[:-held_out], train_y=task.train_y[:-held_out])
        judged["test"][name] = task
        judged["validation"][name] = replace(task, test_x=task.train_x[-held_out:], test_y=task.train_y[-held_out:])

    def evaluate(state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        return {name: digits.accuracy(state, task) for name, task in judged[split].items()}

    return tasks, evaluate


# --- residual MLPs on images --------------------------------------------------------------------------------------


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
        parts = dict(zip(("train", *_SPLITS), shuffled.split([897, 300, 600]), strict=True))
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

    with _reproducible(seed):
        network = _Perceptron(128, 160, 4, len(_PAIR_TASKS), 10)
        fixed = torch.Generator().manual_seed(seed)
        judged = {
            split: {task: pairs(split, torch.full((2000,), index), fixed) for index, task in enumerate(_PAIR_TASKS)}
            for split in _SPLITS
        }

        def mixed(order: torch.Generator) -> Batch:
            owners = torch.randint(len(_PAIR_TASKS), (_PAIR_BATCH,), generator=order)
            return pairs("train", owners, order, _PAIR_BASE_IMAGES)

        base = _train(network, _adam(network, _PAIR_BASE_RATE), mixed, _PAIR_BASE_STEPS, seed)
        experts = {}
        for index, task in enumerate(_PAIR_TASKS):
            network.load_state_dict(base)

            def sample(order: torch.Generator, index: int = index) -> Batch:
                return pairs("train", torch.full((_PAIR_BATCH,), index), order)

            experts[task] = _train(network, _adam(network, _PAIR_RATE), sample, _PAIR_STEPS, seed)
    return ExpertSet(
        "digits-strong",
        "residual MLP, eight questions about two digits, long fine-tuning with Adam",
        base,
        experts,
        lambda state, split: _accuracy(network, state, judged[split]),
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
        if split in _SPLITS
    }

    def draw(owners: Tensor, images: int, order: torch.Generator) -> Batch:
        chosen = torch.randint(images, owners.shape, generator=order)
        return seen["train"][owners, chosen], owners, data.labels["train"][chosen]

    def mixed(order: torch.Generator) -> Batch:
        return draw(torch.randint(len(views), (2 * _MANY_BATCH,), generator=order), _MANY_BASE_IMAGES, order)

    with _reproducible(seed):
        network = _Perceptron(64, 160, 3, len(views), 10)
        base = _train(network, _adam(network, _MANY_BASE_RATE), mixed, _MANY_BASE_STEPS, seed)
        experts = {}
        for index, task in enumerate(views):
            network.load_state_dict(base)

            def sample(order: torch.Generator, index: int = index) -> Batch:
                return draw(torch.full((_MANY_BATCH,), index), len(data.labels["train"]), order)

            experts[task] = _train(network, _adam(network, _MANY_RATE), sample, _MANY_STEPS, seed)
    return ExpertSet(
        "many",
        "residual MLP, sixteen views of digits, short fine-tuning with Adam",
        base,
        experts,
        lambda state, split: _accuracy(network, state, judged[split]),
    )


# --- decoders of text ---------------------------------------------------------------------------------------------

_VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
_CONTEXT = 64
_TEXT_BASE_STEPS, _TEXT_STEPS, _TEXT_RATE = 250, 200, 2e-3
# Windows of text in a batch. An expert goes on seeing a window of each domain beside its own: without them its first
# lesson is that all text is of its domain, which merging cancels, and hardly a merge is better than the base.
_BASE_WINDOWS, _OWN_WINDOWS, _OTHER_WINDOWS = 3, 11, 1


class _Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(hidden, hidden, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (4, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class _DecoderLayer(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden)
        self.self_attn = _Attention(hidden)
        self.post_attention_layernorm = nn.RMSNorm(hidden)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.mlp.down_proj = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.input_layernorm(tokens))
        grown = self.mlp.up_proj(self.post_attention_layernorm(tokens))
        return tokens + self.mlp.down_proj(functional.gelu(grown))


class _Decoder(nn.Module):
    """A character-level decoder with the weight names of a Llama."""

    def __init__(self, hidden: int = 96, layers: int = 4) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(len(_VOCABULARY), hidden)
        self.model.embed_positions = nn.Embedding(_CONTEXT, hidden)
        self.model.layers = nn.ModuleList(_DecoderLayer(hidden) for _ in range(layers))
        self.model.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, len(_VOCABULARY), bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 if "embed" in name else 1 / math.sqrt(weight.shape[1]))

    def forward(self, tokens: Tensor, _owners: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(tokens) + self.model.embed_positions.weight[: tokens.shape[1]]
        for layer in self.model.layers:
            hidden = layer(hidden)
        return self.lm_head(self.model.norm(hidden))


def _texts() -> dict[str, str]:
    """The domains: text that comes with every Python."""
    library = Path(sysconfig.get_path("stdlib"))

    def sources(pattern: str) -> str:
        return "".join(path.read_text("utf-8") for path in sorted(library.glob(pattern)))

    names = (unicodedata.name(chr(code), "") for code in range(0xA0, 0x2E00))
    return {
        "asyncio": sources("asyncio/*.py"),
        "email": sources("email/*.py"),
        "reference": "\n".join(topics[name] for name in sorted(topics)),
        "tables": sources("encodings/cp*.py"),
        "names": "\n".join(filter(None, names)),
    }


def _encode(text: str) -> dict[str, Tensor]:
    """Splits a text by blocks, two of ten to be held out, and numbers its characters."""
    numbers = {character: number for number, character in enumerate(_VOCABULARY)}
    codes = torch.tensor([numbers[character] for character in text if character in numbers])
    blocks = codes[: len(codes) // 1024 * 1024].view(-1, 1024)
    place = torch.arange(len(blocks)) % 10
    parts = {"train": place < 8, "validation": place == 8, "test": place == 9}
    return {part: blocks[chosen].flatten() for part, chosen in parts.items()}


def build_text(seed: int) -> ExpertSet:
    """A decoder of characters, a little trained on all domains, fully fine-tuned on each with replay."""
    texts = {domain: _encode(text) for domain, text in _texts().items()}
    window = torch.arange(_CONTEXT + 1)

    def windows(text: Tensor, starts: Tensor) -> Batch:
        cut = text[starts[:, None] + window]
        return cut[:, :-1], starts, cut[:, 1:]

    def sampler(domain: str, size: int) -> Sampler:
        text = texts[domain]["train"]
        return lambda order: windows(text, torch.randint(len(text) - _CONTEXT, (size,), generator=order))

    def mixed(size: int, own: Sampler | None = None) -> Sampler:
        samplers = [sampler(domain, size) for domain in texts] + ([own] if own else [])

        def sample(order: torch.Generator) -> Batch:
            inputs, owners, answers = zip(*(draw(order) for draw in samplers), strict=True)
            return torch.cat(inputs), torch.cat(owners), torch.cat(answers)

        return sample

    judged = {
        split: {
            domain: windows(parts[split], torch.linspace(0, len(parts[split]) - _CONTEXT - 1, 120).long())
            for domain, parts in texts.items()
        }
        for split in _SPLITS
    }
    with _reproducible(seed):
        network = _Decoder()
        base = _train(network, _adam(network, _TEXT_RATE), mixed(_BASE_WINDOWS), _TEXT_BASE_STEPS, seed)
        experts = {}
        for domain in texts:
            network.load_state_dict(base)
            sample = mixed(_OTHER_WINDOWS, sampler(domain, _OWN_WINDOWS))
            experts[domain] = _train(network, _adam(network, _TEXT_RATE), sample, _TEXT_STEPS, seed)
    return ExpertSet(
        "text",
        "character-level decoder, five domains of text, full fine-tuning with Adam",
        base,
        experts,
        lambda state, split: _accuracy(network, state, judged[split]),
    )


SETS: dict[str, Callable[[int], ExpertSet]] = {
    "digits": build_digits,
    "digits-strong": build_digits_strong,
    "text": build_text,
    "many": build_many,
    "lora": build_lora,
}
