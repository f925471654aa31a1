"""merge --part and --finish: machines that share nothing, each with the models at a place of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import modelmerge
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli import main
from modelmerge.errors import ModelMergeError, OutputError, RecipeError, ReferenceNotFound, UsageError
from modelmerge.methods import registry
from modelmerge.progress import Silent
from modelmerge.record.redaction import published
from tests.support.checkpoints import base_state, expert_state, family, read, same_bits, write
from tests.support.guides import GUIDES, blocks
from tests.support.hub_server import FakeHub
from tests.support.processes import Run, running

FINISH = "modelmerge.checkpoint.staging:Staging._finish"
Edit = Callable[[dict[str, Any]], object]


def at_machine(tmp_path: Path, number: int, models: list[Path]) -> list[Path]:
    """The models as another machine has them: elsewhere, and newer."""
    root = tmp_path / f"machine-{number}"
    for model in models:
        shutil.copytree(model, root / model.name, copy_function=shutil.copy)
    return [root / model.name for model in models]


def make_parts(models: list[Path], tmp_path: Path, count: int = 3, **options: Any) -> list[Path]:
    """All parts, each made where the models lie elsewhere; those are gone afterwards."""
    places = [tmp_path / f"part-{number}" for number in range(1, count + 1)]
    for number, place in enumerate(places, 1):
        base, *experts = at_machine(tmp_path, number, models)
        modelmerge.merge(base, experts, place, part=f"{number}/{count}", max_shard_size="2KB", **options)
        shutil.rmtree(base.parent)
    return places


def put_together(models: list[Path], places: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return modelmerge.merge(models[0], models[1:], out, finish=places, max_shard_size="2KB", **options)


def alone(models: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return modelmerge.merge(models[0], models[1:], out, max_shard_size="2KB", **options)


def weights(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def bytes_of(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


def edit(place: Path, change: Edit) -> None:
    """Change the manifest of a part, as if it had been made in another way."""
    manifest = json.loads((place / MANIFEST).read_text())
    change(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


def check_as_one(models: list[Path], tmp_path: Path, count: int = 3, **options: Any) -> None:
    """Parts that are put together are what one process writes, to the last bit and word."""
    one = alone(models, tmp_path / "one", **options)
    places = make_parts(models, tmp_path, count, **options)
    before = [bytes_of(place) for place in places]
    whole = put_together(models, places, tmp_path / "out", **options)
    assert weights(whole) == weights(one)
    assert {name for name in whole if whole[name] != one.get(name)} <= {
        "created", "command", "seconds", "files", "workers"}  # fmt: skip
    assert bytes_of(tmp_path / "out").keys() == bytes_of(tmp_path / "one").keys() == {*whole["files"], MANIFEST}
    assert [worker["units"] for worker in whole["workers"]] == [len(files) - 1 for files in before]
    assert [bytes_of(place) for place in places] == before, "the parts stay"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """The models, and three parts of their ties merge. Nobody changes them."""
    root = tmp_path_factory.mktemp("made")
    models = family(root / "models")
    return models, make_parts(models, root, method="ties")


@pytest.fixture
def parts(made: tuple[list[Path], list[Path]], tmp_path: Path) -> list[Path]:
    """Those parts, to be changed."""
    return [shutil.copytree(place, tmp_path / place.name) for place in made[1]]


# --- as one process ---


@pytest.mark.parametrize("method", ["ties", "kron", "slerp", "dare", "model-stock", "average"])
def test_parts_are_what_one_process_writes(method: str, tmp_path: Path) -> None:
    experts = registry.load(method).most_experts or 3
    check_as_one(family(tmp_path / "models", experts=experts, dtype=torch.bfloat16), tmp_path, method=method)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
@pytest.mark.parametrize("text", ["awd granularity=row", "awd granularity=tensor", "awd granularity=model", "apgd"])
def test_transforms_in_parts(text: str, method: str, models: list[Path], tmp_path: Path) -> None:
    check_as_one(models, tmp_path, 2, method=method, disentangle=[text])


@pytest.mark.slow
@pytest.mark.parametrize("method", [n for n in registry.names() if not registry.load(n).on_data])
def test_every_method_works_in_parts(method: str, tmp_path: Path) -> None:
    paths = family(tmp_path / "models", experts=registry.load(method).most_experts or 3, dtype=torch.bfloat16)
    check_as_one(paths, tmp_path, method=method)


def test_several_methods_in_one_merge(models: list[Path], tmp_path: Path) -> None:
    check_as_one(models, tmp_path, 2, method="kron", at=["*mlp*: ties density=0.5", "*q_proj*: base"], dtype="bfloat16")


def test_one_part_is_the_whole(models: list[Path], tmp_path: Path) -> None:
    check_as_one(models, tmp_path, 1, method="ties")


def test_a_pipeline_is_made_in_parts(tmp_path: Path) -> None:
    root = tmp_path / "models"
    base = base_state()
    for name, state in {"base": base, "e0": expert_state(base, 0), "e1": expert_state(base, 1)}.items():
        (root / name).mkdir(parents=True)
        (root / name / "model_index.json").write_text('{"_class_name": "Tiny", "unet": ["a", "b"], "vae": ["a", "b"]}')
        for folder in ("unet", "vae"):
            write(root / name / folder, state)
            file = root / name / folder / "model.safetensors"
            file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
    check_as_one([root / "base", root / "e0", root / "e1"], tmp_path, 3, method="ties")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()


def test_two_processes_and_one_that_puts_together(models: list[Path], tmp_path: Path) -> None:
    want = weights(json.loads(_merged(models, tmp_path / "one")))
    with contextlib.ExitStack() as stack:
        runs = []
        for number in (1, 2):
            words = [*map(str, at_machine(tmp_path, number, models)), "--max-shard-size", "2KB"]
            command = ["merge", "ties", *words, "-o", str(tmp_path / f"p{number}"), "--part", f"{number}/2", "--json"]
            runs.append(stack.enter_context(running(command, beside=number - 1)))
        assert [run.end() for run in runs] == [0, 0], [run.err() for run in runs]
        found = [json.loads(run.out()) for run in runs]
    assert [each["manifest"]["part"]["number"] for each in found] == [1, 2]
    command = ["merge", "ties", *map(str, models), "-o", str(tmp_path / "out"), "--max-shard-size", "2KB", "--json"]
    with running([*command, *(word for n in (2, 1) for word in ("--finish", str(tmp_path / f"p{n}")))]) as last:
        assert last.end() == 0, last.err()
        whole = json.loads(last.out())["manifest"]
    assert weights(whole) == want
    assert [worker["host"] for worker in published(whole)["workers"]] == [None] * 2
    assert main(["verify", str(tmp_path / "out"), "-q"]) == 0
    again = modelmerge.replay(tmp_path / "out", tmp_path / "again")
    assert weights(again) == want
    assert "workers" not in again


def _merged(models: list[Path], out: Path) -> str:
    words = ["merge", "ties", *map(str, models), "-o", str(out), "--max-shard-size", "2KB", "-q"]
    with running(words) as run:
        assert run.end() == 0, run.err()
    return (out / MANIFEST).read_text()


def test_a_recipe_is_repeated_in_parts(models: list[Path], tmp_path: Path) -> None:
    one = alone(models, tmp_path / "one", method="kron")
    recipe = tmp_path / "one" / MANIFEST
    for number in (1, 2):
        modelmerge.replay(recipe, tmp_path / f"p{number}", part=f"{number}/2")
    places = [tmp_path / "p1", tmp_path / "p2"]
    assert weights(modelmerge.replay(recipe, tmp_path / "out", finish=places)) == weights(one)
    manifest = json.loads(recipe.read_text())
    name = next(iter(weights(one)))
    manifest["files"][name]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=f"gives other bits than .*other.json records: {name}"):
        modelmerge.replay(tmp_path / "other.json", tmp_path / "bad", finish=places)
    assert not (tmp_path / "bad").exists()


def test_what_is_found_on_data_is_shared_out_by_its_recipe(tmp_path: Path) -> None:
    base = {"weight": torch.eye(3), "bias": torch.zeros(3)}
    states = [base, *({"weight": torch.eye(3) * i, "bias": torch.ones(3)} for i in (2, 3))]
    models = [write(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    script = tmp_path / "script.py"
    made = "torch.nn.Linear(3, 3), torch.arange(12.0).view(4, 3) / 12"
    script.write_text(f"import torch\n\n\ndef unlabelled(expert):\n    return {made}\n")
    options = {"method": "adamerging", "unlabelled": {"script": f"{script}:unlabelled"}, "steps": 3}
    for way in ({"part": "1/2"}, {"finish": [tmp_path / "p1"]}):
        with pytest.raises(
            UsageError, match=r"(part|finish) cannot share out 'adamerging': its coefficients are found"
        ):
            modelmerge.merge(models[0], models[1:], tmp_path / "x", max_shard_size="20", **options, **way)
    one = modelmerge.merge(models[0], models[1:], tmp_path / "one", max_shard_size="20", **options)
    for number in (1, 2):
        modelmerge.replay(tmp_path / "one", tmp_path / f"p{number}", part=f"{number}/2")
    whole = modelmerge.replay(tmp_path / "one", tmp_path / "out", finish=[tmp_path / "p1", tmp_path / "p2"])
    assert weights(whole) == weights(one)
    assert whole["recipe"]["coefficients"] == one["recipe"]["coefficients"]


def test_models_on_the_hub_are_neither_stored_for_a_part_nor_read_to_put_together(
    hub: FakeHub, models: list[Path], tmp_path: Path
) -> None:
    for model in models:
        hub.add(f"org/{model.name}", model)
    names = [f"org/{model.name}" for model in models]
    options = {"method": "ties", "max_shard_size": "2KB"}
    one = alone(models, tmp_path / "one", method="ties")
    places = [tmp_path / "p1", tmp_path / "p2"]
    for number, place in enumerate(places, 1):
        modelmerge.merge(names[0], names[1:], place, part=f"{number}/2", stream=True, **options)
    plan = modelmerge.merge(names[0], names[1:], finish=places, dry_run=True, **options)
    whole = modelmerge.merge(names[0], names[1:], tmp_path / "out", finish=places, **options)
    assert weights(whole) == weights(one)
    assert plan["bytes"]["download"] == (models[0] / "tokenizer.json").stat().st_size  # the config has been read
    stored = {file.name for file in (tmp_path / "hf-cache").glob("models--*/snapshots/*/*")}
    assert stored == {"config.json", "tokenizer.json"}


# --- as the guide says ---


def steps_of(job: dict[str, Any]) -> list[str]:
    """What a job runs, but for installing; what it uses must be known to the test."""
    known = ("actions/checkout", "actions/setup-python", "actions/upload-artifact", "actions/download-artifact")
    assert all(step["uses"].startswith(known) for step in job["steps"] if "uses" in step)
    return [step["run"] for step in job["steps"] if not step.get("run", "pip").startswith("pip")]


def words_of(line: str, environment: dict[str, str]) -> list[str]:
    """The words of a line as the shell makes them."""
    said = subprocess.run(
        ["bash", "-ec", f"printf '%s\\0' {line}"], env={**os.environ, **environment}, capture_output=True, check=True
    )
    return said.stdout.decode().split("\0")[:-1]


@pytest.fixture
def shelf(hub: FakeHub, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place to work in; the models of the guide are on the Hub."""
    for name, model in zip(("base", "math", "code"), models, strict=False):
        hub.add(f"org/{name}", model)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


