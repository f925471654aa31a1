"""Writing: nothing at DIR ever looks complete and is not, whatever kills, fills or mistakes befall a run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import modelmerge
from modelmerge.checkpoint import publication, staging
from modelmerge.checkpoint.components import INDEX
from modelmerge.checkpoint.layout import lay_out, together
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ModelMergeError, OutputError
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.merge import execute
from modelmerge.verbs.prepare import Prepared, prepare
from tests.support.checkpoints import State, base_state, expert_state, family, read, write
from tests.support.processes import running

Content = dict[str, bytes]

# --- helpers ---


def content(directory: Path) -> Content:
    """Every file below a directory, hidden ones too, byte for byte."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def digests(directory: Path) -> dict[str, str]:
    """The sha256 of every weight file of a directory."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob("*.safetensors"))}


def staging_of(out: Path) -> Path:
    return out.parent / f".{out.name}.modelmerge"


def leftovers(out: Path) -> list[str]:
    """What a run should not have left beside its output."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}"))


def words(models: Sequence[Path], out: Path, *extra: str, method: str = "task-arithmetic") -> list[str]:
    """The command line, after the program's name."""
    return ["merge", method, *map(str, models), "-o", str(out), "--device", "cpu", *extra]


class Meddler:
    """A progress that does something once, in the middle of a merge."""

    def __init__(self, deed: Callable[[], object], *, after: int = 1) -> None:
        self._deed, self._left = deed, after

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        pass

    def begin(self, item: str) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def advance(self, amount: int, item: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._deed()


def interrupt() -> None:
    raise KeyboardInterrupt


def ready(models: Sequence[Path], method: str = "task-arithmetic", **told: Any) -> Prepared:
    recipe = Recipe(method=method, base=str(models[0]), experts=tuple(map(str, models[1:])), **told)
    return prepare(recipe, device="cpu")


def task_arithmetic(base: State, experts: Sequence[State], scale: float | None = None) -> State:
    """The merge of the small models, in memory, to the bit."""
    merged, scale = {}, round(len(experts) ** -0.5, 3) if scale is None else scale
    for name, theta_0 in base.items():
        if not theta_0.is_floating_point():
            merged[name] = theta_0
            continue
        total = experts[0][name].float() - theta_0.float()
        for expert in experts[1:]:
            total = total + (expert[name].float() - theta_0.float())
        merged[name] = (theta_0.float() + scale * total).to(theta_0.dtype)
    return merged


def merge_of(models: Sequence[Path]) -> State:
    """The same, of models on disk."""
    return task_arithmetic(read(models[0]), [read(model) for model in models[1:]])


def same(found: State, want: State) -> bool:
    return found.keys() == want.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in want.items()
    )


def errors(captured: pytest.CaptureFixture[str]) -> str:
    """What a run that failed said: one error line, and no traceback."""
    told = captured.readouterr().err
    assert told.count("error:") == 1, told
    assert told.startswith("error: "), told
    assert "Traceback" not in told
    return told


# --- models of many tensors ---


@dataclass(frozen=True)
class Many:
    """Three models of 24 matrices and the digest of their merge by `ties`."""

    models: list[Path]
    merged: dict[str, str]

    def command(self, out: Path, *extra: str) -> list[str]:
        return words(self.models, out, *extra, method="ties")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Many:
    """Made once; the merge is checked against the definition of TIES, in memory."""
    root = tmp_path_factory.mktemp("many")
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float) -> State:
        return {f"layers.{i:02}.weight": scale * torch.randn(64, 100, generator=generator) for i in range(24)}

    base = noise(0.1)
    experts = [{name: base[name] + tau for name, tau in noise(0.01).items()} for _ in range(2)]
    models = [write(root / "base", base), *(write(root / f"expert_{i}", e) for i, e in enumerate(experts))]
    manifest = modelmerge.merge(models[0], models[1:], root / "merged", method="ties", device="cpu")
    found = load_file(root / "merged" / "model.safetensors")

    trimmed = []
    for expert in experts:
        tau = torch.cat([(expert[name] - base[name]).flatten() for name in base])
        limit = tau.abs().kthvalue(len(tau) - int(0.2 * len(tau))).values
        trimmed.append(tau * (tau.abs() >= limit))
    sign = sum(trimmed).sign()
    want = manifest["recipe"]["options"]["scale"] * sum(tau * (tau.sign() == sign) for tau in trimmed)
    got = torch.cat([(found[name] - base[name]).flatten() for name in base])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    return Many(models, digests(root / "merged"))


# --- killed and interrupted runs, stopped before a call ---

