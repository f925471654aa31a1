"""The work folder: claims that one process has, that age, and that are taken over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from modelmerge.checkpoint import work
from modelmerge.checkpoint.work import Claim, Gone, WorkFolder, key, work_folder
from modelmerge.errors import CheckpointError, OutputError

JOB: dict[str, Any] = {"format": 1, "digest": "d", "lease": 1000.0}
UNIT = "shard:unet/model-00001-of-00002.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def claimed(folder: WorkFolder) -> Claim:
    claim = folder.claim(UNIT)
    assert claim is not None
    return claim


def die(folder: WorkFolder) -> None:
    """Let everything that shows its life be as old as if it had died."""
    for file in (*(folder.path / "units").glob("*claim*"), folder.path / "workers" / folder.identity):
        os.utime(file, (0, 0))


def test_one_process_has_a_unit_until_it_gives_it_back(out: Path) -> None:
    with WorkFolder(out, JOB) as first, WorkFolder(out, {**JOB, "digest": "other"}) as second:
        assert (first.is_new, second.is_new) == (True, False)
        assert second.job == JOB  # as the first has written it down
        with claimed(first):
            assert second.claim(UNIT) is None
        with claimed(second) as claim:
            claim.finish({"worker": second.identity}, b"result")
        assert first.claim(UNIT) is None
        assert first.done() == {key(UNIT)}
        assert first.markers()[key(UNIT)]["worker"] == second.identity
        assert first.result(UNIT).read_bytes() == b"result"


def test_a_claim_without_signs_of_life_is_taken_over_and_lost(out: Path) -> None:
    with WorkFolder(out, JOB) as first, WorkFolder(out, JOB) as second:
        old = claimed(first)
        assert second.claim(UNIT) is None
        die(first)
        with claimed(second) as claim:
            assert old.is_lost
            assert first.claim(UNIT) is None
            claim.finish({}, b"")
        assert old.is_lost, "also once the other is done"
        with old:
            raise OutputError("the files that it has gone on writing are published by now")


def test_a_claim_stays_young_while_its_process_lives(out: Path) -> None:
    with WorkFolder(out, {**JOB, "lease": 0.3}) as first, WorkFolder(out, JOB) as second, claimed(first):
        die(first)
        for _ in range(100):
            second.wait()
            if second._is_alive(first.path / "workers" / first.identity):
                break
        assert second.claim(UNIT) is None


def test_what_has_ended_three_processes_is_tried_no_more(out: Path) -> None:
    with WorkFolder(out, JOB) as folder:
        for _ in range(3):
            claimed(folder)
            die(folder)
        with pytest.raises(OutputError, match=r"has ended 3 processes that were at it, the last without a word"):
            folder.claim(UNIT)


def test_the_error_of_the_last_attempt_is_everybodys(out: Path) -> None:
    def fail() -> None:
        raise CheckpointError("it holds NaN", hint="leave it out")

    with WorkFolder(out, JOB) as first, WorkFolder(out, JOB) as second:
        for folder in (first, second, first):
            with pytest.raises(CheckpointError), claimed(folder):
                fail()
        with pytest.raises(CheckpointError, match=r"it holds NaN \(on .+\)") as caught:
            second.claim(UNIT)
        assert caught.value.hint == "leave it out"


def test_attempts_are_forgotten_once_nobody_is_alive(out: Path) -> None:
    with WorkFolder(out, JOB) as first:
        claim = claimed(first)
        claim.finish({}, b"")
        for _ in range(3):
            first.claim("shard:other")
            die(first)
        with WorkFolder(out, JOB) as second:
            assert second.claim("shard:other") is not None
            assert second.done() == {key(UNIT)}


def test_an_error_of_who_has_lost_the_unit_is_no_ones(out: Path) -> None:
    with WorkFolder(out, JOB) as first, WorkFolder(out, JOB) as second:
        with claimed(first):
            die(first)
            claimed(second)
            raise ValueError("the files are gone")
        assert not list((first.path / "units").glob("*failed*"))


def test_who_takes_the_files_has_them_alone(out: Path) -> None:
    with WorkFolder(out, JOB) as first, WorkFolder(out, JOB) as second:
        (first.path / "files" / "x").touch()
        before = first.take_files()
        after = second.take_files()
        assert not before.exists()
        assert (after / "x").exists()


def test_nothing_is_left_of_a_folder_in_which_nothing_was_done(out: Path) -> None:
    with WorkFolder(out, JOB) as first:
        with WorkFolder(out, JOB):
            pass
        assert first.path.exists()
    assert list(out.parent.iterdir()) == []


def test_a_folder_that_is_removed_is_gone_for_all(out: Path) -> None:
    with WorkFolder(out, JOB) as first, WorkFolder(out, JOB) as second:
        claim = claimed(second)
        first.remove()
        assert claim.is_lost
        for look in (second.done, second.wait, second.has_others, lambda: second.claim(UNIT)):
            with pytest.raises(Gone):
                look()
    assert list(out.parent.iterdir()) == []


def test_a_strangers_folder_is_left_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_TRIES", 2)
    (work_folder(out) / "workers").mkdir(parents=True)
    for content in (None, "[]", "{}", '{"format": 2, "lease": 30}', '{"format": 1, "lease": "soon"}', "no JSON"):
        if content is not None:
            (work_folder(out) / "job.json").write_text(content)
        with pytest.raises(OutputError, match="is no folder of a merge that this version shares out"):
            WorkFolder(out, JOB)


def test_an_output_of_the_longest_name_has_a_work_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / ("n" * 255), JOB) as folder, claimed(folder) as claim:
        claim.finish({}, b"")
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_who_comes_as_the_folder_is_removed_is_told_when_it_asks(out: Path) -> None:
    with WorkFolder(out, JOB) as first:
        late = WorkFolder(out, JOB)
        first.remove()
        with late, pytest.raises(Gone):
            late.done()
