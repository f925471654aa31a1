"""Models on the Hub: the real client against a server on the loopback."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.errors import OUTLINES, HubError
from modelmerge.hub import ranges
from modelmerge.hub import repository as hub_module
from tests.support.checkpoints import State, base_state, expert_state, family, read, write
from tests.support.commands import refused, run
from tests.support.hub_server import OWNER, READER, FakeHub
from tests.support.processes import PATIENCE, running


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    """The same models on disk as on the Hub: [base, expert_0, expert_1]."""
    return family(tmp_path / "local", experts=2)


@pytest.fixture
def names(hub: FakeHub, local: list[Path]) -> list[str]:
    """A base and two experts on the Hub."""
    for directory in local:
        hub.add(f"org/{directory.name}", directory)
    return [f"org/{directory.name}" for directory in local]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_PAUSES", (0.01, 0.01, 0.01))


def merge(capsys: pytest.CaptureFixture[str], names: list[str], out: Path, *words: object) -> dict[str, Any]:
    """What `merge ties ... --json` says."""
    code, text, err = run(capsys, "merge", "ties", *names, "-o", out, "--json", *words)
    assert code == 0, err
    told: dict[str, Any] = json.loads(text)
    return told


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def cached(tmp_path: Path) -> list[str]:
    """The files that the shared cache holds, by their last names."""
    return sorted({file.name for file in (tmp_path / "hf-cache").glob("models--*/snapshots/*/**/*") if file.is_file()})


def large(root: Path, *, shards: int = 1) -> list[Path]:
    """A base and an expert of some 3 MB."""
    base = {**base_state(), "model.wide.weight": torch.randn(300, 2400, generator=torch.Generator().manual_seed(7))}
    return [write(root / "base", base, shards=shards), write(root / "expert", expert_state(base, 0), shards=shards)]


# What is read, and where it ends up


def test_models_on_the_hub_merge_to_the_same_bits_as_on_disk(
    hub: FakeHub, names: list[str], local: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    modelmerge.merge(local[0], local[1:], tmp_path / "here", method="ties")
    modelmerge.merge(names[0], names[1:], tmp_path / "there", method="ties")
    assert same(tmp_path / "here", tmp_path / "there")
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "there" / file).read_bytes() == (local[0] / file).read_bytes()
    fetched = {request.path.rpartition("/")[2] for request in hub.asked("/org/expert_.*/resolve/")}
    assert fetched == {"config.json", "model.safetensors"}, "of the experts, only what is merged"
    assert not list(tmp_path.glob(f"{OUTLINES}*")), "an outline was left behind"


def test_local_and_remote_models_mix(names: list[str], local: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(local[0], local[1:], tmp_path / "here", method="average")
    modelmerge.merge(names[0], [str(local[1]), names[2]], tmp_path / "mixed", method="average")
    assert same(tmp_path / "here", tmp_path / "mixed")


def test_a_dry_run_costs_kilobytes_and_says_what_a_run_would(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert = large(tmp_path / "local", shards=3)
    hub.add("org/base", base)
    hub.add("org/expert", expert)
    plan = merge(capsys, ["org/base", "org/expert"], tmp_path / "out", "--dry-run")["plan"]
    assert hub.bytes_sent() < 100_000 * 6 + 20_000  # a header's guess for each shard
    weights = sum(f.stat().st_size for m in (base, expert) for f in m.glob("*.safetensors"))
    # What is small and was looked into is in the cache already; the tokenizer is not.
    assert plan["bytes"]["download"] == weights + (base / "tokenizer.json").stat().st_size
    assert plan["cache"]["enough"] is True
    assert plan["cache"]["free"] > 0
    assert not (tmp_path / "out").exists()
    assert cached(tmp_path) == ["config.json", "model.safetensors.index.json"]

    sent = hub.bytes_sent()
    merge(capsys, ["org/base", "org/expert"], tmp_path / "out")
    assert plan["bytes"]["download"] <= hub.bytes_sent() - sent < plan["bytes"]["download"] + 600_000
    plan = merge(capsys, ["org/base", "org/expert"], tmp_path / "out", "--dry-run")["plan"]
    assert plan["bytes"]["download"] == 0, "all is in the cache now"


def test_long_headers_are_fetched_whole(hub: FakeHub, tmp_path: Path) -> None:
    base: State = {f"model.layers.{i}.{'x' * 200}.weight": torch.full((2, 2), float(i)) for i in range(500)}
    models = [write(tmp_path / "base", base), write(tmp_path / "expert", {k: v + 1 for k, v in base.items()})]
    header = int.from_bytes((models[0] / "model.safetensors").read_bytes()[:8], "little")
    assert header > 100_000
    for directory in models:
        hub.add(f"org/{directory.name}", directory)
    modelmerge.merge(*models[:1], models[1:], tmp_path / "here", method="average")
    modelmerge.merge("org/base", ["org/expert"], tmp_path / "there", method="average")
    assert same(tmp_path / "here", tmp_path / "there")


def test_only_the_checkpoint_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    base, expert = family(tmp_path / "local", experts=1, shards=2)
    other = ["consolidated.safetensors", "pytorch_model.bin", "tf_model.h5", "model.gguf", "onnx/model.onnx"]
    other += ["original/model.safetensors", "training_args.bin", "optimizer.pt"]
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
        hub.add(f"org/{directory.name}", dict.fromkeys(other, b"of no use here" * 1000))
    modelmerge.merge("org/base", ["org/expert_0"], tmp_path / "out", method="average")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert cached(tmp_path) == ["config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]
    assert not [r for r in hub.requests if any(name in r.path for name in other)]


@pytest.mark.parametrize(
    "form", ["{}", "{}@main", "{}@refs/pr/3", "{}@{sha}", "hf://{}", "hf://{}@refs/pr/3", "math={}"]
)
def test_every_form_of_a_reference_is_pinned(
    form: str, hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.repos[names[1]]
    main_sha = repo.refs["main"]
    other = write(tmp_path / "other", expert_state(base_state(), 9))
    pull_sha = hub.add(names[1], other, revision="refs/pr/3")
    expected = pull_sha if "refs/pr/3" in form else main_sha
    told = merge(capsys, [names[0], form.format(names[1], sha=main_sha), names[2]], tmp_path / "out")["manifest"]
    name = "math" if form.startswith("math") else "expert_0"
    assert told["recipe"]["experts"][0] == {"name": name, "reference": f"{names[1]}@{expected}"}
    assert [*told["inputs"]["experts"][0]["files"]] == [f"hf://{names[1]}@{expected}/model.safetensors"]
    card = (tmp_path / "out" / "README.md").read_text()
    page = f"https://huggingface.co/{names[1]}"
    assert f"| `{name}` | [{names[1]}]({page}) | [`{expected[:12]}`]({page}/tree/{expected}) |" in card
    assert f" {name}={names[1]}@{expected} " in told["command"]


@pytest.mark.parametrize("place", ["sub/final", "sub/final/model.safetensors", "sub/final/odd-name.safetensors"])
def test_a_folder_or_a_file_of_a_repository(place: str, hub: FakeHub, local: list[Path], tmp_path: Path) -> None:
    weights = (local[1] / "model.safetensors").read_bytes()
    hub.add("org/runs", {f"sub/final/{name}": weights for name in ("model.safetensors", "odd-name.safetensors")})
    sha = hub.add("org/runs", {"model.safetensors": b"another model"})
    modelmerge.merge(local[0], local[1:2], tmp_path / "here", method="ties")
    told = modelmerge.merge(local[0], [f"hf://org/runs/{place}@main"], tmp_path / "there", method="ties")
    assert same(tmp_path / "here", tmp_path / "there")
    name = {"sub/final/odd-name.safetensors": "odd-name"}.get(place, "final")
    assert told["recipe"]["experts"] == [{"name": name, "reference": f"hf://org/runs/{place}@{sha}"}]


def test_a_recipe_is_replayed_from_its_commits(
    hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, names, tmp_path / "one")
    for name in names:
        hub.add(name, write(tmp_path / "moved", base_state(seed=5)))
    words = ("merge", "--recipe", tmp_path / "one" / "modelmerge.json", "-o", tmp_path / "two", "-q")
    assert run(capsys, *words)[:2] == (0, f"{tmp_path / 'two'}\n")
    assert same(tmp_path / "one", tmp_path / "two")
    merge(capsys, names, tmp_path / "three")
    assert not same(tmp_path / "one", tmp_path / "three"), "main has moved"


def test_the_card_names_repositories_and_their_licence(hub: FakeHub, names: list[str], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    for name in names:
        hub.add(name, {"README.md": b"---\nlicense: mit\n---\n# a model\n"})
    modelmerge.merge(names[0], names[1:], tmp_path / "out", method="ties", stream=True)
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == names
    assert data.license == "mit"


def test_manifests_of_models_on_the_hub_name_no_place_on_this_machine(names: list[str], tmp_path: Path) -> None:
    modelmerge.merge(names[0], names[1:], tmp_path / "out", method="ties")
    modelmerge.extract(names[0], names[1:], tmp_path / "vectors")
    for file in (tmp_path / "out" / "modelmerge.json", *tmp_path.glob("vectors/**/modelmerge.json")):
        manifest = json.loads(file.read_bytes())
        manifest.pop("command", None)  # has the output's path, as it was typed
        assert str(tmp_path) not in json.dumps(manifest)
        assert OUTLINES not in json.dumps(manifest)


def test_task_vectors_of_models_on_the_hub(names: list[str], local: list[Path], tmp_path: Path) -> None:
    modelmerge.extract(names[0], names[1:], tmp_path / "vectors")
    vectors = [str(tmp_path / "vectors" / f"expert_{i}") for i in range(2)]
    modelmerge.merge(names[0], vectors, tmp_path / "there", method="task-arithmetic")
    modelmerge.merge(local[0], vectors, tmp_path / "here", method="task-arithmetic")  # a base is known by its digest
    assert same(tmp_path / "here", tmp_path / "there")
    report = modelmerge.disentangle(names[0], names[1:], tmp_path / "apart", method="awd", full_experts=True)
    assert report["experts"] == [{"name": "expert_0"}, {"name": "expert_1"}]
    assert (tmp_path / "apart/experts/expert_0/tokenizer.json").read_bytes() == (
        local[0] / "tokenizer.json"
    ).read_bytes()


# Pickled checkpoints


def pickled(directory: Path, *, legacy: bool = False) -> Path:
    """The same checkpoint as pytorch_model.bin."""
    from safetensors.torch import load_file

    state = load_file(directory / "model.safetensors")
    made = directory.parent / f"{directory.name}-bin"
    made.mkdir()
    torch.save(state, made / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (made / "config.json").write_bytes((directory / "config.json").read_bytes())
    return made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_checkpoints_on_the_hub(
    legacy: bool, stream: bool, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", pickled(directory, legacy=legacy))
    words = ["--stream"] if stream else []
    plan = merge(capsys, ["org/base", "org/expert"], tmp_path / "there", "--dry-run", *words)["plan"]
    # The layout of before torch 1.6 has no table: such a file is fetched to be planned with.
    assert (hub.bytes_sent() > 5_000_000) if legacy else (hub.bytes_sent() < 500_000)
    assert (plan["bytes"]["download"] == 0) == legacy
    merge(capsys, ["org/base", "org/expert"], tmp_path / "there", *words)
    modelmerge.merge(base, [expert], tmp_path / "here", method="ties")
    here, there = read(tmp_path / "here"), read(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert ("pytorch_model.bin" in cached(tmp_path)) == (legacy or not stream)


def test_a_transposed_tensor_of_a_pickle_is_not_streamed(hub: FakeHub, tmp_path: Path) -> None:
    state = {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).T}
    for i, name in enumerate(("base", "expert")):
        stream = io.BytesIO()
        torch.save({"w": (state["w"] + i)}, stream)
        hub.add(f"org/{name}", {"pytorch_model.bin": stream.getvalue()})
    modelmerge.merge("org/base", ["org/expert"], tmp_path / "out", method="task-arithmetic", scale=1.0, stream=True)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], (state["w"] + 1).contiguous())
    assert cached(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("stream", [False, True])
def test_adapters_on_the_hub(
    stream: bool, hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, generator = "base_model.model.model.layers.0.q_proj.lora_{}.weight", torch.Generator().manual_seed(1)
    factors = {key.format(n): torch.randn(shape, generator=generator) for n, shape in (("A", (4, 16)), ("B", (16, 4)))}
    adapter = tmp_path / "local" / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    (adapter / "tokenizer.json").write_text("{}")
    hub.add("org/adapter", adapter)
    hub.add("org/base", local[0])
    assert run(capsys, "merge", "ties", local[0], adapter, local[1], "-o", tmp_path / "here")[0] == 0
    words = ["--stream"] if stream else []
    told = merge(capsys, ["mine=org/base", "org/adapter", str(local[1])], tmp_path / "there", *words)["manifest"]
    assert same(tmp_path / "here", tmp_path / "there")
    assert not any("trained on" in note for note in told["notes"])
    weights = [] if stream else ["adapter_model.safetensors", "model.safetensors"]
    assert cached(tmp_path) == sorted(["adapter_config.json", *weights, "config.json", "tokenizer.json"])


def test_a_base_of_which_no_weight_is_needed_is_not_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    paths = []
    for name in ("math", "code"):
        key, folder = "base_model.model.model.layers.0.q_proj.lora_{}.weight", tmp_path / name
        folder.mkdir()
        factors = {key.format(part): torch.randn(2, 16, generator=generator) for part in "AB"}
        factors[key.format("B")] = factors[key.format("B")].T.contiguous()
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        hub.add(f"org/{name}", folder)
        paths.append(folder)
    base = write(tmp_path / "base", base_state() | {"model.wide.weight": torch.ones(300, 24000)})
    hub.add("org/base", base)
    told: dict[str, Any] = {"method": "task-arithmetic", "as_lora": 4}
    modelmerge.merge(base, paths, tmp_path / "here", **told)
    plan = modelmerge.merge("org/base", ["org/math", "org/code"], tmp_path / "there", dry_run=True, **told)
    assert plan["bytes"]["read"] == 2 * 2 * 2 * 16 * 4
    modelmerge.merge("org/base", ["org/math", "org/code"], tmp_path / "there", **told)
    assert hub.bytes_sent() < (base / "model.safetensors").stat().st_size / 10
    assert "model.safetensors" not in cached(tmp_path)
    here, there = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) for key in here)
    # Another method looks at the base.
    modelmerge.merge("org/base", ["org/math", "org/code"], tmp_path / "ties", method="ties", as_lora=4)
    assert "model.safetensors" in cached(tmp_path)


# Streams


@pytest.mark.parametrize(
    "words", [["ties"], ["apgd", "--published", "--steps", "2"], ["task-arithmetic", "--disentangle", "awd"]]
)
def test_a_stream_gives_the_same_bits_and_fills_no_cache(
    words: list[str], hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_CHUNK", 1 << 18)
    base, expert = large(tmp_path / "local")
    second = write(tmp_path / "local" / "second", expert_state(base_state(), 3) | {
        "model.wide.weight": torch.randn(300, 2400, generator=torch.Generator().manual_seed(8))})  # fmt: skip
    for directory in (base, expert, second):
        hub.add(f"org/{directory.name}", directory)
    remote = ["org/base", "org/expert", "org/second"]
    assert run(capsys, "merge", *words, base, expert, second, "-o", tmp_path / "here")[0] == 0
    code, out, _ = run(capsys, "merge", *words, *remote, "-o", tmp_path / "there", "--stream", "-n", "--json")
    plan = json.loads(out)["plan"]
    assert plan["cache"] is None
    assert plan["bytes"]["read"] <= plan["bytes"]["download"] < plan["bytes"]["read"] + 1000
    before = hub.bytes_sent()
    code, _, err = run(capsys, "merge", *words, *remote, "-o", tmp_path / "there", "--stream", "-q")
    assert (code, err) == (0, "")
    assert hub.bytes_sent() - before < 2 * plan["bytes"]["download"]
    assert same(tmp_path / "here", tmp_path / "there")
    assert cached(tmp_path) == ["config.json", "tokenizer.json"]
    manifest = json.loads((tmp_path / "there" / "modelmerge.json").read_bytes())
    here = json.loads((tmp_path / "here" / "modelmerge.json").read_bytes())
    for there, local in zip(manifest["inputs"]["experts"], here["inputs"]["experts"], strict=True):
        # The digest that the Hub promises is that of the same file on disk.
        assert [*there["files"].values()] == [*local["files"].values()]


def test_a_stream_reads_from_the_cache_what_is_there(
    hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, names, tmp_path / "one")
    hub.requests.clear()
    merge(capsys, names, tmp_path / "two", "--stream")
    assert not hub.asked("resolve|cdn")
    assert same(tmp_path / "one", tmp_path / "two")


def test_extract_and_disentangle_stream(
    hub: FakeHub, names: list[str], local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["extract"], ["disentangle", "awd"], ["disentangle", "apgd"]):
        assert run(capsys, *words, *local, "-o", tmp_path / "here", "--force")[0] == 0
        assert run(capsys, *words, *names, "-o", tmp_path / "there", "--force", "--stream")[0] == 0
        for file in tmp_path.glob("here/**/*.safetensors"):
            assert file.read_bytes() == (tmp_path / "there" / file.relative_to(tmp_path / "here")).read_bytes()
    assert cached(tmp_path) == ["config.json"]


# Broken connections


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    stream: bool, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
    modelmerge.merge(base, [expert], tmp_path / "here", method="ties")
    hub.fail("GET /cdn", cut_after=70_000, times=3)
    merge(capsys, ["org/base", "org/expert"], tmp_path / "there", *(["--stream"] if stream else []))
    assert same(tmp_path / "here", tmp_path / "there")
    resumed = [int((r.range or "bytes=0-")[6:].partition("-")[0]) for r in hub.asked("GET /cdn")]
    assert sum(start % 70_000 == 0 and start > 0 for start in resumed) >= 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_always_breaks_is_an_error_and_leaves_nothing(
    stream: bool, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
    words = ["merge", "ties", "org/base", "org/expert", "-o", tmp_path / "out", *(["--stream"] if stream else [])]
    run(capsys, *words, "--dry-run")
    monkeypatch.setattr(ranges, "_TRIES", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # six tries of the client's, a second apart
    hub.fail("GET /cdn", cut_after=0, times=1000)
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert "error: org/" in err
    assert "hint: check the connection" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf-cache", "local"]


def test_a_signed_address_that_has_expired_is_asked_for_anew(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_CHUNK", 1 << 18)
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
    modelmerge.merge(base, [expert], tmp_path / "here", method="average")
    hub.fail("GET /cdn", status=403, after=5, times=1)
    modelmerge.merge("org/base", ["org/expert"], tmp_path / "there", method="average", stream=True)
    assert same(tmp_path / "here", tmp_path / "there")
    resolved = hub.asked("GET .*/resolve/.*safetensors")
    # For the header of each, for the tensors of each, and once more for the one that expired.
    assert len(resolved) == 5
    assert len(hub.asked("GET /cdn")) > 8
    # Where the Hub refuses a fresh address as well, that is an error.
    hub.fail("GET /cdn", status=403, after=5, times=50)
    with pytest.raises(modelmerge.errors.HubError, match="may not do this"):
        modelmerge.merge("org/base", ["org/expert"], tmp_path / "no", method="average", stream=True)
    assert not (tmp_path / "no").exists()


def test_a_connection_that_stalls_is_given_up_and_taken_up(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "_TIMEOUT", 1.0)
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
    modelmerge.merge(base, [expert], tmp_path / "here", method="average")
    hub.fail("GET /cdn", stalls=True, after=3, times=2)
    modelmerge.merge("org/base", ["org/expert"], tmp_path / "there", method="average", stream=True)
    assert same(tmp_path / "here", tmp_path / "there")
    assert not any(fault.times for fault in hub.faults)


def test_a_server_without_ranges_is_told_of(
    hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("GET /cdn", ignore_range=True, times=100)
    code, _, err = run(capsys, "merge", "ties", *names, "-o", tmp_path / "out")
    assert code == 1
    assert "does not serve ranges of files" in err


def test_a_busy_hub_is_asked_again(hub: FakeHub, names: list[str], tmp_path: Path) -> None:
    hub.fail("GET /api/models", status=503, times=2)
    hub.fail("GET /api/models/org/expert_0", status=429, times=1)
    modelmerge.merge(names[0], names[1:], tmp_path / "out", method="ties")


@pytest.mark.parametrize("answer", ["begun", "on its way"])
def test_a_download_that_is_interrupted_ends_at_once(answer: str, hub: FakeHub, tmp_path: Path) -> None:
    base, expert = large(tmp_path / "local")
    for directory in (base, expert):
        hub.add(f"org/{directory.name}", directory)
    late = hashlib.sha256((expert / "model.safetensors").read_bytes()).hexdigest()
    hub.fail(f"GET /cdn/{late}", whole=True, trickles=True, waits=answer == "on its way", times=1000)
    hub.fail("GET /cdn", whole=True, trickles=True, times=1000)

    def both_are_asked_for() -> bool:
        asked = [request for request in hub.asked("GET /cdn") if request.range is None]
        return len(asked) == 2 and sum(request.sent > 0 for request in asked) == (1 if answer == "on its way" else 2)

    words = ["merge", "ties", "org/base", "org/expert", "-o", str(tmp_path / "out")]
    with running(words, hub=True, environment={"TMPDIR": str(tmp_path)}) as child:
        hub.until(both_are_asked_for)
        child.send(signal.SIGINT)
        hub.release()
        assert child.end() == 130
        assert "Traceback" not in child.err()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf-cache", "local"]
    assert not list((tmp_path / "hf-cache").rglob("*.incomplete"))


def test_a_download_that_begins_when_all_has_ended_ends_too(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in large(tmp_path / "local"):
        hub.add(f"org/{directory.name}", directory)
    hub.fail("GET /cdn", whole=True, trickles=True, times=1000)
    bring, close, closed = hub_module.Repository.bring, hub_module.close_session, threading.Event()

    def in_turn(repository: Any, place: str, progress: Any = None) -> None:
        if progress and repository.name == "org/base":
            raise HubError("broken")
        if progress:
            assert closed.wait(PATIENCE)
        bring(repository, place, progress)

    monkeypatch.setattr(hub_module.Repository, "bring", in_turn)
    monkeypatch.setattr(hub_module, "close_session", lambda: (close(), closed.set()))
    with pytest.raises(HubError, match="broken"):
        modelmerge.merge("org/base", ["org/expert"], tmp_path / "out", method="ties")
    for thread in threading.enumerate():
        if "_work_off" in thread.name:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert not list((tmp_path / "hf-cache").rglob("*.incomplete"))


# What is refused


@pytest.mark.parametrize(
    ("reference", "says", "advises"),
    [
        ("org/nothing", "'org/nothing' is neither a path here nor a repository on the Hub", "hf auth login"),
        ("org/private", "'org/private' is neither a path here nor a repository on the Hub", "HF_TOKEN"),
        ("org/gated", "org/gated is gated", "/org/gated, then log in"),
        ("org/base@v9", "org/base has no revision 'v9'", "it has: main"),
        ("org/base@" + "0" * 40, "org/base has no revision '0000", "it has: main"),
        ("hf://org/base/nowhere", "org/base has no 'nowhere' on the Hub", "it holds: config.json"),
        ("org/gguf", "is GGUF", "safetensors"),
        ("org/empty", "holds no checkpoint", "name a directory"),
        ("org/broken", "hf://org/broken@", "pickle, a git-lfs pointer"),
        ("runs/8", "'runs/8' is neither a path here", "runs holds: 7"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(
    reference: str, says: str, advises: str, hub: FakeHub, names: list[str], local: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hub.add("org/private", local[1], private=True)
    hub.add("org/gated", local[1], gated=True)
    hub.add("org/gguf", {"model.gguf": b"GGUF"})
    hub.add("org/empty", {"README.md": b"nothing yet"})
    hub.add("org/broken", {"model.safetensors": b"<!doctype html>" * 100})
    (tmp_path / "runs" / "7").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    error, hint = refused(capsys, "merge", "ties", names[0], reference, "-o", tmp_path / "out")
    assert says in error
    assert advises in hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "says"),
    [(429, "has had too many requests"), (500, "the Hub answered 500"), (403, "your token may not do this")],
)
def test_what_the_hub_refuses_is_one_clear_line(
    status: int, says: str, hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("GET /api/models", status=status, times=100)
    error, _ = refused(capsys, "merge", "ties", *names, "-o", tmp_path / "out")
    assert error.startswith("org/base: ")
    assert says in error


def test_a_token_opens_what_is_private_and_gated_and_goes_to_no_other_host(
    hub: FakeHub, local: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/private", local[1], private=True)
    hub.add("org/gated", local[2], gated=True)
    words = ("merge", "ties", local[0], "org/private", "org/gated", "-o", tmp_path / "out")
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "the Hub does not accept your token" in refused(capsys, *words)[0]
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "repository on the Hub that you may see" in refused(capsys, *words)[0]
    monkeypatch.setenv("HF_TOKEN", OWNER)
    assert "org/gated is gated" in refused(capsys, *words)[0]
    hub.repos["org/gated"].granted.add("alice")
    for form in ([], ["--stream", "--force"]):
        assert run(capsys, *words, *form)[0] == 0
    assert hub.asked("GET /cdn")
    assert not [r for r in hub.asked("GET /cdn") if r.authorized]


def test_a_disk_too_small_is_told_before_the_download(
    hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "free_bytes", lambda: 9000)
    code, out, _ = run(capsys, "merge", "ties", *names, "-o", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "9.0 kB free in" in out
    assert "too little" in out
    error, hint = refused(capsys, "merge", "ties", *names, "-o", tmp_path / "out")
    assert "bytes have to be downloaded" in error
    assert "9,000 free" in error
    assert "--stream" in hint
    assert "model.safetensors" not in cached(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_copy_in_the_cache_is_found_out(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, names, tmp_path / "one")
    file = next((tmp_path / "hf-cache").glob("models--org--expert_1/snapshots/*/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    error, hint = refused(capsys, "merge", "ties", *names, "-o", tmp_path / "two")
    assert error.startswith("hf://org/expert_1@")
    assert "its copy in the cache is damaged" in error
    assert str(file.resolve()) in hint


def test_an_error_in_a_remote_file_names_it_by_its_repository(
    hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = expert_state(base_state(), 0)
    state["model.layers.0.norm.weight"][3] = float("nan")
    sha = hub.add("org/expert_0", write(tmp_path / "nan", state))
    error, _ = refused(capsys, "merge", "average", *names, "-o", tmp_path / "out")
    assert error.startswith(f"hf://org/expert_0@{sha[:12]}/model.safetensors: tensor 'model.layers.0.norm.weight'")


# Without a connection


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable"])
def test_what_the_cache_holds_needs_no_connection(
    how: str, hub: FakeHub, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, names[:2], tmp_path / "one")
    change = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    hub.requests.clear()
    with running(["merge", "ties", *names[:2], "-o", str(tmp_path / "two"), "-q"], hub=True, environment=change) as two:
        assert (two.end(), two.out()) == (0, f"{tmp_path / 'two'}\n"), two.err()
    assert same(tmp_path / "one", tmp_path / "two")
    with running(["merge", "ties", *names, "-o", str(tmp_path / "three")], hub=True, environment=change) as three:
        assert (three.end(), three.out()) == (1, "")
        error = next(line for line in three.err().splitlines() if line.startswith("error: "))
    told = "HF_HUB_OFFLINE forbids to ask the Hub" if how == "HF_HUB_OFFLINE" else "127.0.0.1:9 cannot be reached"
    assert error.startswith("error: 'org/expert_1' is not a path here, and ")
    assert told in error
    assert not hub.requests


class Ear:
    """Hears the progress."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done: dict[str, int] = {}

    def stage(self, label: str, total: int, unit: str = "bytes") -> None:
        self.stages.append((label, total))

    def begin(self, item: str) -> None:
        pass

    def advance(self, amount: int, item: str) -> None:
        label = self.stages[-1][0]
        self.done[label] = self.done.get(label, 0) + amount

    def note(self, message: str) -> None:
        pass


