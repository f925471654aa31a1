"""Models of several components, small: pipelines as diffusers writes them, modules as sentence-transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

State = dict[str, torch.Tensor]
UNET, VAE, TEXT = "unet", "vae", "text_encoder"
CONFIGS: dict[str, dict[str, Any]] = {
    UNET: {"_class_name": "UNet2DConditionModel", "attention_head_dim": 8},
    VAE: {"_class_name": "AutoencoderKL"},
    TEXT: {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "dtype": "float32", "num_heads": 2},
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None], "requires_safety_checker": False,
}  # fmt: skip
NAMES = {UNET: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT: "model"}
SHAPES = {
    UNET: {"conv_in.weight": (4, 2, 3, 3), "down_blocks.0.attentions.0.to_q.weight": (8, 8)},
    VAE: {"encoder.conv_in.weight": (4, 2, 3, 3), "encoder.conv_in.bias": (4,)},
    TEXT: {
        "text_model.embeddings.token_embedding.weight": (6, 8),
        "text_model.encoder.layers.0.mlp.fc1.weight": (16, 8),
    },
}  # fmt: skip


def states(seed: int) -> dict[str, State]:
    """By component, its tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        folder: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for folder, shapes in SHAPES.items()
    }


def write_shards(folder: Path, state: State, stem: str) -> None:
    """A tensor in each shard, and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, (name, tensor) in enumerate(state.items(), 1):
        weight_map[name] = f"{stem}-{i:05}-of-{len(state):05}.safetensors"
        (folder / weight_map[name]).write_bytes(save({name: tensor}, metadata={"format": "pt"}))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_pipeline(directory: Path, seed: int, *, tokens: str = "abcdef", folders: Mapping[str, Any] = SHAPES) -> Path:
    """A pipeline of a UNet in shards, a VAE, a text encoder, a scheduler and a tokenizer."""
    for folder, state in states(seed).items():
        if folder not in folders:
            continue
        (directory / folder).mkdir(parents=True)
        (directory / folder / "config.json").write_text(json.dumps(CONFIGS[folder]))
        if folder == UNET:
            write_shards(directory / folder, state, NAMES[folder])
        else:
            (directory / folder / f"{NAMES[folder]}.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    beside = {
        "model_index.json": INDEX, "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
        "tokenizer/vocab.json": {token: i for i, token in enumerate(tokens)}, "scheduler/trainer_state.json": {},
    }  # fmt: skip
    for place, content in beside.items():
        (directory / place).parent.mkdir(parents=True, exist_ok=True)
        (directory / place).write_text(json.dumps(content))
    return directory


def read_folders(directory: Path) -> State:
    """All tensors by `FOLDER/NAME`, read by safetensors itself."""
    state: State = {}
    for file in sorted(directory.rglob("*.safetensors")):
        folder = file.parent.relative_to(directory).as_posix()
        state |= {f"{folder}/{name}".removeprefix("./"): tensor for name, tensor in load_file(file).items()}
    return state
