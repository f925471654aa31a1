"""MODEL+ADAPTER: a model with an adapter on it, wherever a reference is taken; compared with peft's own merges."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.checkpoint.reference import parse
from modelmerge.cli import main
from modelmerge.engine import job
from modelmerge.errors import ReferenceNotFound, UsageError
from tests.support.checkpoints import State, read
from tests.support.hub_server import FakeHub
from tests.support.lora import TOLERANCE, adapter_of, base_of, distance, merged_by_peft

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "stored the other way, dora": (
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "a bias of its own": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "convolutions": ("resnet", {"target_modules": ["convolution"]}),
}  # fmt: skip


class Family:
    """A base, another model of its kind, and adapters of that."""

    def __init__(self, root: Path, kind: str = "llama", **options: Any) -> None:
        self.base, self.other = base_of(kind, root / "base"), root / "other"
        shutil.copytree(self.base, self.other)
        generator = torch.Generator().manual_seed(3)
        moved = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point() and "running" not in name  # buffers are the base's in every merge
            else tensor
            for name, tensor in read(self.base).items()
        }
        save_file(moved, self.other / "model.safetensors", metadata={"format": "pt"})
        self.lora = adapter_of(self.base, root / "lora", **(options or {"target_modules": ["q_proj", "up_proj"]}))
        self.whole = merged_by_peft(self.other, self.lora, root / "whole")

    @property
    def sum(self) -> str:
        return f"{self.other}+{self.lora}"


def merged(base: object, experts: list[object], out: Path, **options: Any) -> State:
    modelmerge.merge(str(base), [str(e) for e in experts], out, **({"method": "task-arithmetic"} | options))
    return read(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_on_another_model_is_what_peft_makes_of_them(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an expert whose whole task vector is added, and as the base of a merge that adds nothing."""
    monkeypatch.setattr(job, "CPU_BLOCK", 50)
    kind, options = VARIANTS[variant]
    family = Family(tmp_path, kind, **options)
    names = read(family.base).keys()
    expert = merged(family.base, [family.sum], tmp_path / "expert", scale=1.0)
    assert distance(family.whole, expert, names) < TOLERANCE
    base = merged(family.sum, [family.base], tmp_path / "as base", scale=0.0)
    assert distance(family.whole, base, names) < TOLERANCE


def test_the_base_with_an_adapter_is_the_adapter(tmp_path: Path) -> None:
    family = Family(tmp_path)
    short = merged(family.base, [family.lora, family.other], tmp_path / "short", scale=0.5)
    long = merged(family.base, [f"{family.base}+{family.lora}", family.other], tmp_path / "long", scale=0.5)
    assert all(torch.equal(short[name], long[name]) for name in short)


def test_several_adapters_go_one_after_the_other(tmp_path: Path) -> None:
    family = Family(tmp_path)
    more = adapter_of(family.base, tmp_path / "more", seed=5, target_modules=["q_proj", "k_proj"])
    shutil.copy(family.base / "config.json", tmp_path / "whole")
    want = merged_by_peft(tmp_path / "whole", more, tmp_path / "both")
    got = merged(family.base, [f"{family.sum}+{more}"], tmp_path / "out", scale=1.0)
    assert distance(want, got, got) < TOLERANCE
    # What is on the base already is no part of the expert: the last adapter alone is.
    last = merged(family.sum, [f"{family.sum}+{more}"], tmp_path / "last", scale=1.0)
    assert distance(want, last, last) < TOLERANCE


def test_the_sum_of_a_model_in_sixteen_bits_keeps_its_digits_until_it_is_stored(tmp_path: Path) -> None:
    family = Family(tmp_path)
    state = {name: tensor.bfloat16() for name, tensor in read(family.other).items()}
    save_file(state, family.other / "model.safetensors", metadata={"format": "pt"})
    wide = tmp_path / "wide"
    shutil.copytree(family.other, wide)
    save_file({k: t.float() for k, t in state.items()}, wide / "model.safetensors", metadata={"format": "pt"})
    want = merged_by_peft(wide, family.lora, tmp_path / "peft")
    got = merged(family.base, [family.sum], tmp_path / "out", scale=1.0)
    assert distance(want, got, got) < TOLERANCE
    narrow = merged(family.sum, [family.base], tmp_path / "narrow", scale=0.0)
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(want[name].bfloat16(), narrow[name]) for name in narrow)


def test_a_manifest_of_a_sum_is_verified_and_replayed(tmp_path: Path) -> None:
    family = Family(tmp_path)
    manifest = modelmerge.merge(family.sum, [family.base, f"it={family.sum}"], tmp_path / "out", method="average")
    (record,) = [manifest["inputs"]["base"]]
    of_adapter = (family.lora / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert set(record["files"]) == {*map(str, (family.other / "model.safetensors", *of_adapter))}
    assert record["name"] == "other+lora"
    assert all(file["same"] for file in modelmerge.verify(tmp_path / "out")["files"])
    modelmerge.replay(tmp_path / "out", tmp_path / "again")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two
    state = load_file(family.lora / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in state.items()}, family.lora / "adapter_model.safetensors")
    with pytest.raises(modelmerge.errors.RecipeError, match="not the file that the recipe was made with"):
        modelmerge.replay(tmp_path / "out", tmp_path / "third")


