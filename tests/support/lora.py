"""Adapters as peft makes and merges them, on small models of several architectures."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.checkpoints import State, read

TOLERANCE = 1e-6


_SMALL = {"num_attention_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(tied: bool = False) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=tied,
        **_SMALL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=40, num_mel_bins=8, max_source_positions=8,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, max_position_embeddings=16, num_labels=3, **_SMALL
    )
    return transformers.BertForSequenceClassification(config)


def clip_vision() -> nn.Module:
    import transformers

    return transformers.CLIPVisionModel(_vision())


def clip() -> nn.Module:
    import transformers

    text = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, **_SMALL)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=_vision().to_dict(), projection_dim=8)
    )


def _vision() -> Any:
    import transformers

    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )


def resnet() -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "llama": llama, "llama-tied": lambda: llama(True), "gpt2": gpt2, "t5": t5, "bert": bert, "whisper": whisper,
    "clip-vision": clip_vision, "clip": clip, "resnet": resnet,
}  # fmt: skip


def quiet_peft(model: nn.Module, **options: Any) -> Any:
    """A model with an adapter on it, as peft makes it, less its advice."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}))


@functools.cache
def _base(kind: str, seed: int) -> Path:
    """A base as transformers writes it, made once in a process."""
    directory = Path(tempfile.mkdtemp(prefix="modelmerge-base-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2:  # norms and biases start at one and zero, where errors would hide
                tensor.add_(0.1 * torch.randn_like(tensor))
            assert name
    model.save_pretrained(directory)
    return directory


def base_of(kind: str, directory: Path, seed: int = 0) -> Path:
    """A base of that kind, to be changed at will."""
    return Path(shutil.copytree(_base(kind, seed), directory))


def load(base: Path) -> Any:
    import transformers

    config = json.loads((base / "config.json").read_bytes())
    return getattr(transformers, config["architectures"][0]).from_pretrained(base)


def adapter_of(base: Path, directory: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter of the base, trained by chance: every weight that peft would train has moved."""
    torch.manual_seed(seed)
    adapted = quiet_peft(load(base), **options)
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor.add_(0.1 * torch.randn_like(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(directory)
    return directory


def merged_by_peft(base: Path, adapter: Path, directory: Path) -> State:
    """The tensors of the base with the adapter merged into them, through a file."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
        merged.save_pretrained(directory)
    return read(directory)


def distance(one: State, other: State, names: Any) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in names)
