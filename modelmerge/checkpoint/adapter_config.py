"""The config of a PEFT adapter: which adapters can be merged, by what adapter_config.json says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.header import read_json
from modelmerge.errors import CheckpointError, ReferenceNotFound

CONFIG = "adapter_config.json"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every key

# Starting points that leave the base as it is; all others subtract from it what the adapter starts with.
_PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Entries of the config that bear on training, on the file's making or on nothing; those that `translate` uses.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type", "velora_config",
}  # fmt: skip
_USED = {
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_parameters", "use_dora", "use_rslora",
}  # fmt: skip
# What peft acts on and a merge here does not. Other names peft (0.21) does not know: it warns, and ignores them.
_UNSUPPORTED = {
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "trainable_token_indices", "use_bdlora", "use_qalora",
}  # fmt: skip
MERGE_FIRST = (
    "merge it into its base with peft and name the result: "
    "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's config, checked: `base` is the model it says it was trained on, empty if it says none.

    `lone`: a LoRA file of a model of images, without such a config; its entries are those of the file's metadata.
    """

    file: Path
    base: str
    config: dict[str, Any]
    lone: bool = False

    @property
    def kind(self) -> str:
        """What messages call it."""
        return "a LoRA file" if self.lone else "a PEFT adapter"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the config sets and peft (0.21) does not know, in words."""
        names = [name for name, value in self.config.items() if value and name not in _HARMLESS | _USED]
        listed = ", ".join(sorted(names))
        return (f"its {CONFIG} sets {listed}, which peft does not know and ignores, as is done here",) if names else ()


def read_adapter(file: Path) -> Adapter:
    """The config of an adapter that can be merged.

    Raises:
        CheckpointError: The file is malformed.
        ReferenceNotFound: It is of a kind that cannot be merged; the message names it.
    """
    return checked_adapter(file, read_json(file))


def checked_adapter(file: Path, config: Any) -> Adapter:
    """`read_adapter` for a config that has been read from `file`."""
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{file}: malformed: it does not name its 'peft_type'")
    _refuse_other_kinds(file, config)
    numbers = [config.get("r"), config.get("lora_alpha")]
    patterns = [config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise CheckpointError(f"{file}: malformed: rank_pattern and alpha_pattern must be objects")
    numbers += [value for pattern in patterns for value in pattern.values()]
    if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) or numbers[0] < 1:  # type: ignore[operator]
        raise CheckpointError(f"{file}: malformed: r, lora_alpha and their patterns must be numbers, r at least 1")
    for key in (key for pattern in patterns for key in pattern):
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(f"{file}: the pattern '{key}' is no regular expression: {error}") from error
    return Adapter(file, str(config.get("base_model_name_or_path") or ""), config)


def unmergeable(message: str) -> ReferenceNotFound:
    """The error for an adapter that cannot be merged here."""
    return ReferenceNotFound(message, hint=MERGE_FIRST)


def _refuse_other_kinds(file: Path, config: Mapping[str, Any]) -> None:
    kind = config["peft_type"]
    if kind != "LORA":
        raise unmergeable(f"{file.parent} is a {kind} adapter; only LORA can be read")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASE):
        raise ReferenceNotFound(
            f"{file.parent}: init_lora_weights is '{config['init_lora_weights']}', which changed the base it was "
            "trained on: the adapter's product is not what it adds to yours",
            hint="save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA; or "
            + MERGE_FIRST,
        )
    if start not in _PLAIN_INITS:
        raise unmergeable(f"{file.parent}: init_lora_weights is '{config['init_lora_weights']}', which is unknown here")
    for name, value in config.items():
        if value and name in _UNSUPPORTED:
            raise unmergeable(f"{file.parent}: its adapter_config.json sets {name}, which cannot be merged here")
