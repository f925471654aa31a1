"""LoRA files of models of images: every kind of factors, onto both layouts, against sums by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelmerge
from modelmerge.checkpoint.opening import open_models
from modelmerge.engine import job
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, ReferenceNotFound, UsageError
from modelmerge.methods.contract import Context
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.merge import execute
from modelmerge.verbs.prepare import prepare
from tests.support.hub_server import FakeHub

State = dict[str, Tensor]
TOLERANCE = 1e-6

# By the name in a single file, the name in diffusers' layout and the shape.
UNET: dict[str, tuple[str, tuple[int, ...]]] = {
    "input_blocks.0.0.weight": ("conv_in.weight", (8, 4, 3, 3)),
    "input_blocks.0.0.bias": ("conv_in.bias", (8,)),
    "time_embed.0.weight": ("time_embedding.linear_1.weight", (16, 8)),
    "input_blocks.1.0.in_layers.2.weight": ("down_blocks.0.resnets.0.conv1.weight", (8, 8, 3, 3)),
    "input_blocks.1.1.norm.weight": ("down_blocks.0.attentions.0.norm.weight", (8,)),
    "input_blocks.1.1.proj_in.weight": ("down_blocks.0.attentions.0.proj_in.weight", (8, 8, 1, 1)),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", (8, 8)),
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight", (8, 8)),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", (24, 8)),
    "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.bias": (
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.bias", (24,)),
    "output_blocks.0.0.emb_layers.1.weight": ("up_blocks.0.resnets.0.time_emb_proj.weight", (8, 16)),
}  # fmt: skip
DENOISER = "model.diffusion_model."
FEED = "input_blocks_1_1_transformer_blocks_0_ff_net_0_proj"  # a linear layer [24, 8] in kohya's spelling
CONV = "input_blocks_1_0_in_layers_2"  # a convolution [8, 8, 3, 3]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4


def flux(*, single: bool, text: bool = True) -> State:
    """A FLUX of one block of each kind, in either layout, with a text encoder of CLIP."""
    parts = {f"{n}.{end}": randn(8, *((8,) if end == "weight" else ()), seed=i + 10 * (end == "bias"))
             for i, n in enumerate(("q", "k", "v")) for end in ("weight", "bias")}  # fmt: skip
    mlp = {"weight": randn(32, 8, seed=5), "bias": randn(32, seed=6)}
    modulation, out = randn(16, 8, seed=7), randn(8, 8, seed=8)
    state: State = {}
    if single:
        for end in ("weight", "bias"):
            qkv = torch.cat([parts[f"{n}.{end}"] for n in "qkv"])
            state |= {
                f"double_blocks.0.img_attn.qkv.{end}": qkv,
                f"single_blocks.0.linear1.{end}": torch.cat([qkv, mlp[end]]),
            }
        swapped = torch.cat([modulation[8:], modulation[:8]])
        state |= {
            "double_blocks.0.img_mod.lin.weight": randn(48, 8, seed=9), "double_blocks.0.img_attn.proj.weight": out,
            "final_layer.adaLN_modulation.1.weight": swapped,
            "single_blocks.0.modulation.lin.weight": randn(24, 8, seed=3), "img_in.weight": randn(8, 4, seed=4),
        }  # fmt: skip
        state = {DENOISER + name: tensor for name, tensor in state.items()}
    else:
        for end in ("weight", "bias"):
            for n in "qkv":
                state[f"transformer_blocks.0.attn.to_{n}.{end}"] = parts[f"{n}.{end}"]
                state[f"single_transformer_blocks.0.attn.to_{n}.{end}"] = parts[f"{n}.{end}"].clone()
            state[f"single_transformer_blocks.0.proj_mlp.{end}"] = mlp[end]
        state |= {
            "transformer_blocks.0.norm1.linear.weight": randn(48, 8, seed=9), "norm_out.linear.weight": modulation,
            "transformer_blocks.0.attn.to_out.0.weight": out, "x_embedder.weight": randn(8, 4, seed=4),
            "single_transformer_blocks.0.norm.linear.weight": randn(24, 8, seed=3),
        }  # fmt: skip
    if text and single:
        state["text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"] = randn(6, 6)
    return state


def unet(*, single: bool) -> State:
    names = {f"{DENOISER}{one}" if single else other: shape for one, (other, shape) in UNET.items()}
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}


def base_of(tmp_path: Path, state: State, *, single: bool) -> Path:
    """A lone file, or the folder of a component."""
    if single:
        save_file(state, tmp_path / "base.safetensors", {"format": "pt"})
        return tmp_path / "base.safetensors"
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text('{"_class_name": "SomeModel"}')
    return tmp_path / "base"


def file_of(tmp_path: Path, state: Mapping[str, Tensor], name: str = "style", **metadata: str) -> Path:
    save_file(dict(state), tmp_path / f"{name}.safetensors", metadata or None)
    return tmp_path / f"{name}.safetensors"


def merged(base: Path, *experts: Path | str, **options: Any) -> State:
    out = base.parent / "merged"
    given: dict[str, Any] = {"method": "task-arithmetic", "scale": 1.0, "force": True} | options
    modelmerge.merge(str(base), [str(expert) for expert in experts], out, **given)
    return load_file(next(out.rglob("*.safetensors")))


def assert_changed(base: State, got: State, deltas: Mapping[str, Tensor]) -> None:
    assert got.keys() == base.keys()
    for name, tensor in base.items():
        want = tensor.double() + deltas[name].double().view(tensor.shape) if name in deltas else tensor.double()
        assert torch.allclose(got[name].double(), want, rtol=0, atol=TOLERANCE), name


# --- names ---


def names_of(dialect: str, name: str) -> tuple[str, str, str]:
    """The keys of a weight's factors and alpha, in a dialect."""
    module = name.removesuffix(".weight")
    if dialect == "kohya":
        module = "lora_unet_" + module.replace(".", "_")
        return f"{module}.lora_down.weight", f"{module}.lora_up.weight", f"{module}.alpha"
    front = {"diffusers": "unet.", "comfy": "diffusion_model.", "bare": ""}[dialect]
    down, up = ("lora_down", "lora_up") if dialect == "bare" else ("lora_A", "lora_B")
    return f"{front}{module}.{down}.weight", f"{front}{module}.{up}.weight", f"{front}{module}.alpha"


