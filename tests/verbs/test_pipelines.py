"""Merges of models of several components load in the libraries they are of, and compute what a merge in memory does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelmerge
from tests.support.cards import loaded_by_card

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own
Modules = dict[str, nn.Module]


def perturb(modules: Modules, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def states_of(modules: Modules) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {k: t.clone() for k, t in module.state_dict().items()} for name, module in modules.items()}


def merged_in_memory(make: Callable[[], Any], modules_of: Callable[[Any], Modules], root: Path, save: Any) -> Any:
    """Save a base and two experts of random changes under `root`, and give the average of the experts."""
    base = make()
    save(base, root / "base")
    each = []
    for seed in (1, 2):
        expert = make()
        for name, module in modules_of(expert).items():
            module.load_state_dict(modules_of(base)[name].state_dict())
        perturb(modules_of(expert), seed)
        save(expert, root / f"expert_{seed}")
        each.append(states_of(modules_of(expert)))
    for name, module in modules_of(base).items():
        state = {k: (each[0][name][k] + each[1][name][k]) / 2 if t.is_floating_point() else t
                 for k, t in each[0][name].items()}  # fmt: skip
        module.load_state_dict(state)
    return base


def merge(root: Path, **options: Any) -> Path:
    modelmerge.merge(root / "base", [root / "expert_1", root / "expert_2"], root / "out", method="average", **options)
    return root / "out"


def test_a_sentence_transformer_with_a_dense_module_encodes_as_a_merge_in_memory(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")

    def make() -> Any:
        transformer = Transformer(str(tmp_path / "bert"))
        return SentenceTransformer(
            modules=[transformer, Pooling(16), Dense(16, 8), Normalize()], device="cpu"
        )  # fmt: skip

    expected = merged_in_memory(
        make, lambda model: {"0": model[0], "2": model[2]}, tmp_path, lambda model, place: model.save(str(place))
    )
    texts = ["a b c", "h g", "d e f a"]
    found = SentenceTransformer(str(merge(tmp_path)), device="cpu")
    torch.testing.assert_close(
        found.encode(texts, convert_to_tensor=True), expected.encode(texts, convert_to_tensor=True),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    assert type(loaded_by_card(tmp_path / "out")["model"]) is SentenceTransformer
    base = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    assert (base.encode(texts) - found.encode(texts)).__abs__().max() > 1e-3


def stable_diffusion() -> Any:
    """A StableDiffusionPipeline of a few thousand weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, eos_token_id=2, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[8, 16], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16,
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=CLIPTextModel(text), tokenizer=None, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def image(pipeline: Any) -> torch.Tensor:
    """What a pipeline makes of noise and of a prompt's tokens in two steps [3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        prompt = pipeline.text_encoder(torch.tensor([[0, 5, 6, 2]]))[0]
        pipeline.set_progress_bar_config(disable=True)
        return torch.as_tensor(pipeline(
            prompt_embeds=prompt, negative_prompt_embeds=torch.zeros_like(prompt), latents=noise, num_inference_steps=2,
            output_type="pt",
        ).images[0])  # fmt: skip


def test_a_stable_diffusion_pipeline_makes_the_image_of_a_merge_in_memory(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    expected = merged_in_memory(
        stable_diffusion, lambda pipe: {n: getattr(pipe, n) for n in ("unet", "vae", "text_encoder")}, tmp_path,
        lambda pipe, place: pipe.save_pretrained(place),
    )  # fmt: skip
    out = merge(tmp_path)
    found = StableDiffusionPipeline.from_pretrained(out, tokenizer=None, safety_checker=None)
    torch.testing.assert_close(image(found), image(expected), rtol=0, atol=1e-5)
    before = StableDiffusionPipeline.from_pretrained(tmp_path / "base", tokenizer=None, safety_checker=None)
    assert (image(before) - image(found)).abs().max() > 1e-3


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def test_a_transformer_in_shards_computes_what_a_merge_in_memory_does(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    expected = merged_in_memory(
        flux, lambda model: {"": model}, tmp_path,
        lambda model, place: model.save_pretrained(place, max_shard_size="100KB"),
    )  # fmt: skip
    out = merge(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "base" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert len(list(out.glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 2
    found, report = FluxTransformer2DModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded_by_card(out)["model"]) is FluxTransformer2DModel
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, generator=generator), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 3, 32, generator=generator), "img_ids": torch.zeros(4, 3),
        "pooled_projections": torch.randn(1, 32, generator=generator), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with torch.no_grad():
        left, right = (model.eval()(**inputs).sample for model in (found, expected))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
