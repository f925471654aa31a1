"""mergekit's configurations, against what mergekit itself made of them (see `tests/support/mergekit_runs.py`)."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import PlanError, RecipeError
from modelmerge.methods import registry
from modelmerge.methods.options import make_options, option_types
from modelmerge.plan import mergekit, mergekit_methods
from modelmerge.record.redaction import published
from tests.support import mergekit_runs
from tests.support.checkpoints import State, read, same_bits, write

ORACLE = mergekit_runs.ORACLE
# Where mergekit's number is wrong, and a test of its own says why.
WRONG = {"half-arithmetic", "ties-cancels"}
TOKENS = sorted(file.stem for file in mergekit_runs.CONFIGS.glob("tokens-*.yml"))
MODULES = sorted(file.stem for file in mergekit_runs.CONFIGS.glob("modules-*.yml"))
EXPERTS = sorted(file.stem for file in mergekit_runs.CONFIGS.glob("experts-*.yml"))
APART = {*WRONG, *TOKENS, *MODULES, *EXPERTS}
SAME = sorted(file.stem for file in mergekit_runs.CONFIGS.glob("*.yml") if file.stem not in APART)
# What the config says of layers, where that is not what the base's says.
DEPTHS = {
    "modules-slices": {"text_config.num_hidden_layers": 5},
    "modules-vision": {"text_config.num_hidden_layers": 5, "vision_config.num_hidden_layers": 3},
    "modules-passthrough-three": {"vision_config.num_hidden_layers": 3},
    "modules-seq2seq": {"num_layers": 4, "num_decoder_layers": 1},
}
# The order of its models is that of their hashes, and the union's tokens follow it.
DRAWN = {
    "tokens-passthrough",
    "tokens-stacked",
    "tokens-stacked-alone",
    "tokens-half",
    "tokens-linear",
    "tokens-linear-based",
    "tokens-union",
}


@pytest.fixture
def beside_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where `models/base` and the others lie, as the configurations name them."""
    (tmp_path / "models").symlink_to(ORACLE / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(config: str) -> tuple[State, State]:
    """What modelmerge makes of a configuration, and what mergekit made of it."""
    modelmerge.replay(mergekit_runs.CONFIGS / f"{config}.yml", Path("out"))
    return read(Path("out")), load_file(ORACLE / "merged" / f"{config}.safetensors")


@pytest.mark.parametrize("config", SAME)
def test_the_result_is_mergekits(config: str, beside_models: Path) -> None:
    got, want = merged(config)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert tensor.dtype == got[name].dtype == torch.float32
        assert (got[name] - tensor).abs().max() <= 1e-6, name
    base = read(ORACLE / "models" / "base")
    shared = base.keys() & want.keys()
    moved = [name for name in shared if (want[name] - base[name]).abs().max() > 1e-4]
    assert len(moved) > 0.5 * len(shared)


@pytest.mark.parametrize(
    ("config", "option", "far"),
    [("slerp-near", "straight_above", 1e-5), ("slerp-partial", "zeros", 1e-2), ("nuslerp-rows", "zeros", 1e-2),
     ("sce-slight", "equal_below", 1e-4), ("model-stock-disagrees", "unbounded", 1e-3)],
)  # fmt: skip
def test_what_a_configuration_sets_apart_from_our_defaults_makes_its_numbers(
    config: str, option: str, far: float
) -> None:
    translated = mergekit.read(mergekit_runs.CONFIGS / f"{config}.yml")
    defaults = {key: value for key, value in translated.recipe.options.items() if key != option}
    theirs = load_file(ORACLE / "merged" / f"{config}.safetensors")
    own = in_memory(translated, defaults)
    assert far < max(float((own[name] - tensor).abs().max()) for name, tensor in theirs.items()) < 0.5


def in_memory(translated: mergekit.Translated, options: Mapping[str, Any], seed: int = 0) -> State:
    """What a translated configuration makes with these options."""
    recipe = translated.recipe
    experts = dict(expert.split("=models/") for expert in recipe.experts)
    states = {name: read(ORACLE / "models" / model) for name, model in experts.items()}
    return modelmerge.merge(
        read(ORACLE / "models" / "base"), states, method=recipe.method, weights=recipe.weights, seed=seed,
        at=translated.overrides(states[next(iter(states))]), **options,
    )  # fmt: skip


@pytest.mark.parametrize("rounds", [6, pytest.param(mergekit_runs.ROUNDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", sorted(file.stem for file in (mergekit_runs.CONFIGS / "drawn").glob("*.yml")))
def test_where_entries_are_drawn_the_mean_and_the_share_of_what_is_kept_are_mergekits(config: str, rounds: int) -> None:
    """Means of many draws differ by what is left of their spread, and by no more."""
    translated = mergekit.read(mergekit_runs.CONFIGS / "drawn" / f"{config}.yml")
    base, theirs = read(ORACLE / "models" / "base"), load_file(ORACLE / "merged" / "drawn" / f"{config}.safetensors")
    runs = [in_memory(translated, translated.recipe.options, seed) for seed in range(rounds)]
    off = spread = 0.0
    for name, tensor in base.items():
        if tensor.ndim < 2:
            continue  # of few entries: a norm given back to what is left of them is not the same on average
        drawn = torch.stack([run[name] for run in runs]).double()
        kept, want = (drawn != tensor).double().mean(), float(theirs[f"kept.{name}"])
        assert abs(kept - want) <= 5 * (0.25 * (1 / rounds + 1 / mergekit_runs.ROUNDS) / tensor.numel()) ** 0.5, name
        off += float((drawn.mean(0) - theirs[f"mean.{name}"].double()).square().sum())
        spread += float(drawn.var(0).sum()) * (1 / rounds + 1 / mergekit_runs.ROUNDS)
    assert 0.75 < off / spread < 1.25


@pytest.mark.parametrize("config", TOKENS)
def test_tables_are_mergekits_token_by_token(config: str, beside_models: Path) -> None:
    """Every row of a token, the padding, the number of rows, and the ids in the tokenizer."""
    got, want = merged(config)
    kept = ORACLE / "merged" / f"{config}.json"
    if kept.exists():
        theirs = json.loads(kept.read_text())
        assert json.loads(Path("out/config.json").read_text())["vocab_size"] == theirs["vocab_size"]
        got = by_token(got, Tokenizer.from_file("out/tokenizer.json").get_vocab(), theirs["ids"], drawn=config in DRAWN)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape
        assert (got[name] - tensor).abs().max() <= 1e-6, name


def by_token(state: State, ids: Mapping[str, int], wanted: Mapping[str, int], *, drawn: bool) -> State:
    """A model with the rows of its tables where other ids have them; only what is drawn may have them elsewhere."""
    assert ids == wanted or (drawn and ids.keys() == wanted.keys())
    rows = list(range(max(map(len, (state[name] for name in mergekit_runs.TABLES if name in state)))))
    for token, row in wanted.items():
        rows[row] = ids[token]
    return {name: tensor[rows] if name in mergekit_runs.TABLES else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("config", MODULES)
def test_modules_are_mergekits(config: str, beside_models: Path) -> None:
    """All that it writes; of a module that the file does not list it writes nothing, and here the base's stays."""
    got, want = merged(config)
    place = Path(modelmerge.replay("out", "again")["inputs"]["base"]["path"])
    base = read(place)
    assert len(want) > 10
    for name, tensor in got.items():
        assert (tensor - want.get(name, base.get(name, tensor))).abs().max() <= 1e-6, name
    assert want.keys() <= got.keys()
    assert (want.keys() == got.keys()) == (config != "modules-inferred")
    said, wanted = (json.loads((folder / "config.json").read_text()) for folder in (Path("out"), place))
    for key, count in DEPTHS.get(config, {}).items():
        part, _, last = key.rpartition(".")
        (wanted[part] if part else wanted)[last] = count
    assert said == wanted


def in_stacks(state: State) -> State:
    """A model's tensors with Mixtral's experts as mergekit writes them."""
    stacks: State = {}
    for name, tensor in state.items():
        front, _, end = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        number, _, word = end.partition(".")
        if not number.isdigit():
            stacks[name.replace("block_sparse_moe", "mlp")] = tensor
            continue
        whole = (mergekit_runs.EXPERTS, mergekit_runs.INNER * 2, mergekit_runs.HIDDEN)
        stack = f"{front}.experts.{'down_proj' if word == 'w2.weight' else 'gate_up_proj'}"
        shape = (mergekit_runs.EXPERTS, *tensor.shape) if word == "w2.weight" else whole
        rows = {"w1.weight": slice(mergekit_runs.INNER), "w3.weight": slice(mergekit_runs.INNER, None)}
        stacks.setdefault(stack, torch.zeros(shape))[int(number), rows.get(word, slice(None))] = tensor
    return stacks


@pytest.mark.parametrize("config", EXPERTS)
def test_experts_of_a_layer_are_one_tensor_as_in_mergekit(config: str, beside_models: Path) -> None:
    """Whichever way files have them, which is the way of the output; a filter goes by mergekit's names."""
    got, want = merged(config)
    manifest = json.loads(Path("out/modelmerge.json").read_text())
    base = read(Path(manifest["inputs"]["base"]["path"]))
    assert manifest["recipe"]["whole_experts"]
    assert (got.keys() == base.keys()) == (config != "experts-slices")
    assert {name: tensor.shape for name, tensor in base.items()}.items() <= {n: t.shape for n, t in got.items()}.items()
    got = in_stacks(got)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= 1e-6, name
    # Each matrix for itself is another merge.
    recipe = dict(manifest["recipe"], whole_experts=False)
    Path("apart.json").write_text(json.dumps(manifest | {"recipe": recipe}))
    modelmerge.replay("apart.json", "apart", allow_different_bits=True)
    apart = in_stacks(read(Path("apart")))
    assert max(float((apart[name] - tensor).abs().max()) for name, tensor in want.items()) > 1e-4


def test_mergekit_computes_in_the_dtype_it_stores(beside_models: Path) -> None:
    """`dtype: bfloat16` rounds every model before it subtracts: most of a small task vector is rounding then."""
    ours, theirs = merged("half-arithmetic")
    base, fine = (load_file(ORACLE / "models" / name / "model.safetensors") for name in ("base", "fine"))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"):
        tau = fine[name].double() - base[name].double()
        assert (theirs[name] - base[name] - tau).norm() > 0.5 * tau.norm()
        assert (ours[name] - base[name] - tau).norm() < 1e-4 * tau.norm()


def test_mergekit_lets_cancelling_entries_go_up(beside_models: Path) -> None:
    """Two experts that differ from the base by the same steps to either side: the paper elects no sign there."""
    ours, theirs = merged("ties-cancels")
    base, up = (load_file(ORACLE / "models" / name / "model.safetensors") for name in ("base", "up"))
    for name, tensor in base.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name] - tensor, (up[name] - tensor).abs())


def test_without_a_dtype_the_widest_is_stored(beside_models: Path) -> None:
    """As in mergekit; where it is not the same for all tensors, a remark says what is done instead."""
    manifest = modelmerge.replay(mergekit_runs.CONFIGS / "mixed-dtypes.yml", "out")
    assert manifest["recipe"]["dtype"] == "float32"
    assert any(note.startswith("No dtype: stored in float32") for note in manifest["notes"])
    text = (mergekit_runs.CONFIGS / "mixed-dtypes.yml").read_text()
    write(Path("half"), {key: tensor.half() for key, tensor in read(ORACLE / "models" / "code").items()}, config=False)
    Path("c.yml").write_text(text.replace("models/math", "half").replace("models/code", "models/base16"))
    assert modelmerge.replay("c.yml", "halves")["recipe"]["dtype"] == "float32"
    text = text.replace("models/code", "code")
    Path("c.yml").write_text(text.replace("models/math", "models/base16"))
    wide = {key: t if "mlp" in key else t.bfloat16() for key, t in read(ORACLE / "models" / "code").items()}
    write(Path("code"), wide, config=False)
    manifest = modelmerge.replay("c.yml", "other")
    assert manifest["recipe"]["dtype"] is None
    assert any(note.startswith("No dtype: tensors are stored as the base does") for note in manifest["notes"])


TIES = """
models:
  - model: models/base
  - model: models/math
    parameters: {weight: 1}
  - model: models/code
    parameters: {weight: 1}
merge_method: ties
base_model: models/base
"""


@pytest.mark.parametrize(
    ("text", "complaints"),
    [
        (TIES.replace("ties", "tise"), ["merge_method: modelmerge has no counterpart of 'tise'; did you mean 'ties'?"]),
        (TIES.replace("ties", "passthrough"), ["models: this method takes 1, and there are 3"]),
        (TIES + "tokeniser_source: base\n", ["tokeniser_source: mergekit has no such key; did you mean"]),
        (TIES + "tokenizer_source: base\ntokenizer: {}\n", ["tokenizer_source and tokenizer: mergekit takes one"]),
        (TIES + "tokenizer: 7\n", ["tokenizer: is no mapping"]),
        (TIES + "tokenizer: {tokens: [a], sorce: 8, pad_to_multiple_of: 1.5}\n",
         ["tokenizer.tokens: is no mapping", "tokenizer.sorce: mergekit has no such key; did you mean 'source'?",
          "tokenizer.pad_to_multiple_of: must be an integer, not 1.5"]),
        (TIES + "tokenizer: {tokens: {a: {force: true}, b: {force: 7}, c: 7}}\n",
         ["tokenizer.tokens.a: is forced, and has no source", "tokenizer.tokens.b.force: must be true or false",
          "tokenizer.tokens.c: has a 'source' and a 'force'"]),
        (TIES + "tokenizer: {tokens: {a: {source: {kind: nil}}, b: {source: {kind: model_token, model: models/base, "
         "token: a, token_id: 0}}}}\n",
         ["tokenizer.tokens.a.source: is a model, {kind: zero}", "tokenizer.tokens.b.source: is a model"]),
        (TIES + "chat_template: lama3\n", ["chat_template: 'lama3' is no template, and no name of one; did you mean"]),
        (TIES + "chat_template: 7\n", ["chat_template: 7 is no template"]),
        (TIES + "dtype: int64\n", ["dtype: 'int64': only float64, float32, float16, bfloat16"]),
        (TIES + "parameters: {normalize: 2}\n", ["parameters.normalize: must be true or false, not 2"]),
        (TIES + "parameters: {rescale: [true, maybe]}\n", ["parameters.rescale: must be true or false, not 'maybe'"]),
        (TIES + "parameters: {int8_mask: 8}\n", ["parameters.int8_mask: must be true or false, not 8"]),
        (TIES + "parameters: {lambda: much}\n", ["parameters.lambda: must be a number or a list of numbers"]),
        (TIES + "parameters: {lambda: [{value: 1, glob: x}]}\n", ["parameters.lambda: a condition has a 'value'"]),
        (TIES + "parameters: {lambda: .inf}\n", ["parameters.lambda: must be a number or a list of numbers, not inf"]),
        (TIES.replace("ties", "della") + "parameters: {epsilon: [0.5, -1]}\n", ["parameters.epsilon: epsilon must"]),
        (TIES.replace("weight: 1", "weight: 1, desnity: 1"),
         ["models[1].parameters.desnity: mergekit has no such key; did you mean 'density'?",
          "models[2].parameters.desnity"]),
        (TIES.replace("{weight: 1}", "{}", 1), ["models[1].parameters.weight: is missing: mergekit insists on it"]),
        (TIES.replace("weight: 1", "weight: [{value: 1, filter: mlp}]", 1),
         ["models[1].parameters.weight: is missing for tensors that no filter matches"]),
        (TIES + "tokenizer: {pad_to_multiple_of: -8}\n", ["tokenizer.pad_to_multiple_of: must be above 0, not -8"]),
        (TIES.replace("base_model: models/base", ""), ["base_model: is missing"]),
        (TIES.replace("models/code", "models/math"), ["models[2].model: 'models/math' is listed twice"]),
        (TIES.replace("models/code", "models/code+"), ["models[2].model: must be MODEL+ADAPTER"]),
        (TIES.replace("models/code", "{path: 7}"), ["models[2].model: only a path or a name on the Hub"]),
        (TIES.replace("models:\n", "modules: {}\nmodles:\n"), ["modles: mergekit has no", "models: mergekit takes"]),
        ("merge_method: ties\nmodules: {default: {}}\n", ["modules.default.models: mergekit takes exactly one"]),
        ("merge_method: ties\nbase_model: a\nmodels: [b]\n", ["models[0]: has no 'model'"]),
        ("merge_method: ties\nbase_model: a\nslices: [{}, {}]\n",
         ["slices[0].sources: is no list of models", "slices[1].sources"]),
        ("merge_method: linear\nparameters: {weight: 1}\nslices: [{parameter: 1, sources: [{model: b, layer_range: "
         "[4, 3]}]}]\n",
         ["slices[0].parameter: mergekit has no such key", "slices[0].sources[0].layer_range: must be [FIRST, LAST]"]),
        ("merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: b, layer_range: [1, 4]}, "
         "{model: c, layer_range: [0, 2]}]}]\n", ["slices[0].sources: all need as many layers as the others"]),
        ("merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: b, layer_range: [0, 1]}, "
         "{model: b, layer_range: [1, 2]}]}]\n", ["slices[0].sources[1].model: 'b' is listed twice"]),
        ("merge_method: ties\nbase_model: a\nparameters: {weight: 1}\nslices: [{sources: [{model: b, layer_range: "
         "[0, 1]}]}]\n", ["slices[0].sources: 'a' is missing: mergekit needs the base_model in each slice"]),
        ("merge_method: ties\nparameters: {weight: 1}\nslices: [{base_model: b, sources: [{model: a, layer_range: "
         "[0, 1]}, {model: b, layer_range: [0, 1]}]}, {sources: [{model: a, layer_range: [0, 1]}]}]\n",
         ["base_model: is missing: mergekit's method needs it"]),
        ("merge_method: passthrough\nmodules: {encoder: {}, decoder: 7, default: {slices: 7}}\n",
         ["modules.encoder.models: mergekit takes exactly one", "modules.decoder: is no mapping",
          "modules.decoder.models: mergekit takes exactly one", "modules.default.slices: is no list"]),
        ("merge_method: passthrough\nmodules: [default]\n", ["modules: is no mapping"]),
        ("merge_method: model_stock\nbase_model: a\nmodules: {x: {models: [{model: b}, {model: c}]}, y: {models: "
         "[{model: b}]}}\n", ["modules.y.models: this method takes at least 2 besides the base, and there are 1"]),
        ("merge_method: multislerp\nbase_model: a\nmodels: [{model: a}]\nparameters: {weight: 1}\n",
         ["models: this method takes at least 1 besides the base, and there are 0"]),
        ("merge_method: breadcrumbs\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, gamma: -0.1}\n",
         ["parameters.gamma: gamma must be at least 0"]),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 0.5}\n",
         ["models: this method takes 1 besides the base, and there are 2"]),
        ("merge_method: multislerp\nmodels: [{model: a}]\nparameters: {weight: 1, eps: -1}\n",
         ["parameters.eps: soften must be at least 0"]),
        ("merge_method: karcher\nmodels: [{model: a}]\nparameters: {max_iter: 1.5}\n",
         ["parameters.max_iter: must be an integer, not 1.5"]),
        ("merge_method: nuslerp\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1, nuslerp_flatten: [true, "
         "false], nuslerp_row_wise: [true, false]}\n",
         ["parameters.nuslerp_row_wise: must be one value for all tensors where nuslerp_flatten is not"]),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_listed_with_its_place(text: str, complaints: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(RecipeError, match="that cannot be honoured") as refused:
        mergekit.read(tmp_path / "c.yml")
    lines = [line.strip() for line in refused.value.message.splitlines()[1:]]
    for complaint in complaints:
        assert any(line.startswith(complaint) for line in lines), lines
    assert f": {len(lines)} thing" in refused.value.message.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "cannot be read as YAML"), ("{}", "no mergekit configuration"), ("7", "no mergekit configuration"),
        ("base_model: a\nexperts: [{source_model: b}]", "it is for mergekit-moe, which has no counterpart here"),
        ("genome: {models: [a, b], merge_method: ties}", "it is for mergekit-evolve, which has no counterpart here"),
        ("merge_method: ties\nmerge_method: linear\n", "the key 'merge_method' comes twice"),
        ("!!python/object/apply:os.system [exit]", "cannot be read as YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        mergekit.read(tmp_path / "c.yaml")


def test_what_has_no_effect_in_a_slice_is_remarked(beside_models: Path) -> None:
    """A slice's own base stands for all where there is no other."""
    text = (mergekit_runs.CONFIGS / "task-arithmetic-slices.yml").read_text().replace("base_model: models/base\n", "")
    slice_ = "  - base_model: models/base\n    residual_weight: 1\n    sources:"
    Path("c.yml").write_text(text.replace("  - sources:", slice_))
    manifest = modelmerge.replay("c.yml", Path("out"))
    assert "slices[0].residual_weight has no effect in mergekit, nor here." in manifest["notes"]
    want = load_file(ORACLE / "merged" / "task-arithmetic-slices.safetensors")
    assert all((read(Path("out"))[name] - tensor).abs().max() <= 1e-6 for name, tensor in want.items())


def test_slices_come_out_as_options_of_the_command_line(beside_models: Path) -> None:
    first = modelmerge.replay(mergekit_runs.CONFIGS / "linear-stack.yml", "one")
    assert first["recipe"]["layers"] == ["math:0-2 code:0-2", "chat:1-2", "math:1-4 chat:1-4"]
    modelmerge.replay("one/modelmerge.json", "two")
    assert main([*shlex.split(first["command"])[1:-1], "three"]) == 0
    assert len({(Path(name) / "model.safetensors").read_bytes() for name in ("one", "two", "three")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [name for name in SAME if name.endswith(("-stack", "-part", "merge", "scaling"))])
def test_what_slices_make_loads(config: str, beside_models: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tensors, _ = merged(config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def real_model(family: str) -> Any:
    """A model of transformers with as many layers as those of that family here."""
    transformers = pytest.importorskip("transformers")
    if family == "t5":
        config = transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, vocab_size=32,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Mistral3Config(
        text_config={**sizes, "model_type": "mistral", "num_hidden_layers": 4, "vocab_size": 32, "head_dim": 8},
        vision_config={**sizes, "model_type": "pixtral", "num_hidden_layers": 2, "image_size": 16, "patch_size": 4,
                       "head_dim": 8},
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "family"),
    [
        ("modules-slices", "mistral3"), ("modules-vision", "mistral3"), ("modules-passthrough-three", "mistral3"),
        ("modules-seq2seq", "t5"),
    ],
)  # fmt: skip
def test_what_modules_make_loads(config: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "one", "two"):
        model = real_model(family)
        model.save_pretrained(f"models/modules/{family}/{name}")
    modelmerge.replay(mergekit_runs.CONFIGS / f"{config}.yml", "out")
    _, report = type(model).from_pretrained("out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parametrize("method", ["ties", "sce", "ram"])
def test_the_base_alone_is_the_base(method: str, beside_models: Path) -> None:
    Path("c.yml").write_text(f"merge_method: {method}\nbase_model: models/base\nmodels: [{{model: models/base}}]\n")
    modelmerge.replay("c.yml", "out")
    modelmerge.replay("out/modelmerge.json", "again")
    assert all(same_bits(read(Path(name)), read(ORACLE / "models" / "base")) for name in ("out", "again"))


def test_a_list_for_what_lies_outside_layers_is_its_first_value(beside_models: Path) -> None:
    """Also where nothing that is merged lies in layers."""
    Path("c.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  default:\n    models:\n"
        "    - {model: models/modules/bart/one, parameters: {weight: [1, 5]}}\n    - model: models/modules/bart/two\n"
    )
    modelmerge.replay("c.yml", "out")
    got, one, two = (read(p) for p in (Path("out"), *(ORACLE / "models/modules/bart" / n for n in ("one", "two"))))
    assert torch.allclose(got["model.shared.weight"], (one["model.shared.weight"] + two["model.shared.weight"]) / 2)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_model_of_multislerp_stays_as_it_is(normalize: bool, beside_models: Path) -> None:
    Path("c.yml").write_text(
        "merge_method: multislerp\nbase_model: models/base\nmodels: [{model: models/math}]\n"
        f"parameters: {{weight: [0.5, -2], normalize_weights: {normalize}}}\n"
    )
    modelmerge.replay("c.yml", "out")
    math = read(ORACLE / "models" / "math")
    assert all(torch.allclose(tensor, math[name], atol=1e-6) for name, tensor in read(Path("out")).items())


def test_a_revision_of_a_folder_has_no_effect(beside_models: Path) -> None:
    text = (mergekit_runs.CONFIGS / "linear.yml").read_text()
    Path("c.yml").write_text(text.replace("models/math", "models/math@v1"))
    modelmerge.replay("c.yml", "out")
    want = load_file(ORACLE / "merged" / "linear.safetensors")
    assert all((read(Path("out"))[name] - tensor).abs().max() <= 1e-6 for name, tensor in want.items())


def test_models_of_a_module_come_out_as_options_of_the_command_line(beside_models: Path) -> None:
    first = modelmerge.replay(mergekit_runs.CONFIGS / "modules-vision.yml", "one")
    assert first["recipe"]["layers"][3:] == [
        "vision_tower: base:0-2 two:0-2", "vision_tower: base:1-2 two:0-1 one:1-2",
        "vision_tower: base:2-2 two:1-1", "multi_modal_projector: two base",
    ]  # fmt: skip
    modelmerge.replay("one/modelmerge.json", "two")
    assert main([*shlex.split(first["command"])[1:-1], "three"]) == 0
    assert len({(Path(name) / "model.safetensors").read_bytes() for name in ("one", "two", "three")}) == 1


def test_what_has_no_effect_is_remarked(beside_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TIES.replace("ties", "task_arithmetic").replace("models/math", "models/math\n    revision: v1")
    text = text.replace("{weight: 1}", "{weight: 1, lambda: 2}", 1)
    Path("c.yml").write_text(text + "parameters: {filter_wise: true, blue: [1]}\nauthor: me\nname: my first / second\n")
    assert main(["merge", "--recipe", "c.yml", "-o", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "note: models[1].parameters.lambda has no effect in mergekit, nor here: all models have it from one" in said
    assert "note: parameters.filter_wise has no effect on this method in mergekit, nor here." in said
    for key in ("parameters.blue", "author", "models[1].revision"):
        assert f"note: {key} is no key of mergekit; it has no effect there, nor here." in said
    assert main(["merge", "--recipe", "c.yml", "-o", "out"]) == 0
    assert "parameters.filter_wise has no effect" in Path("out/README.md").read_text()


def test_the_command_and_the_manifest_repeat_the_merge(beside_models: Path) -> None:
    """Gradients and filters come out as options of the command line."""
    first = modelmerge.replay(mergekit_runs.CONFIGS / "ties-gradients.yml", "one")
    assert "math.density=1,0.7,0.1" in first["command"]
    modelmerge.replay("one/modelmerge.json", "two")
    assert main([*shlex.split(first["command"])[1:-1], "three"]) == 0
    assert {(Path(name) / "model.safetensors").read_bytes() for name in ("one", "two", "three")} == {
        Path("one/model.safetensors").read_bytes()
    }


def test_names_and_references_of_models(tmp_path: Path) -> None:
    text = TIES.replace("models/math", "{model: {path: org/a.b, revision: v1}}")
    for adapter in ("models/base+hub/a.b", "{model: models/base, lora: hub/a.b}"):
        (tmp_path / "c.yml").write_text(text.replace("models/code", adapter))
        recipe = mergekit.read(tmp_path / "c.yml").recipe
        assert recipe.experts == ("a.b=org/a.b@v1", "a.b-2=hub/a.b")


@pytest.mark.parametrize("name", mergekit_methods.METHODS)
def test_every_row_names_options_that_there_are(name: str) -> None:
    row = mergekit_methods.METHODS[name]
    chosen = registry.load(row.method)
    have = option_types(chosen.options)
    for parameter in row.parameters:
        assert parameter.key in mergekit_methods.KNOWN
        assert parameter.option in (None, "weight", *have)
    make_options(chosen, row.method, row.fixed)


def test_every_parameter_of_mergekit_has_its_row_with_its_default() -> None:
    specs = json.loads((ORACLE / "parameters.json").read_text())
    assert set(mergekit_methods.METHODS) == set(specs)
    assert specs["passthrough"]["scale"]["default"] is None
    specs["passthrough"]["scale"] = {"default": 1.0, "required": False, "per_model": False}  # of the only model
    assert {key for parameters in specs.values() for key in parameters} == mergekit_methods.KNOWN
    for name, row in mergekit_methods.METHODS.items():
        ours = {parameter.key: parameter for parameter in row.parameters}
        assert ours.keys() == specs[name].keys(), name
        for key, spec in specs[name].items():
            want = mergekit_methods.REQUIRED if spec["required"] else spec["default"]
            assert ours[key].default == want, (name, key)
            assert type(ours[key].default) is type(want)
            assert ours[key].per_model == spec["per_model"], (name, key)


def test_a_vector_has_every_parameter_off_its_default() -> None:
    files = mergekit_runs.CONFIGS.glob("**/*.yml")
    texts = [document for file in files for document in yaml.safe_load_all(file.read_text())]
    for name, row in mergekit_methods.METHODS.items():
        mine = [config for config in texts if config["merge_method"] == name]
        places = [config.get("parameters", {}) for config in mine]
        places += [model.get("parameters", {}) for config in mine for model in config.get("models", ())]
        slices = [each for config in mine for each in config.get("slices", ())]
        places += [place.get("parameters", {}) for each in slices for place in (each, *each["sources"])]
        for parameter in row.parameters:
            values = [place[parameter.key] for place in places if parameter.key in place]
            assert any(value != parameter.default for value in values), (name, parameter.key)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("true", 1.0), ('"0.25"', 0.25), ("3", 3.0), ('" 2 "', 2.0), ("off", 0.0)]
)
def test_numbers_are_taken_as_mergekit_takes_them(written: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(TIES + f"parameters: {{lambda: {written}}}\n")
    assert mergekit.read(tmp_path / "c.yml").recipe.options["scale"] == value


@pytest.mark.parametrize(
    ("written", "value"), [("1", "mean"), ("0.0", "sum"), ("'Yes'", "mean"), ("'f'", "sum"), ("[]", "mean")]
)
def test_words_for_true_and_false_are_taken_as_mergekit_takes_them(written: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(TIES + f"parameters: {{normalize: {written}}}\n")
    assert mergekit.read(tmp_path / "c.yml").recipe.options["reduce"] == value


def test_what_steps_from_layer_to_layer_becomes_one_override_for_each(beside_models: Path) -> None:
    translated = mergekit.read(mergekit_runs.CONFIGS / "task-arithmetic-normalize-by-layer.yml")
    overrides = translated.overrides(read(ORACLE / "models" / "base"))
    reduces = ["mean", "mean", "sum", "mean"]
    assert overrides[-4:] == tuple(f"model.layers.{i}.*: scale=1 reduce={how}" for i, how in enumerate(reduces))
    assert all(override.endswith(": scale=1 reduce=mean") for override in overrides[:-4])


def test_float64_is_stored_with_a_remark(beside_models: Path) -> None:
    text = (mergekit_runs.CONFIGS / "linear.yml").read_text().replace("float32", "float64")
    Path("c.yml").write_text(text)
    manifest = modelmerge.replay("c.yml", "out")
    assert any(note.startswith("dtype float64: mergekit computes in it") for note in manifest["notes"])
    want = load_file(ORACLE / "merged" / "linear.safetensors")
    for name, tensor in read(Path("out")).items():
        assert tensor.dtype == torch.float64
        assert (tensor - want[name]).abs().max() <= 1e-6


@pytest.mark.slow
def test_mergekit_still_makes_what_is_kept(tmp_path: Path) -> None:
    mergekit_runs.make(tmp_path)
    for kept in (ORACLE / "merged").glob("**/*.safetensors"):
        place = tmp_path / kept.relative_to(ORACLE)
        new, old = load_file(place), load_file(kept)
        assert new.keys() == old.keys()
        if kept.with_suffix(".json").exists():
            ids = [json.loads(file.with_suffix(".json").read_text())["ids"] for file in (place, kept)]
            new = by_token(new, *ids, drawn=kept.stem in DRAWN)
        assert all((new[name] - old[name]).abs().max() <= 1e-6 for name in old), kept.name


def test_modules_come_out_as_short_overrides(beside_models: Path) -> None:
    manifest = modelmerge.replay(mergekit_runs.CONFIGS / "modules-passthrough.yml", "out")
    assert {*manifest["recipe"]["at"]} == {"multi_modal_projector.*: base", "language_model.*: base"}


def test_a_module_that_there_is_not_is_refused(beside_models: Path) -> None:
    text = (mergekit_runs.CONFIGS / "modules-passthrough.yml").read_text()
    Path("c.yml").write_text(text.replace("vision_tower:", "vision.tower.layers:"))
    with pytest.raises(PlanError, match=r"module 'vision\.tower\.layers'") as refused:
        modelmerge.replay("c.yml", "out")
    assert "language_model.model.layers" in str(refused.value.hint)
    Path("c.yml").write_text(text.replace("vision_tower:", "model.vision_tower.transformer.layers:"))  # as in memory
    ours = read(Path(modelmerge.replay("c.yml", "out") and "out"))
    two = read(ORACLE / "models" / "modules" / "mistral3" / "two")
    layers = [name for name in ours if name.startswith("vision_tower.transformer.layers.")]
    assert layers
    assert all(torch.equal(ours[name], two[name]) for name in layers)
    assert not torch.equal(ours["vision_tower.ln_pre.weight"], two["vision_tower.ln_pre.weight"])


def test_a_filter_of_a_lone_source_goes_by_its_own_layers(beside_models: Path) -> None:
    """As in mergekit: the output's layer 1 is the source's layer 3, which `layers.1.` does not mean."""
    Path("c.yml").write_text(
        "merge_method: passthrough\ndtype: float32\nslices:\n- sources:\n  - model: models/code\n"
        "    layer_range: [2, 4]\n    parameters:\n      scale:\n      - {filter: layers.1., value: 5}\n"
        "      - {filter: layers.3., value: 2}\n      - value: 1\n"
    )
    modelmerge.replay("c.yml", "out")
    got, code = read(Path("out")), read(ORACLE / "models" / "code")
    name = "mlp.up_proj.weight"
    assert torch.equal(got[f"model.layers.0.{name}"], code[f"model.layers.2.{name}"])
    assert torch.equal(got[f"model.layers.1.{name}"], 2 * code[f"model.layers.3.{name}"])


@pytest.mark.parametrize(
    "stage",
    [
        "",
        "name: first\nmerge_method: linear\nmodels:\n- model: models/math\n"
        "  parameters: {weight: 1}\n- model: models/code\n  parameters: {weight: 1}\n---\n",
    ],
)
def test_the_published_command_of_a_recipe_is_the_recipe(stage: str, beside_models: Path) -> None:
    """What no options say is repeated by the manifest, alone and behind another merge."""
    one = "first" if stage else "models/math"
    text = f"{stage}{TIES}chat_template: chatml\n".replace("models/math\n    p", f"{one}\n    p")
    Path("c.yml").write_text(text)
    manifest = modelmerge.replay("c.yml", "out")
    assert bool(stage) == bool(manifest.get("stages"))
    assert published(manifest)["command"] == "modelmerge merge --recipe modelmerge.json -o out"
