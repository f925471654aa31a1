"""search: the best of several values, to the bits of a plain merge, and nothing else left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelmerge
from modelmerge.checkpoint.digest import sha256
from modelmerge.errors import ModelMergeError, OutputError, UsageError
from modelmerge.evaluation import digits
from modelmerge.evaluation.custom import Model
from modelmerge.methods import registry
from modelmerge.methods.options import is_linear, option_types, read_values
from modelmerge.plan.recipe import Recipe
from modelmerge.record.redaction import published
from modelmerge.verbs import measure
from modelmerge.verbs.merge import merge
from modelmerge.verbs.output import beside_bytes
from modelmerge.verbs.prepare import prepare
from modelmerge.verbs.search import search
from tests.support import clip_models
from tests.support import digits as digit_experts
from tests.support.checkpoints import read
from tests.support.commands import run
from tests.support.hub_server import FakeHub
from tests.support.processes import running

TASKS = ("inverted", "rotated")
SCRIPT = """
from modelmerge.evaluation import digits

TASKS = digits.load_tasks()

def first_half(model):
    "Accuracies on half of the test images: the other half is for reporting."
    print("a script may say what it likes")
    state = dict(model)
    return {
        name: {"items": digits.right(state, TASKS[name])[:270].int().tolist(), "metric": "accuracy"}
        for name in ("inverted", "rotated")
    }
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two real experts: [base, inverted, rotated]."""
    root = tmp_path_factory.mktemp("digits")
    (root / "metric.py").write_text(SCRIPT)
    return digit_experts.save(root, TASKS)


@pytest.fixture
def models(experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The real experts, in a test that has a cache and a folder for outputs of its own."""
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return experts


def weights(directory: Path | str) -> dict[str, str]:
    """The sha256 of all weight files of an output."""
    return {file.name: sha256(file) for file in sorted(Path(directory).glob("*.safetensors"))}


def plain(models: list[Path], **told: Any) -> dict[str, str]:
    merge(models[0], models[1:], "plain", force=True, **told)
    return weights("plain")


@pytest.mark.parametrize(
    ("text", "kind", "values"),
    [
        ("0.1:1.0:0.1", float, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("0.1:0.55:0.2", float, (0.1, 0.3, 0.5)),
        ("1:0:-0.5", float, (1.0, 0.5, 0.0)),
        ("0.2,0.5", float, (0.2, 0.5)),
        ("-1,0.1:0.3:0.1, 2e-1", float, (-1.0, 0.1, 0.2, 0.3, 0.2)),
        ("1:3:1,8", int, (1, 2, 3, 8)),
        ("sum,mean", option_types(registry.load("ties").options)["reduce"], ("sum", "mean")),
        ("none,0.5", float | None, (None, 0.5)),
        ("true,false", bool, (True, False)),
    ],
)
def test_values_are_those_that_one_would_type(text: str, kind: Any, values: tuple[Any, ...]) -> None:
    assert read_values("scale", text, kind) == values


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("custom:a/metric.py:f", {"metric": "a/metric.py:f"}),
        ("custom:m.py:f,task=x,task=y,seed=3", {"metric": "m.py:f", "tasks": ("x", "y"), "seed": 3}),
        ("clip:svhn,limit=500", {"tasks": ("svhn",), "limit": 500, "held_out": True}),
        ("clip:eurosat:motion_blur", {"tasks": ("eurosat:motion_blur",), "held_out": True}),
        ("clip:images/mine,template=a {},batch-size=8",
         {"data": ("images/mine",), "templates": ("a {}",), "batch_size": 8, "held_out": True}),
        ("clip:svhn=here,split=validation", {"data": ("svhn=here",), "split": "validation", "held_out": True}),
        ("lm:gsm8k,num-fewshot=5,apply-chat-template,limit=0.5",
         {"tasks": ("gsm8k",), "num_fewshot": 5, "apply_chat_template": True, "limit": 0.5, "held_out": True}),
    ],
)  # fmt: skip
def test_what_to_measure_with_is_said_in_the_words_of_eval(text: str, told: dict[str, Any]) -> None:
    assert measure.parse_on(text) == measure.Measure(text.partition(":")[0], told, (text,))


