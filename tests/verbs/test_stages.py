"""Merges that are made of other merges: mergekit's documents in one YAML, and the manifests that record them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modelmerge
from modelmerge.checkpoint.output import CARD
from modelmerge.cli import main
from modelmerge.engine.parallel import threads
from modelmerge.errors import OutputError, PlanError, RecipeError, UsageError
from modelmerge.plan import mergekit
from modelmerge.record import card, redaction
from modelmerge.verbs import stages
from tests.support.checkpoints import expert_state, family, read, write
from tests.support.processes import running

TWO = """
name: first
merge_method: task_arithmetic
base_model: models/base
models:
  - {model: models/expert_0, parameters: {weight: 0.5}}
  - {model: models/expert_1, parameters: {weight: 0.25}}
---
name: second
merge_method: ties
base_model: models/base
models:
  - {model: first, parameters: {weight: 1, density: 0.6}}
  - {model: models/expert_2, parameters: {weight: 1, density: 0.4}}
---
merge_method: linear
models:
  - {model: second, parameters: {weight: 0.3}}
  - {model: first, parameters: {weight: 0.7}}
"""
HIDDEN = ".out.modelmerge-stages"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with four models and `multi.yml`."""
    monkeypatch.chdir(tmp_path)
    family(tmp_path / "models")
    Path("multi.yml").write_text(TWO)
    return tmp_path


def one_by_one(text: str = TWO) -> Path:
    """The documents, each merged by a command of its own; where the last is."""
    for name, document in zip(("first", "second", "last"), text.split("---\n"), strict=True):
        lines = [line for line in document.splitlines() if not line.startswith("name:")]
        body = "\n".join(lines).replace("model: first", "model: ./first").replace("model: second", "model: ./second")
        Path("one.yml").write_text(body)
        modelmerge.replay("one.yml", name)
    return Path("last")


