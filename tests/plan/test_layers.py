"""Layers from several places, on small tensors; real classes are in `tests/verbs/test_layers.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint import layer_config
from modelmerge.cli import main
from modelmerge.errors import ModelMergeError, PlanError, RecipeError, UsageError
from modelmerge.methods import registry
from modelmerge.plan.modules import is_after
from tests.support.checkpoints import State, read, write
from tests.support.methods import constant_scale

LAYERS = 4
ENDS = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,), "lm_head.weight": (6, 4)}
INSIDE = {"self_attn.o_proj.weight": (4, 4), "mlp.up_proj.weight": (8, 4), "input_layernorm.weight": (4,)}
CONFIG = {"model_type": "tiny", "num_hidden_layers": LAYERS}


def state(seed: int, *, count: int = LAYERS, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = ENDS | {f"model.layers.{i}.{end}": shape for i in range(count) for end, shape in INSIDE.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: State, **config: Any) -> Path:
    write(folder, tensors, config=False)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    return {name: save(tmp_path / name, state(i)) for i, name in enumerate(("base", "math", "code"))}


def layer(tensors: State, number: int) -> State:
    front = f"model.layers.{number}."
    return {name.removeprefix(front): tensor for name, tensor in tensors.items() if name.startswith(front)}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k].view(torch.uint8), other[k].view(torch.uint8))
                                              for k in one)  # fmt: skip


def merge(family: dict[str, Path], out: Path, method: str, *runs: str, **options: Any) -> State:
    base, *experts = family.values()
    modelmerge.merge(base, experts, out, method=method, layers=runs, **options)
    return read(out)


def test_layers_of_one_model_are_its_own_bits(tmp_path: Path, family: dict[str, Path]) -> None:
    """Whatever the method: to the sign of a zero, and in the dtype that the model stores."""
    math = state(1, dtype=torch.bfloat16)
    math["model.layers.2.mlp.up_proj.weight"][0, 0] = -0.0
    save(family["math"], math)
    base, code = read(family["base"]), read(family["code"])
    for method in ("passthrough", "ties"):
        got = merge(family, tmp_path / method, method, "math:0-3", "code:1-3", "base:3-4")
        made = [layer(got, i) for i in range(6)]
        origins = [*(layer(math, i) for i in range(3)), layer(code, 1), layer(code, 2), layer(base, 3)]
        assert all(map(same, made, origins))
        assert same({"_": got["model.embed_tokens.weight"]}, {"_": math["model.embed_tokens.weight"]})
        for name in ("model.norm.weight", "lm_head.weight"):  # as the last run
            assert torch.equal(got[name], base[name])
        assert len(got) == 6 * len(INSIDE) + len(ENDS)
    assert json.loads((tmp_path / "ties" / "config.json").read_text())["num_hidden_layers"] == 6


def test_a_run_is_merged_from_its_models_alone(tmp_path: Path, family: dict[str, Path]) -> None:
    math, code, base = (read(family[name]) for name in ("math", "code", "base"))
    got = merge(family, tmp_path / "out", "average", "math:0-2 code:2-4", "1-2", weights={"math": 3.0})
    for i in range(2):
        one, other = layer(math, i), layer(code, i + 2)
        for end, tensor in layer(got, i).items():
            assert torch.allclose(tensor, 0.75 * one[end] + 0.25 * other[end], atol=1e-6)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.allclose(got[name], 0.75 * math[name] + 0.25 * code[name], atol=1e-6)
    got = merge(family, tmp_path / "ta", "task-arithmetic", "base:1-2 code:3-4", scale=0.5)
    seen = layer(base, 1)
    for end, tensor in layer(got, 0).items():
        assert torch.allclose(tensor, seen[end] + 0.5 * (layer(code, 3)[end] - seen[end]), atol=1e-6)


def test_the_weights_of_a_run_are_those_of_its_models(tmp_path: Path, family: dict[str, Path]) -> None:
    math, code = read(family["math"]), read(family["code"])
    weights = {"math": 1.0, "code": -1.0}  # of all there would be no mean
    got = merge(family, tmp_path / "out", "average", "base:0-2 math:0-2", "base:2-4 code:2-4", weights=weights)
    for i, model in enumerate((math, math, code, code)):
        assert all(torch.allclose(tensor, layer(model, i)[end]) for end, tensor in layer(got, i).items())
    with pytest.raises(UsageError, match="the weights add up to zero"):
        merge(family, tmp_path / "no", "average", "math:0-2 code:0-2", weights=weights)


def test_a_run_may_have_a_base_of_its_own(tmp_path: Path, family: dict[str, Path]) -> None:
    """The base of the whole is an expert there, if it is named among the experts too."""
    experts = {"math": family["math"], "code": family["code"], "own": family["base"]}
    runs = ["base=math:1-3 code:2-4 own:0-2", "base:1-2 math:1-2", "base=code:0-1"]
    modelmerge.merge(family["base"], experts, tmp_path / "out", method="task-arithmetic", scale=0.5, layers=runs)
    math, code, base = (read(family[name]) for name in ("math", "code", "base"))
    got = read(tmp_path / "out")
    for i in range(2):
        seen, one, other = layer(math, i + 1), layer(code, i + 2), layer(base, i)
        for end, tensor in layer(got, i).items():
            wanted = seen[end] + 0.5 * (one[end] - seen[end] + other[end] - seen[end])
            assert torch.allclose(tensor, wanted, atol=1e-6)
    assert same(layer(got, 3), layer(code, 0))
    assert torch.equal(got["lm_head.weight"], code["lm_head.weight"])
    modelmerge.extract(family["base"], [family["math"]], tmp_path / "taus")
    with pytest.raises(UsageError, match="its base must be a model, not what changes in one"):
        merge({"base": family["base"], "math": tmp_path / "taus" / "math", "code": family["code"]}, tmp_path / "no",
              "ties", "base=math:0-2 code:0-2")  # fmt: skip


@pytest.mark.parametrize("method", ["average", "slerp", "ties", "tsv-m", "karcher"])
def test_all_layers_of_all_models_are_what_they_are_without_runs(
    method: str, tmp_path: Path, family: dict[str, Path]
) -> None:
    scale = constant_scale(method)
    got = merge(family, tmp_path / "runs", method, "0-2", "base:2-4 math:2-4 code:2-4", **scale)
    assert same(got, merge(family, tmp_path / "plain", method, **scale))


def test_a_share_of_a_task_vector_counts_where_the_same_models_are_merged(
    tmp_path: Path, family: dict[str, Path]
) -> None:
    got = merge(family, tmp_path / "out", "ties", "base:0-2 math:0-2", "code:0-1", "base:2-4 math:2-4",
                density=0.3, scale=0.7)  # fmt: skip
    pair = {name: family[name] for name in ("base", "math")}
    alone = merge(pair, tmp_path / "alone", "ties", density=0.3, scale=0.7)
    assert all(same(layer(got, i + (i > 1)), layer(alone, i)) for i in range(LAYERS))


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("model.norm.weight", True), ("lm_head.weight", True), ("lm_head.dense.weight", True),
        ("bert.pooler.dense.bias", True), ("pre_classifier.weight", True), ("vocab_transform.weight", True),
        ("vocab_projector.bias", True), ("cls.predictions.transform.dense.weight", True),
        ("model.embedding_norm.weight", True), ("head.dense.weight", True), ("decoder.bias", True),
        ("generator_predictions.dense.weight", True), ("embeddings.norm.weight", False),
        ("decoder.embed_tokens.weight", False),
        ("model.embed_tokens.weight", False), ("embeddings.LayerNorm.weight", False), ("embeddings.cls_token", False),
        ("multi_modal_projector.norm.weight", False), ("vision_tower.vision_model.post_layernorm.bias", False),
        ("model.visual.merger.norm.weight", False),
    ],
)  # fmt: skip
def test_what_comes_after_the_layers_goes_with_the_last_run(name: str, after: bool) -> None:
    """Heads of several weights whole; but towers and projectors, which come as they are, with the first."""
    assert is_after(name, "model.layers") == after


def test_the_end_of_a_tower_goes_with_the_last_run_of_its_own_layers() -> None:
    assert is_after("vision_model.post_layernorm.weight", "vision_model.encoder.layers")


def test_overrides_go_by_the_layers_of_the_output(tmp_path: Path, family: dict[str, Path]) -> None:
    """Layers that are repeated add nothing at first; values rise over the output's layers."""
    at = ["*.[45].*o_proj*: factor=0", "*up_proj*: factor=0,1"]
    got = merge({"base": family["base"]}, tmp_path / "out", "passthrough", "base:0-4", "base:2-4", at=at)
    base = read(family["base"])
    for i, origin in enumerate((0, 1, 2, 3, 2, 3)):
        want = layer(base, origin)
        want["self_attn.o_proj.weight"] = want["self_attn.o_proj.weight"] * (i < 4)
        want["mlp.up_proj.weight"] = want["mlp.up_proj.weight"] * i / 5
        assert all(torch.allclose(tensor, want[end], atol=1e-6) for end, tensor in layer(got, i).items())
    with pytest.raises(UsageError, match="matches no tensor"):
        merge(family, tmp_path / "no", "passthrough", "math:0-2", at=["*.layers.3.*: factor=0"])


