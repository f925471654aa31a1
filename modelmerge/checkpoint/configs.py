"""What configs say of the same weights: where they differ, equal numbers do not mean the same.

Shapes do not show how many heads a projection is cut into, which activation follows it, or how far positions turn.
Only what both configs say is compared: what one leaves out is its family's default, which is not known here. What the
shapes do show (hidden sizes, vocabularies) is left to the comparison of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from modelmerge.checkpoint.components import CLASS, MODEL_CONFIG
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.pairing import config_of
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError

Config = Mapping[str, Any]
Place = tuple[str, ...]  # the keys that lead to a config inside another; () is the whole

TEXT = ("text_config", "llm_config", "language_config")  # what the config of a language model is called inside another
ACTIVATIONS = frozenset({
    "act_fn", "activation", "activation_function", "dense_act_fn", "feed_forward_proj", "hidden_act",
    "hidden_activation", "mlp_hidden_act",
})  # fmt: skip
# With another value of these, the same weights make another function.
FIXED = ACTIVATIONS | {
    # how projections are cut into heads
    "attention_head_dim", "d_kv", "decoder_attention_heads", "encoder_attention_heads", "global_head_dim", "head_dim",
    "kv_channels", "multi_query", "multi_query_group_num", "n_head", "n_head_kv", "n_heads", "norm_num_groups",
    "num_attention_heads", "num_global_key_value_heads", "num_heads", "num_key_value_heads", "num_kv_heads",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    # what positions are
    "alibi", "position_biased_input", "position_embedding_type", "relative_attention",
    "relative_attention_max_distance", "rotary_dim",
    # how layers are put together, and what is multiplied on the way
    "attention_multiplier", "do_layer_norm_before", "embedding_multiplier", "logit_scale", "logits_scaling",
    "parallel_attn", "query_pre_attn_scalar", "residual_multiplier", "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights", "scale_depth", "scale_emb", "scale_embedding", "use_parallel_residual",
    # how experts of a layer are chosen
    "n_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method",
}  # fmt: skip
# What fine-tuning may change on purpose: longer contexts, other precision. The base's is what the output has.
MEANT = frozenset({
    "attn_logit_softcapping", "final_logit_softcapping", "layer_norm_eps", "layer_norm_epsilon", "layer_types",
    "layernorm_epsilon", "norm_eps", "norm_epsilon", "num_experts_per_tok", "num_experts_per_token",
    "partial_rotary_factor", "rms_norm_eps", "rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window",
    "tie_word_embeddings", CLASS,
})  # fmt: skip
# Names of one and the same function.
_SAME = {
    "gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu", "swish": "silu",
    "gelu_python_tanh": "gelu_new", "relu_squared": "relu2",
}  # fmt: skip
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base")
_PLAIN_ROPE = (None, "default", "mrope")
_SAID_ELSEWHERE = ("rope_type", "type", "original_max_position_embeddings")
_SCHEDULER = "scheduler/scheduler_config.json"
_DEEPEST = 4  # configs inside configs
_SHOWN = 60  # characters of a value


def parts(config: Config, place: Place = ()) -> dict[Place, Config]:
    """The config, and those of models inside it, by their places."""
    inside = {place: config}
    for key, value in config.items() if len(place) < _DEEPEST else ():
        model = isinstance(value, dict) and (key.endswith("_config") or "model_type" in value)
        if model and key not in ("quantization_config", "compression_config", "generation_config"):
            inside |= parts(value, (*place, key))
    return inside


def text_parts(config: Config) -> dict[Place, Config]:
    """The config, and those of language models inside it, by their places."""
    return {place: part for place, part in parts(config).items() if not place or place[-1] in TEXT}


def compared(base: Checkpoint, experts: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The experts, each with a remark on what its config says otherwise than the base's, if anything.

    Raises:
        PlanError: The configs give the weights different meanings; the message names every entry.
    """
    clashes: list[str] = []
    strangers, remarked = [], []
    for expert in experts:
        said = list(expert.remarks)
        predicted = [_prediction(model) for model in (base, expert)]
        if all(predicted) and predicted[0] != predicted[1]:
            clause = f"prediction_type is {_shown(predicted[1])}, in the base {_shown(predicted[0])}"
            clashes.append(f"'{expert.name}': {_SCHEDULER}: {clause}")
            strangers.append(expert)
        for folder in base.components:
            where = f"{folder}/" if folder else ""
            refused, remarks = compare(config_of(base, folder), config_of(expert, folder))
            clashes += [f"'{expert.name}': {where and f'{where}{MODEL_CONFIG}: '}{clause}" for clause in refused]
            strangers += [expert] if refused else []
            if remarks:
                clauses = ", ".join(remarks)
                said.append(f"its {where}{MODEL_CONFIG} differs from the base's, which the output gets: {clauses}")
        remarked.append(replace(expert, remarks=tuple(said)))
    if clashes:
        text = "the same weights mean different things, by the models' config.json:\n  " + "\n  ".join(clashes)
        raise PlanError(text, hint=_way_out(strangers[0]))
    return remarked


