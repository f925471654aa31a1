"""Checkpoints for the benchmark: one base, experts a short task vector away, as large as asked.

`python -m tests.benchmarks.generate llama DIR --size 1GB --experts 4` writes `DIR/single/{base,expert_1,...}` and the
same tensors again in shards, `DIR/sharded/...`; `clip` writes single files only. Tensors are drawn, written and
forgotten one at a time, so that memory is a few times the largest tensor, whatever the size of the models.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from modelmerge.plan.recipe import parse_size

Shapes = dict[str, tuple[int, ...]]

BASE_STD, TASK_STD = 0.02, 1e-3
SHARD_BYTES = 200_000_000
_DTYPES = {"bfloat16": "BF16", "float32": "F32"}
_USUAL = {"llama": "bfloat16", "clip": "float32"}


def llama_shapes(size: int) -> Shapes:
    """A Llama with an untied output head and as many layers as come nearest to `size` bytes of bfloat16."""
    hidden, inner, vocabulary = _llama_widths(size)
    keys = hidden // 8  # grouped-query attention
    ends: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    last: Shapes = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    layer: Shapes = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layers = max(1, round((size - 2 * numel({**ends, **last})) / (2 * numel(layer))))
    middle = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {**ends, **middle, **last}


def _llama_widths(size: int) -> tuple[int, int, int]:
    """Hidden and inner width and vocabulary of the real model that is nearest in size."""
    if size < 500_000_000:
        return 512, 1408, 32_000
    return (2048, 5632, 32_000) if size < 8_000_000_000 else (4096, 11_008, 32_000)


def config(shapes: Shapes) -> dict[str, object]:
    """A Llama's configuration, which other tools look for; of the CLIP, a name."""
    if "lm_head.weight" not in shapes:
        return {"model_type": "benchmark"}
    vocabulary, hidden = shapes["lm_head.weight"]
    head = 64
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("model.layers.")),
        "num_attention_heads": hidden // head, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "num_key_value_heads": shapes["model.layers.0.self_attn.k_proj.weight"][0] // head,
    }  # fmt: skip


def clip_shapes() -> Shapes:
    """The vision tower of CLIP ViT-B/32 with its projection, as transformers names it."""
    width, inner = 768, 3072
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 32, 32),
        "vision_model.embeddings.position_embedding.weight": (50, width),
    }
    linear = {f"self_attn.{part}_proj": (width, width) for part in ("k", "v", "q", "out")}
    linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for i in range(12):
        for name, shape in linear.items():
            shapes[f"vision_model.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"vision_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
        shapes |= _layer_norm(f"vision_model.encoder.layers.{i}.layer_norm1", width)
        shapes |= _layer_norm(f"vision_model.encoder.layers.{i}.layer_norm2", width)
    shapes |= _layer_norm("vision_model.pre_layrnorm", width)  # spelt so in the published checkpoints
    shapes |= _layer_norm("vision_model.post_layernorm", width)
    return {**shapes, "visual_projection.weight": (512, width)}


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def numel(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of all shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


class _Files:
    """A checkpoint directory being written, each tensor after the one before it."""

    def __init__(self, directory: Path, shapes: Shapes, dtype: str, item: int, limit: int | None) -> None:
        directory.mkdir(parents=True)
        groups = _groups(shapes, item, limit)
        self._opened_by: dict[str, tuple[Path, bytes]] = {}
        weight_map = {}
        for i, names in enumerate(groups):
            file = "model.safetensors" if limit is None else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
            header = _header({name: shapes[name] for name in names}, dtype, item)
            self._opened_by[names[0]] = (directory / file, header)
            weight_map.update(dict.fromkeys(names, file))
        if limit is not None:
            index = {"metadata": {"total_size": item * numel(shapes)}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        (directory / "config.json").write_text(json.dumps(config(shapes)) + "\n")
        self._stream: BinaryIO | None = None

    def append(self, name: str, tensor: Tensor) -> None:
        if name in self._opened_by:
            self.close()
            file, header = self._opened_by[name]
            self._stream = file.open("wb")
            self._stream.write(header)
        assert self._stream is not None
        self._stream.write(memoryview(tensor.flatten().view(torch.uint8).numpy()))

    def close(self) -> None:
        if self._stream is not None:
            # On the disk now: written back later, it would be in the way of what is measured.
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def _groups(shapes: Shapes, item: int, limit: int | None) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = item * torch.Size(shape).numel()
        if limit is not None and groups[-1] and filled + nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups


def _header(shapes: Shapes, dtype: str, item: int) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + item * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def generate(family: str, directory: Path, *, size: int, experts: int, dtype_name: str | None = None) -> None:
    """Write a family of checkpoints below `directory`, a base and its experts in every layout."""
    shapes = llama_shapes(size) if family == "llama" else clip_shapes()
    dtype_name = dtype_name or _USUAL[family]
    dtype = getattr(torch, dtype_name)
    limits = {"single": None, "sharded": SHARD_BYTES} if family == "llama" else {"single": None}
    names = ["base", *(f"expert_{i + 1}" for i in range(experts))]
    models = [
        [
            _Files(directory / layout / name, shapes, _DTYPES[dtype_name], dtype.itemsize, limit)
            for layout, limit in limits.items()
        ]
        for name in names
    ]
    for index, (name, shape) in enumerate(shapes.items()):
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        base = _normal(shape, BASE_STD, seed=index).add_(centre)
        _append(models[0], name, base.to(dtype))
        for i, expert in enumerate(models[1:], 1):
            moved = _normal(shape, TASK_STD, seed=i * 100_000 + index).add_(base)
            _append(expert, name, moved.to(dtype))
    for files in models:
        for file in files:
            file.close()


def _normal(shape: Sequence[int], std: float, *, seed: int) -> Tensor:
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=torch.Generator().manual_seed(seed))


def _append(layouts: Sequence[_Files], name: str, tensor: Tensor) -> None:
    for files in layouts:
        files.append(name, tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=tuple(_USUAL))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=parse_size, default="1GB", help="bytes of one bfloat16 Llama, such as 1GB")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="default: bfloat16 for the Llama, else float32")
    parser.add_argument("--experts", type=int, default=4)
    told = parser.parse_args()
    generate(told.family, told.directory, size=told.size, experts=told.experts, dtype_name=told.dtype)


if __name__ == "__main__":
    main()