def test_the_other_verbs_take_a_sum(tmp_path: Path) -> None:
    family = Family(tmp_path)
    modelmerge.extract(family.base, [f"it={family.sum}"], tmp_path / "vectors")
    vector, base = load_file(tmp_path / "vectors/it/model.safetensors"), read(family.base)
    assert max(float((family.whole[n] - base[n] - vector[n]).abs().max()) for n in vector) < TOLERANCE
    experts = [f"it={family.sum}", f"that={family.other}"]
    modelmerge.disentangle(family.base, experts, tmp_path / "apart", method="awd")
    out = tmp_path / "out"
    modelmerge.merge(family.base, experts, out, method="average")
    report = modelmerge.evaluate([out], suite="weights", base=family.base, experts=experts)
    assert report["experts"][0]["files"].keys() >= {str(family.other / "model.safetensors")}
    name = "model.layers.0.self_attn.q_proj.weight"

    def corner(model: Mapping[str, torch.Tensor]) -> float:
        return float(model[name].sum())

    scores = modelmerge.evaluate({"it": family.sum}, metric=corner)["models"][0]["scores"]["corner"]
    assert scores["score"] == pytest.approx(float(family.whole[name].sum()), abs=1e-5)
    with pytest.raises(UsageError, match="which has one on it"):
        modelmerge.merge(family.sum, [family.base], tmp_path / "small", method="average", as_lora=2)


def test_both_sides_may_be_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    family = Family(tmp_path)
    for name, folder in (("org/other", family.other), ("org/lora", family.lora)):
        hub.add(name, {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
    want = merged(family.base, [family.sum], tmp_path / "here", scale=1.0)
    for i, (one, two) in enumerate(
        (("org/other@main", "org/lora"), (family.other, "org/lora"), ("org/other", family.lora))
    ):
        for stream in (False, True):
            out = tmp_path / f"{i}{stream}"
            got = merged(family.base, [f"{one}+{two}"], out, scale=1.0, stream=stream)
            assert all(torch.equal(want[name], got[name]) for name in want)
    plan = modelmerge.merge(family.base, ["org/other+org/lora"], method="average", dry_run=True)
    assert "@" in plan["experts"][0]["reference"]
    assert all(file["same"] for file in modelmerge.verify(tmp_path / "0False")["files"])


def test_a_path_that_exists_wins_over_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "a", "m+a"):
        Path(name).mkdir()
    assert parse("m+a").parts == (parse("m+a"),)
    both = parse("m+a+a")
    assert [part.path.name for part in both.parts] == ["m+a", "a"]
    assert both.name == "m+a+a"
    assert parse(both.named) == parse(f"m+a+a={both.location}")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("other+missing", "'missing': no such file"), ("missing+./lora", "missing'"), ("lora+lora", "is no model"),
        ("other+base", "is no adapter"), ("./nothing+./lora", "'./nothing': no such file"),
    ],
)  # fmt: skip
def test_what_is_no_model_with_an_adapter_is_named(
    reference: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Family(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReferenceNotFound, match=says):
        modelmerge.merge("base", [reference], "out", method="average")
    assert main(["merge", "average", "base", reference, "-o", "out"]) == 1
    assert not Path("out").exists()


def test_layers_of_a_sum_are_put_together_like_a_models(tmp_path: Path) -> None:
    """In the dtype of the model; lent to a base, and merged."""
    family = Family(tmp_path)
    for folder in (family.base, family.other):
        state = {name: tensor.bfloat16() for name, tensor in read(folder).items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    whole = merged(family.sum, [family.base], tmp_path / "sum as file", scale=0.0)
    for method, runs in (("passthrough", ["it:0-2", "base:1-2"]), ("average", ["base:0-1 it:1-2", "it:0-1"])):
        made = []
        for name, reference in (("sum", family.sum), ("file", tmp_path / "sum as file")):
            out = tmp_path / f"{method} {name}"
            made.append(merged(family.base, [f"it={reference}"], out, method=method, layers=runs))
        assert {tensor.dtype for tensor in made[0].values()} == {torch.bfloat16}
        assert distance(*made, made[0]) <= 2**-9  # the file's numbers are rounded once more
        place = "model.layers.1.self_attn.q_proj.weight"
        layer = "model.layers.1." if method == "passthrough" else "model.layers.0."
        assert (made[0][place].float() - whole[f"{layer}self_attn.q_proj.weight"].float()).abs().max() <= 2**-9