def _prediction(model: Checkpoint) -> Any:
    """What a pipeline's network predicts, noise or velocity, which its scheduler says; None where nothing says it."""
    file = model.directory and model.directory / _SCHEDULER
    config = read_json(file) if file is not None and file.exists() else None
    return config.get("prediction_type") if isinstance(config, dict) else None


def compare(base: Config, expert: Config) -> tuple[list[str], list[str]]:
    """What makes the weights of two configs different things, and what else differs; a clause for each entry."""
    pairs, fixed, remarks = _pairs(base, expert)
    sure = not remarks
    for place, ours, theirs in pairs:
        mine, yours = _entries(ours), _entries(theirs)
        for key in sorted(mine.keys() & yours.keys()):
            values = mine[key], yours[key]
            # Null is said of what is derived from the rest; of what may be meant, it is off.
            if values[0] == values[1] or (key in FIXED and None in values):
                continue
            clause = f"{'.'.join((*place, key))} is {_shown(values[1])}, in the base {_shown(values[0])}"
            if clause not in (*fixed, *remarks):
                (fixed if key in FIXED and sure else remarks).append(clause)
    return fixed, remarks


def _pairs(base: Config, expert: Config) -> tuple[list[tuple[Place, Config, Config]], list[str], list[str]]:
    """Which config to compare with which, what is wrong with their kinds, and what is not sure about them."""
    ours, theirs = parts(base), parts(expert)
    kinds = [config.get("model_type") for config in (base, expert)]
    words = [set(re.split("[_-]", str(kind))) - {"text", "model"} for kind in kinds]
    if not all(isinstance(kind, str) for kind in kinds) or words[0] == words[1]:
        return [(place, *pair) for place in ours | theirs if (pair := _at(place, ours, theirs))], [], []
    # An expert may be a tower of the base, or the base one of the expert.
    for place in (place for place, part in ours.items() if part.get("model_type") == kinds[1]):
        return [(place, ours[place], expert)], [], []
    for place in (place for place, part in theirs.items() if part.get("model_type") == kinds[0]):
        return [(place, base, theirs[place])], [], []
    clause = [f"model_type is {_shown(kinds[1])}, in the base {_shown(kinds[0])}"]
    if words[0] <= words[1] or words[1] <= words[0]:
        return [((), base, expert)], [], clause
    composite = len(ours) + len(theirs) > 2 or any("vision" in key or "audio" in key for key in (*base, *expert))
    return ([], [], clause) if composite else ([], clause, [])


def _at(place: Place, ours: Mapping[Place, Config], theirs: Mapping[Place, Config]) -> tuple[Config, Config] | None:
    """The two configs of a place. A language model's may be inside another's, or spread over it in older files."""
    spread = place[-1:] and place[-1] in TEXT
    pair = [side.get(place, side[()] if spread else None) for side in (ours, theirs)]
    return (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None


def _entries(config: Config) -> dict[str, Any]:
    """What a config says that is compared; the same said in two ways becomes the same."""
    entries = {key: config[key] for key in FIXED | MEANT if key in config}
    gemma = str(config.get("model_type")).startswith("gemma")
    if gemma and entries.get("hidden_activation") is not None:
        entries["hidden_act"] = entries["hidden_activation"]
    for key in ACTIVATIONS & entries.keys():
        # Gemma's first configs say gelu and have always meant its approximation.
        value = "gelu_new" if gemma and entries[key] == "gelu" else entries[key]
        entries[key] = _SAME.get(value, value) if isinstance(value, str) else value
    if config.get("use_sliding_window") is False:
        entries["sliding_window"] = None
    return entries | (_rope(config) if any(key in config for key in _ROPE) else {})


def _rope(config: Config) -> dict[str, Any]:
    """Rotary positions, wherever they stand: as entries of the config, or together in `rope_parameters`."""
    stated = {"rope_theta": config.get("rope_theta", config.get("rotary_emb_base"))}
    stated |= {"partial_rotary_factor": config.get("partial_rotary_factor", config.get("rotary_pct"))}
    stated |= {"rope_local_base_freq": config.get("rope_local_base_freq")}
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    scaling = scaling if isinstance(scaling, dict) else {}
    if any(isinstance(value, dict) for value in scaling.values()):  # by the kind of layer
        stated["rope_local_base_freq"] = (scaling.get("sliding_attention") or {}).get("rope_theta")
        scaling = scaling.get("full_attention") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        stated[key] = scaling.get(key, stated[key])
    kind = scaling.get("rope_type", scaling.get("type"))
    other = {k: v for k, v in scaling.items() if k not in (*stated, *_SAID_ELSEWHERE)}
    other |= {} if kind in _PLAIN_ROPE else {"rope_type": kind}
    return {**{key: value for key, value in stated.items() if value is not None}, "rope_scaling": other or None}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _way_out(expert: Checkpoint) -> str:
    remote, files = expert.reference.repository, list(expert.files)
    alone = "take a copy of its directory without config.json"
    if len(files) == 1:
        place = f"{expert.reference.text}/{files[0].name}"
        place = f"hf://{remote.name}/{remote.place(files[0])}@{remote.commit}" if remote is not None else place
        alone = f"name its weights alone: {expert.name}={place}"
    return f"are these experts of this base? If so, {alone}; then there is no config to compare"
