"""merge --cluster ray: workers that Ray hands out share the merge out; a real cluster of this machine."""

from __future__ import annotations

import json
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import modelmerge
from modelmerge.checkpoint.work import work_folder
from modelmerge.errors import ModelMergeError, UsageError
from tests.support.checkpoints import base_state, expert_state, manifest_at, weights_at, write
from tests.support.processes import running
from tests.support.scripts import searching

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ray>=2.50'")


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMERGE_LEASE", "1.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_without_the_package_one_error_says_what_to_install(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModelMergeError, match="cluster ray needs ray, which is not installed") as caught:
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", cluster="ray")
    assert caught.value.hint == 'pip install "ray>=2.50"'
    with pytest.raises(UsageError, match="cluster ray hands out the cards that it has"):
        modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", cluster="ray", device="cpu,cpu")


@needs_ray
@pytest.mark.slow
def test_workers_write_what_one_process_writes(models: list[Path], tmp_path: Path) -> None:
    command = ["merge", "kron", *map(str, models), "--max-shard-size", "2KB", "--device", "cpu", "--json"]
    for name, more in (("one", []), ("out", ["--cluster", "ray"])):
        with running([*command, "-o", str(tmp_path / name), *more]) as run:
            assert run.end() == 0, run.err()
            manifest = json.loads(run.out())["manifest"]
    assert manifest == manifest_at(tmp_path / "out")
    assert weights_at(tmp_path / "out") == weights_at(tmp_path / "one")
    assert {(worker["device"], worker["threads"]) for worker in manifest["workers"]} == {("cpu", 1)}


@needs_ray
@pytest.mark.slow
def test_what_a_killed_worker_was_at_is_done_by_another(tmp_path: Path) -> None:
    command, mark = searching(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with running([*command, "-o", str(tmp_path / "out"), "--cluster", "ray"]) as run:
        assert run.end() == 0, run.err()
    assert mark.exists()
    with running([*command, "-o", str(tmp_path / "one")]) as run:
        assert run.end() == 0, run.err()
    assert weights_at(tmp_path / "out") == weights_at(tmp_path / "one")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_is_finished_to_processes_of_any_kind(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command, mark = searching(tmp_path, "time.sleep(100)")
    with running([*command, "-o", str(out), "--cluster", "ray"]) as run:
        run.until(mark.exists)
        run.send(number)
        assert run.end() == 128 + number
        assert "Traceback" not in run.err()
    assert not out.exists()
    with running([*command, "-o", str(out), "--cluster", "files"]) as run:
        assert run.end() == 0, run.err()
    assert weights_at(out)
    assert not work_folder(out).exists()


@needs_ray
@pytest.mark.slow
def test_the_error_of_a_worker_is_the_drivers(tmp_path: Path) -> None:
    base, spoilt = base_state(), expert_state(base_state(), 0)
    spoilt["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    paths = [write(tmp_path / "base", base), write(tmp_path / "expert", spoilt)]
    command = ["merge", "average", *map(str, paths), "-o", str(tmp_path / "out"), "--cluster"]
    with running([*command, "ray"]) as run:
        assert run.end() == 1
        assert "holds NaN" in run.err()
    with running([*command, "ray=127.0.0.1:1"]) as run:
        assert run.end() == 2
        assert "error: --cluster ray at '127.0.0.1:1': [Errno 111] Connection refused" in run.err()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert"]