def test_config_says_of_each_layer_what_its_model_said(tmp_path: Path, family: dict[str, Path]) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    save(family["base"], state(0), layer_types=kinds, mlp_only_layers=[3], eos_token_id=[1, 2, 3, 4])
    save(family["math"], state(1), layer_types=kinds[::-1], mlp_only_layers=[0], eos_token_id=[1, 2, 3, 4])
    save(family["code"], state(2, count=6), num_hidden_layers=6, layer_types=kinds[:1] * 6, mlp_only_layers=[])
    merge(family, tmp_path / "out", "passthrough", "base:2-4", "math:0-2", "code:4-6")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [*kinds[2:], *kinds[::-1][:2], *kinds[:1] * 2]
    assert config["mlp_only_layers"] == [1, 2]
    assert config["eos_token_id"] == [1, 2, 3, 4]


def test_a_layer_of_an_expert_that_has_more_may_be_of_another_kind(tmp_path: Path, family: dict[str, Path]) -> None:
    """It gets nothing of the base's layers, whose names are a pattern for it."""
    tall = state(1, count=6)
    tall["model.layers.5.mlp.dense.weight"] = tall.pop("model.layers.5.mlp.up_proj.weight")[:3]
    save(family["math"], tall, num_hidden_layers=6)
    got = merge(family, tmp_path / "out", "passthrough", "base:0-2", "math:4-6")
    assert same(layer(got, 2), layer(tall, 4))
    assert same(layer(got, 3), layer(tall, 5))


