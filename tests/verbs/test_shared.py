"""merge --cluster files: real processes that share a merge out, and what becomes of it when some of them die."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint.digest import FileDigest
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.work import work_folder
from modelmerge.cli import main
from modelmerge.engine import corrections, shared_vector, survey, units
from modelmerge.errors import CheckpointError, ModelMergeError, OutputError, UsageError
from modelmerge.methods import registry, threshold
from modelmerge.record import fingerprint
from modelmerge.record.redaction import published
from tests.support.checkpoints import base_state, expert_state, family, read, same_bits, write
from tests.support.processes import finish, running, started

LEASE = "1.5"  # seconds
SURVEY = "modelmerge.engine.survey:in_parallel"
WRITE = "modelmerge.checkpoint.shard_file:ShardFile.write"
DONE = "modelmerge.checkpoint.work:Claim.finish"
SWAP = "modelmerge.checkpoint.publication:Publication._swap"
REMOVE = "modelmerge.checkpoint.work:WorkFolder.remove"


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMERGE_LEASE", LEASE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units as large models have them: several to each stage."""
    for name in ("LITTLE", "MUCH"):
        for module in (units, survey, shared_vector, corrections):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 1)


def words(models: list[Path], out: Path, method: str = "ties", *more: str) -> list[str]:
    return ["merge", method, *map(str, models), "-o", str(out), "--max-shard-size", "2KB", "--cluster", "files", *more]


