"""The guide on shells, notebooks and job arrays: every block runs, in real shells and side by side where it says so."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import base_state, expert_state, read, same_bits, write
from tests.support.commands import program
from tests.support.guides import GUIDES, blocks

TEXT = GUIDES["scripts"].read_text()
LINE, LOOP, SHARED, ARRAY = blocks(TEXT, "bash")
METRIC = """
def accuracy(model):
    return float(model["model.embed_tokens.weight"].abs().mean())
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the models that the guide names, where `modelmerge` is this one."""
    for name, value in program(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    base = base_state()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    for name, state in {"base": base, "math": expert_state(base, 0), "code": expert_state(base, 1)}.items():
        write(tmp_path / name, state)
    (tmp_path / "metric.py").write_text(METRIC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(script: str, place: Path, **variables: str) -> subprocess.Popen[str]:
    """A script in bash."""
    pipe, environment = subprocess.PIPE, {**os.environ, **variables}
    return subprocess.Popen(["bash", "-c", script], cwd=place, env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    """What it has printed; it ended well."""
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def test_the_lines_for_a_shell(place: Path) -> None:
    assert "accuracy" not in ended(start(LINE, place)).splitlines()[0]
    assert (place / "merged" / "model.safetensors").exists()
    figures = dict(line.split() for line in ended(start(LOOP, place)).splitlines())
    assert figures.keys() == {"by-average", "by-ties", "by-kron"}
    want = float(read(place / "by-ties")["model.embed_tokens.weight"].abs().mean())
    assert float(figures["by-ties"]) == pytest.approx(want)


def test_the_cells_of_a_notebook(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {name: read(place / name) for name in ("base", "math", "code")}

    class Model:
        def state_dict(self) -> dict[str, torch.Tensor]:
            return models["base"]

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.state = state

    names = {"model": Model(), "math": models["math"], "code": models["code"]}
    for cell in blocks(TEXT, "python"):
        exec(compile(cell, "<guide>", "exec"), names)  # the guide is ours
    assert (place / "today.html").exists()
    assert names["plan"]["peak_memory"]["host"] > 0  # type: ignore[index]
    assert names["model"].state.keys() == models["base"].keys()  # type: ignore[attr-defined]
    assert "merging: model.layers.0.q_proj.weight" in capsys.readouterr().out


def test_the_jobs_of_an_array(place: Path) -> None:
    """Three jobs of the first array at the same time, and each of the second by its number."""
    assert all("\n#SBATCH " in script for script in (SHARED, ARRAY))
    variables = {"SLURM_CPUS_PER_TASK": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    jobs = [start(SHARED, place, SLURM_ARRAY_TASK_ID=str(i), **variables) for i in range(3)]
    for job in jobs:
        ended(job)
    ended(start(LINE.partition(" && ")[0].replace("merged", "alone"), place, OMP_NUM_THREADS="1"))
    assert same_bits(read(place / "merged"), read(place / "alone"))
    assert json.loads((place / "merged" / "modelmerge.json").read_text())["workers"]
    jobs = [start(ARRAY, place, SLURM_ARRAY_TASK_ID=str(i), **variables) for i in (0, 3)]
    assert [ended(job).strip() for job in jobs] == ["runs/scale-0.2", "runs/scale-0.5"]
