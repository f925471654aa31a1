"""The guide on images, command by command, on small models of the real layouts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelmerge.cli import main
from tests.support.guides import GUIDES, commands
from tests.support.image_models import in_other_layout, state

State = dict[str, Tensor]
LINES = list(commands(GUIDES["images"].read_text()))
MODULE = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TARGET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"


def near(base: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}


@pytest.fixture(scope="module")
def models() -> dict[str, State]:
    base = state("sd1") | state("vae")
    generator = torch.Generator().manual_seed(9)
    width = in_other_layout(base)[TARGET].shape[0]
    found: dict[str, State] = {"sd15": in_other_layout(base)}
    for seed, name in enumerate(("photo", "anime", "inpaint")):
        found[name] = in_other_layout(near(base, seed))
    out, channels, *kernel = found["sd15"][CONV_IN].shape
    found["inpaint"][CONV_IN] = torch.randn(out, channels + 5, *kernel, generator=generator)
    found["vae"] = {name.partition(".")[2]: t for name, t in found["anime"].items() if name.startswith("first_stage")}
    for name in ("look", "pose", "light", "dress"):
        found[name] = {
            f"lora_unet_{MODULE}.lora_down.weight": torch.randn(4, width, generator=generator),
            f"lora_unet_{MODULE}.lora_up.weight": torch.randn(width, 4, generator=generator),
            f"lora_unet_{MODULE}.alpha": torch.tensor(2.0),
        }
    found["dress"]["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.randn(4, 8)
    found["dress"]["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.randn(32, 4)
    return found


@pytest.fixture(scope="module")
def studio(models: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models that the guide names, in which all its commands have run, in order."""
    place = tmp_path_factory.mktemp("studio")
    for name, tensors in models.items():
        save_file(tensors, place / f"{name}.safetensors", metadata={"modelspec.title": name})
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    photo = near(state("sd1") | state("vae"), 0)
    for folder, kind in parts.items():
        (place / "photo-folder" / folder).mkdir(parents=True)
        (place / "photo-folder" / folder / "config.json").write_text(json.dumps({"_class_name": kind}))
        inside = {n.removeprefix(f"{folder}/"): t for n, t in photo.items() if n.startswith(f"{folder}/")}
        save_file(inside, place / "photo-folder" / folder / "diffusion_pytorch_model.safetensors")
    index = {"_class_name": "StableDiffusionPipeline", **{f: ["diffusers", kind] for f, kind in parts.items()}}
    (place / "photo-folder" / "model_index.json").write_text(json.dumps(index))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in LINES:
            assert main([*shlex.split(line, comments=True)[1:], "-q"]) == 0, line
    return place


def file(studio: Path, name: str) -> State:
    (written,) = (studio / name).glob("*.safetensors")
    return load_file(written)


def test_the_artists_merge_is_the_sum_by_hand_in_one_file(studio: Path, models: dict[str, State]) -> None:
    got = file(studio, "merged")
    base, photo, anime = (models[name] for name in ("sd15", "photo", "anime"))
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        want = tensor + 0.5 * (photo[name] - tensor) + 0.5 * (anime[name] - tensor)
        for lora, weight in (("look", 0.8), ("pose", 0.6), ("light", 0.4)) if name == TARGET else ():
            up, down = (models[lora][f"lora_unet_{MODULE}.lora_{end}.weight"] for end in ("up", "down"))
            want = want + weight * 2.0 / 4 * up @ down
        assert (got[name] - want).abs().max() <= 2e-6, name
    assert sorted(path.name for path in (studio / "merged").iterdir() if path.suffix == ".safetensors") == [
        "model.safetensors"
    ]
    with safe_open(studio / "merged" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "sd15"


@pytest.mark.parametrize(
    ("out", "want"),
    [
        ("sum", lambda m, n: m["photo"][n] + 0.3 * (m["anime"][n] - m["photo"][n])),
        ("added", lambda m, n: m["photo"][n] + 0.7 * (m["anime"][n] - m["sd15"][n])),
        ("baked", lambda m, n: m["anime" if n.startswith("first_stage") else "photo"][n]),
        ("painted", lambda m, n: m["inpaint"][n] + (n != CONV_IN) * (
            m["photo"][n] - m["sd15"][n] if n != CONV_IN else 0)),
        ("one-file", lambda m, n: 0.5 * (m["photo"][n] + m["anime"][n])),
    ],
)  # fmt: skip
def test_what_is_said_elsewhere_is_what_comes_out(
    out: str, want: Callable[[dict[str, State], str], Tensor], studio: Path, models: dict[str, State]
) -> None:
    got = file(studio, out)
    assert len(got) > 100
    for name, tensor in got.items():
        assert (tensor - want(models, name)).abs().max() <= 1e-6, name


def test_the_base_s_layout_is_kept(studio: Path, models: dict[str, State]) -> None:
    unet = load_file(studio / "folders" / "unet" / "diffusion_pytorch_model.safetensors")
    want = models["anime"][CONV_IN]
    assert torch.allclose(unet["conv_in.weight"], want, atol=1e-6)
    assert (studio / "folders" / "model_index.json").exists()
    vae = load_file(studio / "folders" / "vae" / "diffusion_pytorch_model.safetensors")
    before = load_file(studio / "photo-folder" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(vae[name], before[name]) for name in before)
