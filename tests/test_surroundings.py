"""What a shell, a service or a system leaves to a run: closed streams, full disks, few files, odd settings."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelmerge import __main__ as program
from modelmerge.checkpoint import output, staging
from modelmerge.checkpoint.digest import cache_directory
from modelmerge.checkpoint.output import CARD, replace_file
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from modelmerge.engine.parallel import prepare_process
from modelmerge.errors import OutputError
from modelmerge.verbs.verify import verify
from tests.support.checkpoints import family
from tests.support.commands import refused, run, script
from tests.support.processes import running


def shell(line: str, **environment: str) -> Any:
    """A line of bash in which $M is the program."""
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False,
        env={**os.environ, "M": f"{sys.executable} -m modelmerge", **environment},
    )  # fmt: skip


def average(models: list[Path], out: Path, *more: str) -> list[str]:
    return ["merge", "average", *map(str, models), "-o", str(out), *more]


def test_models_that_are_here_need_no_client_of_the_hub(models: list[Path], tmp_path: Path) -> None:
    """It takes long to import; and what is left to do at the end is done."""
    done = script(
        "import atexit, sys\n"
        "from modelmerge.__main__ import run\n"
        "atexit.register(lambda: print([name for name in sys.modules if name.startswith('huggingface_hub')]))\n"
        f"sys.argv = {['modelmerge', *average(models, tmp_path / 'out', '--quiet')]}\n"
        "run()\n"
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n[]\n"), done.stderr


# --- streams ---


@pytest.mark.parametrize("words", ["guide tuning", "merge --help"])
def test_a_full_disk_under_stdout_is_one_line(words: str) -> None:
    done = shell(f"$M {words} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: stdout cannot be written: No space left on device\n")


@pytest.mark.parametrize("form", [[], ["--json"], ["--quiet"]])
def test_a_merge_whose_result_cannot_be_printed_stays(
    form: list[str], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(average(models, tmp_path / "out", *form)) == 1
    assert all(file["same"] for file in verify(tmp_path / "out")["files"])


def test_closed_streams_are_no_obstacle_and_nothing_is_printed_into_files(tmp_path: Path) -> None:
    report = tmp_path / "file"
    done = shell(f"$M guide >&- <&-; echo $?; $M nothing > {report} 2>&-; echo $?")
    assert (done.stdout.splitlines(), done.stderr) == (["0", "2"], "")
    assert report.read_text() == ""


# --- files ---


def test_more_files_than_the_system_allows_are_refused_before_the_work(models: list[Path], tmp_path: Path) -> None:
    words = ["merge", "ties", *map(str, models), "-o", str(tmp_path / "out"), "--max-shard-size", "100"]
    with running(words, limits={"RLIMIT_NOFILE": 40}) as process:
        assert process.end() == 1
        assert "error: 43 files have to be open at once, and this system allows 40" in process.err()
        assert "ulimit -n 43" in process.err()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["models"]


@contextlib.contextmanager
def soft_limit(more: int) -> Iterator[None]:
    """A limit of so many more open files than there are."""
    count = max(map(int, os.listdir("/dev/fd"))) + more
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_limit_that_may_be_raised_is_raised_before_files_are_opened(models: list[Path], tmp_path: Path) -> None:
    with soft_limit(50):
        assert main(average(models, tmp_path / "out", "--max-shard-size", "100")) == 0
    with soft_limit(20):
        prepare_process(100)
        assert 132 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1 << 16


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("at", [1, 4])
def test_files_that_cannot_be_opened_leave_nothing_open_and_nothing_behind(
    at: int, resume: bool, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real, calls = os.open, []

    def few(path: Any, *more: Any, **words: Any) -> int:
        if str(path).endswith(".safetensors") and ".out.modelmerge" in str(path):
            calls.append(path)
            if len(calls) == at:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, *more, **words)

    before = len(os.listdir("/dev/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "open", few)
        words = average(models, tmp_path / "out", "--max-shard-size", "2kB", *["--resume"] * resume)
        error, hint = refused(capsys, *words)
    assert "Too many open files" in error
    assert "ulimit -n" in hint
    assert len(os.listdir("/dev/fd")) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["models"]
    assert main(words) == 0


# --- what killed runs have left ---


def test_a_run_that_finds_its_output_complete_removes_what_a_killed_one_left(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = average(models, tmp_path / "out", "--force", "--resume")
    assert main(words) == 0
    for left in (".out.modelmerge-old", ".out.modelmerge"):
        (tmp_path / left / "deep").mkdir(parents=True)
        (tmp_path / left / "deep" / "old").touch()
    capsys.readouterr()
    code, _, err = run(capsys, *words)
    assert (code, err) == (0, f"note: {tmp_path / 'out'} is complete already\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["models", "out"]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_card_that_is_replaced_by_a_run_that_is_killed_looks_like_no_damage(
    at: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(average(models, out)) == 0
    names = sorted(file.name for file in out.iterdir())
    real, calls = output._replace, []

    def kill(file: Path, content: bytes) -> None:
        calls.append(file)
        if len(calls) == at:
            file.with_name(f".{file.name}.new").write_bytes(content[:5])
            raise KeyboardInterrupt
        real(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(output, "_replace", kill)
        with pytest.raises(KeyboardInterrupt):
            replace_file(out, CARD, b"new")
    assert all(file["same"] for file in verify(out)["files"])
    replace_file(out, CARD, b"newer")
    assert all(file["same"] for file in verify(out)["files"])
    assert sorted(file.name for file in out.iterdir()) == names
    assert b"instead" not in (out / MANIFEST).read_bytes()


def test_a_file_that_cannot_be_replaced_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html cannot be written"):
        replace_file(tmp_path, "report.html", b"x")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


# --- settings ---


def test_an_empty_cache_variable_means_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELMERGE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "modelmerge"


def test_a_user_without_a_home_merges_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one of a container, whose number has no name."""
    for name in ("HOME", "XDG_CACHE_HOME", "MODELMERGE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    models = family(tmp_path / "models", experts=1)
    monkeypatch.chdir(tmp_path)
    os.utime(models[0] / "model.safetensors", (1, 1))
    (tmp_path / "out").mkdir()
    assert run(capsys, *average(models, tmp_path / "out"))[0] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["models", "out"]


@pytest.mark.parametrize(("columns", "kept"), [("0", False), ("-1", False), ("many", False), ("", False), ("90", True)])
def test_a_width_in_which_nothing_fits_is_none(columns: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    before = os.umask(0o022)
    try:
        program._mend_surroundings()
    finally:
        os.umask(before)
    assert ("COLUMNS" in os.environ) == kept


def test_a_run_can_read_what_it_writes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        program._mend_surroundings()
        assert os.umask(0) == 0o077
    finally:
        os.umask(before)


def test_a_directory_that_is_gone_is_one_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f"cd {gone}; rmdir {gone}; $M merge", PYTHONPATH=str(Path(program.__file__).parents[1]))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the directory that you are in is gone\nhint: go to another one\n"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_idle_threads_sleep_unless_the_user_says_how_they_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for each in names:
        monkeypatch.setenv(each, "")  # so that it is put back
        monkeypatch.delenv(each)
    program._let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv(name, "7")
    program._let_threads_sleep()
    assert {each: os.environ[each] for each in names if each in os.environ} == {name: "7"}


def test_how_threads_wait_changes_no_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_000, 64, generator=generator)  # of a size that is merged with all threads
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.safetensors"))
        tau = torch.randn(base.shape, generator=generator) if i else torch.zeros(())
        save_file({"layers.0.mlp.weight": base + 1e-3 * tau}, paths[-1], metadata={"format": "pt"})
    results = []
    for policy in ({}, {"OMP_WAIT_POLICY": "active"}):
        out = tmp_path / f"out{len(results)}"
        command = [sys.executable, "-m", "modelmerge", "merge", "apgd", *paths, "-o", str(out), "--device", "cpu", "-q"]
        kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        subprocess.run(command, env={**kept, "OMP_NUM_THREADS": "2", **policy}, check=True, capture_output=True)
        assert json.loads((out / MANIFEST).read_text())["threads"] == 2
        results.append((out / "model.safetensors").read_bytes())
    assert results[0] == results[1]
