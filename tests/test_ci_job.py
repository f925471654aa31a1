"""The jobs of the README and of the guide run in a repository of a user, who has nothing of modelmerge but a wheel."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelmerge.cli import main
from tests.support.checkpoints import family
from tests.support.guides import GUIDES, README, ROOT, blocks
from tests.support.hub_server import OWNER, FakeHub

# The client's own, of the HTTP library it is built on.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
METRIC = """
def accuracy(model):
    assert model["model.embed_tokens.weight"].isfinite().all()
    return {"maths": {"items": [1, 1, 1, 0]}, "code": {"items": [1, 1, 0, 1]}}
"""
TEXTS = {"README": README, "guide": GUIDES["ci"]}


def job_of(page: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The variables and the steps of a page's job; of the README's, all that there is."""
    job = yaml.safe_load(blocks(TEXTS[page].read_text(), "yaml")[0])
    steps = job["steps"] if "steps" in job else job["jobs"]["merge"]["steps"]
    return job["env"], steps


@pytest.fixture
def repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `actions/checkout` gives, and the variables of a runner; the models are on the Hub."""
    base, *experts = family(tmp_path / "models", experts=2)
    for name, folder in {"base": base, "math": experts[0], "code": experts[1]}.items():
        hub.add(f"org/{name}", folder)
    place = tmp_path / "repository"
    (place / "ci").mkdir(parents=True)
    (place / "ci" / "metric.py").write_text(METRIC)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return place


def check_results(page: str, repository: Path, hub: FakeHub) -> None:
    """What the job leaves: artifacts, a summary, and on the Hub a model whose card says what was measured."""
    summary = (repository.parent / "summary.md").read_text()
    assert "merged 75.0 ±" in summary
    assert "✅ **Passed**: avg=0.7" in summary
    assert (repository / "merge.json").read_text().startswith("{")
    if page == "guide":
        steps = job_of(page)[1]
        paths = next(step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", ""))
        assert all((repository / path).stat().st_size for path in paths.split())
        pushed = hub.files("org/merged")
        card = pushed["README.md"].decode()
        assert "| maths |  | score | 0.75 | 4 items" in card
        assert "load_file(hf_hub_download('org/merged', 'model.safetensors'))" in card
        assert str(repository) not in card
        assert "evaluation.png" in pushed


@pytest.mark.parametrize("page", TEXTS)
def test_each_command_of_the_job_does_its_part(page: str, repository: Path, hub: FakeHub) -> None:
    pytest.importorskip("matplotlib")
    for step in job_of(page)[1]:
        words = step.get("run", "")
        if words.startswith("modelmerge "):
            words, _, file = words.partition(" > ")
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main(shlex.split(words)[1:]) == 0, words
            if file:
                Path(file).write_text(out.getvalue())
    check_results(page, repository, hub)


@pytest.mark.slow  # builds the wheel, and starts a process for each step
@pytest.mark.parametrize("page", TEXTS)
def test_the_whole_job_runs_with_nothing_but_a_wheel(page: str, repository: Path, hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds the wheel")
    pytest.importorskip("matplotlib")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "modelmerge", sources / "modelmerge", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheel = [*pip, "wheel", str(sources), "--no-deps", "--no-build-isolation", "-w", str(repository)]
    subprocess.run(wheel, check=True, capture_output=True)
    # The user's environment: what modelmerge needs is there, modelmerge is not.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables, steps = job_of(page)
    assert Path(variables["MODELMERGE"]).name in os.listdir(repository), "the wheel is called as the page says"
    (environment / "bin" / "pip").write_text(f'#!/bin/sh\nexec {environment}/bin/python -m pip "$@"\n')
    (environment / "bin" / "pip").chmod(0o755)
    runner = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    runner |= {"MODELMERGE": variables["MODELMERGE"], "PATH": f"{environment}/bin:{os.environ['PATH']}",
               "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FORCE_REINSTALL": "1"}  # fmt: skip
    for step in (step["run"] for step in steps if "run" in step):
        done = subprocess.run(["bash", "-e", "-c", step], env=runner, cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    where = ["python", "-c", "import modelmerge; print(modelmerge.__file__)"]
    found = subprocess.run(where, env=runner, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(environment)), "it is the wheel's that ran"
    check_results(page, repository, hub)


def test_the_job_has_no_step_that_is_not_run() -> None:
    for page in TEXTS:
        for step in job_of(page)[1]:
            assert re.match(r"(pip install|modelmerge) ", step["run"]) if "run" in step else "actions/" in step["uses"]
