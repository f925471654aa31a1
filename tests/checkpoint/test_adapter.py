"""PEFT adapters as experts: made by peft itself, merged by peft itself, and compared."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modelmerge
from modelmerge.engine import job
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, RecipeError, ReferenceNotFound, UsageError
from modelmerge.methods.contract import Context
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.merge import execute
from modelmerge.verbs.prepare import prepare
from tests.support.checkpoints import State, read
from tests.support.lora import TOLERANCE, adapter_of, base_of, distance, load, merged_by_peft, quiet_peft

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": ["q_proj", "k_proj", "up_proj"], "rank_pattern": {"q_proj": 3, r"layers\.1\..*k_proj": 1},
         "alpha_pattern": {"model.layers.1.self_attn.q_proj": 12, "up_proj": 5}},
    ),
    "patterns, rank-stabilised": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"^model.layers.0.*q_proj": 3}},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora, rank-stabilised": ("llama", {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "norm"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "stored the other way": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "stored the other way, square": ("gpt2", {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
    # peft corrects the flag for the layer it comes to last, here the head: the config says nothing about c_proj.
    "stored the other way, the flag lost": ("gpt2", {"target_modules": ["c_proj", "lm_head"], "fan_in_fan_out": True}),
    "stored the other way, dora": (
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "biases of its layers": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query", "value"], "bias": "all"}),
    "a bias of its own": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "a classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "encoder and decoder": ("t5", {"target_modules": ["q", "v", "wi", "wo"]}),
    "vision tower": ("clip-vision", {"target_modules": ["q_proj", "fc1"]}),
    "vision tower, dora": ("clip-vision", {"target_modules": ["q_proj", "patch_embedding"], "use_dora": True}),
    "both towers": ("clip", {"target_modules": ["q_proj", "fc1", "visual_projection"]}),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}),
    "convolutions, dora": ("resnet", {"target_modules": ["convolution"], "use_dora": True}),
}  # fmt: skip


def merged_here(base: Path, adapters: list[Path], directory: Path, **options: Any) -> State:
    told: dict[str, Any] = {"method": "task-arithmetic", "scale": 1.0} | options
    told = {name: value for name, value in told.items() if value is not None}
    modelmerge.merge(base, adapters, directory, **told)
    return read(directory)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_an_adapter_adds_is_what_peft_adds(variant: str, tmp_path: Path) -> None:
    kind, options = VARIANTS[variant]
    base = base_of(kind, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    want = merged_by_peft(base, adapter, tmp_path / "peft")
    got = merged_here(base, [adapter], tmp_path / "merged")
    origin = read(base)
    assert got.keys() == origin.keys()
    # A head that peft unties from its embedding is stored beside it; the base has no place for it.
    assert want.keys() - origin.keys() <= {"lm_head.weight"}
    assert distance(want, origin, origin) > 1e-2
    assert distance(want, got, origin) < TOLERANCE


@pytest.mark.parametrize(
    "variant", ["plain", "dora", "embedding", "embedding, dora", "stored the other way, dora", "convolutions, dora"]
)
def test_where_tensors_are_cut_does_not_matter(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options = VARIANTS[variant]
    base = base_of(kind, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    whole = merged_here(base, [adapter], tmp_path / "whole")
    monkeypatch.setattr(job, "CPU_BLOCK", 50)
    monkeypatch.setattr(job, "SAMPLE_RUN", 30)
    cut = merged_here(base, [adapter], tmp_path / "cut")
    assert distance(whole, cut, whole) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"], use_dora=True)
    for directory, name in ((base, "model"), (adapter, "adapter_model")):
        file = directory / f"{name}.safetensors"
        save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    got = merged_here(base, [adapter], tmp_path / "merged", dtype="float32")
    for directory, name in ((base, "model"), (adapter, "adapter_model")):
        file = directory / f"{name}.safetensors"
        save_file({key: value.float() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    assert distance(merged_by_peft(base, adapter, tmp_path / "peft"), got, got) < TOLERANCE


# Without APGD's shared subspace: of an expert of low rank it takes directions that are a matter of rounding.
@pytest.mark.parametrize(
    ("name", "options"), [("average", {}), ("task-arithmetic", {}), ("ties", {}), ("apgd", {"shared_rank": 0})]
)
def test_adapters_and_full_experts_mix(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapters = [
        adapter_of(base, tmp_path / "one", 1, target_modules=["q_proj", "v_proj"]),
        adapter_of(base, tmp_path / "two", 2, target_modules="all-linear", use_dora=True),
        adapter_of(base, tmp_path / "three", 3, target_modules=["embed_tokens"], modules_to_save=["norm"]),
    ]
    full = [tmp_path / "full" / adapter.name for adapter in adapters]
    for adapter, directory in zip(adapters, full, strict=True):
        merged_by_peft(base, adapter, directory)
    want = merged_here(base, full, tmp_path / "want", method=name, scale=None, **options)
    got = merged_here(base, [adapters[0], full[1], adapters[2]], tmp_path / "got", method=name, scale=None, **options)
    assert distance(want, read(base), want) > 1e-3
    # A task vector's smallest entries are as large as rounding, and a trim falls on either side of them.
    far = [float((want[key] - got[key]).abs().gt(1e-5).float().mean()) for key in want]
    assert max(far) < 0.05, (name, far)


def test_extract_and_disentangle_take_adapters(tmp_path: Path) -> None:
    base = base_of("gpt2", tmp_path / "base")
    adapters = [
        adapter_of(
            base, tmp_path / f"a{i}", i, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, bias="lora_only"
        )
        for i in range(2)
    ]
    report = modelmerge.extract(base, adapters, tmp_path / "vectors")
    want = merged_by_peft(base, adapters[0], tmp_path / "peft")
    origin, vector = read(base), read(tmp_path / "vectors" / "a0")
    assert set(vector) == {key for key in origin if "c_attn" in key or "c_fc.weight" in key or "c_fc.bias" in key}
    assert distance({k: want[k] - origin[k] for k in vector}, vector, vector) < TOLERANCE
    assert "transformer.wte.weight" in report["experts"][0]["unchanged_tensors"]
    assert report["experts"][0]["entries_not_restored"] == 0
    modelmerge.disentangle(base, adapters, tmp_path / "disentangled", method="awd")
    by_hand = merged_here(base, [tmp_path / "disentangled" / f"a{i}" for i in range(2)], tmp_path / "two")
    at_once = merged_here(base, adapters, tmp_path / "one", disentangle="awd")
    assert distance(by_hand, at_once, at_once) < TOLERANCE


def test_the_manifest_names_the_adapters_files_and_a_replay_checks_them(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged_here(base, [adapter], tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "modelmerge.json").read_bytes())
    files = manifest["inputs"]["experts"][0]["files"]
    assert {Path(file).name for file in files} == {"adapter_config.json", "adapter_model.safetensors"}
    modelmerge.replay(tmp_path / "merged", tmp_path / "again")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 30}))
    with pytest.raises(RecipeError, match=r"adapter_config\.json: not the file that the recipe was made with"):
        modelmerge.replay(tmp_path / "merged", tmp_path / "changed")


def renamed(source: Path, target: Path, old: str, new: str, file: str = "model.safetensors") -> Path:
    """A copy of a checkpoint whose names begin otherwise."""
    shutil.copytree(source, target)
    state = load_file(target / file)
    moved = {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state.items()}
    assert moved.keys() != state.keys()
    save_file(moved, target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model.", ""),  # the base was saved from the model inside
        ("model.", "language_model.model."),
        ("", "language_model."),
    ],
)
def test_names_may_differ_in_front(old: str, new: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    options = {
        "target_modules": ["q_proj", "embed_tokens", "down_proj"],
        "modules_to_save": ["norm", "input_layernorm"],
    }
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    want = merged_here(base, [adapter], tmp_path / "plain")
    other = renamed(base, tmp_path / "other", old, new)
    got = merged_here(other, [adapter], tmp_path / "moved")
    back = {old + key.removeprefix(new) if key.startswith(new) and (new or "lm_head" not in key) else key: value
            for key, value in got.items()}  # fmt: skip
    assert back.keys() == want.keys()
    assert distance(want, back, want) == 0.0


def test_words_may_stand_in_another_order(tmp_path: Path) -> None:
    """As transformers 5 has vision-language models in memory, and their files do not."""
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    want = merged_here(base, [adapter], tmp_path / "plain")
    other = renamed(base, tmp_path / "other", "model.", "language_model.model.")
    key = "base_model.model.model."
    memory = renamed(adapter, tmp_path / "memory", key, key + "language_model.", "adapter_model.safetensors")
    got = merged_here(other, [memory], tmp_path / "moved")
    for name, value in want.items():
        assert torch.equal(got[name.replace("model.", "language_model.model.", 1)], value)


def test_of_two_towers_the_one_it_was_trained_on(tmp_path: Path) -> None:
    base = base_of("clip", tmp_path / "base")
    tower = tmp_path / "tower"
    load(base).vision_model.save_pretrained(tower)
    config = json.loads((tower / "config.json").read_bytes())
    (tower / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPVisionModel"]}))
    kept = read(tower)
    if any(key.startswith("vision_model.") for key in kept):
        renamed(tower, tmp_path / "bare", "vision_model.", "")
        tower = tmp_path / "bare"
    adapter = adapter_of(tower, tmp_path / "adapter", target_modules=["q_proj", "fc1"])
    assert all("vision_model" not in key for key in load_file(adapter / "adapter_model.safetensors"))
    got, origin = merged_here(base, [adapter], tmp_path / "merged"), read(base)
    changed = {key for key in origin if not torch.equal(got[key], origin[key])}
    assert changed == {f"vision_model.encoder.layers.0.{m}.weight" for m in ("self_attn.q_proj", "mlp.fc1")}
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    with pytest.raises(PlanError, match=r"may be any of text_model\.enc.*, vision_model\.enc"):
        merged_here(base, [adapter], tmp_path / "never")


def test_multihead_attention_is_refused(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)
            self.fc = nn.Linear(8, 8)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapted = quiet_peft(model, target_modules=["attn", "fc"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ReferenceNotFound, match=r"'0\.attn' is an nn\.MultiheadAttention"):
        merged_here(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "never")


def test_a_new_head_is_left_out_and_said(tmp_path: Path) -> None:
    base = base_of("bert", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    state = load_file(base / "model.safetensors")
    save_file({k: v for k, v in state.items() if "classifier" not in k}, base / "model.safetensors")
    merged_here(base, [adapter], tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "modelmerge.json").read_bytes())
    assert manifest["tensors"]["expert_only"] == {"classifier.bias": ["adapter"], "classifier.weight": ["adapter"]}
    assert any("classifier.weight" in note for note in manifest["notes"])


def test_a_base_of_another_name_is_said(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged_here(base, [adapter], tmp_path / "same")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/Other-7B"}))
    merged_here(base, [adapter], tmp_path / "other")
    notes = [json.loads((tmp_path / out / "modelmerge.json").read_bytes())["notes"] for out in ("same", "other")]
    assert not notes[0]
    assert any("it says it was trained on 'org/Other-7B', and the base is 'base'" in note for note in notes[1])


def test_pickled_adapters(tmp_path: Path) -> None:
    base = base_of("gpt2", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **VARIANTS["stored the other way, dora"][1])
    want = merged_here(base, [adapter], tmp_path / "safe")
    state = load_file(adapter / "adapter_model.safetensors")
    torch.save({k: v.T.contiguous().T if v.ndim == 2 else v for k, v in state.items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    got = merged_here(base, [adapter], tmp_path / "pickled")
    assert distance(want, got, want) == 0.0


OTHER_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA can be read"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16', which changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "'olora', which changed the base"),
    "corda": ({"init_lora_weights": "corda"}, "'corda', which changed the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "'loftq', which changed the base"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga', which changed the base"),
    "an init of tomorrow": ({"init_lora_weights": "new"}, "'new', which is unknown here"),
    "replicated layers": ({"layer_replication": [[0, 4], [2, 5]]}, "sets layer_replication"),
    "trained tokens": ({"trainable_token_indices": [3, 4]}, "sets trainable_token_indices"),
    "qalora": ({"use_qalora": True}, "sets use_qalora"),
    "kasa": ({"kasa_config": {"beta": 1}}, "sets kasa_config"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "sets arrow_config"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_refused_by_name_with_what_to_do(kind: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    changed, message = OTHER_KINDS[kind]
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changed))
    with pytest.raises(ReferenceNotFound, match=re.escape(message)) as refused:
        merged_here(base, [adapter], tmp_path / "never")
    assert "merge_and_unload()" in str(refused.value.hint)
    assert not (tmp_path / "never").exists()


def test_a_real_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    import peft

    config = peft.VeraConfig(target_modules=["q_proj"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ReferenceNotFound, match="is a VERA adapter"):
        merged_here(base, [tmp_path / "adapter"], tmp_path / "never")


FIRST = "base_model.model.model.layers.0.self_attn.q_proj."
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], type[ModelMergeError], str]] = {
    "a key of its own": ({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 16)}, {},
                         ReferenceNotFound, "trainable_tokens_delta' cannot be merged here"),
    "an unknown LoRA key": ({FIRST + "lora_E": (2, 1)}, {}, ReferenceNotFound, "lora_E' cannot be merged here"),
    "an adapter's name left in": ({FIRST + "lora_A.default.weight": (2, 16)}, {},
                                  ReferenceNotFound, r"lora_A\.default"),
    "half a pair": ({FIRST + "lora_B.weight": None}, {}, CheckpointError, "no matching B of 'model.layers.0"),
    "no magnitude": ({}, {"use_dora": True}, CheckpointError, "no matching magnitude"),
    "a magnitude too many": ({FIRST + "lora_magnitude_vector": (16,)}, {}, CheckpointError, "has no use_dora"),
    "a bias too many": ({FIRST + "lora_B.bias": (16,)}, {}, CheckpointError, "has no lora_bias"),
    "a bias without a bias": ({FIRST + "lora_B.bias": (16,)}, {"lora_bias": True}, PlanError, "no bias in the base"),
    "shards not gathered": ({FIRST + "lora_A.weight": (0,)}, {}, CheckpointError, "no factor of a LoRA"),
    "another rank": ({}, {"r": 4}, CheckpointError, "are not of rank 4, which adapter_config.json says"),
    "another width": ({FIRST + "lora_A.weight": (2, 12)}, {}, PlanError, r"makes \[16, 12\], but the base's"),
    "another model": ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (2, 16),
                       "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": (16, 2)}, {},
                      PlanError, r"no tensor for its key 'base_model.model.model.layers.7.self_attn.q_proj.weight'"),
    "a whole tensor from nowhere": ({"base_model.model.model.extra.weight": (3,)}, {}, PlanError,
                                    "no tensor for its key 'base_model.model.model.extra.weight'"),
    "a broken pattern": ({}, {"rank_pattern": {"(q_proj": 2}}, CheckpointError, "is no regular expression"),
    "no rank": ({}, {"r": None}, CheckpointError, "r must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_what_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    tensors, config, error, message = BROKEN[fault]
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    state = load_file(adapter / "adapter_model.safetensors")
    for key, shape in tensors.items():
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.ones(shape)
    save_file(state, adapter / "adapter_model.safetensors")
    told = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps(told | config))
    with pytest.raises(error, match=message):
        merged_here(base, [adapter], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_nan_in_a_factor_is_named(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    state = load_file(adapter / "adapter_model.safetensors")
    state[FIRST + "lora_B.weight"][3, 1] = torch.nan
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{FIRST}lora_B.weight' of 'adapter' holds NaN"):
        merged_here(base, [adapter], tmp_path / "never")


def test_dora_cannot_rescale_zeros(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    for file, key in ((base / "model.safetensors", FIRST.removeprefix("base_model.model.") + "weight"),
                      (adapter / "adapter_model.safetensors", FIRST + "lora_B.weight")):  # fmt: skip
        state = load_file(file)
        state[key][3] = 0
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"'{FIRST}lora_magnitude_vector' rescales weights that are all zero"):
        merged_here(base, [adapter], tmp_path / "never")


def test_a_base_that_stores_tied_weights_twice(tmp_path: Path) -> None:
    base = base_of("llama-tied", tmp_path / "base")
    adapters = [adapter_of(base, tmp_path / t, target_modules=[t, "q_proj"]) for t in ("embed_tokens", "lm_head")]
    want = [merged_by_peft(base, adapter, tmp_path / "peft" / adapter.name) for adapter in adapters]
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    for adapter, one in zip(adapters, want, strict=True):
        got = merged_here(base, [adapter], tmp_path / "merged" / adapter.name)
        assert distance(one, got, one) < TOLERANCE
        assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])


def test_an_adapter_is_no_base_and_needs_its_weights(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ReferenceNotFound, match="is a PEFT adapter, not a base"):
        merged_here(adapter, [base], tmp_path / "never")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ReferenceNotFound, match=r"but neither adapter_model.safetensors nor adapter_model.bin"):
        merged_here(base, [adapter], tmp_path / "never")


def notes_of(directory: Path) -> str:
    return "\n".join(json.loads((directory / "modelmerge.json").read_bytes())["notes"])


def stored_twice(base: Path, names: list[str], table: str) -> Path:
    """The base with its table under all of its names, as some programs save it."""
    state = load_file(base / "model.safetensors")
    state |= {name: state[table].clone() for name in names}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    return base


TIES = {  # kind: the table, the layers to adapt, all names it may be stored by
    "llama-tied": ("model.embed_tokens.weight", "q_proj", ["lm_head.weight"]),
    "gpt2": ("transformer.wte.weight", "c_attn", ["lm_head.weight"]),
    "t5": ("shared.weight", "q", ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
    "whisper": ("model.decoder.embed_tokens.weight", "q_proj", ["proj_out.weight"]),
}
APART = [
    ("llama-tied", ["embed_tokens"]), ("llama-tied", ["lm_head"]), ("llama-tied", ["model.embed_tokens", "lm_head"]),
    ("gpt2", ["wte"]), ("gpt2", ["lm_head"]), ("t5", ["shared"]), ("t5", ["embed_tokens"]), ("t5", ["lm_head"]),
    ("whisper", ["embed_tokens"]), ("whisper", ["proj_out"]),
]  # fmt: skip


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize(("kind", "saved"), APART, ids=str)
def test_a_table_that_is_trained_apart_from_its_twin_is_refused_as_peft_unties_it(
    kind: str, saved: list[str], stored: str, tmp_path: Path
) -> None:
    table, layers, names = TIES[kind]
    base = base_of(kind, tmp_path / "base")
    options = {"target_modules": [layers], "modules_to_save": list(saved), "fan_in_fan_out": kind == "gpt2"}
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    want, origin = merged_by_peft(base, adapter, tmp_path / "peft"), read(base)
    tables = [value for name, value in want.items() if value.shape == origin[table].shape]
    assert any(not torch.equal(one, tables[0]) for one in tables)  # peft's merge holds more than one table
    if stored == "twice":
        stored_twice(base, names, table)
    with pytest.raises(PlanError, match="was trained apart, and the base ties embedding and head") as refused:
        merged_here(base, [adapter], tmp_path / "never")
    assert "with tie_word_embeddings false" in str(refused.value.hint)
    assert not (tmp_path / "never").exists()
    globs = ["*embed_tokens.weight", "*shared.weight", "*wte.weight", "*lm_head.weight", "*proj_out.weight"]
    names = [*load_file(base / "model.safetensors"), *load_file(adapter / "adapter_model.safetensors")]
    globs = [glob for glob in globs if fnmatch.filter(names, glob)]
    got = merged_here(base, [adapter], tmp_path / "merged", exclude=globs)
    assert torch.equal(got[table], origin[table])


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_base_that_says_it_is_not_tied_takes_tables_apart_as_peft_does(saved: str, tmp_path: Path) -> None:
    """The way out that the refusal names."""
    base = stored_twice(base_of("llama-tied", tmp_path / "base"), ["lm_head.weight"], "model.embed_tokens.weight")
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[saved])
    want = merged_by_peft(base, adapter, tmp_path / "peft")
    got = merged_here(base, [adapter], tmp_path / "merged")
    assert got.keys() == want.keys()
    assert distance(want, got, got) < TOLERANCE


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
        ("gpt2", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "fan_in_fan_out": True}),
        ("t5", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("t5", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("llama-tied", {}),  # saved beside the LoRA, not trained
    ],
    ids=str,
)
def test_tables_that_peft_keeps_tied_are_merged(
    kind: str, options: dict[str, Any], stored: str, tmp_path: Path
) -> None:
    table, layers, names = TIES[kind]
    base = base_of(kind, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=[layers], **deepcopy(options))  # peft changes them
    if not options:
        state = load_file(adapter / "adapter_model.safetensors")
        other = torch.rand_like(read(base)[table])
        state |= {f"base_model.model.{name}": other.clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(state, adapter / "adapter_model.safetensors")
    want, origin = merged_by_peft(base, adapter, tmp_path / "peft"), read(base)
    if stored == "twice":
        stored_twice(base, names, table)
    got = merged_here(base, [adapter], tmp_path / "merged")
    assert distance(want, got, origin) < TOLERANCE
    assert distance(want, origin, [table]) > 1e-2
    assert all(torch.equal(got[name], got[table]) for name in names if name in got)


def test_a_model_without_a_head_has_no_tie_to_lose(tmp_path: Path) -> None:
    base = base_of("bert", tmp_path / "base")
    adapter = adapter_of(
        base, tmp_path / "adapter", target_modules=["query"], modules_to_save=["word_embeddings"], task_type="SEQ_CLS"
    )
    want = merged_by_peft(base, adapter, tmp_path / "peft")
    got = merged_here(base, [adapter], tmp_path / "merged")
    assert distance(want, got, got) < TOLERANCE


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_lora_on_a_tied_table_is_said_to_change_its_twin(module: str, stored: str, tmp_path: Path) -> None:
    base = base_of("llama-tied", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=[module, "q_proj"])
    if stored == "twice":
        stored_twice(base, ["lm_head.weight"], "model.embed_tokens.weight")
    merged_here(base, [adapter], tmp_path / "merged")
    told = "changes the embedding and the head that is tied to it, as merging with peft does"
    assert notes_of(tmp_path / "merged").count(told) == 1
    plain = adapter_of(base, tmp_path / "plain", target_modules=["q_proj"])
    merged_here(base, [plain], tmp_path / "other")
    assert "tied" not in notes_of(tmp_path / "other")


def test_what_peft_does_not_know_of_a_config_is_said_and_ignored(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"my_framework_version": "1.2", "use_tomorrow": True, "nothing": None})
    )
    want = merged_by_peft(base, adapter, tmp_path / "peft")
    got = merged_here(base, [adapter], tmp_path / "merged")
    assert distance(want, got, got) < TOLERANCE
    assert "sets my_framework_version, use_tomorrow, which peft does not know" in notes_of(tmp_path / "merged")


def test_every_name_that_peft_knows_is_one_that_is_read_or_refused() -> None:
    import dataclasses

    import peft

    from modelmerge.checkpoint import adapter_config as ours

    known = {spec.name for spec in dataclasses.fields(peft.LoraConfig)}
    assert known <= ours._HARMLESS | ours._USED | ours._UNSUPPORTED
    assert not ours._UNSUPPORTED & (ours._HARMLESS | ours._USED)


VALUE_HEAD = {"v_head.summary.weight": (1, 16), "v_head.summary.bias": (1,)}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("glob", ["v_head*", "base_model.model.v_head.*", "*.summary.*"])
def test_keys_that_have_no_place_in_the_base_can_be_excluded(prefix: str, glob: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    want = merged_here(base, [adapter], tmp_path / "want")
    state = load_file(adapter / "adapter_model.safetensors")
    state |= {prefix + key: torch.ones(shape) for key, shape in VALUE_HEAD.items()}
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(PlanError, match=r"no tensor for its key .*v_head") as refused:
        merged_here(base, [adapter], tmp_path / "never")
    assert "exclude" in str(refused.value.hint)
    if glob.startswith("base_model.") and not prefix:
        with pytest.raises(PlanError, match="v_head"):
            merged_here(base, [adapter], tmp_path / "never", exclude=[glob])
        return
    got = merged_here(base, [adapter], tmp_path / "merged", exclude=[glob])
    assert distance(want, got, want) == 0.0
    assert "v_head.summary.bias' and 1 more has no place in the base and is left out" in notes_of(tmp_path / "merged")
    modelmerge.replay(tmp_path / "merged", tmp_path / "again")
    modelmerge.extract(base, [adapter], tmp_path / "vectors", exclude=[glob])


def test_a_lora_of_a_module_that_the_base_lacks_can_be_excluded(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    want = merged_here(base, [adapter], tmp_path / "want")
    state = load_file(adapter / "adapter_model.safetensors")
    extra = "base_model.model.value.dense.lora_"
    state |= {f"{extra}A.weight": torch.ones(2, 5), f"{extra}B.weight": torch.ones(3, 2)}
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(PlanError, match=r"value\.dense"):
        merged_here(base, [adapter], tmp_path / "never")
    got = merged_here(base, [adapter], tmp_path / "merged", exclude=["value.*"])
    assert distance(want, got, want) == 0.0


def test_half_of_a_lora_cannot_be_excluded(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UsageError, match=r"exclude '\*lora_A\*' matches no tensor"):
        merged_here(base, [adapter], tmp_path / "never", exclude=["*lora_A*"])


def test_full_weights_beside_an_adapter_are_said_to_be_passed_over(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    want = merged_here(base, [adapter], tmp_path / "want")
    shutil.copy(base / "model.safetensors", adapter / "model.safetensors")
    got = merged_here(base, [adapter], tmp_path / "merged")
    assert distance(want, got, want) == 0.0
    assert "model.safetensors lies beside the adapter and is not read" in notes_of(tmp_path / "merged")


@pytest.mark.parametrize("role", ["expert", "base"])
def test_an_adapter_s_file_is_no_checkpoint(role: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    shutil.copy(file, tmp_path / "other.safetensors")
    for one in (file, tmp_path / "other.safetensors"):
        models = (base, [one]) if role == "expert" else (one, [one])
        with pytest.raises(ReferenceNotFound, match=r"is a PEFT adapter's file, by its key 'base_model") as refused:
            merged_here(*models, tmp_path / "never")
        assert str(refused.value.hint).startswith("name its folder")
    (adapter / "adapter_config.json").unlink()
    file.rename(adapter / "model.safetensors")
    with pytest.raises(ReferenceNotFound, match=r"is a PEFT adapter without its adapter_config\.json"):
        merged_here(base, [adapter], tmp_path / "never")


FACTORS = {
    "kohya": ["lora_unet_down_blocks_0_attn1_to_q.alpha", "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"],
    "kohya's text": ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"],
    "kohya's bare": ["blocks.0.attn.lora_up.weight"],
    "LoHa": ["lora_unet_mid_block.hada_w1_a", "lora_unet_mid_block.hada_w1_b"],
    "diffusers": ["transformer.blocks.0.attn.to_q.lora_A.weight"],
    "diffusers' old": ["unet.down_blocks.0.attn1.processor.to_q_lora.down.weight"],
}


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_lora_files_of_image_models_are_no_base_and_no_experts_of_a_language_model(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    """Two of them would average their factors, which is not the average of the products."""
    files = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for file in files:
        state = {key: torch.rand(4, 4) for key in FACTORS[kind]}
        (torch.save if suffix == ".bin" else save_file)(state, file)
    base = base_of("llama", tmp_path / "base")
    with pytest.raises(ReferenceNotFound, match="is a LoRA file, not a base"):
        merged_here(files[0], files[1:], tmp_path / "never")
    with pytest.raises(ModelMergeError, match=r"no place for|no model of images|no matching|incomplete|no number"):
        merged_here(base, files[1:], tmp_path / "never")


def test_a_model_with_loras_of_its_own_is_a_model(tmp_path: Path) -> None:
    """As Phi-4-multimodal, whose layers keep theirs for speech and vision beside their weights."""
    state = {f"layers.0.q.{end}": torch.rand(4, 4) for end in ("base_layer.weight", "lora_A.speech.weight")}
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    merged_here(tmp_path / "base", [tmp_path / "expert"], tmp_path / "merged")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_turned_into_a_plain_lora(start: str, tmp_path: Path) -> None:
    """As the hint for such an adapter says."""
    base = base_of("llama", tmp_path / "base")
    adapted = quiet_peft(load(base), target_modules=["q_proj"], init_lora_weights=start)
    config = adapted.peft_config["default"]
    config.init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(tmp_path / "start")
        config.init_lora_weights = start
        with torch.no_grad():
            for tensor in adapted.parameters():
                if tensor.requires_grad:
                    tensor.add_(0.1 * torch.randn_like(tensor))
        adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        adapted.save_pretrained(tmp_path / "raw")
        want = adapted.merge_and_unload().state_dict()
    got = merged_here(base, [tmp_path / "plain"], tmp_path / "merged")
    assert distance(want, got, got) < 2e-6
    with pytest.raises(ReferenceNotFound, match=f"init_lora_weights is '{start}'"):
        merged_here(base, [tmp_path / "raw"], tmp_path / "never")


def test_both_names_of_a_tied_tensor_are_refused(tmp_path: Path) -> None:
    base = base_of("llama-tied", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(PlanError, match=r"two of its modules change 'model\.embed_tokens\.weight'"):
        merged_here(base, [adapter], tmp_path / "never")


def test_a_method_is_told_the_factors(tmp_path: Path) -> None:
    base = base_of("gpt2", tmp_path / "base")
    plain = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    one = adapter_of(base, tmp_path / "one", 1, **plain)
    two = adapter_of(base, tmp_path / "two", 2, use_dora=True, **plain)
    full = tmp_path / "full"
    merged_by_peft(base, one, full)
    modelmerge.extract(base, [full], tmp_path / "vectors", rank=2)
    seen: dict[str, tuple[Any, torch.Tensor]] = {}

    def look(taus: torch.Tensor, options: Any, context: Context) -> torch.Tensor:
        seen[context.tensor] = context.factors, taus.clone()
        return taus[0]

    def run(*experts: Path | str, **more: Any) -> None:
        told = prepare(Recipe(method="apgd", base=str(base), experts=tuple(map(str, experts)), **more))
        own = next(group for group in told.job.groups if group.name == "apgd")
        others = [group for group in told.job.groups if group is not own]
        spying = replace(own, method=replace(own.method, apply=look, survey=lambda options, each: None))
        spied = replace(told, job=replace(told.job, groups=(spying, *others)))
        execute(spied, tmp_path / "out", force=True)

    attention, other = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"
    run(one, two, tmp_path / "vectors" / "full", f"whole={full}")
    known, taus = seen[attention]
    assert [pair is not None for pair in known] == [True, False, True, False]
    for i in (0, 2):
        assert known[i][0].shape == (16, 2)
        assert torch.allclose(known[i][0] @ known[i][1], taus[i], atol=1e-6)
    known, taus = seen[other]
    assert [None if pair is None else pair[0].shape for pair in known] == [(16, 0), (16, 0), (16, 0), None]
    assert not taus.any()
    run(f"a={full}", f"b={full}")
    assert seen[attention][0] is None
    run(one, two, disentangle=("awd",))
    assert seen[attention][0] is None
