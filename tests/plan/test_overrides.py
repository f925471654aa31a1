"""Overrides: another method or other values for some tensors; the first whose glob matches decides."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint.staging import Staging
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import RecipeError, UsageError
from modelmerge.methods import registry, threshold
from modelmerge.plan import format_1, overrides
from modelmerge.plan.overrides import Curve, Override
from tests.support.checkpoints import SHAPES, State, base_state, expert_state, read, same_bits, write
from tests.support.methods import takes

NAMES = registry.data_free()
ATTENTION, UP = "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
DOWN, BIAS, NORM = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.mlp.up_proj.bias",
    "model.layers.0.norm.weight",
)
FLOATING = list(SHAPES)


def merged(models: list[Path], out: Path, **options: Any) -> State:
    modelmerge.merge(models[0], models[1:], out, **options)
    return read(out)


def groups(manifest: dict[str, Any]) -> list[tuple[str, set[str]]]:
    return [(group["method"], set(group["tensors"])) for group in manifest["tensors"]["groups"]]


def taus(models: list[Path], key: str) -> list[torch.Tensor]:
    base, *experts = (read(path)[key].double() for path in models)
    return [expert - base for expert in experts]


# --- the grammar ---


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("*mlp*: scale=0.2", Override("*mlp*", None, {"scale": "0.2"})),
        ("*.[0-3].*: tsv-m", Override("*.[0-3].*", "tsv-m")),
        ("*: ties trim-scope=tensor scale=0.1,1", Override("*", "ties", {"trim_scope": "tensor", "scale": "0.1,1"})),
        ("a: b: scale=1", Override("a", "b:", {"scale": "1"})),  # the first ': ' ends the glob
        ("*: math.weight=0 a.b=c.t=5", Override("*", None, {}, {("math", "weight"): "0", ("a.b=c", "t"): "5"})),
        ("*: 'my expert.weight=2'", Override("*", None, {}, {("my expert", "weight"): "2"})),
        ("x y*: base", Override("x y*", "base")),
        ("*norm*:", Override("*norm*")),
    ],
)  # fmt: skip
def test_grammar_and_back(text: str, override: Override) -> None:
    assert overrides.parse(text) == override
    assert overrides.parse(str(override)) == override


@pytest.mark.parametrize(
    "text", ["", "scale=1", ": ties", "*:ties", "*: ties average", "*: =1", "*: scale=", "*: .weight=1", "*: a=1 a=2",
             "*: x.a=1 x.a=2", "*: 'unfinished"],
)  # fmt: skip
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^at '"):
        overrides.parse(text)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("*mlp*: teis", "there is no merge method 'teis'"),
        ("*mlp*: sclae=1", "'ties' has no option 'sclae'"),
        ("*mlp*: tsv-m density=0.1", "'tsv-m' has no option 'density'"),
        ("*mlp*: density=2", "density must be above 0 and at most 1, not 2"),
        ("*mlp*: reduce=max", "reduce must be one of sum, mean"),
        ("*: expert_9.weight=1", "'expert_9' is no expert"),
        ("*: expert_0.scale=1", "scale of 'ties' is one value for all experts"),
        ("*: expert_0.reduce=mean", "reduce of 'expert_0' is no number"),
        ("*: density=0.1,0.5", "is a share of the whole task vector and cannot differ between layers"),
        ("*: expert_0.density=0.1,0.5", "is a share of the whole task vector and cannot differ between layers"),
        ("*: weight=x", "weight"),
        ("*mlp*: base scale=1", "'base' copies the base and has no options"),
        ("*nothing*: scale=1", "matches no tensor of the base"),
        ("*position_ids: scale=1", "changes none of the tensors that it matches: they are copied"),
        ("*norm*: tsv-m", "changes none of the tensors|no weights of linear layers"),
        ("*mlp*: slerp", "'slerp' takes 2 experts at most, and 3 are named|takes one expert"),
    ],
)
def test_what_an_override_cannot_say_is_refused(at: str, says: str, models: list[Path], tmp_path: Path) -> None:
    options = {"rest": "base"} if "norm" in at else {}
    with pytest.raises(UsageError, match=says):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", at=[at], **options)
    assert not (tmp_path / "out").exists()


def test_an_override_behind_one_that_matches_the_same_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an override before it matches them"):
        merged(models, tmp_path / "out", method="ties", at=["*mlp*: scale=1", "*up_proj*: scale=2"])


def test_depth_is_by_layer_and_prefix() -> None:
    names = ["e.w", "a.layers.0.w", "a.layers.1.w", "a.layers.4.w", "b.h.0.w", "only.0.w"]
    assert overrides.depths(names) == {
        "e.w": 0.0, "a.layers.0.w": 0.0, "a.layers.1.w": 0.25, "a.layers.4.w": 1.0, "b.h.0.w": 1.0, "only.0.w": 1.0,
    }  # fmt: skip
    assert [Curve((0.0, 1.0, 5.0)).at(depth) for depth in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 1.0, 5.0]


# --- what is merged ---


@pytest.mark.parametrize("name", NAMES)
def test_every_method_merges_its_tensors_as_if_alone(
    name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in blocks, and with statistics of its own tensors only; the others as without it."""
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    few = models[: 1 + takes(name, 3)]
    got = merged(few, tmp_path / "out", method="ties", at=[f"*layers*: {name}"], density=0.4, rest="base")
    theirs = merged(few, tmp_path / "theirs", method=name, include=["*layers*"], rest="base")
    taken = [key for key in FLOATING if "layers" in key]
    ours = merged(few, tmp_path / "ours", method="ties", density=0.4, exclude=taken)
    want = ours | {key: theirs[key] for key in taken}
    differs = {key for key in want if not torch.equal(got[key], want[key])}
    assert differs == set() if name != "ties" else True  # ties beside ties of other options: two trims
    assert not same_bits(got, ours)


