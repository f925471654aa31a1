"""verify: an output's files and its inputs against the manifest, read anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import modelmerge
from modelmerge.errors import OutputError
from tests.support.commands import run
from tests.support.hub_server import FakeHub


def same(directory: Path) -> dict[str, bool | None]:
    return {file["name"]: file["same"] for file in modelmerge.verify(directory)["files"]}


@pytest.mark.parametrize(
    "verb",
    [
        ["merge", "ties"],
        ["merge", "average", "--as-lora", "2", "--include", "*_proj.weight"],
        ["extract"],
        ["disentangle", "awd", "--experts"],
        ["search", "ties", "--try", "scale=0.2,0.4", "--on", "custom:METRIC:f"],
    ],
)
def test_what_a_verb_wrote_is_what_its_manifest_says(
    verb: list[str], models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metric.py").write_text("def f(model):\n    return 1.0\n")
    out, words = tmp_path / "out", [word.replace("METRIC", str(tmp_path / "metric.py")) for word in verb]
    code, _, err = (
        run(capsys, *words[:2], *models, *words[2:], "-o", out)
        if words[0] != "extract"
        else run(capsys, "extract", *models, "-o", out)
    )
    assert code == 0, err
    files = same(out)
    written = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} - {"modelmerge.json"}
    inputs = {str(file) for model in models for file in model.glob("*.safetensors")}
    assert files == dict.fromkeys(written | inputs, True)


def test_what_differs_is_named(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    modelmerge.merge(models[0], models[1:], out, method="ties")
    assert run(capsys, "verify", out)[0] == 0
    (file,) = out.glob("*.safetensors")
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # no cache of digests would notice
    (out / "README.md").unlink()
    shutil.rmtree(models[1])
    (models[2] / "model.safetensors").write_bytes(b"another")
    code, said, err = run(capsys, "verify", out, "--json")
    assert code == 1
    outcome = json.loads(said)
    assert outcome["output"] == str(out)
    files = {entry["name"]: entry["same"] for entry in outcome["files"]}
    assert files[file.name] is False
    assert files["README.md"] is False
    assert files[str(models[0] / "model.safetensors")] is True
    assert files[str(models[1] / "model.safetensors")] is None
    assert files[str(models[2] / "model.safetensors")] is False
    assert "are not what the manifest says" in err
    code, said, _ = run(capsys, "verify", out)
    assert code == 1
    assert "DIFFERS    README.md" in said
    assert "not found" in said
    code, said, _ = run(capsys, "verify", out, "-q")
    assert said.splitlines() == [name for name in files if files[name] is False]


def test_inputs_that_are_gone_do_not_fail(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties")
    for model in models:
        shutil.rmtree(model)
    code, said, err = run(capsys, "verify", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "4 inputs were not found" in said


def test_inputs_on_the_hub_are_looked_for_in_the_cache(hub: FakeHub, models: list[Path], tmp_path: Path) -> None:
    commit = hub.add("org/expert", models[1])
    modelmerge.merge(models[0], ["org/expert"], tmp_path / "out", method="ties")
    name = f"hf://org/expert@{commit}/model.safetensors"
    hub.clear()  # no connection is made
    assert same(tmp_path / "out")[name] is True
    modelmerge.merge(models[0], models[1:], tmp_path / "other", method="ties")
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    manifest["inputs"]["experts"][0]["files"] = {
        name.replace("expert", "none"): entry for name, entry in manifest["inputs"]["experts"][0]["files"].items()
    }
    (tmp_path / "out" / "modelmerge.json").write_text(json.dumps(manifest))
    assert same(tmp_path / "out")[name.replace("expert", "none")] is None


@pytest.mark.parametrize("text", [None, "{", '{"recipe": {}}'])
def test_a_directory_without_a_manifest_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "modelmerge.json").write_text(text)
    with pytest.raises(OutputError):
        modelmerge.verify(tmp_path)


def test_a_device_that_a_manifest_names_is_no_file(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average")
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    manifest["files"]["/dev/zero"] = {"sha256": "0" * 64, "bytes": 0}
    manifest["files"]["a\0b"] = manifest["files"]["x" * 5000] = {"sha256": "0" * 64, "bytes": 0}
    (tmp_path / "out" / "modelmerge.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match="cannot be read: File name too long"):
        modelmerge.verify(tmp_path / "out")
    del manifest["files"]["x" * 5000]
    (tmp_path / "out" / "modelmerge.json").write_text(json.dumps(manifest))
    same = {entry["name"]: entry["same"] for entry in modelmerge.verify(tmp_path / "out")["files"]}
    assert (same["/dev/zero"], same["a\0b"]) == (False, False)
