"""What a config.json says of layers, put together for a model whose layers come from several places.

The entries are those of transformers (5.24): the number of layers, lists with an entry for each layer, and lists of the
numbers of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelmerge.checkpoint.config_file import Values
from modelmerge.checkpoint.configs import Config, Place, text_parts
from modelmerge.errors import PlanError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERS = (  # lists of the numbers of layers
    "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "mlp_only_layers", "moe_layers",
)  # fmt: skip
_NO_LAYERS = ("architectures", "token", "label", "keys", "language")  # words in names of lists about other things
_TYPES = "layer_types"
# Every so many layers one attends to all positions, where `sliding_window_pattern` does not say it.
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4}
# What tells the kind of a layer by its number, and cannot say it of layers in another order.
_BY_NUMBER = (
    "attn_layer_period", "decoder_sparse_step", "expert_layer_period", "first_k_dense_replace",
    "full_attention_interval", "global_attn_every_n_layers", "interleave_moe_layer_step", "moe_layer_freq",
    "moe_layer_start_index", "no_rope_layer_interval", "num_kv_shared_layers", "scale_attn_by_inverse_layer_idx",
)  # fmt: skip


def stacked_values(base: Config, count: int, stack: Sequence[tuple[Config, int, int]]) -> tuple[Values, list[str]]:
    """What the base's config must say of other layers than its own, and which of its entries it cannot say it in.

    Args:
        base: The base's config; nothing is said in an empty one.
        count: The number of layers of the base.
        stack: For each layer of the output the config of the model that it is from, the number of layers that one has,
            and the layer's number there.

    Raises:
        PlanError: No entry of the config has the number of layers.
    """
    if not base:
        return {}, []
    places = {place: part for place, part in text_parts(base).items() if any(part.get(key) == count for key in COUNTS)}
    if not places:
        raise PlanError(
            f"the base's config.json has no number of layers that is {count}: "
            f"neither {', '.join(COUNTS[:-1])} nor {COUNTS[-1]}",
            hint="say it there, so that the stacked model can be loaded",
        )
    values: dict[Place, Any] = {}
    doubtful: list[str] = []
    for place, part in places.items():
        values |= {(*place, key): len(stack) for key in COUNTS if part.get(key) == count}
        each = [(_part(config, place), theirs, number) for config, theirs, number in stack]
        for key in dict.fromkeys(key for config, _, _ in each for key in config if key in part):
            if key in _NUMBERS:
                values |= {(*place, key): [i for i, (config, _, n) in enumerate(each) if n in (config.get(key) or ())]}
            elif all(_is_list(key, config.get(key), theirs) for config, theirs, _ in each):
                values |= {(*place, key): [config[key][number] for config, _, number in each]}
        types = [_type(config, number) for config, _, number in each]
        if (*place, _TYPES) not in values and len(set(types)) > 1 and None not in types:
            values |= {(*place, _TYPES): types}
        doubtful += [key for key in _BY_NUMBER if part.get(key) not in (None, False)]
    return values, doubtful


def _part(config: Config, place: Place) -> Config:
    """The part of a model's config that speaks of the layers; all of it where it has no such part."""
    return text_parts(config).get(place, config)


def _is_list(key: str, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not any(word in key for word in _NO_LAYERS)


def _type(config: Mapping[str, Any], number: int) -> str | None:
    """Whether a layer attends to all positions or to a window, where a rule says it by the layer's number."""
    if isinstance(config.get(_TYPES), list) and number < len(config[_TYPES]):
        return str(config[_TYPES][number])
    every = config.get("sliding_window_pattern") or _PATTERNS.get(str(config.get("model_type")))
    slides = config.get("use_sliding_window") and number >= (config.get("max_window_layers") or 0)
    if isinstance(every, int) and not isinstance(every, bool):
        slides = (number + 1) % every != 0
    elif "use_sliding_window" not in config:
        return None
    return "sliding_attention" if slides else "full_attention"
