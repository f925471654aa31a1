"""`python -m tests.benchmarks.cuda` itself, small and on a device that is not there: what it says can be relied on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from modelmerge.methods import registry
from modelmerge.methods.contract import Context
from modelmerge.methods.merge import average
from tests.benchmarks import cuda
from tests.support.simulated import simulated


def said(capsys: pytest.CaptureFixture[str], output: Path, *words: str) -> tuple[int, dict[str, str]]:
    """The exit code, and what is said of each section."""
    with simulated():
        code = cuda.main(["--device", "sim:1", "--small", "--output", str(output), *words])
    return code, dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_the_benchmark_runs_on_a_simulated_device_and_is_taken_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, tmp_path) == (0, dict.fromkeys(cuda.SECTIONS, "passed"))
    results = {file.stem: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert results.keys() == set(cuda.SECTIONS)
    assert {label.split()[0] for label in results["agreement"]} == {*registry.names(), "disentangle"}
    batched = {label.split(": ")[1] for label in results["batches"]}
    assert batched == {"apgd", "iso-c", "kron", "tsv-m", "wudi"}
    # No results of a device that is not there are shown as those of a card.
    assert not (tmp_path / "RESULTS-cuda.md").exists()
    # Without time, what is there is taken for done, and what is lacking is said.
    (tmp_path / "published.json").unlink()
    code, outcomes = said(capsys, tmp_path, "--minutes", "-1")
    assert code == 0
    assert outcomes["agreement"] == "passed"
    assert outcomes["published"] == "not run (no time: 0 of 1 results are there)"


def test_an_error_on_a_simulated_device_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 1e-3, in one method."""
    apply = average.METHOD.apply

    def wrong(taus: Tensor, options: Any, context: Context) -> Tensor:
        return apply(taus, options, context) * (1.0 if taus.device.type == "cpu" else 1.001)

    monkeypatch.setattr(average, "METHOD", dataclasses.replace(average.METHOD, apply=wrong))
    monkeypatch.setattr(cuda, "SECTIONS", {"agreement": cuda.agreement})
    code, outcomes = said(capsys, tmp_path)
    assert (code, outcomes) == (1, {"agreement": "failed (average)"})


def test_without_a_card_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(["--device", "cuda:99", "--output", str(tmp_path / "out")]) == 1
    assert "agreement: not run (device cuda:99: no such CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
