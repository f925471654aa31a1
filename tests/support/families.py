"""Small models of many families, by the real classes of transformers, under their names in files and in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH, LAYERS, VOCABULARY = 32, 2, 64
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8, "num_channels": 3,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Kind:
    """A family: the class that transformers has for it, its small config, and what goes in."""

    classes: tuple[str, str]  # of the config, of the model
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    tied: bool = False


def words() -> dict[str, Tensor]:
    """Token ids."""
    return {"input_ids": torch.arange(3, 15).view(1, 12)}


def pixels() -> dict[str, Tensor]:
    """An image."""
    return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}


def both() -> dict[str, Tensor]:
    """Token ids for an encoder and a decoder."""
    return {**words(), "decoder_input_ids": torch.arange(5, 11).view(1, 6)}


def captions() -> dict[str, Tensor]:
    """An image and token ids."""
    return {**pixels(), **words()}


def sound() -> dict[str, Tensor]:
    """A spectrogram, and token ids for a decoder."""
    features = torch.linspace(-1, 1, 16 * 40).view(1, 16, 40)
    return {"input_features": features, "decoder_input_ids": torch.arange(5, 11).view(1, 6)}


def wave() -> dict[str, Tensor]:
    """A wave."""
    return {"input_values": torch.linspace(-1, 1, 2000).sin().view(1, 2000)}


_MOE = {**_TEXT, **_EXPERTS}
_VL_VISION = {"depth": LAYERS, "hidden_size": WIDTH, "intermediate_size": 40, "num_heads": 4, "patch_size": 8}
KINDS: dict[str, Kind] = {
    "llama": Kind(("LlamaConfig", "LlamaForCausalLM"), _TEXT, words),
    "llama, tied": Kind(("LlamaConfig", "LlamaForCausalLM"), {**_TEXT, "tie_word_embeddings": True}, words, tied=True),
    "qwen2": Kind(("Qwen2Config", "Qwen2ForCausalLM"), {**_TEXT, "tie_word_embeddings": True}, words, tied=True),
    "phi3": Kind(("Phi3Config", "Phi3ForCausalLM"), _TEXT, words),
    "gpt2": Kind(
        ("GPT2Config", "GPT2LMHeadModel"),
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}, words,
        tied=True,
    ),
    "gpt_neox": Kind(("GPTNeoXConfig", "GPTNeoXForCausalLM"), {**_TEXT, "rotary_pct": 0.5}, words),
    "mixtral": Kind(
        ("MixtralConfig", "MixtralForCausalLM"), {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}, words
    ),
    "qwen3_moe": Kind(("Qwen3MoeConfig", "Qwen3MoeForCausalLM"), {**_MOE, "decoder_sparse_step": 1}, words),
    "qwen2_moe": Kind(
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"), {**_MOE, "shared_expert_intermediate_size": 24}, words
    ),
    "olmoe": Kind(("OlmoeConfig", "OlmoeForCausalLM"), {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2}, words),
    "deepseek_v3": Kind(
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        {**{k: v for k, v in _TEXT.items() if k not in ("head_dim", "num_key_value_heads")}, "num_key_value_heads": 4,
         "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
         "qk_nope_head_dim": 8, "n_shared_experts": 1}, words,
    ),
    "granitemoe": Kind(
        ("GraniteMoeConfig", "GraniteMoeForCausalLM"), {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        words,
    ),
    "gpt_oss": Kind(
        ("GptOssConfig", "GptOssForCausalLM"),
        {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}, words,
    ),
    "phimoe": Kind(
        ("PhimoeConfig", "PhimoeForCausalLM"), {**_TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}, words
    ),
    "bert": Kind(("BertConfig", "BertForMaskedLM"), {**_TEXT, "type_vocab_size": 2}, words, tied=True),
    "roberta": Kind(("RobertaConfig", "RobertaForSequenceClassification"), {**_TEXT, "type_vocab_size": 1}, words),
    "vit": Kind(("ViTConfig", "ViTForImageClassification"), _VISION, pixels),
    "dinov2": Kind(("Dinov2Config", "Dinov2ForImageClassification"), _VISION, pixels),
    "clip": Kind(
        ("CLIPConfig", "CLIPModel"),
        {"text_config": {**_TEXT, "eos_token_id": 14}, "vision_config": _VISION, "projection_dim": 16}, captions,
    ),
    "siglip vision": Kind(("SiglipVisionConfig", "SiglipVisionModel"), _VISION, pixels),
    "swin": Kind(
        ("SwinConfig", "SwinForImageClassification"),
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        pixels,
    ),
    "t5": Kind(
        ("T5Config", "T5ForConditionalGeneration"),
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
         "decoder_start_token_id": 0}, both, tied=True,
    ),
    "bart": Kind(
        ("BartConfig", "BartForConditionalGeneration"),
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "max_position_embeddings": 64}, both, tied=True,
    ),
    "whisper": Kind(
        ("WhisperConfig", "WhisperForConditionalGeneration"),
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, sound, tied=True,
    ),
    "wav2vec2": Kind(
        ("Wav2Vec2Config", "Wav2Vec2ForCTC"),
        {**_TEXT, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}, wave,
    ),
    "llava": Kind(
        ("LlavaConfig", "LlavaForConditionalGeneration"),
        {"text_config": {"model_type": "llama", **_TEXT},
         "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 60}, words,
    ),
    "qwen2_vl": Kind(
        ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
        {"text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
         "vision_config": {"depth": LAYERS, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2,
                           "patch_size": 8}}, words,
    ),
    "qwen2_5_vl": Kind(
        ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
        {"text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
         "vision_config": {**_VL_VISION, "out_hidden_size": WIDTH}}, words,
    ),
    "qwen3_vl_moe": Kind(
        ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
        {"text_config": {**_MOE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
         "vision_config": {**_VL_VISION, "out_hidden_size": WIDTH, "num_position_embeddings": 16,
                           "deepstack_visual_indexes": [0]}}, words,
    ),
    "gemma3": Kind(
        ("Gemma3Config", "Gemma3ForConditionalGeneration"),
        {"text_config": {**_TEXT, "sliding_window": 16},
         "vision_config": {"model_type": "siglip_vision_model", **_VISION},
         "mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}, words,
        tied=True,
    ),
    "paligemma": Kind(
        ("PaliGemmaConfig", "PaliGemmaForConditionalGeneration"),
        {"text_config": {"model_type": "gemma", **_TEXT},
         "vision_config": {"model_type": "siglip_vision_model", **_VISION, "projection_dim": WIDTH},
         "image_token_index": 60, "projection_dim": WIDTH}, words, tied=True,
    ),
    "qwen2_audio": Kind(
        ("Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration"),
        {"text_config": {"model_type": "qwen2", **_TEXT},
         "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": WIDTH, "encoder_layers": LAYERS,
                          "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 16,
                          "max_source_positions": 20}, "audio_token_index": 60}, words,
    ),
}  # fmt: skip


def network(kind: Kind, seed: int) -> nn.Module:
    """A network of that kind with weights by chance, that of the base for seed 0 and an expert's beside it else."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in kind.classes)
    torch.manual_seed(0)
    made: nn.Module = model_class(config_class(**kind.config)).eval()
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for weight in made.parameters():
            if seed:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return made


def save_stored(made: Any, directory: Path) -> Path:
    """Saved under the names of its files on the Hub."""
    made.save_pretrained(directory, safe_serialization=True)
    return directory


def save_in_memory(made: Any, directory: Path) -> Path:
    """Saved under the names that it has in memory, as trainers that write their own files do."""
    directory.mkdir(parents=True)
    made.config.save_pretrained(directory)
    tied = getattr(made, "all_tied_weights_keys", None) or {}
    state = {name: tensor.clone().contiguous() for name, tensor in made.state_dict().items() if name not in tied}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


SAVED = {"stored": save_stored, "in memory": save_in_memory}


def logits(made: Any, kind: Kind) -> Tensor:
    """What it makes of the inputs."""
    with torch.no_grad():
        output = made(**kind.inputs())
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if name in output:
            return output[name]
    return output[0]