GUIDE = GUIDES["scale"].read_text().replace("500MB", "2KB")


def test_the_commands_of_the_guide_make_one_model(shelf: Path, models: list[Path], tmp_path: Path) -> None:
    (block,) = blocks(GUIDE, "bash")
    for line in block.splitlines():
        assert main(words_of(line, {})[1:]) == 0, line
    assert same_bits(read(shelf / "merged"), _whole(models[:3], tmp_path))


def test_the_jobs_of_the_guide_make_one_model(shelf: Path, models: list[Path], tmp_path: Path) -> None:
    (block,) = blocks(GUIDE, "yaml")
    workflow = yaml.safe_load(block)
    part, whole = workflow["jobs"]["part"], workflow["jobs"]["whole"]
    numbers = part["strategy"]["matrix"]["number"]
    (make,) = steps_of(part)
    upload, download = (
        part["steps"][-1]["with"],
        next(s["with"] for s in whole["steps"] if "download" in s.get("uses", "")),
    )
    for number in numbers:
        line = make.replace("${{ matrix.number }}", str(number))
        assert main(words_of(line, workflow["env"])[1:]) == 0, line
        artifact = upload["name"].replace("${{ matrix.number }}", str(number))
        Path(download["path"]).mkdir(exist_ok=True)
        Path(upload["path"]).rename(Path(download["path"], artifact))
    for line in steps_of(whole):
        assert main(words_of(line, workflow["env"])[1:]) == 0, line
    assert same_bits(read(shelf / "merged"), _whole(models[:3], tmp_path))
    assert len(json.loads((shelf / "merged" / MANIFEST).read_text())["workers"]) == len(numbers) == 4


