"""merge --device A,B: children of the process that was started share the merge out, and all ends as with one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge import devices
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from modelmerge.devices import find_devices, local_card
from modelmerge.errors import CheckpointError, DeviceError, UsageError
from modelmerge.methods import registry
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.driver import threads_each
from modelmerge.verbs.prepare import digest_of, prepare
from modelmerge.verbs.recipes import prepare_file
from tests.support import mergekit_runs
from tests.support.checkpoints import base_state, expert_state, manifest_at, weights_at, write
from tests.support.processes import PATIENCE, running
from tests.support.scripts import searching

WRITE = "modelmerge.checkpoint.shard_file:ShardFile.write"


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMERGE_LEASE", "1.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words(models: list[Path], out: Path, method: str, *more: str) -> list[str]:
    return ["merge", method, *map(str, models), "-o", str(out), "--max-shard-size", "2KB", *more]


def has_ended(pid: int) -> bool:
    """Whether a process that is no child of this one ends, within reason."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# --- as one process ---


def test_a_process_on_each_device_writes_what_one_writes(models: list[Path], tmp_path: Path) -> None:
    lines = {}
    for name, more in (("one", ["--device", "cpu"]), ("two", ["--device", "cpu,cpu"])):
        with running(words(models, tmp_path / name, "kron", *more)) as run:
            assert run.end() == 0, run.err()
            lines[name] = run.out().replace(str(tmp_path / name), "OUT").splitlines()
    assert weights_at(tmp_path / "two") == weights_at(tmp_path / "one")
    assert [line for line in lines["two"] if " s on " not in line] == [
        line for line in lines["one"] if " s on " not in line
    ]
    workers = manifest_at(tmp_path / "two")["workers"]
    assert {(worker["device"], worker["threads"]) for worker in workers} == {("cpu", 1)}
    assert main(["verify", str(tmp_path / "two"), "-q"]) == 0


def test_children_and_a_process_that_was_started_by_hand_share_one_merge(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "one", method="ties", max_shard_size="2KB", device="cpu")
    out = tmp_path / "out"
    settings = ["--at", "*mlp*: tsv-m scale=0.8", "--weight", "expert_1=0.5"]
    with running(words(models, tmp_path / "one", "ties", "--force", *settings)) as run:
        assert run.end() == 0, run.err()
    with running(words(models, out, "ties", "--cluster", "files", *settings), stop=WRITE, call=2) as first:
        first.until_stopped()
        with running(words(models, out, "ties", "--device", "cpu,cpu", *settings), beside=1) as driver:
            assert driver.end() == 0, driver.err()
        first.send(signal.SIGCONT)
        assert first.end() == 0, first.err()
    assert weights_at(out) == weights_at(tmp_path / "one")
    assert len(manifest_at(out)["workers"]) >= 2


@pytest.mark.slow
def test_a_recipe_is_repeated_by_children_to_the_same_bits(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "one", method="kron", max_shard_size="2KB", device="cpu")
    again = modelmerge.replay(tmp_path / "one" / MANIFEST, tmp_path / "again", device="cpu,cpu")
    assert weights_at(tmp_path / "again") == weights_at(tmp_path / "one")
    assert again == manifest_at(tmp_path / "again")


