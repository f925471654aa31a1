"""What lies beside merged weights: the base's files, an expert's where it is named, and the dtype that was written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import modelmerge
from modelmerge.checkpoint.companions import kind_of
from modelmerge.cli import main
from modelmerge.errors import PlanError, UsageError
from tests.support.checkpoints import base_state, expert_state, write
from tests.support.hub_server import FakeHub

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 24,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m['content'] }} c {% endfor %}"
WORDS = ("a", "b", "c", "d")


def language_model(directory: Path, *, eos: int | None = 2, template: str | None = None) -> Path:
    """A tiny Llama with its tokenizer, as transformers saves them; `eos` ends its texts."""
    torch.manual_seed(sum(directory.name.encode()))
    config = transformers.LlamaConfig(**SMALL, eos_token_id=eos)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(directory)
    vocab = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")
    inner = tokenizers.Tokenizer(vocab)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=WORDS[eos or 2])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def chat(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an expert that chats and ends its texts otherwise."""
    return language_model(tmp_path / "base"), language_model(tmp_path / "chat", eos=3, template=TEMPLATE)


def merged(models: Any, out: Path, **options: Any) -> dict[str, Any]:
    base, *experts = models
    return modelmerge.merge(base, experts, out, method="average", **options)


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


# --- the dtype ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_transformers_loads_has_the_dtype_that_was_written(
    stored: torch.dtype, dtype: Any, tmp_path: Path
) -> None:
    for name in ("base", "e0"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(stored).save_pretrained(tmp_path / name)
    merged((tmp_path / "base", tmp_path / "e0"), tmp_path / "out", dtype=dtype)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    before, after = ((tmp_path / name / "config.json").read_bytes() for name in ("base", "out"))
    assert after == before.replace(str(stored).removeprefix("torch.").encode(), dtype.encode())


def test_models_inside_a_model_are_loaded_as_they_were_written(tmp_path: Path) -> None:
    text = {**SMALL, "model_type": "llama", "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    for name in ("base", "e0"):
        transformers.LlavaForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / name)
    merged((tmp_path / "base", tmp_path / "e0"), tmp_path / "out", dtype="float32")
    assert b"bfloat16" in (tmp_path / "base" / "config.json").read_bytes()
    assert b"bfloat16" not in (tmp_path / "out" / "config.json").read_bytes()
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_config_that_says_no_dtype_says_it_to_every_reader(tmp_path: Path) -> None:
    for name in ("base", "e0"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path / name)
        config = {key: value for key, value in config_of(tmp_path / name).items() if key != "dtype"}
        (tmp_path / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    models = (tmp_path / "base", tmp_path / "e0")
    merged(models, tmp_path / "out", dtype="bfloat16")
    assert config_of(tmp_path / "out") == {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_without_dtype_the_config_is_the_bases_even_where_it_is_wrong(tmp_path: Path) -> None:
    state = base_state()
    models = [write(tmp_path / name, state) for name in ("base", "e0")]
    for model in models:
        (model / "config.json").write_text('{"model_type": "tiny",  "dtype":"bfloat16"}')
    merged(models, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (models[0] / "config.json").read_bytes()


# --- an expert's tokenizer ---


def test_the_tokenizer_and_what_ends_a_text_come_from_the_expert(chat: tuple[Path, Path], tmp_path: Path) -> None:
    base, expert = chat
    out = tmp_path / "out"
    (base / "added_tokens.json").write_text("{}")  # the base's alone: of another tokenizer than the expert's
    (base / "LICENSE").write_text("free")
    manifest = merged((base, expert), out, files_from="chat")
    mine = {file.name for file in expert.iterdir() if kind_of(file.name)}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= mine
    assert {file.name for file in out.iterdir() if kind_of(file.name)} == mine
    for name in mine:
        assert (out / name).read_bytes() == (expert / name).read_bytes()
    assert (out / "LICENSE").read_text() == "free"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes().replace(
        b'"eos_token_id": 2', b'"eos_token_id": 3'
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b c "
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 3
    names = ", ".join(sorted(mine))
    assert manifest["notes"] == [
        f"From 'chat', not from the base: {names}.",
        "config.json says of tokens what 'chat' says: eos_token_id 3.",
    ]
    assert all(f"- {note}" in (out / "README.md").read_text() for note in manifest["notes"])
    assert all(entry["same"] for entry in modelmerge.verify(out)["files"])


def test_it_is_recorded_and_replayed(
    chat: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "ties", *map(str, chat), "--files-from", "chat", "--dtype", "bfloat16"]
    assert main([*words, "-o", str(tmp_path / "out"), "-q"]) == 0
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_text())
    assert manifest["recipe"]["files_from"] == "chat"
    assert "--files-from chat" in manifest["command"]
    assert "| `--files-from` | chat |" in (tmp_path / "out" / "README.md").read_text()
    file = str(tmp_path / "out" / "modelmerge.json")
    assert main(["merge", "--recipe", file, "-o", str(tmp_path / "again"), "-q"]) == 0
    assert main(["merge", "--recipe", file, "-o", str(tmp_path / "plain"), "-q", "--files-from", "base"]) == 0
    again, plain = (json.loads((tmp_path / n / "modelmerge.json").read_text())["files"] for n in ("again", "plain"))
    ours = {name: entry for name, entry in manifest["files"].items() if name != "README.md"}
    assert {name: entry for name, entry in again.items() if name != "README.md"} == ours
    assert "chat_template.jinja" not in plain
    assert plain["model.safetensors"] == again["model.safetensors"]
    assert "error" not in capsys.readouterr().err


def test_experts_of_a_layer_in_one_tensor_change_nothing_about_files(tmp_path: Path) -> None:
    """There the plan has other models than were opened, with a tensor for each matrix."""
    stack = {"model.layers.0.mlp.experts.down_proj": torch.randn(3, 8, 6)}
    models = [write(tmp_path / name, {**base_state(), **stack}) for name in ("base", "math")]
    (models[1] / "chat_template.jinja").write_text(TEMPLATE)
    (models[0] / "vocab.txt").write_text("the base's own")
    plain = modelmerge.merge(models[0], models[1:], tmp_path / "plain", method="tsv-m", dtype="float16")
    assert (tmp_path / "plain" / "vocab.txt").exists()
    assert [note for note in plain["notes"] if "not from the base" in note] == []
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="tsv-m", files_from="math", dtype="float16")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert config_of(tmp_path / "out")["dtype"] == config_of(tmp_path / "plain")["dtype"] == "float16"


def test_naming_the_base_changes_nothing(chat: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = (merged(chat, tmp_path / name, **more) for name, more in (("o", {}), ("p", {"files_from": "base"})))
    assert one["files"].keys() == other["files"].keys()
    assert {**one, "files": 0, "seconds": 0, "created": 0, "command": 0} == {
        **other, "files": 0, "seconds": 0, "created": 0, "command": 0
    }  # fmt: skip


def test_an_adapter_may_be_named(chat: tuple[Path, Path], tmp_path: Path) -> None:
    import peft

    base, expert = chat
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "lora")
    transformers.AutoTokenizer.from_pretrained(expert).save_pretrained(tmp_path / "lora")
    manifest = merged((base, tmp_path / "lora"), tmp_path / "out", files_from="lora")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert "'lora' has no generation config: the base's stays." in manifest["notes"]
    assert any("no config that says which tokens begin and end texts" in note for note in manifest["notes"])


def test_a_template_alone_leaves_the_bases_tokenizer(chat: tuple[Path, Path], tmp_path: Path) -> None:
    base, expert = chat
    for file in expert.iterdir():
        if kind_of(file.name) in ("tokenizer", "generation config"):
            file.unlink()
    merged((base, expert), tmp_path / "out", files_from="chat")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_without_the_option_experts_say_what_is_lost(
    chat: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "average", *map(str, chat), "-o", str(tmp_path / "out")]) == 0
    err = " ".join(capsys.readouterr().err.split())
    notes = json.loads((tmp_path / "out" / "modelmerge.json").read_text())["notes"]
    assert notes == [
        "'chat' has a chat template, and the base, whose files go along, has none: --files-from chat takes it over.",
        "The texts of 'chat' end with token 3 (eos_token_id), the base's with 2: --files-from chat takes it over.",
    ]
    assert all(note in err for note in notes)
    assert merged(chat, tmp_path / "out", dry_run=True)["remarks"] == notes


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_is_seen_wherever_it_is(place: str, tmp_path: Path) -> None:
    models = [write(tmp_path / name, base_state(seed=seed)) for seed, name in enumerate(("base", "one", "two"))]
    for model in models[1:]:
        (model / place).write_text('{"chat_template": "x"}')
    notes = merged(models, tmp_path / "out")["notes"]
    assert len(notes) == 1
    assert notes[0].startswith("'one' and 'two' have a chat template")
    (models[0] / place).write_text('{"chat_template": "y"}')
    assert merged(models, tmp_path / "other")["notes"] == []


def test_a_generation_config_of_experts_alone_is_said(tmp_path: Path) -> None:
    models = [write(tmp_path / name, base_state(seed=seed)) for seed, name in enumerate(("base", "one", "two"))]
    (models[1] / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    notes = merged(models, tmp_path / "out")["notes"]
    assert notes == ["'one' has a generation_config.json, and the base has none: --files-from one takes it over."]
    (models[0] / "generation_config.json").write_text('{"eos_token_id": [5, 4]}')
    assert merged(models, tmp_path / "other")["notes"] == []
    (models[0] / "generation_config.json").write_bytes(b"\xff{")  # for others to complain of
    assert merged(models, tmp_path / "third")["notes"] == []


# --- what is refused ---


def test_an_expert_must_be_there_and_have_such_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [write(tmp_path / name, base_state()) for name in ("base", "math", "code")]
    words = ["merge", "average", *map(str, models), "-o", str(tmp_path / "out"), "--files-from"]
    assert main([*words, "maths"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "--files-from names 'maths', which is no expert" in err
    assert "did you mean 'math'?" in err
    (models[1] / "tokenizer.json").unlink()
    assert main([*words, "math", "-n"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "'math' has none beside its weights" in err
    with pytest.raises(PlanError, match="none beside its weights"):
        merged((models[0], f"lone={models[2] / 'model.safetensors'}"), tmp_path / "out", files_from="lone")
    with pytest.raises(UsageError, match="as_lora"):
        merged(models, tmp_path / "out", files_from="code", as_lora=2)
    assert not (tmp_path / "out").exists()


# --- on the Hub ---


@pytest.mark.parametrize("inside", ["", "final"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_experts_files_are_fetched_from_the_hub(
    inside: str, stream: bool, hub: FakeHub, chat: tuple[Path, Path], tmp_path: Path
) -> None:
    base, expert = chat
    want = merged(chat, tmp_path / "here", files_from="chat")["files"]
    hub.add("org/base", base)
    folder = expert
    if inside:
        folder = tmp_path / "repository"
        folder.mkdir()
        expert.rename(folder / inside)
    hub.add("org/chat", folder)
    reference = f"chat=hf://org/chat/{inside}" if inside else "chat=org/chat"
    plan = modelmerge.merge("org/base", [reference], method="average", files_from="chat", stream=stream, dry_run=True)
    assert any("From 'chat'" in remark for remark in plan["remarks"])
    plain = modelmerge.merge("org/base", [reference], method="average", stream=stream, dry_run=True)
    assert any("chat template" in remark for remark in plain["remarks"])
    assert any("end with token 3" in remark for remark in plain["remarks"])
    # The tokenizers were compared, and are in the cache.
    size = (folder / inside / "chat_template.jinja").stat().st_size
    assert plan["bytes"]["download"] - plain["bytes"]["download"] == size
    got = merged(("org/base", reference), tmp_path / "there", files_from="chat", stream=stream)["files"]
    assert {n: e for n, e in got.items() if n != "README.md"} == {n: e for n, e in want.items() if n != "README.md"}


def test_searches_take_an_experts_files_too(chat: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = modelmerge.search(
        chat[0], [chat[1]], tmp_path / "out", method="task-arithmetic", tries={"scale": [0.5, 1.0]},
        metric=lambda model, task=None: 1.0, files_from="chat", dtype="bfloat16",
    )  # fmt: skip
    assert manifest["recipe"]["files_from"] == "chat"
    assert len(set(manifest["notes"])) == len(manifest["notes"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"


def test_tensors_in_memory_have_no_files(tmp_path: Path) -> None:
    base = base_state()
    with pytest.raises(PlanError, match="none beside its weights"):
        modelmerge.merge(base, {"math": expert_state(base, 0)}, method="average", files_from="math")
