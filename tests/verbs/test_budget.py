"""search --budget: trials where those before let expect most, taken up where they were interrupted."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from modelmerge.errors import UsageError
from modelmerge.methods.options import Range, read_range
from modelmerge.verbs.candidates import label_of
from modelmerge.verbs.merge import merge
from modelmerge.verbs.search import search
from modelmerge.verbs.trials import trials
from tests.support import digits as digit_experts
from tests.support.commands import run
from tests.support.processes import running

pytest.importorskip("optuna")

# How near the weights are to those of a merge with known values: smooth, and best where it is known to be.
NEAR = """
import os, pathlib, signal
from safetensors.torch import load_file

TARGET = load_file("target/model.safetensors")

def near(model):
    calls = pathlib.Path("calls")
    if calls.exists():
        calls.write_text(calls.read_text() + model.name + "\\n")
        if len(calls.read_text().split()) == int(os.environ.get("STOP", 0)):
            os.kill(os.getpid(), signal.SIGSTOP)
    return -float(sum((model[n].double() - t.double()).square().sum() for n, t in TARGET.items())) ** 0.5
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two real experts: [base, inverted, rotated]."""
    return digit_experts.save(tmp_path_factory.mktemp("digits"), ("inverted", "rotated"))


@pytest.fixture
def models(experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The experts, and a merge with a scale of 0.73 and weights of 0.4 and 1.1 that the metric looks for."""
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("near.py").write_text(NEAR)
    merge(experts[0], experts[1:], "target", method="task-arithmetic", scale=0.73,
          weights={"inverted": 0.4, "rotated": 1.1})  # fmt: skip
    return experts


def words(models: list[Path], *more: str, out: str = "out") -> list[str]:
    return ["search", "task-arithmetic", *map(str, models), "-o", out, "--on", "custom:near.py:near", *more]


def searched(capsys: pytest.CaptureFixture[str], models: list[Path], *more: str, out: str = "out") -> dict[str, Any]:
    code, text, err = run(capsys, *words(models, *more, out=out), "--json")
    assert code == 0, err
    return json.loads(text)["manifest"]


SCALES = ("--try", "scale=0.1..1.5")
WEIGHTS = ("--try", "*.weight=0..2")
FITTING = ("--weight", "inverted=0.4", "--weight", "rotated=1.1")


