"""Merged checkpoints load in transformers, and compute what a model computes that was merged in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelmerge
from tests.support.cards import loaded_by_card
from tests.support.checkpoints import read

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers are not ours
SCALE = 0.4
Model = Any  # a PreTrainedModel
WORDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP = {
    "text_config": {**TOWER, "vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 2},
    "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    "projection_dim": 12,
}

# name -> loader, config and what is in it; by name, for their modules take seconds to import
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": False}),
    "llama, tied": ("AutoModelForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True}),
    "qwen2": ("AutoModelForCausalLM", "Qwen2Config", {**SIZES, "tie_word_embeddings": False}),
    "qwen2, tied": ("AutoModelForCausalLM", "Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "mistral": ("AutoModelForCausalLM", "MistralConfig", SIZES),
    "gemma2": ("AutoModelForCausalLM", "Gemma2Config", {**SIZES, "head_dim": 4, "sliding_window": 8}),
    "mixtral": ("AutoModelForCausalLM", "MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "gpt2": ("AutoModelForCausalLM", "GPT2Config", {**GPT2, "eos_token_id": 2}),
    "t5": ("AutoModelForSeq2SeqLM", "T5Config", T5),
    "bert": ("AutoModelForMaskedLM", "BertConfig", BERT),
    "clip": ("AutoModel", "CLIPConfig", CLIP),
}


def architecture(name: str) -> tuple[Any, Any]:
    """The loader and the config."""

    import transformers

    loader, config, values = ARCHITECTURES[name]
    return getattr(transformers, loader), getattr(transformers, config)(**values)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(loader: Any, config: Any) -> Model:
    torch.manual_seed(0)
    return loader.from_config(copy.deepcopy(config)).eval()


def changed(model: Model, loader: Any, seed: int) -> Model:
    """A model of its own with noise on every parameter; what is tied stays tied."""
    expert = built(loader, model.config)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for mine, other in zip(expert.parameters(), model.parameters(), strict=True):
            mine.copy_(other + 0.02 * torch.randn(other.shape, generator=generator))
    return expert


def in_memory(base: Model, loader: Any, experts: list[Model]) -> Model:
    """Task arithmetic on the models' parameters, in plain torch."""
    merged = built(loader, base.config)
    with torch.no_grad():
        for mine, theta, *others in zip(
            merged.parameters(), base.parameters(), *(e.parameters() for e in experts), strict=True
        ):
            mine.copy_(theta + SCALE * sum(other - theta for other in others))
    return merged


def outputs(model: Model) -> torch.Tensor:
    import transformers

    with torch.no_grad():
        if isinstance(model, transformers.CLIPModel):
            pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            return model(input_ids=WORDS, pixel_values=pixels).logits_per_image
        if model.config.is_encoder_decoder:
            return model(input_ids=WORDS, decoder_input_ids=WORDS).logits
        return model(input_ids=WORDS).logits


