"""eval custom: any model by a function of one's own; scores, the cache, gates, comparisons, cards."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelmerge
from modelmerge.checkpoint.digest import sha256
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, UsageError
from modelmerge.evaluation import scores
from modelmerge.evaluation.custom import Model
from tests.support.checkpoints import read, write
from tests.support.commands import run
from tests.support.hub_server import FakeHub
from tests.support.processes import running

Q = "model.layers.0.q_proj.weight"
SCRIPT = """
import sys
from pathlib import Path

def accuracy(model):
    with open({log!r}, "a") as log:
        print(model.name, file=log)
    print("a script may say what it likes")
    w = model["model.layers.0.q_proj.weight"].flatten()
    return {{
        "expert_0": {{"items": (w[:100] > 0).int().tolist(), "metric": "accuracy"}},
        "expert_1": {{"correct": int((w > 0.01).sum()), "count": len(w), "metric": "accuracy"}},
    }}

def each(model, task):
    with open({log!r}, "a") as log:
        print(model.name, task, file=log)
    if task == "deadly" and Path({trap!r}).exists():
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.5

def quiet(model):
    return float(model["logit_scale"])
def is_nan(model):
    return float("nan")
def is_text(model):
    return {{"a": "well"}}
def is_none(model):
    return None
def is_flag(model):
    return True
def nothing(model):
    return {{}}
def raises(model):
    return {{}}["gone"]
def leaves(model):
    sys.exit("I go")
def lacks(model):
    return {{"a": 1.0, **({{"b": 1.0}} if model.name == "expert_0" else {{}})}}
