"""PEFT adapters as experts: made by peft itself, merged by peft itself, and compared."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modelmerge
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, ReferenceNotFound
from tests.checkpoints import State, read

TOLERANCE = 1e-6
_SMALL = {"num_attention_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=tied,
        **_SMALL,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, max_position_embeddings=16, num_labels=3, **_SMALL
    )
    return transformers.BertForSequenceClassification(config)


def clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(_vision())


def clip() -> nn.Module:
    text = transformers.CLIPTextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, **_SMALL)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=_vision().to_dict(), projection_dim=8)
    )


def _vision() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "llama": llama, "llama-tied": lambda: llama(True), "gpt2": gpt2, "t5": t5, "bert": bert,
    "clip-vision": clip_vision, "clip": clip, "resnet": resnet,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"q_proj": 3, r"layers\.1\..*k_proj": 1},
         "alpha_pattern": {"model.layers.1.self_attn.q_proj": 12, "up_proj": 5}},
    ),
    "patterns, rank-stabilised": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"^model.layers.0.*q_proj": 3}},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora, rank-stabilised": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "stored the other way": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "stored the other way, square": ("gpt2", {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
    # peft corrects the flag for the layer it comes to last, here the head: the config says nothing about c_proj.
    "stored the other way, the flag lost": ("gpt2", {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}),
    "stored the other way, dora": (
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "biases of its layers": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "a bias of its own": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "a classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    "vision tower": ("clip-vision", {"target_modules": ["q_proj", "fc1"]}),
    "vision tower, dora": ("clip-vision", {"target_modules": ["q_proj", "patch_embedding"], "use_dora": True}),
    "both towers": ("clip", {"target_modules": ["q_proj", "fc1", "visual_projection"]}),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}),
    "convolutions, dora": ("resnet", {"target_modules": ["convolution"], "use_dora": True}),
}  # fmt: skip


def quiet_peft(model: nn.Module, **options: Any) -> Any:
    """A model with an adapter on it, as peft makes it, less its advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options}))


def base_of(kind: str, directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim < 2:  # norms and biases start at one and zero, where errors would hide
                tensor.add_(0.1 * torch.randn_like(tensor))
            assert name
    model.save_pretrained(directory)
    return directory


def load(base: Path) -> Any:
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
        merged.save_pretrained(directory)
    return read(directory)


def merged_here(base: Path, adapters: list[Path], directory: Path, **options: Any) -> State:
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 1.0} | options
    modelmerge.merge(base, adapters, directory, **told)
    return read(directory)


def distance(one: State, other: State, names: Any) -> float:
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in names)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_an_adapter_adds_is_what_peft_adds(variant: str, tmp_path: Path) -> None:
    kind, options = VARIANTS[variant]
    base = base_of(kind, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    want = merged_by_peft(base, adapter, tmp_path / "peft")
    got = merged_here(base, [adapter], tmp_path / "merged")
    origin = read(base)
    assert got.keys() == origin.keys()
    # A head that peft unties from its embedding is stored beside it; the base has no place for it.
    assert want.keys() - origin.keys() <= {"lm_head.weight"}
    assert distance(want, origin, origin) > 1e-2
    assert distance(want, got, origin) < TOLERANCE
