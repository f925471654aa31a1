"""`merge auto`: what it chooses, and that it is the method it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.engine import lowrank
from modelmerge.errors import UsageError
from modelmerge.verbs.auto import CHOICES
from tests.support.checkpoints import State, read, write
from tests.support.hub_server import FakeHub


def same(left: Path, right: Path) -> bool:
    one, other = read(left), read(right)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_full_experts_go_to_kron(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "auto", *map(str, models), "-o", str(tmp_path / "auto")]
    assert main([*words, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["method"] == "kron"
    assert any(remark.startswith("The method is kron: ") for remark in plan["remarks"])
    assert main([*words, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)["manifest"]
    assert manifest["recipe"]["method"] == "kron"
    assert any(note.startswith("The method is kron: ") for note in manifest["notes"])
    modelmerge.merge(models[0], models[1:], tmp_path / "kron", method="kron")
    assert same(tmp_path / "auto", tmp_path / "kron")
    modelmerge.replay(tmp_path / "auto" / "modelmerge.json", tmp_path / "again")
    assert same(tmp_path / "auto", tmp_path / "again")


def test_low_rank_experts_go_to_apgd(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:], tmp_path / "vectors", rank=2)
    vectors = [tmp_path / "vectors" / model.name for model in models[1:]]
    manifest = modelmerge.merge(models[0], vectors, tmp_path / "auto", method="auto")
    assert manifest["recipe"]["method"] == "apgd"
    mixed = modelmerge.merge(models[0], [vectors[0], models[2]], tmp_path / "mixed", method="auto")
    assert mixed["recipe"]["method"] == "kron"


def with_loras(base: State, seed: int, dtype: torch.dtype, only: str = "", rank: int = 2, size: float = 2e-3) -> State:
    """The base with adapters of that rank merged into its linear layers, stored in a dtype."""
    generator, made = torch.Generator().manual_seed(seed), dict(base)
    for name in (name for name in base if name.endswith("proj.weight") and only in name):
        m, n = base[name].shape
        change = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
        made[name] = base[name] + size * change
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in made.items()}


def wide_base(dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(7)
    shapes = {"q_proj": (48, 32), "k_proj": (32, 32), "down_proj": (32, 600)}
    matrices = {
        f"layers.{i}.{name}.weight": torch.randn(shape, generator=generator).mul(0.02)
        for i in range(2)
        for name, shape in shapes.items()
    }
    return {k: v.to(dtype) for k, v in (matrices | {"norm.weight": torch.ones(32)}).items()}


@pytest.mark.parametrize("only", ["", "k_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_merged_into_checkpoints_are_told_as_adapters_are(
    dtype: torch.dtype, only: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", wide_base(dtype))
    experts = [write(tmp_path / f"e{i}", with_loras(wide_base(dtype), i, dtype, only)) for i in range(2)]
    manifest = modelmerge.merge(base, experts, tmp_path / "auto", method="auto")
    assert manifest["recipe"]["method"] == "apgd"
    assert any("All experts are of low rank, as LoRA adapters are" in note for note in manifest["notes"])
    modelmerge.merge(base, experts, tmp_path / "plain", method="apgd")
    assert same(tmp_path / "auto", tmp_path / "plain")
    # Beside an adapter's factors, and as task vectors, they are what they are.
    modelmerge.extract(base, experts, tmp_path / "vectors", rank=2)
    for mixed in ([experts[0], tmp_path / "vectors" / "e1"], [tmp_path / "vectors" / "e0", experts[1]]):
        told = modelmerge.merge(base, mixed, tmp_path / "mixed", method="auto", force=True)
        assert told["recipe"]["method"] == "apgd"
    # Not beside one that was trained in full.
    full = {k: v + 1e-3 * torch.randn(v.shape).to(v.dtype) if v.dim() == 2 else v for k, v in wide_base(dtype).items()}
    other = write(tmp_path / "full", full)
    assert modelmerge.merge(base, [experts[0], other], tmp_path / "k", method="auto")["recipe"]["method"] == "kron"


def test_low_rank_experts_that_go_far_go_to_kron(tmp_path: Path) -> None:
    base = write(tmp_path / "base", wide_base())
    told = {}
    for size in (2e-3, 2e-2):
        experts = [
            write(tmp_path / f"{size}-{i}", with_loras(wide_base(), i, torch.float32, size=size)) for i in (1, 2)
        ]
        told[size] = modelmerge.merge(base, experts, tmp_path / f"{size}", method="auto")
    assert told[2e-3]["recipe"]["method"] == "apgd"
    assert told[2e-2]["recipe"]["method"] == "kron"
    assert any(
        "and they go far: the one in the middle changes the weights by 13" in note for note in told[2e-2]["notes"]
    ), told[2e-2]["notes"]


def test_an_adapter_that_rounding_hides_is_not_told(tmp_path: Path) -> None:
    origin = wide_base(torch.bfloat16)
    faint = {k: (origin[k].float() + 1e-3 * (v.float() - origin[k].float())).bfloat16()
             for k, v in with_loras(wide_base(), 0, torch.float32).items()}  # fmt: skip
    paths = [write(tmp_path / "base", origin), write(tmp_path / "a", faint), write(tmp_path / "b", faint)]
    assert modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="auto")["recipe"]["method"] == "kron"


def test_on_the_hub_a_dry_run_says_what_looking_might_change(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, words = wide_base(), ["merge", "auto", "org/base", "org/a", "org/b", "-o", str(tmp_path / "out"), "--json"]
    hub.add("org/base", write(tmp_path / "base", base))
    for i, name in enumerate("ab"):
        hub.add(f"org/{name}", write(tmp_path / name, with_loras(base, i, torch.float32)))
    looked, look = [], lowrank.is_low_rank
    monkeypatch.setattr(lowrank, "is_low_rank", lambda made, i: looked.append(i) or look(made, i))
    assert main([*words, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert not looked
    assert plan["method"] == "kron"
    assert any("Should all experts turn out to be of low rank" in remark for remark in plan["remarks"])
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["recipe"]["method"] == "apgd"
    assert looked == [0, 1]
    assert main([*words, "--dry-run", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["method"] == "apgd", "all is in the cache now"


def test_one_expert_is_taken_as_it_is(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:2], tmp_path / "auto", method="auto")
    got, want = read(tmp_path / "auto"), read(models[1])
    assert all(torch.allclose(got[key].double(), want[key].double(), atol=1e-6) for key in want)


def test_it_takes_what_is_done_in_time_and_says_what_was_too_slow(models: list[Path], tmp_path: Path) -> None:
    notes = modelmerge.merge(models[0], models[1:], tmp_path / "long", method="auto", within=60)["notes"]
    assert any("It takes about " in note and "too short" not in note for note in notes)
    short = modelmerge.merge(models[0], models[1:], tmp_path / "short", method="auto", within=1e-9)
    assert short["recipe"]["method"] == CHOICES["full"][-1].method
    [why] = [note for note in short["notes"] if note.startswith("The method is")]
    assert "too short for what is better: kron about 1 s" in why
    assert why.endswith("nothing that is known here takes less.")
    modelmerge.merge(models[0], models[1:], tmp_path / "plain", method=CHOICES["full"][-1].method)
    assert same(tmp_path / "short", tmp_path / "plain")


def test_a_limit_of_time_is_for_auto_in_one_process(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for 'auto'"):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", within=1)
    with pytest.raises(UsageError, match="must be above 0"):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="auto", within=0)
    words = ["merge", "auto", *map(str, models), "-o", str(tmp_path / "out"), "--within", "1"]
    assert main([*words, "--part", "1/2"]) == 2
    assert not (tmp_path / "out").exists()


def test_language_models_are_told_what_holds_for_large_ones(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    notes = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="auto", on_mismatch="copy")["notes"]
    assert any("arXiv 2511.21437" in note for note in notes)


def test_it_is_listed_and_has_no_options(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "-q"]) == 0
    assert "auto" in capsys.readouterr().out.splitlines()
    with pytest.raises(UsageError, match="'auto' has no options"):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="auto", scale=0.5)
    assert main(["merge", "auto", *map(str, models), "-o", str(tmp_path / "out"), "--scale", "1"]) == 2
