"""The config of a PEFT adapter: which adapters can be merged, by what adapter_config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from modelmerge.checkpoint.documents import Malformed, check, read_json
from modelmerge.checkpoint.patterns import Patterns
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


class _Kind(TypedDict):
    peft_type: str


class Entries(_Kind, total=False):
    """What is used of adapter_config.json."""

    r: float
    lora_alpha: float
    rank_pattern: dict[str, float] | None
    alpha_pattern: dict[str, float] | None
    auto_mapping: dict[str, Any] | None
    base_model_name_or_path: str | None
    bias: str | None
    modules_to_save: list[str] | None
    target_parameters: list[str] | None
    task_type: str | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's config, checked: `base` is the model it says it was trained on, empty if it says none.

    `lone`: a LoRA file of a model of images, without such a config; its entries are those of the file's metadata.
    """

    file: Path
    base: str
    config: dict[str, Any]
    patterns: Mapping[str, Patterns] = field(default_factory=dict)  # of rank and alpha
    lone: bool = False

    @property
    def kind(self) -> str:
        """What messages call it."""
        return "a LoRA file" if self.lone else "a PEFT adapter"

    def value_of(self, what: str, module: str) -> float:
        """A module's rank or alpha.

        Raises:
            CheckpointError: A pattern cannot be matched.
        """
        try:
            value = self.patterns[what].value_of(module) if what in self.patterns else None
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {what}_pattern: {error}", hint=MERGE_FIRST) from error
        return float(self.config["r" if what == "rank" else "lora_alpha"] if value is None else value)

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
    try:
        check(config, Entries)
    except Malformed as error:
        raise CheckpointError(f"{file}: malformed: {error}") from error
    _refuse_other_kinds(file, config)
    ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
    if min(ranks) < 1 or "lora_alpha" not in config:
        raise CheckpointError(f"{file}: malformed: r and lora_alpha must be numbers, every rank at least 1")
    patterns = {what: Patterns(config.get(f"{what}_pattern") or {}) for what in ("rank", "alpha")}
    return Adapter(file, config.get("base_model_name_or_path") or "", config, patterns)


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
