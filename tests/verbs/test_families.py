"""Real classes of many families, each under its names in files and in memory: base the one way, experts the other."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge

transformers = pytest.importorskip("transformers")

from tests.support.families import KINDS, SAVED, logits, network  # noqa: E402  (needs transformers)

_QUICK = ("qwen2", "mixtral", "qwen3_vl_moe", "granitemoe", "vit", "wav2vec2", "llava", "qwen2_5_vl", "t5")
_WAYS = (("stored", "in memory"), ("in memory", "stored"))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Small models come with warnings of their own."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check(name: str, ours: str, theirs: str, folder: Path) -> None:
    """Merge two experts onto a base; the loaded result is the mean of the experts in memory."""
    kind = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the classes' own, at sizes that nobody trains
        base, *experts = (network(kind, seed) for seed in range(3))
        mean: Any = network(kind, 0)
        with torch.no_grad():
            for weight, *others in zip(mean.parameters(), *(expert.parameters() for expert in experts), strict=True):
                weight.copy_(sum(others) / 2)
        saved = SAVED[ours](base, folder / "base")
        merged = [SAVED[theirs](expert, folder / f"e{i}") for i, expert in enumerate(experts)]
        modelmerge.merge(saved, merged, folder / "out", method="average")
        got = getattr(transformers, kind.classes[1]).from_pretrained(folder / "out").eval()
        want = logits(mean, kind)
        assert torch.allclose(logits(got, kind), want, rtol=0, atol=1e-5)
        assert (logits(base, kind) - want).abs().max() > 1e-3
    theirs_by_name = dict(got.named_parameters())
    for key, weight in mean.named_parameters():  # of towers that the inputs do not reach, too
        assert torch.allclose(theirs_by_name[key], weight, rtol=0, atol=1e-5), key


@pytest.mark.parametrize(("ours", "theirs"), _WAYS)
@pytest.mark.parametrize("name", _QUICK)
def test_a_family_merges_under_either_names(name: str, ours: str, theirs: str, tmp_path: Path) -> None:
    check(name, ours, theirs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), _WAYS)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in _QUICK])
def test_every_family_merges_under_either_names(name: str, ours: str, theirs: str, tmp_path: Path) -> None:
    check(name, ours, theirs, tmp_path)