def test_an_override_that_names_what_is_there_changes_nothing(models: list[Path], tmp_path: Path) -> None:
    for method in ("ties", "apgd", "della"):
        plain = merged(models, tmp_path / f"{method}-plain", method=method)
        same = merged(
            models, tmp_path / f"{method}-same", method=method, at=[f"*mlp*: {method}", "*norm*:", "*q_proj*: weight=1"]
        )
        assert same_bits(plain, same)  # fmt: skip


def test_the_first_that_matches_decides_alone(models: list[Path], tmp_path: Path) -> None:
    at = ["*.layers.0.q_proj*: base", "*.bias: average", "*mlp*: tsv-m", "*.layers.*: task-arithmetic scale=0.7"]
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", at=at)
    assert dict(groups(manifest)) == {
        "average": {BIAS, "model.embed_tokens.weight", "logit_scale", "empty"},  # an override, and the rest of apgd
        "tsv-m": {UP, DOWN}, "task-arithmetic": {NORM},
    }  # fmt: skip
    assert manifest["tensors"]["copied"][ATTENTION] == "override '*.layers.0.q_proj*': base"
    got = read(tmp_path / "out")
    want = read(models[0])[NORM].double() + 0.7 * sum(taus(models, NORM))
    assert torch.allclose(got[NORM].double(), want, atol=1e-7)
    assert torch.equal(got[ATTENTION], read(models[0])[ATTENTION])


def test_without_a_method_the_commands_options_stay(models: list[Path], tmp_path: Path) -> None:
    got = merged(models, tmp_path / "out", method="task-arithmetic", scale=0.5, at=["*mlp*: scale=2", "*q_proj*:"])
    for key, scale in ((UP, 2.0), (ATTENTION, 0.5), (NORM, 0.5)):
        want = read(models[0])[key].double() + scale * sum(taus(models, key))
        assert torch.allclose(got[key].double(), want, atol=1e-6)
    named = merged(models, tmp_path / "named", method="task-arithmetic", scale=0.5, at=["*mlp*: task-arithmetic"])
    want = read(models[0])[UP].double() + 0.577 * sum(taus(models, UP))  # the method's default, for it is named
    assert torch.allclose(named[UP].double(), want, atol=1e-6)