def test_a_budget_finds_more_than_a_grid_of_as_many(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of one number, and of the weight of each expert with it."""
    one = searched(capsys, models, *SCALES, "--budget", "12", out="one")["searched"]
    grid = searched(capsys, models, "--try", f"scale=0.1:1.5:{1.4 / 11}", out="grid")["searched"]
    assert len(one["results"]) == len(grid["results"]) == 12 == one["budget"]
    best = [max(each["average"] for each in found["results"]) for found in (one, grid)]
    assert best[0] >= best[1]
    right = ("--scale", "0.73")
    weights = searched(capsys, models, *WEIGHTS, *right, "--budget", "25", out="weights")["searched"]
    square = searched(capsys, models, "--try", "*.weight=0:2:0.5", *right, out="square")["searched"]
    assert len(weights["results"]) == len(square["results"]) == 25
    best = [max(each["average"] for each in found["results"]) for found in (weights, square)]
    assert best[0] >= best[1]
    assert weights["options"] == {f"{name}.weight": {"low": 0.0, "high": 2.0, "log": False} for name in
                                  ("inverted", "rotated")}  # fmt: skip
    assert weights["results"][0]["options"] == {"inverted.weight": 1.0, "rotated.weight": 1.0}, "the defaults first"


def test_the_best_trial_is_written_as_a_plain_merge_of_its_values(
    models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = ("--plot", "course.svg", "--report", "found.html", "--report", "found.csv")
    manifest = searched(capsys, models, *WEIGHTS, "--try", "scale=0.3,0.73", "--budget", "8", *pictures)
    found = manifest["searched"]
    values = dict(found["chosen"])
    assert max(found["results"], key=lambda each: each["average"])["options"] == values
    merge(models[0], models[1:], "plain", method="task-arithmetic", scale=values["scale"],
          weights={name: values[f"{name}.weight"] for name in ("inverted", "rotated")})  # fmt: skip
    assert Path("out/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()
    assert ElementTree.parse("course.svg").getroot().tag.endswith("svg")
    assert "best so far" in Path("course.svg").read_text()
    page = Path("found.html").read_text()
    assert page.count('class="marker"') == 8 == page.count("<title>") - 1, "a dot for each candidate"
    assert f"<h1>{label_of(values)} " in page
    rows = list(csv.DictReader(Path("found.csv").read_text().splitlines()))
    wanted = ["base", *(label_of(each["options"]) for each in found["results"])]
    assert [row["model"] for row in rows] == wanted
    assert [float(row["score"]) for row in rows[1:]] == [each["average"] for each in found["results"]]
    code, _, err = run(capsys, "merge", "--recipe", "out/modelmerge.json", "-o", "again", "-q")
    assert code == 0, err


def test_killed_and_taken_up_the_trials_are_those_of_one_go(
    models: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the ninth measurement, which is that of the eighth trial, and interrupted in a later one."""
    told = (*SCALES, "--try", "inverted.weight=0.1..10:log", "--budget", "12")
    whole = searched(capsys, models, *told, out="whole")
    monkeypatch.setenv("MODELMERGE_CACHE", "other-cache")
    for stop, number, code in ((9, signal.SIGKILL, -9), (3, signal.SIGINT, 130)):
        Path("calls").write_text("")
        environment = {"STOP": str(stop), "OMP_NUM_THREADS": "1"}
        with running(words(models, *told, "--resume"), environment=environment) as process:
            process.until_stopped()
            process.send(number)
            assert process.end() == code, process.err()
            said = process.err()
        assert not Path("out").exists()
    assert "the scores of 9 candidates are kept: the same command takes them up" in said
    Path("calls").write_text("")
    manifest = searched(capsys, models, *told, "--resume")
    assert len(Path("calls").read_text().split()) == 3, "nothing is measured twice"
    for each in (whole, manifest):
        del each["searched"]["fingerprint"]
    assert manifest["searched"] == whole["searched"]
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    code, _, err = run(capsys, *words(models, *told, "--resume"))
    assert (code, "out is complete already" in err) == (0, True)
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_an_interrupt_leaves_nothing_unless_it_is_to_be_taken_up(models: list[Path]) -> None:
    Path("calls").write_text("")
    environment = {"STOP": "4", "OMP_NUM_THREADS": "1"}
    with running(words(models, *SCALES, "--budget", "6"), environment=environment) as process:
        process.until_stopped()
        process.send(signal.SIGINT)
        assert process.end() == 130, process.err()
        assert "nothing is left of this run" in process.err()
    names = {path.name for path in Path().iterdir()}
    assert names - {"__pycache__"} == {"near.py", "target", "calls"}


def test_scores_of_another_search_are_not_taken_up(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """More trials go on from those of fewer; another function or range begins anew."""
    environment = {"STOP": "5", "OMP_NUM_THREADS": "1"}

    def anew() -> None:
        Path("calls").write_text("")
        shutil.rmtree("../cache", ignore_errors=True)  # what was measured once is not measured again

    def interrupted(*more: str) -> None:
        anew()
        told = words(models, *SCALES, "--budget", "8", "--resume", *more)
        with running(told, environment=environment) as process:
            process.until_stopped()
            process.send(signal.SIGKILL)
            process.end()
        anew()

    interrupted()
    manifest = searched(capsys, models, *SCALES, "--budget", "9", "--resume")
    assert (len(manifest["searched"]["results"]), len(Path("calls").read_text().split())) == (9, 1 + 6)
    interrupted("--force")
    searched(capsys, models, "--try", "scale=0.1..1.4", "--budget", "4", "--resume", "--force")
    assert len(Path("calls").read_text().split()) == 1 + 4, "the base too"
    interrupted("--force")
    Path("near.py").write_text(f"{NEAR}\n# another\n")
    searched(capsys, models, *SCALES, "--budget", "4", "--resume", "--force")
    assert len(Path("calls").read_text().split()) == 1 + 4


def test_a_budget_beyond_all_combinations_merges_them_all(
    models: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # it is not needed
    code, text, err = run(capsys, *words(models, "--try", "scale=0.3,0.73,1.0", *FITTING, "--budget", "20"), "--json")
    assert code == 0, err
    found = json.loads(text)["manifest"]["searched"]
    assert [each["options"]["scale"] for each in found["results"]] == [0.3, 0.73, 1.0]
    assert (found["merges"], found["chosen"]) == (1, {"scale": 0.73})
    assert "All 3 combinations are merged: the budget of 20 is no smaller." in err


def test_without_its_library_a_budget_is_refused(
    models: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run(capsys, *words(models, *SCALES, "--budget", "5"))
    assert code == 1
    assert "--budget needs optuna, which is not installed" in err
    assert 'pip install "optuna>=4.4" scipy' in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (SCALES, "--try 'scale=0.1..1.5' is all numbers between two"),
        ((*SCALES, "--budget", "0"), "--budget must be 1 to 10,000, not 0"),
        (("--try", "scale=1.5..0.1", "--budget", "3"), "'1.5..0.1' leads nowhere"),
        (("--try", "scale=0..1:log", "--budget", "3"), "'0..1:log' has no logarithms"),
        (("--try", "scale=0..1:lag", "--budget", "3"), "'0..1:lag' is no range"),
        (("--try", "scale=a..b", "--budget", "3"), "scale must be a float, not 'a'"),
        (("--try", "math.weight=0..1", "--budget", "3"), "'task-arithmetic' has no option 'math.weight'"),
        ((*WEIGHTS, "--weight", "rotated=2", "--budget", "3"), "'rotated.weight' is given, and tried"),
        ((*WEIGHTS, "--try", "rotated.weight=0,1", "--budget", "3"), "'rotated.weight' is tried twice"),
        ((*WEIGHTS, "--at", "*: weight=1", "--budget", "3"), "'inverted.weight' has no effect: --at"),
        (("--try", "inverted.weight=nan", "--budget", "3"), "weight must be a float, not 'nan'"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    more: tuple[str, ...], says: str, models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *words(models, *more))
    assert code == 2, err
    assert says in " ".join(err.split())
    assert not Path("out").exists()


def test_an_option_out_of_bounds_is_refused_at_either_end(models: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"tries 'density=0.1..1.5': density must be above 0 and at most 1"):
        search(models[0], models[1:], "out", method="ties", tries={"density": "0.1..1.5"}, on=["custom:near.py:near"],
               budget=3)  # fmt: skip


def test_a_function_without_a_file_is_not_taken_up(models: list[Path]) -> None:
    with pytest.raises(UsageError, match="could be another by now"):
        search(models[0], models[1:], "out", method="ties", tries={"density": "0.1..0.5"}, metric=lambda model: 1.0,
               budget=3, resume=True)  # fmt: skip


def test_the_plan_tells_what_trials_take(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, text, err = run(capsys, *words(models, *SCALES, "--budget", "7"), "-n", "--json")
    assert code == 0, err
    plan = json.loads(text)["plan"]
    assert (plan["search"]["candidates"], plan["search"]["merges"]) == (7, 7)
    assert plan["search"]["disk"]["all"] == plan["search"]["disk"]["least"] == plan["bytes"]["write"] * 2 // 7


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("0.1..1.5", float, Range(0.1, 1.5)),
        ("1e-4..1e-1:log", float, Range(1e-4, 0.1, log=True)),
        ("-1...5", float, Range(-1.0, 0.5)),
        ("10..500", int, Range(10, 500)),
        ("0.1..0.5", float | None, Range(0.1, 0.5)),
        ("0.1:0.5:0.1", float, None),
        ("a..b", str, None),
    ],
)
def test_ranges_are_read_as_they_are_typed(text: str, kind: Any, expected: Range | None) -> None:
    assert read_range("scale", text, kind) == expected


def test_trials_are_of_each_kind_and_no_two_alike() -> None:
    """Of few values all are tried; numbers are in their ranges, and of few digits; a failure does no harm."""
    axes: dict[str, Any] = {"scale": Range(0.1, 1.5), "lr": Range(1e-4, 1e-1, log=True), "steps": Range(10, 500),
                            "density": (0.5, 0.1, 0.2), "reduce": ("sum", "mean"), "cap": (None, 1.0)}  # fmt: skip
    asked = trials(axes, {"scale": 2.0, "density": 0.2, "reduce": "mean"}, 10, 3)
    values, every = next(asked), []
    while True:
        every.append(values)
        try:
            values = asked.send(None if len(every) == 3 else -abs(values["scale"] - 0.7))
        except StopIteration:
            break
    assert len(every) == 10 == len({json.dumps(each) for each in every})
    assert (every[0]["density"], every[0]["reduce"]) == (0.2, "mean"), "the defaults that can be had"
    for each in every:
        assert all(each[name] in axes[name] for name in ("density", "reduce", "cap"))
        assert all(axes[name].low <= each[name] <= axes[name].high for name in ("scale", "lr", "steps"))
        assert type(each["steps"]) is int
        assert float(f"{each['lr']:.4g}") == each["lr"]
    assert max(each["lr"] for each in every) / min(each["lr"] for each in every) > 10
    asked = trials({"a": (1, 2, 3), "b": ("x", "y")}, {}, 6, 0)
    few, values = [], next(asked)
    while values is not None:
        few.append(tuple(values.values()))
        try:
            values = asked.send(math.cos(values["a"]))
        except StopIteration:
            break
    assert sorted(few) == [(a, b) for a in (1, 2, 3) for b in ("x", "y")]