def test_documents_are_merged_in_the_order_that_they_need(here: Path) -> None:
    """Whatever their order in the file; and as if each had been a command of its own."""
    want = one_by_one()
    manifest = modelmerge.replay("multi.yml", "out")
    assert list(manifest["stages"]) == list(manifest["recipe"]["stages"]) == ["first", "second"]
    first, second, last = TWO.split("---\n")
    Path("multi.yml").write_text("---\n".join((last, second, first)))
    modelmerge.replay("multi.yml", "turned")
    assert (want / "model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert Path("out/model.safetensors").read_bytes() == Path("turned/model.safetensors").read_bytes()
    assert not Path(HIDDEN).exists()


def test_without_an_unnamed_document_the_last_is_the_output(here: Path) -> None:
    Path("multi.yml").write_text(TWO.replace("merge_method: linear", "name: third\nmerge_method: linear"))
    modelmerge.replay("multi.yml", "out")
    Path("multi.yml").write_text(TWO)
    modelmerge.replay("multi.yml", "again")
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_a_document_that_nothing_needs_is_left_out_and_said(here: Path) -> None:
    Path("multi.yml").write_text(TWO.replace("model: second", "model: models/expert_2"))
    manifest = modelmerge.replay("multi.yml", "out")
    assert list(manifest["stages"]) == ["first"]
    assert any("'second' is not needed for the output" in note for note in manifest["notes"])


def test_a_plan_of_stages_is_made_without_running_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--recipe", "multi.yml", "-o", "out", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [stage["name"] for stage in plan["stages"]] == ["first", "second"]
    assert plan["bytes"]["scratch"] == sum(stage["bytes"]["write"] for stage in plan["stages"])
    assert [expert["reference"] for expert in plan["stages"][1]["experts"]] == ["stage:first", "models/expert_2"]
    assert sorted(path.name for path in here.iterdir()) == ["models", "multi.yml"]
    assert main(["merge", "--recipe", "multi.yml", "-o", "out", "--dry-run"]) == 0
    assert "first second\nties of 2 experts onto base" in capsys.readouterr().out
    modelmerge.replay("multi.yml", "out")
    written = [tensor["name"] for tensor in plan["tensors"] if tensor["action"] == "merge"]
    assert sorted(written) == sorted(
        name for group in _manifest("out")["tensors"]["groups"] for name in group["tensors"]
    )


CHAIN = """
name: it's "é"
merge_method: linear
models: [{model: models/expert_0, parameters: {weight: 1}}, {model: models/expert_1, parameters: {weight: 1}}]
---
name: it's
merge_method: slerp
base_model: models/expert_2
models: [{model: 'it''s "é"'}]
parameters: {t: 0.3}
---
name: third
merge_method: linear
models: [{model: "it's", parameters: {weight: 1}}, {model: models/expert_1, parameters: {weight: 2}}]
---
merge_method: slerp
base_model: models/expert_0
models: [{model: third}]
parameters: {t: 0.6}
"""


def test_a_stage_goes_when_nothing_is_made_of_it_any_more(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("multi.yml").write_text(CHAIN)
    kept = modelmerge.replay("multi.yml", "whole", resume=True)  # which keeps all of them to the end
    run, there = modelmerge.verbs.merge.run, []

    def looked(*args: Any) -> Any:
        there.append(sorted(path.name for path in Path(HIDDEN).iterdir() if not path.name.startswith(".")))
        return run(*args)

    monkeypatch.setattr(modelmerge.verbs.merge, "run", looked)
    modelmerge.replay("multi.yml", "out")
    assert there == [[], ['it\'s "é"'], ["it's"], ["third"]]
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert _manifest("out")["stages"].keys() == kept["stages"].keys()
    assert main(["merge", "--recipe", "multi.yml", "-o", "again", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["bytes"]["scratch"] == sum(stage["bytes"]["write"] for stage in plan["stages"][1:])


def _manifest(folder: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(Path(folder, "modelmerge.json").read_text())
    return manifest


def test_an_outline_tells_ties_as_the_merge_will(here: Path) -> None:
    """Of a stage that has a table twice the second is planned as the twin of the first; of others none is."""
    from modelmerge.verbs.recipes import prepare_file

    base = read(here / "models/base")
    for i, name in enumerate(("base", "expert_0", "expert_1", "expert_2")):
        state = base if name == "base" else expert_state(base, i)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        write(here / "models" / name, state)
    for tied in (True, False):
        prepared = prepare_file(here / "multi.yml")
        twins = [tensor.twin for tensor in prepared.job.plan.tensors.values() if tensor.twin]
        prepared.close()
        assert len(twins) == tied
        state = read(here / "models/expert_1")
        write(here / "models/expert_1", {**state, "lm_head.weight": 2 * state["lm_head.weight"]})


def test_a_manifest_with_stages_is_verified_and_replayed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modelmerge.replay("multi.yml", "out")
    files = {file["name"]: file["same"] for file in modelmerge.verify("out")["files"]}
    assert set(files.values()) == {True}
    models = ("base", "expert_0", "expert_1", "expert_2")
    assert {str(here / f"models/{name}/model.safetensors") for name in models} <= set(files)
    shutil.copytree("out", "moved")
    assert main(["merge", "--recipe", "moved/modelmerge.json", "-o", "again"]) == 0
    assert "eval weights" not in capsys.readouterr().out  # whose base and experts are gone
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    manifest = _manifest("again")
    assert manifest["recipe"] == _manifest("out")["recipe"]
    write(here / "models/expert_1", expert_state(read(here / "models/base"), 9))  # an input of a stage alone
    with pytest.raises(RecipeError, match="not the file that the recipe was made with"):
        modelmerge.replay("out", "third")
    assert sorted(path.name for path in here.iterdir()) == ["again", "models", "moved", "multi.yml", "out"]


def test_options_change_the_last_merge_alone(here: Path) -> None:
    options = ["--dtype", "float16", "--weight", "first=0.1"]
    assert main(["merge", "--recipe", "multi.yml", "-o", "out", *options]) == 0
    assert {tensor.dtype for tensor in read(Path("out")).values() if tensor.is_floating_point()} == {torch.float16}
    recipe = _manifest("out")["recipe"]
    assert recipe["weights"] == {"second": 0.3, "first": 0.1}
    assert [stage["dtype"] for stage in recipe["stages"].values()] == [None, None]
    assert main(["merge", "--recipe", "out", "-o", "wide", "--dtype", "float32", "--allow-different-bits"]) == 0
    assert _manifest("wide")["recipe"]["stages"] == recipe["stages"]


def test_the_command_of_a_merge_with_stages_repeats_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelmerge.record.command import steps_of

    manifest = modelmerge.replay("multi.yml", "out")
    steps = steps_of(manifest["command"])
    assert [step[-1] for step in steps] == ["first", "second", "out"]
    for step in steps:
        assert main([*step[1:-1], f"by-hand/{step[-1]}" if step[-1] == "out" else step[-1]]) == 0
    assert Path("out/model.safetensors").read_bytes() == Path("by-hand/out/model.safetensors").read_bytes()


def test_the_card_shows_the_stages_and_what_is_published_no_paths(here: Path) -> None:
    text = TWO.replace("models/expert_1", str(here / "models/expert_1"))
    Path("multi.yml").write_text(text)
    (here / "models/base/README.md").write_text("---\nlicense: mit\n---\n")
    manifest = modelmerge.replay("multi.yml", "out")
    page = Path("out", CARD).read_text()
    assert (
        f"| `stage:first` | `task-arithmetic` | `models/base` | `models/expert_0`, `{here}/models/expert_1` |" in page
    )
    assert "modelmerge merge ties models/base first=./first" in page
    public = redaction.published(manifest)
    assert str(here) not in json.dumps(public)
    assert str(here) not in card.published(page, manifest, public, ())


def test_an_interrupted_run_goes_on_behind_its_finished_stages(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = modelmerge.replay("multi.yml", "whole")
    run = modelmerge.verbs.merge.run

    def stopped(job: Any, *rest: Any) -> Any:
        if job.groups[0].name == "average":
            raise KeyboardInterrupt
        return run(job, *rest)

    monkeypatch.setattr(modelmerge.verbs.merge, "run", stopped)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            modelmerge.replay("multi.yml", "out", resume=resume)
        assert Path(HIDDEN).exists() == resume
        assert not Path("out").exists()
    merged: list[str] = []
    monkeypatch.setattr(
        modelmerge.verbs.merge, "run", lambda job, *rest: merged.append(job.groups[0].name) or run(job, *rest)
    )
    modelmerge.replay("multi.yml", "out", resume=True)
    assert merged == ["average"]
    assert not Path(HIDDEN).exists()
    assert Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert _manifest("out")["stages"].keys() == whole["stages"].keys()
    modelmerge.replay("multi.yml", "out", resume=True)  # complete already
    assert merged == ["average"]
    # Another weight in the first stage is another run: nothing of the old one is taken up.
    Path("multi.yml").write_text(TWO.replace("weight: 0.25", "weight: 0.26"))
    modelmerge.replay("multi.yml", "out", resume=True, force=True)
    assert merged == ["average", "task-arithmetic", "ties", "average"]


def shared(*more: str) -> list[str]:
    return ["merge", "--recipe", "multi.yml", "-o", "out", "--max-shard-size", "4KB", "--cluster", "files", *more]


@pytest.mark.parametrize(
    ("stop", "call"),
    [
        pytest.param("modelmerge.checkpoint.shard_file:ShardFile.write", 3, id="in the first"),
        pytest.param("modelmerge.checkpoint.publication:Publication._swap", 2, id="publishing the second"),
        pytest.param("modelmerge.verbs.stages:_clear", 1, id="when all is done"),
    ],
)
def test_processes_share_the_stages_out_in_turn(
    stop: str, call: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed, and the only one that was at it; others take its work over, and a late one finds all done."""
    monkeypatch.setenv("MODELMERGE_LEASE", "1.5")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threads(1):
        whole = modelmerge.replay("multi.yml", "whole")
    with running(shared(), stop=stop, call=call) as first:
        first.until_stopped()
        first.send(signal.SIGKILL)
        first.end()
    with running(shared(), beside=1) as second, running(shared(), beside=2) as third:
        assert [second.end(), third.end()] == [0, 0], (second.err(), third.err())
    assert read(Path("out")).keys() == read(Path("whole")).keys()
    assert all(torch.equal(tensor, read(Path("out"))[name]) for name, tensor in read(Path("whole")).items())
    manifest = _manifest("out")
    assert manifest["stages"].keys() == whole["stages"].keys()
    assert manifest["workers"]
    with running(shared()) as late:
        assert late.end() == 0, late.err()
    assert sorted(path.name for path in Path().iterdir()) == ["models", "multi.yml", "out", "whole"]


def test_stages_are_not_shared_out_among_devices(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--device", "cpu,cpu"], ["--cluster", "ray"], ["--part", "1/2"]):
        assert main([*shared()[:7], *more]) == 2
        assert "cannot share out merges of merges: 'first' is merged first, and gone then" in " ".join(
            capsys.readouterr().err.split()
        )


def test_what_is_wrong_with_a_later_document_shows_before_the_first_is_merged(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelmerge.verbs.merge, "run", lambda *_: pytest.fail("nothing is to be merged"))
    odd = read(here / "models/expert_2")
    odd["model.layers.0.norm.weight"] = torch.zeros(7)
    write(here / "models/expert_2", odd)
    with pytest.raises(PlanError, match=r"in 'second': the models disagree"):
        modelmerge.replay("multi.yml", "out")
    Path("multi.yml").write_text(TWO.replace("models/expert_2", "models/expert_0"))
    (here / "out").mkdir()
    (here / "out/mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="is not empty"):
        modelmerge.replay("multi.yml", "out")
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OutputError, match="the output and the merges before it need"):
        modelmerge.replay("multi.yml", "new")
    assert sorted(path.name for path in here.iterdir()) == ["models", "multi.yml", "out"]


FIRST, SECOND, LAST = TWO.split("---\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TWO.replace("name: second", "name: first"), "two documents are called 'first'"),
        (TWO.replace("name: first\n", "").replace("model: first", "model: second"), "2 documents have no name"),
        (TWO.replace("models/expert_0", "second"), "made of one another: '(first|second)' -> '(first|second)' -> "),
        (TWO.replace("models/expert_0", "first"), "made of one another: 'first' -> 'first'"),
        (FIRST.replace("models/expert_0", "last") + "---\n" + LAST.replace("merge_", "name: last\nmerge_", 1)
         .replace("model: second", "model: models/base").replace("model: first", "model: models/expert_1"),
         "no document is the output: the last, 'last', is used by 'first'"),
        (TWO.replace("model: second", "model: secnod"),
         r"document 3: models\[0\].model: 'secnod' is no document of this file, .*; did you mean 'second'"),
        (TWO.replace("merge_method: ties", "merge_method: tise"),
         r"document 2 \('second'\): merge_method: modelmerge has"),
        (TWO.replace("name: first", "name: a/b"), "document 1: name: must be a short word"),
        (TWO.replace("name: first", "name: 7"), "document 1: name: must be a short word"),
        (TWO.replace("merge_method: linear", "method: linear"), "document 3: no mergekit configuration"),
        ("---\n---\n", "no mergekit configuration"),
    ],
)  # fmt: skip
def test_documents_that_cannot_be_put_in_order_are_one_error(text: str, says: str, here: Path) -> None:
    Path("multi.yml").write_text(text)
    with pytest.raises(RecipeError, match=says):
        mergekit.read(Path("multi.yml"))


def test_a_name_in_a_single_document_is_only_a_name(here: Path) -> None:
    Path("one.yml").write_text(FIRST.replace("name: first", "name: expert_0"))
    translated = mergekit.read(Path("one.yml"))
    assert not translated.stages
    assert translated.recipe.base == "models/base"


def test_every_form_of_a_reference_is_read(here: Path) -> None:
    forms = {
        "org/m@v1+org/l@v2": "org/m@v1+org/l@v2",
        "{model: org/m@v1, lora: org/l}": "org/m@v1+org/l",
        "{model: {path: org/m, revision: v1}, lora: {path: org/l, revision: null}}": "org/m@v1+org/l",
        "{model: org/m, lora: null, override_architecture: LlamaForCausalLM}": "org/m",
        "first+org/l": "stage:first+org/l",
        "{model: {path: first}, lora: org/l}": "stage:first+org/l",
        "models/base+org/l": "org/l",
        "{model: models/base, lora: org/l}": "org/l",
    }
    for form, reference in forms.items():
        Path("multi.yml").write_text(f"{FIRST}---\n{SECOND.replace('models/expert_2', form)}")
        translated = mergekit.read(Path("multi.yml"))
        assert str(translated.recipe.experts[1]).partition("=")[2] == reference
        assert list(translated.stages) == ["first"]


def test_what_a_stage_that_is_gone_cannot_be_is_an_error(here: Path) -> None:
    """The model that an adapter goes on, and a base to measure from."""
    Path("multi.yml").write_text(FIRST + "---\n" + LAST.replace("second", "models/expert_2"))
    modelmerge.replay("multi.yml", "out")
    with pytest.raises(UsageError, match="must be named"):
        modelmerge.evaluate(["out"], suite="weights")
    last = FIRST.replace("name: first", "").replace("models/base", "first")
    Path("multi.yml").write_text(f"{FIRST}---\n{last}")
    assert main(["merge", "--recipe", "multi.yml", "-o", "small", "--as-lora", "2"]) == 2
    assert main(["merge", "--recipe", "multi.yml", "-o", "small", "--part", "1/2"]) == 2
    assert not Path("small").exists()


def test_a_stage_of_a_manifest_has_a_name_that_a_directory_can_have(here: Path) -> None:
    modelmerge.replay("multi.yml", "out")
    manifest = _manifest("out")
    first = manifest["recipe"]["stages"]["first"]
    for bad in ({"../x": first}, {"x" * 101: first}, {"first": {**first, "stages": {"x": first}}}):
        manifest["recipe"]["stages"] = bad
        Path("bad.json").write_text(json.dumps(manifest))
        with pytest.raises(RecipeError, match=r"recipe\.stages.* has '.*, which cannot be the name of a merge before"):
            modelmerge.replay("bad.json", "again")
    manifest["recipe"]["stages"] = {}
    Path("bad.json").write_text(json.dumps(manifest))
    with pytest.raises(modelmerge.errors.ReferenceNotFound, match="'stage:second'"):
        modelmerge.replay("bad.json", "again")


def test_stages_that_store_wider_than_the_base_hand_that_on(here: Path) -> None:
    """As mergekit does: without a dtype the widest is stored, in every document."""
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in read(here / "models/base").items()}
    write(here / "models/base", half)
    modelmerge.replay("multi.yml", "out")
    assert {tensor.dtype for tensor in load_file("out/model.safetensors").values() if tensor.is_floating_point()} == {
        torch.float32
    }