def test_values_differ_by_expert_and_layer(models: list[Path], tmp_path: Path) -> None:
    at = ["*.layers.*: scale=1,3 expert_1.weight=0,2", "*embed*: expert_0.weight=5"]
    got = merged(models, tmp_path / "out", method="task-arithmetic", scale=1.0, weights={"expert_2": 0.5}, at=at)
    for key, scale, weights in (
        (UP, 1.0, (1, 0, 0.5)), (DOWN, 3.0, (1, 2, 0.5)), ("model.embed_tokens.weight", 1.0, (5, 1, 0.5)),
        ("logit_scale", 1.0, (1, 1, 0.5)),
    ):  # fmt: skip
        want = read(models[0])[key].double()
        want = want + scale * sum(w * tau for w, tau in zip(weights, taus(models, key), strict=True))
        assert torch.allclose(got[key].double(), want, atol=1e-6), key


@pytest.mark.parametrize("sampled", [1 << 24, 1])
def test_a_density_of_the_whole_model_can_differ_between_experts(
    sampled: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "SAMPLED", sampled)
    at = ["*: density=0.5 expert_2.density=0.05"]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", scale=1.0, at=at)
    states, got = [read(path) for path in models], read(tmp_path / "out")
    names = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    ups, downs = torch.zeros(1), torch.zeros(1)
    for density, expert in zip((0.5, 0.5, 0.05), states[1:], strict=True):
        tau = torch.cat([(expert[name] - states[0][name]).flatten() for name in names])
        kept = tau * (tau.abs() >= tau.abs().sort(descending=True).values[int(density * len(tau))])
        ups, downs = ups + kept.clamp(min=0), downs + kept.clamp(max=0)
    want = torch.where(ups + downs > 0, ups, torch.where(ups + downs < 0, downs, 0.0))
    merged_vector = torch.cat([(got[name] - states[0][name]).flatten() for name in names])
    assert torch.allclose(merged_vector, want, atol=1e-7)


def test_a_trim_over_the_model_is_over_tensors_of_the_same_options(models: list[Path], tmp_path: Path) -> None:
    """Another density is another trim; another scale is not."""
    got = merged(models, tmp_path / "out", method="ties", density=0.5, scale=1.0, at=["*mlp*: density=0.1 scale=0.5"])
    base, *experts = ({k: t.double() for k, t in read(path).items()} for path in models)
    for density, scale, mlp in ((0.5, 1.0, False), (0.1, 0.5, True)):
        keys = [key for key in FLOATING if ("mlp" in key) == mlp]
        vectors = torch.stack([torch.cat([(e[k] - base[k]).flatten() for k in keys]) for e in experts]).float()
        least = vectors.abs().sort(dim=1, descending=True).values[:, int(density * vectors.shape[1])]
        kept = (vectors * (vectors.abs() >= least[:, None])).double()
        sums = kept.sum(0)
        want = scale * torch.where(sums.sign() == kept.sign(), kept, 0).sum(0)
        assert torch.allclose(torch.cat([(got[k].double() - base[k]).flatten() for k in keys]), want, atol=1e-7)
    one = merged(models, tmp_path / "one", method="ties", scale=1.0)
    half = merged(models, tmp_path / "half", method="ties", scale=1.0, at=["*mlp*: scale=0.5"])
    assert torch.allclose(half[UP] - base[UP].float(), 0.5 * (one[UP] - base[UP].float()), atol=1e-7)
    assert torch.equal(half[ATTENTION], one[ATTENTION])


def test_the_rest_goes_by_the_weights_too(models: list[Path], tmp_path: Path) -> None:
    got = merged(models, tmp_path / "out", method="kron", rest="average", at=["*: expert_0.weight=3"])
    want = read(models[0])[NORM].double() + sum(w * t for w, t in zip((0.6, 0.2, 0.2), taus(models, NORM), strict=True))
    assert torch.allclose(got[NORM].double(), want, atol=1e-7)


def test_weights_that_add_up_to_nothing_are_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the weights add up to zero"):
        merged(models, tmp_path / "out", method="ties", at=["*q_proj*: average weight=0"])


