"""Small models of images: the real classes, their names and shapes as recorded, and diffusers' own converters."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.diffusion import networks
from modelmerge.checkpoint.header import TensorInfo
from tests.support.checkpoints import State

RECORD = Path(__file__).parents[1] / "checkpoint" / "image_models.json"
Shapes = dict[str, list[int]]


FOLDERS = {"vae": "vae", "wan-vae": "vae", "sd1": "unet", "sdxl": "unet", "clip": "text_encoder_2"}  # else transformer


@functools.cache
def recorded() -> dict[str, Shapes]:
    """By model, the names of its tensors in diffusers' layout, with their folder, and their shapes."""
    return json.loads(RECORD.read_bytes())


def state(model: str, seed: int = 0) -> State:
    """A recorded model in diffusers' layout with weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in recorded()[model].items()}


def shapes_of(model: str, built: Any) -> Shapes:
    """What a record of a model holds."""
    folder = FOLDERS.get(model, "transformer")
    return {f"{folder}/{name}": list(tensor.shape) for name, tensor in built.state_dict().items()}


def in_other_layout(state: State) -> State:
    """A model in the layout that it is not in, by the pieces that modelmerge knows; what is of no network is left out.

    The names have the usual words in front: folders, or those of single files.
    """
    infos = {n: TensorInfo(n, "F32", tuple(t.shape), Path("x"), 0, 4 * t.numel()) for n, t in state.items()}
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for network in networks(infos):
        for name, pieces in network.pieces.items():
            for piece in pieces:
                ends = (piece.single, piece.single_first), (piece.diffusers, piece.diffusers_first)
                (_, start), (other, place) = ends if network.single else ends[::-1]
                rows = state[name] if piece.rows is None else state[name][start : start + piece.rows]
                parts.setdefault(other, []).append((place, rows.T if piece.transposed else rows))
    return {name: _joined(sorted(each, key=lambda part: part[0])) for name, each in parts.items()}


def _joined(parts: list[tuple[int, Tensor]]) -> Tensor:
    return torch.cat([rows for _, rows in parts]) if len(parts) > 1 else parts[0][1].contiguous()


def as_open_clip(state: State, front: str) -> State:
    """A text encoder of CLIP, by its names in transformers, as OpenCLIP stores it."""
    words = {
        "text_model.encoder.layers": "transformer.resblocks", "self_attn": "attn", "layer_norm1": "ln_1",
        "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
        "text_model.final_layer_norm": "ln_final",
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }  # fmt: skip
    single: State = {}
    for name, tensor in state.items():
        other = name
        for old, new in words.items():
            other = other.replace(old, new)
        if ".q_proj." in name:
            rows = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            single[front + other.replace(".q_proj.", ".in_proj_")] = torch.cat(rows)
        elif ".k_proj." not in name and ".v_proj." not in name:
            single[front + other] = tensor.T.contiguous() if name == "text_projection.weight" else tensor
    return single


def without_folder(state: State) -> State:
    """The tensors of one component by their own names."""
    return {name.partition("/")[2]: tensor for name, tensor in state.items()}


# --- the real thing: imports diffusers and transformers ---

DENOISER = "model.diffusion_model."
OPEN_CLIP = "conditioner.embedders.1.model."


def build(model: str, *, large: bool = False) -> Any:
    """A small model of the real class; `large` has more blocks."""
    import diffusers
    import transformers

    down, cross = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    depth = 2 if large else 1
    unet = {"norm_num_groups": 2, "cross_attention_dim": 6, "attention_head_dim": 2, "layers_per_block": depth}
    joint = {"attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 6, "pooled_projection_dim": 5}
    axes = (2, 2, 2)
    text = {
        "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 9, "projection_dim": 8,
        "num_hidden_layers": depth, "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    makers: dict[str, Callable[[], Any]] = {
        "sd1": lambda: diffusers.UNet2DConditionModel(
            **unet, block_out_channels=(4, 8, 8, 8) if large else (4, 8),
            down_block_types=(*[down[1]] * (3 if large else 1), down[0]),
            up_block_types=(cross[0], *[cross[1]] * (3 if large else 1)),
        ),
        "sdxl": lambda: diffusers.UNet2DConditionModel(
            **unet, block_out_channels=(4, 8, 8) if large else (4, 8), use_linear_projection=True,
            down_block_types=(down[0], *[down[1]] * (2 if large else 1)),
            up_block_types=(*[cross[1]] * (2 if large else 1), cross[0]),
            transformer_layers_per_block=(1, 2, 3) if large else (1, 2),
            addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
        ),
        "flux": lambda: diffusers.FluxTransformer2DModel(
            **joint, num_layers=depth, num_single_layers=2 * depth, in_channels=4, guidance_embeds=True,
            axes_dims_rope=axes,
        ),
        "sd3": lambda: diffusers.SD3Transformer2DModel(
            **joint, sample_size=4, num_layers=1 + depth, caption_projection_dim=8, pos_embed_max_size=4,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        "wan": lambda: diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=6, in_channels=4, out_channels=4, text_dim=5, freq_dim=4,
            ffn_dim=7, num_layers=depth, image_dim=5, added_kv_proj_dim=12, cross_attn_norm=True, rope_max_seq_len=8,
        ),
        "qwen-image": lambda: diffusers.QwenImageTransformer2DModel(
            num_layers=depth, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=6, in_channels=4,
            out_channels=4, axes_dims_rope=axes,
        ),
        "vae": lambda: diffusers.AutoencoderKL(
            block_out_channels=(4, 8, 8) if large else (4, 8), norm_num_groups=2, layers_per_block=depth,
            down_block_types=("DownEncoderBlock2D",) * (3 if large else 2),
            up_block_types=("UpDecoderBlock2D",) * (3 if large else 2),
        ),
        "wan-vae": lambda: diffusers.AutoencoderKLWan(base_dim=2, z_dim=2, dim_mult=[1, 2, 4, 4], num_res_blocks=2),
        "clip": lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)),
    }  # fmt: skip
    return makers[model]()


def converted(model: str, state: State, built: Any) -> State:
    """A single file's tensors, with the usual words in front, as diffusers' own converters have them."""
    from diffusers.loaders import single_file_utils as utils

    config = dict(built.config) if model != "clip" else {}
    flux = utils.convert_flux_transformer_checkpoint_to_diffusers
    if model == "flux":  # the converter has the real model's width as a constant
        source = inspect.getsource(flux)
        assert source.count("inner_dim = 3072") == 1
        scope = dict(vars(utils))
        exec(source.replace("inner_dim = 3072", f"inner_dim = {built.inner_dim}"), scope)
        flux = scope[flux.__name__]
    plain = {name.removeprefix(DENOISER): tensor for name, tensor in state.items()}
    makers: dict[str, Callable[[], State]] = {
        "sd1": lambda: utils.convert_ldm_unet_checkpoint(dict(state), config),
        "sdxl": lambda: utils.convert_ldm_unet_checkpoint(dict(state), config),
        "flux": lambda: flux(dict(state)),
        "sd3": lambda: utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(state)),
        "wan": lambda: utils.convert_wan_transformer_to_diffusers(dict(state)),
        "qwen-image": lambda: plain,
        "vae": lambda: utils.convert_ldm_vae_checkpoint(dict(state), config),
        "wan-vae": lambda: utils.convert_wan_vae_to_diffusers(dict(state)),
        "clip": lambda: utils.convert_open_clip_checkpoint(built, dict(state), prefix=OPEN_CLIP),
    }
    return makers[model]()
