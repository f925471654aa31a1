"""Presets are references and settings, and nothing more."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from modelmerge.cli import main
from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from modelmerge.plan import presets
from tests.support.checkpoints import State, base_state, expert_state, read, write
from tests.support.hub_server import FakeHub

MINE = "clip-b32-8"


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_sound(name: str) -> None:
    preset = presets.load(name)
    assert preset.summary.endswith(".")
    assert len(preset.experts) in (5, 8, 20)
    assert len(set(preset.experts.values())) == len(preset.experts)
    for reference in (preset.base, *preset.experts.values()):
        assert re.fullmatch(r"[\w\-]+/[\w.\-]+", reference)
    for which, told in preset.methods.items():
        beside = {"include": told.get("include", ["*"]), "task": told.get("task", [])}
        assert all(isinstance(word, str) for words in beside.values() for word in words)
        make_options(registry.load(which), which, {k: v for k, v in told.items() if k not in beside})


@pytest.fixture
def hub_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> presets.Preset:
    """A working directory that holds what the preset's references name: paths come before the Hub."""
    preset, base = presets.load(MINE), base_state()
    write(tmp_path / preset.base, base)
    for i, reference in enumerate(preset.experts.values()):
        write(tmp_path / reference, expert_state(base, i))
    monkeypatch.chdir(tmp_path)
    return preset


def merge(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["merge", *words, "--preset", MINE, "-o", "out", "--force", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["manifest"]


def test_a_preset_stands_for_references_and_settings(
    hub_here: presets.Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = merge(capsys, "iso-c")
    assert [e["reference"] for e in manifest["inputs"]["experts"]] == list(hub_here.experts.values())
    assert [e["name"] for e in manifest["inputs"]["experts"]] == list(hub_here.experts)
    assert manifest["inputs"]["base"]["reference"] == hub_here.base
    assert manifest["recipe"]["options"]["scale"] == 1.3  # the preset's, not the method's default
    assert "preset" not in manifest["recipe"]
    assert manifest["command"].startswith(f"modelmerge merge iso-c {hub_here.base} sun397=")


def test_the_command_line_wins(hub_here: presets.Preset, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(capsys, "iso-c", "--scale", "1")["recipe"]["options"]["scale"] == 1.0
    told = merge(capsys, "ties", "--density", "0.5", "--weight", "svhn=2")["recipe"]
    assert told["options"] == {
        "density": 0.5, "scale": 0.3, "published": False, "reduce": "sum", "trim_scope": "model", "rescale": "none",
    }  # fmt: skip
    assert told["weights"]["svhn"] == 2.0


def test_a_method_that_a_preset_does_not_mention_runs_at_its_defaults(
    hub_here: presets.Preset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(capsys, "average")["recipe"]["options"] == {"reduce": "mean"}


def test_a_preset_names_the_unlabelled_data(hub_here: presets.Preset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "adamerging", "--preset", MINE, "-o", "out", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["unlabelled"] == {"tasks": ["clip8"]}
    words = ["--script", "modelmerge.evaluation.digits:unlabelled"]
    assert main(["merge", "adamerging", "--preset", MINE, "-o", "out", "--dry-run", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["unlabelled"] == {"script": words[1]}


def test_include_comes_from_the_preset_unless_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset, base = presets.load("flan-t5-base-glue"), base_state()
    base["encoder.block.0.layer.0.SelfAttention.q.weight"] = base["model.layers.0.q_proj.weight"].clone()
    base["encoder.block.0.layer.0.SelfAttention.v.weight"] = base["model.layers.0.q_proj.weight"].clone()
    write(tmp_path / preset.base, base)
    for i, reference in enumerate(preset.experts.values()):
        write(tmp_path / reference, expert_state(base, i))
    monkeypatch.chdir(tmp_path)
    words = ["merge", "apgd", "--preset", preset.name, "--steps", "1", "-f", "-q"]
    assert main([*words, "-o", "published"]) == 0
    assert main([*words, "-o", "other", "--include", "*up_proj.weight"]) == 0
    published, other = (json.loads(Path(name, "modelmerge.json").read_bytes()) for name in ("published", "other"))
    assert published["recipe"]["options"]["eta"] == 0.15
    assert published["recipe"]["include"] == ["*Attention.q.weight", "*Attention.v.weight"]
    assert (published["tensors"]["merged"], other["tensors"]["merged"]) == (2, 1)


def test_a_preset_is_fetched_from_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As these repositories are: a pickled base of two towers, experts that hold one tower and nothing else."""
    monkeypatch.chdir(tmp_path)
    preset, generator = presets.load(MINE), torch.Generator().manual_seed(0)
    names = [f"{tower}_model.encoder.layers.0.mlp.fc{i}.weight" for tower in ("text", "vision") for i in (1, 2)]
    base: State = {name: torch.randn(24, 24, generator=generator) for name in names}
    file = io.BytesIO()
    torch.save({**base, "vision_model.embeddings.position_ids": torch.arange(5)[None]}, file)
    commits = [hub.add(preset.base, {"pytorch_model.bin": file.getvalue(), "config.json": b'{"model_type": "clip"}'})]
    for reference in preset.experts.values():
        tower = {name: base[name] + 0.01 * torch.randn(24, 24, generator=generator) for name in names[2:]}
        commits.append(hub.add(reference, {"model.safetensors": save(tower), "README.md": b"---\nlicense: mit\n---\n"}))
    manifest = merge(capsys, "apgd", "--steps", "2")
    told = [manifest["recipe"]["base"], *manifest["recipe"]["experts"]]
    references = {"": preset.base, **preset.experts}
    assert [each["reference"] for each in told] == [
        f"{r}@{c}" for r, c in zip(references.values(), commits, strict=True)
    ]
    assert [each["name"] for each in told[1:]] == list(preset.experts)
    merged = read(Path("out"))
    assert {name for name in names if torch.equal(merged[name], base[name])} == set(names[:2])
    svhn = preset.experts["svhn"]
    commit = f"[`{commits[5][:12]}`](https://huggingface.co/{svhn}/tree/{commits[5]})"
    assert f"| `svhn` | [{svhn}](https://huggingface.co/{svhn}) | {commit} |" in Path("out/README.md").read_text()
