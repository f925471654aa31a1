"""The guide on measuring one's own case: every block runs on real experts, in a real shell, as the guide has it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from modelmerge.evaluation import digits
from tests.support.commands import program
from tests.support.digits import TASKS, save
from tests.support.guides import GUIDES, blocks

# With the experts that tests train.
TEXT = GUIDES["measuring"].read_text().replace("mirrored", "swapped")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo's base and experts, trained for less long, and the guide's measure."""
    root = tmp_path_factory.mktemp("measuring")
    base, *experts = save(root)
    (root / "demo" / "experts").mkdir(parents=True)
    base.rename(root / "demo" / "base")
    for expert in experts:
        expert.rename(root / "demo" / "experts" / expert.name)
    (root / "metric.py").write_text(blocks(TEXT, "python")[0])
    return root


def test_the_halves_are_all_the_questions_and_share_none(place: Path) -> None:
    metric: dict[str, Any] = {}
    exec(compile((place / "metric.py").read_text(), "metric.py", "exec"), metric)  # the guide is ours
    base = load_file(place / "demo" / "base" / "model.safetensors")
    whole, halves = digits.scores(base), (metric["validation"](base), metric["test"](base))
    assert all(tuple(half) == TASKS for half in halves)
    for task in TASKS:
        first, second = (half[task]["items"] for half in halves)
        assert [*first, *second] == whole[task]["items"][0::2] + whole[task]["items"][1::2]


def test_the_lines_measure_search_and_report(place: Path) -> None:
    script = "set -e\n" + "\n".join(blocks(TEXT, "bash"))
    done = subprocess.run(
        ["bash", "-c", script], cwd=place, env=program(place / "bin"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is the best of 4 on average over 3 tasks" in done.stdout
    for method in ("kron", "tsv-m"):
        searched = json.loads((place / "best" / method / "modelmerge.json").read_text())["searched"]
        assert [candidate["options"]["scale"] for candidate in searched["results"]] == [0.7, 1.0, 1.3]
        best = max(searched["results"], key=lambda candidate: candidate["average"])
        assert best["options"] == searched["chosen"]
    assert "is the best of 3 on average over 3 tasks" in done.stdout
    page = (place / "report.html").read_text()
    assert all(name in page for name in ("base", "kron", "tsv-m", "weighted"))
