"""What scores come to where one is missing, where less is better, and where experts go by other names."""

from __future__ import annotations

from typing import Any

import pytest

from modelmerge.cli.evaluate import _show
from modelmerge.cli.output import Sink
from modelmerge.errors import UsageError
from modelmerge.evaluation.scores import Score, check_gates, differences, parse_gate, summarise
from modelmerge.verbs.render import Pictures

TASKS = ("glue_cola", "glue_stsb", "wikitext")


def row(name: str, role: str, cola: float, stsb: float | None, perplexity: float) -> dict[str, Any]:
    scores = [
        Score(value=cola, count=100, stderr=0.03, metric="acc", figures={"acc,none": cola}),
        Score(value=stsb, count=50, stderr=None if stsb is None else 0.04, metric="spearman"),
        Score(value=perplexity, metric="word_perplexity", lower=True),
    ]
    told = {task: score.to_dict() for task, score in zip(TASKS, scores, strict=True)}
    return {"name": name, "role": role, "scores": told}


def rows(stsb: float | None = 0.6) -> list[dict[str, Any]]:
    made = [row("cola", "expert", 0.8, 0.1, 30.0), row("stsb", "expert", 0.2, 0.75, 30.0)]
    made += [row("ties", "model", 0.6, stsb, 20.0), row("apgd", "model", 0.7, 0.66, 25.0)]
    summarise(TASKS, made, {"glue_cola": "cola", "glue_stsb": "stsb"})
    return made


def test_less_is_better_in_no_mean() -> None:
    ties = rows()[2]
    assert ties["average"] == pytest.approx((0.6 + 0.6) / 2)
    assert ties["average_stderr"] == pytest.approx(0.05 / 2)
    assert ties["normalised"] == pytest.approx((0.6 / 0.8 + 0.6 / 0.75) / 2)
    assert ties["scores"]["wikitext"]["normalised"] is None
    assert ties["scores"]["glue_cola"]["figures"] == {"acc,none": 0.6}


def test_a_model_without_a_score_has_no_mean() -> None:
    _, _, ties, apgd = rows(stsb=None)
    assert [ties[key] for key in ("average", "average_stderr", "normalised")] == [None, None, None]
    assert apgd["average"] == pytest.approx(0.68)
    gates = [parse_gate(text) for text in ("avg=0.1", "normalized=0.1", "glue_stsb=0.1", "glue_cola=0.1")]
    gate = check_gates(gates, TASKS, [ties, apgd], {"glue_cola": "cola", "glue_stsb": "stsb"})
    assert [(f["model"], f["gate"], f["value"]) for f in gate["failures"]] == [
        ("ties", "avg=0.1", None), ("ties", "normalized=0.1", None), ("ties", "glue_stsb=0.1", None),
    ]  # fmt: skip


def test_an_expert_without_a_score_normalises_nothing() -> None:
    made = [row("cola", "expert", 0.8, 0.5, 1.0), row("stsb", "expert", 0.5, None, 1.0), row("m", "model", 0.4, 0.5, 1)]
    summarise(TASKS, made, {"glue_cola": "cola", "glue_stsb": "stsb"})
    assert made[2]["normalised"] == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["wikitext=3", "avg=0.5"])
def test_no_gate_is_a_least_value_of_what_should_be_small(text: str) -> None:
    made = rows()
    tasks = TASKS if text.startswith("wiki") else TASKS[2:]
    with pytest.raises(UsageError, match="less is better"):
        check_gates([parse_gate(text)], tasks, made)


def test_a_difference_to_what_is_missing_is_missing() -> None:
    ours, theirs = ({"tasks": TASKS, "models": rows(stsb), "metric": 1} for stsb in (0.6, None))
    told = differences(ours, theirs)[2]
    assert told["model"] == "ties"
    assert told["tasks"]["glue_stsb"] == {"difference": None, "stderr": None, "p": None, "paired": False}
    assert told["average"] == {"difference": None, "stderr": None, "p": None}
    assert told["tasks"]["wikitext"]["difference"] == 0.0
    theirs["models"][2]["scores"]["glue_cola"]["metric"] = "mcc"
    with pytest.raises(UsageError, match="'glue_cola' is acc here, and mcc there"):
        differences(ours, theirs)


def test_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    made = {"suite": "lm", "tasks": list(TASKS), "models": rows(stsb=None), "notes": []}
    _show(made, Sink("human"), Pictures(None, "auto", ()))
    told = capsys.readouterr().out
    assert "wikitext (less is better)" in told
    ties = next(line for line in told.splitlines() if line.startswith("ties"))
    assert ties.split() == ["ties", "0.6", "±0.03", "n/a", "20", "n/a", "n/a"]
    _show(made, Sink("quiet"), Pictures(None, "auto", ()))
    assert capsys.readouterr().out.split() == ["n/a", "0.68"]
