"""`merge auto`: what it chooses, and that it is the method it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import UsageError
from tests.checkpoints import read


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


def test_low_rank_experts_go_to_task_arithmetic(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:], tmp_path / "vectors", rank=2)
    vectors = [tmp_path / "vectors" / model.name for model in models[1:]]
    manifest = modelmerge.merge(models[0], vectors, tmp_path / "auto", method="auto")
    assert manifest["recipe"]["method"] == "task-arithmetic"
    assert manifest["recipe"]["options"]["scale"] == 0.3
    mixed = modelmerge.merge(models[0], [vectors[0], models[2]], tmp_path / "mixed", method="auto")
    assert mixed["recipe"]["method"] == "kron"


def test_one_expert_is_taken_as_it_is(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:2], tmp_path / "auto", method="auto")
    got, want = read(tmp_path / "auto"), read(models[1])
    assert all(torch.allclose(got[key].double(), want[key].double(), atol=1e-6) for key in want)


def test_it_is_listed_and_has_no_options(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "-q"]) == 0
    assert "auto" in capsys.readouterr().out.splitlines()
    with pytest.raises(UsageError, match="'auto' has no options"):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="auto", scale=0.5)
    assert main(["merge", "auto", *map(str, models), "-o", str(tmp_path / "out"), "--scale", "1"]) == 2