@pytest.mark.parametrize(
    ("on", "says"),
    [
        ("weights:x", "do not say how well a model does"),
        ("clop:svhn", "did you mean 'clip:...'?"),
        ("metric.py:f", "is not SUITE:WHAT"),
        ("custom:", "is not SUITE:WHAT"),
        ("custom:metric.py", "is not custom:FILE:FUNCTION"),
        ("clip:svhn:test", "the split 'test' is what `eval clip` reports"),
        ("clip:images/mine,split=test", "the split 'test' is what `eval clip` reports"),
        ("clip:svhn,limt=5", "did you mean 'limit'?"),
        ("clip:svhn,limit=few", "is no number"),
        ("clip:svhn,limit=5,limit=6", "'limit' comes twice"),
        ("lm:gsm8k,apply-chat-template=yes", "'apply-chat-template=yes' is no setting of lm"),
    ],
)
def test_what_cannot_be_measured_with_is_refused(on: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        measure.parse_on(on)
    assert says in f"{refused.value.message} {refused.value.hint}"


def test_tasks_with_the_same_settings_are_measured_together() -> None:
    on = ["clip:svhn,limit=5", "clip:mine/x,limit=5", "clip:gtsrb,limit=6", "custom:m.py:f", "custom:m.py:g"]
    assert [measure.texts for measure in measure.read_measures(on, None)] == [
        ("clip:svhn,limit=5", "clip:mine/x,limit=5"), ("clip:gtsrb,limit=6",), ("custom:m.py:f",), ("custom:m.py:g",),
    ]  # fmt: skip


def test_the_best_value_is_found_written_and_replayed(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it with real experts: scores are those of a direct computation, bits those of a plain merge."""
    script = models[0].parent / "metric.py"
    on = ("--try", "scale=0.4:1.6:0.3", "--on", f"custom:{script}:first_half")
    code, out, err = run(capsys, "search", "ties", *models, "-o", "out", *on, "--json")
    assert code == 0, err
    manifest = json.loads(out)["manifest"]
    found = manifest["searched"]
    assert [each["options"] for each in found["results"]] == [{"scale": s} for s in (0.4, 0.7, 1.0, 1.3, 1.6)]
    tasks, direct = digits.load_tasks(), {}
    for scale in (0.4, 0.7, 1.0, 1.3, 1.6):
        written = plain(models, method="ties", scale=scale)
        scores = {name: digits.right(read(Path("plain")), tasks[name])[:270] for name in TASKS}
        direct[scale] = {name: float(right.float().mean()) for name, right in scores.items()}, written
    for each in found["results"]:
        scores, _ = direct[each["options"]["scale"]]
        assert {name: told["score"] for name, told in each["scores"].items()} == pytest.approx(scores)
        assert each["average"] == pytest.approx(sum(scores.values()) / 2)
    best = max(direct, key=lambda scale: sum(direct[scale][0].values()))
    assert 0.4 < best < 1.6, "a search that ends at an end tells little"
    assert found["chosen"] == {"scale": best} == {"scale": manifest["recipe"]["options"]["scale"]}
    assert found["merges"] == 1
    base = {name: float(digits.right(read(models[0]), tasks[name])[:270].float().mean()) for name in TASKS}
    assert {name: told["score"] for name, told in found["base"]["scores"].items()} == pytest.approx(base)
    assert weights("out") == direct[best][1]
    assert {name: each["sha256"] for name, each in manifest["files"].items()} == {
        str(file.relative_to("out")): sha256(file) for file in Path("out").rglob("*") if file.name != "modelmerge.json"
    }
    assert json.loads(Path("out/modelmerge.json").read_bytes()) == manifest
    assert f"scale={best:g} was chosen from 5 candidates" in Path("out/README.md").read_text()
    assert str(script) not in Path("out/README.md").read_text(), "a card is for others"
    assert str(script.parent) not in json.dumps(published(manifest)["searched"])
    assert "report on other items" in found["on"][0]["notes"][-1]
    assert sorted(path.name for path in Path().iterdir()) == ["out", "plain"]
    # Replayed without a search, as by the command in the card.
    code, _, err = run(capsys, "merge", "--recipe", "out/modelmerge.json", "-o", "again", "-q")
    assert code == 0, err
    assert weights("again") == weights("out")
    assert "searched" not in json.loads(Path("again/modelmerge.json").read_bytes())
    # What was measured once is not measured again.
    code, out, err = run(capsys, "search", "ties", *models, "-o", "out", *on, "--force")
    assert code == 0
    assert "a script may say" not in out + err
    assert f"best scale={best:g} of 5 candidates" in out


LINEAR = [name for name in registry.names() if any(is_linear(registry.load(name), o) for o in ("scale",))]


def likes_0_3(model: Model) -> float:
    return float(model.name == "scale-0.3")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in LINEAR), ("ties", "bfloat16"), ("kron", "bfloat16")]
)
def test_one_pass_gives_all_values_to_the_bits_of_plain_merges(
    name: str, dtype: str | None, models: list[Path]
) -> None:
    told: dict[str, Any] = {"method": name, "dtype": dtype, "include": ["encoder.layers.1.*"]}
    manifest = search(models[0], models[1:], "out", tries={"scale": [0.9, 0.3, 1.7]}, metric=likes_0_3, **told)
    assert manifest["searched"]["merges"] == 1
    assert manifest["searched"]["chosen"] == {"scale": 0.3}
    assert weights("out") == plain(models, scale=0.3, **told)
    written = json.loads(Path("plain/modelmerge.json").read_bytes())
    same = ("recipe", "tensors", "rounding", "command", "fingerprint")
    assert {key: manifest[key] for key in same if key != "command"} == {
        key: written[key] for key in same if key != "command"
    }


@pytest.mark.parametrize(
    ("told", "axes", "chosen", "merges"),
    [
        ({"method": "ties"}, {"scale": "0.5,1.5", "reduce": ["sum", "mean"], "density": (0.1, 0.3)}, 6, 4),
        ({"method": "ties", "trim_scope": "tensor"}, {"density": "0.1:0.3:0.1"}, 2, 3),
        ({"method": "kron", "disentangle": "awd steps=20"}, {"scale": [0.5, 1.5], "awd.alpha": [0.1, 2.0]}, 3, 2),
        (
            {"method": "task-arithmetic", "at": ["*fc1.bias: scale=0.2 rotated.weight=2", "*: rotated.weight=2"]},
            {"scale": [1, 0.5]},
            1,
            1,
        ),
        ({"method": "tsv-m", "at": ["*: weight=0.5,1.2"]}, {"scale": [1, 0.5]}, 1, 1),
        ({"method": "ties", "at": ["*.layers.*: scale=0.5"]}, {"scale": [1, 0.5]}, 1, 1),
        ({"method": "tsv-m", "at": ["*fc1*: ties scale=0.7"], "rest": "average"}, {"scale": [1, 0.5]}, 1, 1),
        ({"method": "task-arithmetic", "as_lora": 8, "include": ["*.fc?.weight"]}, {"scale": [1, 0.5]}, 1, 2),
        ({"method": "ties", "max_shard_size": "300KB", "dtype": "bfloat16"}, {"scale": [1, 0.5]}, 1, 1),
        ({"method": "slerp"}, {"t": "0.2,0.8", "points": "weights,task-vectors"}, 3, 4),
    ],
)
def test_a_search_goes_with_all_else(
    told: dict[str, Any], axes: dict[str, Any], chosen: int, merges: int, models: list[Path]
) -> None:
    calls: list[str] = []

    def nth(model: Model) -> float:
        calls.append(model.name)
        return float(calls.index(model.name) == chosen + 1)  # after the base

    manifest = search(models[0], models[1:], "out", tries=axes, metric=nth, **told)
    values = dict(manifest["searched"]["chosen"])
    assert manifest["searched"]["merges"] == merges
    assert (
        values
        == manifest["searched"]["results"][[each["average"] for each in manifest["searched"]["results"]].index(1)][
            "options"
        ]
    )
    if "awd.alpha" in values:
        told = told | {"disentangle": f"awd steps=20 alpha={values.pop('awd.alpha')}"}
    assert weights("out") == plain(models, **told, **values)
    files = [file.name for file in Path("plain").iterdir()]
    assert sorted(files) == sorted(file.name for file in Path("out").iterdir())


def test_of_equal_ones_the_first_is_taken(models: list[Path]) -> None:
    told: dict[str, Any] = {"method": "task-arithmetic", "metric": lambda model: 0.5}
    manifest = search(models[0], models[1:], "out", tries={"scale": [0.6, 0.2, 0.4]}, **told)
    assert manifest["searched"]["chosen"] == {"scale": 0.6}
    assert manifest["searched"]["equal"] == [{"scale": 0.2}, {"scale": 0.4}]
    assert "was chosen from 3" in manifest["notes"][-1], "of equal ones none lies nearer to a better one"
    told |= {"method": "ties", "tries": {"density": [1.0, 0.5], "reduce": ["sum", "mean"]}}
    manifest = search(models[0], models[1:], "at-a-bound", **told)
    assert "was chosen from 4" in manifest["notes"][-1]


def test_auto_is_searched_as_the_method_that_it_takes(models: list[Path]) -> None:
    manifest = search(
        models[0], models[1:], "out", method="auto", tries={"scale": [0.5, 1.0]}, metric=lambda model: 1.0
    )
    assert manifest["recipe"]["method"] == "kron"
    assert weights("out") == plain(models, method="kron", scale=0.5)


def test_a_small_disk_holds_two_candidates_at_a_time(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method="task-arithmetic", base=str(models[0]), experts=tuple(map(str, models[1:])))
    with contextlib.closing(prepare(recipe)) as prepared:
        size = prepared.job.plan.bytes_written + beside_bytes(prepared.job.plan, 1)
    usage, free, most = shutil.disk_usage, [2.5 * size], [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(place)._replace(free=int(free[0])))

    def worse_and_worse(model: Model) -> float:
        most[0] = max(most[0], len([path for path in Path().rglob("scale-*") if path.is_dir()]))
        return -float(model.name.removeprefix("scale-")) if model.name != "base" else 0.0

    told: dict[str, Any] = {"method": "task-arithmetic", "tries": {"scale": "0.5:0.1:-0.1"}, "metric": worse_and_worse}
    manifest = search(models[0], models[1:], "out", **told)
    assert manifest["searched"]["chosen"] == {"scale": 0.1}
    assert manifest["notes"][-1] == "scale=0.1 is the smallest that was tried: a better one may lie beyond."
    assert most == [2]
    assert weights("out") == plain(models, method="task-arithmetic", scale=0.1)
    free[0] = 1.5 * size
    with pytest.raises(OutputError, match="the search needs 2 candidates of"):
        search(models[0], models[1:], "other", **told)
    assert sorted(path.name for path in Path().iterdir()) == ["out", "plain"]


def test_an_error_while_measuring_leaves_nothing(models: list[Path]) -> None:
    def fails(model: Model) -> float:
        if model.name == "scale-0.2":
            raise ValueError("out of luck")
        return 1.0

    told: dict[str, Any] = {"method": "task-arithmetic", "tries": {"scale": [0.1, 0.2]}, "metric": fails}
    with pytest.raises(ModelMergeError, match=r"failed on 'scale-0.2': ValueError: out of luck"):
        search(models[0], models[1:], "out", **told)
    assert list(Path().iterdir()) == []
    plain(models, method="average")
    with pytest.raises(OutputError, match="not empty"):
        search(models[0], models[1:], "plain", **told)


def test_what_cannot_be_measured_is_known_before_the_work(models: list[Path]) -> None:
    calls = []

    def fails(model: Model) -> float:
        calls.append(model.name)
        raise KeyError("encoder.weight")

    with pytest.raises(ModelMergeError, match="failed on 'base'"):
        search(models[0], models[1:], "out", method="ties", tries={"scale": [1.0, 2.0]}, metric=fails)
    assert calls == ["base"]
    assert list(Path().iterdir()) == []


def test_an_interrupt_leaves_nothing(models: list[Path]) -> None:
    """A real process, stopped by Ctrl-C while a candidate is measured."""
    Path("slow.py").write_text(
        "import os, pathlib, signal\n"
        "def f(model):\n"
        "    if model.name != 'base':\n"
        "        pathlib.Path('reached').touch()\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return 1.0\n"
    )
    words = [
        "search",
        "task-arithmetic",
        *map(str, models),
        "-o",
        "out",
        "--try",
        "scale=0.1,0.2",
        "--on",
        "custom:slow.py:f",
    ]
    with running(words) as run:
        run.until_stopped()
        assert any(path.name == "scale-0.1" for path in Path().rglob("*")), "the candidates are beside the output"
        run.send(signal.SIGINT)
        assert run.end() == 130, run.err()
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == {"slow.py", "reached"}


def test_the_plan_tells_what_a_search_needs(models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    size = (models[0] / "model.safetensors").stat().st_size
    words = [
        "ties",
        *models,
        "-o",
        "out",
        "--try",
        "scale=0.1:1.0:0.1",
        "--try",
        "reduce=sum,mean",
        "--on",
        "custom:none.py:f",
    ]
    code, _, err = run(capsys, "search", *words, "-n")
    assert (code, "--on custom:none.py:f: no such file: none.py" in " ".join(err.split())) == (1, True)
    Path("none.py").write_text("raise SystemExit('a plan runs no code')")
    code, out, err = run(capsys, "search", *words, "-n", "--json")
    assert code == 0, err
    plan = json.loads(out)["plan"]
    found = plan["search"]
    assert (found["on"], found["candidates"], found["merges"]) == (["custom:none.py:f"], 20, 2)
    assert found["disk"] == {"all": pytest.approx(20 * size, rel=0.01), "least": pytest.approx(2 * size, rel=0.01)}
    assert plan["bytes"]["write"] == found["disk"]["all"]
    assert plan["bytes"]["read"] == pytest.approx(2 * 3 * 3 * size, rel=0.01), "two merges of three passes each"
    code, out, _ = run(capsys, "search", *words, "-n")
    assert "20 candidates in 2 merges, each measured on custom:none.py:f; on the disk 18.7 MB at once" in out
    assert [path.name for path in Path().iterdir()] == ["none.py"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--try", "scale=0.1,0.2"), "Missing option '--on'"),
        (("--on", "custom:m.py:f"), "Missing option '--try'"),
        (("--try", "scale=0.1", "--scale", "1", "--on", "custom:m.py:f"), "--scale is given, and tried"),
        (("--try", "sclae=0.1", "--on", "custom:m.py:f"), "did you mean 'scale'?"),
        (("--try", "awd.alpha=0.1", "--on", "custom:m.py:f"), "'ties' has no option 'awd.alpha'"),
        (("--try", "scale", "--on", "custom:m.py:f"), "--try 'scale' is not OPTION=VALUES"),
        (("--try", "scale=1", "--try", "scale=2", "--on", "custom:m.py:f"), "--try names 'scale' twice"),
        (("--try", "scale=0.1:1", "--on", "custom:m.py:f"), "'0.1:1' is no number and no range"),
        (("--try", "scale=0.1:1:0", "--on", "custom:m.py:f"), "'0.1:1:0' leads nowhere"),
        (("--try", "scale=0:1:1e-9", "--on", "custom:m.py:f"), "has more than 10,000 values"),
        (("--try", "scale=nan", "--on", "custom:m.py:f"), "scale must be"),
        (("--try", "scale=0.2,0.2", "--on", "custom:m.py:f"), "--try 'scale=0.2,0.2': 0.2 comes twice"),
        (("--try", "density=0.2,2", "--on", "custom:m.py:f"), "density must be above 0 and at most 1, not 2"),
        (("--try", "reduce=sum,max", "--on", "custom:m.py:f"), "reduce must be one of sum, mean, not 'max'"),
        (("--try", "scale=1,2", "--at", "*: scale=3", "--on", "custom:m.py:f"), "--try 'scale' has no effect: --at"),
        (("--try", "scale=1,2", "--on", "custom:m.py:f"), "custom:m.py:f: no such file: m.py"),
        (("--try", "scale=1,2", "--on", "custom:m.py:f", "--on", "custom:m.py:f"), "--on names the same thing twice"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    words: tuple[str, ...], says: str, models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "search", "ties", *models, "-o", "out", *words)
    assert code == (2 if "no such file" not in says else 1), err
    assert says in " ".join(err.split())
    assert list(Path().iterdir()) == []


def test_a_method_that_looks_at_data_itself_is_not_searched(
    models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--script", "m.py:f", "--try", "lr=0.1,0.2", "--on", "custom:m.py:f")
    code, _, err = run(capsys, "search", "adamerging", *models, "-o", "out", *words)
    assert code == 2
    assert "'adamerging' finds its coefficients on unlabelled data, and is not searched besides" in " ".join(
        err.split()
    )


def test_a_base_that_is_streamed_is_not_measured(
    models: list[Path], hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is on the Hub is read over ranges, for each pass, and stored nowhere."""
    for model in models:
        hub.add(f"org/{model.name}", model)
    Path("one.py").write_text("def f(model):\n    return 1.0\n")
    remote = [f"org/{model.name}" for model in models]
    words = ("--stream", "--try", "scale=0.5,1.0", "--on", "custom:one.py:f", "--json")
    code, out, err = run(capsys, "search", "ties", *remote, "-o", "out", *words)
    assert code == 0, err
    found = json.loads(out)["manifest"]["searched"]
    assert found["base"] is None
    assert len(found["results"]) == 2
    assert weights("out") == plain(models, method="ties", scale=0.5)


def test_in_python_an_option_is_given_or_searched(models: list[Path]) -> None:
    told: dict[str, Any] = {"method": "ties", "tries": {"scale": [1.0]}, "metric": lambda model: 1.0}
    with pytest.raises(UsageError, match="'scale' is given, and tried"):
        search(models[0], models[1:], "out", scale=1.0, **told)
    with pytest.raises(UsageError, match="a search needs values: tries"):
        search(models[0], models[1:], "out", method="ties", tries={}, on=["custom:m.py:f"])
    with pytest.raises(UsageError) as refused:
        search(models[0], models[1:], "out", exlude=["*"], **told)
    assert refused.value.hint == "did you mean 'exclude'?"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], Path]:
    """A small CLIP, two models that strayed from it, and images in a training, a validation and a test split."""
    pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("clip")
    model = clip_models.trained()
    base, generator = clip_models.save(model, root / "base"), torch.Generator().manual_seed(3)
    strayed = []
    for i in range(2):
        other = clip_models.untrained()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for tensor in other.vision_model.parameters():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
        strayed.append(clip_models.save(other, root / f"strayed_{i}"))
    for seed, (split, each) in enumerate({"train": 3, "validation": 5, "test": 4}.items()):
        clip_models.folder(root / "images" / split, each=each, seed=10 + seed)
    return base, strayed, root / "images"


