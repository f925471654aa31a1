"""Several methods in one merge: each tensor goes to the first rule that takes it."""

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
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.plan import rules
from tests.support.checkpoints import SHAPES, State, base_state, expert_state, read, same_bits, write
from tests.support.methods import takes

NAMES = registry.data_free()
ATTENTION, UP = "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
DOWN, BIAS = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.bias"
FLOATING = list(SHAPES)


def merged(models: list[Path], out: Path, **told: Any) -> State:
    modelmerge.merge(models[0], models[1:], out, **told)
    return read(out)


def parts(manifest: dict[str, Any]) -> dict[str, set[str]]:
    return {part["rule"] or part["method"]: set(part["tensors"]) for part in manifest["tensors"]["parts"]}


# --- what is said ---


@pytest.mark.parametrize("name", NAMES)
def test_grammar_and_back(name: str) -> None:
    chosen = registry.load(name)
    said = rules.parse(f"*.[0-3].*attn*={name}")
    assert (said.tensors, said.name, said.options) == ("*.[0-3].*attn*", name, chosen.options())
    assert rules.parse(str(said)) == said
    for option, value in chosen.published.items():
        assert rules.parse(str(rules.parse(f"a=b={name} {option.replace('_', '-')}={value}"))).tensors == "a=b"


def test_values_are_what_the_option_wants() -> None:
    told = rules.parse("*=apgd  shared-rank=3 ridge=1e-3 inner=matrix norm-cap=2").options
    assert (told.shared_rank, told.ridge, told.inner, told.norm_cap) == (3, 1e-3, "matrix", 2.0)
    assert rules.parse("*=ties scale=0.1").options.scale == 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not GLOB=METHOD"),
        ("*attn*", "is not GLOB=METHOD"),
        ("=ties", "is not GLOB=METHOD"),
        ("*=", "is not GLOB=METHOD"),
        ("*=tsvm", "there is no merge method 'tsvm' did you mean 'tsv-m'"),
        ("*=auto", "there is no merge method 'auto'"),
        ("*=ties desnity=0.5", "no option 'desnity' did you mean 'density'"),
        ("*=ties density", "'density' is not OPTION=V"),
        ("*=ties density=2", "--density must be above 0 and at most 1, not 2"),
        ("*=ties density=much", "--density must be a float, not 'much'"),
        ("*=ties scale=1 scale=2", "'scale=2' comes twice"),
        ("*=apgd shared-rank=1.5", "--shared-rank must be an integer"),
        ("*=apgd eta=1 solver=exact lambda-mode=matched", "--eta has no effect"),
        ("*colour*=ties", r"matches no tensor of the base its names are like: "),
        ("*.bias=tsv-m", "are no weights of linear layers, and 'tsv-m' merges only those"),
        ("*embed*=apgd", "are no weights of linear layers"),
        ("position_ids=average", "are copied from the base: I64, not floating"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, says: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        merged(models, tmp_path / "out", method="average", rule=[text])
    assert re.search(says, f"{refused.value.message} {refused.value.hint}")
    assert refused.value.message.startswith(f"--rule '{text.partition(' ')[0]}")
    assert not (tmp_path / "out").exists()


def test_a_rule_that_another_leaves_nothing_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'\\*q_proj\\*=ties': the tensors that it matches are taken by a rule before"):
        merged(models, tmp_path / "out", method="average", rule=["*layers*=average", "*q_proj*=ties"])


def test_a_rule_with_a_method_for_fewer_experts_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'slerp' takes 2 experts at most, and 3 are named"):
        merged(models, tmp_path / "out", method="average", rule=["*q_proj*=slerp"])


def test_weights_that_a_rules_method_cannot_have_are_refused(models: list[Path], tmp_path: Path) -> None:
    nothing = dict.fromkeys(["expert_0", "expert_1", "expert_2"], 0.0)
    with pytest.raises(UsageError, match="the weights add up to zero"):
        merged(models, tmp_path / "out", method="ties", rule=["*q_proj*=average"], weights=nothing)


# --- what is merged ---


@pytest.mark.parametrize("name", NAMES)
def test_every_method_merges_its_tensors_as_if_alone(
    name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in blocks, and with statistics of its own tensors only; the others as without it."""
    monkeypatch.setattr(job, "CPU_BLOCK", 100)
    few = models[: 1 + takes(name, 3)]
    got = merged(few, tmp_path / "out", method="ties", rule=[f"*layers*={name}"], density=0.4)
    theirs = merged(few, tmp_path / "theirs", method=name, include=["*layers*"], rest="base")
    taken = [key for key in FLOATING if "layers" in key and (len(SHAPES[key]) == 2 or not registry.load(name).matrices)]
    ours = merged(few, tmp_path / "ours", method="ties", density=0.4, exclude=taken)
    assert same_bits(got, ours | {key: theirs[key] for key in taken})
    assert not same_bits(got, ours)


def test_the_first_rule_that_takes_a_tensor_counts(models: list[Path], tmp_path: Path) -> None:
    told = ["*.layers.0.*=kron", "*mlp*=tsv-m", "*.bias=average", "*.layers.*=task-arithmetic scale=0.7"]
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", rule=told)
    assert parts(manifest) == {
        "*.layers.0.*": {ATTENTION, UP},
        "*mlp*": {DOWN},
        "*.bias": {BIAS},  # no weight of a linear layer: the rules before it do not take it
        "*.layers.*": {"model.layers.0.norm.weight"},
        "average": {"model.embed_tokens.weight", "logit_scale", "empty"},  # the rest of apgd
    }
    assert manifest["tensors"]["merged"] == 5
    assert manifest["tensors"]["rest"] == 3
    states, got = [read(path) for path in models], read(tmp_path / "out")
    key = "model.layers.0.norm.weight"
    want = states[0][key].double() + 0.7 * sum(s[key].double() - states[0][key].double() for s in states[1:])
    assert torch.allclose(got[key].double(), want, atol=1e-7)


def test_a_trim_over_the_model_is_over_what_its_method_merges(models: list[Path], tmp_path: Path) -> None:
    """In float64, for two parts with densities of their own."""
    got = merged(
        models, tmp_path / "out", method="ties", density=0.5, scale=1.0, rule=["*mlp*=ties density=0.1 scale=0.5"]
    )
    base, *experts = ({k: t.double() for k, t in read(path).items()} for path in models)
    for density, scale, mlp in ((0.5, 1.0, False), (0.1, 0.5, True)):
        keys = [key for key in FLOATING if ("mlp" in key) == mlp]
        taus = torch.stack([torch.cat([(e[k] - base[k]).flatten() for k in keys]) for e in experts]).float()
        least = taus.abs().sort(dim=1, descending=True).values[:, int(density * taus.shape[1])]
        kept = (taus * (taus.abs() >= least[:, None])).double()
        sums = kept.sum(0)
        want = scale * torch.where(sums.sign() == kept.sign(), kept, 0).sum(0)
        assert torch.allclose(torch.cat([(got[k].double() - base[k]).flatten() for k in keys]), want, atol=1e-7)


def test_with_everything_else(models: list[Path], tmp_path: Path) -> None:
    """Weights, variations, disentangling, seeds and the rest reach every part."""
    shared: dict[str, Any] = {"weights": {"expert_1": 2.0}, "seed": 3, "disentangle": "awd"}
    by_rule = ["*layers.0*=dare density=0.5 scale=0.2", "*mlp*=tsv-m"]
    vary = ["scale=0.4@*mlp*", "expert_0:weight=0.5", "density=0.25@*norm*"]
    got = merged(models, tmp_path / "out", method="iso-c", rest="task-arithmetic", rule=by_rule, vary=vary, **shared)
    keys = {
        "dare": [ATTENTION, UP, BIAS, "model.layers.0.norm.weight"], "tsv-m": [DOWN],
        "task-arithmetic": ["model.embed_tokens.weight", "logit_scale"],
    }  # fmt: skip
    assert sorted(key for each in keys.values() for key in each) == sorted(FLOATING)
    options: dict[str, dict[str, Any]] = {"dare": {"density": 0.5, "scale": 0.2}, "tsv-m": {}, "task-arithmetic": {}}
    said = {"dare": vary, "tsv-m": vary[:2], "task-arithmetic": vary[1:2]}
    for name, mine in keys.items():
        alone = merged(
            models, tmp_path / name, method=name, include=mine, rest="base", vary=said[name], **options[name],
            **{**shared, **({} if name != "task-arithmetic" else {"disentangle": None})},
        )  # fmt: skip
        assert same_bits({key: got[key] for key in mine}, {key: alone[key] for key in mine}), name


def test_a_variation_that_no_method_has_there_is_refused(models: list[Path], tmp_path: Path) -> None:
    for told, says in (
        ("density=0.5@*mlp*", "density is nothing of 'tsv-m' that can vary"),
        ("rho=0.5", "rho is nothing of 'average' or 'tsv-m' that can vary"),
        ("density=0.5@*embed*", "density is nothing of 'average' that can vary what can: weight"),
    ):
        with pytest.raises(UsageError) as refused:
            merged(models, tmp_path / "out", method="average", rule=["*up_proj.weight=tsv-m", DOWN + "=tsv-m"],
                   include=["*proj.weight", "*embed*"], vary=[told])  # fmt: skip
        assert says in f"{refused.value.message} {refused.value.hint}"


def test_tied_tensors_with_methods_of_their_own_are_two(tmp_path: Path) -> None:
    def tied(state: State) -> State:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}

    base = base_state()
    paths = [write(tmp_path / "b", tied(base))]
    paths += [write(tmp_path / f"e{i}", tied(expert_state(base, i))) for i in range(2)]
    together = modelmerge.merge(paths[0], paths[1:], tmp_path / "one", method="dare", rule=["*=dare scale=1"])
    assert list(together["tensors"]["tied"]) == ["lm_head.weight"]
    apart = modelmerge.merge(paths[0], paths[1:], tmp_path / "two", method="dare", rule=["lm_head*=average"])
    assert not apart["tensors"]["tied"]


def test_as_lora(models: list[Path], tmp_path: Path) -> None:
    """The factors of the very matrices that a checkpoint would hold."""
    told: dict[str, Any] = {"method": "average", "rule": ["*q_proj*=tsv-m scale=0.8", "*mlp*=ties density=0.5"]}
    only = ["*proj.weight"]
    whole, base = merged(models, tmp_path / "whole", include=only, **told), read(models[0])
    merged(models, tmp_path / "lora", include=only, as_lora=16, **told)
    factors = read(tmp_path / "lora")
    for key in (ATTENTION, UP, DOWN):
        place = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        assert torch.allclose(
            factors[f"{place}B.weight"] @ factors[f"{place}A.weight"], whole[key] - base[key], atol=1e-6
        )


# --- what is told ---


def test_the_recipe_and_the_command_repeat_it(models: list[Path], tmp_path: Path) -> None:
    words = ["merge", "ties", *map(str, models), "--rule", "*q_proj*=tsv-m scale=0.8", "--rule", "*mlp*=apgd"]
    assert main([*words, "-o", str(tmp_path / "one"), "-q"]) == 0
    manifest = json.loads((tmp_path / "one" / "modelmerge.json").read_text())
    assert manifest["recipe"]["rule"][0].startswith("*q_proj*=tsv-m scale=0.8")
    assert "ridge=1.0" in manifest["recipe"]["rule"][1], "defaults are written down: they may change"
    assert main(["merge", "--recipe", str(tmp_path / "one"), "-o", str(tmp_path / "two"), "-q"]) == 0
    again = shlex.split(manifest["command"])[1:]
    again[again.index("-o") + 1] = str(tmp_path / "three")
    assert main([*again, "-q"]) == 0
    want = read(tmp_path / "one")
    for name in ("two", "three"):
        assert same_bits(read(tmp_path / name), want)
        assert (
            json.loads((tmp_path / name / "modelmerge.json").read_text())["recipe"]["rule"]
            == manifest["recipe"]["rule"]
        )
    card = (tmp_path / "one" / "README.md").read_text()
    assert "made by `ties` and `tsv-m` and `apgd` with modelmerge" in card
    assert "| `--rule` | `*q_proj*=tsv-m scale=0.8" in card
    assert {"- tsv-m", "- apgd", "- ties"} <= set(card.split("---")[1].splitlines())
    assert card.count("@misc") == 3


def test_an_interrupted_merge_is_resumed_to_the_same_bits(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {"method": "ties", "rule": ["*mlp*=kron", "*norm*=average"], "max_shard_size": "2KB"}
    want = merged(models, tmp_path / "want", **told)
    publish = Staging.publish

    def fail(self: Staging, manifest: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "publish", fail)
    with pytest.raises(KeyboardInterrupt):
        merged(models, tmp_path / "out", resume=True, **told)
    monkeypatch.setattr(Staging, "publish", publish)
    assert same_bits(merged(models, tmp_path / "out", resume=True, **told), want)


def test_the_plan_says_which_tensor_goes_where(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "apgd", *map(str, models), "-o", str(tmp_path / "out"), "--rule", "*mlp*=ties density=0.1", "-n"]
    assert main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [(part["method"], part["rule"], len(part["tensors"])) for part in plan["parts"]] == [
        ("apgd", None, 1), ("ties", "*mlp*", 3), ("average", None, 4),
    ]  # fmt: skip
    reasons = {tensor["name"]: tensor["reason"] for tensor in plan["tensors"]}
    assert reasons[BIAS] == "--rule '*mlp*': ties"
    assert reasons[ATTENTION] == "the weight of a linear layer"
    assert main(words) == 0
    assert re.search(r"merge +3 +--rule '\*mlp\*': ties", capsys.readouterr().out)
    # A survey reads the tensors of its own method, and no others.
    assert main([*words[:-3], "--json", "-n"]) == 0
    without = json.loads(capsys.readouterr().out)["plan"]
    surveyed = sum(4 * torch.Size(SHAPES[key]).numel() for key in (UP, BIAS, DOWN)) * 4
    assert plan["bytes"]["read"] == without["bytes"]["read"] + (plan["passes"] - 1) * surveyed


def test_the_result_counts_them(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "average", *map(str, models), "-o", str(tmp_path / "out"), "--rule", "*mlp*=ties"]
    assert main(words) == 0
    assert "8 tensors merged (3 by ties), 1 copied from the base" in capsys.readouterr().out
