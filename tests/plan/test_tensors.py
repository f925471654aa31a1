"""Plans: what happens to each tensor, and one error for all that the models disagree on."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import load_file, save
from torch import Tensor

from modelmerge.checkpoint import digest
from modelmerge.checkpoint.components import INDEX
from modelmerge.checkpoint.header import DTYPE_BITS, TensorInfo
from modelmerge.checkpoint.reader import Checkpoint, open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.errors import PlanError, UsageError
from modelmerge.plan.linear import is_linear
from modelmerge.plan.overrides import Methods
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import DTYPES, Plan, make_plan
from modelmerge.verbs.merge import execute
from modelmerge.verbs.prepare import prepare
from tests.support.checkpoints import SHAPES, State, base_state, expert_state, read, write

Models = list[State]  # the base, then the experts


def states(experts: int = 2, dtype: torch.dtype = torch.float32) -> Models:
    """A base and experts of it, to be changed before they are written."""
    base = base_state(dtype)
    return [base, *(expert_state(base, seed) for seed in range(experts))]


def opened(root: Path, models: Models) -> list[Checkpoint]:
    names = ["base", *(f"expert_{i}" for i in range(len(models) - 1))]
    return [open_checkpoint(parse(str(write(root / n, s)))) for n, s in zip(names, models, strict=True)]


def plan(root: Path, models: Models, *, matrices: bool = False, rest: str = "base", **options: Any) -> Plan:
    base, *experts = opened(root, models)
    methods = Methods("kron" if matrices else "average", {}, [], rest, [expert.name for expert in experts])
    return make_plan(base, experts, methods=methods, **options)


def actions(made: Plan) -> dict[str, str]:
    return {name: tensor.action for name, tensor in made.tensors.items()}


# --- which tensors are merged ---


def test_floating_tensors_that_all_share_are_merged(tmp_path: Path) -> None:
    made = plan(tmp_path, states())
    assert actions(made) == {**dict.fromkeys((*SHAPES, "empty"), "merge"), "position_ids": "copy"}
    assert made.tensors["position_ids"].reason == "I64, not floating"
    assert not made.tensors["position_ids"].checked
    assert made.tensors["logit_scale"].checked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_plain_floating_dtype_is_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    assert plan(tmp_path, states(dtype=dtype)).tensors["logit_scale"].action == "merge"


def test_base_and_experts_may_differ_in_floating_dtype(tmp_path: Path) -> None:
    models = states()
    models[1] = {n: t.half() if t.is_floating_point() else t for n, t in models[1].items()}
    made = plan(tmp_path, models)
    assert made.tensors["logit_scale"].action == "merge"
    assert made.tensors["logit_scale"].out_dtype == "F32"


def test_what_only_the_base_has_is_copied(tmp_path: Path) -> None:
    models = states()
    for expert in models[1:]:
        del expert["logit_scale"]
    made = plan(tmp_path, models)
    assert (made.tensors["logit_scale"].action, made.tensors["logit_scale"].reason) == ("copy", "only in the base")
    assert made.tensors["logit_scale"].checked


def test_what_only_experts_have_is_left_out_and_named(tmp_path: Path) -> None:
    models = states(3)
    models[1]["head.weight"] = torch.zeros(4, 4)
    models[3]["head.weight"] = torch.zeros(5, 4)
    models[2]["adapter.weight"] = torch.zeros(2)
    made = plan(tmp_path, models)
    assert made.expert_only == {"adapter.weight": ("expert_1",), "head.weight": ("expert_0", "expert_2")}
    assert made.tensors.keys() == models[0].keys()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_what_is_not_floating_is_copied_whatever_the_experts_hold(dtype: torch.dtype, tmp_path: Path) -> None:
    models = states()
    models[0]["state"] = torch.ones(4).to(dtype)
    models[1]["state"] = torch.zeros(7).to(dtype)
    assert plan(tmp_path, models).tensors["state"].action == "copy"


@pytest.mark.parametrize("buffer", ["bn.running_mean", "bn.running_var", "rotary.inv_freq", "running_mean"])
def test_floating_buffers_are_copied(buffer: str, tmp_path: Path) -> None:
    models = states()
    for model in models:
        model[buffer] = torch.rand(4)
    made = plan(tmp_path, models)
    assert (made.tensors[buffer].action, made.tensors[buffer].reason) == ("copy", "a buffer, not a weight")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("holders", [(0,), (0, 1), (0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("module", ["h.0.attn", "transformer.h.1.attn.attention", "gpt_neox.layers.0.attention"])
def test_masks_that_some_models_store_are_copied(
    dtype: torch.dtype, holders: tuple[int, ...], module: str, tmp_path: Path
) -> None:
    models, sizes = states(), (8, 4, 8)
    for i in holders:
        models[i][f"{module}.bias"] = torch.ones(sizes[i], sizes[i]).tril().to(dtype)[None, None]
        models[i][f"{module}.masked_bias"] = torch.tensor(-1e4).to(dtype)
    made = plan(tmp_path, models)
    for name in (f"{module}.bias", f"{module}.masked_bias"):
        if 0 in holders:
            assert made.tensors[name].action == "copy"
        else:
            assert made.expert_only[name] == ("expert_0",)


def test_a_bias_of_attention_is_no_mask(tmp_path: Path) -> None:
    models = states()
    for model in models:
        model["h.0.attn.bias"] = torch.rand(8)  # a vector
        model["h.1.attn.bias"] = torch.rand(1, 4, 8, 8)  # of positions, by heads
    made = plan(tmp_path, models)
    assert [made.tensors[f"h.{i}.attn.bias"].action for i in range(2)] == ["merge", "merge"]
    del models[1]["h.0.attn.bias"]
    with pytest.raises(PlanError, match=r"'h\.0\.attn\.bias': in expert_1, but missing in expert_0"):
        plan(tmp_path, models)


def test_nothing_in_common_is_refused_with_both_names(tmp_path: Path) -> None:
    models = states(1)
    models[1] = {f"{name}.vision": tensor for name, tensor in models[1].items()}
    with pytest.raises(PlanError, match=r"no tensor of the base is in expert_0: .*\.vision'"):
        plan(tmp_path, models)


def test_nothing_left_to_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing is left to merge") as caught:
        plan(tmp_path, states(), exclude=["*"])
    assert "excluded" in caught.value.message


# --- disagreements ---


def at_odds() -> Models:
    """Three experts that disagree with the base and one another in every way there is."""
    models = states(3)
    base, first, second, third = models
    first["model.embed_tokens.weight"] = torch.zeros(25, 16)
    third["model.embed_tokens.weight"] = torch.zeros(26, 16)
    second["model.layers.0.norm.weight"] = torch.zeros(16, 1)
    del first["logit_scale"], third["logit_scale"]
    second["model.layers.0.mlp.up_proj.bias"] = torch.zeros(40, dtype=torch.int32)
    third["model.layers.1.mlp.down_proj.weight"] = torch.zeros(16, 40, dtype=torch.int16)
    base["empty"] = torch.zeros(1)
    return models


DISAGREEMENTS = (
    "'model.embed_tokens.weight': shape [24, 16] in the base, but [25, 16] in expert_0, [26, 16] in expert_2",
    "'model.layers.0.norm.weight': shape [16] in the base, but [16, 1] in expert_1",
    "'logit_scale': in expert_1, but missing in expert_0, expert_2",
    "'model.layers.0.mlp.up_proj.bias': dtype I32 in expert_1",
    "'model.layers.1.mlp.down_proj.weight': dtype I16 in expert_2",
    "'empty': shape [1] in the base, but [0, 16] in expert_0, [0, 16] in expert_1, [0, 16] in expert_2",
)


def test_all_disagreements_are_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan(tmp_path, at_odds())
    assert caught.value.message.startswith("the models disagree on 6 tensors:\n")
    for told in DISAGREEMENTS:
        assert told in caught.value.message
    assert len(caught.value.message.splitlines()) == 1 + len(DISAGREEMENTS)
    assert "exclude" in (caught.value.hint or "")


def test_disagreements_show_before_any_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NaN for every weight, and no file opened to read tensors from."""
    models = [{n: torch.full_like(t, torch.nan) if t.dtype.is_floating_point and t.element_size() > 1 else t
               for n, t in model.items()} for model in at_odds()]  # fmt: skip
    opened(tmp_path, models)
    monkeypatch.setattr(digest.FileDigest, "__init__", lambda *args: pytest.fail("a weight file was opened"))
    recipe = Recipe(
        method="task-arithmetic",
        base=str(tmp_path / "base"),
        experts=tuple(str(tmp_path / f"expert_{i}") for i in range(3)),
    )
    with pytest.raises(PlanError, match="disagree on 6 tensors"):
        prepare(recipe, device="cpu")