def test_clip_is_searched_on_its_validation_split(
    clip: tuple[Path, list[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, strayed, images = clip
    words = ["task-arithmetic", base, *strayed, "-o", tmp_path / "out", "--try", "scale=0.0,0.5,1.0"]
    code, out, err = run(capsys, "search", *words, "--on", f"clip:{images}", "--json")
    assert code == 0, err
    found = json.loads(out)["manifest"]["searched"]
    looked_at = found["on"][0]["data"]["images"]
    assert (looked_at["split"], looked_at["images"]) == ("validation", 6 * 5)
    assert "its split 'validation' is looked at" in found["on"][0]["notes"][0]
    averages = [each["average"] for each in found["results"]]
    assert found["chosen"] == {"scale": 0.0}
    assert averages[0] == found["base"]["average"] > 0.9 > averages[2]
    report = modelmerge.evaluate(
        [tmp_path / "out"], suite="clip", data=[images], split="validation", base=base, cache=False
    )
    assert report["models"][-1]["average"] == averages[0]
    # By default eval looks at other items.
    assert modelmerge.evaluate([base], suite="clip", data=[images])["data"]["images"]["images"] == 6 * 4
    shutil.copytree(images, tmp_path / "without", ignore=shutil.ignore_patterns("validation"))
    code, out, err = run(capsys, "search", *words, "--force", "--on", f"clip:{tmp_path / 'without'},limit=10", "--json")
    told = json.loads(out)["manifest"]["searched"]["on"][0]
    assert told["data"]["without"]["split"] == "train"
    assert "on which experts may have been trained" in told["notes"][0]
    code, out, err = run(capsys, "search", *words, "--force", "--on", f"clip:{images / 'train'},limit=9", "--json")
    told = json.loads(out)["manifest"]["searched"]["on"][0]
    assert (told["data"]["train"]["split"], told["data"]["train"]["images"]) == (None, 6 * 3)
    assert "all of it is looked at, as `eval` does; report on other items" in told["notes"][0]
    shutil.rmtree(tmp_path / "without" / "train")
    code, _, err = run(capsys, "search", *words, "--force", "--on", f"clip:{tmp_path / 'without'}")
    assert code == 1
    assert "has no split to make choices on: it has test" in err


def colours(root: Path, splits: dict[str, int], **told: Any) -> Path:
    """A task of the harness, with so many items in each split."""
    import yaml

    from tests.support import language

    draw, folder = random.Random(1), root / "tasks"
    folder.mkdir(exist_ok=True)
    files = {split: str(folder / f"{split}.jsonl") for split in splits}
    pool = {doc["text"]: doc for doc in language.colours(600, draw)}  # each once
    texts = iter(pool.values())
    for split, count in splits.items():
        docs = [next(texts) for _ in range(count)]
        Path(files[split]).write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    config = {
        "task": "first_colour", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice", "doc_to_text": "{{text}} first", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **told,
    }  # fmt: skip
    told = {key: value for key, value in config.items() if value is not None}
    (folder / "first_colour.yaml").write_text(yaml.safe_dump(told))
    return folder


@pytest.mark.parametrize(
    ("told", "split", "count"),
    [
        ({"test_split": "test", "validation_split": "validation"}, "validation", 20),
        ({"test_split": "test", "training_split": "train"}, "train", 30),
        ({"validation_split": "validation", "training_split": "train"}, "train", 30),
        ({"validation_split": "validation"}, "train", 30),
    ],
)
def test_language_tasks_turn_to_items_that_are_not_reported(
    told: dict[str, Any], split: str, count: int, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from modelmerge.evaluation import lm
    from modelmerge.progress import SILENT

    tasks = colours(tmp_path, {"train": 30, "validation": 20, "test": 10}, num_fewshot=2, **told)
    settings = lm.Settings(include_path=tasks, metrics={}, held_out=True)
    (held,) = lm.load_tasks([], settings, SILENT)
    (usual,) = lm.load_tasks([], dataclasses.replace(settings, held_out=False), SILENT)
    part = held.parts[0]
    assert len(part.eval_docs) == count
    assert [part.get_config("test_split"), held.digest == usual.digest] == [split, False]
    # An item is no example in its own prompt.
    part.set_fewshot_seed(seed=0)
    for doc in part.eval_docs:
        assert doc["text"] not in part.fewshot_context(doc, 2).rpartition(f"{doc['text']} first")[0]


def test_a_language_task_without_other_items_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from modelmerge.evaluation import lm
    from modelmerge.progress import SILENT

    tasks = colours(tmp_path, {"validation": 20}, validation_split="validation")
    with pytest.raises(ModelMergeError, match="no items but those it is reported on, its split 'validation'"):
        lm.load_tasks([], lm.Settings(include_path=tasks, metrics={}, held_out=True), SILENT)


def test_language_models_are_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where less is better the least is taken; a task where more is better does not go with it."""
    pytest.importorskip("lm_eval")
    from tests.support import language

    llama = language._llama(tmp_path / "llama", language.colours(200, random.Random(0)))
    generator, state = torch.Generator().manual_seed(0), read(llama)
    shutil.copytree(llama, tmp_path / "expert")
    save_file(
        {name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()},
        tmp_path / "expert" / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    tasks = colours(
        tmp_path, {"train": 12, "validation": 8}, output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}} first {{first}}", doc_to_choice=None, validation_split="validation",
        training_split="train", metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    words = ["task-arithmetic", llama, tmp_path / "expert", "-o", tmp_path / "out", "--try", "scale=1.0,0.1,0.5"]
    on = f"lm:first_colour,include-path={tasks},limit=6"
    code, out, err = run(capsys, "search", *words, "--on", on, "--json")
    assert code == 0, err
    found = json.loads(out)["manifest"]["searched"]
    averages = {each["options"]["scale"]: each["average"] for each in found["results"]}
    assert found["less_is_better"] is True
    assert found["chosen"] == {"scale": min(averages, key=lambda scale: averages[scale])} == {"scale": 0.1}
    assert found["on"][0]["harness"]["first_colour"]["tasks"]["first_colour"]["split"] == "train"
    (tmp_path / "one.py").write_text("def f(model):\n    return 1.0\n")
    code, _, err = run(capsys, "search", *words, "--force", "--on", on, "--on", f"custom:{tmp_path / 'one.py'}:f")
    assert code == 2
    assert "less is better, and at 'f' more is" in " ".join(err.split())
