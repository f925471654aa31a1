"""LoRA files that are no adapter's folder: they hold factors, and an average of factors is not one of products."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from modelmerge.checkpoint.adapter_config import CONFIG, PICKLED, PREFIX, WEIGHTS
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.errors import ReferenceNotFound

_KOHYA = re.compile(r"^lora_(unet|te\d?|transformer|prior)_|\.(lora_(down|up|mid)|(hada|lokr)_[wt]\d(_[ab])?)\b")
_PEFT = re.compile(r"\.(lora(_embedding)?_[AB]|lora_magnitude_vector|(\w+_)?lora(_linear_layer)?\.(down|up))\b")


def refuse_factors(place: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a file or a directory that holds the factors of a LoRA as if they were a model's weights.

    A model that keeps LoRAs of its own beside the weights that they change is no such file.

    Raises:
        ReferenceNotFound: It does; the message says of which kind they are.
    """
    for name in tensors:
        kohya, factor = _KOHYA.search(name), _PEFT.search(name)
        module = name[: factor.start()] if factor else ""
        whole = {f"{module}.weight", f"{module}.base_layer.weight"} & tensors.keys()
        if not kohya and (not factor or (whole and not name.startswith(PREFIX))):
            continue
        kind = "a LoRA file in kohya's format" if kohya else "a LoRA file as diffusers has it"
        hint = "merge it into its base first, with the program that it was made for, and name the result"
        if place.name in (WEIGHTS, PICKLED) or name.startswith(PREFIX):
            kind, hint = "a PEFT adapter's file", f"name its folder, with {CONFIG} in it: {place.parent}"
            if place.is_dir():
                kind, hint = f"a PEFT adapter without its {CONFIG}", "copy or download the adapter again"
        message = f"{place} is {kind}, by its key '{name}': it holds factors, which cannot be merged as weights"
        raise ReferenceNotFound(message, hint=hint)
