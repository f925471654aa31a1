"""`text` and `small-lora`: a decoder of characters on five domains of text."""

from __future__ import annotations

import math
import sysconfig
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.experts.training import (
    SPLITS,
    Batch,
    Evaluate,
    ExpertSet,
    Sampler,
    accuracy,
    adam,
    adapters,
    reproducible,
    train,
    train_adapters,
    with_loras,
)

_VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
_CONTEXT = 64
_TEXT_BASE_STEPS, _TEXT_STEPS, _TEXT_RATE = 250, 200, 2e-3
# Windows of text in a batch. An expert goes on seeing a window of each domain beside its own: without them its first
# lesson is that all text is of its domain, which merging cancels, and hardly a merge is better than the base.
_BASE_WINDOWS, _OWN_WINDOWS, _OTHER_WINDOWS = 3, 11, 1

# The rate leaves adapters at a few per cent of the weights' norm, as those of large models are.
_SMALL_BASE_STEPS, _SMALL_STEPS, _SMALL_RATE, _SMALL_RANKS = 500, 120, 1e-3, (8, 16)


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


def _sources(pattern: str) -> str:
    """Modules of Python's library."""
    library = Path(sysconfig.get_path("stdlib"))
    return "".join(path.read_text("utf-8") for path in sorted(library.glob(pattern)))


def _texts() -> dict[str, str]:
    """The domains: text that comes with every Python."""
    names = (unicodedata.name(chr(code), "") for code in range(0xA0, 0x2E00))
    return {
        "asyncio": _sources("asyncio/*.py"),
        "email": _sources("email/*.py"),
        "reference": "\n".join(topics[name] for name in sorted(topics)),
        "tables": _sources("encodings/cp*.py"),
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


def _windows(text: Tensor, starts: Tensor) -> Batch:
    cut = text[starts[:, None] + torch.arange(_CONTEXT + 1)]
    return cut[:, :-1], starts, cut[:, 1:]


def _sampler(text: Tensor, size: int) -> Sampler:
    return lambda order: _windows(text, torch.randint(len(text) - _CONTEXT, (size,), generator=order))


class _Domains:
    """The domains' texts, and batches of them."""

    def __init__(self) -> None:
        self.texts = {domain: _encode(text) for domain, text in _texts().items()}
        self._judged = {
            split: {
                domain: _windows(parts[split], torch.linspace(0, len(parts[split]) - _CONTEXT - 1, 120).long())
                for domain, parts in self.texts.items()
            }
            for split in SPLITS
        }

    def sampler(self, domain: str, size: int) -> Sampler:
        """So many windows of a domain."""
        return _sampler(self.texts[domain]["train"], size)

    def mixed(self, size: int, own: Sampler | None = None) -> Sampler:
        """So many windows of each domain, and those of a sampler."""
        samplers = [self.sampler(domain, size) for domain in self.texts] + ([own] if own else [])

        def sample(order: torch.Generator) -> Batch:
            inputs, owners, answers = zip(*(draw(order) for draw in samplers), strict=True)
            return torch.cat(inputs), torch.cat(owners), torch.cat(answers)

        return sample

    def judge(self, network: _Decoder) -> Evaluate:
        """The share of characters that a state of the network foretells, by domain."""
        return lambda state, split: accuracy(network, state, self._judged[split])


def build_text(seed: int) -> ExpertSet:
    """A decoder of characters, a little trained on all domains, fully fine-tuned on each with replay."""
    domains = _Domains()
    with reproducible(seed):
        network = _Decoder()
        base = train(network, adam(network, _TEXT_RATE), domains.mixed(_BASE_WINDOWS), _TEXT_BASE_STEPS, seed)
        experts = {}
        for domain in domains.texts:
            network.load_state_dict(base)
            sample = domains.mixed(_OTHER_WINDOWS, domains.sampler(domain, _OWN_WINDOWS))
            experts[domain] = train(network, adam(network, _TEXT_RATE), sample, _TEXT_STEPS, seed)
    return ExpertSet(
        "text",
        "character-level decoder, five domains of text, full fine-tuning with Adam",
        base,
        experts,
        domains.judge(network),
    )


def build_small_lora(seed: int) -> ExpertSet:
    """The decoder, trained long on other text, with adapters a few per cent as large as its weights."""
    domains = _Domains()
    with reproducible(seed):
        network = _Decoder()
        general = _encode(_sources("[a-z]*.py"))["train"]
        base = train(network, adam(network, _TEXT_RATE), _sampler(general, 15), _SMALL_BASE_STEPS, seed)
        network.load_state_dict(base)
        experts, loras = {}, {}
        for index, domain in enumerate(domains.texts):
            sample = domains.mixed(_OTHER_WINDOWS, domains.sampler(domain, _OWN_WINDOWS))
            new = adapters(network, _SMALL_RANKS[index % 2], lambda name: name.endswith("_proj.weight"))
            loras[domain] = train_adapters(network, new, _SMALL_RATE, sample, _SMALL_STEPS, seed)
            experts[domain] = with_loras(base, loras[domain])
    return ExpertSet(
        "small-lora",
        "character-level decoder trained long, five domains of text, small LoRA of rank 8 and 16",
        base,
        experts,
        domains.judge(network),
        loras,
    )