def test_kinds_of_layers_that_follow_from_their_numbers_are_spelled_out(
    tmp_path: Path, family: dict[str, Path]
) -> None:
    for i, folder in enumerate(family.values()):
        save(folder, state(i), model_type="gemma2")
    base, *experts = family.values()
    modelmerge.merge(base, experts, tmp_path / "out", method="passthrough", layers=["math:0-3", "base:2-4"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]


def stacked_config(numbers: list[int], **entries: Any) -> dict[str, Any]:
    """What the config of a model of four layers says otherwise of a stack of these."""
    config = CONFIG | entries
    values, doubtful = layer_config.stacked_values(config, LAYERS, [(config, LAYERS, number) for number in numbers])
    assert not doubtful
    said = {key: value for (key,), value in values.items() if value != config.get(key)}
    assert said.pop("num_hidden_layers", config["num_hidden_layers"]) in (len(numbers), None)
    return said


@pytest.mark.parametrize(
    ("entries", "numbers", "said"),
    [
        ({"first_k_dense_replace": 1}, [0, 0, 1, 2, 3], {"first_k_dense_replace": 2}),
        ({"first_k_dense_replace": 2}, [2, 3], {"first_k_dense_replace": 0}),
        ({"first_k_dense_replace": 1, "mlp_layer_types": list("dsss")}, [1, 0, 1], {"mlp_layer_types": list("sds")}),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [0, 1, 2, 1, 2, 3], {"moe_layer_end_index": 4}),
        ({"num_kv_shared_layers": 2}, [0, 1, 3], {"num_kv_shared_layers": 1}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [2, 3, 0, 1, 2, 3], {}),
        ({"decoder_sparse_step": 1, "moe_layer_freq": 1}, [3, 1, 2], {}),
        ({"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}, [1, 1, 0], {"moe_layers": [0, 1]}),
        ({"decoder_sparse_step": 2}, [0, 1, 2, 3, 0], {}),
        ({"decoder_sparse_step": 2}, [1, 2], {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
        ({"mlp_only_layers": [1]}, [1, 2, 3], {"mlp_only_layers": [0]}),
        ({"block_types": ["r", "a"]}, [0, 1, 1, 2, 3], {"block_types": list("raara")}),
        ({"hybrid_override_pattern": "M-*E"}, [3, 0, 1], {"hybrid_override_pattern": "EM-"}),
        ({"num_hidden_layers": None, "layers_block_type": list("mame")}, [0, 1, 1], {"layers_block_type": list("maa")}),
        ({"out_indices": [4]}, [0, 3],
         {"out_indices": [2], "out_features": ["stage2"], "stage_names": ["stem", "stage1", "stage2"]}),
        ({"model_type": "smollm3"}, [0, 3, 3], {"no_rope_layers": [1, 0, 0]}),
        ({"model_type": "llama4_text", "no_rope_layers": []}, [3, 2], {"no_rope_layers": [0, 1]}),
        ({"full_attention_interval": 2}, [1, 0], {"layer_types": ["full_attention", "linear_attention"]}),
        ({"model_type": "modernbert", "local_attention": 8}, [0, 3, 1],
         {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
        ({"model_type": "olmo3"}, [0, 1, 2, 3], {}),
        ({"time_step_limit": [0.0, 1.0, 2.0, 3.0]}, [0, 1], {}),
    ],
)  # fmt: skip
def test_kinds_of_layers_are_said_as_the_config_can(
    entries: dict[str, Any], numbers: list[int], said: dict[str, Any]
) -> None:
    assert stacked_config(numbers, **entries) == said


@pytest.mark.parametrize(
    ("entries", "numbers"),
    [
        ({"first_k_dense_replace": 1}, [1, 0]), ({"num_dense_layers": 1}, [0, 1, 0]),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": 1}, [0, 2, 1]), ({"num_kv_shared_layers": 1}, [0, 3, 1]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [0, 1, 1]),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [0, 2]), ({"moe_layer_freq": 2}, [1]),
        ({"interleave_moe_layer_step": 2}, [0, 0]), ({"local_attention": 8}, [0, 0, 1]), ({"rescale_every": 6}, [1, 2]),
        ({"hidden_size_per_layer_input": 8}, [0, 1, 2]), ({"num_mem_blocks": 1}, [0, 1, 2, 3, 3]),
    ],
)  # fmt: skip
def test_kinds_of_layers_that_the_config_cannot_say_are_refused(entries: dict[str, Any], numbers: list[int]) -> None:
    """The layers as they are can be said."""
    assert stacked_config([0, 1, 2, 3], **entries) == {}
    with pytest.raises(PlanError, match=f"cannot say it of these: .*{next(reversed(entries))[:4]}"):
        stacked_config(numbers, **dict(reversed(entries.items())))


def test_layers_with_experts_are_those_that_have_them(tmp_path: Path, family: dict[str, Path]) -> None:
    """Each model by its own numbers."""
    runs = ["math:0-2", "code:2-4", "base:1-2"]

    def config(ours: dict[str, Any], math: dict[str, Any], code: dict[str, Any]) -> dict[str, Any]:
        for i, (name, entries) in enumerate(zip(family, (ours, math, code), strict=True)):
            save(family[name], state(i), **entries)
        merge(family, tmp_path / "out", "passthrough", *runs, force=True)
        return dict(json.loads((tmp_path / "out" / "config.json").read_text()))

    first = {"first_k_dense_replace": 1}
    assert config(first, {"first_k_dense_replace": 2}, first)["first_k_dense_replace"] == 2
    assert config(first, {"first_k_dense_replace": 0}, first)["first_k_dense_replace"] == 0
    some = {"mlp_only_layers": [], "decoder_sparse_step": 2}
    mixed = config(some, {"mlp_only_layers": [1], "decoder_sparse_step": 2}, some)
    assert (mixed["decoder_sparse_step"], mixed["mlp_only_layers"]) == (1, [0, 1, 2])
    every = {"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}
    assert config(every, {"moe_layers": [0, 1]}, every)["moe_layers"] == [0, 1, 3, 4]


def pair(seed: int) -> State:
    """A model with an encoder of three layers and a decoder of two, whose first layers alone have a bias."""
    generator = torch.Generator().manual_seed(seed)
    lists = {"encoder": 3, "decoder": 2}
    names = [f"{part}.block.{i}.layer.0.q.weight" for part, count in lists.items() for i in range(count)]
    names += [f"{part}.block.0.layer.0.relative_attention_bias.weight" for part in lists]
    names += ["shared.weight", *(f"{part}.final_layer_norm.weight" for part in lists)]
    return {name: torch.randn(4, 4, generator=generator) for name in names}


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Path]:
    counts = {"num_hidden_layers": 9, "num_layers": 3, "num_decoder_layers": 2}
    return {name: save(tmp_path / name, pair(i), **counts) for i, name in enumerate(("base", "math", "code"))}


def test_each_part_has_its_own_layers(tmp_path: Path, pairs: dict[str, Path]) -> None:
    """A part that no run names is merged from all models, and one may be made as a whole."""
    base, math, code = (read(folder) for folder in pairs.values())
    got = merge(pairs, tmp_path / "out", "average", "encoder: math:0-2", "encoder: math:1-3 code:1-3")
    front = "encoder.block.{}.layer.0.q.weight"
    assert torch.equal(got[front.format(1)], math[front.format(1)])
    for i in (2, 3):
        assert torch.allclose(got[front.format(i)], (math[front.format(i - 1)] + code[front.format(i - 1)]) / 2)
    for name in ("decoder.block.1.layer.0.q.weight", "shared.weight"):
        assert torch.allclose(got[name], (math[name] + code[name]) / 2)
    end = "encoder.final_layer_norm.weight"
    assert torch.allclose(got[end], (math[end] + code[end]) / 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 2)
    got = merge(pairs, tmp_path / "mixed", "average", "encoder: math:0-2 code:1-3")
    bias = "encoder.block.0.layer.0.relative_attention_bias.weight"  # of math alone: the layers of code have none
    assert torch.allclose(got[bias], math[bias])
    assert torch.allclose(got[front.format(0)], (math[front.format(0)] + code[front.format(1)]) / 2)
    got = merge(pairs, tmp_path / "two", "slerp", "decoder: base:0-1", "encoder: math code", "shared: base code", t=0.5)
    assert torch.equal(got["decoder.final_layer_norm.weight"], base["decoder.final_layer_norm.weight"])
    assert not any(name.startswith("decoder.block.1.") for name in got)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 1)
    assert main(["merge", "--recipe", str(tmp_path / "two"), "-o", str(tmp_path / "three")]) == 0
    assert same(got, read(tmp_path / "three"))


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (["encoder: 1-3"], "the first layer must be a model's first"), (["0-2"], "several lists of layers"),
        (["encodr: 0-2"], "no tensor of the models is in a module 'encodr'"),
        (["encoder: math code", "encoder: math"], "the module is made twice"),
        (["encoder: math:0-2 code"], "needs as many layers of each model"), (["shared: 0-1"], "'base' has 0 layers"),
    ],
)  # fmt: skip
def test_what_modules_cannot_have_is_refused(
    runs: list[str], says: str, tmp_path: Path, pairs: dict[str, Path]
) -> None:
    with pytest.raises(ModelMergeError, match=says):
        merge(pairs, tmp_path / "out", "average", *runs)


@pytest.mark.parametrize(
    ("method", "run", "says"),
    [
        ("average", "maths:0-2", "there is no model 'maths'"),
        ("average", "math:2-5", "'math' has 4 layers"),
        ("average", "math:3-2", "3-2 holds no layer"),
        ("average", "math", "'math' is not [NAME:]FIRST-LAST"),
        ("average", "math:0-2 0-2", "'0-2' is not NAME:FIRST-LAST"),
        ("average", "math:0-2 code:1-4", "needs as many layers of each model"),
        ("average", "math:0-2 math:1-3", "names 'math' twice"),
        ("average", "", "names no layers"),
        ("average", "base=maths:0-2", "there is no model 'maths'"),
        ("ties", "base=math:0-2 base:0-2 code:0-2", "names two bases"),
        ("average", "'math:0-2", "No closing quotation"),
        ("ties", "math:0-2 code:0-2", "'ties' merges what models differ in from the base, which is not named"),
        ("passthrough", "math:0-2 code:0-2", "'passthrough' takes 1 beside the base, and there are 2"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    method: str, run: str, says: str, tmp_path: Path, family: dict[str, Path]
) -> None:
    with pytest.raises(UsageError) as refused:
        merge(family, tmp_path / "out", method, run)
    assert refused.value.message.startswith(f"layers '{run}': ")
    assert says in refused.value.message
    assert not (tmp_path / "out").exists()


def test_an_expert_that_is_called_base_is_refused(tmp_path: Path, family: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="an expert is called 'base'"):
        modelmerge.merge(family["math"], [family["base"]], tmp_path / "out", method="passthrough", layers=["base:0-2"])


def test_models_with_several_lists_of_layers_are_refused_unless_one_is_the_language_models(
    tmp_path: Path, family: dict[str, Path]
) -> None:
    def renamed(old: str, new: str, more: State) -> None:
        for i, folder in enumerate(family.values()):
            save(folder, {name.replace(old, new): tensor for name, tensor in state(i).items()} | more)

    renamed("model.layers", "decoder.layers", {"encoder.layers.0.fc.weight": torch.ones(2, 2)})
    with pytest.raises(PlanError, match=r"several lists of layers: .*encoder.layers \(1\)"):
        merge(family, tmp_path / "out", "average", "math:0-2")
    renamed("_", "_", {"vision_tower.layers.0.fc.weight": torch.ones(2, 2)})
    got = merge(family, tmp_path / "out", "average", "math:0-2")
    assert "vision_tower.layers.0.fc.weight" in got
    assert "model.layers.2.mlp.up_proj.weight" not in got


@pytest.mark.parametrize("more", [{"as_lora": 2}, {"disentangle": "awd"}])
def test_what_needs_the_bases_layers_is_refused(more: Any, tmp_path: Path, family: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="needs the base's own layers"):
        merge(family, tmp_path / "out", "average", "0-2", **more)


def test_embeddings_of_other_tokens_are_refused(tmp_path: Path, family: dict[str, Path]) -> None:
    words = ["a", "b", "c", "d", "e", "f"]
    for folder, order in (("base", words), ("code", words), ("math", words[::-1])):
        vocab = {"model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(order)}}}
        (family[folder] / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(PlanError, match="begin or end with 'math'") as refused:
        merge(family, tmp_path / "out", "passthrough", "math:0-2", "base:2-4")
    assert refused.value.hint == "name 'math' as the base, and the base as an expert"
    got = merge(family, tmp_path / "out", "passthrough", "base:0-2", "math:1-3", "code:3-4")
    assert torch.equal(got["lm_head.weight"], read(family["code"])["lm_head.weight"])


def test_names_with_colons_and_blanks_are_quoted(tmp_path: Path, family: dict[str, Path]) -> None:
    out = tmp_path / "out"
    modelmerge.merge(
        family["base"], {"a: 1-2": family["math"], "b-c": family["code"]}, out, method="average",
        layers=["'a: 1-2:0-2' b-c:1-3", "'a: 1-2:3-4'"],
    )  # fmt: skip
    math, code, end = read(family["math"]), read(family["code"]), "mlp.up_proj.weight"
    mean = (layer(math, 1)[end] + layer(code, 2)[end]) / 2
    assert torch.allclose(layer(read(out), 1)[end], mean)
    assert same(layer(read(out), 2), layer(math, 3))


def test_the_manifest_repeats_the_stack(
    tmp_path: Path, family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its inputs are the files that something is read from, each of the model that it belongs to."""
    whole = state(1)
    first = {name: tensor for name, tensor in whole.items() if ".2." not in name and ".3." not in name}
    parts = {"model-1.safetensors": first, "model-2.safetensors": {k: t for k, t in whole.items() if k not in first}}
    (family["math"] / "model.safetensors").unlink()
    for name, tensors in parts.items():
        write(tmp_path / name, tensors, config=False)
        (tmp_path / name / "model.safetensors").rename(family["math"] / name)
    index = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    (family["math"] / "model.safetensors.index.json").write_text(json.dumps(index))
    base, *experts = family.values()
    manifest = modelmerge.merge(
        base, experts, tmp_path / "one", method="average", layers=["math:0-2", "1-2", "base:3-4"]
    )
    assert [Path(name).name for name in manifest["inputs"]["experts"][0]["files"]] == ["model-1.safetensors"]
    assert "--layers math:0-2 --layers 1-2 --layers base:3-4" in manifest["command"]
    assert main(["merge", "--recipe", str(tmp_path / "one"), "-o", str(tmp_path / "two")]) == 0
    assert same(read(tmp_path / "one"), read(tmp_path / "two"))
    assert main(["verify", str(tmp_path / "two")]) == 0
    assert "put together anew" in (tmp_path / "two" / "README.md").read_text()


def test_a_command_stacks_layers_of_one_model(
    tmp_path: Path, family: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "passthrough", str(family["base"]), "--layers", "base:0-3", "--layers", "base:1-4"]
    assert main([*words, "-o", str(tmp_path / "out"), "-n", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["layers"] == ["base:0-3", "base:1-4"]
    assert plan["bytes"]["read"] == sum(t.nbytes for t in state(0, count=6).values())  # each tensor once
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert same(layer(read(tmp_path / "out"), 5), layer(read(family["base"]), 3))
    with pytest.raises(ModelMergeError, match="no expert is named"):
        modelmerge.merge(family["base"], [], tmp_path / "no", method="passthrough")


def test_what_is_not_needed_of_the_hub_is_not_fetched(tmp_path: Path, family: dict[str, Path], hub: Any) -> None:
    whole = read(family["math"])
    write(tmp_path / "sharded", whole, shards=len(whole), config=False)
    save_config = (family["math"] / "config.json").read_bytes()
    files = {file.name: file.read_bytes() for file in (tmp_path / "sharded").iterdir()}
    hub.add("org/math", {**files, "config.json": save_config})
    out = tmp_path / "out"
    modelmerge.merge(family["base"], {"math": "org/math"}, out, method="passthrough", layers=["base:0-3", "math:1-2"])
    assert same(layer(read(out), 3), layer(whole, 1))
    # The layer's tensors, the final norm and the head.
    manifest = json.loads((out / "modelmerge.json").read_text())
    assert len(manifest["inputs"]["experts"][0]["files"]) == len(INSIDE) + 2


_MANY = ("ties", "slerp", "kron", "model-stock", "arcee-fusion", "dare")
_DATA_FREE = [name for name in registry.data_free() if name != "passthrough"]


@pytest.mark.parametrize("method", [*_MANY, *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in _DATA_FREE if name not in _MANY)])  # fmt: skip
def test_every_method_merges_a_run_as_it_merges_models_of_these_layers_alone(
    method: str, tmp_path: Path, family: dict[str, Path]
) -> None:
    firsts = {"base": 1, "math": 2} | ({} if registry.load(method).most_experts == 1 else {"code": 0})
    small: dict[str, Path] = {}
    for name, first in firsts.items():
        whole = read(family[name])
        ends = {key: tensor for key, tensor in whole.items() if key in ENDS}
        inside = {f"model.layers.{i}.{end}": t for i in range(2) for end, t in layer(whole, first + i).items()}
        small[name] = save(tmp_path / "small" / name, ends | inside, num_hidden_layers=2)
    run = " ".join(f"{name}:{first}-{first + 2}" for name, first in firsts.items())
    scale = constant_scale(method)
    got = merge(family, tmp_path / "out", method, run, **scale)
    assert same(got, merge(small, tmp_path / "want", method, **scale))


def test_layers_that_predict_further_tokens_are_left_out_of_stacks(tmp_path: Path, family: dict[str, Path]) -> None:
    """As DeepSeek-V3 has one, behind its last. A plain merge has it."""
    for i, (name, folder) in enumerate(family.items()):
        tensors = state(i, count=LAYERS + 1) | {f"model.layers.{LAYERS}.eh_proj.weight": torch.ones(4, 8)}
        tensors |= {f"visual.blocks.{number}.proj.weight": torch.ones(4, 4) for number in range(LAYERS + 2)}
        save(folder, tensors, **({} if name == "code" else {"num_nextn_predict_layers": 1}))
    tower = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    save(family["code"], state(2) | tower)
    base, *experts = family.values()
    runs = ["math:0-3", "base:2-4", "code:3-4"]
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method="passthrough", layers=runs)
    got = read(tmp_path / "out")
    assert same(layer(got, 4), layer(read(base), 3))
    assert len(got) == 6 * len(INSIDE) + len(ENDS) + len(tower)
    assert tower.keys() <= got.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (6, 0)
    left_out = [note.split("'")[1] for note in manifest["notes"] if "predict further tokens" in note]
    assert left_out == ["base", "math"]
    modelmerge.merge(base, experts[:1], tmp_path / "plain", method="average")
    assert read(tmp_path / "plain").keys() == read(base).keys()


def test_a_slice_that_there_is_not_is_told_by_the_file(tmp_path: Path, family: dict[str, Path]) -> None:
    source = {"model": str(family["math"]), "layer_range": [0, 9]}
    (tmp_path / "c.yml").write_text(json.dumps({"slices": [{"sources": [source]}] * 2, "merge_method": "passthrough"}))
    with pytest.raises(RecipeError, match=r"c\.yml: in its slices, here .* 'base' has 4 layers") as refused:
        modelmerge.replay(tmp_path / "c.yml", tmp_path / "out")
    assert refused.value.hint == f"the last is 4 at most; base is {family['math']}"
