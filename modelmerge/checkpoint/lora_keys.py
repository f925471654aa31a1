"""What the keys of a LoRA file say: which module each belongs to, and which part of its change it is.

Files by sd-scripts (kohya) and LyCORIS write a module's name with `_` for its dots, `lora_unet_mid_block_...`; those by
diffusers, peft and the programs for FLUX and later models keep the dots. Behind the name stands the part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.adapter_config import CONFIG, PICKLED, PREFIX, WEIGHTS
from modelmerge.checkpoint.documents import parse_json
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.errors import CheckpointError, ReferenceNotFound

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # what diffusers calls such a file
METADATA = "lora_adapter_metadata"  # where diffusers keeps what peft has in adapter_config.json
_KOHYA = re.compile(
    r"^(lora_(unet|te\d?|transformer|prior)|lycoris)_|\.(lora_(down|up|mid)|(hada|lokr)_[wt]\d(_[ab])?)\b|\.dora_scale$"
    r"|^(model\.)?diffusion_model\..*\.diff(_b)?$"
)
_PEFT = re.compile(r"\.(lora(_embedding)?_[AB]|lora_magnitude_vector|(\w+_)?lora(_linear_layer)?\.(down|up))\b")
# What keys end in, and which part of a module's change that is.
_ENDS = {
    "lora_down.weight": "down", "lora_A.weight": "down", "lora.down.weight": "down", "lora_A": "down",
    "lora_linear_layer.down.weight": "down", "lora_up.weight": "up", "lora_B.weight": "up", "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up", "lora_B": "up", "lora_mid.weight": "mid", "lora_B.bias": "bias",
    "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha", "diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b",
    **{name: name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip
_OLD_END = re.compile(r"_lora\.(down|up)\.weight$")  # as in `attn1.processor.to_q_lora.down.weight`
# What diffusers once called a text encoder's projections, and the output's of an attention.
_OLD_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Module:
    """A module that a LoRA file changes: what its keys call it, its parts, and other names that it may go by."""

    name: str
    parts: dict[str, TensorInfo]
    aliases: tuple[str, ...] = ()


def is_lora(place: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a file or a directory holds the factors of a LoRA, which are no model's weights.

    A model that keeps LoRAs of its own beside the weights that they change does not.

    Raises:
        ReferenceNotFound: They are those of a PEFT adapter, whose config is needed.
    """
    for name in tensors:
        kohya, factor = _KOHYA.search(name), _PEFT.search(name)
        module = name[: factor.start()] if factor else ""
        whole = {f"{module}.weight", f"{module}.base_layer.weight"} & tensors.keys()
        if not kohya and (not factor or (whole and not name.startswith(PREFIX))):
            continue
        if place.name in (WEIGHTS, PICKLED) or name.startswith(PREFIX):
            kind, hint = "a PEFT adapter's file", f"name its folder, with {CONFIG} in it: {place.parent}"
            if place.is_dir():
                kind, hint = f"a PEFT adapter without its {CONFIG}", "copy or download the adapter again"
            message = f"{place} is {kind}, by its key '{name}': it holds factors, which cannot be merged as weights"
            raise ReferenceNotFound(message, hint=hint)
        return True
    return False


def lora_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's metadata say in place of an adapter's config: its entries, by component; empty if nothing."""
    try:
        config = parse_json(metadata.get(METADATA, "{}").encode())
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def modules_of(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, Module], list[str]]:
    """The modules that the keys name, by name, and the keys that are none of a LoRA's.

    Raises:
        CheckpointError: Two keys are the same part of a module.
    """
    modules: dict[str, Module] = {}
    strangers = []
    for key, info in tensors.items():
        name, part, aliases = _read(key)
        if part is None:
            strangers.append(key)
            continue
        module = modules.setdefault(name, Module(name, {}, aliases))
        if part in module.parts:
            raise CheckpointError(f"{info.file}: '{key}' stands beside '{module.parts[part].name}'")
        module.parts[part] = info
    return modules, strangers


def _read(key: str) -> tuple[str, str | None, tuple[str, ...]]:
    """A key's module, the part of its change (None where the key is none of a LoRA's), and the module's other names."""
    plain = key.replace(".default.", ".").removesuffix(".default").replace(".processor.", ".")
    old = _OLD_END.search(plain)
    if old is not None:
        name = plain[: old.start()]
        front, _, last = name.rpartition(".")
        other = _OLD_NAMES.get(last, last)
        return name, old[1], (f"{front}.{other}", f"{name}.0")
    for end, part in _ENDS.items():
        if plain.endswith(f".{end}"):
            return plain.removesuffix(f".{end}"), part, ()
    return key, None, ()
