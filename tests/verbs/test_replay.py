"""A replay: the same bits or an error, and no code that only a file names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.staging import Staging, fingerprints
from modelmerge.engine.parallel import threads
from modelmerge.errors import CheckpointError, RecipeError, UsageError
from modelmerge.evaluation.custom import load_script
from modelmerge.evaluation.model import refuse_kernels
from modelmerge.methods import registry
from modelmerge.record.fingerprint import threads_in
from tests.support.commands import refused, run
from tests.support.methods import takes

METHODS = [name for name in registry.names() if not registry.load(name).on_data]
WEIGHTS = "model.safetensors"
LONE = "model.safetensors"
SCRIPT = """
import torch
import pathlib
pathlib.Path("ran").touch()
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.one(x)
def data(model):
    return Net(), torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
"""


def change(manifest: Path, **entries: Any) -> Path:
    """A manifest beside the first one, with other entries."""
    file = manifest.with_name("changed.json")
    file.write_text(json.dumps(json.loads(manifest.read_bytes()) | entries))
    return file


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_repeated_to_the_bit(method: str, models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:][: takes(method, 3)], tmp_path / "one", method=method)
    modelmerge.replay(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("transform", registry.names("transform"))
def test_every_transform_is_repeated_to_the_bit(transform: str, models: list[Path], tmp_path: Path) -> None:
    one = modelmerge.merge(models[0], models[1:], tmp_path / "one", method="ties", disentangle=transform)
    assert modelmerge.replay(tmp_path / "one", tmp_path / "two")["files"][WEIGHTS] == one["files"][WEIGHTS]


@pytest.fixture
def merged(models: list[Path], tmp_path: Path) -> Path:
    modelmerge.merge(models[0], models[1:], tmp_path / "one", method="ties")
    return tmp_path / "one" / "modelmerge.json"


def other_weights(merged: Path, factor: float) -> Path:
    """The manifest as if the merge had given other weights, which lie beside it."""
    state = load_file(merged.parent / WEIGHTS)
    state["model.layers.0.norm.weight"] *= factor
    save_file(state, merged.parent / WEIGHTS)
    files = json.loads(merged.read_bytes())["files"]
    files[WEIGHTS]["sha256"] = sha256(merged.parent / WEIGHTS)
    return change(merged, files=files)


def test_other_bits_are_an_error_that_says_how_large_the_difference_is(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = other_weights(merged, 1.001)
    versions = json.loads(merged.read_bytes())["versions"] | {"torch": "1.0"}
    file = change(file, versions=versions, device="cuda:7")
    error, hint = refused(capsys, "merge", "--recipe", file, "-o", tmp_path / "two")
    assert "model.safetensors ('model.layers.0.norm.weight' differs by 0.001 of its norm)" in error
    assert "device cuda:7, here cpu" in hint
    assert "torch 1.0, here" in hint
    assert "--allow-different-bits" in hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "one"]
    code, _, err = run(capsys, "merge", "--recipe", file, "-o", tmp_path / "two", "--allow-different-bits")
    assert code == 0
    assert "These are other bits than the recipe records: model.safetensors" in err
    assert "These are other bits" in (tmp_path / "two" / "README.md").read_text()
    assert str(tmp_path) not in json.loads((tmp_path / "two" / "modelmerge.json").read_bytes())["notes"][-1]


def test_without_the_old_weights_their_digests_are_said(merged: Path, tmp_path: Path) -> None:
    file = other_weights(merged, 2.0)
    (file.parent / WEIGHTS).unlink()
    with pytest.raises(RecipeError, match=r"model\.safetensors \(sha256 \w{12} and not \w{12}\)"):
        modelmerge.replay(file, tmp_path / "two")


def test_a_file_that_is_no_longer_written_is_named(merged: Path, tmp_path: Path) -> None:
    files = json.loads(merged.read_bytes())["files"]
    file = change(merged, files={**files, "gone.txt": {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(RecipeError, match=r"gone\.txt is not written"):
        modelmerge.replay(file, tmp_path / "two")


def test_another_merge_has_nothing_to_repeat(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = other_weights(merged, 2.0)
    words = ("merge", "--recipe", file, "-o", tmp_path / "two", "--weight", "expert_0=2", "-q")
    assert run(capsys, *words)[0] == 0
    # What the recipe says anyway changes nothing.
    assert refused(capsys, "merge", "--recipe", file, "-o", tmp_path / "three", "--density", "0.2")[0]


@pytest.mark.parametrize("lacking", ["inputs", "files"])
def test_a_recipe_without_digests_is_refused(lacking: str, merged: Path, tmp_path: Path) -> None:
    entry = json.loads(merged.read_bytes())[lacking]
    for model in [entry["base"], *entry["experts"]] if lacking == "inputs" else ():
        model["files"] = {}
    file = change(merged, **{lacking: entry if lacking == "inputs" else {}})
    with pytest.raises(RecipeError, match="has no sha256 of"):
        modelmerge.replay(file, tmp_path / "two")
    manifest = modelmerge.replay(file, tmp_path / "two", allow_different_bits=True)
    assert any("no sha256 of its inputs" in note for note in manifest["notes"]) == (lacking == "inputs")


def test_a_replay_takes_the_recorded_threads(models: list[Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    with threads(3):
        one = modelmerge.merge(models[0], models[1:], tmp_path / "one", method="kron")
    two = modelmerge.replay(tmp_path / "one", tmp_path / "two")
    assert (one["threads"], two["threads"]) == (3, 3)
    assert threads_in(two["fingerprint"]) == 3
    assert torch.get_num_threads() == before
    assert one["machine"].keys() >= {"processor", "instructions", "blas", "OMP_NUM_THREADS"}
    for count in (0, 10**9, "many", True):
        with pytest.raises(RecipeError, match="threads"):
            modelmerge.replay(change(tmp_path / "one" / "modelmerge.json", threads=count), tmp_path / "three")


def test_a_resumed_run_takes_the_threads_of_what_it_takes_up(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out, words = Staging.write, tmp_path / "out", {"method": "kron", "max_shard_size": "3KB"}

    def stop(staging: Staging, tensor: str, *rest: Any) -> None:
        if len(staging.digests) > 1:
            raise KeyboardInterrupt
        write(staging, tensor, *rest)

    monkeypatch.setattr(Staging, "write", stop)
    with threads(3), pytest.raises(KeyboardInterrupt):
        modelmerge.merge(models[0], models[1:], out, resume=True, **words)
    monkeypatch.undo()
    assert [threads_in(text) for text in fingerprints(out)] == [3]
    assert modelmerge.merge(models[0], models[1:], out, resume=True, **words)["threads"] == 3
    # Complete already, whatever the threads are now.
    assert modelmerge.merge(models[0], models[1:], out, resume=True, **words)["threads"] == 3
    assert modelmerge.merge(models[0], models[1:], out, force=True, **words)["threads"] == torch.get_num_threads()


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A manifest whose coefficients a script found, without them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("beside", None)  # another test's
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        save_file({"one.weight": torch.randn(3, 4, generator=generator)}, f"{name}.safetensors")
    Path("script.py").write_text("import beside\n" + SCRIPT)
    Path("beside.py").write_text("x = 1\n")
    words = ("adamerging", "base.safetensors", "a.safetensors", "b.safetensors", "--script", "script.py:data")
    assert run(capsys, "merge", *words, "--steps", "2", "-o", "out", "-q")[0] == 0
    Path("ran").unlink()
    stored = json.loads(Path("out/modelmerge.json").read_bytes())
    assert stored["adaptation"]["script"].keys() == {"script.py", "beside.py"}
    return change(Path("out/modelmerge.json"), recipe=stored["recipe"] | {"coefficients": {}})


def test_a_script_that_only_a_recipe_names_is_not_run(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("-n",), ("--steps", "3")):
        error, hint = refused(capsys, "merge", "--recipe", scripted, "-o", "again", *more)
        assert "the recipe names a script, 'script.py:data', and what a file names is not run" in error
        assert "--script script.py:data" in hint
    with pytest.raises(RecipeError, match="names a script"):
        modelmerge.replay(scripted, "again")
    # Another method's recipe can name one, too.
    stored = json.loads(scripted.read_bytes())["recipe"]
    ties = change(scripted, recipe=stored | {"method": "ties", "options": {}})
    assert "names a script" in refused(capsys, "merge", "--recipe", ties, "-o", "again")[0]
    assert not Path("ran").exists()
    assert not Path("again").exists()


def test_a_script_that_is_named_runs_and_gives_the_recorded_bits(
    scripted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("merge", "--recipe", scripted, "-o", "again", "--script", "script.py:data")
    code, out, _ = run(capsys, *words, "-n", "--json")
    assert code == 0
    assert any("script.py:data is not run for a plan" in remark for remark in json.loads(out)["plan"]["remarks"])
    assert not Path("ran").exists()
    assert run(capsys, *words, "-q")[0] == 0
    assert Path("ran").exists()
    assert Path("again", LONE).read_bytes() == Path("out", LONE).read_bytes()
    modelmerge.replay(scripted, "once more", script=f"{Path.cwd()}/script.py:data")
    assert Path("once more", LONE).read_bytes() == Path("out", LONE).read_bytes()


@pytest.mark.parametrize("file", ["script.py", "beside.py"])
def test_a_script_that_has_changed_is_not_run(file: str, scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(file).write_text(Path(file).read_text() + "\n")
    error, _ = refused(capsys, "merge", "--recipe", scripted, "-o", "again", "--script", "script.py:data")
    assert f"{file}: not the script that the recipe was made with" in error
    assert not Path("ran").exists()


def test_another_script_makes_another_merge(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.py").write_text(SCRIPT.replace("manual_seed(1)", "manual_seed(2)"))
    words = ("merge", "--recipe", scripted, "-o", "again", "--script", "other.py:data", "-q")
    assert run(capsys, *words)[0] == 0
    assert Path("again", LONE).read_bytes() != Path("out", LONE).read_bytes()


def test_a_dry_run_runs_no_script(scripted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("adamerging", "base.safetensors", "a.safetensors", "b.safetensors", "--script", "script.py:data")
    assert run(capsys, "merge", *words, "-o", "new", "-n")[0] == 0
    assert not Path("ran").exists()


def test_a_module_is_compared_before_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_of_a_test"
    package.mkdir()
    ran = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("__init__", "inside"):
        (package / f"{name}.py").write_text(f"{ran}def f(model): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"inside\.py: not the script"):
        load_script("package_of_a_test.inside:f", {"inside.py": "0" * 64})
    assert not (tmp_path / "ran").exists()
    files = load_script("package_of_a_test.inside:f").files
    assert load_script("package_of_a_test.inside:f", files).files == files


def test_a_script_needs_a_recipe_that_has_one(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="script has no effect"):
        modelmerge.replay(merged, tmp_path / "two", script="x.py:f")


def test_different_bits_are_allowed_to_a_replay_only(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "merge", "--allow-different-bits")
    assert code == 2
    assert "no effect without --recipe" in err


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "org/kernel"},
        {"text_config": {"_attn_implementation": "org/kernel@main:flash"}},
        {"attn_implementation": {"vision_config": "org/kernel"}},
    ],
)
def test_a_config_that_names_a_kernel_on_the_hub_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="names code to run, 'org/kernel"):
        refuse_kernels(config, "model")
    refuse_kernels({"attn_implementation": "sdpa", "_name_or_path": "org/name"}, "model")
