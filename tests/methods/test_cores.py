"""Experts of low rank are the same to a method however they are given: as factors, or stored as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelmerge.cli import main
from modelmerge.methods import cores, registry
from modelmerge.methods.contract import Context
from tests.support.checkpoints import write
from tests.support.methods import context_of, taus_of

SPECTRAL = ["apgd", "iso-c", "iso-cts", "knots", "kron", "tsv-m", "wudi"]
RANKS = (2, 3, 4)


def adapters(m: int, n: int, ranks: tuple[int, ...] = RANKS) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A base [m, n], and factors whose products are some hundredths as long."""
    generator = torch.Generator().manual_seed(m)
    base = torch.randn(m, n, generator=generator) / n**0.5
    pairs = [
        (torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator) * 0.03 / (n * r) ** 0.5)
        for r in ranks
    ]
    return base, pairs


def context(base: Tensor, ranks: int, factors: list[tuple[Tensor, Tensor]] | None = None) -> Context:
    return Context(tensor="w", weights=(1.0, 0.5, 2.0)[:ranks], base=base, factors=tuple(factors) if factors else None)


@pytest.mark.parametrize("shape", [(64, 48), (48, 80), (530, 600)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_factors_and_whole_experts_merge_alike(name: str, shape: tuple[int, int]) -> None:
    base, pairs = adapters(*shape)
    chosen = registry.load(name)
    products = torch.stack([left @ right for left, right in pairs])
    want = chosen.apply(products, chosen.options(), context(base, 3, pairs))
    for dtype in (torch.float32, torch.bfloat16):
        origin = base.to(dtype).float()
        stored = torch.stack([(origin + product).to(dtype).float() - origin for product in products])
        got = chosen.apply(stored, chosen.options(), context(origin, 3))
        # bfloat16 rounds a weight by a twentieth of these updates. Trims of few coordinates, and directions that make
        # room for others by a hair, change with less.
        limit = 1e-4 if dtype == torch.float32 else 0.5 if name in {"knots", "iso-cts"} else 0.15
        assert (got - want).norm() <= limit * want.norm(), dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rank_of_stored_experts_is_found(dtype: torch.dtype) -> None:
    base, pairs = adapters(96, 160, (8, 0, 5))
    origin = base.to(dtype).float()
    stored = torch.stack([(origin + left @ right).to(dtype).float() - origin for left, right in pairs])
    core = cores.of(stored, context(origin, 3))
    assert [pair and pair[0].shape[1] for pair in core.pairs] == [8, 0, 5]
    assert core.rank == 13
    assert core.taus.shape == (3, 13, 13)
    back = torch.stack([core.whole(tau) for tau in core.taus])
    products = torch.stack([left @ right for left, right in pairs])
    assert (back - products).norm() <= (1e-5 if dtype == torch.float32 else 0.1) * products.norm()


def test_directions_that_experts_share_count_once() -> None:
    base, pairs = adapters(96, 160, (4, 4))
    shared = [(pairs[0][0], pairs[0][1]), (pairs[0][0] * 2, pairs[1][1])]
    taus = torch.stack([left @ right for left, right in shared])
    for core in (cores.of(taus, context(base, 2, shared)), cores.of(taus, context(base, 2))):
        assert core.taus.shape == (2, 4, 8)
        assert core.rank == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_full_rank_stay_as_they_are(dtype: torch.dtype) -> None:
    """Also where the spectrum falls, and its end lies below what storing has rounded away."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(120, 90, generator=generator).to(dtype).float()
    u, v = (torch.linalg.qr(torch.randn(k, 90, generator=generator)).Q for k in (120, 90))
    for fall in (0.0, 0.5, 1.0):
        product = (u * torch.arange(1.0, 91.0) ** -fall) @ v.T
        tau = (base + product * (2.0 / product.norm())).to(dtype).float() - base
        assert cores.of(tau[None], context(base, 1)).rank is None


@pytest.mark.parametrize("name", SPECTRAL)
def test_one_expert_of_full_rank_leaves_all_whole(name: str) -> None:
    chosen, taus = registry.load(name), taus_of(3)
    options = chosen.options()
    left, right = torch.linalg.qr(taus[0][:, :2]).Q, torch.linalg.qr(taus[0].T[:, :2]).Q.T * 1e-2
    mixed = torch.stack([left @ right, *taus[1:]])
    told = context_of(chosen, options, mixed)
    with_factors = context_of(chosen, options, mixed, factors=((left, right), None, None))
    one, other = (chosen.apply(mixed, options, each) for each in (told, with_factors))
    assert (one - other).norm() <= 1e-4 * one.norm()


@pytest.mark.parametrize("name", ["iso-c", "kron", "tsv-m", "wudi"])
def test_a_core_gives_what_the_whole_does(name: str) -> None:
    """A basis changes nothing but what is measured by the mean over all directions, which a zero frame leaves out."""
    # Square, as the core is: `kron` goes by the shape.
    base, pairs = adapters(40, 40, (3, 3))
    chosen, taus = registry.load(name), torch.stack([left @ right for left, right in pairs])
    core = cores.of(taus, context(base, 2))
    small = core.taus.shape[1:]
    options = chosen.options(damping=0.0) if name == "kron" else chosen.options()
    # In its own basis a task vector is of full rank between all experts, and is taken as it is: the ridge counts all
    # six directions, not the three of each expert.
    whole = chosen.options(ridge=0.6) if name == "wudi" else options
    want = chosen.apply(taus, options, context(base, 2))
    assert small == (6, 6)
    got = core.whole(chosen.apply(core.taus, whole, context(torch.eye(6), 2)))
    # What all experts of low rank make may be shortened besides.
    assert (got / got.norm() - want / want.norm()).norm() <= 1e-4


@pytest.mark.parametrize("name", ["kron", "wudi"])
def test_what_low_rank_experts_make_is_no_longer_than_they_are(name: str) -> None:
    base, pairs = adapters(96, 160)
    chosen, taus = registry.load(name), torch.stack([left @ right for left, right in pairs])
    told = context(base, 3)
    mean = sum(weight * float(tau.norm()) for weight, tau in zip(told.weights, taus, strict=True)) / 3
    assert float(chosen.apply(taus, chosen.options(), told).norm()) == pytest.approx(mean, rel=1e-4)
    # Experts that cancel one another are not lengthened.
    opposed = torch.stack([taus[0], -0.9 * taus[0]])
    assert float(chosen.apply(opposed, chosen.options(), context(base, 2)).norm()) < 0.7 * float(taus[0].norm())


@pytest.mark.parametrize("name", SPECTRAL)
def test_adapters_and_their_merged_checkpoints_give_one_file(name: str, tmp_path: Path) -> None:
    """Through the command line: PEFT's folders, and the same experts as checkpoints in float32."""
    base, pairs = adapters(64, 48)
    key = "model.layers.0.self_attn.q_proj"
    experts: dict[str, list[Path]] = {"adapters": [], "whole": []}

    origin = write(tmp_path / "base", {f"{key}.weight": base})
    for i, (left, right) in enumerate(pairs):
        folder, rank = tmp_path / f"adapter-{i}", left.shape[1]
        folder.mkdir()
        state = {f"base_model.model.{key}.lora_B.weight": left, f"base_model.model.{key}.lora_A.weight": right}
        save_file(state, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        experts["adapters"].append(folder)
        experts["whole"].append(write(tmp_path / f"whole-{i}", {f"{key}.weight": base + left @ right}))
    merged = []
    for kind, folders in experts.items():
        assert main(["merge", name, *map(str, (origin, *folders)), "-o", str(tmp_path / kind), "-q"]) == 0
        merged.append(load_file(tmp_path / kind / "model.safetensors")[f"{key}.weight"] - base)
    assert (merged[0] - merged[1]).norm() <= 1e-4 * merged[0].norm()
    assert merged[0].norm() > 0.1 * (pairs[0][0] @ pairs[0][1]).norm()
