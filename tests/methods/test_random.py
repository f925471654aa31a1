"""The random draws: uniform, independent, and the same however a tensor is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import random
from modelmerge.methods.contract import Context

CPU = torch.device("cpu")
N = 1 << 21


def context(**told: object) -> Context:
    return Context(**({"tensor": "w", "weights": (1.0, 1.0), "experts": ("a", "b"), "seed": 0} | told))  # type: ignore[arg-type]


def uniforms(expert: int = 0, count: int = N, **told: object) -> Tensor:
    """Draws as numbers from 0 to 1."""
    return (random.draws(context(**told), expert, count, CPU).double() + 2**15 + 0.5) / 2**16


def pairs(one: Tensor, two: Tensor) -> Tensor:
    """How often each pair of sixteenths comes up among the draws of two."""
    one, two = ((drawn.int() + 2**15) >> 12 for drawn in (one, two))
    return (one * 16 + two).bincount(minlength=256).double()


def chi_square(counts: Tensor) -> float:
    """Standard deviations by which counts differ from even ones."""
    expected = counts.sum().item() / len(counts)
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(4))
def test_draws_are_uniform_in_every_bit(seed: int) -> None:
    u = uniforms(seed=seed)
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / N)
    assert abs(chi_square((u * 256).long().bincount(minlength=256).double())) < 5
    drawn = random.draws(context(seed=seed), 0, N, CPU).int() & 0xFFFF
    for bit in range(16):
        assert abs(((drawn >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 16, 64, 768, 1024, 2048, 4096, 8192])
def test_draws_of_elements_are_independent(lag: int) -> None:
    u, drawn = uniforms(), random.draws(context(), 0, N, CPU)
    assert abs(chi_square(pairs(drawn[:-lag], drawn[lag:]))) < 5
    assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize("other", [{"expert": 1}, {"seed": 1}, {"seed": -1}, {"tensor": "v"}, {"tensor": "w.a"}])
def test_draws_of_experts_seeds_and_tensors_are_independent(other: dict[str, object]) -> None:
    told: dict[str, Any] = dict(other)
    expert = told.pop("expert", 0)
    one, two = random.draws(context(), 0, N, CPU), random.draws(context(**told), expert, N, CPU)
    assert abs(chi_square(pairs(one, two))) < 5
    # Nor is one a shifted copy of the other near by.
    for lag in range(1, 64):
        assert (one[lag:] == two[:-lag]).count_nonzero() < 1e-3 * (N - lag)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 99, 100_001, (1 << 31) - 3, (1 << 33) - 10])
def test_a_block_draws_what_the_whole_draws_there(start: int) -> None:
    whole = random.draws(context(start=start), 0, 1000, CPU)
    for first in (1, 2, 501):
        block = random.draws(context(start=start + first), 0, 300, CPU)
        assert torch.equal(block, whole[first : first + 300])


def split_mix(state: int) -> int:
    """SplitMix64's output function, in Python's own integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def entry(key: int, place: int) -> int:
    """An entry of the table that a key starts."""
    return split_mix((key + (place + 1) * 0x9E3779B97F4A7C15) % 2**64)


@pytest.mark.parametrize("first", [0, 5, 1023, 1 << 31, (1 << 61) - 3])
@pytest.mark.parametrize("key", [0, 1, 0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210])
def test_words_are_folded_from_two_tables(first: int, key: int) -> None:
    drawn = random.hashed(first, 3000, key, CPU)
    for i in (0, 1, 1022, 1023, 1024, 2999):
        row, lane = divmod(first + i, 1024)
        word = (entry(key ^ 0x6A09E667F3BCC908, row) ^ entry(key, lane)) * 0xD1342543DE82EF95 % 2**64
        assert drawn[i].item() % 2**64 == word ^ (word >> 32)
    assert len(drawn.unique()) == 3000


def test_signed_arithmetic_gives_the_same_words() -> None:
    rows, lanes = (random.split_mix(0, count, key) for key, count in ((1 ^ random._ROWS, 3), (1, random.LANES)))
    assert torch.equal(random.folded(rows, lanes).flatten(), random.hashed(0, 3 * random.LANES, 1, CPU))


@pytest.mark.parametrize("density", [0.1, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_corners_of_rectangles_are_independent(seed: int, density: float) -> None:
    """What the tables alone would not give: four words of two rows and two lanes."""
    kept = (uniforms(seed=seed) < density).double().sub_(density).view(-1, 4 * random.LANES)
    half, width = len(kept) // 2, kept.shape[1] // 2
    for one, two in ((kept[:half], kept[half:]), (kept[:-1], kept[1:])):
        corners = one[:, :width] * one[:, width:] * two[:, :width] * two[:, width:]
        assert abs(corners.sum()) < 5 * (density * (1 - density)) ** 2 * math.sqrt(corners.numel())


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 4096), (1365, 1536)])
def test_masks_have_the_spectrum_of_independent_entries(shape: tuple[int, int]) -> None:
    """Draws that repeated by rows or lanes would show as a large singular value."""
    kept = (uniforms()[: shape[0] * shape[1]] < 0.1).float().sub_(0.1).view(shape)
    largest = math.sqrt(0.1 * 0.9) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    smaller = kept @ kept.T if shape[0] <= shape[1] else kept.T @ kept
    assert 0.97 < torch.linalg.eigvalsh(smaller)[-1].sqrt() / largest < 1.03


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.1, 0.5, 0.999, 1.0])
def test_the_share_that_is_kept_is_the_one_that_is_named(density: float) -> None:
    share = random.share(density)
    assert abs(share - density) <= 2**-16
    kept = random.keep(context(), 0, density, torch.empty(N))
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert abs(kept.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / N)


def test_the_draws_do_not_change_from_release_to_release() -> None:
    assert random.draws(context(seed=7), 1, 6, CPU).tolist() == DRAWN


DRAWN = [26038, 25690, -26180, 7971, -12644, -11604]
