"""Configs of base and experts: what gives the same weights another meaning is refused, what may be meant is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import modelmerge
from modelmerge.checkpoint.configs import FIXED, MEANT, compare, parts
from modelmerge.cli import main
from modelmerge.errors import PlanError
from modelmerge.record.card import front_matter
from tests.support.checkpoints import base_state, expert_state, read, same, write

Config = dict[str, Any]
LLAMA: Config = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False,
}  # fmt: skip
TOWER: Config = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "num_attention_heads": 4}
CLIP: Config = {
    "model_type": "clip", "vision_config": TOWER,
    "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "num_attention_heads": 2},
}  # fmt: skip
LLAVA: Config = {"model_type": "llava", "text_config": LLAMA, "vision_config": TOWER}
GEMMA: Config = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
MROPE: Config = {"type": "mrope", "mrope_section": [2, 3, 3]}
YARN: Config = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
# As transformers 4 and the authors wrote them.
OLDER: dict[str, Config] = {
    "llama": LLAMA,
    "llama 3.1": {
        **LLAMA, "rope_theta": 500000.0, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    },
    "linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {
        **LLAMA, "model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "rope_scaling": YARN
    },
    "gemma": {**GEMMA, "model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "rope_theta": 1e4},
    "gemma3": {
        "model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 4},
        "text_config": {
            **GEMMA, "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 1024, "num_hidden_layers": 6,
        },
    },
    "qwen2.5-vl": {
        **LLAMA, "model_type": "qwen2_5_vl", "rope_scaling": MROPE,
        "vision_config": {"depth": 2, "hidden_act": "silu", "num_heads": 4, "model_type": "qwen2_5_vl"},
    },
    "gpt-neox": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 64, "num_attention_heads": 4,
        "rotary_pct": 0.25, "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "use_parallel_residual": True,
    },
    "phi3": {
        **LLAMA, "model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 2047,
        "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
        "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "type": "longrope"},
    },
    "t5": {"model_type": "t5", "d_kv": 16, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    "deberta": {
        "model_type": "deberta-v2", "hidden_act": "gelu", "relative_attention": True, "pos_att_type": "p2c|c2p"
    },
    "bert": {
        "model_type": "bert", "hidden_act": "gelu", "num_attention_heads": 4, "hidden_size": 64,
        "position_embedding_type": "absolute",
    },
    "clip": CLIP,
    "llava": LLAVA,
}  # fmt: skip


def pair(root: Path, base: Config, *experts: Config) -> list[Path]:
    """A base and experts with these configs."""
    origin = base_state()
    models = [write(root / "base", origin)]
    models += [write(root / f"e{i}", expert_state(origin, i)) for i in range(len(experts))]
    for model, config in zip(models, (base, *experts), strict=True):
        (model / "config.json").write_text(json.dumps(config))
    return models


# --- the same, said otherwise ---


@pytest.mark.parametrize("name", OLDER)
def test_a_config_is_itself_after_todays_transformers_has_saved_it(name: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(**json.loads(json.dumps(OLDER[name]))).save_pretrained(tmp_path)
    newer = json.loads((tmp_path / "config.json").read_text())
    assert compare(OLDER[name], newer) == compare(newer, OLDER[name]) == ([], [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
        ({"model_type": "gemma", "hidden_act": "gelu"}, {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 8}),  # null: as many as there are heads
        ({}, {"head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": 7}),  # the family's default may be that
        ({"vocab_size": 5, "_name_or_path": "x", "use_cache": True}, {"vocab_size": 7, "architectures": ["Y"]}),
        ({"model_type": 7, "text_config": [], "rope_parameters": "x"}, {"model_type": None, "rope_scaling": []}),
    ],
)  # fmt: skip
def test_what_means_the_same_or_is_not_known_is_no_difference(one: Config, other: Config) -> None:
    assert compare(one, other) == compare(other, one) == ([], [])


# --- what is refused ---


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "mistral"), ("hidden_act", "gelu"), ("num_attention_heads", 8), ("num_key_value_heads", 4)],
)
def test_another_meaning_is_refused_with_both_values_and_a_way_out(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = pair(tmp_path, LLAMA, LLAMA, {**LLAMA, key: value})
    words = ["merge", "average", *map(str, models), "-o", str(tmp_path / "out")]
    assert main(words) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"'e1': {key} is {json.dumps(value)}, in the base {json.dumps(LLAMA[key])}" in err
    assert "'e0'" not in err
    assert f"e1={models[2]}/model.safetensors" in err
    # The way out, word for word, is one, and gives what it gave before.
    alone = f"e1={models[2]}/model.safetensors"
    assert main([*words[:-3], alone, *words[-2:], "-q"]) == 0
    (models[2] / "config.json").unlink()
    assert main([*words[:-1], str(tmp_path / "other"), "-q"]) == 0
    assert same(*(read(tmp_path / name) for name in ("out", "other")))


def test_shards_cannot_be_named_so_the_way_out_is_another(tmp_path: Path) -> None:
    models = pair(tmp_path, LLAMA, {**LLAMA, "hidden_act": "relu"})
    (models[1] / "model.safetensors").unlink()
    write(models[1], expert_state(base_state(), 0), shards=2, config=False)
    with pytest.raises(PlanError) as caught:
        modelmerge.extract(*models[:1], models[1:], tmp_path / "out")
    assert caught.value.hint is not None
    assert "a copy of its directory without config.json" in caught.value.hint
    (models[1] / "config.json").unlink()
    modelmerge.extract(models[0], models[1:], tmp_path / "out")


def test_every_entry_and_every_expert_is_named_at_once(tmp_path: Path) -> None:
    changed = {**LLAMA, "hidden_act": "relu", "num_attention_heads": 8}
    models = pair(tmp_path, LLAMA, changed, {**LLAMA, "hidden_act": "gelu"})
    with pytest.raises(PlanError) as caught:
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average")
    assert [line.split(" is ")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "'e0': hidden_act", "'e0': num_attention_heads", "'e1': hidden_act",
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_configs_inside_configs_are_compared_at_their_place() -> None:
    deep = {"model_type": "omni", "thinker_config": {"text_config": dict(LLAMA), "audio_config": {"n_head": 4}}}
    other = json.loads(json.dumps(deep))
    other["thinker_config"]["audio_config"]["n_head"] = 8
    other["thinker_config"]["text_config"]["rope_theta"] = 7.0
    assert compare(deep, other) == (
        ["thinker_config.audio_config.n_head is 8, in the base 4"],
        ["thinker_config.text_config.rope_theta is 7.0, in the base 10000.0"],
    )
    assert set(parts(deep)) == {
        (), ("thinker_config",), ("thinker_config", "text_config"), ("thinker_config", "audio_config")
    }  # fmt: skip


# --- what must not be refused ---


@pytest.mark.parametrize(
    ("base", "expert"),
    [(CLIP, TOWER), (TOWER, CLIP), (LLAVA, LLAMA), (LLAMA, LLAVA),
     ({**LLAMA, "model_type": "qwen2_5_vl"}, {**LLAMA, "model_type": "qwen2_5_vl_text"})],
    ids=["a tower of the base", "the base a tower of it", "the text model of the base", "and of the expert", "a name"],
)  # fmt: skip
def test_towers_are_compared_with_their_part_of_the_other(base: Config, expert: Config) -> None:
    assert compare(base, expert) == ([], [])
    changed = json.loads(json.dumps(expert).replace("silu", "relu").replace("quick_gelu", "relu"))
    fixed, remarks = compare(base, changed)
    assert fixed
    assert not remarks


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ({**LLAVA, "text_config": {}}, LLAMA),  # what its text model is, is the family's default
        ({**LLAMA, "model_type": "llava", "mm_vision_tower": "x"}, LLAMA),
        ({"model_type": "vit_mae", "hidden_act": "gelu"}, {"model_type": "vit", "hidden_act": "relu"}),
    ],
)  # fmt: skip
def test_what_is_not_sure_is_said_and_not_refused(base: Config, expert: Config) -> None:
    fixed, remarks = compare(base, expert)
    assert not fixed
    assert f'model_type is "{expert["model_type"]}", in the base "{base["model_type"]}"' in remarks


def test_what_has_no_config_is_not_compared(tmp_path: Path) -> None:
    models = pair(tmp_path, LLAMA, {**LLAMA, "hidden_act": "relu"}, LLAMA)
    files = [models[0], models[1] / "model.safetensors", models[2]]
    modelmerge.extract(models[0], files[1:2], tmp_path / "vectors")
    manifest = modelmerge.merge(files[0], [tmp_path / "vectors" / "e0", files[2]], tmp_path / "out", method="average")
    assert manifest["notes"] == []


# --- what is said ---


def test_what_may_be_meant_is_said_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = {**LLAMA, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "rope_scaling": YARN}
    models = pair(tmp_path, LLAMA, longer)
    note = (
        "'e0': its config.json differs from the base's, which the output gets: rms_norm_eps is 1e-06, in the base "
        '1e-05, rope_scaling is {"factor": 4.0, "rope_type": "yarn"}, in the base null, rope_theta is 1000000.0, in '
        "the base 10000.0."
    )
    plan = modelmerge.merge(models[0], models[1:], method="average", dry_run=True)
    assert plan["remarks"] == [note]
    words = ["merge", "average", *map(str, models), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert note in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "out" / "modelmerge.json").read_text())["notes"] == [note]
    assert f"- {note}" in (tmp_path / "out" / "README.md").read_text()
    assert front_matter(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LLAMA


@pytest.mark.parametrize("key", sorted(MEANT - {"rope_scaling"}))
def test_null_differs_from_a_value_where_it_may_be_meant(key: str) -> None:
    fixed, remarks = compare({key: None}, {key: 3})
    assert not fixed
    assert len(remarks) == 1


def test_no_entry_is_both_refused_and_said() -> None:
    assert not FIXED & MEANT