@pytest.mark.parametrize("single_names", [True, False], ids=["the original's names", "diffusers' names"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "comfy", "bare"])
@pytest.mark.parametrize("single", [True, False], ids=["single file", "diffusers"])
def test_either_layout_takes_either_naming(single: bool, dialect: str, single_names: bool, tmp_path: Path) -> None:
    """Linear layers and convolutions of a UNet, equal to W + alpha / r up @ down."""
    base = unet(single=single)
    factors: State = {}
    deltas = {}
    for i, (one, (other, shape)) in enumerate(UNET.items()):
        if len(shape) > 1:
            down, up, alpha = names_of(dialect, one if single_names else other)
            factors[down], factors[up] = randn(3, *shape[1:], seed=i), randn(shape[0], 3, *shape[2:], seed=i + 50)
            factors[up] = factors[up].flatten(1)[:, :3].reshape(shape[0], 3, *[1] * (len(shape) - 2)).contiguous()
            factors[alpha] = torch.tensor(1.5)
            product = factors[up].flatten(1).double() @ factors[down].flatten(1).double()
            deltas[DENOISER + one if single else other] = product / 2
    path = base_of(tmp_path, base, single=single)
    assert_changed(base, merged(path, file_of(tmp_path, factors)), deltas)


OLD = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"{OLD}.processor.to_q_lora.down.weight", f"{OLD}.processor.to_q_lora.up.weight"),
        (f"{OLD}.to_q.lora.down.weight", f"{OLD}.to_q.lora.up.weight"),
        (f"{OLD}.to_q.lora_A.default.weight", f"{OLD}.to_q.lora_B.default.weight"),
        (f"{OLD}.to_q.lora_linear_layer.down.weight", f"{OLD}.to_q.lora_linear_layer.up.weight"),
        (f"{OLD}.processor.to_out_lora.down.weight", f"{OLD}.processor.to_out_lora.up.weight"),
        (f"lycoris_{OLD[5:].replace('.', '_')}_to_q.lora_down.weight",
         f"lycoris_{OLD[5:].replace('.', '_')}_to_q.lora_up.weight"),
    ],
)  # fmt: skip
def test_older_spellings(down: str, up: str, tmp_path: Path) -> None:
    """Without alpha the product itself is added."""
    base, factors = unet(single=False), {down: randn(2, 8, seed=1), up: randn(8, 2, seed=2)}
    path = base_of(tmp_path, base, single=False)
    weight = OLD.removeprefix("unet.") + (".to_out.0.weight" if "to_out" in down else ".to_q.weight")
    assert_changed(base, merged(path, file_of(tmp_path, factors)), {weight: factors[up] @ factors[down]})


