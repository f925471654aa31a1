"""Layers from several places in real classes: the result answers as a model that is put together by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge

transformers = pytest.importorskip("transformers")

from tests.support import lora  # noqa: E402  (needs transformers)
from tests.support.checkpoints import read  # noqa: E402

pytestmark = pytest.mark.slow
WORDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
_SMALL = {"vocab_size": 40, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
_KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "model.layers", {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1}),
    "gpt2": ("GPT2", "transformer.h", {"vocab_size": 40, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16}),
    "qwen2": (
        "Qwen2", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 3,
         "layer_types": _KINDS},
    ),
    "gemma3": (
        "Gemma3", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3,
         "layer_types": _KINDS},
    ),
    "opt": (
        "OPT", "model.decoder.layers",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "ffn_dim": 24,
         "max_position_embeddings": 16, "word_embed_proj_dim": 16},
    ),
    "lfm2": (  # whose final norm is called one of the embedding
        "Lfm2", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1,
         "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "smollm3": (
        "SmolLM3", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "no_rope_layers": [1, 0, 1, 0],
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "deepseek": (  # whose first layer has no experts
        "DeepseekV3", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "moe_intermediate_size": 12, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8},
    ),
    "qwen2_moe": (
        "Qwen2Moe", "model.layers",
        {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 4,
         "shared_expert_intermediate_size": 8, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
    ),
}  # fmt: skip
# What the stack's config says of layers otherwise.
OTHERWISE = {"qwen2_moe": {"mlp_only_layers": [1, 3]}}
STACK = [("math", 0), ("math", 1), ("math", 2), ("code", 1), ("code", 2), ("base", 3)]
RUNS = ["math:0-3", "code:1-3", "base:3-4"]


def network(kind: str, seed: int, **changes: Any) -> Any:
    name, _, settings = CLASSES[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(WORDS).logits


def by_hand(kind: str, models: dict[str, Any]) -> Any:
    """The stack: embeddings of the first model, layers in turn, final norm and head of the last."""
    _, prefix, settings = CLASSES[kind]
    count = "n_layer" if "n_layer" in settings else "num_hidden_layers"
    lists = (key for key in ("layer_types", "no_rope_layers") if key in settings)
    kinds = {key: [settings[key][n] for _, n in STACK] for key in lists}
    whole = network(kind, 9, **{count: len(STACK), **kinds, **OTHERWISE.get(kind, {})})
    state = whole.state_dict()
    for name in state:
        if name.startswith(f"{prefix}."):
            number, _, end = name.removeprefix(f"{prefix}.").partition(".")
            origin, layer = STACK[int(number)]
            state[name] = models[origin].state_dict()[f"{prefix}.{layer}.{end}"]
        else:
            ends = ("norm.weight", "ln_f.weight", "ln_f.bias", "layer_norm.weight", "layer_norm.bias")
            tied = whole.config.tie_word_embeddings
            last = name.endswith(ends) or (name == "lm_head.weight" and not tied)
            state[name] = models[STACK[-1 if last else 0][0]].state_dict()[name]
    whole.load_state_dict(state)
    return whole


@pytest.mark.parametrize("method", ["passthrough", "ties"])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_result_answers_as_a_model_that_is_put_together_by_hand(kind: str, method: str, tmp_path: Path) -> None:
    models = {name: network(kind, seed) for seed, name in enumerate(("base", "math", "code"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    experts = {name: tmp_path / name for name in ("math", "code")}
    modelmerge.merge(tmp_path / "base", experts, tmp_path / "out", method=method, layers=RUNS)
    got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(answers(got), answers(by_hand(kind, models)))
    assert not torch.allclose(answers(got), answers(models["base"]))


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "down_proj"]},
                                     {"target_modules": ["q_proj"], "use_dora": True}])  # fmt: skip
@pytest.mark.parametrize(
    "runs",
    [
        ["tuned:0-1", "tuned:1-2"], ["base:0-1", "tuned:0-2"], ["tuned:0-2 other:0-2"],
        ["other:0-1 tuned:1-2", "other:1-2 tuned:0-1"],
        ["default: base tuned other"], ["model.layers: tuned:1-2", "default: other"],
    ],
)  # fmt: skip
def test_layers_of_an_adapter_are_those_of_the_model_it_makes(
    runs: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    """As they are, merged with others, and seen from another model's layers."""
    base = lora.base_of("llama", tmp_path / "base")
    other = lora.base_of("llama", tmp_path / "other", seed=5)
    tuned = lora.adapter_of(base, tmp_path / "adapter", **options)
    lora.merged_by_peft(base, tuned, tmp_path / "whole")
    results = []
    for reference in (tuned, tmp_path / "whole"):
        out = tmp_path / f"of-{reference.name}"
        modelmerge.merge(base, {"tuned": reference, "other": other}, out, method="average", layers=runs)
        results.append(read(out))
    assert results[0].keys() == results[1].keys()
    assert lora.distance(*results, results[0]) < lora.TOLERANCE
    assert lora.distance(results[0], read(base), results[0].keys() & read(base).keys()) > 1e-2
