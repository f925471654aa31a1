"""Adapters of mixtures of experts, as peft writes them for `all-linear`, against peft's own merge."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from tests.support.checkpoints import read

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.support.families import KINDS, SAVED, network  # noqa: E402  (needs transformers)

_KINDS = ("qwen3_moe", "mixtral", "gpt_oss")


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Small models come with warnings of their own."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def trained(net: Any, seed: int, folder: Path, **settings: Any) -> Any:
    """An adapter whose factors are drawn by chance, saved; the live model."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **settings})
    live = peft.get_peft_model(copy.deepcopy(net), config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in live.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    live.save_pretrained(folder)
    return live


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("name", _KINDS)
def test_an_adapter_on_stacks_is_what_peft_merges(name: str, saved: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network(KINDS[name], 0)
        base = SAVED[saved](net, tmp_path / "base")
        settings = {"target_parameters": ["gate_up_proj", "down_proj"]} if name == "gpt_oss" else {}
        lives = [trained(net, seed, tmp_path / f"a{seed}", **settings) for seed in (1, 2)]
        adapters = [tmp_path / f"a{seed}" for seed in (1, 2)]
        assert any("base_layer.lora_A" in key for key in read(adapters[0]))
        modelmerge.merge(base, adapters, tmp_path / "out", method="average")
        got = getattr(transformers, KINDS[name].classes[1]).from_pretrained(tmp_path / "out")
        merged = [dict(live.merge_and_unload().named_parameters()) for live in lives]
    moved = 0
    for key, weight in got.named_parameters():
        want = sum(each[key] for each in merged) / 2
        torch.testing.assert_close(weight, want, rtol=0, atol=1e-6)
        moved += not torch.equal(want, dict(net.named_parameters())[key])
    assert moved > 8


@pytest.mark.parametrize("saved", SAVED)
def test_experts_that_were_trained_whole_beside_a_lora_are_taken(saved: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network(KINDS["qwen3_moe"], 0)
        base = SAVED[saved](net, tmp_path / "base")
        live = trained(net, 1, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["experts"])
        with torch.no_grad():
            for name, weight in live.named_parameters():
                if "modules_to_save" in name:
                    weight += 0.1
        live.save_pretrained(tmp_path / "a")
        modelmerge.merge(base, [tmp_path / "a"], tmp_path / "out", method="average")
        got = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
        merged = dict(live.merge_and_unload().named_parameters())
    for key, weight in got.named_parameters():
        torch.testing.assert_close(weight, merged[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["kron", "ties"])
def test_methods_take_such_adapters_as_they_take_the_merged_models(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network(KINDS["qwen3_moe"], 0)
        base = SAVED["in memory"](net, tmp_path / "base")
        lives = [trained(net, seed, tmp_path / f"a{seed}") for seed in (1, 2)]
        modelmerge.merge(base, [tmp_path / "a1", tmp_path / "a2"], tmp_path / "out", method=method)
        experts = [SAVED["in memory"](live.merge_and_unload(), tmp_path / f"m{i}") for i, live in enumerate(lives)]
    modelmerge.merge(base, experts, tmp_path / "whole", method=method)
    got, want = read(tmp_path / "out"), read(tmp_path / "whole")
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("saved", SAVED)
def test_an_adapter_by_names_in_memory_fits_files_by_other_names(saved: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = network(KINDS["vit"], 0)
        base = SAVED[saved](net, tmp_path / "base")
        live = trained(net, 1, tmp_path / "a", target_modules=["q_proj", "fc1"])
        modelmerge.merge(base, [tmp_path / "a"], tmp_path / "out", method="average")
        got = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
        merged = dict(live.merge_and_unload().named_parameters())
    for key, weight in got.named_parameters():
        torch.testing.assert_close(weight, merged[key], rtol=0, atol=1e-6)