def test_curves_need_layers(tmp_path: Path) -> None:
    base = {"a": base_state()["model.embed_tokens.weight"]}
    paths = [write(tmp_path / "b", base), write(tmp_path / "e", expert_state(base, 0))]
    with pytest.raises(UsageError, match="no tensor that is merged has a numbered layer"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="ties", at=["*: scale=0,1"])


# --- what is recorded ---


def test_the_recipe_and_the_command_repeat_it(models: list[Path], tmp_path: Path) -> None:
    at = ["*q_proj*: tsv-m scale=0.8", "*mlp*: apgd", "*norm*: expert_0.weight=0.25"]
    words = ["merge", "ties", *map(str, models), *(word for text in at for word in ("--at", text))]
    assert main([*words, "-o", str(tmp_path / "one"), "-q"]) == 0
    manifest = json.loads((tmp_path / "one" / "modelmerge.json").read_text())
    assert manifest["recipe"]["at"][0].startswith("*q_proj*: tsv-m scale=0.8")
    assert "ridge=1" in manifest["recipe"]["at"][1], "defaults are written down: they may change"
    assert manifest["recipe"]["at"][2] == at[2]
    assert main(["merge", "--recipe", str(tmp_path / "one"), "-o", str(tmp_path / "two"), "-q"]) == 0
    again = shlex.split(manifest["command"])[1:]
    again[again.index("-o") + 1] = str(tmp_path / "three")
    assert main([*again, "-q"]) == 0
    want = read(tmp_path / "one")
    for name in ("two", "three"):
        assert same_bits(read(tmp_path / name), want)
        recipe = json.loads((tmp_path / name / "modelmerge.json").read_text())["recipe"]
        assert recipe["at"] == manifest["recipe"]["at"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| `--at` | `*q_proj*: tsv-m scale=0.8" in card
    assert {"- tsv-m", "- apgd", "- ties"} <= set(card.split("---")[1].splitlines())


def test_an_interrupted_merge_is_resumed_to_the_same_bits(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"method": "ties", "at": ["*mlp*: kron", "*norm*: average"], "max_shard_size": "2KB"}
    want = merged(models, tmp_path / "want", **options)
    publish = Staging.publish

    def fail(self: Staging, manifest: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "publish", fail)
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path / "out", resume=True, **options)
    monkeypatch.setattr(Staging, "publish", publish)
    assert same_bits(merged(models, tmp_path / "out", resume=True, **options), want)


def test_the_plan_says_which_tensor_goes_where(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "apgd", *map(str, models), "-o", str(tmp_path / "out"), "--at", "*mlp*: ties density=0.1", "-n"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert sorted((group["method"], len(group["tensors"])) for group in plan["groups"]) == [
        ("apgd", 1), ("average", 4), ("ties", 3),
    ]  # fmt: skip
    reasons = {tensor["name"]: tensor["reason"] for tensor in plan["tensors"]}
    assert reasons[BIAS] == "override '*mlp*': ties"
    assert reasons[ATTENTION] == "the weight of a linear layer"
    assert main(words) == 0
    assert re.search(r"merge +3 +override '\*mlp\*': ties", capsys.readouterr().out)


# --- manifests of format 1 ---


def as_format_1(manifest: dict[str, Any], file: Path, **entries: Any) -> Path:
    """The manifest as version 0.1.0 wrote it, with what it recorded in the place of overrides."""
    stored = {key: value for key, value in manifest["recipe"].items() if key != "at"}
    stored |= {"vary": [], "rule": [], "layer_scale": None, "task_lambda": None, **entries}
    if isinstance(stored.get("disentangle"), list):
        stored |= {"disentangle": None, "disentangle_options": {}}
    file.write_text(json.dumps({**manifest, "format": 1, "recipe": stored}))
    return file


@pytest.mark.parametrize(
    ("entries", "at"),
    [
        ({"vary": ["scale=0.5@*mlp*", "expert_1:weight=0,2"]},
         ["*mlp*: scale=0.5 expert_1.weight=0,2", "*: expert_1.weight=0,2"]),
        ({"vary": ["scale=0.5@*mlp*", "scale=0.7@*up_proj*"]}, ["*up_proj*: scale=0.7", "*mlp*: scale=0.5"]),
        ({"rule": ["*mlp*=ties density=0.5 scale=0.7"]}, ["*mlp*: ties density=0.5 scale=0.7"]),
        ({"rule": ["*layers*=tsv-m scale=0.5"]}, ["*proj.weight: tsv-m scale=0.5"]),
        ({"layer_scale": "0.5,1.5"}, ["*embed*:", "logit_scale:", "*layers*: weight=0.5,1.5"]),
        ({"layer_scale": '{"*mlp*": 0.5, "*": 2}'}, ["*mlp*: weight=0.5", "*: weight=2"]),
    ],
)  # fmt: skip
def test_recipes_of_format_1_replay(entries: dict[str, Any], at: list[str], models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="task-arithmetic")
    want = merged(models, tmp_path / "want", method="task-arithmetic", at=at)
    old = as_format_1(manifest, tmp_path / "old.json", **entries)
    modelmerge.replay(old, tmp_path / "again")
    assert same_bits(read(tmp_path / "again"), want)
    assert not same_bits(want, read(tmp_path / "plain"))


def test_transforms_of_format_1_replay(models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="ties")
    entries = {"disentangle": "awd", "disentangle_options": {"alpha": 0.2, "solver": "descent", "granularity": "row"}}
    modelmerge.replay(as_format_1(manifest, tmp_path / "old.json", **entries), tmp_path / "again")
    want = merged(models, tmp_path / "want", method="ties", disentangle="awd alpha=0.2 granularity=row")
    assert same_bits(read(tmp_path / "again"), want)
    assert not same_bits(want, read(tmp_path / "plain"))


def test_apgds_options_of_format_1_replay(models: list[Path], tmp_path: Path) -> None:
    """As version 0.1.0 recorded them: every knob with its value, the paper's mode by name."""
    gone = {"inner": "row", "trim_scope": "model", "task_rank": None, "relative_lr": None}
    for name, options, mode in (
        ("default", {}, {"lambda_mode": "matched", "scale": None, "tolerance": None}),
        ("published", {"published": True, "steps": 5}, {"lambda_mode": "paper", "scale": None, "tolerance": 1e-11}),
    ):
        manifest = modelmerge.merge(models[0], models[1:], tmp_path / name, method="apgd", **options)
        stored = {key: value for key, value in manifest["recipe"]["options"].items() if key != "published"}
        old = as_format_1(manifest, tmp_path / "old.json", options={**stored, **gone, **mode})
        modelmerge.replay(old, tmp_path / "again", force=True)
        assert same_bits(read(tmp_path / "again"), read(tmp_path / name))
    knob = as_format_1(manifest, tmp_path / "old.json", options={**stored, **gone, **mode, "inner": "matrix"})
    with pytest.raises(RecipeError, match="with 'inner'"):
        modelmerge.replay(knob, tmp_path / "again", force=True)


def test_what_only_version_1_could_do_is_said(models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="ties")
    for entries in ({"task_lambda": "matched"}, {"layer_scale": "larv"}, {"layer_scale": "0.5,1"}):
        with pytest.raises(RecipeError, match="was made by modelmerge 0\\.1\\.0 with"):
            modelmerge.replay(as_format_1(manifest, tmp_path / "old.json", **entries), tmp_path / "again")


def test_variations_that_overlap_become_overrides_by_name() -> None:
    names = ["a.0.x", "a.1.x", "a.0.y", "b.0.x"]
    variations = [format_1.read_variation(text) for text in ("scale=1@a*", "scale=2@*x", "e:weight=3@*.0.*")]
    made = format_1.merged_overrides(names, variations)
    for name in names:
        first = next(override for override in made if override.matches(name))
        assert first.values.get("scale") == ("2" if name.endswith("x") else "1")
        assert (("e", "weight") in first.experts) == (".0." in name)