def test_a_worker_plans_the_merge_that_it_is_given(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `prepare` completes a recipe, it stays: else workers would refuse each other."""
    one = {"base": str(models[0]), "experts": (str(models[1]),)}
    many = {"base": str(models[0]), "experts": tuple(map(str, models[1:]))}
    methods = [(name, registry.load(name)) for name in registry.names()]
    recipes = [Recipe(method=name, **(one if m.most_experts == 1 else many)) for name, m in methods if not m.on_data]
    recipes += [
        Recipe(method="auto", **many),
        Recipe(method="ties", disentangle=("awd alpha=0.2",), weights={"expert_0": 2.0}, rest="average", **many),
        Recipe(method="kron", at=("*mlp*: ties density=0.5", "*q_proj*: base"), dtype="float16", **many),
    ]
    prepared = [prepare(recipe) for recipe in recipes if recipe.method != "slerp"]
    (tmp_path / "models-of-mergekit").mkdir()
    monkeypatch.chdir(tmp_path / "models-of-mergekit")
    Path("models").symlink_to(mergekit_runs.ORACLE / "models")
    configs = ("ties", "task-arithmetic-slices", "linear-gradient", "tokens-union", "passthrough-frankenmerge")
    prepared += [prepare_file(mergekit_runs.CONFIGS / f"{name}.yml") for name in configs]
    for given in prepared:
        taken = prepare(given.recipe, recorded=given.recorded, remarks=given.remarks, stream=given.stream)
        assert digest_of(taken) == digest_of(given), given.recipe
        assert list(taken.remarks) == list(given.remarks)
        taken.close()
        given.close()


# --- children that die, errors, interrupts ---


def test_what_a_killed_child_was_at_is_done_by_another(tmp_path: Path) -> None:
    command, mark = searching(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with running([*command, "-o", str(tmp_path / "out"), "--device", "cpu,cpu"]) as run:
        assert run.end() == 0, run.err()
        assert "note: the process on cpu was killed by SIGKILL; the others take its work over" in run.err()
    assert mark.exists()
    with running([*command, "-o", str(tmp_path / "one")]) as run:
        assert run.end() == 0, run.err()
    assert weights_at(tmp_path / "out") == weights_at(tmp_path / "one")


@pytest.mark.slow
def test_the_last_child_that_dies_ends_the_merge(tmp_path: Path) -> None:
    command, _ = searching(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    script = tmp_path / "script.py"
    script.write_text(script.read_text().replace('"x"', '"w"'))
    with running([*command, "-o", str(tmp_path / "out"), "--device", "cpu,cpu"]) as run:
        assert run.end() == 1
        assert "error: the process on cpu was killed by SIGKILL, and there is no other" in run.err()
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_children_and_the_same_command_goes_on(tmp_path: Path) -> None:
    both = "os.kill(os.getppid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT); time.sleep(100)"
    command, mark = searching(tmp_path, both)
    command += ["-o", str(tmp_path / "out"), "--device", "cpu,cpu"]
    with running(command) as run:
        assert run.end() == 130
        lines = run.err().splitlines()
        assert "stopping" in lines
        assert lines[-1] == "error: interrupted"
        assert "Traceback" not in run.err()
    assert has_ended(int(mark.read_text()))
    assert not (tmp_path / "out").exists()
    with running(command) as run:
        assert run.end() == 0, run.err()
    assert weights_at(tmp_path / "out")


@pytest.mark.slow
def test_children_do_not_outlive_a_driver_that_is_killed(tmp_path: Path) -> None:
    command, mark = searching(tmp_path, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)")
    with running([*command, "-o", str(tmp_path / "out"), "--device", "cpu,cpu"]) as run:
        assert run.end() == -signal.SIGKILL
    assert has_ended(int(mark.read_text()))
    assert not (tmp_path / "out").exists()


def test_the_error_of_a_child_is_the_drivers(tmp_path: Path) -> None:
    base, spoilt = base_state(), expert_state(base_state(), 0)
    spoilt["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    paths = [write(tmp_path / "base", base), write(tmp_path / "expert", spoilt)]
    errors = []
    for device in ("cpu", "cpu,cpu"):
        with pytest.raises(CheckpointError, match="holds NaN") as caught:
            modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", device=device)
        errors.append((caught.value.message, caught.value.hint))
    assert errors[0] == errors[1]
    assert not (tmp_path / "out").exists()


# --- which devices ---


def test_devices_that_are_not_there_are_refused_at_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_devices("cpu, cpu") == (torch.device("cpu"),) * 2
    with pytest.raises(DeviceError, match="'gpu' is no device"):
        modelmerge.merge("no", ["such"], tmp_path / "out", method="ties", device="cpu,gpu")
    monkeypatch.setattr(devices.Cuda, "count", lambda cuda: 0)
    for names in ("cuda:all", "cuda:0,cuda:1", "cpu,cuda:0"):
        with pytest.raises(DeviceError, match="no such CUDA device; this torch sees none"):
            find_devices(names)
    monkeypatch.setattr(devices.Cuda, "count", lambda cuda: 2)
    with pytest.raises(DeviceError, match="cuda:2: no such CUDA device; there are cuda:0, cuda:1"):
        find_devices("cuda:0,cuda:2")
    with pytest.raises(DeviceError, match="cuda:1,cuda,cuda:0 names a card twice"):
        find_devices("cuda:1,cuda,cuda:0")


def test_a_launcher_says_which_card_is_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.Cuda, "count", lambda cuda: 2)
    assert local_card() is None
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert local_card() == (torch.device("cuda:1"), "SLURM_LOCALID")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_card() == (torch.device("cuda:0"), "LOCAL_RANK")
    monkeypatch.setattr(devices.Cuda, "count", lambda cuda: 1)  # the launcher shows each process its own
    assert local_card() is None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
def test_cards_write_what_one_card_writes(models: list[Path], tmp_path: Path) -> None:
    for name, device in (("one", "cuda:0"), ("all", "cuda:all")):
        modelmerge.merge(models[0], models[1:], tmp_path / name, method="kron", max_shard_size="2KB", device=device)
    assert weights_at(tmp_path / "all") == weights_at(tmp_path / "one")
    assert all(worker["device"].startswith("cuda:") for worker in manifest_at(tmp_path / "all")["workers"])


def test_threads_are_shared_out_unless_their_number_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert threads_each(2) == 6
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert [threads_each(count) for count in (1, 2, 4, 8)] == [6, 3, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_only_a_merge_of_models_takes_several_devices(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="device cannot share out what as_lora writes"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", as_lora=2, device="cpu,cpu")
    data = {"script": lambda expert: (torch.nn.Linear(3, 3), torch.ones(1, 3))}
    with pytest.raises(UsageError, match="script must be FILE:FUNCTION"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="adamerging", unlabelled=data, device="cpu,cpu")
    paths = list(map(str, models))
    for command in (["extract", *paths], ["search", "ties", *paths, "--try", "scale=1,2", "--on", "custom:x.py:y"]):
        assert main([*command, "-o", str(tmp_path / "x"), "--device", "cpu,cpu"]) == 1
        assert "--device cpu,cpu: only a merge takes several devices" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# --- the plan ---


def test_the_plan_says_how_the_work_spreads(models: list[Path], tmp_path: Path) -> None:
    def plan(**more: Any) -> dict[str, Any]:
        settings = {"method": "average", "max_shard_size": "2KB", "dry_run": True, **more}
        return modelmerge.merge(models[0], models[1:], tmp_path / "x", **settings)

    assert "units" not in plan()
    units = plan(device="cpu,cpu")["units"]
    assert (units["count"], units["workers"]) == (len(plan()["shards"]), 2)
    assert 1.0 < units["speed_up"] <= 2.0
    most = plan(cluster="files")["units"]
    assert most["workers"] is None
    assert most["speed_up"] == pytest.approx(1 / most["share"])
    for word in ("slurm", "ray="):
        with pytest.raises(UsageError, match=f"cluster must be files, ray or ray=ADDRESS, not '{word}'"):
            plan(cluster=word)
