"""extract --cluster files: real processes that share task vectors out, and what becomes of it when some of them die."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import modelmerge
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from modelmerge.engine import vectors
from modelmerge.engine.parallel import threads
from modelmerge.errors import UsageError
from tests.support.checkpoints import read, write
from tests.support.commands import run
from tests.support.processes import finish, running, started

LEASE = "1.5"  # seconds
MEASURE = "modelmerge.engine.vectors:summed"
WRITE = "modelmerge.checkpoint.shard_file:ShardFile.write"
DONE = "modelmerge.checkpoint.work:Claim.finish"
SWAP = "modelmerge.checkpoint.publication:Publication._swap"
WAYS: list[dict[str, Any]] = [{}, {"rank": 2}, {"energy": 0.9}]


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMERGE_LEASE", LEASE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words(models: list[Path], out: Path, *more: str) -> list[str]:
    return ["extract", *map(str, models), "-o", str(out), "--max-shard-size", "2KB", "--cluster", "files", *more]


def alone(models: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    """What one process writes."""
    with threads(1):
        modelmerge.extract(models[0], models[1:], out, max_shard_size="2KB", **options)
    return manifest_at(out)


def manifest_at(out: Path) -> dict[str, Any]:
    """The manifest of an output beside which nothing is left."""
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")] == []
    manifest = json.loads((out / MANIFEST).read_text())
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*manifest["files"], MANIFEST}
    return manifest


def weights(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def as_alone(out: Path, want: dict[str, Any]) -> dict[str, Any]:
    """The manifest; fails unless the output is what one process writes."""
    manifest = manifest_at(out)
    assert weights(manifest) == weights(want)
    assert {name for name in want if want[name] != manifest[name]} <= {"created", "seconds", "files"}
    assert manifest.keys() - want.keys() == {"workers"}
    return manifest


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_three_processes_write_what_one_writes(way: dict[str, Any], models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone", **way), tmp_path / "out"
    more = [word for name, value in way.items() for word in (f"--{name}", str(value))]
    with started(words(models, out, *more), 3) as runs:
        finish(runs)
    manifest = as_alone(out, want)
    assert 1 <= len(manifest["workers"]) <= 3
    assert sum(worker["units"] for worker in manifest["workers"]) > len(weights(manifest))
    assert main(["verify", str(out), "-q"]) == 0
    with running(words(models, out, *more)) as late:
        finish([late])
        assert "is complete already" in late.err()


def test_factors_that_lie_in_two_files_and_experts_that_stayed_are_as_alone(models: list[Path], tmp_path: Path) -> None:
    """Files so small that the two factors of a tensor go apart; an expert of which nothing is left."""
    same = write(tmp_path / "same", read(models[0]))
    every = [*models, same]
    with threads(1):
        told: dict[str, Any] = {"rank": 2, "max_shard_size": "300B"}
        modelmerge.extract(every[0], every[1:], tmp_path / "alone", **told)
        modelmerge.extract(every[0], every[1:], tmp_path / "out", cluster="files", **told)
    as_alone(tmp_path / "out", manifest_at(tmp_path / "alone"))
    index = json.loads(next((tmp_path / "out").rglob("*.index.json")).read_text())["weight_map"]
    lefts = {name: file for name, file in index.items() if name.endswith(vectors.LEFT)}
    assert any(index[name.replace(vectors.LEFT, vectors.RIGHT)] != file for name, file in lefts.items())


@pytest.mark.parametrize(("stop", "call"), [
    pytest.param(MEASURE, 1, id="measuring"),
    pytest.param(WRITE, 4, id="in a shard"),
    pytest.param(DONE, 4, id="before the marker", marks=pytest.mark.slow),
    pytest.param(SWAP, 1, id="in publishing", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_a_killed_process_was_at_is_taken_over(stop: str, call: int, models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone", rank=2), tmp_path / "out"
    command = words(models, out, "--rank", "2")
    with running(command, stop=stop, call=call) as first:
        first.until_stopped()
        with started(command, 2, first=1) as others:
            first.send(signal.SIGKILL)
            assert first.end() == -signal.SIGKILL
            finish(others)
    as_alone(out, want)


def test_the_only_process_is_interrupted_and_started_anew(models: list[Path], tmp_path: Path) -> None:
    want, out = alone(models, tmp_path / "alone"), tmp_path / "out"
    with running(words(models, out), stop=WRITE, call=6) as first:
        first.until_stopped()
        first.send(signal.SIGINT)
        assert first.end() == 130
        assert "the same command takes it up" in first.err()
    with running(["extract", *words(models, out)[1:-2]]) as plain:
        assert plain.end() == 1
        assert "has the work of a merge that is shared out" in plain.err()
    with running(words(models, out)) as again:
        finish([again])
    as_alone(out, want)


def test_a_process_with_other_options_is_refused(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELMERGE_LEASE", "60")  # the first one sleeps, and counts as alive
    out = tmp_path / "out"
    with running(words(models, out), stop=WRITE, call=2) as first:
        first.until_stopped()
        with running(words(models, out, "--rank", "2"), beside=1) as other:
            assert other.end() == 1
            assert "wait for it, or name another directory" in other.err()
        first.send(signal.SIGCONT)
        finish([first])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--cluster", "ray"), "--cluster of task vectors must be files, not 'ray'"),
        (("--cluster", "files", "--resume"), "--resume and --cluster exclude each other"),
        (("--cluster", "files", "--push", "me/vectors"), "--push has no place beside --cluster"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    more: tuple[str, ...], says: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "extract", *models, "-o", tmp_path / "out", *more)
    assert code == 2
    assert says in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_in_python_another_cluster_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be files, not 'ray=there'"):
        modelmerge.extract(models[0], models[1:], tmp_path / "out", cluster="ray=there")
