"""The guide's mergekit configurations: each runs as it stands, and is the command that stands under it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import modelmerge
from modelmerge.cli import main
from tests.support.checkpoints import State, expert_state, read, same_bits, write
from tests.support.guides import GUIDES, blocks, commands

TEXT = GUIDES["configurations"].read_text()
KINDS = {section.splitlines()[0]: section for section in TEXT.split("\n## ")[1:]}
LAYERS, WIDTH, TOKENS = 32, 8, 24
# The experts of mistral, by the tokens that each has added.
EXPERTS = {
    "math": [],
    "code": [],
    "poet": [],
    "tutor": [],
    "zephyr": ["<|user|>"],
    "hermes": ["<|im_start|>", "<|im_end|>"],
}
TEMPLATES = {"zephyr": "{{ messages }}", "hermes": "{{ messages }}"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the guide names, with as many layers as it says."""
    root = tmp_path_factory.mktemp("shelf")
    shapes = {"model.embed_tokens.weight": (TOKENS, WIDTH), "lm_head.weight": (TOKENS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.self_attn.q_proj.weight": (WIDTH, WIDTH)}
        shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (12, WIDTH)}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).mul(0.1) for name, shape in shapes.items()}
    model(root / "mistral", base, [], None)
    for seed, (name, added) in enumerate(EXPERTS.items()):
        model(root / name, expert_state(base, seed), added, TEMPLATES.get(name))
    for name in ("math-lora", "code-lora"):
        adapter(root / name, generator)
    return root


def model(place: Path, state: State, added: list[str], template: str | None) -> None:
    rows = torch.full((len(added), WIDTH), 0.1)
    write(place, {name: torch.cat([t, rows]) if "layers" not in name else t for name, t in state.items()}, config=False)
    config = {"model_type": "mistral", "num_hidden_layers": LAYERS, "vocab_size": TOKENS + len(added)}
    (place / "config.json").write_text(json.dumps(config))
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, TOKENS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))


def adapter(place: Path, generator: torch.Generator) -> None:
    place.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for half, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2))):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{half}.weight"
            tensors[key] = torch.randn(shape, generator=generator).mul(0.1)
    save_file(tensors, place / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "mistral", "r": 2, "lora_alpha": 4,
              "target_modules": ["q_proj"]}  # fmt: skip
    (place / "adapter_config.json").write_text(json.dumps(config))


def test_there_are_five() -> None:
    assert len(KINDS) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_the_command_under_it(
    kind: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(KINDS[kind], "yaml")
    Path("c.yml").write_text(text)
    manifest = modelmerge.replay("c.yml", "merged")
    lines = [shlex.split(line)[1:] for line in commands(KINDS[kind])]
    assert lines
    for words in lines:
        assert main(words) == 0, capsys.readouterr().err
    last = Path(lines[-1][-1])
    merged = read(Path("merged"))
    assert same_bits(read(last), merged)
    assert (last / "config.json").read_bytes() == Path("merged/config.json").read_bytes()
    assert not any("chat template" in note for note in manifest["notes"])
    # What the text beside it says of the output.
    rows = TOKENS + sum(map(len, EXPERTS.values())) * ("vocabularies" in kind)
    assert len(merged["lm_head.weight"]) == rows
    assert Path("merged/chat_template.jinja").exists() == ("vocabularies" in kind)
    depth = 48 if kind == "Stacked layers" else LAYERS
    assert json.loads(Path("merged/config.json").read_text())["num_hidden_layers"] == depth
    assert sum("mlp" in name for name in merged) == depth
