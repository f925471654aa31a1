"""Reports as Markdown and as comma-separated values, and in the summary of a job of GitHub Actions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from modelmerge.charts import exports
from modelmerge.cli import main
from modelmerge.errors import UsageError
from modelmerge.verbs.render import render
from tests.support.reports import EIGHT, scores

EVIL = "<img src=x>|`a`|[b](http://example.org)"
SCRIPT = """
def score(model):
    return {"a": 0.5, "b": {"items": [1, 0, 1]}}
"""


@pytest.fixture
def words(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("metric.py").write_text(SCRIPT)
    return ["eval", "custom", str(models[1]), "--script", "metric.py:score"]


def shown(text: str) -> str:
    """What a reader of the Markdown sees, as HTML."""
    return MarkdownIt("commonmark").enable("table").render(text)


def test_markdown_has_the_tables_and_what_they_come_to() -> None:
    report = scores(EIGHT, ("ties", "kron"), notes=["36 scores were measured before"], gate={
        "gates": ["avg=0.99"], "passed": False,
        "failures": [{"model": "ties", "gate": "avg=0.99", "value": 0.5}],
    })  # fmt: skip
    text = exports.markdown(report)
    html = shown(text)
    best = max(report["models"][-2:], key=lambda model: model["average"])
    assert f"{best['name']} {100 * best['average']:.1f} ±" in text
    assert "<strong>Failed</strong>: 'ties' has 50.0 % on average, and is asked for 99 % (avg=0.99)" in html
    assert html.count("<table>") == 1
    assert html.count("<tr>") == 1 + len(report["models"]) + 1, "a heading, the models, the number of items"
    assert f"<strong>{100 * best['average']:.1f} ±" in html
    assert "<li>36 scores were measured before</li>" in html


def test_names_in_markdown_are_words() -> None:
    html = shown(exports.markdown(scores((EVIL,), (EVIL, "m"))))
    assert "<img" not in html
    assert "<a href" not in html
    assert html.count("</th>") == 4, "a bar in a name begins no column"


def test_values_are_every_score_unrounded(tmp_path: Path) -> None:
    report = scores(EIGHT, ("ties", 'a,"b"'), missing=(("ties", "svhn"),))
    render(report, page=[tmp_path / "x.csv", tmp_path / "x.md"])
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["models"]) * len(EIGHT)
    by_place = {(row["model"], row["role"], row["task"]): row for row in rows}
    for model in report["models"]:
        for task, score in model["scores"].items():
            row = by_place[model["name"], model["role"], task]
            assert row["score"] == ("" if score["score"] is None else repr(score["score"]))
            assert (row["count"], row["metric"]) == ("1000", "accuracy")
    assert (tmp_path / "x.md").read_text() == exports.markdown(report)


def test_values_of_weights_are_each_layer_s(models: list[Path], tmp_path: Path) -> None:
    words = ["eval", "weights", str(models[3]), "--base", str(models[0]), "--expert", str(models[1]), "--expert",
             str(models[2]), "--no-decompose", "--per-layer", "--json"]  # fmt: skip
    assert main([*words, "--report", str(tmp_path / "w.csv"), "--report", str(tmp_path / "w.md")]) == 0
    with (tmp_path / "w.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["layer"], row["model"], row["expert"]) for row in rows if row["layer"] == "whole model"} == {
        ("whole model", "expert_2", "expert_0"), ("whole model", "expert_2", "expert_1"),
    }  # fmt: skip
    assert all(-1 <= float(row["cosine"]) <= 1 for row in rows if row["cosine"])
    assert "Conflicts between the experts" in shown((tmp_path / "w.md").read_text())


def test_a_job_of_github_actions_gets_a_summary(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary"
    summary.write_text("# Before\n\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert main([*words, "--json", "--fail-under", "a=60%"]) == 1
    report: Any = json.loads(capsys.readouterr().out)
    assert summary.read_text() == f"# Before\n\n{exports.markdown(report)}\n"
    assert "<strong>Failed</strong>: 'expert_0' has 50.0 % at a, and is asked for 60 % (a=0.6)" in shown(
        summary.read_text()
    )
    assert main([*words, "-q"]) == 0
    assert summary.read_text().count("### modelmerge eval custom") == 2
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "gone" / "summary"))
    assert main(words) == 0
    assert "summary: No such file or directory: the job's summary lacks this report" in capsys.readouterr().err


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.txt: a report is a page or a table") as caught:
        render(scores(EIGHT, ("m",)), page=tmp_path / "x.txt")
    assert caught.value.hint == "end in .html, .htm, .md, .csv"