def loaded(loader: Any, directory: Path) -> Model:
    """The model of a directory; nothing missing, nothing left over."""
    model, told = loader.from_pretrained(directory, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return model.eval()


def save_pickled(model: Model, directory: Path) -> None:
    """As transformers saved models before safetensors, with every name of a tied tensor."""
    model.save_pretrained(directory)
    names = set(read(directory))
    (directory / "model.safetensors").unlink()
    assert names <= set(model.state_dict()), "its names in files are others than in memory"
    torch.save(model.state_dict(), directory / "pytorch_model.bin")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_model_computes_what_one_merged_in_memory_does(name: str, tmp_path: Path) -> None:
    loader, config = architecture(name)
    base = built(loader, config)
    experts = [changed(base, loader, seed) for seed in range(3)]
    for label, model in zip(("base", "e0", "e1", "e2"), (base, *experts), strict=True):
        model.save_pretrained(tmp_path / label)
    paths = [tmp_path / f"e{i}" for i in range(3)]
    modelmerge.merge(tmp_path / "base", paths, tmp_path / "out", method="task-arithmetic", scale=SCALE)
    assert read(tmp_path / "out").keys() == read(tmp_path / "base").keys()
    want, got = outputs(in_memory(base, loader, experts)), outputs(loaded(loader, tmp_path / "out"))
    assert (want - outputs(base)).abs().max() > 1e-2
    assert torch.allclose(got, want, atol=1e-5)
    as_told = loaded_by_card(tmp_path / "out")["model"].eval()
    assert type(as_told) is type(base)
    assert torch.allclose(outputs(as_told), want, atol=1e-5)


@pytest.mark.parametrize("pickled", ["base", "experts", "all"])
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "gpt2", "t5", "bert"])
def test_pickled_models_with_their_ties_compute_the_same(name: str, pickled: str, tmp_path: Path) -> None:
    """Pickles hold every name of a tied tensor, safetensors one: the output has the base's names."""
    loader, config = architecture(name)
    base = built(loader, config)
    experts = [changed(base, loader, seed) for seed in range(2)]
    for label, model in zip(("base", "e0", "e1"), (base, *experts), strict=True):
        if pickled == "all" or (pickled == "base") == (label == "base"):
            save_pickled(model, tmp_path / label)
        else:
            model.save_pretrained(tmp_path / label)
    paths = [tmp_path / "e0", tmp_path / "e1"]
    modelmerge.merge(tmp_path / "base", paths, tmp_path / "out", method="task-arithmetic", scale=SCALE)
    base_names = set(base.state_dict()) if pickled != "experts" else set(read(tmp_path / "base"))
    assert read(tmp_path / "out").keys() == base_names
    want = outputs(in_memory(base, loader, experts))
    assert torch.allclose(outputs(loaded(loader, tmp_path / "out")), want, atol=1e-5)


