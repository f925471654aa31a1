"""LoRA files on diffusers' own models: merged here, and by diffusers' loaders with `fuse_lora`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.checkpoint.diffusion import networks
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse

pytestmark = [
    pytest.mark.slow,
    *map(pytest.mark.filterwarnings, ("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")),
]
TOLERANCE = 1e-6
State = dict[str, torch.Tensor]


def unet(kind: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    shared: dict[str, Any] = {"block_out_channels": (8, 16), "sample_size": 8, "norm_num_groups": 4}
    if kind == "sd":
        return UNet2DConditionModel(
            layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=2, **shared,
        )  # fmt: skip
    return UNet2DConditionModel(
        layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32, cross_attention_dim=16, **shared,
    )  # fmt: skip


def text(projects: bool = False) -> Any:
    import transformers

    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=2, vocab_size=50,
        projection_dim=8, max_position_embeddings=10, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel)(config)


def sd() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text(), tokenizer=None, unet=unet("sd"), scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=text(), text_encoder_2=text(projects=True), tokenizer=None, tokenizer_2=None,
        unet=unet("sdxl"), scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4], guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=text(), tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {"sd": sd, "sdxl": sdxl, "flux": flux}
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def saved(pipeline: Any, folder: Path) -> Path:
    """The networks of a pipeline that a LoRA may change, as it saves them."""
    index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
    for part in PARTS:
        network = getattr(pipeline, part, None)
        if network is not None:
            network.save_pretrained(folder / part)
            index[part] = [type(network).__module__.split(".")[0], type(network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def weights(folder: Path) -> State:
    files = [file for file in folder.rglob("*.safetensors") if file.parent.name in PARTS]
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def merged(base: Path, file: Path, out: Path) -> State:
    modelmerge.merge(str(base), [str(file)], out, method="task-arithmetic", scale=1.0)
    return weights(out) if base.is_dir() else load_file(next(out.glob("*.safetensors")))


def fused(pipeline: Any, file: Path, folder: Path) -> State:
    """What diffusers makes of it."""
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora(components=[part for part in PARTS if getattr(pipeline, part, None) is not None])
    pipeline.unload_lora_weights()
    return weights(saved(pipeline, folder))


def assert_equal(got: State, want: State, base: State) -> None:
    assert got.keys() == want.keys()
    assert sum(not torch.equal(got[name], base[name]) for name in base) > 5
    for name, tensor in want.items():
        assert torch.allclose(got[name].double(), tensor.double(), rtol=0, atol=TOLERANCE), name


def in_a_single_file(folder: Path) -> tuple[State, dict[str, list[Any]]]:
    """A denoiser's tensors by the original's names, and what each is made of."""
    state, made = load_file(next(folder.glob("*.safetensors"))), dict[str, list[Any]]()
    (network,) = networks(open_checkpoint(parse(str(folder))).tensors)
    for own, pieces in network.pieces.items():
        for piece in pieces:
            made.setdefault(piece.single, []).append((piece.single_first, own, piece))
    tensors = {}
    for name, parts in made.items():
        parts.sort(key=lambda part: part[0])
        rows = [state[own] if p.rows is None else state[own][p.diffusers_first :][: p.rows] for _, own, p in parts]
        tensors[name] = torch.cat(rows) if rows[0].dim() else rows[0]
    return tensors, made


def kohya(state: State, prefix: str, strip: str, keep: Callable[[str], bool]) -> State:
    """A file as sd-scripts writes it for these weights."""
    generator, factors = torch.Generator().manual_seed(len(state)), {}
    for name, weight in state.items():
        if name.endswith(".weight") and weight.dim() in (2, 4) and keep(name):
            module = prefix + name.removeprefix(strip).removesuffix(".weight").replace(".", "_")
            kernel = weight.shape[2:]
            factors[f"{module}.lora_down.weight"] = torch.randn(3, weight.shape[1], *kernel, generator=generator) / 4
            up = torch.randn(weight.shape[0], 3, *[1] * len(kernel), generator=generator) / 4
            factors |= {f"{module}.lora_up.weight": up, f"{module}.alpha": torch.tensor(1.5)}
    return factors


def _in_attention(name: str) -> bool:
    # Not FLUX's `linear1`: diffusers (0.42) splits it at the rows of the published model alone.
    return any(word in name for word in ("attn", ".ff.", "proj_in", "proj_out", "img_mod", "linear2", "_mlp"))


@pytest.mark.parametrize("kind", PIPELINES)
def test_kohya_files_are_what_diffusers_makes_of_them(kind: str, tmp_path: Path) -> None:
    """By the names that sd-scripts has for each: diffusers' for Stable Diffusion 1, the original's for XL and FLUX."""
    pipeline = PIPELINES[kind]()
    base = saved(pipeline, tmp_path / "base")
    denoiser = base / ("transformer" if kind == "flux" else "unet")
    own = load_file(next(denoiser.glob("*.safetensors")))
    state, strip = (own, "") if kind == "sd" else (in_a_single_file(denoiser)[0], "model.diffusion_model.")
    factors = kohya(state, "lora_unet_", strip, _in_attention)
    for number, part in (("" if kind == "sd" else "1", "text_encoder"), ("2", "text_encoder_2")):
        if (base / part).exists():
            layers = load_file(next((base / part).glob("*.safetensors")))
            layers = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in layers.items()}
            factors |= kohya(layers, f"lora_te{number}_", "", lambda name: ".layers." in name)
    save_file(factors, tmp_path / "style.safetensors")
    want = fused(pipeline, tmp_path / "style.safetensors", tmp_path / "fused")
    assert_equal(merged(base, tmp_path / "style.safetensors", tmp_path / "merged"), want, weights(base))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["LoRA", "DoRA", "rslora"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_diffusers_files_are_what_diffusers_makes_of_them(kind: str, options: dict[str, bool], tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = PIPELINES[kind]()
    base = saved(pipeline, tmp_path / "base")
    part = "transformer" if kind == "flux" else "unet"
    network = getattr(pipeline, part)
    modules = ["to_q", "to_v", "to_out.0", "proj_out", "conv1"] if kind != "flux" else ["to_q", "to_v", "proj_mlp"]
    config = LoraConfig(r=3, lora_alpha=5, alpha_pattern={"to_v": 2}, target_modules=modules, **options)
    network.add_adapter(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
            elif "magnitude" in name:
                parameter.add_(0.1)
    layers, metadata = get_peft_model_state_dict(network), network.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(
        tmp_path / "style", **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
    )
    clean = PIPELINES[kind]()
    want = fused(clean, tmp_path / "style" / "pytorch_lora_weights.safetensors", tmp_path / "fused")
    assert_equal(merged(base, tmp_path / "style", tmp_path / "merged"), want, weights(base))


def other(kind: str) -> Any:
    """A denoiser that needs no pipeline around it."""
    import diffusers

    torch.manual_seed(0)
    if kind == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip
    if kind == "wan":
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )  # fmt: skip
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


@pytest.mark.parametrize("names", ["single", "diffusers"])
@pytest.mark.parametrize("kind", [*PIPELINES, "sd3", "wan", "qwen-image"])
def test_a_single_file_gets_what_folders_get(kind: str, names: str, tmp_path: Path) -> None:
    """All linear layers and convolutions, by the names of either layout."""
    base = tmp_path / "base"
    if kind in PIPELINES:
        base = saved(PIPELINES[kind](), base) / ("transformer" if kind == "flux" else "unet")
    else:
        other(kind).save_pretrained(base)
    own = load_file(next(base.glob("*.safetensors")))
    single, made = in_a_single_file(base)
    save_file(single, tmp_path / "single.safetensors")
    state, strip = (single, "model.diffusion_model.") if names == "single" else (own, "")
    save_file(kohya(state, "lora_unet_", strip, lambda name: True), tmp_path / "style.safetensors")
    modelmerge.merge(str(base), [str(tmp_path / "style.safetensors")], tmp_path / "folders", method="task-arithmetic")
    in_folders = load_file(next((tmp_path / "folders").glob("*.safetensors")))
    modelmerge.merge(
        str(tmp_path / "single.safetensors"), [str(tmp_path / "style.safetensors")], tmp_path / "file",
        method="task-arithmetic",
    )  # fmt: skip
    in_file = load_file(next((tmp_path / "file").glob("*.safetensors")))
    changed = 0
    for name, parts in made.items():
        for first, source, piece in parts:
            left, right = in_folders[source], in_file[name]
            if piece.rows is not None:
                left, right = left[piece.diffusers_first :][: piece.rows], right[first:][: piece.rows]
            assert torch.allclose(left, right, rtol=0, atol=TOLERANCE), name
            changed += not torch.equal(in_folders[source], own[source])
    assert changed > 20