"""


class Setup:
    """A script, the log of its calls, and the trap that its deadly task falls into."""

    def __init__(self, root: Path) -> None:
        self.log, self.trap, self.file = root / "calls.log", root / "trap", root / "metric.py"
        self.file.write_text(SCRIPT.format(log=str(self.log), trap=str(self.trap)))

    def script(self, name: str = "accuracy") -> str:
        return f"{self.file}:{name}"

    def calls(self) -> list[str]:
        """The calls since the last look."""
        made = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return made


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "cache"))
    return Setup(tmp_path)


def states(models: list[Any], **options: Any) -> list[dict[str, Tensor]]:
    """What a function sees of models, whole."""
    seen = []

    def look(model: Model) -> float:
        assert len(model) == len(list(model))
        seen.append(dict(model))
        return 0.0

    modelmerge.evaluate(models, metric=look, **options)
    return seen


def equal(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(
        state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in wanted.items()
    )


def test_a_function_sees_every_tensor_of_every_kind_of_model(models: list[Path], tmp_path: Path, hub: FakeHub) -> None:
    wanted = read(models[1]) | {
        "flags": torch.tensor([True, False]), "bytes": torch.arange(3, dtype=torch.uint8), "half": torch.ones(2).half(),
        "brain": torch.ones(2).bfloat16(), "wide": torch.ones(2).double(), "f8": torch.ones(4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    write(tmp_path / "one", wanted)
    write(tmp_path / "three", wanted, shards=3)
    save_file(wanted, tmp_path / "lone.safetensors")
    hub.add("org/model", tmp_path / "three")
    (tmp_path / "pickled").mkdir()
    del wanted["f8"]
    torch.save(wanted, tmp_path / "pickled" / "pytorch_model.bin")
    kinds = [tmp_path / "one", tmp_path / "three", tmp_path / "lone.safetensors", tmp_path / "pickled", "org/model"]
    for state in states(kinds):
        state.pop("f8", None)
        assert equal(state, wanted)


def test_a_path_leads_to_the_whole_model(models: list[Path], hub: FakeHub) -> None:
    hub.add("org/model", models[1])

    def look(model: Model) -> float:
        assert (model.path / "config.json").read_text() == (models[1] / "config.json").read_text()
        assert (model.path / "tokenizer.json").exists()
        assert model.device == torch.device("cpu")
        return len(load_file(model.path / "model.safetensors"))

    report = modelmerge.evaluate([models[1], "there=org/model"], metric=look, device="cpu")
    assert [model["average"] for model in report["models"]] == [9.0, 9.0]
    assert report["models"][0]["digest"] == report["models"][1]["digest"]


def test_adapters_and_task_vectors_are_seen_as_models(models: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(models[0], models[1:2], tmp_path / "vectors")
    linear = {"method": "task-arithmetic", "include": ["*proj.weight"]}
    modelmerge.merge(models[0], models[1:], tmp_path / "whole", **linear)
    modelmerge.merge(models[0], models[1:], tmp_path / "adapter", as_lora=16, **linear)
    adapter, vector = states([tmp_path / "adapter", tmp_path / "vectors" / "expert_0"], base=models[0])[1:]
    for state, wanted in ((adapter, read(tmp_path / "whole")), (vector, read(models[1]))):
        assert state.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert state[name].dtype == tensor.dtype
            assert torch.allclose(state[name], tensor, atol=1e-6), name
    for path, kind in ((tmp_path / "adapter", "PEFT adapter"), (tmp_path / "vectors" / "expert_0", "task vector")):
        with pytest.raises(UsageError, match=f"is a {kind}: its base must be named"):
            states([path])
    with pytest.raises(PlanError, match="task vector of another base"):
        states([tmp_path / "vectors" / "expert_0"], base=models[1])


def test_a_tensor_that_is_not_there_is_a_key_error(models: list[Path]) -> None:
    with pytest.raises(ModelMergeError, match=r"<lambda> failed on 'expert_0': KeyError: 'gone'"):
        modelmerge.evaluate([models[1]], metric=lambda model: model["gone"])


@pytest.mark.parametrize(
    ("told", "value", "count", "stderr"),
    [
        (0.5, 0.5, None, None),
        (3, 3.0, None, None),
        (torch.tensor(0.25), 0.25, None, None),
        ({"score": 0.5, "count": 10, "stderr": 0.1}, 0.5, 10, 0.1),
        ({"score": 0.5}, 0.5, None, None),
        ({"correct": 3, "count": 4}, 0.75, 4, math.sqrt(0.75 * 0.25 / 4)),
        ({"items": [1, 0, 1, 0]}, 0.5, 4, math.sqrt(1 / 3) / 2),
        ({"items": torch.tensor([1.0, 0.0]), "ids": [1, 2]}, 0.5, 2, 0.5),
        ({"items": [2.0]}, 2.0, 1, None),
    ],
)
def test_what_a_score_is(told: Any, value: float, count: int | None, stderr: float | None) -> None:
    score = scores.read_score(told, "here")
    assert (score.value, score.count) == (value, count)
    assert score.stderr == (None if stderr is None else pytest.approx(stderr))
    again = scores.read_score(score.to_dict(), "here")
    assert again.value == pytest.approx(score.value)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (float("inf"), "the score is inf"), ("0.5", "str '0.5' is no number"), (True, "bool 'True' is no number"),
        (torch.ones(2), "is no number"), ({}, "no score in it"), ({"acc": 1.0}, "unknown key 'acc'"),
        ({"items": []}, "there are no items"), ({"items": [1.0, None]}, "item 1: NoneType 'None' is no number"),
        ({"items": [1.0, 0.0], "ids": ["a"]}, "2 items, and 1 ids"), ({"correct": 3}, "3 correct of None"),
        ({"correct": 5, "count": 4}, "5 correct of 4"), ({"score": 1.0, "count": 0.5}, "a count of 0.5"),
        ({"score": 1.0, "stderr": float("nan")}, "the score is nan"),
    ],
)  # fmt: skip
def test_what_a_score_is_not(told: Any, says: str) -> None:
    with pytest.raises(ModelMergeError, match=f"^here.*{says}"):
        scores.read_score(told, "here")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--script", "SCRIPT:is_nan"], 1, "metric.py:is_nan on 'expert_0': the score is nan"),
        (["--script", "SCRIPT:is_text"], 1, "'expert_0', 'a': str 'well' is no number"),
        (["--script", "SCRIPT:is_none"], 1, "NoneType 'None' is no number"),
        (["--script", "SCRIPT:is_flag"], 1, "bool 'True' is no number"),
        (["--script", "SCRIPT:nothing"], 1, "returned no scores"),
        (["--script", "SCRIPT:raises"], 1, "metric.py:raises failed on 'expert_0': KeyError: 'gone' (metric.py:"),
        (["--script", "SCRIPT:leaves"], 1, "SystemExit: I go"),
        (["--script", "SCRIPT:lacks", "E1"], 1, "'expert_0' has a score for 'b', and 'expert_1' has none"),
        (["--script", "SCRIPT:each"], 2, "cannot be called with (model): missing a required argument: 'task'"),
        (["--script", "SCRIPT:quiet", "--task", "a"], 2, "cannot be called with (model, task): too many"),
        (["--script", "SCRIPT:quite"], 2, "did you mean 'quiet'?"),
        (["--script", "SCRIPT"], 2, "is not FILE:FUNCTION"),
        (["--script", "gone.py:f"], 1, "gone.py: no such file"),
        (["--script", "gone.module:f"], 1, "gone.module cannot be imported: ModuleNotFoundError"),
        (["--script", "BROKEN:f"], 1, "cannot be run: SyntaxError"),
        (["--script", "SCRIPT:quiet", "--fail-under", "avg"], 2, "--fail-under 'avg' is no name and number"),
        (["--script", "SCRIPT:quiet", "--fail-under", "acc=1"], 2, "names 'acc', which is no task"),
        (["--script", "SCRIPT:quiet", "--fail-under", "normalized=1"], 2, "needs the experts"),
        (["--script", "SCRIPT:quiet", "--expert", "E1", "--fail-under", "normalised=1"], 2, "no expert called 'quiet'"),
        (["--script", "SCRIPT:quiet", "--compare", "gone.json"], 1, "no such file"),
        (["--script", "SCRIPT:quiet", "--compare", "SCRIPT"], 1, "not valid JSON"),
        (["--script", "SCRIPT:quiet", "--update-card", "org/name"], 1, "neither a path here"),
        (["--script", "SCRIPT:quiet", "LONE", "--update-card"], 2, "is no directory here"),
        (["--script", "SCRIPT:quiet", "E0"], 2, "two models are called 'expert_0'"),
        (["--script", "SCRIPT:quiet", "--device", "cuda:99"], 1, "no such CUDA device"),
        ([], 2, "--script"),
    ],
)
def test_errors_name_what_is_wrong(
    words: list[str], code: int, says: str, models: list[Path], setup: Setup, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:")
    lone = str(models[1] / "model.safetensors")
    places = {"SCRIPT": str(setup.file), "E0": str(models[1]), "E1": str(models[2]), "LONE": f"lone={lone}",
              "BROKEN": str(tmp_path / "broken.py")}  # fmt: skip
    for word, place in places.items():
        words = [place if part == word else part.replace(f"{word}:", f"{place}:") for part in words]
    got, out, err = run(capsys, "eval", "custom", models[1], *words)
    assert (got, out) == (code, "")
    assert says in " ".join(err.split()) or says in err
    assert "Traceback" not in err


def test_a_report_tells_all(models: list[Path], setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"first={models[3]}", f"second={models[2]}", "--script", setup.script(), "--base", models[0],
             "--expert", models[1], "--expert", f"Expert-1={models[2]}"]  # fmt: skip
    code, out, err = run(capsys, "eval", "custom", *words, "--json")
    told = json.loads(out)  # what the script printed is on stderr
    assert code == 0
    assert "a script may say what it likes" in err
    roles = [(model["name"], model["role"]) for model in told["models"]]
    assert roles == [("base", "base"), ("expert_0", "expert"), ("Expert-1", "expert"), ("first", "model"),
                     ("second", "model")]  # fmt: skip
    rows = {model["name"]: model for model in told["models"]}
    for name, path in (("first", models[3]), ("second", models[2]), ("base", models[0])):
        w = read(path)[Q].flatten()
        zero, one = float((w[:100] > 0).float().mean()), float((w > 0.01).float().mean())
        scores = rows[name]["scores"]
        assert scores["expert_0"]["score"] == pytest.approx(zero)
        assert scores["expert_1"]["score"] == pytest.approx(one)
        assert (scores["expert_0"]["count"], scores["expert_1"]["count"]) == (100, 256)
        assert rows[name]["average"] == pytest.approx((zero + one) / 2)
        errors = [scores[task]["stderr"] for task in told["tasks"]]
        assert rows[name]["average_stderr"] == pytest.approx(math.hypot(*errors) / 2)
        # An expert goes by its task's name, however that is written.
        shares = [zero / rows["expert_0"]["scores"]["expert_0"]["score"],
                  one / rows["Expert-1"]["scores"]["expert_1"]["score"]]  # fmt: skip
        assert rows[name]["normalised"] == pytest.approx(sum(shares) / 2)
    assert rows["second"]["scores"]["expert_1"]["normalised"] == 1.0
    assert rows["first"]["files"][str(models[3] / "model.safetensors")]["sha256"] == sha256(
        models[3] / "model.safetensors"
    )
    assert told["seed"] == 0
    assert told["versions"]["torch"] == torch.__version__
    assert told["metric"]["function"] == "metric.py:accuracy"
    code, out, err = run(capsys, "eval", "custom", *words)
    assert code == 0
    assert "Accuracy, per cent, ± standard error" in out
    assert f"{100 * rows['first']['scores']['expert_0']['score']:.1f} ±" in out
    best = max(("first", "second"), key=lambda name: rows[name]["average"])
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == sorted(("first", "second"), key=lambda name: name != best)
    assert [line.split()[:2] for line in lines[4:6]] == [["expert", "expert_0"], ["expert", "Expert-1"]]
    assert [line.split()[0] for line in lines[6:8]] == ["base", "items"]
    assert lines[7].split() == ["items", "100", "256"]
    assert lines[9].startswith(f"{best} {100 * rows[best]['average']:.1f} ±"), "what it comes to is the last word"
    assert " is the best of 2 on average over 2 tasks: " in lines[9]
    assert "10 of 10 scores were measured before" in err
    code, out, _ = run(capsys, "eval", "custom", *words, "-q")
    assert [float(line) for line in out.split()] == pytest.approx(
        [rows["first"]["average"], rows["second"]["average"]], rel=1e-5
    )


def test_the_best_is_bold(models: list[Path], setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.text import Text

    from modelmerge.charts.tables import of_scores
    from modelmerge.cli.evaluate import _printed

    run(capsys, "eval", "custom", models[1], models[2], "--script", setup.script("quiet"), "--base", models[0])
    scores = {"a": {"score": 0.5, "stderr": None, "count": None, "metric": "score", "normalised": None}}
    low = {"scores": scores, "average": 0.5, "average_stderr": None, "normalised": None, "role": "model", "name": "low"}
    high = {**low, "name": "high", "average": 0.7, "scores": {"a": {**scores["a"], "score": 0.7}}}
    expert = {**high, "role": "expert", "average": 0.9}
    shown: Any = _printed([of_scores({"tasks": ["a"], "models": [expert, low, high]})])[0]
    bold = [[isinstance(cell, Text) and cell.style == "bold" for cell in column._cells] for column in shown.columns]
    assert bold == [[False] * 3, [True, False, False], [True, False, False]]


def test_what_was_measured_is_not_measured_again(models: list[Path], setup: Setup) -> None:
    def evaluate(**options: Any) -> list[str]:
        report = modelmerge.evaluate([models[1], models[2]], **({"metric": setup.script()} | options))
        assert bool(report["notes"]) == any(model["cached"] for model in report["models"])
        return setup.calls()

    both = ["expert_0", "expert_1"]
    assert evaluate() == both
    assert evaluate() == []
    assert evaluate(cache=False) == both
    assert evaluate(seed=1) == both
    assert evaluate(seed=1) == []
    # Names and cards are no part of a model, its config is.
    (models[1] / "README.md").write_text("# Something")
    assert evaluate() == []
    (models[1] / "config.json").write_text('{"model_type": "other"}')
    assert evaluate() == ["expert_0"]
    state = read(models[2])
    state[Q][0, 0] += 1
    write(models[2], state)
    assert evaluate() == ["expert_1"]
    setup.file.write_text(setup.file.read_text() + "\n# another\n")
    assert evaluate() == both
    entries = sorted((setup.log.parent / "cache" / "eval").iterdir())
    entries[0].write_text("{")
    assert len(evaluate()) <= 1  # a damaged entry is one that is not there


def test_what_a_script_imports_beside_it_counts_too(models: list[Path], setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "beside_it_a.py").write_text("VALUE = 0.25\n")
    script = tmp_path / "importing.py"
    script.write_text("import beside_it_a\ndef f(model):\n    return beside_it_a.VALUE\n")

    def value() -> float:
        with running(["eval", "custom", str(models[1]), "--script", f"{script}:f", "-q"]) as run:
            assert run.end() == 0
            return float(run.out())

    assert value() == 0.25
    (tmp_path / "beside_it_a.py").write_text("VALUE = 0.125\n")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)  # Python itself looks at seconds and sizes
    assert value() == 0.125


def test_a_function_in_python_is_cached_by_a_key_only(models: list[Path], setup: Setup) -> None:
    calls = []

    def metric(model: Model) -> float:
        calls.append(model.name)
        return 1.0

    for key, made in ((None, 1), (None, 1), ("one", 1), ("one", 0), ("two", 1)):
        modelmerge.evaluate([models[1]], metric=metric, key=key)
        assert len(calls) == made
        calls.clear()


def test_a_killed_run_keeps_the_tasks_that_were_done(models: list[Path], setup: Setup) -> None:
    words = ["eval", "custom", str(models[1]), "--script", setup.script("each")]
    words += ["--task", "first", "--task", "deadly", "-q"]
    setup.trap.touch()
    with running(words) as killed:
        assert killed.end() == -signal.SIGKILL
    assert setup.calls() == ["expert_0 first", "expert_0 deadly"]
    setup.trap.unlink()
    with running(words) as again:
        assert (again.end(), again.out()) == (0, "0.5\n")
    assert setup.calls() == ["expert_0 deadly"]


def test_every_call_starts_from_the_same_seed(models: list[Path]) -> None:
    import random

    import numpy

    def metric(model: Model, task: str) -> dict[str, Any]:
        return {"items": [random.random(), float(numpy.random.rand()), float(torch.rand(()))]}

    def drawn(seed: int) -> list[list[float]]:
        report = modelmerge.evaluate([models[1], models[2]], metric=metric, tasks=["a", "b"], seed=seed)
        return [model["scores"][task]["items"] for model in report["models"] for task in ("a", "b")]

    once = drawn(3)
    assert all(items == once[0] for items in once)
    assert drawn(3) == once
    assert drawn(4) != once


def test_a_gate_fails_with_the_report_printed(
    models: list[Path], setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [models[1], models[2], "--script", setup.script(), "--expert", models[1], "--expert", models[2]]
    assert run(capsys, "eval", "custom", *words, "--fail-under", "avg=0.1", "--fail-under", "normalized=0.1")[0] == 0
    code, out, err = run(
        capsys, "eval", "custom", *words, "--fail-under", "expert_0=0.99", "--fail-under", "avg=0.1", "--json"
    )
    told = json.loads(out)
    assert code == 1
    assert told["gate"]["passed"] is False
    assert [(f["model"], f["gate"]) for f in told["gate"]["failures"]] == [
        ("expert_0", "expert_0=0.99"), ("expert_1", "expert_0=0.99")
    ]  # fmt: skip
    value = next(m for m in told["models"] if m["role"] == "model" and m["name"] == "expert_1")["scores"]["expert_0"]
    assert f"error: 'expert_1' has {100 * value['score']:.1f} % at expert_0, and is asked for 99 %" in err
    assert "Traceback" not in err
    code, _, err = run(capsys, "eval", "custom", *words, "--fail-under", "avg=99%", "--fail-under", "avg=70")
    assert code == 1
    assert "is asked for 99 % (avg=0.99)" in err
    assert "is asked for 7000 % (avg=70; 70 % is avg=70%)" in err
    code, out, err = run(capsys, "eval", "custom", *words, "--fail-under", "avg=2", "-q")
    assert (code, len(out.split())) == (1, 2)


def report_of(name: str, **results: Any) -> dict[str, Any]:
    rows = {task: scores.read_score(result, task).to_dict() for task, result in results.items()}
    return {"tasks": list(results), "models": [{"name": name, "role": "model", "scores": rows}],
            "metric": {"function": "f", "sha256": "0"}, "seed": 0}  # fmt: skip


def test_differences_are_paired_where_the_items_are_the_same() -> None:
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(200, generator=generator) < p).int().tolist() for p in (0.6, 0.5))
    x = torch.randn(50, generator=generator)
    y = x + 0.1 + 0.2 * torch.randn(50, generator=generator)
    ours = report_of(
        "m", hits={"items": a}, size={"items": y.tolist()}, plain=0.7, shares={"correct": 70, "count": 100}
    )
    theirs = report_of(
        "m", hits={"items": b}, size={"items": x.tolist()}, plain=0.5, shares={"correct": 50, "count": 100}
    )
    (pair,) = scores.differences(ours, theirs)
    hits, size, plain, shares = (pair["tasks"][task] for task in ("hits", "size", "plain", "shares"))
    gained, lost = (sum(i > j for i, j in zip(*order, strict=True)) for order in ((a, b), (b, a)))
    assert hits["paired"]
    assert hits["p"] == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    assert size["paired"]
    exact = stats.ttest_rel(y.tolist(), x.tolist())
    assert size["difference"] / size["stderr"] == pytest.approx(exact.statistic)
    assert size["p"] == pytest.approx(2 * stats.norm.sf(exact.statistic))
    assert (plain["paired"], plain["stderr"], plain["p"]) == (False, None, None)
    assert not shares["paired"]
    assert shares["stderr"] == pytest.approx(math.sqrt(0.21 / 100 + 0.25 / 100))
    assert shares["p"] == pytest.approx(2 * stats.norm.sf(0.2 / shares["stderr"]))
    assert pair["average"]["p"] is None  # one error is not known


def test_other_items_are_not_paired() -> None:
    def paired(ours: dict[str, Any], theirs: dict[str, Any], **changed: Any) -> bool:
        (pair,) = scores.differences(report_of("m", t=ours), report_of("m", t=theirs) | changed)
        return pair["tasks"]["t"]["paired"]

    items = {"items": [1, 0, 1]}
    assert paired(items, items)
    assert not paired(items, items, seed=1)
    assert not paired(items, items, metric={"function": "f", "sha256": "1"})
    assert not paired(items, {"items": [1, 0]})
    named = items | {"ids": ["a", "b", "c"]}
    assert paired(named, named, seed=1)
    assert not paired(named, items | {"ids": ["a", "b", "d"]})
    assert not paired(named, items)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (10, 4), (600, 590), (780, 720)])
def test_mcnemar(gained: int, lost: int) -> None:
    from scipy import stats

    exact = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert scores.mcnemar(gained, lost) == scores.mcnemar(lost, gained) == pytest.approx(exact, rel=2e-2)


def test_an_earlier_report_is_compared_with(
    models: list[Path], setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--script", setup.script()]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(run(capsys, "eval", "custom", f"merged={models[1]}", *words, "--json")[1])
    code, out, _ = run(capsys, "eval", "custom", f"merged={models[2]}", *words, "--compare", earlier, "--json")
    (pair,) = json.loads(out)["comparison"]["models"]
    before, after = (read(path)[Q].flatten() for path in models[1:3])
    told = pair["tasks"]["expert_0"]
    assert (code, told["paired"]) == (0, True)
    wanted = float((after[:100] > 0).float().mean() - (before[:100] > 0).float().mean())
    assert told["difference"] == pytest.approx(wanted, abs=1e-6)
    # The only model there, whatever its name.
    code, out, _ = run(capsys, "eval", "custom", f"renamed={models[2]}", *words, "--compare", earlier)
    assert code == 0
    assert "renamed - merged" in out
    assert "unpaired" in out
    code, _, err = run(capsys, "eval", "custom", models[2], models[3], *words, "--compare", earlier)
    assert code == 2
    assert "no model is in both" in err


def test_scores_go_into_the_card(
    models: list[Path], setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    modelmerge.merge(models[0], models[1:], merged, method="ties")
    words = [merged, "--script", setup.script(), "--expert", models[1], "--update-card"]
    assert run(capsys, "eval", "custom", *words)[0] == 0
    text = (merged / "README.md").read_text()
    results: Any = ModelCard(text).data.eval_results  # type: ignore[attr-defined]
    w = read(merged)[Q].flatten()
    assert [(result.dataset_name, result.metric_type) for result in results] == [
        ("expert_0", "accuracy"), ("expert_1", "accuracy")
    ]  # fmt: skip
    assert results[0].metric_value == pytest.approx(float((w[:100] > 0).float().mean()))
    assert {result.task_type for result in results} == {"other"}, "its config names no architecture"
    assert "has not been evaluated" not in text
    assert "![Scores of the base, the experts and this model](evaluation.png)" in text
    with Image.open(merged / "evaluation.png") as picture:
        assert picture.format == "PNG"
    assert "100 items, standard error 0.05, " in text
    assert "% of the expert's" in text
    # The merge is still what its manifest says, and the scores are still known.
    assert modelmerge.merge(models[0], models[1:], merged, method="ties", resume=True)["recipe"]["method"] == "ties"
    assert (merged / "README.md").read_text() == text
    setup.calls()
    assert run(capsys, "eval", "custom", *words)[0] == 0
    assert setup.calls() == []
    assert not [file for file in merged.iterdir() if file.name.startswith(".")]
    # A model that has no card gets one.
    assert run(capsys, "eval", "custom", models[1], "--script", setup.script(), "--update-card")[0] == 0
    assert ModelCard((models[1] / "README.md").read_text()).data.eval_results  # type: ignore[attr-defined]


def test_a_card_without_matplotlib_has_no_picture(
    models: list[Path], setup: Setup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (models[1] / "config.json").write_text(json.dumps(config))
    code, _, err = run(capsys, "eval", "custom", models[1], "--script", setup.script("quiet"), "--update-card")
    assert code == 0
    assert "note: without a picture in the card: a chart needs matplotlib" in err
    text = (models[1] / "README.md").read_text()
    assert "evaluation.png" not in text
    results: Any = ModelCard(text).data.eval_results  # type: ignore[attr-defined]
    assert {result.task_type for result in results} == {"text-generation"}


def test_a_file_that_changes_while_it_is_evaluated_is_an_error(models: list[Path]) -> None:
    file = models[1] / "model.safetensors"

    def metric(model: Model) -> float:
        file.write_bytes(file.read_bytes()[:-8])
        return float(model["logit_scale"])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        modelmerge.evaluate([models[1]], metric=metric)


def test_suites_by_name(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "merged", method="ties")
    assert modelmerge.evaluate([tmp_path / "merged"], suite="weights")["suite"] == "weights"
    for which, more in (("weights", {}), ("custom", {"metric": len})):
        with pytest.raises(UsageError, match="no model is named"):
            modelmerge.evaluate([], suite=which, **more)
    with pytest.raises(UsageError, match="there is no suite 'wieghts'"):
        modelmerge.evaluate([tmp_path / "merged"], suite="wieghts")


@pytest.mark.parametrize(
    ("suite", "options", "message", "hint"),
    [
        ("weights", {"cache": False}, "suite 'weights' has no option 'cache'", "it has: per_layer, .*device"),
        ("weights", {"per_layers": True}, "has no option 'per_layers'", "did you mean 'per_layer'"),
        ("custom", {"metric": len, "limit": 3}, "suite 'custom' has no option 'limit'", "it has: metric, "),
        ("clip", {"fail_udner": ["avg=1"]}, "suite 'clip' has no option 'fail_udner'", "did you mean 'fail_under'"),
        ("lm", {"zebra": None}, "suite 'lm' has no option 'zebra'", "it has: tasks"),
        ("custom", {}, "suite 'custom' needs the option 'metric'", ""),
    ],
)  # fmt: skip
def test_options_that_a_suite_lacks(suite: str, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        modelmerge.evaluate(["model"], suite=suite, **options)
    assert re.search(hint, error.value.hint or "")
