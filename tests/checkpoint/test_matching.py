"""Names, ties and shapes in which experts differ from their base: what is sure is matched, the rest refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.cli import main
from modelmerge.errors import PlanError
from modelmerge.plan.tensors import Plan, make_plan
from modelmerge.record.markdown import words
from tests.support.checkpoints import State, expert_state, pickled, read, same, write
from tests.support.hub_server import FakeHub


def noise(**shapes: tuple[int, ...]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {name.replace("__", "."): torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def two_towers(vision: int = 8, text: int = 6) -> State:
    """As CLIP: two towers with like names, different widths, and what joins them."""
    state: State = {"logit_scale": torch.tensor(2.0)}
    for tower, width in (("vision_model", vision), ("text_model", text)):
        state |= noise(
            **{
                f"{tower}__encoder__layers__{i}__{part}": shape
                for i in range(2)
                for part, shape in {"q_proj__weight": (width, width), "q_proj__bias": (width,)}.items()
            }
        )
    state |= noise(vision_model__patch_embedding__weight=(8, 3), text_model__token_embedding__weight=(9, 6))
    return state


def inner(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def under(state: State, prefix: str) -> State:
    return {prefix + name: t for name, t in state.items()}


def with_config(directory: Path, **config: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def planned(base: Path, *experts: Path, **options: Any) -> Plan:
    opened = [open_checkpoint(parse(str(path))) for path in (base, *experts)]
    return make_plan(opened[0], opened[1:], **options)


def told(made: Plan) -> str:
    return " / ".join(remark for expert in made.experts for remark in expert.remarks)


# --- prefixes ---

NAMED: dict[str, tuple[Callable[[State], State], Callable[[State], State], str]] = {
    "a tower without its prefix": (lambda s: s, lambda s: inner(s, "vision_model."), "with 'vision_model.' in front"),
    "a tower of a nested base": (
        lambda s: under(s, "clip."), lambda s: {n: t for n, t in s.items() if n.startswith("vision")},
        "with 'clip.' in front",
    ),
    "a base that is the tower": (
        lambda s: inner(s, "vision_model."), lambda s: s, "without 'vision_model.' in front",
    ),
    "a wrapped expert": (lambda s: s, lambda s: under(s, "module."), "without 'module.' in front"),
    "a wrapped base": (lambda s: under(s, "_orig_mod."), lambda s: s, "with '_orig_mod.' in front"),
    "a head beside the body": (
        lambda s: s, lambda s: {**under(s, "transformer."), "score.weight": torch.ones(2, 2)},
        "without 'transformer.' in front",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_names_are_matched_by_a_unique_prefix(case: str, tmp_path: Path) -> None:
    rename, cut, says = NAMED[case]
    state = two_towers()
    base = write(tmp_path / "base", rename(state))
    tuned = [expert_state(state, seed) for seed in range(2)]
    experts = [write(tmp_path / f"e{i}", cut(expert)) for i, expert in enumerate(tuned)]
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method="average")
    got, origin = read(tmp_path / "out"), read(base)
    assert got.keys() == origin.keys()
    expected = {n: (tuned[0][n] + tuned[1][n]) / 2 for n in state}
    parts = [cut(expert) for expert in tuned]
    merged = 0
    for name, mean in rename(expected).items():
        kept = any(name.endswith(theirs) or theirs.endswith(name) for theirs in parts[0]) and (
            "text_model" not in name or any("text_model" in n for n in parts[0])
        )
        assert torch.allclose(got[name], mean if kept else origin[name], atol=1e-6), name
        merged += kept
    assert manifest["tensors"]["merged"] == merged > 3
    assert [note for note in manifest["notes"] if says in note and note.startswith("'e0': its names are the base's")]
    assert words(says) in (tmp_path / "out" / "README.md").read_text()


def test_the_plan_says_how_names_were_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base", two_towers())
    expert = write(tmp_path / "sun", inner(expert_state(two_towers(), 0), "vision_model."))
    words = ["merge", "average", str(base), str(expert), "-o", str(tmp_path / "out"), "-n"]
    assert main(words) == 0
    says = "'sun': its names are the base's with 'vision_model.' in front: 5 of its 5 tensors are matched so."
    assert says in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["remarks"] == [says]
    assert {t["name"] for t in plan["tensors"] if t["action"] == "copy"} == {
        name for name in two_towers() if not name.startswith("vision_model.")
    }


def test_a_bare_tower_is_extracted_under_the_bases_names(tmp_path: Path) -> None:
    base = write(tmp_path / "base", two_towers())
    expert = write(tmp_path / "sun", inner(expert_state(two_towers(), 0), "vision_model."))
    modelmerge.extract(base, [expert], tmp_path / "vectors")
    manifest = json.loads((tmp_path / "vectors" / "modelmerge.json").read_bytes())
    assert manifest["remarks"] == [
        "'sun': its names are the base's with 'vision_model.' in front: 5 of its 5 tensors are matched so."
    ]
    assert set(read(tmp_path / "vectors" / "sun")) == {n for n in two_towers() if n.startswith("vision_model.")}
    modelmerge.merge(base, [tmp_path / "vectors" / "sun"], tmp_path / "one", method="average")
    modelmerge.merge(base, [expert], tmp_path / "two", method="average")
    assert same(read(tmp_path / "one"), read(tmp_path / "two"))


def test_two_prefixes_that_fit_are_refused(tmp_path: Path) -> None:
    state = two_towers(vision=6)
    base = write(tmp_path / "base", state)
    expert = write(tmp_path / "e", {n: t for n, t in inner(state, "vision_model.").items() if "layers" in n})
    with pytest.raises(PlanError) as caught:
        planned(base, expert)
    assert caught.value.message.startswith("'e': its 'encoder.layers.0.")
    assert "'vision_model.encoder.layers.0." in caught.value.message
    assert "'text_model.encoder.layers.0." in caught.value.message


def test_what_stands_beside_a_tower_keeps_its_name(tmp_path: Path) -> None:
    state = two_towers()
    base = write(tmp_path / "base", state)
    expert = write(tmp_path / "e", {**inner(state, "vision_model."), "logit_scale": state["logit_scale"]})
    made = planned(base, expert)
    assert {n for n, t in made.tensors.items() if t.action == "merge"} == {
        "logit_scale", *(name for name in state if name.startswith("vision_model.")),
    }  # fmt: skip


def test_a_prefix_that_would_take_a_name_that_agrees_is_refused(tmp_path: Path) -> None:
    """The expert's `scale` is the base's as it stands, all others only under a prefix, where `scale` is another."""
    state = {**two_towers(), "vision_model.scale": torch.ones(2), "scale": torch.ones(2)}
    base = write(tmp_path / "base", state)
    expert = write(tmp_path / "e", {**inner(state, "vision_model."), "scale": torch.ones(2)})
    with pytest.raises(PlanError, match=r"could be the base's 'scale' or 'vision_model\.scale'"):
        planned(base, expert)
    other = write(tmp_path / "other", {**state, "vision_model.scale": torch.ones(3)})
    assert planned(other, expert).tensors["scale"].action == "merge"  # the shapes tell


def test_shapes_decide_between_towers(tmp_path: Path) -> None:
    state = two_towers()
    expert = {n: t for n, t in inner(state, "text_model.").items() if "layers.0" in n}
    other = {n: t for n, t in inner(state, "text_model.").items() if "layers" in n}
    base = write(tmp_path / "base", state)
    few = planned(base, write(tmp_path / "few", {**expert, **{f"x.{i}": torch.ones(1) for i in range(4)}}))
    assert {n for n, t in few.tensors.items() if t.action == "merge"} == set(under(expert, "text_model."))
    assert set(few.expert_only) == {f"x.{i}" for i in range(4)}
    made = planned(base, write(tmp_path / "e", other))
    assert {n for n, t in made.tensors.items() if t.action == "merge"} == set(under(other, "text_model."))


def test_norms_called_gamma_and_beta_are_weight_and_bias(tmp_path: Path) -> None:
    new = noise(LayerNorm__weight=(4,), LayerNorm__bias=(4,), dense__weight=(4, 4), dense__bias=(4,))
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for n, t in new.items()}
    for base, expert in ((old, new), (new, old)):
        where = tmp_path / next(iter(base))
        made = planned(write(where / "base", base), write(where / "e", expert))
        assert {t.action for t in made.tensors.values()} == {"merge"}
        assert made.tensors.keys() == base.keys()
        assert "gamma and beta" in told(made)


# --- ties ---

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Save = Callable[[Path, State], Path]


def language_model(*, head: str | None = "tied", seed: int | None = None) -> State:
    state = noise(model__embed_tokens__weight=(12, 4), model__layers__0__q_proj__weight=(4, 4))
    if seed is not None:
        state = expert_state(state, seed)
    if head == "tied":
        state[HEAD] = state[EMBEDDING]
    elif head == "own":
        state[HEAD] = state[EMBEDDING] * 3
    return state


def copies(directory: Path, state: State) -> Path:
    """Safetensors, where what was tied lies twice."""
    return write(directory, {name: tensor.clone() for name, tensor in state.items()})


@pytest.mark.parametrize("save", [pickled, copies], ids=["one storage", "copies"])
@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_a_head_that_only_the_base_stores_follows_its_embedding(save: Save, method: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", language_model())
    experts = [write(tmp_path / f"e{i}", language_model(head=None, seed=i)) for i in range(2)]
    manifest = modelmerge.merge(base, experts, tmp_path / "out", method=method)
    got = read(tmp_path / "out")
    assert got.keys() == language_model().keys()
    assert torch.equal(got[HEAD], got[EMBEDDING])
    assert not torch.equal(got[EMBEDDING], language_model()[EMBEDDING])
    assert (
        f"'e0': it leaves '{HEAD}' out, which in the base is the same as '{EMBEDDING}': read from there."
        in (manifest["notes"])
    )
    assert set(manifest["tensors"]["tied"]) == {HEAD}
    # The bits are those of a base that stores the tensor once.
    single = write(tmp_path / "single", language_model(head=None))
    modelmerge.merge(single, experts, tmp_path / "want", method=method)
    assert torch.equal(read(tmp_path / "want")[EMBEDDING], got[EMBEDDING])
    assert torch.equal(read(tmp_path / "want")["model.layers.0.q_proj.weight"], got["model.layers.0.q_proj.weight"])


@pytest.mark.parametrize("save", [pickled, copies], ids=["one storage", "copies"])
def test_a_head_that_only_experts_store_is_left_out_where_it_is_their_embedding(save: Save, tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(head=None))
    made = planned(base, save(tmp_path / "e", language_model(seed=0)))
    assert made.expert_only == {}
    assert f"its '{HEAD}' is the same as its '{EMBEDDING}' and is left out, as in the base" in told(made)


@pytest.mark.parametrize("save", [pickled, copies], ids=["one storage", "copies"])
def test_tied_tensors_that_all_store_are_merged_as_one(save: Save, tmp_path: Path) -> None:
    base = save(tmp_path / "base", language_model())
    experts = [save(tmp_path / f"e{i}", language_model(seed=i)) for i in range(2)]
    modelmerge.merge(base, experts, tmp_path / "out", method="dare", seed=3)
    got = read(tmp_path / "out")
    assert torch.equal(got[HEAD], got[EMBEDDING])
    made = planned(base, *experts)
    assert made.tensors[EMBEDDING].twin is None
    assert made.tensors[HEAD].twin == EMBEDDING
    assert planned(base, *experts, exclude=[EMBEDDING]).tensors[HEAD].twin is None


@pytest.mark.parametrize("stream", [False, True], ids=["fetched", "streamed"])
def test_ties_of_a_base_on_the_hub_are_found_without_fetching_it(hub: FakeHub, stream: bool, tmp_path: Path) -> None:
    hub.add("org/base", copies(tmp_path / "base", language_model()))
    expert = write(tmp_path / "e", language_model(head=None, seed=0))
    modelmerge.merge("org/base", [expert], tmp_path / "out", method="average", stream=stream)
    modelmerge.merge(tmp_path / "base", [expert], tmp_path / "want", method="average")
    assert same(read(tmp_path / "out"), read(tmp_path / "want"))
    assert torch.equal(read(tmp_path / "out")[HEAD], read(tmp_path / "out")[EMBEDDING])


def test_task_vectors_of_tied_models_stay_tied(tmp_path: Path) -> None:
    base = copies(tmp_path / "base", language_model())
    experts = [write(tmp_path / f"e{i}", language_model(head=None, seed=i)) for i in range(2)]
    told = modelmerge.extract(base, experts, tmp_path / "vectors")
    assert [expert["entries_not_restored"] for expert in told["experts"]] == [0, 0]
    vectors = [tmp_path / "vectors" / f"e{i}" for i in range(2)]
    modelmerge.merge(base, vectors, tmp_path / "out", method="dare")
    modelmerge.merge(base, experts, tmp_path / "want", method="dare")
    got = read(tmp_path / "out")
    assert torch.equal(got[HEAD], got[EMBEDDING])
    assert torch.equal(got[EMBEDDING], read(tmp_path / "want")[EMBEDDING])


def test_an_untied_expert_of_a_tied_base_keeps_its_own_head(tmp_path: Path) -> None:
    base = pickled(tmp_path / "base", language_model())
    expert = copies(tmp_path / "e", language_model(head="own", seed=0))
    assert planned(base, expert).tensors[HEAD].twin is None
    modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    assert torch.allclose(read(tmp_path / "out")[HEAD], read(expert)[HEAD], atol=1e-6)


@pytest.mark.parametrize(
    ("base", "expert", "config", "says"),
    [
        ("tied", None, {"base": False}, "the config of base says that they are not tied"),
        ("tied", None, {"e": False}, "the config of e says that they are not tied"),
        ("own", None, {"e": True}, "other than 'model.embed_tokens.weight' in the base, but missing in e"),
        (None, "own", {}, "of its own in e, other than 'model.embed_tokens.weight'; the base has none"),
        (None, "own", {"base": True, "e": False}, "of its own in e, other than"),
    ],
)
def test_ties_that_are_not_sure_are_refused(
    base: str | None, expert: str | None, config: dict[str, bool], says: str, tmp_path: Path
) -> None:
    paths = [copies(tmp_path / "base", language_model(head=base)), copies(tmp_path / "e", language_model(head=expert))]
    for name, tied in config.items():
        with_config(tmp_path / name, tie_word_embeddings=tied)
    with pytest.raises(PlanError) as caught:
        planned(*paths)
    assert f"'{HEAD}': " in caught.value.message
    assert says in caught.value.message
    assert "exclude" in (caught.value.hint or "")
    made = planned(*paths, exclude=[HEAD])
    assert made.tensors[EMBEDDING].action == "merge"


def test_a_base_without_a_head_takes_experts_with_one(tmp_path: Path) -> None:
    base = with_config(write(tmp_path / "base", language_model(head=None)), tie_word_embeddings=False)
    expert = write(tmp_path / "e", language_model(head="own", seed=0))
    assert planned(base, expert).expert_only == {HEAD: ("e",)}


def test_experts_without_a_head_leave_the_base_its_own(tmp_path: Path) -> None:
    base = write(tmp_path / "base", language_model(head="own"))
    made = planned(base, write(tmp_path / "e", language_model(head=None, seed=0)))
    assert made.tensors[HEAD].reason == "only in the base"


def encoder_decoder(*tables: str, seed: int | None = None) -> State:
    state = noise(table=(12, 4), encoder__block__0__q__weight=(4, 4))
    state = state if seed is None else expert_state(state, seed)
    table = state.pop("table")
    return {**dict.fromkeys(tables, table), **state, "lm_head.weight": table * 2}


TABLES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@pytest.mark.parametrize("ours", [TABLES, TABLES[:1], TABLES[1:2], TABLES[1:]], ids=len)
@pytest.mark.parametrize("theirs", [TABLES, TABLES[:1], TABLES[1:2], TABLES[1:]], ids=len)
def test_the_table_of_an_encoder_decoder_goes_by_any_of_its_names(
    ours: tuple[str, ...], theirs: tuple[str, ...], tmp_path: Path
) -> None:
    base = pickled(tmp_path / "base", encoder_decoder(*ours))
    with_config(base, tie_word_embeddings=False)  # the head is its own; the tables are one all the same
    expert = pickled(tmp_path / "e", encoder_decoder(*theirs, seed=0))
    manifest = modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    got, want = read(tmp_path / "out"), encoder_decoder(*ours, seed=0)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name
    assert not manifest["tensors"]["expert_only"]


def test_equal_tensors_that_no_names_tie_are_not_tied(tmp_path: Path) -> None:
    """Biases of zeros are equal everywhere."""
    base = write(tmp_path / "base", {"a.bias": torch.zeros(4), "b.bias": torch.zeros(4), "w": torch.ones(4)})
    made = planned(base, write(tmp_path / "e", {"a.bias": torch.ones(4), "w": torch.ones(4)}))
    assert made.tensors["b.bias"].reason == "only in the base"


# --- shapes ---


def vocabulary(rows: int, seed: int | None = None) -> State:
    state = noise(model__embed_tokens__weight=(20, 4), lm_head__weight=(20, 4), lm_head__bias=(20,), fc__weight=(4, 4))
    state = state if seed is None else expert_state(state, seed)
    return {name: tensor if name == "fc.weight" else tensor[:rows].contiguous() for name, tensor in state.items()}


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(16, 18, 20), (18, 16, 20), (20, 17, 16), (16, 18, 16)], ids=str)
def test_common_rows_are_merged_and_the_others_are_the_bases(
    rows: tuple[int, ...], dtype: torch.dtype, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelmerge.engine.job.CPU_BLOCK", 20)
    states = [{n: t.to(dtype) for n, t in vocabulary(count, i or None).items()} for i, count in enumerate(rows)]
    paths = [write(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method=method, on_mismatch="common-rows")
    got, common = read(tmp_path / "out"), min(rows)
    assert {name: tensor.shape for name, tensor in got.items()} == {n: t.shape for n, t in states[0].items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        assert torch.equal(got[name][common:], states[0][name][common:]), name
        assert not torch.equal(got[name][:common], states[0][name][:common]), name
        if method == "average":
            mean = torch.stack([s[name][:common].double() for s in states[1:]]).mean(0)
            assert torch.allclose(got[name][:common].double(), mean, atol=1e-6 if dtype == torch.float32 else 2e-3)
        assert manifest["tensors"]["common_rows"][name] == common
        assert (
            f"'{name}': shared by all: the first {common} rows are merged, the base's others kept." in manifest["notes"]
        )
    assert "--on-mismatch common-rows" in manifest["command"]
    assert (
        modelmerge.replay(tmp_path / "out", tmp_path / "again")["files"]["model.safetensors"]
        == (manifest["files"]["model.safetensors"])
    )


def test_a_matrix_method_keeps_the_bases_other_rows(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"m{i}", vocabulary(rows, i or None)) for i, rows in enumerate((20, 16, 18))]
    modelmerge.merge(
        paths[0], paths[1:], tmp_path / "out", method="apgd", published=True, steps=3, on_mismatch="common-rows",
        include=["*.weight"], exclude=["*.bias"],
    )  # fmt: skip
    got, origin = read(tmp_path / "out"), vocabulary(20)
    assert torch.equal(got["lm_head.weight"][16:], origin["lm_head.weight"][16:])
    assert not torch.equal(got["lm_head.weight"][:16], origin["lm_head.weight"][:16])


def test_nan_beyond_the_common_rows_is_not_read_and_within_is_refused(tmp_path: Path) -> None:
    base, expert = vocabulary(16), vocabulary(20, 1)
    expert["lm_head.weight"][17] = torch.nan
    paths = [write(tmp_path / "base", base), write(tmp_path / "e", expert)]
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", on_mismatch="common-rows")
    assert read(tmp_path / "out")["lm_head.weight"].isfinite().all()
    expert["lm_head.weight"][15] = torch.nan
    write(tmp_path / "e", expert)
    with pytest.raises(modelmerge.errors.CheckpointError, match=r"'lm_head\.weight' of 'e' holds NaN"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "again", method="average", on_mismatch="common-rows")


def test_copy_takes_whatever_differs_in_shape_from_the_base(tmp_path: Path) -> None:
    base, expert = vocabulary(16), {**vocabulary(20, 1), "fc.weight": torch.zeros(4, 5)}
    base["other"], expert["other"] = torch.zeros(3), torch.ones(3)
    paths = [write(tmp_path / "base", base), write(tmp_path / "e", expert)]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", on_mismatch="copy")
    assert same(read(tmp_path / "out"), {**base, "other": torch.ones(3)})
    reason = "shape [16, 4] in the base, but [20, 4] in e"
    assert manifest["tensors"]["copied"]["lm_head.weight"] == reason
    assert f"'lm_head.weight': {reason}." in manifest["notes"]


def test_common_rows_are_for_vocabularies_only(tmp_path: Path) -> None:
    base, expert = vocabulary(16), vocabulary(20, 1)
    base["fc.weight"] = torch.zeros(3, 4)
    expert["lm_head.weight"] = torch.zeros(20, 5)
    with pytest.raises(PlanError) as caught:
        planned(write(tmp_path / "base", base), write(tmp_path / "e", expert), on_mismatch="common-rows")
    assert "'fc.weight': shape [3, 4] in the base, but [4, 4] in e" in caught.value.message
    assert "'lm_head.weight': shape [16, 4] in the base, but [20, 5] in e" in caught.value.message
    assert len(caught.value.message.splitlines()) == 3
    with pytest.raises(PlanError) as caught:
        planned(tmp_path / "base", tmp_path / "e")
    assert len(caught.value.message.splitlines()) == 5
    assert "on_mismatch copy" in (caught.value.hint or "")
    assert "common-rows" in (caught.value.hint or "")


# --- quantised weights, by what they consist of ---

QUANTISED = {
    "GPTQ or AWQ": {"q_proj.qweight": torch.zeros(2, 8, dtype=torch.int32), "q_proj.scales": torch.ones(1, 8).half()},
    "bitsandbytes, 4 bits": {"q_proj.weight.absmax": torch.ones(4), "q_proj.weight": torch.zeros(8, 1).byte()},
    "bitsandbytes, 8 bits": {"q_proj.SCB": torch.ones(4), "q_proj.weight": torch.zeros(4, 4).char()},
    "fp8": {"q_proj.weight_scale_inv": torch.ones(1), "q_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    "MXFP4": {"experts.gate_up_proj_blocks": torch.zeros(2, 4, 4).byte()},
    "I8 weights": {"q_proj.weight": torch.zeros(4, 4).char()},
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("culprit", ["base", "e"])
def test_quantised_weights_are_known_without_a_config(kind: str, culprit: str, tmp_path: Path) -> None:
    for name in ("base", "e"):
        write(tmp_path / name, {**vocabulary(4), **(QUANTISED[kind] if name == culprit else {})})
    with pytest.raises(PlanError) as caught:
        planned(tmp_path / "base", tmp_path / "e")
    assert caught.value.message.startswith(f"{tmp_path / culprit}: its weights are quantised ({kind}")
    assert "unquantised" in (caught.value.hint or "")