# --- who does what ---


def test_the_plans_of_all_parts_are_that_of_the_merge(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(method: str, *more: str) -> dict[str, Any]:
        words = ["merge", method, *map(str, models), "-o", str(tmp_path / "x"), "--max-shard-size", "2KB", "-n"]
        assert main([*words, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["plan"]

    for method in ("average", "model-stock", "ties"):
        whole = plan(method)
        each = [plan(method, "--part", f"{number}/3") for number in (1, 2, 3)]
        assert sorted(name for part in each for name in part["shards"]) == whole["shards"]
        assert sum(part["bytes"]["write"] for part in each) == whole["bytes"]["write"]
        assert sum(part["part"]["work"] for part in each) == pytest.approx(1)
        read, counted = sum(part["bytes"]["read"] for part in each), whole["bytes"]["read"]
        assert read > counted if method == "ties" else read == counted
    scratch = [plan("average", "--disentangle", "apgd", *part)["bytes"]["scratch"] for part in ([], ["--part", "1/3"])]
    assert 0 < scratch[1] < scratch[0]
    assert not (tmp_path / "x").exists()
    words = ["merge", "ties", *map(str, models), "-o", str(tmp_path / "x"), "--max-shard-size", "2KB", "-n"]
    assert main([*words, "--part", "2/3"]) == 0
    assert "part 2 of 3, 32% of the work of merging: model-00003-of-00004.safetensors" in capsys.readouterr().out


class _Stages(Silent):
    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        self.bytes[label] = total


@pytest.mark.parametrize(("method", "text", "all_of_it"), [
    ("average", "apgd", False), ("average", "awd granularity=row", False), ("ties", "apgd", True),
    ("average", "awd granularity=model", True),
])  # fmt: skip
def test_a_part_fits_no_more_than_it_needs(
    method: str, text: str, all_of_it: bool, models: list[Path], tmp_path: Path
) -> None:
    seen = []
    for number in (1, 2, 3):
        seen.append(_Stages())
        modelmerge.merge(
            models[0], models[1:], tmp_path / f"p{number}", method=method, disentangle=[text],
            part=f"{number}/3", max_shard_size="2KB", progress=seen[-1],
        )  # fmt: skip
    whole = _Stages()
    alone(models, tmp_path / "one", method=method, disentangle=[text], progress=whole)
    read = [each.bytes["disentangling"] for each in seen]
    assert read == [whole.bytes["disentangling"]] * 3 if all_of_it else sum(read) == whole.bytes["disentangling"]


def test_nobody_takes_a_part_for_a_model(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = {file.name for file in parts[0].iterdir()}
    assert all(name == MANIFEST or name.endswith(".safetensors.part") for name in names)
    with pytest.raises(ReferenceNotFound, match="holds no checkpoint"):
        modelmerge.merge(parts[0], [parts[1]], method="average", dry_run=True)
    assert main(["push", str(parts[0]), "org/name"]) == 1
    assert "is a part of a merge" in capsys.readouterr().err
    assert main(["merge", "--recipe", str(parts[0] / MANIFEST), "-o", "x", "-n"]) == 1
    assert main(["verify", str(parts[0]), "-q"]) == 0
    name = next(name for name in names if name != MANIFEST)
    (parts[0] / name).write_bytes(b"")
    assert main(["verify", str(parts[0]), "-q"]) == 1


# --- what is cut short ---


def killed(run: Run, out: Path) -> dict[str, int]:
    """Kill a run that has stopped; the inodes of the weight files, not all, that it had finished, by name."""
    run.until_stopped()
    run.send(signal.SIGKILL)
    run.end()
    staging = out.with_name(f".{out.name}.modelmerge")
    finished = json.loads((staging / ".journal.json").read_text())["finished"]
    assert 1 <= len(finished) <= 3
    return {name: (staging / name).stat().st_ino for name in finished}


def test_a_part_that_was_killed_is_taken_up(models: list[Path], tmp_path: Path) -> None:
    apgd = {"method": "average", "disentangle": ["apgd"]}  # which is not fitted again on what is finished
    one, place = alone(models, tmp_path / "one", **apgd), tmp_path / "p1"
    words = ["merge", "average", *map(str, models), "-o", str(place), "--max-shard-size", "2KB", "--resume"]
    words += ["--disentangle", "apgd"]
    with running([*words, "--part", "1/1"], stop=FINISH, call=3, environment={"OMP_NUM_THREADS": "1"}) as first:
        kept = killed(first, place)
    with running([*words, "--part", "1/1"]) as again:
        assert again.end() == 0, again.err()
    assert {name: (place / name).stat().st_ino for name in kept} == kept
    before = place.stat().st_ino
    with running([*words, "--part", "1/1"]) as late:
        assert late.end() == 0
        assert "is complete already" in late.err()
    assert place.stat().st_ino == before
    assert weights(put_together(models, [place], tmp_path / "out", **apgd)) == weights(one)


def test_a_finish_that_was_killed_is_taken_up(
    made: tuple[list[Path], list[Path]], parts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["merge", "ties", *map(str, made[0]), "-o", str(out), "--max-shard-size", "2KB", "--resume"]
    words += [word for place in parts for word in ("--finish", str(place))]
    with running(words, stop=FINISH, call=3) as first:
        kept = killed(first, out)
    assert not out.exists()
    with running(words) as again:
        assert again.end() == 0, again.err()
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert same_bits(read(out), _whole(made[0], tmp_path))
    with running(words) as late:
        assert late.end() == 0
        assert "is complete already" in late.err()


def _whole(models: list[Path], tmp_path: Path) -> dict[str, torch.Tensor]:
    alone(models, tmp_path / "one", method="ties")
    return read(tmp_path / "one")


def test_an_output_is_replaced_with_force_alone(
    made: tuple[list[Path], list[Path]], parts: list[Path], tmp_path: Path
) -> None:
    out = write(tmp_path / "out", base_state())
    with pytest.raises(OutputError, match="is not empty"):
        put_together(made[0], parts, out, method="ties")
    put_together(made[0], parts, out, method="ties", force=True)
    assert same_bits(read(out), _whole(made[0], tmp_path))


# --- what is refused ---


@pytest.fixture
def refused(made: tuple[list[Path], list[Path]], tmp_path: Path) -> Iterator[Callable[..., ModelMergeError]]:
    """What putting parts together ends with; nothing may be there then."""

    def end(places: list[Path], models: list[Path] | None = None, **options: Any) -> ModelMergeError:
        with pytest.raises(ModelMergeError) as caught:
            put_together(models or made[0], places, tmp_path / "out", **{"method": "ties", **options})
        assert caught.value.hint
        return caught.value

    yield end
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


Refused = Callable[..., ModelMergeError]


def test_parts_that_are_missing_are_named(parts: list[Path], refused: Refused) -> None:
    assert refused(parts[:1]).message == "parts 2/3, 3/3 are missing"
    error = refused(parts[1:])
    assert error.message == "part 1/3 is missing"
    assert "make it with part 1/3" in error.hint


def test_a_part_may_come_twice_but_not_with_other_bytes(
    made: tuple[list[Path], list[Path]], parts: list[Path], refused: Refused, tmp_path: Path
) -> None:
    twin = shutil.copytree(parts[1], tmp_path / "twin")
    put_together(made[0], [*parts, twin], tmp_path / "fine", method="ties")
    edit(twin, lambda manifest: next(iter(manifest["files"].values())).update(sha256="0" * 64))
    assert refused([*parts, twin]).message == f"part 2/3 in {parts[1]} has other bytes than the same in {twin}"


def test_parts_of_other_cuts_do_not_go_together(
    made: tuple[list[Path], list[Path]], parts: list[Path], refused: Refused, tmp_path: Path
) -> None:
    other = make_parts(made[0], tmp_path / "cut", 2, method="ties")[1]
    assert "are of different numbers of parts" in refused([parts[0], other]).message


@pytest.mark.parametrize(("options", "says"), [
    ({"density": 0.3}, "density is 0.2, and here it is 0.3"),
    ({"method": "average"}, "density is 0.2, and here it is None"),
    ({"seed": 1}, "seed is 0, and here it is 1"),
    ({"weights": {"expert_0": 2.0}}, "expert_0 is None, and here it is 2.0"),
    ({"exclude": ["*norm*"]}, "exclude is [], and here it is ['*norm*']"),
])  # fmt: skip
def test_another_merge_is_told_by_what_differs(
    options: dict[str, Any], says: str, parts: list[Path], refused: Refused
) -> None:
    error = refused(parts, **options)
    assert error.message == f"part 1/3 in {parts[0]} is of another merge: {says}"
    assert "repeat the options of the parts" in error.hint


def test_parts_of_other_models_are_refused(
    made: tuple[list[Path], list[Path]], parts: list[Path], refused: Refused, tmp_path: Path
) -> None:
    models = at_machine(tmp_path, 1, made[0])
    write(models[2], expert_state(base_state(), 7))
    assert "was made of other files than those here of expert_1" in refused(parts, models).message
    models[2].rename(models[2].with_name("other"))
    error = refused(parts, [*models[:2], models[2].with_name("other"), models[3]])
    assert "names of the models is ['base', 'expert_0', 'expert_1', 'expert_2']" in error.message


@pytest.mark.parametrize(("change", "says", "hint"), [
    (lambda m: m.update(threads=7), "with 7 threads, and part 1/3 with {threads}", "OMP_NUM_THREADS={threads}"),
    (lambda m: m["versions"].update(torch="1.0"), "with torch 1.0, and here it is {torch}", "install what made"),
    (lambda m: m["versions"].update(modelmerge="0.0"), "with modelmerge 0.0, and here", "install what made"),
    (lambda m: m.update(device="cuda:1"), "on cuda:1, and here it is cpu", "give device as for the parts"),
    (lambda m: m["job"].update(headers="0"), "is of another merge: its headers differ", "name its models"),
    (lambda m: m["job"].update(tokens="0"), "is of another merge: its tokens differ", "name its models"),
    (lambda m: m["files"].clear(), "no part lists model-0000", "make the parts again"),
    (lambda m: m["inputs"]["experts"].clear(), "than those here of expert_0, expert_1, expert_2", "name the models"),
    (lambda m: m["findings"].update(left_out=[["a"]]), "malformed: its findings", "make the part again"),
])  # fmt: skip
def test_parts_that_were_made_otherwise_are_refused_by_name(
    change: Edit, says: str, hint: str, parts: list[Path], refused: Refused
) -> None:
    edit(parts[2], change)
    error = refused(parts)
    here = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    assert says.format(**here) in error.message
    assert hint.format(**here) in error.hint


def test_other_processors_are_noted(made: tuple[list[Path], list[Path]], parts: list[Path], tmp_path: Path) -> None:
    edit(parts[2], lambda manifest: manifest["machine"].update(instructions="NEON"))
    whole = put_together(made[0], parts, tmp_path / "out", method="ties")
    assert "several kinds of machines" in whole["notes"][0]
    assert "NEON" in whole["notes"][0]


@pytest.mark.parametrize("harm", ["a byte", "the header", "the end", "all", "more"])
def test_a_damaged_part_is_named(harm: str, parts: list[Path], refused: Refused) -> None:
    file = max(parts[1].glob("*.part"))
    content = bytearray(file.read_bytes())
    match harm:
        case "a byte":
            content[-3] ^= 1
        case "the header":
            content[20] ^= 1
        case "the end":
            del content[-1:]
        case "more":
            content += b"\0"
    if harm == "all":
        file.unlink()
        assert refused(parts).message == f"{file} cannot be read: No such file or directory"
    else:
        file.write_bytes(content)
        assert refused(parts).message == f"{file} is damaged: it is not what its part recorded"


def test_what_is_no_part_is_refused(
    made: tuple[list[Path], list[Path]], parts: list[Path], refused: Refused, tmp_path: Path
) -> None:
    assert "holds no part of a merge: modelmerge.json is missing" in refused([tmp_path / "nowhere"]).message
    alone(made[0], tmp_path / "one", method="ties")
    assert "part is missing" in refused([tmp_path / "one"]).message
    edit(parts[0], lambda manifest: manifest["part"].update(of=10**12))
    assert "no part has such a number" in refused(parts).message
    (parts[0] / MANIFEST).write_text("{")
    assert str(parts[0] / MANIFEST) in refused(parts).message


def test_the_output_is_no_part(made: tuple[list[Path], list[Path]], parts: list[Path]) -> None:
    before = bytes_of(parts[0])
    for out in (parts[0], parts[0] / "inside"):
        with pytest.raises(OutputError, match=r"the output .* (is|lies in) the input"):
            put_together(made[0], parts, out, method="ties", force=True)
    assert bytes_of(parts[0]) == before


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "-1/3", "1/3/5", "1.5/3", "01/3", ""])
def test_a_part_is_a_number_of_a_number(text: str, models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="part must be I/N, a part's number and how many there are, like 3/8, not"):
        modelmerge.merge(models[0], models[1:], tmp_path / "x", method="ties", part=text)


def test_what_cannot_be_made_in_parts_is_refused(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    words = ["merge", "ties", *map(str, models), "-o", str(out)]
    for more, says in {
        ("--part", "1/2"): "--part 1/2: the output has one weight file, too few for 2 parts",
        ("--part", "1/2", "--cluster", "files"): "--cluster and --part exclude each other",
        ("--part", "1/2", "--finish", "p"): "--part and --finish exclude each other",
        ("--finish", "p", "--cluster", "files"): "--cluster and --finish exclude each other",
        ("--part", "1/2", "--as-lora", "2"): "--part cannot share out what --as-lora writes",
        ("--finish", "p", "--as-lora", "2"): "--finish cannot share out what --as-lora writes",
        ("--part", ""): "--part must be I/N, a part's number and how many there are, like 3/8, not ''",
        ("--part", "1/2", "--push", "org/name"): "--push has no place beside --part",
    }.items():
        for form in ([], ["-n"]) if "--push" not in more else ([],):
            assert main([*words, *more, *form]) == 2
            assert says in capsys.readouterr().err
    assert main([*words, "--part", "5/9", "--max-shard-size", "2KB", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"] == "--part 5/9: the output has 4 weight files, too few for 9 parts"
    assert error["hint"] == "have fewer parts, or smaller files: --max-shard-size"
    state = base_state()
    with pytest.raises(UsageError, match="tensors in memory are merged in memory"):
        modelmerge.merge(state, {"a": expert_state(state, 0)}, method="average", part="1/1")
    assert not out.exists()
