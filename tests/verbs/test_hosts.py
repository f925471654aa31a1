"""merge --cluster files on two machines that share nothing but a directory: two names, two networks, on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.support.checkpoints import manifest_at, weights_at
from tests.support.processes import running

pytestmark = pytest.mark.slow
DONE = "modelmerge.checkpoint.work:Claim.finish"


@pytest.fixture(autouse=True)
def _namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    command = shutil.which("unshare")
    if command is None or subprocess.run([command, "--net", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("this system or user cannot make namespaces of networks and host names")
    monkeypatch.setenv("MODELMERGE_LEASE", "1.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("method", ["ties", "kron"])
@pytest.mark.parametrize("killed", [False, True])
def test_two_hosts_share_a_merge_and_one_survives_the_other(
    method: str, killed: bool, models: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["merge", method, *map(str, models), "--max-shard-size", "2KB", "-o"]
    with running([*command, str(tmp_path / "one")]) as alone:
        assert alone.end() == 0, alone.err()
    command += [str(out), "--cluster", "files"]
    with running(command, host="first", stop=DONE, call=3) as first:
        first.until_stopped()  # two units are done, and one is not
        with running(command, host="second", beside=1) as second:
            here = os.readlink("/proc/self/ns/net")
            second.until(lambda: len({here, first.network(), second.network()}) == 3)
            if killed:
                first.send(SIGKILL)
                assert first.end() == -SIGKILL
            assert second.end() == 0, second.err()
            assert "takes part in the merge that first began" in second.err()
    workers = {worker["host"]: worker["units"] for worker in manifest_at(out)["workers"]}
    assert workers.keys() == {"first", "second"}
    assert workers["first"] == 2
    assert weights_at(out) == weights_at(tmp_path / "one")
