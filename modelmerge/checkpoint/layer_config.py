"""What a config.json says of layers, put together for a model whose layers come from several places.

The entries are those of transformers (5.24): the number of layers, lists with an entry for each layer, and lists of the
numbers of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelmerge.checkpoint.config_file import Values
from modelmerge.checkpoint.configs import Config, Place, parts, text_parts
from modelmerge.errors import PlanError

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_OF_ENCODERS = (*COUNTS, "encoder_layers", "num_encoder_layers", "depth")
_OF_DECODERS = ("decoder_layers", "num_decoder_layers")  # beside an encoder
_TOWERS = ("vis", "image", "audio", "speech")  # in names of lists of layers and of the configs inside one
_NUMBERS = (  # lists of the numbers of layers
    "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "fullatt_block_indexes", "hybrid_layer_ids",
    "mlp_only_layers", "moe_layers",
)  # fmt: skip
# In names of lists about other things.
_NO_LAYERS = ("architectures", "token", "label", "keys", "language", "limit", "index")
_TYPES, _BLOCKS, _LETTERS = "layer_types", "layers_block_type", "hybrid_override_pattern"
_MLPS = "mlp_layer_types"
_CYCLE = "block_types"  # kinds that repeat where there are more layers
# Every so many layers one attends to all positions, where no entry says it; and one has no rotary positions.
_PATTERNS = {
    "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "olmo3": 4, "qwen3_next": 4,
    "vaultgemma": 2,
}  # fmt: skip
_NO_ROPE = {"llama4_text": 4, "smollm3": 4}
# So many layers of a kind of their own come first; or last; or all behind that number.
_FIRST = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_LAST, _END = "num_kv_shared_layers", "moe_layer_end_index"
# Every so many layers one is of a kind of its own: the entry that says which is the first, else the number of that, and
# the list that says it in its place where there is one.
_PERIODS = {
    "attn_layer_period": ("attn_layer_offset", 0, _BLOCKS),
    "expert_layer_period": ("expert_layer_offset", 0, ""), "interleave_moe_layer_step": ("", -1, "moe_layers"),
    "moe_layer_freq": ("", 0, ""), "moe_layer_interval": ("", -1, ""),
}  # fmt: skip
_ALONE = ("local_attention", "rescale_every")  # ModernBERT's and RWKV's: the first layer has other norms
_ALL = ("hidden_size_per_layer_input", "num_mem_blocks")  # a table has columns for each layer; layers share weights
_ITSELF = "scale_attn_by_inverse_layer_idx"  # a factor that goes by the number in the output


def stacked_values(
    base: Config, count: int, stack: Sequence[tuple[Config, int, int]], prefix: str = ""
) -> tuple[Values, list[str]]:
    """What the base's config must say of other layers than its own, and remarks on entries that it cannot say it in.

    Args:
        base: The base's config; nothing is said in an empty one.
        count: The number of layers of the base.
        stack: For each layer of the output the config of the model that it is from, the number of layers that one has,
            and the layer's number there.
        prefix: What stands before the numbers of the layers in the names of tensors.

    Raises:
        PlanError: No entry of the config has the number of layers, or one cannot say of what kinds they are.
    """
    if not base:
        return {}, []
    tower = next((word for word in _TOWERS if word in prefix), None)
    inside = text_parts(base) if tower is None else {p: part for p, part in parts(base).items() if tower in "".join(p)}
    decodes = "decoder" in prefix and any(key in part for part in inside.values() for key in _OF_DECODERS)
    counts = _OF_DECODERS if decodes else _OF_ENCODERS
    places = {
        place: part
        for place, part in inside.items()
        if any(part.get(key) == count for key in counts) or _is_list(_BLOCKS, part.get(_BLOCKS), count)
    }
    if not places and len(stack) != count:
        raise PlanError(
            f"the base's config.json has no number of layers that is {count}: "
            f"neither {', '.join(counts[:-1])} nor {counts[-1]}",
            hint="say it there, so that the stacked model can be loaded",
        )
    values: dict[Place, Any] = {}
    doubtful: list[str] = []
    for place, part in places.items():
        said: dict[str, Any] = {key: len(stack) for key in counts if part.get(key) == count}
        each = [(_part(config, place), theirs, number) for config, theirs, number in stack]
        for key in dict.fromkeys(key for config, _, _ in each for key in config if key in part):
            if key in _NUMBERS:
                said[key] = [i for i, (config, _, n) in enumerate(each) if n in (config.get(key) or ())]
            elif all(_is_list(key, config.get(key), theirs) for config, theirs, _ in each):
                said[key] = [config[key][number] for config, _, number in each]
            elif key == _CYCLE and all(config.get(key) for config, _, _ in each):
                said[key] = [config[key][number % len(config[key])] for config, _, number in each]
            elif key == _LETTERS and all(len(config.get(key) or "") == theirs for config, theirs, _ in each):
                said[key] = "".join(config[key][number] for config, _, number in each)
        types = [_type(config, number) for config, _, number in each]
        by_rule = _TYPES not in part and types == [_type(part, i) for i in range(len(each))]
        if _TYPES not in said and None not in types and not by_rule:
            said[_TYPES] = types
        if part.get("model_type") in _NO_ROPE:
            said["no_rope_layers"] = [_turns(config, number) for config, _, number in each]
        if part.get("out_indices") == [count]:  # a backbone whose result is its last layer's
            stages = ["stem", *(f"stage{i + 1}" for i in range(len(stack)))]
            said |= {"out_indices": [len(stack)], "out_features": stages[-1:], "stage_names": stages}
        dense = [i for i, (config, _, number) in enumerate(each) if not _is_sparse(config, number)]
        if dense != [i for i in range(len(each)) if not _is_sparse({**part, **said}, i)]:
            said |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        said |= _by_number(part, each, count, said)
        values |= {(*place, key): value for key, value in said.items()}
        if part.get(_ITSELF) and [number for _, _, number in each] != list(range(len(each))):
            doubtful.append(f"config.json tells kinds of layers by their numbers in '{_ITSELF}', and the layers have "
                            "others here: look whether that is still right.")  # fmt: skip
    return values, doubtful


def _is_sparse(config: Config, number: int) -> bool:
    """Whether a layer has experts, where the config has entries of Qwen's mixtures of them."""
    every = (number + 1) % (config.get("decoder_sparse_step") or 1) == 0
    return every and number not in (config.get("mlp_only_layers") or ())