def test_excluding_resolves_disagreements(tmp_path: Path) -> None:
    excluded = ["*embed*", "*.norm.*", "logit_scale", "*.bias", "*down_proj*", "empty"]
    made = plan(tmp_path, at_odds(), exclude=excluded)
    assert {n for n, a in actions(made).items() if a == "merge"} == {
        "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    }  # fmt: skip
    assert made.tensors["logit_scale"].reason == "excluded"
    assert not made.tensors["logit_scale"].checked
    with pytest.raises(PlanError, match="disagree on 1 tensor:"):
        plan(tmp_path, at_odds(), exclude=excluded[1:])


def test_what_is_not_included_may_disagree(tmp_path: Path) -> None:
    made = plan(tmp_path, at_odds(), include=["*.q_proj.*"])
    assert [n for n, a in actions(made).items() if a == "merge"] == ["model.layers.0.q_proj.weight"]
    assert made.tensors["logit_scale"].reason == "not included"
    assert made.tensors["logit_scale"].checked


def test_exclude_wins_over_include(tmp_path: Path) -> None:
    made = plan(tmp_path, states(), include=["model.layers.*"], exclude=["*.bias"])
    assert made.tensors["model.layers.0.mlp.up_proj.bias"].reason == "excluded"
    assert made.tensors["model.layers.0.mlp.up_proj.weight"].action == "merge"


@pytest.mark.parametrize("flag", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(flag: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{flag} '\*\.qproj\.\*' matches no tensor") as caught:
        plan(tmp_path, states(), **{flag: ["*.q_proj.*", "*.qproj.*"]})
    assert caught.value.hint == "did you mean '*.q_proj.*'?"


def test_a_glob_minds_upper_and_lower_case(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matches no tensor"):
        plan(tmp_path, states(), exclude=["LOGIT_SCALE"])


# --- indices that disagree with their shards ---


def lose(directory: Path, name: str, *, listed: str | None = None) -> Path:
    """Take a tensor out of its shard, and not out of the index."""
    index = directory / INDEX
    content = json.loads(index.read_bytes())
    shard = directory / content["weight_map"].pop(name)
    state = {key: tensor for key, tensor in load_file(shard).items() if key != name}
    shard.write_bytes(save(state, metadata={"format": "pt"}))
    content["weight_map"][listed or name] = shard.name
    index.write_text(json.dumps(content))
    return directory


def made_of(root: Path, **options: Any) -> Plan:
    base, *experts = (open_checkpoint(parse(str(root / name))) for name in ("base", "expert_0"))
    return make_plan(base, experts, **options)


@pytest.mark.parametrize("listed", ["model.layers.0.q_proj.weight", "layers.0.q_proj.weight"])
def test_what_an_index_lists_and_no_shard_holds_does_not_stay_the_base_s_in_silence(
    listed: str, tmp_path: Path
) -> None:
    name = "model.layers.0.q_proj.weight"
    for model, state in zip(("base", "expert_0"), states(1), strict=True):
        write(tmp_path / model, state, shards=2)
    lose(tmp_path / "expert_0", name, listed=listed)
    with pytest.raises(PlanError, match=rf"'{name}': missing in expert_0, whose index lists it"):
        made_of(tmp_path)
    assert made_of(tmp_path, exclude=["*q_proj*"]).tensors[name].action == "copy"


def test_what_the_base_s_index_lists_and_no_shard_holds_is_not_lost_in_silence(tmp_path: Path) -> None:
    for model, state in zip(("base", "expert_0"), states(1), strict=True):
        write(tmp_path / model, state, shards=2)
    lose(tmp_path / "base", "logit_scale")
    with pytest.raises(PlanError, match="'logit_scale': missing in the base, whose index lists it"):
        made_of(tmp_path)
    assert "logit_scale" in made_of(tmp_path, exclude=["logit_scale"]).expert_only


def test_a_tied_head_that_only_the_index_has_is_read_from_its_table(tmp_path: Path) -> None:
    for model, state in zip(("base", "expert_0"), states(1), strict=True):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        write(tmp_path / model, state, shards=2)
    lose(tmp_path / "expert_0", "lm_head.weight")
    made = made_of(tmp_path)
    assert made.tensors["lm_head.weight"].action == "merge"
    assert made.experts[0].tensors["lm_head.weight"] == made.experts[0].tensors["model.embed_tokens.weight"]


# --- quantised models ---


@pytest.mark.parametrize("culprit", ["base", "expert_1"])
def test_a_quantised_model_is_refused_by_name(culprit: str, tmp_path: Path) -> None:
    opened(tmp_path, states())
    config = {"model_type": "tiny", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / culprit / "config.json").write_text(json.dumps(config))
    base, *experts = (open_checkpoint(parse(str(tmp_path / n))) for n in ("base", "expert_0", "expert_1"))
    with pytest.raises(PlanError, match="quantised") as caught:
        make_plan(base, experts)
    assert str(tmp_path / culprit) in caught.value.message
    assert "gptq" in caught.value.message
    assert "unquantised" in (caught.value.hint or "")


@pytest.mark.parametrize("config", ["{}", '{"quantization_config": null}', "[]"])
def test_a_config_without_quantisation_is_no_obstacle(config: str, tmp_path: Path) -> None:
    opened(tmp_path, states(1))
    (tmp_path / "base" / "config.json").write_text(config)
    base, expert = (open_checkpoint(parse(str(tmp_path / n))) for n in ("base", "expert_0"))
    assert make_plan(base, [expert]).tensors["logit_scale"].action == "merge"


@pytest.mark.parametrize("narrow", [("base", "expert_0", "expert_1"), ("base",), ("expert_1",)], ids=str)
def test_8_bit_weights_are_refused_by_the_models_names(narrow: tuple[str, ...], tmp_path: Path) -> None:
    models = states()
    for name, model in zip(("base", "expert_0", "expert_1"), models, strict=True):
        dtype = torch.float8_e5m2 if name in narrow else torch.bfloat16
        model |= {f"layers.{i}.weight": torch.ones(4, 4).to(dtype) for i in range(3)}
    with pytest.raises(PlanError) as caught:
        plan(tmp_path, models)
    assert caught.value.message == "; ".join(
        f"{tmp_path / name}: its weights are quantised (F8_E5M2: 'layers.0.weight' and 2 more)" for name in narrow
    )
    assert "use the 16-bit weights, or convert these to 16 bits" in (caught.value.hint or "")
    assert plan(tmp_path, models, exclude=["layers.*"]).tensors["layers.1.weight"].action == "copy"


@pytest.mark.parametrize("sign", ["scaled_fp8", "blocks.0.q.scale_weight"])
def test_comfyui_s_fp8_is_refused_by_its_kind(sign: str, tmp_path: Path) -> None:
    models = states(1)
    models[1] |= {"blocks.0.q.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), sign: torch.ones(())}
    with pytest.raises(PlanError, match=rf"quantised \(fp8, as ComfyUI stores it, by its tensor '{sign}'\)"):
        plan(tmp_path, models)


def test_an_8_bit_tensor_of_the_base_alone_is_copied(tmp_path: Path) -> None:
    models = states()
    models[0]["scale"] = torch.ones(4).to(torch.float8_e4m3fn)
    assert plan(tmp_path, models).tensors["scale"].action == "copy"


# --- methods for the weights of linear layers ---

LINEAR = {"model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"}
NOT_LINEAR = (
    "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight", "shared.weight",
    "vision_model.embeddings.position_embedding.weight", "encoder.relative_attention_bias.weight", "Embed.weight",
    "bert.token_type.weight",
)  # fmt: skip


def test_only_weights_of_linear_layers_are_merged_as_matrices(tmp_path: Path) -> None:
    models = states()
    for model in models:
        model |= {name: torch.rand(6, 4) for name in NOT_LINEAR}
        model |= {"conv.weight": torch.rand(4, 4, 2), "wide.weight": torch.rand(0, 4)}
    made = plan(tmp_path, models, matrices=True)
    assert {name for name, action in actions(made).items() if action == "merge"} == LINEAR
    assert made.tensors["lm_head.weight"].reason == "not the weight of a linear layer"
    assert set(actions(made).values()) == {"merge", "copy"}


@pytest.mark.parametrize(
    ("names", "linear"),
    [
        (("unet/time_embedding.linear_1", "unet/add_embedding.linear_2", "model.diffusion_model.time_embed.0",
          "model.diffusion_model.label_emb.0.2", "transformer/x_embedder", "transformer/context_embedder",
          "transformer/time_text_embed.guidance_embedder.linear_1", "transformer/norm1.linear",
          "model.diffusion_model.time_in.in_layer", "model.diffusion_model.vector_in.out_layer",
          "model.diffusion_model.guidance_in.in_layer", "model.diffusion_model.img_in", "model.diffusion_model.txt_in",
          "model.diffusion_model.t_embedder.mlp.0", "model.diffusion_model.y_embedder.mlp.2",
          "model.diffusion_model.double_blocks.0.img_mod.lin", "joint_blocks.0.x_block.adaLN_modulation.1",
          "text_embedding.0", "time_embedding.2", "time_projection.1", "condition_embedder.time_embedder.linear_1",
          "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1",
          "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc", "patch_embed.proj"), True),
        (("model.diffusion_model.label_emb", "unet/class_embedding", "y_embedder.embedding_table",
          "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding",
          "conditioner.embedders.1.model.token_embedding", "text_encoder_2/shared",
          "text_encoder_2/encoder.embed_tokens",
          "text_encoder_2/encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
          "decoder.embed_tokens.0", "model.decoder.embed_positions"), False),
    ],
    ids=["linear", "tables"],
)  # fmt: skip
def test_what_embeds_times_and_texts_is_linear_and_what_looks_up_is_not(names: tuple[str, ...], linear: bool) -> None:
    infos = [TensorInfo(f"{name}.weight", "F32", (8, 4), Path("x"), 0, 128) for name in names]
    assert [info.name for info in infos if is_linear(info, []) != linear] == []
    tables = (
        "positional_embedding",
        "attn.relative_position_bias_table",
        "transformer/scale_shift_table",
        "pos_embedder.pos_emb_h",
    )
    assert not any(is_linear(TensorInfo(name, "F32", (8, 4), Path("x"), 0, 128), []) for name in tables)


def test_include_overrides_names_but_not_shapes(tmp_path: Path) -> None:
    made = plan(tmp_path, states(), matrices=True, include=["*embed*", "*.norm.*", "logit_scale"])
    assert [n for n, a in actions(made).items() if a == "merge"] == ["model.embed_tokens.weight"]
    assert made.tensors["model.layers.0.q_proj.weight"].reason == "not included"
    assert made.tensors["model.layers.0.norm.weight"].action == "copy"


def test_the_rest_goes_to_the_method_for_the_rest(tmp_path: Path) -> None:
    made = plan(tmp_path, states(), matrices=True, rest="average", exclude=["*.bias"])
    by = {method: {t.name for t in made.tensors.values() if t.method == method} for method in ("kron", "average")}
    assert by["kron"] == LINEAR
    assert by["average"] == {"model.embed_tokens.weight", "model.layers.0.norm.weight", "logit_scale", "empty"}
    assert made.tensors["logit_scale"].reason.endswith(": average")
    assert made.tensors["position_ids"].action == "copy"
    assert [t.name for t in made.select("merge")] == [
        n for shard in made.layout.shards for n in shard.tensors if made.tensors[n].action == "merge"
    ]


# --- where the output's bytes lie ---


def test_a_dtype_is_for_floating_tensors_only(tmp_path: Path) -> None:
    models = states()
    for expert in models[1:]:
        del expert["logit_scale"]
    made = plan(tmp_path, models, dtype=DTYPES["bfloat16"], exclude=["*.bias"])
    assert {name: tensor.out_dtype for name, tensor in made.tensors.items()} == {
        **dict.fromkeys((*SHAPES, "empty"), "BF16"), "position_ids": "I64",
    }  # fmt: skip
    assert {tensor.dtype for tensor in made.tensors.values()} == {"F32", "I64"}
    assert made.bytes_written == sum(shard.file_bytes for shard in made.layout.shards)
    data = sum(t.numel() * 2 for n, t in models[0].items() if n != "position_ids") + 24 * 8
    assert made.bytes_written - sum(len(shard.header) for shard in made.layout.shards) == data


def test_without_a_dtype_the_base_decides_tensor_by_tensor(tmp_path: Path) -> None:
    models = states()
    models[0]["logit_scale"] = models[0]["logit_scale"].double()
    models[0]["model.layers.0.norm.weight"] = models[0]["model.layers.0.norm.weight"].half()
    made = plan(tmp_path, models)
    kinds = {name: made.tensors[name].out_dtype for name in ("logit_scale", "model.layers.0.norm.weight", "empty")}
    assert kinds == {"logit_scale": "F64", "model.layers.0.norm.weight": "F16", "empty": "F32"}


@pytest.mark.parametrize("limit", [1, 1_000, 1_600, 2_700, 5_000, 5_000_000_000])
def test_shards_are_those_of_huggingface_hub(limit: int, tmp_path: Path) -> None:
    made = plan(tmp_path, states(), max_shard_size=limit)
    sizes = {t.name: t.numel * DTYPE_BITS[t.out_dtype] // 8 for t in made.tensors.values()}
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda n: n, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    assert {s.filename: set(s.tensors) for s in made.layout.shards} == {
        file: set(names) for file, names in split.filename_to_tensors.items()
    }
    count = len(made.layout.shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert [s.filename for s in made.layout.shards] == (names if count > 1 else ["model.safetensors"])
    assert list(made.layout.indices) == ([INDEX] if count > 1 else [])
    for content in made.layout.indices.values():
        index = json.loads(content)
        assert index["metadata"]["total_size"] == sum(sizes.values())
        assert index["weight_map"] == split.tensor_to_filename


MIXED: dict[str, Tensor] = {
    "flag": torch.tensor([True, False, True]),
    "half": torch.rand(5).half(),
    "byte": torch.zeros(1, dtype=torch.uint8),
    "double": torch.rand(3).double(),
    "brain": torch.rand(3).bfloat16(),
    "single": torch.rand(1),
    "scalar": torch.tensor(1.0, dtype=torch.float64),
    "long": torch.arange(3),
    "short": torch.arange(5, dtype=torch.int16),
    "int": torch.arange(3, dtype=torch.int32),
    "empty": torch.zeros(0, dtype=torch.float64),
    "complex": torch.rand(1).to(torch.complex64),
}


@pytest.mark.parametrize("limit", [20, 40, 5_000_000_000])
@pytest.mark.parametrize("name", ["n", "näme", 'name with "quotes" and \\'])
@pytest.mark.parametrize("dtype", [None, "F16"])
def test_every_tensor_starts_at_a_multiple_of_its_item_size(
    limit: int, name: str, dtype: str | None, tmp_path: Path
) -> None:
    """Though the base's shards hold dtypes in any order."""
    state = {f"{name}.{key}": tensor for key, tensor in MIXED.items()}
    base, expert = (open_checkpoint(parse(str(write(tmp_path / n, state, shards=4)))) for n in ("base", "expert"))
    kinds = [DTYPE_BITS[info.dtype] for info in base.tensors.values()]
    assert kinds != sorted(kinds, reverse=True)
    made = make_plan(base, [expert], dtype=dtype, max_shard_size=limit)
    for shard in made.layout.shards:
        (length,) = struct.unpack("<Q", shard.header[:8])
        assert 8 + length == len(shard.header)
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        assert header.keys() == shard.tensors.keys()
        position = 0
        for tensor, start in shard.tensors.items():
            info = made.tensors[tensor]
            assert start % (DTYPE_BITS[info.out_dtype] // 8) == 0, tensor
            assert header[tensor]["data_offsets"][0] == position == start - len(shard.header)
            assert header[tensor]["dtype"] == info.out_dtype
            position = header[tensor]["data_offsets"][1]
        assert shard.file_bytes == len(shard.header) + position


def test_the_layout_is_readable_by_safetensors(tmp_path: Path) -> None:
    """Mixed dtypes in several shards, written and read back."""
    models = [dict(MIXED), dict(MIXED)]
    opened(tmp_path, models)
    recipe = Recipe(
        method="average", base=str(tmp_path / "base"), experts=(str(tmp_path / "expert_0"),), max_shard_size="40"
    )
    execute(prepare(recipe, device="cpu"), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_totals_are_those_of_the_files(tmp_path: Path) -> None:
    models = states(3)
    made = plan(tmp_path, models, max_shard_size=2_000)
    embedding = made.tensors["model.embed_tokens.weight"]
    assert embedding.numel == 24 * 16
    assert made.stored_bytes(embedding, experts=False) == 24 * 16 * 4
    assert made.stored_bytes(embedding, experts=True) == 4 * 24 * 16 * 4
    selected = [t for action in ("merge", "rest", "copy") for t in made.select(action)]
    assert {t.name for t in selected} == models[0].keys()
    assert len(selected) == len(models[0])
    assert sum(made.stored_bytes(t, experts=False) for t in selected) == sum(t.nbytes for t in models[0].values())


def test_stored_bytes_are_counted_in_each_models_own_dtype(tmp_path: Path) -> None:
    models = states(1)
    models[1] = {n: t.half() if t.is_floating_point() else t for n, t in models[1].items()}
    made = plan(tmp_path, models)
    assert made.stored_bytes(made.tensors["model.layers.0.norm.weight"], experts=True) == 16 * 4 + 16 * 2


def test_models_may_be_cut_into_shards_differently(tmp_path: Path) -> None:
    models = states()
    bases = open_checkpoint(parse(str(write(tmp_path / "base", models[0], shards=4))))
    experts = [open_checkpoint(parse(str(write(tmp_path / f"e{i}", m, shards=i)))) for i, m in enumerate(models[1:], 1)]
    assert (tmp_path / "base" / INDEX).exists()
    assert set(actions(make_plan(bases, experts)).values()) == {"merge", "copy"}


def test_a_lone_file_is_planned_like_a_directory(tmp_path: Path) -> None:
    models: Sequence[State] = states(1)
    for name, state in zip(("base", "expert"), models, strict=True):
        (tmp_path / f"{name}.safetensors").write_bytes(save(state))
    base, expert = (open_checkpoint(parse(str(tmp_path / f"{n}.safetensors"))) for n in ("base", "expert"))
    assert make_plan(base, [expert]).tensors["logit_scale"].action == "merge"