def test_progress_is_told_in_bytes(names: list[str], local: list[Path], tmp_path: Path) -> None:
    ear = Ear()
    modelmerge.merge(names[0], names[1:], tmp_path / "out", method="average", progress=ear)
    files = [m / "model.safetensors" for m in local] + [local[0] / "tokenizer.json"]
    total = sum(file.stat().st_size for file in files)
    assert ear.stages[0] == ("downloading", total)
    assert ear.done["downloading"] == total


def test_progress_of_the_protocol_that_the_server_here_does_not_speak() -> None:
    """Over Xet the client tells of bytes on the network and of bytes of the file: only the file's count."""
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    ear = Ear()
    ear.stage("downloading", 100)
    bar = hub_module._progress(ear, "model.safetensors", threading.Event())
    words = {"reconstruction_desc": "", "transfer_desc": "", "log_level": 30, "tqdm_class": bar, "total": 100}
    with reporting.XetDownloadProgressReporter(name="test", **words) as told:
        for whole, network in ((0, 30), (60, 50), (100, 70)):
            report = SimpleNamespace(
                total_bytes=100, total_bytes_completed=whole, total_transfer_bytes_completed=network,
                total_bytes_completion_rate=None, total_transfer_bytes_completion_rate=None,
            )  # fmt: skip
            told.update_progress(report, {})
    assert ear.done == {"downloading": 100}
