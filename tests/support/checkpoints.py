"""Small checkpoints on disk, as fine-tuning leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from modelmerge.checkpoint.components import PICKLED_INDEX
from modelmerge.checkpoint.reader import MANIFEST

State = dict[str, Tensor]

SHAPES = {
    "model.embed_tokens.weight": (24, 16),
    "model.layers.0.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.mlp.up_proj.bias": (40,),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.down_proj.weight": (16, 40),
    "logit_scale": (),
}


def base_state(dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """A base: floating tensors of `dtype`, one integer buffer, one empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).mul(0.1).to(dtype) for name, shape in SHAPES.items()}
    state["position_ids"] = torch.arange(24)[None]
    state["empty"] = torch.zeros(0, 16, dtype=dtype)
    return state


def expert_state(base: State, seed: int, scale: float = 1e-2) -> State:
    """The base with noise on every floating tensor."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: (tensor.float() + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
    }


def write(directory: Path, state: State, *, shards: int = 1, config: bool = True) -> Path:
    """Write a checkpoint directory with so many shards, dealt out in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    if config:
        (directory / "config.json").write_text('{"model_type": "tiny",   "spacing": "kept"}\n')
        (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        (directory / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
        return directory
    parts: list[State] = [{} for _ in range(shards)]
    for i, (name, tensor) in enumerate(state.items()):
        parts[i % shards][name] = tensor
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        (directory / file).write_bytes(save(part, metadata={"format": "pt"}))
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def family(root: Path, *, experts: int = 3, dtype: torch.dtype = torch.float32, shards: int = 1) -> list[Path]:
    """A base and its experts: [base, expert_0, ...]."""
    base = base_state(dtype)
    paths = [write(root / "base", base, shards=shards)]
    for i in range(experts):
        paths.append(write(root / f"expert_{i}", expert_state(base, i), shards=shards))
    return paths


def read(directory: Path) -> State:
    """All tensors of a checkpoint directory, read by safetensors itself."""
    state: State = {}
    for file in sorted(directory.glob("*.safetensors")):
        state.update(load_file(file))
    return state


def manifest_at(output: Path) -> dict[str, Any]:
    """The manifest of an output."""
    manifest: dict[str, Any] = json.loads((output / MANIFEST).read_text())
    return manifest


def weights_at(output: Path) -> dict[str, str]:
    """The sha256 of the weight files of an output beside which nothing is left."""
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
    files = manifest_at(output)["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def same_bits(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and torch.equal(left[k].flatten().view(torch.uint8), right[k].flatten().view(torch.uint8))
        for k in left
    )


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def pickled(directory: Path, state: State, *, shards: int = 1, zipped: bool = True) -> Path:
    """A checkpoint directory as transformers wrote them before safetensors."""
    write(directory, {})
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return directory
    weight_map = {}
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(part, directory / file, _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, file))
    (directory / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory
