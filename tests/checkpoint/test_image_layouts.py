"""Models of images in either layout: what is merged does not depend on how base and experts are laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.checkpoint.diffusion import networks
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.errors import PlanError
from modelmerge.plan.tensors import make_plan
from tests.support.checkpoints import State, expert_state
from tests.support.image_models import (
    DENOISER,
    OPEN_CLIP,
    as_open_clip,
    in_other_layout,
    recorded,
    shapes_of,
    state,
    without_folder,
)

MODELS = ("sd1", "flux", "sd3", "wan", "vae")
ALL = (*MODELS, "sdxl", "qwen-image", "wan-vae")


def saved(file: Path, state: State) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return str(file)


def merged(folder: Path, base: State, experts: list[State], method: str = "average", **options: object) -> State:
    """The merge of lone files."""
    files = [saved(folder / f"{i}.safetensors", each) for i, each in enumerate((base, *experts))]
    modelmerge.merge(files[0], files[1:], folder / "out", method=method, force=True, **options)
    (file,) = (folder / "out").glob("*.safetensors")
    return load_file(file)


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def remarks(folder: Path, base: State, expert: State) -> str:
    files = [saved(folder / f"{name}.safetensors", each) for name, each in (("base", base), ("other", expert))]
    plan = make_plan(*[open_checkpoint(parse(files[0]))], [open_checkpoint(parse(files[1]))])
    return " ".join(plan.experts[0].remarks)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["average", "ties"])
def test_an_expert_in_the_other_layout_gives_the_same_bits(model: str, method: str, tmp_path: Path) -> None:
    base = state(model)
    experts = [expert_state(base, seed) for seed in (1, 2)]
    single = [in_other_layout(each) for each in (base, *experts)]
    folders = merged(tmp_path / "folders", base, experts, method)
    sole = merged(tmp_path / "sole", single[0], single[1:], method)
    assert equal(merged(tmp_path / "a", base, [single[1], experts[1]], method), folders)
    assert equal(merged(tmp_path / "b", single[0], [single[1], experts[1]], method), sole)
    assert equal(in_other_layout(folders), sole)
    assert not equal(sole, single[0])


@pytest.mark.parametrize("model", MODELS)
def test_a_component_and_a_file_without_words_in_front_find_their_place(model: str, tmp_path: Path) -> None:
    """A single component as diffusers' `from_pretrained` takes it; a file of ComfyUI's `diffusion_models`."""
    base = state(model)
    experts = [expert_state(base, seed) for seed in (1, 2)]
    front = "first_stage_model." if model == "vae" else DENOISER
    bare = {name.removeprefix(front): tensor for name, tensor in in_other_layout(experts[1]).items()}
    expected = merged(tmp_path / "folders", base, experts)
    assert equal(merged(tmp_path / "a", base, [without_folder(experts[0]), bare]), expected)
    alone = merged(tmp_path / "b", without_folder(base), [experts[0], bare])
    assert equal(alone, without_folder(expected))
    sole = in_other_layout(expected)
    single = {**in_other_layout(base), "model_ema.decay": torch.tensor(0.5), "alphas_cumprod": torch.ones(3)}
    kept = merged(tmp_path / "c", single, [without_folder(experts[0]), bare])
    assert equal({name: kept[name] for name in sole}, sole)
    assert torch.equal(kept["alphas_cumprod"], torch.ones(3))


def test_a_pipeline_and_its_single_file_are_the_same_model(tmp_path: Path) -> None:
    """A UNet, an autoencoder and both text encoders, as SDXL's single file has them."""

    def pipeline(seed: int) -> State:
        small = {f"text_encoder/{name}": tensor for name, tensor in without_folder(state("clip", 9 + seed)).items()}
        return {**state("sd1", seed), **state("vae", seed), **small, **state("clip", seed)}

    def single(pipeline: State) -> State:
        denoiser = in_other_layout({n: t for n, t in pipeline.items() if n.startswith(("unet/", "vae/"))})
        small = {n.partition("/")[2]: t for n, t in pipeline.items() if n.startswith("text_encoder/")}
        large = {n.partition("/")[2]: t for n, t in pipeline.items() if n.startswith("text_encoder_2/")}
        first = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in small.items()}
        return {**denoiser, **first, **as_open_clip(large, OPEN_CLIP)}

    base = pipeline(0)
    experts = [expert_state(base, seed) for seed in (1, 2)]
    expected = merged(tmp_path / "folders", base, experts, "ties")
    assert equal(merged(tmp_path / "a", base, [single(each) for each in experts], "ties"), expected)
    assert equal(merged(tmp_path / "b", single(base), experts, "ties"), single(expected))
    said = remarks(tmp_path / "c", single(base), experts[0])
    assert f"its layout is diffusers', the base's is a single file's: {len(single(base))} of" in said


def test_old_names_of_an_autoencoder_are_those_of_today(tmp_path: Path) -> None:
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(state: State) -> State:
        for new, word in words.items():
            state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{word}."): t for name, t in state.items()}
        return state

    base = state("vae")
    experts = [expert_state(base, seed) for seed in (1, 2)]
    expected = merged(tmp_path / "new", base, experts)
    assert old(base).keys() != base.keys()
    assert equal(merged(tmp_path / "a", base, [old(experts[0]), in_other_layout(experts[1])]), expected)
    assert equal(merged(tmp_path / "b", old(base), experts), old(expected))


def test_attention_of_an_autoencoder_is_a_matrix_or_a_kernel_of_one_pixel(tmp_path: Path) -> None:
    def kernels(single: State) -> State:
        ends = ("attn_1.q.weight", "attn_1.k.weight", "attn_1.v.weight", "attn_1.proj_out.weight")
        return {name: t[:, :, None, None] if name.endswith(ends) else t for name, t in single.items()}

    base = state("vae")
    expert = expert_state(base, 1)
    single = kernels(in_other_layout(base))
    assert equal(merged(tmp_path / "a", single, [expert, expert]), kernels(in_other_layout(expert)))
    assert equal(merged(tmp_path / "b", base, [kernels(in_other_layout(expert))] * 2), expert)


def test_rows_and_halves_go_where_the_original_has_them() -> None:
    """FLUX: q, k, v and the MLP one below the other; shift and scale the other way round."""
    flux = state("flux")
    single = in_other_layout(flux)
    block = "transformer/single_transformer_blocks.0."
    parts = [flux[f"{block}{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(single[f"{DENOISER}single_blocks.0.linear1.weight"], torch.cat(parts))
    scale, shift = flux["transformer/norm_out.linear.weight"].chunk(2)
    assert torch.equal(single[f"{DENOISER}final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


def test_what_only_one_side_has_is_said_or_refused(tmp_path: Path) -> None:
    base = in_other_layout(state("flux"))
    expert = expert_state(state("flux"), 1)
    lacking = {name: t for name, t in expert.items() if "transformer_blocks.0.attn.to_k.weight" not in name}
    with pytest.raises(PlanError, match=r"'transformer_blocks.0.attn.to_k.weight' is missing.*img_attn.qkv.weight"):
        merged(tmp_path / "a", base, [lacking])
    block = f"{DENOISER}double_blocks.0.img_mlp.0.weight"
    odd = {name.replace("ff.net.0.proj", "ff.net.0.other"): t for name, t in expert.items()}
    with pytest.raises(PlanError, match="look like one another under other names"):
        merged(tmp_path / "b", base, [odd])
    wide = {name: torch.cat([t, t]) if ".0.ff.net.0.proj.weight" in name else t for name, t in expert.items()}
    with pytest.raises(PlanError, match=f"'{block}': shape"):
        merged(tmp_path / "c", base, [wide])
    high = {name: t.double() if ".attn.to_q." in name else t for name, t in expert.items()}
    with pytest.raises(PlanError, match=r"is F32, and .* is F64; the base has both as rows|is F64, and .* is F32; the"):
        merged(tmp_path / "d", base, [high])


def test_which_of_two_denoisers_is_meant_is_asked(tmp_path: Path) -> None:
    wan = state("wan")
    both = {**wan, **{name.replace("transformer/", "transformer_2/"): t.clone() for name, t in wan.items()}}
    with pytest.raises(PlanError, match="its denoiser could be the base's 'transformer/' or 'transformer_2/'"):
        merged(tmp_path / "a", both, [in_other_layout(wan)])
    expert = expert_state(both, 1)
    assert equal(merged(tmp_path / "b", both, [expert, expert]), expert)


def test_other_models_have_no_such_networks() -> None:
    from tests.support.checkpoints import SHAPES

    control = {name.replace("unet/", "control_model."): tensor for name, tensor in state("sd1").items()}
    assert networks(dict.fromkeys(SHAPES)) == networks(dict.fromkeys(control)) == ()  # type: ignore[arg-type]


# --- against the real library ---


@pytest.mark.slow
@pytest.mark.parametrize("model", [*MODELS, "clip"])
def test_records_are_what_the_library_makes(model: str) -> None:
    from tests.support.image_models import build

    assert recorded()[model] == shapes_of(model, build(model))


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("large", [False, True])
def test_a_single_file_converts_to_the_same_model_in_the_library(model: str, large: bool) -> None:
    from tests.support.image_models import build, converted

    built = build(model, large=large)
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_of(model, built)
    ours = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    single = ours if model == "qwen-image" else in_other_layout(ours)
    assert equal(in_other_layout(single) if model != "qwen-image" else single, ours)
    if model == "qwen-image":
        single = {name.replace("transformer/", DENOISER): tensor for name, tensor in single.items()}
    assert equal(converted(model, single, built), without_folder(ours))


@pytest.mark.slow
def test_a_text_encoder_of_open_clip_converts_to_the_same_model_in_the_library() -> None:
    from tests.support.image_models import build, converted

    ours = without_folder(state("clip"))
    single = as_open_clip(ours, OPEN_CLIP)
    assert equal(converted("clip", single, build("clip")), ours)
    assert equal(without_folder(in_other_layout(single)), ours)