STAGING = "modelmerge.checkpoint.staging:Staging"
KILLS = {
    "at the start": (f"{STAGING}._make_shards", 1),
    "while measuring": ("modelmerge.checkpoint.reader:Checkpoint.read_into", 25),  # the plan reads some rows before
    "while merging": (f"{STAGING}.write", 5),
    "while finishing": (f"{STAGING}.publish", 1),
}
KILLS_WITH_FORCE = {
    "while merging": (f"{STAGING}.write", 5),
    "before replacing": (f"{STAGING}._swap", 1),
    "after replacing": ("pathlib:Path.rename", 1),
    "while the old content goes": ("os:rmdir", 1),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_leaves_nothing_at_the_output_and_can_be_repeated(moment: str, many: Many, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop, call = KILLS[moment]
    with running(many.command(out), stop=stop, call=call) as run:
        run.until_stopped()
        assert staging_of(out).exists()
        assert (staging_of(out) / CARD).exists() == (moment == "while finishing")
        run.send(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
    assert not out.exists()
    assert main(many.command(out)) == 0
    assert digests(out) == many.merged
    assert leftovers(out) == []
    assert not [name for name in content(out) if name.startswith(".")]


@pytest.mark.parametrize("moment", KILLS_WITH_FORCE)
def test_a_killed_run_with_force_leaves_the_old_content_or_the_new(moment: str, many: Many, tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_state())
    (out / "sub").mkdir()
    (out / "sub" / "precious").write_text("mine")
    old = content(out)
    stop, call = KILLS_WITH_FORCE[moment]
    with running(many.command(out, "--force"), stop=stop, call=call) as run:
        run.until_stopped()
        assert (staging_of(out) / MANIFEST).exists() == (moment == "before replacing")
        run.send(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
    found = content(out)
    replaced = moment in ("after replacing", "while the old content goes")
    assert (found != old) == replaced
    if replaced:
        assert digests(out) == many.merged
        manifest = json.loads(found[MANIFEST])
        assert found.keys() == {*manifest["files"], MANIFEST}
    assert main(many.command(out, "--force")) == 0
    assert digests(out) == many.merged
    assert not (out / "sub").exists()
    assert leftovers(out) == []


def identities(directory: Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    stats = {name: (directory / name).stat() for name in names}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_killed_run_is_taken_up_without_rewriting_finished_shards(many: Many, tmp_path: Path) -> None:
    out, journal = tmp_path / "out", staging_of(tmp_path / "out") / ".journal.json"
    command = words(many.models, out, "--resume", "--max-shard-size", "26kB")
    with running(command, stop=f"{STAGING}.write", call=12) as run:
        run.until_stopped()
        done = sorted(json.loads(journal.read_bytes())["finished"])
        before = identities(staging_of(out), done)
        run.send(signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
    assert 3 <= len(done) < 24
    assert not out.exists()

    assert main(command) == 0
    assert identities(out, done) == before
    whole = tmp_path / "whole"
    assert main(words(many.models, whole, "--max-shard-size", "26kB")) == 0
    assert digests(out) == digests(whole)
    assert len(digests(out)) == 24
    assert (out / INDEX).read_bytes() == (whole / INDEX).read_bytes()
    assert leftovers(out) == []
    assert not (out / ".journal.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, code: int, many: Many, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(many.command(out), stop=f"{STAGING}.write", call=5) as run:
        run.until_stopped()
        assert staging_of(out).exists()
        run.send(number)
        assert run.end() == code
        assert "Traceback" not in run.out() + run.err()
    assert not out.exists()
    assert leftovers(out) == []


def test_an_interrupted_run_says_what_it_keeps(many: Many, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = words(many.models, out, "--resume", "--max-shard-size", "26kB")
    with running(command, stop=f"{STAGING}.write", call=12) as run:
        run.until_stopped()
        run.send(signal.SIGINT)
        assert run.end() == 130
        kept = len(json.loads((staging_of(out) / ".journal.json").read_bytes())["finished"])
        assert kept >= 3
        said = f"note: {kept} of 24 weight files are finished and kept: the same command takes them up"
        assert run.err().splitlines() == ["stopping", said, "error: interrupted"]
    with running(command) as run:
        assert run.end() == 0
    assert leftovers(out) == []


def test_a_second_run_to_the_same_output_is_refused(
    many: Many, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with running(many.command(out), stop=f"{STAGING}.write", call=5) as first:
        first.until_stopped()
        before = os.stat(staging_of(out)).st_ino, sorted(p.name for p in staging_of(out).iterdir())
        assert main(many.command(out)) == 1
        assert f"another run is writing {out}" in errors(capsys)
        assert main(many.command(out, "--force", "--resume")) == 1
        assert (os.stat(staging_of(out)).st_ino, sorted(p.name for p in staging_of(out).iterdir())) == before
        first.send(signal.SIGCONT)
        assert first.end() == 0
    assert digests(out) == many.merged
    assert leftovers(out) == []


# --- taking up an interrupted run ---


def interrupted(models: Sequence[Path], out: Path, *, resume: bool, after: int = 5, **told: Any) -> list[str]:
    """Run, interrupt, and tell which shards were finished."""
    prepared = ready(models, max_shard_size="1000", **told)
    with pytest.raises(KeyboardInterrupt):
        execute(prepared, out, resume=resume, progress=Meddler(interrupt, after=after))
    journal = staging_of(out) / ".journal.json"
    return sorted(json.loads(journal.read_bytes())["finished"]) if journal.exists() else []


def test_an_interrupted_run_without_resume_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    assert interrupted(models, tmp_path / "out", resume=False) == []
    assert leftovers(tmp_path / "out") == []


def test_an_interrupted_run_with_resume_is_taken_up(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = interrupted(models, out, resume=True)
    assert len(done) > 1
    before = identities(staging_of(out), done)
    execute(ready(models, max_shard_size="1000"), out, resume=True)
    assert identities(out, done) == before
    assert same(read(out), merge_of(models))
    manifest = json.loads((out / MANIFEST).read_bytes())
    assert {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith("rs")} == digests(out)


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"options": {"scale": 0.7}}, {"exclude": ("*.bias",)}])
def test_finished_shards_of_another_merge_are_not_taken_up(
    other: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    interrupted(models, tmp_path / "out", resume=True)
    execute(ready(models, max_shard_size="1000", **other), tmp_path / "out", resume=True)
    execute(ready(models, max_shard_size="1000", **other), tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_finished_shards_of_inputs_that_changed_are_not_taken_up(models: list[Path], tmp_path: Path) -> None:
    interrupted(models, tmp_path / "out", resume=True)
    write(models[1], expert_state(base_state(), 99))
    execute(ready(models, max_shard_size="1000"), tmp_path / "out", resume=True)
    assert same(read(tmp_path / "out"), merge_of(models))


def test_a_finished_shard_that_was_damaged_is_written_again(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = interrupted(models, out, resume=True)
    with (staging_of(out) / done[-1]).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    execute(ready(models, max_shard_size="1000"), out, resume=True)
    assert same(read(out), merge_of(models))


def test_a_run_without_resume_clears_what_an_interrupted_one_kept(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = interrupted(models, out, resume=True)
    before = identities(staging_of(out), done)
    (staging_of(out) / "stray").mkdir()
    (staging_of(out) / "stray" / "file").touch()
    execute(ready(models, max_shard_size="1000"), out)
    assert all(identities(out, [name])[name][1] != before[name][1] for name in done)
    assert not (out / "stray").exists()
    assert leftovers(out) == []


@pytest.mark.parametrize("most", [0, 1, 30, 64, 100, 10_000])
def test_shards_are_those_of_the_models_library(most: int) -> None:
    sizes = {f"t{i}": nbytes for i, nbytes in enumerate((40, 10, 100, 20, 64, 1, 0, 30))}
    theirs = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda nbytes: nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=most
    )
    layout = lay_out({name: ("U8", (nbytes,), nbytes) for name, nbytes in sizes.items()}, most)
    assert {shard.filename: list(shard.tensors) for shard in layout.shards} == theirs.filename_to_tensors
    for index in layout.indices.values():
        assert json.loads(index) == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    assert bool(layout.indices) == theirs.is_sharded


def test_shards_in_folders_are_taken_up_too(tmp_path: Path) -> None:
    """As of an output that holds several checkpoints."""
    data = {"a/w": b"\1" * 64, "b/w": b"\2" * 64}
    layout = together(lay_out({"w": ("U8", (64,), 64)}, 1000, folder=folder) for folder in ("a/", "b/"))

    def write_tensors(out: Path, names: Sequence[str], manifest: bytes | None) -> None:
        with staging.Staging(out, layout, resume=True, fingerprint="same") as stage:
            for name in names:
                if not stage.is_finished(name):
                    stage.write(name, 0, memoryview(data[name]))
            if manifest is None:
                raise KeyboardInterrupt
            stage.publish(manifest)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_tensors(out, ["a/w"], None)
    write_tensors(out, ["a/w", "b/w"], b"{}")
    assert sorted(content(out)) == ["a/model.safetensors", "b/model.safetensors", MANIFEST]
    for folder in ("a", "b"):
        assert bytes(load_file(out / folder / "model.safetensors")["w"].numpy()) == data[f"{folder}/w"]


# --- outputs that are refused ---


def test_a_full_directory_is_refused_and_untouched(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write(tmp_path / "out", base_state())
    old, inode = content(out), out.stat().st_ino
    assert main(words(models, out)) == 1
    told = errors(capsys)
    assert f"the output {out} is not empty" in told
    assert "--force" in told
    assert (content(out), out.stat().st_ino) == (old, inode)
    assert leftovers(out) == []


def test_force_replaces_the_whole_directory(models: list[Path], tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_state(), shards=3)
    (out / "stale.bin").touch()
    (out / "deep" / "er").mkdir(parents=True)
    assert main(words(models, out, "--force")) == 0
    assert sorted(content(out)) == [CARD, "config.json", "model.safetensors", MANIFEST, "tokenizer.json"]
    assert not (out / "deep").exists()
    assert leftovers(out) == []


def test_an_empty_directory_is_taken(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(words(models, tmp_path / "out")) == 0
    assert same(read(tmp_path / "out"), merge_of(models))


def test_missing_parents_are_made(models: list[Path], tmp_path: Path) -> None:
    assert main(words(models, tmp_path / "a" / "b" / "out")) == 0
    assert (tmp_path / "a" / "b" / "out" / MANIFEST).exists()


def test_content_that_appears_during_the_run_is_not_destroyed(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    meddler = Meddler(lambda: write(out, base_state()))
    with pytest.raises(OutputError, match="not empty"):
        execute(ready(models), out, progress=meddler)
    assert same(read(out), base_state())
    assert leftovers(out) == []


def linked(target: Path, link: Path) -> Path:
    link.symlink_to(target)
    return link


def shard_elsewhere(models: list[Path]) -> Path:
    """The base's weights are a symlink, as in the Hub's cache; the directory they really lie in."""
    weights, blobs = models[0] / "model.safetensors", models[0].parent / "blobs"
    blobs.mkdir()
    weights.rename(blobs / "0a1b2c")
    weights.symlink_to(blobs / "0a1b2c")
    return blobs


# id -> the output, and how it relates to an input; the models lie in tmp_path / "models"
IN_AN_INPUT: dict[str, tuple[Callable[[Path, list[Path]], Path], str]] = {
    "is the base": (lambda t, m: m[0], "is the input"),
    "is an expert": (lambda t, m: m[2], "is the input"),
    "is the base, by another spelling": (lambda t, m: m[1] / ".." / "base", "is the input"),
    "is the base, through a symlink": (lambda t, m: linked(m[0], t / "link"), "is the input"),
    "holds all": (lambda t, m: t / "models", "holds the input"),
    "holds all, through a symlink": (lambda t, m: linked(t / "models", t / "link"), "holds the input"),
    "holds the weights behind a symlink": (lambda t, m: shard_elsewhere(m), "holds the input"),
    "lies in the base": (lambda t, m: m[0] / "merged", "lies in the input"),
    "lies deep in an expert": (lambda t, m: m[1] / "a" / "b", "lies in the input"),
    "lies in the base, through a symlink": (lambda t, m: linked(m[0], t / "link") / "merged", "lies in the input"),
}


@pytest.mark.parametrize("case", IN_AN_INPUT)
def test_an_output_that_would_damage_an_input_is_refused(
    case: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, relation = IN_AN_INPUT[case]
    out = make(tmp_path, models)
    old = content(tmp_path)
    assert main(words(models, out, "--force")) == 1
    told = errors(capsys)
    assert relation in told
    assert str(out) in told
    assert content(tmp_path) == old


def test_an_input_behind_a_symlink_is_protected(models: list[Path], tmp_path: Path) -> None:
    link = linked(models[1], tmp_path / "link")
    assert main(words([models[0], link], models[1], "--force")) == 1
    assert same(read(models[1]), expert_state(base_state(), 0))


def test_an_output_that_holds_a_lone_input_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "files" / f"{name}.safetensors" for name in ("base", "expert")]
    files[0].parent.mkdir()
    for seed, file in enumerate(files):
        save_file(expert_state(base_state(), seed), file)
    assert main(words(files, files[0].parent, "--force")) == 1
    assert "holds the input" in errors(capsys)
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("output", [".", "..", "{here}", "{link}"])
def test_the_directory_one_is_in_is_refused(
    output: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "up" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    out = output.format(here=here, link=linked(here, tmp_path / "link"))
    assert main([*words(models, Path("unused")), "-o", out, "--force"]) == 1
    assert "cannot be replaced as a whole" in errors(capsys)
    assert list(here.iterdir()) == []


def test_an_output_that_is_a_file_is_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(words(models, file, "--force")) == 1
    assert f"{file} is a file" in errors(capsys)
    assert main(words(models, file / "out", "--force")) == 1
    assert str(file) in errors(capsys)
    assert file.read_text() == "mine"


def test_a_symlink_as_output_is_followed_and_kept(models: list[Path], tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    link = linked(real, tmp_path / "link")
    assert main(words(models, link)) == 0
    assert link.is_symlink()
    assert (real / MANIFEST).exists()
    assert leftovers(real) == leftovers(link) == []


# --- where directories cannot be exchanged in one step ---


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication, "_exchange", lambda *paths: False)


@pytest.mark.usefixtures("no_exchange")
def test_force_replaces_without_exchange(models: list[Path], tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_state())
    (out / "stale").touch()
    execute(ready(models), out, force=True)
    assert same(read(out), merge_of(models))
    assert not (out / "stale").exists()
    assert leftovers(out) == []


def rename_failing(number: int, fails: Callable[[Path, Path], bool]) -> Callable[[Path, Path], Path]:
    """`Path.rename`, with an error of that number for some paths and targets."""
    rename = Path.rename

    def renamed(path: Path, target: Path) -> Path:
        if fails(path, target):
            raise OSError(number, os.strerror(number))
        return rename(path, target)

    return renamed


@pytest.mark.usefixtures("no_exchange")
def test_the_old_content_comes_back_if_the_new_cannot_take_its_place(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", base_state())
    old = content(out)
    monkeypatch.setattr(Path, "rename", rename_failing(errno.EACCES, lambda path, target: path == staging_of(out)))
    with pytest.raises(OutputError, match=r"cannot put the output in place in .*: Permission denied"):
        execute(ready(models), out, force=True)
    assert content(out) == old
    assert leftovers(out) == []


@pytest.mark.usefixtures("no_exchange")
def test_old_content_that_cannot_come_back_is_named_and_the_next_run_brings_it(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", base_state())
    old = content(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_failing(errno.ENOSPC, lambda path, target: target == out))
        with pytest.raises(OutputError, match=r"old content of .*out is in .*\.out\.modelmerge-old"):
            execute(ready(models), out, force=True)
    assert content(tmp_path / ".out.modelmerge-old") == old
    execute(ready(models), out, force=True)
    assert same(read(out), merge_of(models))
    assert leftovers(out) == []


def test_the_next_run_puts_back_what_a_kill_between_two_renames_left(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / ".out.modelmerge-old", base_state())
    old = content(tmp_path / ".out.modelmerge-old")
    with pytest.raises(KeyboardInterrupt):
        execute(ready(models), out, force=True, progress=Meddler(interrupt))
    assert content(out) == old
    assert leftovers(out) == []
    execute(ready(models), out, force=True)
    assert (out / MANIFEST).exists()


def test_what_the_next_run_puts_back_is_not_replaced_without_force(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path / ".out.modelmerge-old", base_state())
    with pytest.raises(OutputError, match="not empty"):
        execute(ready(models), out)
    assert same(read(out), base_state())


def test_no_other_run_may_begin_while_the_old_content_is_removed(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", base_state())
    rmtree, refused = shutil.rmtree, []

    def intrude(path: Path, **told: Any) -> None:
        if (out / MANIFEST).exists() and staging_of(out).exists():
            try:
                os.close(staging._claim(staging_of(out), out))
            except OutputError as error:
                refused.append(error)
            else:
                refused.append(None)
        rmtree(path, **told)

    monkeypatch.setattr(staging.shutil, "rmtree", intrude)
    execute(ready(models), out, force=True)
    assert None not in refused


# --- full disks and failing writes ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def with_large_tokenizer(models: list[Path]) -> list[Path]:
    """The models, and two megabytes of tokenizer beside the base's 9 kB of weights."""
    (models[0] / "tokenizer.json").write_bytes(b'{"x": "%s"}' % (b"x" * 2_000_000))
    return models


def test_a_disk_too_small_for_the_weights_is_refused_at_once(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"w": torch.zeros(300_000)}
    models = [write(tmp_path / "base", base), write(tmp_path / "expert", expert_state(base, 0))]
    assert main(words(models, small_disk / "out")) == 1
    assert "the output needs 1,3" in errors(capsys)  # with the manifest
    assert list(small_disk.iterdir()) == []


def test_a_disk_too_small_for_what_goes_beside_the_weights_is_refused_at_once(
    small_disk: Path, with_large_tokenizer: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = write(small_disk / "out", base_state())
    old = content(out)
    assert main(words(with_large_tokenizer, out, "--force")) == 1
    assert "the output needs 2,2" in errors(capsys)
    assert content(out) == old
    assert leftovers(out) == []


def test_a_limit_on_file_sizes_leaves_the_old_content(with_large_tokenizer: list[Path], tmp_path: Path) -> None:
    out = write(tmp_path / "out", base_state())
    old = content(out)
    with running(words(with_large_tokenizer, out, "--force"), limits={"RLIMIT_FSIZE": 1_000_000}) as run:
        assert run.end() == 1
        printed, told = run.out(), run.err()
    assert printed == ""
    assert told.count("error:") == 1
    assert "cannot write tokenizer.json" in told
    assert "larger than this system allows" in told
    assert "Traceback" not in told
    assert content(out) == old
    assert leftovers(out) == []


def test_a_shard_above_the_limit_on_file_sizes_is_refused_before_the_merge(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        code = main(words(models, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert "cannot prepare the output" in errors(capsys)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_call_that_fails_leaves_the_old_content(
    number: int, call: str, at: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", base_state())
    old, real, calls = content(out), getattr(os, call), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == at:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(staging.os, call, fail)
    with pytest.raises(OutputError, match="cannot ") as caught:
        execute(ready(models, max_shard_size="2000"), out, force=True)
    assert str(tmp_path) in caught.value.message
    assert {errno.ENOSPC: "no space left", errno.EDQUOT: "quota", errno.EIO: "Input/output error"}[
        number
    ] in caught.value.message
    assert content(out) == old
    assert leftovers(out) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_without_fsync_for_directories_is_no_obstacle(
    number: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(staging.os, "fsync", fsync)
    execute(ready(models), tmp_path / "out")
    assert refused
    assert same(read(tmp_path / "out"), merge_of(models))
    assert (tmp_path / "out" / MANIFEST).exists()
    assert leftovers(tmp_path / "out") == []


def test_a_directory_whose_fsync_fails_for_another_reason_is_an_error(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(staging.os, "fsync", fsync)
    with pytest.raises(OutputError, match="no space left"):
        execute(ready(models), tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_claim_space_is_no_obstacle(
    number: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.os, "posix_fallocate", fail)
    execute(ready(models), tmp_path / "out")
    assert same(read(tmp_path / "out"), merge_of(models))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_system_without_locks_is_refused_and_nothing_left(
    number: int, resume: bool, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.fcntl, "flock", fail)
    with pytest.raises(OutputError, match=r"cannot lock .*\.out\.modelmerge: ") as refused:
        execute(ready(models), tmp_path / "out", resume=resume)
    assert refused.value.hint == "name a place on a file system that has locks"
    assert leftovers(tmp_path / "out") == []
    assert not (tmp_path / "out").exists()


def test_short_writes_are_continued(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(staging.os, "pwrite", lambda file, data, position: real(file, data[:100], position))
    execute(ready(models), tmp_path / "out")
    assert same(read(tmp_path / "out"), merge_of(models))


# --- what is written ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limit", ["5GB", "1000"])
def test_the_weights_are_those_of_the_merge_in_memory(dtype: torch.dtype, limit: str, tmp_path: Path) -> None:
    models = family(tmp_path / "models", dtype=dtype, shards=2)
    execute(ready(models, max_shard_size=limit), tmp_path / "out")
    assert same(read(tmp_path / "out"), merge_of(models))


KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "spiece.model", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json",
    "additional_chat_templates/tool.jinja", "1_Pooling/config.json", "modeling_tiny.py", "LICENSE", "LICENSE.md",
    "NOTICE.txt", "modules.json", "source.spm", "qwen.tiktoken",
)  # fmt: skip
LEFT = (
    "README.md", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "training_args.bin",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "trainer_state.json", "model.gguf", "tf_model.h5",
    "consolidated.safetensors", "modelmerge.json", "checkpoint-5/config.json", "runs/events.out.tfevents",
    "onnx/model.onnx", ".gitattributes", ".cache/huggingface/x.json", "logo.png", INDEX,
)  # fmt: skip


@pytest.fixture
def furnished(models: list[Path]) -> list[Path]:
    """The models, with everything beside the base's two shards that a checkpoint directory may hold."""
    (models[0] / "model.safetensors").unlink()
    write(models[0], base_state(), shards=2)
    for name in {*KEPT, *LEFT} - {INDEX}:
        (models[0] / name).parent.mkdir(parents=True, exist_ok=True)
        # JSON that is read: spaced as no writer would.
        read_too = name in ("config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST)
        (models[0] / name).write_bytes(b'{"a":\t1}\r\n' if read_too else name.encode() + b"\r\n\0\xff")
    (models[0] / "modules.json").write_bytes(b'[{"path":\t""},\r\n{"path": "1_Pooling"}]')
    return models


def test_companions_are_copied_byte_for_byte_and_nothing_else(furnished: list[Path], tmp_path: Path) -> None:
    execute(ready(furnished), tmp_path / "out")
    found = content(tmp_path / "out")
    assert sorted(found) == sorted([*KEPT, "model.safetensors", CARD, MANIFEST])
    for name in KEPT:
        assert found[name] == (furnished[0] / name).read_bytes(), name
    assert found[CARD] != (furnished[0] / CARD).read_bytes()
    assert found[MANIFEST] != (furnished[0] / MANIFEST).read_bytes()


def test_the_output_holds_no_hidden_file(furnished: list[Path], tmp_path: Path) -> None:
    """Not even those that an archive from another system leaves beside a config."""
    (furnished[0] / "._config.json").write_bytes(b"\0\5\x16\7")
    execute(ready(furnished, max_shard_size="1000"), tmp_path / "out", resume=True)
    assert [p.name for p in (tmp_path / "out").rglob(".*")] == []


def test_companions_in_the_hubs_cache_become_files(models: list[Path], tmp_path: Path) -> None:
    """A snapshot there is a directory of links to blobs beside it."""
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in models[0].iterdir():
        file.rename(blobs / f"{file.name}-digest")
        (snapshot / file.name).symlink_to(Path("../../blobs", f"{file.name}-digest"))
    execute(ready([snapshot, *models[1:]]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "config.json").read_bytes() == (blobs / "config.json-digest").read_bytes()


def test_links_out_of_a_model_are_not_followed_and_that_is_said(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret")
    (models[0] / "notes.txt").symlink_to(Path("..", "..", "id_rsa"))
    (models[0] / "LICENSE").symlink_to(tmp_path / "id_rsa")
    (models[0] / "more.txt").symlink_to("tokenizer.json")  # stays inside
    weights = models[0] / "model.safetensors"
    weights.rename(tmp_path / "another-disk.safetensors")
    weights.symlink_to(tmp_path / "another-disk.safetensors")  # read, not copied
    manifest = execute(ready(models), tmp_path / "out")
    names = content(tmp_path / "out")
    assert "more.txt" in names
    assert not {"notes.txt", "LICENSE"} & set(names)
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert any("LICENSE, notes.txt" in note and "not followed" in note for note in manifest["notes"])


def test_code_that_goes_along_is_named(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "modeling_odd.py").write_text("raise SystemExit('it ran')\n")
    prepared = ready(models)
    along = "goes along, which runs only with trust_remote_code: modeling_odd.py"
    assert any(along in remark for remark in prepared.describe()["remarks"])
    manifest = execute(prepared, tmp_path / "out")
    assert any(along in note for note in manifest["notes"])
    assert (tmp_path / "out" / "modeling_odd.py").exists()
    assert along in (tmp_path / "out" / CARD).read_text()


def test_a_lone_file_as_base_has_no_companions(models: list[Path], tmp_path: Path) -> None:
    execute(ready([models[0] / "model.safetensors", *models[1:]]), tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [CARD, "model.safetensors", MANIFEST]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_the_umask_decides_on_the_modes(mask: int, furnished: list[Path], tmp_path: Path) -> None:
    (furnished[0] / "tokenizer.json").chmod(0o600)
    (furnished[0] / "modeling_tiny.py").chmod(0o755)
    before = os.umask(mask)
    try:
        execute(ready(furnished, max_shard_size="1000"), tmp_path / "out", resume=True)
    finally:
        os.umask(before)
    out = tmp_path / "out"
    modes = {p: p.stat().st_mode & 0o777 for p in (out, *out.rglob("*"))}
    assert modes == {p: (0o777 if p.is_dir() else 0o666) & ~mask for p in modes}


@pytest.mark.parametrize("limit", ["5GB", "1000"])
def test_the_manifest_tells_digest_and_size_of_every_file(limit: str, furnished: list[Path], tmp_path: Path) -> None:
    execute(ready(furnished, max_shard_size=limit), tmp_path / "out")
    found = content(tmp_path / "out")
    manifest = json.loads(found.pop(MANIFEST))
    assert manifest["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in found.items()
    }
    for model, told in zip(furnished, [manifest["inputs"]["base"], *manifest["inputs"]["experts"]], strict=True):
        shards = [f for f in sorted(model.glob("*.safetensors")) if f.name.startswith("model")]
        assert told["files"] == {
            str(f): {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size} for f in shards
        }


@pytest.mark.parametrize("resume", [False, True])
def test_the_manifest_is_the_last_file(resume: bool, furnished: list[Path], tmp_path: Path) -> None:
    execute(ready(furnished, max_shard_size="1000"), tmp_path / "out", resume=resume)
    files = {p.name: p.stat() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    last = files.pop(MANIFEST)
    assert last.st_mtime_ns >= max(stat.st_mtime_ns for stat in files.values())
    assert last.st_ctime_ns >= max(stat.st_ctime_ns for stat in files.values())


def test_the_manifest_is_written_after_all_else(
    furnished: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = staging.Staging.write_file

    def note(staging: staging.Staging, name: str, data: bytes | Path) -> None:
        if name == MANIFEST:
            assert {p.name for p in staging_of(tmp_path / "out").glob("*.safetensors")} < staging.digests.keys()
        written.append(name)
        real(staging, name, data)

    monkeypatch.setattr(staging.Staging, "write_file", note)
    execute(ready(furnished, max_shard_size="1000"), tmp_path / "out")
    assert written[-1] == MANIFEST
    assert written.count(MANIFEST) == 1
    assert {INDEX, CARD, *KEPT} <= set(written)


def test_the_index_places_every_tensor(models: list[Path], tmp_path: Path) -> None:
    execute(ready(models, max_shard_size="1500"), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    state = base_state()
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert set(index["weight_map"].values()) == digests(tmp_path / "out").keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert shard.get_tensor(name).shape == state[name].shape


def test_one_file_has_no_index(models: list[Path], tmp_path: Path) -> None:
    execute(ready(models), tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == base_state().keys()


def test_the_output_is_a_checkpoint_that_can_be_merged_again(models: list[Path], tmp_path: Path) -> None:
    execute(ready(models, max_shard_size="1500"), tmp_path / "out")
    execute(ready([tmp_path / "out", *models[1:]]), tmp_path / "again")
    want = merge_of([tmp_path / "out", *models[1:]])
    assert same(read(tmp_path / "again"), want)


# --- inputs that change under a run ---


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def remove(model: Path) -> None:
    (model / "model.safetensors").unlink()


def shift(model: Path) -> None:
    """The same tensors behind a longer header, as another writer would store them."""
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").write_bytes(save(state, metadata={"format": "pt", "note": "z" * 64}))


def touch_up(model: Path) -> None:
    """Other values in the same places."""
    state = load_file(model / "model.safetensors")
    state["logit_scale"] += 1
    (model / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


@pytest.mark.parametrize("change", [truncate, remove, shift])
@pytest.mark.parametrize("which", [0, 2], ids=["base", "expert"])
def test_an_input_that_changes_between_planning_and_reading_is_refused(
    change: Callable[[Path], None], which: int, models: list[Path], tmp_path: Path
) -> None:
    prepared = ready(models)
    change(models[which])
    with pytest.raises(CheckpointError) as caught:
        execute(prepared, tmp_path / "out")
    assert str(models[which] / "model.safetensors") in caught.value.message
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("change", [truncate, remove, shift, touch_up])
@pytest.mark.parametrize("which", [0, 2], ids=["base", "expert"])
def test_an_input_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], None], which: int, models: list[Path], tmp_path: Path
) -> None:
    prepared = ready(models)
    with pytest.raises(CheckpointError) as caught:
        execute(prepared, tmp_path / "out", progress=Meddler(lambda: change(models[which]), after=3))
    assert str(models[which] / "model.safetensors") in caught.value.message
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


# --- values that cannot be ---

WEIGHT, NORM = "model.layers.0.q_proj.weight", "model.layers.0.norm.weight"


def spoil(model: Path, tensor: str, value: float) -> None:
    state = load_file(model / "model.safetensors")
    state[tensor].view(-1)[-1] = value
    (model / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))


@pytest.mark.parametrize("method", ["average", "task-arithmetic", "ties", "apgd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("which", [0, 2], ids=["base", "expert"])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    method: str, value: float, which: int, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(models[which], WEIGHT, value)
    assert main(words(models, tmp_path / "out", method=method)) == 1
    told, kind = errors(capsys), "NaN" if value != value else "Inf"
    file = models[which] / "model.safetensors"
    assert f"{file}: tensor '{WEIGHT}' of '{models[which].name}' holds {kind}" in told
    assert f"--exclude '{WEIGHT}'" in told
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
@pytest.mark.parametrize("which", [0, 2], ids=["base", "expert"])
def test_a_weight_that_is_not_finite_is_refused_where_16_bits_are_stored(
    method: str, which: int, models: list[Path], tmp_path: Path
) -> None:
    spoil(models[which], WEIGHT, float("-inf"))
    with pytest.raises(CheckpointError, match=f"'{WEIGHT}' of '{models[which].name}' holds Inf"):
        execute(ready(models, method=method, dtype="bfloat16"), tmp_path / "out")


def test_infinities_that_cancel_are_found(models: list[Path], tmp_path: Path) -> None:
    for model in models:
        spoil(model, WEIGHT, float("inf"))
    with pytest.raises(CheckpointError, match=f"'{WEIGHT}' of 'base' holds Inf"):
        execute(ready(models), tmp_path / "out")


@pytest.mark.parametrize(
    "told",
    [{"include": ("*_proj*",)}, {"method": "apgd"}, {"method": "apgd", "rest": "average"}],
    ids=["not included", "not linear", "the rest"],
)
def test_a_copied_tensor_that_is_not_finite_is_refused(
    told: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    spoil(models[0], NORM, float("nan"))
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{NORM}' of 'base' holds NaN"):
        execute(ready(models, **told), tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_an_expert_may_hold_anything_in_a_tensor_that_is_copied(models: list[Path], tmp_path: Path) -> None:
    spoil(models[1], NORM, float("nan"))
    execute(ready(models, include=("*_proj*",)), tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")[NORM], base_state()[NORM])


def test_large_finite_values_are_not_taken_for_infinities(tmp_path: Path) -> None:
    """Whose sum overflows float32."""
    base = {"w": torch.full((100,), 3e38), "v": torch.full((100,), 3e38)}
    small = [write(tmp_path / name, base) for name in ("b", "e")]
    execute(ready(small, include=("w",)), tmp_path / "out")
    assert same(read(tmp_path / "out"), base)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_excluding_a_tensor_copies_it_unchecked(dtype: str | None, models: list[Path], tmp_path: Path) -> None:
    spoil(models[0], NORM, float("-inf"))
    spoil(models[1], NORM, float("nan"))
    execute(ready(models, exclude=(NORM,), dtype=dtype), tmp_path / "out")
    found, want = read(tmp_path / "out")[NORM], read(models[0])[NORM]
    assert torch.equal(found, want.to(found.dtype))
    assert found.dtype == (getattr(torch, dtype) if dtype else torch.float32)


def pair(root: Path, base: Tensor, expert: Tensor) -> list[Path]:
    return [write(root / "base", {"w": base}), write(root / "expert", {"w": expert})]


def test_an_overflow_of_float16_is_refused_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = pair(tmp_path, torch.full((8,), 30_000.0).half(), torch.full((8,), 60_000.0).half())
    out = tmp_path / "out"
    assert main(words(models, out, "--scale", "2")) == 1
    told = errors(capsys)
    assert "tensor 'w': the merged values overflow float16" in told
    assert "--dtype float32" in told
    assert not out.exists()
    assert leftovers(out) == []
    assert main(words(models, out, "--scale", "2", "--dtype", "float32")) == 0
    assert read(out)["w"].tolist() == [90_000.0] * 8


@pytest.mark.parametrize("include", [("w",), ("v",)], ids=["merged", "copied"])
@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (1e300, torch.float64, "float32"),
        (1e300, torch.float64, "bfloat16"),
        (1e300, torch.float64, "float16"),
        (3.4e38, torch.float32, "bfloat16"),
        (1e5, torch.bfloat16, "float16"),
    ],
)
def test_an_overflow_of_the_dtype_that_was_asked_for_is_refused(
    value: float, stored: torch.dtype, dtype: str, include: tuple[str, ...], tmp_path: Path
) -> None:
    state = {"w": torch.tensor([value, 1.0], dtype=stored), "v": torch.ones(2, dtype=stored)}
    models = [write(tmp_path / name, state) for name in ("b", "e")]
    with pytest.raises(ModelMergeError, match=f"overflow {dtype}"):
        execute(ready(models, include=include, dtype=dtype), tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_merged_values_that_overflow_are_refused(tmp_path: Path) -> None:
    models = pair(tmp_path, torch.full((8,), 1e38), torch.full((8,), 2e38))
    with pytest.raises(CheckpointError, match="'w': the merged values are not finite"):
        execute(ready(models, options={"scale": 30.0}), tmp_path / "out")
    assert leftovers(tmp_path / "out") == []
