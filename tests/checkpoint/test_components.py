"""Models of several components, and files of one piece: read, matched and written component by component."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import modelmerge
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, ReferenceNotFound, UsageError
from tests.support.checkpoints import base_state, expert_state, same
from tests.support.hub_server import OWNER, FakeHub
from tests.support.pipelines import CONFIGS, TEXT, UNET, VAE, read_folders, states, write_pipeline, write_shards


@pytest.fixture
def pipelines(tmp_path: Path) -> list[Path]:
    """A pipeline and two experts of all its components."""
    return [write_pipeline(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))]


def mean(*seeds: int, folders: tuple[str, ...] = (UNET, VAE, TEXT)) -> dict[str, torch.Tensor]:
    """The average of pipelines; of other folders than these, what the base has."""
    each = [states(seed) for seed in seeds]
    return {
        f"{folder}/{name}": torch.stack([state[folder][name] for state in each]).mean(0) if folder in folders else base
        for folder, tensors in states(0).items()
        for name, base in tensors.items()
    }


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-6, atol=1e-6)


def files(directory: Path) -> set[str]:
    return {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()}


def plan(*models: Path, **options: object) -> dict[str, object]:
    return modelmerge.merge(models[0], list(models[1:]), method="average", dry_run=True, **options)  # type: ignore[arg-type]


# --- pipelines ---


def test_a_pipeline_is_merged_component_by_component_under_its_own_names(pipelines: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average")
    assert_close(read_folders(tmp_path / "out"), mean(1, 2))
    assert files(tmp_path / "out") == {
        "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/diffusion_pytorch_model.safetensors",
        "vae/config.json", "text_encoder/model.safetensors", "text_encoder/config.json", "model_index.json",
        "scheduler/scheduler_config.json", "tokenizer/vocab.json", "modelmerge.json", "README.md",
    }  # fmt: skip
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_shards_and_their_index_are_called_as_the_components_library_does(
    pipelines: list[Path], tmp_path: Path
) -> None:
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average", max_shard_size="300")
    assert_close(read_folders(tmp_path / "out"), mean(1, 2))
    stem = "unet/diffusion_pytorch_model"
    assert {f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"} <= files(tmp_path / "out")
    assert "text_encoder/model.safetensors.index.json" in files(tmp_path / "out")
    # What was written can be merged again.
    modelmerge.merge(tmp_path / "out", [pipelines[1]], tmp_path / "again", method="average")
    assert_close(read_folders(tmp_path / "again"), mean(1))


def test_globs_name_components(pipelines: list[Path], tmp_path: Path) -> None:
    models = pipelines[0], pipelines[1:]
    modelmerge.merge(*models, tmp_path / "in", method="average", include=["unet/*", "vae/*"])
    assert_close(read_folders(tmp_path / "in"), mean(1, 2, folders=(UNET, VAE)))
    modelmerge.merge(*models, tmp_path / "ex", method="average", exclude=["text_encoder/*"])
    assert same(read_folders(tmp_path / "ex"), read_folders(tmp_path / "in"))
    modelmerge.merge(*models, tmp_path / "at", method="average", at=["text_encoder/*: base"])
    assert same(read_folders(tmp_path / "at"), read_folders(tmp_path / "in"))
    with pytest.raises(UsageError, match="matches no tensor"):
        plan(*pipelines, include=["transformer/*"])


@pytest.mark.parametrize("alone", [False, True], ids=["in the pipeline", "a repository of its own"])
def test_a_lone_component_goes_onto_the_pipelines(alone: bool, pipelines: list[Path], tmp_path: Path) -> None:
    expert = pipelines[1] / "unet"
    if alone:
        expert = expert.rename(tmp_path / "finetuned")
    modelmerge.merge(pipelines[0], [expert], tmp_path / "out", method="average")
    assert_close(read_folders(tmp_path / "out"), mean(1, folders=(UNET,)))
    assert any("its tensors are the base's in 'unet/'" in remark for remark in plan(pipelines[0], expert)["remarks"])
    # A component that is the base has no folders in its names.
    modelmerge.merge(pipelines[0] / "unet", {"x": expert, "y": pipelines[2]}, tmp_path / "part", method="average")
    assert_close(load_file(tmp_path / "part" / "diffusion_pytorch_model.safetensors"),
                 {n.removeprefix("unet/"): t for n, t in mean(1, 2).items() if n.startswith("unet/")})  # fmt: skip


def test_what_could_be_several_components_is_an_error(tmp_path: Path) -> None:
    base, expert = tmp_path / "base", tmp_path / "expert"
    for folder, seed in (("transformer", 0), ("transformer_2", 1)):
        write_shards(base / folder, states(seed)[UNET], "diffusion_pytorch_model")
    (base / "model_index.json").write_text(json.dumps({f: ["d", "T"] for f in ("transformer", "transformer_2")}))
    write_shards(expert, states(2)[UNET], "diffusion_pytorch_model")
    with pytest.raises(PlanError, match=r"transformer/ or transformer_2/; which is meant cannot be told"):
        plan(base, expert)
    expert = expert.rename(tmp_path / "transformer_2")
    modelmerge.merge(base, [expert], tmp_path / "out", method="average")
    assert same(load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"), states(0)[UNET])


def test_an_expert_that_lacks_a_component_is_named_with_the_way_out(
    pipelines: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(pipelines[2] / "vae")
    words = ["merge", "average", *map(str, pipelines), "-o", str(tmp_path / "out")]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "'vae/encoder.conv_in.weight': in a, but missing in b" in error
    assert "--exclude" in error
    assert main([*words, "--exclude", "vae/*"]) == 0
    assert_close(read_folders(tmp_path / "out"), mean(1, 2, folders=(UNET, TEXT)))


def test_configs_are_compared_component_by_component(pipelines: list[Path]) -> None:
    (pipelines[1] / "unet/config.json").write_text(json.dumps({**CONFIGS[UNET], "attention_head_dim": 4}))
    with pytest.raises(PlanError, match=r"'a': unet/config.json: attention_head_dim"):
        plan(*pipelines)


def test_what_networks_predict_is_compared(pipelines: list[Path]) -> None:
    for pipeline, kind in zip(pipelines, ("epsilon", "v_prediction", "epsilon"), strict=True):
        (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))
    with pytest.raises(PlanError, match=r"'a': scheduler/scheduler_config.json: prediction_type is \"v_prediction\""):
        plan(*pipelines)
    assert plan(pipelines[0], pipelines[2])


def test_a_component_that_has_nothing_in_common_is_an_error(pipelines: list[Path]) -> None:
    write = {"other.weight": torch.zeros(3)}
    (pipelines[1] / "vae/diffusion_pytorch_model.safetensors").write_bytes(save(write))
    with pytest.raises(PlanError, match=r"no tensor of the base's 'vae/\*' is in a"):
        plan(*pipelines)


def test_tokenizers_of_text_encoders_are_compared(pipelines: list[Path], tmp_path: Path) -> None:
    other = write_pipeline(tmp_path / "other", 3, tokens="abcdfe")
    with pytest.raises(PlanError, match=r"(?s)number their tokens differently.*text_encoder/: 'other'"):
        plan(pipelines[0], other)
    assert plan(pipelines[0], other, exclude=["*token_embedding*"])


def test_the_dtype_reaches_every_components_config(pipelines: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average", dtype="bfloat16")
    assert {t.dtype for t in read_folders(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/text_encoder/config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out/unet/config.json").read_text()) == CONFIGS[UNET]


def test_replays_and_digests_hold_for_pipelines(pipelines: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="ties", resume=True)
    modelmerge.replay(tmp_path / "out", tmp_path / "again")
    assert same(read_folders(tmp_path / "out"), read_folders(tmp_path / "again"))
    assert all(file["same"] for file in modelmerge.verify(tmp_path / "out")["files"])
    (tmp_path / "out/vae/config.json").write_text("{}")
    assert [f["name"] for f in modelmerge.verify(tmp_path / "out")["files"] if not f["same"]] == ["vae/config.json"]


@pytest.mark.parametrize("options", [{}, {"rank": 8}])
def test_task_vectors_of_pipelines_stand_for_their_experts(
    options: dict[str, int], pipelines: list[Path], tmp_path: Path
) -> None:
    modelmerge.extract(pipelines[0], pipelines[1:], tmp_path / "vectors", **options)  # type: ignore[arg-type]
    vectors = [tmp_path / "vectors" / name for name in ("a", "b")]
    modelmerge.merge(pipelines[0], vectors, tmp_path / "out", method="average")
    assert_close(read_folders(tmp_path / "out"), mean(1, 2))


def test_disentangled_pipelines_are_pipelines(pipelines: list[Path], tmp_path: Path) -> None:
    modelmerge.disentangle(pipelines[0], pipelines[1:], tmp_path / "vectors", method="awd", full_experts=True, steps=3)
    experts = [tmp_path / "vectors/experts" / name for name in ("a", "b")]
    assert {"unet/config.json", "model_index.json", "tokenizer/vocab.json"} <= files(experts[0])
    merged = modelmerge.merge(pipelines[0], experts, tmp_path / "full", method="average")
    assert merged["tensors"]["merged"] == 6
    vectors = [tmp_path / "vectors" / name for name in ("a", "b")]
    modelmerge.merge(pipelines[0], vectors, tmp_path / "out", method="average")
    assert_close(read_folders(tmp_path / "full"), read_folders(tmp_path / "out"))


def test_weights_of_pipelines_are_evaluated(
    pipelines: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average")
    assert main(["eval", "weights", str(tmp_path / "out"), "--json"]) == 0
    assert "text_encoder/" in capsys.readouterr().out


def test_an_adapter_goes_onto_the_component_that_it_fits(
    pipelines: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {
        "base_model.model.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.randn(2, 8),
        "base_model.model.down_blocks.0.attentions.0.to_q.lora_B.weight": torch.randn(8, 2),
    }
    adapter = tmp_path / "lora"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, adapter / "adapter_model.safetensors")
    modelmerge.merge(pipelines[0], [adapter], tmp_path / "out", method="average")
    merged, base = read_folders(tmp_path / "out"), mean(0)
    name = "unet/down_blocks.0.attentions.0.to_q.weight"
    a, b = factors.values()
    torch.testing.assert_close(merged.pop(name), base.pop(name) + b @ a)
    assert same(merged, base)
    words = ["merge", "average", *map(str, pipelines), "-o", str(tmp_path / "lora-out"), "--as-lora", "2"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "--as-lora" in error
    assert "several components" in error


# --- modules of sentence-transformers ---


def write_modules(directory: Path, seed: int) -> Path:
    """A transformer in the root, a Dense, and a router with a Dense of its own."""
    generator = torch.Generator().manual_seed(seed)
    for folder in ("", "2_Dense", "3_Router/query_0_Dense"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
        (directory / folder / "config.json").write_text("{}")
        save_file({"linear.weight": torch.randn(4, 4, generator=generator)}, directory / folder / "model.safetensors")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    paths = ("", "1_Pooling", "2_Dense", "3_Router")
    (directory / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    router = {"types": {"query_0_Dense": "x.Dense"}, "structure": {"query": ["query_0_Dense"]}}
    (directory / "3_Router/router_config.json").write_text(json.dumps(router))
    return directory


def test_modules_within_modules_are_merged_and_furnished(tmp_path: Path) -> None:
    models = [write_modules(tmp_path / name, seed) for seed, name in enumerate(("base", "a", "b"))]
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="average")
    _, a, b = (read_folders(model) for model in models)
    assert_close(read_folders(tmp_path / "out"), {name: (a[name] + b[name]) / 2 for name in a})
    assert files(tmp_path / "out") == files(models[0]) | {"README.md", "modelmerge.json"}
    assert "library_name: sentence-transformers" in (tmp_path / "out" / "README.md").read_text()


# --- names of files ---


@pytest.mark.parametrize(
    ("names", "filename", "index"),
    [
        (("model.safetensors", "model.fp16.safetensors"), "model.safetensors", "model.safetensors.index.json"),
        (("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"),
         "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        (("diffusion_pytorch_model.fp16.safetensors",), "diffusion_pytorch_model.fp16.safetensors",
         "diffusion_pytorch_model.safetensors.index.fp16.json"),
        (("pytorch_model.fp16.bin",), "model.fp16.safetensors", "model.safetensors.index.fp16.json"),
        (("pytorch_model.bin",), "model.safetensors", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_files_go_by_the_names_that_libraries_give_them(
    names: tuple[str, ...], filename: str, index: str, tmp_path: Path
) -> None:
    for name in names:
        state = {"w.weight": torch.ones(4)}
        torch.save(state, tmp_path / name) if name.endswith(".bin") else save_file(state, tmp_path / name)
    model = open_checkpoint(parse(str(tmp_path)))
    assert (model.components[""].filename, model.components[""].index) == (filename, index)
    assert ("variant" in " ".join(model.remarks)) == (".fp16." in filename)


def test_any_index_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "base", states(0)[UNET], "consolidated")
    write_shards(tmp_path / "a", states(1)[UNET], "consolidated")
    modelmerge.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="average", max_shard_size="300")
    assert "consolidated.safetensors.index.json" in files(tmp_path / "out")
    with pytest.raises(ReferenceNotFound, match="the index of shards"):
        open_checkpoint(parse(str(tmp_path / "base/consolidated.safetensors.index.json")))


def _two_variants(base: Path) -> None:
    folder = base / "vae"
    for variant in ("fp16", "non_ema"):
        shutil.copy(
            folder / "diffusion_pytorch_model.safetensors", folder / f"diffusion_pytorch_model.{variant}.safetensors"
        )
    (folder / "diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_two_variants, "fp16.safetensors, .*non_ema.safetensors: which is meant cannot be told"),
        (lambda base: (base / "model_index.json").write_text("[]"), "json: malformed: it must be an object, not"),
        (lambda base: (base / "modules.json").write_text("{}"), "json: malformed: it must be a list, not"),
        (lambda base: (base / "modules.json").write_text('[{"path": "../x"}]'), "outside the directory"),
        (lambda base: (base / "modules.json").write_text('[{"path": 7}]'), "outside the directory"),
        (lambda base: next((base / "unet").glob("*-00001-*")).unlink(), "missing 1 of 2 shards"),
    ],
    ids=["variants", "pipeline", "modules", "outside", "number", "shard"],
)  # fmt: skip
def test_what_cannot_be_told_or_is_malformed_is_an_error(
    spoil: Callable[[Path], object], words: str, pipelines: list[Path]
) -> None:
    spoil(pipelines[0])
    with pytest.raises(CheckpointError, match=words):
        plan(*pipelines)


# --- files of one piece ---

METADATA = {"format": "pt", "modelspec.title": "A model", "modelspec.architecture": "stable-diffusion-xl-v1-base"}


@pytest.fixture
def lone(tmp_path: Path) -> list[Path]:
    """A base and an expert as files; the base says something of itself."""
    base = base_state()
    save_file(base, tmp_path / "sd_{xl}.v1.safetensors", metadata=METADATA)
    save_file(expert_state(base, 0), tmp_path / "tuned.safetensors")
    return [tmp_path / "sd_{xl}.v1.safetensors", tmp_path / "tuned.safetensors"]


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stream:
        return stream.metadata()


def test_a_lone_file_stays_one_with_what_it_says_of_itself(lone: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(lone[0], [lone[1]], tmp_path / "out", method="average")
    assert files(tmp_path / "out") == {"model.safetensors", "README.md", "modelmerge.json"}
    assert metadata(tmp_path / "out" / "model.safetensors") == METADATA
    # The output is a model again, and one that stays in one piece.
    modelmerge.merge(tmp_path / "out", [lone[1]], tmp_path / "again", method="average")
    assert metadata(tmp_path / "again" / "model.safetensors") == METADATA
    assert same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))


def test_a_lone_file_is_split_where_a_size_is_named(lone: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(lone[0], [lone[1]], tmp_path / "out", method="average", max_shard_size="2KB")
    names = files(tmp_path / "out")
    assert "model.safetensors.index.json" in names
    assert any(name.startswith("model-00001-of-") for name in names)
    modelmerge.replay(tmp_path / "out", tmp_path / "again")
    assert files(tmp_path / "again") == names


def test_a_pickled_lone_file_becomes_a_safetensors_file(lone: list[Path], tmp_path: Path) -> None:
    torch.save(base_state(), tmp_path / "old.ckpt")
    modelmerge.merge(tmp_path / "old.ckpt", [lone[1]], tmp_path / "out", method="average")
    assert files(tmp_path / "out") == {"model.safetensors", "README.md", "modelmerge.json"}


def test_a_lone_file_of_many_gigabytes_is_planned_as_one(tmp_path: Path) -> None:
    """A header of 7 GB over a file that is nearly all hole."""
    names = []
    for name in ("base", "a"):
        entry = {"dtype": "F16", "shape": [350, 10_000_000], "data_offsets": [0, 7_000_000_000]}
        text = json.dumps({"__metadata__": {"modelspec.title": name}, "w.weight": entry}).encode()
        names.append(tmp_path / f"{name}.safetensors")
        with names[-1].open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + 7_000_000_000)
    assert plan(*names)["shards"] == ["model.safetensors"]
    assert len(plan(*names, max_shard_size="5GB")["shards"]) == 1  # its one tensor is larger


# --- the Hub ---


def test_a_pipeline_on_the_hub_is_outlined_fetched_and_merged(
    hub: FakeHub, pipelines: list[Path], tmp_path: Path
) -> None:
    shutil.copy(pipelines[0] / "vae/diffusion_pytorch_model.safetensors", pipelines[0] / "all-in-one.safetensors")
    hub.add("org/base", pipelines[0])
    hub.add("org/a", pipelines[1])
    made = modelmerge.merge("org/base", ["org/a", "b=hf://org/a/unet"], method="average", dry_run=True,
                            include=["unet/*"])  # fmt: skip
    assert made["shards"][0] == "unet/diffusion_pytorch_model.safetensors"
    assert all(request.range for request in hub.asked("GET .*safetensors$"))
    for stream in (False, True):
        out = tmp_path / f"out-{stream}"
        modelmerge.merge("org/base", ["org/a"], out, method="average", stream=stream)
        assert_close(read_folders(out), mean(1))
        assert {"scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"} <= files(out)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_stale_weights_of_components_go_with_a_push(
    hub: FakeHub, pipelines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", OWNER)
    stale = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)}
    hub.add("org/merged", {**stale, "unet/diffusion_pytorch_model.safetensors.index.fp16.json": b"old"})
    modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average")
    modelmerge.push(tmp_path / "out", "org/merged")
    assert hub.files("org/merged").keys() - {".gitattributes"} == files(tmp_path / "out")


def test_tensors_in_memory_are_merged_as_before() -> None:
    base = base_state()
    experts = [expert_state(base, i) for i in range(2)]
    merged = modelmerge.merge(base, experts, method="average")
    assert merged.keys() == base.keys()


def test_an_error_leaves_nothing_behind(pipelines: list[Path], tmp_path: Path) -> None:
    state = states(1)[UNET]
    state["conv_in.weight"][0] = float("nan")
    write_shards(pipelines[1] / "unet", state, "diffusion_pytorch_model")
    with pytest.raises(ModelMergeError, match="NaN"):
        modelmerge.merge(pipelines[0], pipelines[1:], tmp_path / "out", method="average")
    assert not (tmp_path / "out").exists()