def alone(models: list[Path], out: Path, method: str = "ties", **options: Any) -> dict[str, str]:
    """The sha256 of the weight files that one process writes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        manifest = modelmerge.merge(models[0], models[1:], out, method=method, max_shard_size="2KB", **options)
    finally:
        torch.set_num_threads(before)
    return weights(manifest)


def weights(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def manifest_at(out: Path) -> dict[str, Any]:
    """The manifest of an output beside which nothing is left."""
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")] == []
    manifest = json.loads((out / MANIFEST).read_text())
    assert {path.name for path in out.iterdir()} == {*manifest["files"], MANIFEST}
    return manifest


# --- as one process ---


@pytest.mark.parametrize(
    ("method", "more"), [("ties", []), ("kron", []), ("task-arithmetic", ["--disentangle", "awd"])]
)
def test_three_processes_write_what_one_writes(
    method: str, more: list[str], models: list[Path], tmp_path: Path
) -> None:
    options = {"disentangle": more[1]} if more else {}
    want = alone(models, tmp_path / "alone", method, **options)
    out = tmp_path / "out"
    with started(words(models, out, method, *more), 3) as runs:
        finish(runs)
    manifest = manifest_at(out)
    assert weights(manifest) == want
    assert 1 <= len(manifest["workers"]) <= 3
    assert all(worker["units"] and worker["threads"] == 1 for worker in manifest["workers"])
    assert [worker["host"] for worker in published(manifest)["workers"]] == [None] * len(manifest["workers"])
    assert main(["verify", str(out), "-q"]) == 0
    again = modelmerge.replay(out / MANIFEST, tmp_path / "again")
    assert weights(again) == want
    assert "workers" not in again


def merged_by_units(models: list[Path], tmp_path: Path, **options: Any) -> None:
    one = modelmerge.merge(models[0], models[1:], tmp_path / "one", max_shard_size="2KB", **options)
    all_ = modelmerge.merge(models[0], models[1:], tmp_path / "units", max_shard_size="2KB", cluster="files", **options)
    assert weights(all_) == weights(one)
    differ = {name for name in one if one[name] != all_.get(name)}
    assert differ <= {"created", "command", "seconds", "files"}, {name: (one[name], all_[name]) for name in differ}
    manifest_at(tmp_path / "units")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("method", [n for n in registry.names() if not registry.load(n).on_data])
def test_every_method_works_in_units(method: str, tmp_path: Path) -> None:
    paths = family(tmp_path / "models", experts=registry.load(method).most_experts or 3, dtype=torch.bfloat16)
    merged_by_units(paths, tmp_path, method=method)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("text", ["awd", "awd granularity=tensor", "awd granularity=model", "apgd",
                                  "apgd correction=task", "apgd solver=adam"])  # fmt: skip
@pytest.mark.parametrize("method", ["ties", "model-stock"])
def test_every_transform_works_in_units(text: str, method: str, models: list[Path], tmp_path: Path) -> None:
    merged_by_units(models, tmp_path, method=method, disentangle=[text])


def test_coefficients_are_found_by_one_process_for_all(tmp_path: Path) -> None:
    base = {"weight": torch.eye(3), "bias": torch.zeros(3)}
    states = [base, *({"weight": torch.eye(3) * i, "bias": torch.ones(3)} for i in (2, 3))]
    paths = [write(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    script = tmp_path / "script.py"
    made = "torch.nn.Linear(3, 3), torch.arange(12.0).view(4, 3) / 12"
    script.write_text(f"import torch\n\n\ndef unlabelled(expert):\n    return {made}\n")
    words = ["merge", "adamerging", *map(str, paths), "--script", f"{script}:unlabelled", "--steps", "3"]
    assert main([*words, "-o", str(tmp_path / "alone"), "-q"]) == 0
    with started([*words, "-o", str(tmp_path / "out"), "--cluster", "files"], 2) as runs:
        finish(runs)
    one, shared = json.loads((tmp_path / "alone" / MANIFEST).read_text()), manifest_at(tmp_path / "out")
    assert weights(shared) == weights(one)
    assert shared["recipe"]["coefficients"] == one["recipe"]["coefficients"]
    assert shared["adaptation"] == one["adaptation"]


def test_a_recipe_is_repeated_by_several(models: list[Path], tmp_path: Path) -> None:
    want = alone(models, tmp_path / "alone", "kron", at=["*mlp*: ties density=0.5", "*q_proj*: base"])
    command = [
        "merge",
        "--recipe",
        str(tmp_path / "alone" / MANIFEST),
        "-o",
        str(tmp_path / "out"),
        "--cluster",
        "files",
    ]
    with started(command, 2) as runs:
        finish(runs)
    assert weights(manifest_at(tmp_path / "out")) == want


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("asked", [{"method": "ties", "at": ["*mlp*: density=0.5"]}, {"method": "pcb"}], ids=str)
def test_a_sample_is_the_same_in_units(
    asked: dict[str, Any], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threshold, "SAMPLED", 1)
    monkeypatch.setattr(threshold, "SHARE", 3)
    monkeypatch.setattr(modelmerge.engine.survey, "SAMPLE_RUN", 64)
    merged_by_units(models, tmp_path, **asked)


def test_each_input_is_hashed_once(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, advance = [], FileDigest._advance

    def count(digest: FileDigest, position: int) -> None:
        hashed.append(position - digest._position)
        advance(digest, position)

    monkeypatch.setattr(FileDigest, "_advance", count)
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", cluster="files")
    sizes = [(path / "model.safetensors").stat().st_size for path in models]
    assert sorted(hashed) == sorted(sizes)  # each in one go: not as reads come along
    inputs = manifest["inputs"]
    assert all(
        len(file["sha256"]) == 64 for each in (inputs["base"], *inputs["experts"]) for file in each["files"].values()
    )


# --- workers that die or sleep ---


@pytest.mark.parametrize(("stop", "call"), [
    pytest.param(SURVEY, 2, id="in a survey"),
    pytest.param(WRITE, 4, id="in a shard", marks=pytest.mark.slow),
    pytest.param(DONE, 5, id="before the marker"),
    pytest.param(SWAP, 1, id="in publishing"),
    pytest.param(REMOVE, 1, id="after publishing", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_a_killed_process_was_at_is_taken_over(stop: str, call: int, models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop=stop, call=call) as first:
        first.until_stopped()
        with started(words(models, out), 2, first=1) as others:
            first.send(signal.SIGKILL)
            assert first.end() == -signal.SIGKILL
            finish(others)
    assert weights(manifest_at(out)) == want


@pytest.mark.parametrize(("stop", "call"), [
    pytest.param(SURVEY, 2, id="in a survey", marks=pytest.mark.slow),
    pytest.param(WRITE, 4, id="in a shard"),
    pytest.param(DONE, 5, id="before the marker", marks=pytest.mark.slow),
    pytest.param(SWAP, 1, id="in publishing"),
])  # fmt: skip
def test_who_sleeps_beyond_the_lease_does_no_damage(stop: str, call: int, models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop=stop, call=call) as first:
        first.until_stopped()
        with running(words(models, out), beside=1) as other:
            finish([other])
        inode = out.stat().st_ino
        first.send(signal.SIGCONT)
        finish([first])
    assert weights(manifest_at(out)) == want
    assert out.stat().st_ino == inode


def test_what_is_left_of_a_folder_that_was_being_removed_goes_with_the_next(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop="modelmerge.checkpoint.work:shutil.rmtree") as first:
        first.until_stopped()
        first.send(signal.SIGKILL)
        first.end()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    with running(words(models, out)) as again:
        finish([again])
    assert weights(manifest_at(out)) == want


def test_who_comes_while_the_output_is_published_finds_it_complete(models: list[Path], tmp_path: Path) -> None:
    """He looks for it just before, and at the place just after."""
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop="modelmerge.verbs.shared:check_output") as late:
        late.until_stopped()
        with running(words(models, out), beside=1) as other:
            finish([other])
        late.send(signal.SIGCONT)
        finish([late])
    assert weights(manifest_at(out)) == want


def test_two_who_publish_in_turn_publish_once(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), write(tmp_path / "out", base_state())
    command = words(models, out, "ties", "--force")
    with running(command, stop=SWAP) as first, running(command, stop=SWAP, beside=1) as second:
        first.until_stopped()
        second.until_stopped()  # it has waited for the lease, and has the files
        first.send(signal.SIGCONT)
        second.send(signal.SIGCONT)
        finish([first, second])
    assert weights(manifest_at(out)) == want


def test_files_that_somebody_else_has_put_in_place_move_nothing(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = Publication(models[0], tmp_path / "gone", Layout((), {}, {}), force=True)
    monkeypatch.setattr(Path, "rename", lambda *paths: pytest.fail(f"moved {paths}"))
    with pytest.raises(FileNotFoundError):
        publication._swap()


def test_the_only_process_is_killed_and_started_anew(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone", "kron"), tmp_path / "out"
    command = words(models, out, "kron")
    with running(command, stop=DONE, call=4) as first:
        first.until_stopped()
        kept = {path.name: path.stat().st_ino for path in (work_folder(out) / "files").iterdir()}
        first.send(signal.SIGKILL)
        first.end()
    assert len(kept) >= 3
    with running(command) as again:
        finish([again])
    assert weights(manifest_at(out)) == want
    assert sum((out / name).stat().st_ino == inode for name, inode in kept.items()) >= 3


def test_a_process_alone_resumes_what_was_shared_out(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone", "kron"), tmp_path / "out"
    command = words(models, out, "kron")
    with running(command, stop=DONE, call=4) as first:
        first.until_stopped()
        first.send(signal.SIGKILL)
        first.end()
    kept = {path.name: path.stat().st_ino for path in (work_folder(out) / "files").iterdir()}
    plain = [*command[: command.index("--cluster")], "--resume"]
    with running(["merge", "ties", *plain[2:]]) as other:
        assert other.end() == 1
        assert "has the work of a merge that is shared out" in other.err()
    with running(plain, environment={"OMP_NUM_THREADS": "2"}) as again:  # it is given as many threads as the others had
        finish([again])
        assert "takes up what is finished" in again.err()
    manifest = manifest_at(out)
    assert weights(manifest) == want
    assert sum((out / name).stat().st_ino == inode for name, inode in kept.items()) >= 3
    assert {worker["threads"] for worker in manifest["workers"]} == {1}


def test_what_a_process_alone_has_left_goes_with_the_shared_merge(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    command = words(models, out)
    with running([*command[: command.index("--cluster")], "--resume"], stop=WRITE, call=4) as first:
        first.until_stopped()
        first.send(signal.SIGKILL)
        first.end()
    assert list((tmp_path / ".out.modelmerge").iterdir())
    with running(command) as shared:
        finish([shared])
    assert weights(manifest_at(out)) == want


def test_an_interrupted_process_gives_its_unit_back(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop=WRITE, call=4) as first:
        first.until_stopped()
        first.send(signal.SIGINT)
        assert first.end() == 130
    assert not list((work_folder(out) / "units").glob("*claim*"))
    with running(words(models, out), environment={"MODELMERGE_LEASE": "60"}) as again:
        finish([again])  # with nobody to wait for
    assert weights(manifest_at(out)) == want


def test_a_process_whose_disk_is_full_leaves_its_unit_to_the_others(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone", "average"), tmp_path / "out"
    command = words(models, out, "average")
    with running(command, stop=WRITE, environment={"MODELMERGE_LEASE": "60"}) as first:
        first.until_stopped()
        with running(command, beside=1, limits={"RLIMIT_FSIZE": 1000}) as small:
            assert small.end() == 1
            assert "the file is larger than this system allows" in small.err()
            assert f"what is finished is kept in {work_folder(out)}" in small.err()
        first.send(signal.SIGCONT)
        finish([first])
    assert weights(manifest_at(out)) == want


# --- who may take part ---


def test_a_process_that_comes_late_says_that_all_is_done(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    merge = lambda **more: modelmerge.merge(models[0], models[1:], out, method="ties", cluster="files", **more)  # noqa: E731
    first = merge()
    inode = out.stat().st_ino
    assert merge() == merge(force=True) == first
    assert main(["merge", "ties", *map(str, models), "-o", str(out), "--cluster", "files"]) == 0
    assert f"{out} is complete already" in capsys.readouterr().err.replace("\n", "")
    assert out.stat().st_ino == inode
    with pytest.raises(OutputError, match="is not empty"):
        merge(seed=1)


def test_only_processes_that_are_alike_take_part(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = tmp_path / "out", torch.get_num_threads()

    def refused(method: str = "ties") -> ModelMergeError:
        with pytest.raises(OutputError) as caught:
            modelmerge.merge(
                models[0], models[1:], out, method=method, max_shard_size="2KB", cluster="files", force=True
            )
        return caught.value

    with running(words(models, out), stop=WRITE, call=2, environment={"MODELMERGE_LEASE": "60"}) as first:
        first.until_stopped()
        try:
            torch.set_num_threads(2)
            error = refused()
            assert "threads 1, and here it is 2" in error.message
            assert error.hint == "OMP_NUM_THREADS=1"
            torch.set_num_threads(1)
            assert "making another merge" in refused("average").message
            versions = {**fingerprint._packages(), "modelmerge": "0.0.1"}
            with monkeypatch.context() as patch:
                patch.setattr(fingerprint, "_packages", lambda: versions)
                assert "here it is 0.0.1" in refused().message
            os.utime(models[1] / "model.safetensors", ns=(0, 0))
            assert "another input: expert_0" in refused().message
        finally:
            torch.set_num_threads(before)
        with pytest.raises(OutputError, match="has the work of a merge that is shared out"):
            modelmerge.merge(models[0], models[1:], out, method="ties")
        first.send(signal.SIGCONT)
        assert first.end() == 1  # an input is no longer what it was


def test_what_a_dead_merge_has_left_gives_way_to_another(models: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(words(models, out), stop=WRITE, call=4) as first:
        first.until_stopped()
        first.send(signal.SIGKILL)
        first.end()
    os.utime(next((work_folder(out) / "workers").iterdir()), (0, 0))
    with running(words(models, out, "average")) as other:
        finish([other])
        assert "what another merge has left" in other.err()
    assert manifest_at(out)["recipe"]["method"] == "average"


def test_an_error_ends_the_process_that_met_it_and_is_kept_for_the_others(tmp_path: Path) -> None:
    base, spoilt = base_state(), expert_state(base_state(), 0)
    spoilt["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    paths = [write(tmp_path / "base", base), write(tmp_path / "expert", spoilt)]
    for _ in range(2):  # nobody is left after the first: the second tries anew
        with pytest.raises(CheckpointError, match="holds NaN"):
            modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", cluster="files")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_by_a_merge_that_fails_at_once(tmp_path: Path) -> None:
    base, spoilt = base_state(), expert_state(base_state(), 0)
    spoilt["logit_scale"][...] = float("nan")
    paths = [write(tmp_path / "base", base), write(tmp_path / "expert", spoilt)]
    with pytest.raises(CheckpointError, match="holds NaN"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="ties", cluster="files")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "expert"}


def test_what_cannot_be_shared_out_is_refused(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="cluster cannot share out what as_lora writes"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", as_lora=2, cluster="files")
    with pytest.raises(UsageError, match="cluster must be files, ray or ray=ADDRESS, not 'slurm'"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", cluster="slurm")
    monkeypatch.setenv("MODELMERGE_LEASE", "soon")
    with pytest.raises(UsageError, match="MODELMERGE_LEASE must be a number of seconds, not 'soon'"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", cluster="files")
    assert not (tmp_path / "x").exists()
    assert not work_folder(tmp_path / "x").exists()


# --- over and over ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "kron", "apgd", "model-stock", "dare"])
def test_processes_that_are_killed_at_random_change_nothing(method: str, tmp_path: Path) -> None:
    base = base_state(seed=3) | {f"model.layers.{i}.q_proj.weight": torch.randn(96, 96) for i in range(2, 12)}
    paths = [write(tmp_path / "base", base)] + [
        write(tmp_path / f"e{i}", expert_state(base, i)) for i in range(3)
    ]  # fmt: skip
    want, dice = alone(paths, tmp_path / "alone", method), random.Random(0)
    for trial in range(4):
        out = tmp_path / f"out-{trial}"
        command = words(paths, out, method)
        with contextlib.ExitStack() as stack:
            victims = [
                stack.enter_context(
                    running(command, beside=i, stop=dice.choice([WRITE, DONE]), call=dice.randint(1, 12))
                )
                for i in range(2)
            ]
            for victim in victims:
                with contextlib.suppress(AssertionError):  # others have done it all before
                    victim.until_stopped()
                    victim.send(signal.SIGKILL)
                    victim.end()
            with running(command, beside=2) as last:
                finish([last])
        assert weights(manifest_at(out)) == want
        assert same_bits(read(out), read(tmp_path / "alone"))