def test_a_t5_with_a_head_of_its_own_keeps_it_own(tmp_path: Path) -> None:
    """As Flan-T5: the config may claim a tie, the files say otherwise."""
    loader, config = architecture("t5")
    built(loader, config).save_pretrained(tmp_path / "tied")
    state = read(tmp_path / "tied")
    state["lm_head.weight"] = torch.randn(32, 16, generator=torch.Generator().manual_seed(5)) * 0.1
    save_file(state, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    base = loaded(loader, tmp_path / "tied")
    assert not torch.equal(base.lm_head.weight, base.shared.weight)
    base.save_pretrained(tmp_path / "base")
    assert "lm_head.weight" in read(tmp_path / "base")
    experts = []
    for seed in range(2):
        expert = loaded(loader, tmp_path / "base")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        expert.save_pretrained(tmp_path / f"e{seed}")
        experts.append(expert)
    modelmerge.merge(
        tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"], tmp_path / "out", method="task-arithmetic", scale=SCALE
    )
    merged = loaded(loader, tmp_path / "base")
    with torch.no_grad():
        for mine, *others in zip(merged.parameters(), *(e.parameters() for e in experts), strict=True):
            mine.copy_(mine + SCALE * sum(other - mine for other in others))
    assert torch.allclose(outputs(loaded(loader, tmp_path / "out")), outputs(merged), atol=1e-5)


@pytest.mark.parametrize("bare", [False, True], ids=["as transformers 4 saves", "as transformers 5 saves"])
def test_vision_towers_are_merged_into_a_whole_clip(bare: bool, tmp_path: Path) -> None:
    import transformers

    loader, config = architecture("clip")
    base = built(loader, config)
    experts = [changed(base, loader, seed) for seed in range(2)]
    base.save_pretrained(tmp_path / "base")
    for i, expert in enumerate(experts):
        tower = transformers.CLIPVisionModel(config.vision_config)
        tower.load_state_dict(tower_state(expert, tower))
        tower.save_pretrained(tmp_path / f"e{i}")
        state = {name.removeprefix("vision_model."): tensor for name, tensor in read(tmp_path / f"e{i}").items()}
        state = {name if bare else f"vision_model.{name}": tensor for name, tensor in state.items()}
        save_file(state, tmp_path / f"e{i}" / "model.safetensors", metadata={"format": "pt"})
    manifest = modelmerge.merge(
        tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"], tmp_path / "out", method="task-arithmetic", scale=SCALE
    )
    assert any("with 'vision_model.' in front" in note for note in manifest["notes"]) == bare
    origin, got = read(tmp_path / "base"), read(tmp_path / "out")
    assert got.keys() == origin.keys()
    assert all(torch.equal(got[n], origin[n]) for n in origin if not n.startswith("vision_model."))
    want = in_memory(base, loader, experts)
    merged = loaded(loader, tmp_path / "out")
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen, expected = (m.vision_model(pixel_values=pixels).pooler_output for m in (merged, want))
    assert torch.allclose(seen, expected, atol=1e-5)
    assert not torch.allclose(seen, base.vision_model(pixel_values=pixels).pooler_output, atol=1e-3)


def tower_state(whole: Any, tower: Any) -> dict[str, torch.Tensor]:
    """The vision tower's parameters, under the names that this version has for them in memory."""
    prefix = next(iter(tower.state_dict())).partition("embeddings")[0]
    return {prefix + name: tensor for name, tensor in whole.vision_model.state_dict().items()}


def test_models_with_heads_are_experts_of_a_base_without(tmp_path: Path) -> None:
    """GPT-2 as published has no `transformer.` before its names, and no head."""

    import transformers

    _, config = architecture("gpt2")
    whole = built(transformers.AutoModelForCausalLM, config)
    whole.transformer.save_pretrained(tmp_path / "base")
    assert "wte.weight" in read(tmp_path / "base")
    experts = [changed(whole, transformers.AutoModelForCausalLM, seed) for seed in range(2)]
    experts[0].save_pretrained(tmp_path / "e0")
    save_pickled(experts[1], tmp_path / "e1")
    modelmerge.merge(
        tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"], tmp_path / "out", method="task-arithmetic", scale=SCALE
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(
        outputs(merged), outputs(in_memory(whole, transformers.AutoModelForCausalLM, experts)), atol=1e-5
    )


def test_half_precision_is_rounded_once_and_loads_as_it_is(tmp_path: Path) -> None:
    loader, config = architecture("llama")
    base = built(loader, config).bfloat16()
    experts = [changed(base, loader, seed).bfloat16() for seed in range(2)]
    for label, model in zip(("base", "e0", "e1"), (base, *experts), strict=True):
        model.save_pretrained(tmp_path / label)
    modelmerge.merge(
        tmp_path / "base", [tmp_path / "e0", tmp_path / "e1"], tmp_path / "out", method="task-arithmetic", scale=SCALE
    )
    merged = loaded(loader, tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    for mine, theta, *others in zip(
        merged.parameters(), base.parameters(), *(e.parameters() for e in experts), strict=True
    ):
        exact = theta.double() + SCALE * sum(other.double() - theta.double() for other in others)
        assert torch.equal(mine, exact.float().bfloat16())


def test_a_vocabulary_that_grew_keeps_the_bases_rows(tmp_path: Path) -> None:
    loader, config = architecture("llama")
    base = built(loader, config)
    experts = [changed(base, loader, seed) for seed in range(2)]
    base.save_pretrained(tmp_path / "base")
    merged = in_memory(base, loader, experts)
    experts[0].resize_token_embeddings(35)
    for i, expert in enumerate(experts):
        expert.save_pretrained(tmp_path / f"e{i}")
    paths = [tmp_path / "e0", tmp_path / "e1"]
    with pytest.raises(modelmerge.errors.PlanError, match=r"\[32, 16\] in the base, but \[35, 16\] in e0"):
        modelmerge.merge(tmp_path / "base", paths, tmp_path / "out", method="average")
    modelmerge.merge(
        tmp_path / "base", paths, tmp_path / "out", method="task-arithmetic", scale=SCALE, on_mismatch="common-rows"
    )
    assert torch.allclose(outputs(loaded(loader, tmp_path / "out")), outputs(merged), atol=1e-5)