def test_a_folder_with_diffusers_file_is_such_a_file(tmp_path: Path) -> None:
    base = unet(single=False)
    factors = {f"{OLD}.to_q.lora_A.weight": randn(2, 8, seed=1), f"{OLD}.to_q.lora_B.weight": randn(8, 2, seed=2)}
    (tmp_path / "style").mkdir()
    file_of(tmp_path / "style", factors, "pytorch_lora_weights")
    got = merged(base_of(tmp_path, base, single=False), tmp_path / "style")
    assert_changed(base, got, {f"{OLD[5:]}.to_q.weight": factors[f"{OLD}.to_q.lora_B.weight"]
                               @ factors[f"{OLD}.to_q.lora_A.weight"]})  # fmt: skip


# --- rows of fused layers ---


def test_factors_of_a_fused_layer_fall_upon_its_parts(tmp_path: Path) -> None:
    base = flux(single=False)
    factors = {}
    for module, height in (("double_blocks_0_img_attn_qkv", 24), ("single_blocks_0_linear1", 56)):
        factors[f"lora_unet_{module}.lora_down.weight"] = randn(2, 8, seed=height)
        factors[f"lora_unet_{module}.lora_up.weight"] = randn(height, 2, seed=height + 1)
        factors[f"lora_unet_{module}.diff_b"] = randn(height, seed=height + 2)
    deltas = {}
    for front, module in (
        ("transformer_blocks", "double_blocks_0_img_attn_qkv"), ("single_transformer_blocks", "single_blocks_0_linear1")
    ):  # fmt: skip
        up, down, bias = (
            factors[f"lora_unet_{module}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "diff_b")
        )
        for i, n in enumerate("qkv"):
            deltas[f"{front}.0.attn.to_{n}.weight"] = up[8 * i : 8 * i + 8] @ down
            deltas[f"{front}.0.attn.to_{n}.bias"] = bias[8 * i : 8 * i + 8]
    deltas["single_transformer_blocks.0.proj_mlp.weight"] = up[24:] @ down
    deltas["single_transformer_blocks.0.proj_mlp.bias"] = bias[24:]
    assert_changed(base, merged(base_of(tmp_path, base, single=False), file_of(tmp_path, factors)), deltas)


@pytest.mark.parametrize("words", ["qkv", "qv"])
def test_factors_of_parts_fall_upon_rows_of_a_fused_layer(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file leaves a part out, and wherever the tensor is cut."""
    base, factors = flux(single=True), {}
    delta, bias = torch.zeros(24, 8), torch.zeros(24)
    for i, n in enumerate("qkv"):
        if n in words:
            name = f"transformer.transformer_blocks.0.attn.to_{n}"
            down, up = randn(2 + i, 8, seed=i), randn(8, 2 + i, seed=i + 5)
            factors |= {
                f"{name}.lora_A.weight": down,
                f"{name}.lora_B.weight": up,
                f"{name}.lora_B.bias": randn(8, seed=i),
            }
            delta[8 * i : 8 * i + 8], bias[8 * i : 8 * i + 8] = up @ down, randn(8, seed=i)
    front = f"{DENOISER}double_blocks.0.img_attn.qkv"
    deltas = {f"{front}.weight": delta, f"{front}.bias": bias}
    path, file = base_of(tmp_path, base, single=True), file_of(tmp_path, factors)
    assert_changed(base, merged(path, file), deltas)
    monkeypatch.setattr(job, "CPU_BLOCK", 20)
    assert_changed(base, merged(path, file), deltas)


def test_halves_that_lie_the_other_way_round_are_swapped(tmp_path: Path) -> None:
    """FLUX's last modulation: shift and scale in a single file, scale and shift in diffusers' layout."""
    factors = {f"lora_unet_final_layer_adaLN_modulation_1.lora_{end}.weight": factor
               for end, factor in (("down", randn(2, 8, seed=1)), ("up", randn(16, 2, seed=2)))}  # fmt: skip
    up, down = randn(16, 2, seed=2), randn(2, 8, seed=1)
    base = flux(single=False)
    got = merged(base_of(tmp_path, base, single=False), file_of(tmp_path, factors))
    assert_changed(base, got, {"norm_out.linear.weight": torch.cat([up[8:], up[:8]]) @ down})


def test_a_text_encoder_in_a_single_file(tmp_path: Path) -> None:
    """OpenCLIP's keeps the three projections in one tensor; LoRA files speak of them as transformers does."""
    front = "conditioner.embedders.1.model.transformer.resblocks.0"
    base = unet(single=True) | {f"{front}.attn.in_proj_weight": randn(18, 6), f"{front}.mlp.c_fc.weight": randn(12, 6)}
    module = "lora_te2_text_model_encoder_layers_0"
    factors = {
        f"{module}_self_attn_k_proj.lora_down.weight": randn(2, 6, seed=1),
        f"{module}_self_attn_k_proj.lora_up.weight": randn(6, 2, seed=2),
        f"{module}_mlp_fc1.lora_down.weight": randn(2, 6, seed=3),
        f"{module}_mlp_fc1.lora_up.weight": randn(12, 2, seed=4),
    }
    delta = torch.zeros(18, 6)
    delta[6:12] = randn(6, 2, seed=2) @ randn(2, 6, seed=1)
    got = merged(base_of(tmp_path, base, single=True), file_of(tmp_path, factors))
    assert_changed(base, got, {f"{front}.attn.in_proj_weight": delta,
                               f"{front}.mlp.c_fc.weight": randn(12, 2, seed=4) @ randn(2, 6, seed=3)})  # fmt: skip


def test_a_method_gets_the_factors_of_a_fused_layer(tmp_path: Path) -> None:
    """Those of its parts side by side: methods for low rank go on as with an adapter's."""
    factors = {}
    for i, n in enumerate("qv"):
        name = f"transformer.transformer_blocks.0.attn.to_{n}"
        factors |= {f"{name}.lora_A.weight": randn(2, 8, seed=i), f"{name}.lora_B.weight": randn(8, 2, seed=i + 5)}
    base, file = base_of(tmp_path, flux(single=True), single=True), file_of(tmp_path, factors)
    seen = {}

    def look(taus: Tensor, options: Any, context: Context) -> Tensor:
        seen[context.tensor] = context.factors, taus.clone()
        return taus[0]

    told = prepare(Recipe(method="apgd", base=str(base), experts=(str(file), f"again={file}")))
    own = next(group for group in told.job.groups if group.name == "apgd")
    groups = tuple(
        replace(own, method=replace(own.method, apply=look, survey=lambda options, each: None))
        if group is own
        else group
        for group in told.job.groups
    )
    execute(replace(told, job=replace(told.job, groups=groups)), tmp_path / "out")
    pairs, taus = seen[f"{DENOISER}double_blocks.0.img_attn.qkv.weight"]
    assert pairs is not None
    assert [factor.shape for factor in pairs[0]] == [(24, 4), (4, 8)]
    assert torch.allclose(pairs[0][0] @ pairs[0][1], taus[0], atol=1e-6)


# --- kinds of factors ---


def rebuilt(kernel: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """LyCORIS' product with a kernel between the factors [r, out] and [r, in]."""
    return torch.einsum("ij...,ip,jr->pr...", kernel, first, second)


def kinds() -> dict[str, tuple[str, State, Tensor]]:
    """By kind, the module that is changed, the parts of its keys, and the difference that they make."""
    r, (a, b, k) = 2, (24, 8, (3, 3))
    w = {n: randn(*s, seed=i) for i, (n, s) in enumerate({
        "1a": (a, r), "1b": (r, b), "2a": (a, r), "2b": (r, b), "t1": (r, r, *k), "t2": (r, r, *k),
        "c1a": (r, 8), "c1b": (r, 8), "c2a": (r, 8), "c2b": (r, 8), "d": (r, 8, *k), "u": (8, r, 1, 1),
        "e": (r, 8, 1, 1), "k1": (4, 2), "k2": (6, 4), "k1a": (4, r), "k1b": (r, 2), "k2a": (6, r), "k2b": (r, 4),
        "kc": (2, 4, *k), "kc1": (4, 2), "kca": (2, r), "kcb": (r, 4 * 9), "tca": (r, 2), "tcb": (r, 4),
        "diff": (24, 8),
    }.items())}  # fmt: skip
    loha = {"hada_w1_a": w["1a"], "hada_w1_b": w["1b"], "hada_w2_a": w["2a"], "hada_w2_b": w["2b"]}
    tucker = {f"hada_w{i}_{n}": w[f"c{i}{n}"] for i in (1, 2) for n in "ab"} | {"hada_t1": w["t1"], "hada_t2": w["t2"]}
    linear = w["1a"] @ w["1b"]
    kernels = rebuilt(w["t1"], w["c1a"], w["c1b"]) * rebuilt(w["t2"], w["c2a"], w["c2b"])
    lokr = rebuilt(w["t2"], w["tca"], w["tcb"])
    ones = w["kc1"].view(4, 2, 1, 1)
    return {
        "LoRA": (FEED, {"lora_up.weight": w["1a"], "lora_down.weight": w["1b"]}, linear),
        "LoCon": (CONV, {"lora_up.weight": w["u"], "lora_down.weight": w["d"]},
                  torch.einsum("or,rikl->oikl", w["u"].flatten(1), w["d"])),
        "LoCon with a kernel": (
            CONV, {"lora_up.weight": w["u"], "lora_mid.weight": w["t1"], "lora_down.weight": w["e"]},
            torch.einsum("or,rskl,si->oikl", w["u"].flatten(1), w["t1"], w["e"].flatten(1))),
        "LoHa": (FEED, loha, linear * (w["2a"] @ w["2b"])),
        "LoHa with kernels": (CONV, tucker, kernels),
        "LoKr": (FEED, {"lokr_w1": w["k1"], "lokr_w2": w["k2"]}, torch.kron(w["k1"], w["k2"])),
        "LoKr of factors": (
            FEED, {"lokr_w1_a": w["k1a"], "lokr_w1_b": w["k1b"], "lokr_w2_a": w["k2a"], "lokr_w2_b": w["k2b"]},
            torch.kron(w["k1a"] @ w["k1b"], w["k2a"] @ w["k2b"])),
        "LoKr, one of factors": (FEED, {"lokr_w1": w["k1"], "lokr_w2_a": w["k2a"], "lokr_w2_b": w["k2b"]},
                                 torch.kron(w["k1"], w["k2a"] @ w["k2b"])),
        "LoKr of a convolution": (CONV, {"lokr_w1": w["kc1"], "lokr_w2": w["kc"]}, torch.kron(ones, w["kc"])),
        "LoKr of a convolution's factors": (
            CONV, {"lokr_w1": w["kc1"], "lokr_w2_a": w["kca"], "lokr_w2_b": w["kcb"]},
            torch.kron(ones, (w["kca"] @ w["kcb"]).view(2, 4, *k))),
        "LoKr with a kernel": (
            CONV, {"lokr_w1": w["kc1"], "lokr_t2": w["t2"], "lokr_w2_a": w["tca"], "lokr_w2_b": w["tcb"]},
            torch.kron(ones, lokr.contiguous())),
        "a difference": (FEED, {"diff": w["diff"]}, w["diff"]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_factors(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, parts, delta = kinds()[kind]
    base, factors = unet(single=True), {f"lora_unet_{module}.{part}": tensor for part, tensor in parts.items()}
    alpha = 2 if (kind.startswith("LoKr") and len(parts) == 2) or kind == "a difference" else 3  # those have no rank
    if alpha == 3:
        factors[f"lora_unet_{module}.alpha"] = torch.tensor(3, dtype=torch.bfloat16)
    name = next(f"{DENOISER}{one}" for one in UNET if one.replace(".", "_") == f"{module}_weight")
    path, file = base_of(tmp_path, base, single=True), file_of(tmp_path, factors)
    assert_changed(base, merged(path, file), {name: delta * alpha / 2})
    monkeypatch.setattr(job, "CPU_BLOCK", 50)
    assert_changed(base, merged(path, file), {name: delta * alpha / 2})


def test_scale_of_a_kronecker_product_without_factors_is_one(tmp_path: Path) -> None:
    """LyCORIS writes an alpha there that means nothing."""
    factors = {f"lora_unet_{FEED}.{part}": tensor for part, tensor in kinds()["LoKr"][1].items()}
    factors[f"lora_unet_{FEED}.alpha"] = torch.tensor(1e10)
    base, name = unet(single=True), DENOISER + FEED_NAME
    got = merged(base_of(tmp_path, base, single=True), file_of(tmp_path, factors))
    assert_changed(base, got, {name: kinds()["LoKr"][2]})


FEED_NAME = "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight"


@pytest.mark.parametrize("kind", ["LoRA", "LoCon", "LoHa", "LoKr", "LoCon with a kernel"])
def test_dora_rescales_rows(kind: str, tmp_path: Path) -> None:
    module, parts, delta = kinds()[kind]
    base = unet(single=True)
    name = next(f"{DENOISER}{one}" for one in UNET if one.replace(".", "_") == f"{module}_weight")
    norms = 1 + randn(len(delta), seed=3).abs()
    factors = {f"lora_unet_{module}.{part}": tensor for part, tensor in parts.items()}
    factors[f"lora_unet_{module}.dora_scale"] = norms.view(-1, *[1] * (delta.dim() - 1))
    changed = (base[name] + delta).flatten(1).double()
    want = changed / changed.norm(dim=1, keepdim=True) * norms[:, None] - base[name].flatten(1)
    assert_changed(base, merged(base_of(tmp_path, base, single=True), file_of(tmp_path, factors)), {name: want})


def test_dora_rescales_columns_as_earlier_versions_did(tmp_path: Path) -> None:
    _, parts, delta = kinds()["LoRA"]
    base, name = unet(single=True), DENOISER + FEED_NAME
    norms = 1 + randn(1, 8, seed=3).abs()
    factors = {f"lora_unet_{FEED}.{part}": tensor for part, tensor in parts.items()}
    factors[f"lora_unet_{FEED}.dora_scale"] = norms
    changed = base[name].double() + delta
    want = changed / changed.norm(dim=0, keepdim=True) * norms - base[name]
    assert_changed(base, merged(base_of(tmp_path, base, single=True), file_of(tmp_path, factors)), {name: want})


@pytest.mark.parametrize("single", [True, False], ids=["onto rows", "of rows"])
@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr"])
def test_dora_and_products_of_other_kinds_on_fused_layers(kind: str, single: bool, tmp_path: Path) -> None:
    """Norms are those of the rows that are meant, wherever they lie in the base's tensor."""
    parts = kinds()[kind][1]
    base, ours = flux(single=single), "double_blocks.0.img_attn.qkv.weight"
    module = "transformer_blocks_0_attn_to_k" if single else "double_blocks_0_img_attn_qkv"
    if single:  # of the 24 rows, 8
        cut = ("lora_up.weight", "hada_w1_a", "hada_w2_a", "lokr_w2")
        parts = {part: tensor[: len(tensor) // 3] if part in cut else tensor for part, tensor in parts.items()}
    factors = {f"lora_unet_{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    delta = {
        "LoRA": lambda p: p["lora_up.weight"] @ p["lora_down.weight"],
        "LoHa": lambda p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]),
        "LoKr": lambda p: torch.kron(p["lokr_w1"], p["lokr_w2"]),
    }[kind](parts)
    norms = 1 + randn(len(delta), seed=3).abs()
    factors[f"lora_unet_{module}.dora_scale"] = norms[:, None]
    whole = (
        base[DENOISER + ours][8:16]
        if single
        else torch.cat([base[f"transformer_blocks.0.attn.to_{n}.weight"] for n in "qkv"])
    )
    changed = (whole + delta).double()
    want = changed / changed.norm(dim=1, keepdim=True) * norms[:, None] - whole
    if single:
        deltas = {DENOISER + ours: torch.cat([torch.zeros(8, 8), want, torch.zeros(8, 8)])}
    else:
        deltas = {f"transformer_blocks.0.attn.to_{n}.weight": want[8 * i : 8 * i + 8] for i, n in enumerate("qkv")}
    assert_changed(base, merged(base_of(tmp_path, base, single=single), file_of(tmp_path, factors)), deltas)


def test_differences_of_norms_and_biases(tmp_path: Path) -> None:
    base = unet(single=True)
    factors = {
        "diffusion_model.input_blocks.1.1.norm.diff": randn(8, seed=1),
        "diffusion_model.input_blocks.0.0.diff_b": randn(8, seed=2),
    }
    got = merged(base_of(tmp_path, base, single=True), file_of(tmp_path, factors))
    assert_changed(base, got, {f"{DENOISER}input_blocks.1.1.norm.weight": randn(8, seed=1),
                               f"{DENOISER}input_blocks.0.0.bias": randn(8, seed=2)})  # fmt: skip


@pytest.mark.parametrize("stabilised", [False, True])
def test_alpha_stands_in_the_metadata_that_diffusers_writes(stabilised: bool, tmp_path: Path) -> None:
    base = unet(single=False)
    factors = {f"{OLD}.to_q.lora_A.weight": randn(4, 8, seed=1), f"{OLD}.to_q.lora_B.weight": randn(8, 4, seed=2)}
    config = {"unet.r": 8, "unet.lora_alpha": 2, "unet.alpha_pattern": {"attn1.to_q": 6}, "unet.use_rslora": stabilised}
    file = file_of(tmp_path, factors, lora_adapter_metadata=json.dumps(config))
    want = 6 / (4**0.5 if stabilised else 4) * randn(8, 4, seed=2) @ randn(4, 8, seed=1)
    assert_changed(base, merged(base_of(tmp_path, base, single=False), file), {f"{OLD[5:]}.to_q.weight": want})


# --- as other experts ---


def plain(tmp_path: Path, name: str = "style", module: str = FEED, seed: int = 0) -> Path:
    shapes = {"lora_down.weight": (2, 8), "lora_up.weight": (24, 2)}
    state = {
        f"lora_unet_{module}.{part}": randn(*shape, seed=seed + i) for i, (part, shape) in enumerate(shapes.items())
    }
    return file_of(tmp_path, state, name)


def test_a_lora_file_goes_where_any_expert_goes(tmp_path: Path) -> None:
    """Weights, replay, `auto`, task vectors, `eval weights`, `verify`."""
    base = base_of(tmp_path, unet(single=True), single=True)
    one, two = plain(tmp_path), plain(tmp_path, "other", seed=5)
    deltas = [randn(24, 2, seed=s + 1) @ randn(2, 8, seed=s) for s in (0, 5)]
    name = DENOISER + FEED_NAME
    got = merged(base, one, f"b={two}", weights={"style": 0.5, "b": 2.0})
    assert_changed(unet(single=True), got, {name: 0.5 * deltas[0] + 2 * deltas[1]})
    assert all(modelmerge.verify(tmp_path / "merged").values())
    modelmerge.replay(tmp_path / "merged" / "modelmerge.json", tmp_path / "again")
    assert torch.equal(load_file(next((tmp_path / "again").glob("*.safetensors")))[name], got[name])
    plan = modelmerge.merge(str(base), [str(one), str(two)], method="auto", dry_run=True)
    assert "All experts are of low rank" in json.dumps(plan)
    modelmerge.extract(str(base), [str(one), str(two)], tmp_path / "vectors")
    assert_changed(unet(single=True), merged(base, tmp_path / "vectors" / "style"), {name: deltas[0]})
    report = modelmerge.evaluate([tmp_path / "again"], suite="weights")
    assert "style" in json.dumps(report)


# --- what cannot be merged ---


def test_keys_without_a_place_are_an_error_with_a_way_out(tmp_path: Path) -> None:
    base, file = base_of(tmp_path, unet(single=True), single=True), plain(tmp_path)
    state = load_file(file) | {
        f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.lora_{end}.weight": torch.ones(4, 4)
        for i in (0, 1) for end in ("up", "down")
    }  # fmt: skip
    file_of(tmp_path, state)
    with pytest.raises(PlanError, match=r"no place for 2 of its modules.*'lora_te_text_model_encoder") as refused:
        merged(base, file)
    assert "exclude 'lora_te_*'" in str(refused.value.hint)
    got = merged(base, file, exclude=["lora_te_*"])
    assert_changed(unet(single=True), got, {DENOISER + FEED_NAME: randn(24, 2, seed=1) @ randn(2, 8)})
    with pytest.raises(UsageError, match="'lora_te9_"):
        merged(base, file, exclude=["lora_te_*", "lora_te9_*"])
    _, (expert,) = open_models(str(base), [str(file)], ["lora_te_*"])
    assert any("left out, as excluded" in remark for remark in expert.remarks)


def refusals() -> dict[str, tuple[State, type[ModelMergeError], str]]:
    m, up, down = f"lora_unet_{FEED}", randn(24, 2), randn(2, 8)
    good = {f"{m}.lora_up.weight": up, f"{m}.lora_down.weight": down}
    return {
        "half": ({f"{m}.lora_up.weight": up}, CheckpointError, "no matching down"),
        "other ranks": (good | {f"{m}.lora_down.weight": randn(3, 8)}, CheckpointError, "do not go together"),
        "no number": (good | {f"{m}.alpha": torch.ones(2)}, CheckpointError, "and no number"),
        "NaN": (good | {f"{m}.alpha": torch.tensor(torch.nan)}, CheckpointError, "is nan"),
        "NaN in a factor": (good | {f"{m}.lora_up.weight": up * torch.nan}, CheckpointError, "holds NaN"),
        "another model's": (good | {f"{m}.lora_down.weight": randn(2, 9)}, PlanError, "shape \\[24, 9\\].*\\[24, 8\\]"),
        "two kinds": (good | {f"{m}.diff": randn(24, 8)}, CheckpointError, "of several kinds"),
        "alpha alone": ({f"{m}.alpha": torch.ones(())}, CheckpointError, "incomplete"),
        "an unknown kind": (good | {f"{m}.oft_blocks": randn(2, 2)}, PlanError, "no place for 1 of its .*oft_blocks"),
        "twice": (good | {"unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.diff": randn(24, 8)},
                  PlanError, "change the same rows"),
        "DoRA of columns of a convolution": (
            {f"lora_unet_{CONV}.lora_up.weight": randn(8, 2, 1, 1), f"lora_unet_{CONV}.dora_scale": randn(1, 8, 1, 1),
             f"lora_unet_{CONV}.lora_down.weight": randn(2, 8, 3, 3)}, CheckpointError, "cannot be rescaled here"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", refusals())
def test_what_is_wrong_with_a_file_is_an_error(kind: str, tmp_path: Path) -> None:
    state, error, words = refusals()[kind]
    base = base_of(tmp_path, unet(single=True), single=True)
    with pytest.raises(error, match=words):
        merged(base, file_of(tmp_path, state))
    assert not (tmp_path / "merged").exists()


def test_a_lora_file_is_no_base(tmp_path: Path) -> None:
    """Two of them would average their factors, which is not the average of the products."""
    one, two = plain(tmp_path), plain(tmp_path, "other")
    with pytest.raises(ReferenceNotFound, match="is a LoRA file, not a base") as refused:
        merged(one, two)
    assert "name the model first" in str(refused.value.hint)


def test_bare_keys_need_a_model_of_images(tmp_path: Path) -> None:
    """What alpha a language model's adapter has, a file without its config does not say."""
    (tmp_path / "lm").mkdir()
    save_file({"model.layers.0.q_proj.weight": randn(8, 8)}, tmp_path / "lm" / "model.safetensors")
    factors = {f"model.layers.0.q_proj.lora_{n}.weight": randn(*s) for n, s in (("A", (2, 8)), ("B", (8, 2)))}
    with pytest.raises(ReferenceNotFound, match="no model of images"):
        merged(tmp_path / "lm", file_of(tmp_path, factors))


def test_a_pickled_lora_file(tmp_path: Path) -> None:
    base, state = base_of(tmp_path, unet(single=True), single=True), load_file(plain(tmp_path))
    torch.save(state, tmp_path / "style.pt")
    want = merged(base, tmp_path / "style.safetensors")
    got = merged(base, tmp_path / "style.pt")
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("place", ["org/style", "hf://org/style/pytorch_lora_weights.safetensors"])
@pytest.mark.parametrize("stream", [False, True], ids=["stored", "streamed"])
def test_a_lora_file_on_the_hub(place: str, stream: bool, tmp_path: Path, hub: FakeHub) -> None:
    """Alpha is read over ranges where the file is not stored."""
    base, state = base_of(tmp_path, unet(single=True), single=True), load_file(plain(tmp_path))
    file = file_of(tmp_path, state | {f"lora_unet_{FEED}.alpha": torch.tensor(3.0)}, "pytorch_lora_weights")
    hub.add("org/style", {file.name: file.read_bytes()})
    got = merged(base, place, stream=stream)
    assert_changed(unet(single=True), got, {DENOISER + FEED_NAME: 1.5 * randn(24, 2, seed=1) @ randn(2, 8)})


@pytest.mark.parametrize("method", ["tsv-m", "kron", "knots"])
def test_kernels_that_change_by_factors_are_merged_as_matrices(method: str, tmp_path: Path) -> None:
    """As the same task vectors are that are stored in full."""
    base, files = base_of(tmp_path, unet(single=True), single=True), []
    for kind, name in (("LoCon", "one"), ("LoCon with a kernel", "two"), ("LoHa with kernels", "three")):
        module, parts, _ = kinds()[kind]
        files.append(file_of(tmp_path, {f"lora_unet_{module}.{part}": t for part, t in parts.items()}, name))
    modelmerge.extract(str(base), list(map(str, files)), tmp_path / "vectors")
    at = [f"*.in_layers.2.weight: {method}"]
    got = merged(base, *files, at=at)
    want = merged(base, *(tmp_path / "vectors" / file.stem for file in files), at=at)
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, rtol=0, atol=1e-5), name


def test_an_adapter_of_a_single_file_cannot_be_written(tmp_path: Path) -> None:
    """Peft's would have names that no program knows."""
    base, file = base_of(tmp_path, unet(single=True), single=True), plain(tmp_path)
    with pytest.raises(UsageError, match="the base has those of the original program"):
        merged(base, file, as_lora=2)