def _by_number(
    part: Config, each: Sequence[tuple[Config, int, int]], count: int, said: Mapping[str, Any]
) -> dict[str, int]:
    """What entries that tell kinds of layers by their numbers are in the output, where others have been `said`.

    Raises:
        PlanError: They cannot say it.
    """

    def of_period(key: str, config: Config, number: int) -> bool:
        offset, place, _ = _PERIODS[key]
        return bool(config.get(key)) and (number - config.get(offset, place)) % config[key] == 0

    places, numbers = range(len(each)), [number for _, _, number in each]
    wrong = [key for key in _ALL if part.get(key) and numbers != list(range(count))]
    wrong += [key for key in _ALONE if part.get(key) and any((n == 0) != (i == 0) for i, n in enumerate(numbers))]
    for key in (key for key in _PERIODS if isinstance(part.get(key), int) and _PERIODS[key][2] not in said):
        own = [of_period(key, config, number) for config, _, number in each]
        wrong += [key] if own != [of_period(key, part, i) for i in places] else []
    bounds: dict[str, int] = {}
    for key in (key for key in (*_FIRST, _LAST, _END) if isinstance(part.get(key), int) and _MLPS not in said):
        apart = []
        for config, theirs, number in each:
            bound = config.get(key) or 0
            after = theirs - bound if key == _LAST else bound % theirs + 1
            apart.append(number < bound if key in _FIRST else number >= after)
        bounds[key] = len(each) - sum(apart) - 1 if key == _END else sum(apart)
        wrong += [key] if apart != sorted(apart, reverse=key in _FIRST) else []
    if wrong:
        raise PlanError(
            f"config.json tells kinds of layers by their numbers, and cannot say it of these: {', '.join(wrong)}",
            hint="put layers where the base has those of their kind",
        )
    return bounds


def _part(config: Config, place: Place) -> Config:
    """The part of a model's config that speaks of the layers; all of it where it has no such part."""
    return parts(config).get(place, config)


def _is_list(key: str, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not any(word in key for word in _NO_LAYERS)


def _type(config: Config, number: int) -> str | None:
    """How far a layer attends, where a rule says it by the layer's number."""
    if isinstance(config.get(_TYPES), list) and number < len(config[_TYPES]):
        return str(config[_TYPES][number])
    kind, interval = str(config.get("model_type")), config.get("full_attention_interval")
    every = config.get("sliding_window_pattern") or interval or _PATTERNS.get(kind)
    slides = config.get("use_sliding_window") and number >= (config.get("max_window_layers") or 0)
    if kind == "modernbert":
        slides = number % config.get("global_attn_every_n_layers", 3) != 0
    elif isinstance(every, int) and not isinstance(every, bool):
        slides = (number + 1) % every != 0
    elif "use_sliding_window" not in config:
        return None
    linear = interval is not None or kind == "qwen3_next"
    return f"{'linear' if linear else 'sliding'}_attention" if slides else "full_attention"


def _turns(config: Config, number: int) -> int:
    """Whether a layer has rotary positions, in families where some have none."""
    every = config.get("no_rope_layer_interval") or _NO_ROPE[config["model_type"]]
    return (config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(number + 1)])[number]
