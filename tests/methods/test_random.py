"""The random draws: uniform, independent, and the same however a tensor is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelmerge.method import Context
from modelmerge.methods import _random

CPU = torch.device("cpu")
N = 1 << 21


def context(**told: object) -> Context:
    return Context(**({"tensor": "w", "weights": (1.0, 1.0), "experts": ("a", "b"), "seed": 0} | told))  # type: ignore[arg-type]


def uniforms(expert: int = 0, count: int = N, **told: object) -> Tensor:
    """Draws as numbers from 0 to 1."""
    return (_random.draws(context(**told), expert, count, CPU).double() + 2**15 + 0.5) / 2**16


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
    drawn = _random.draws(context(seed=seed), 0, N, CPU).int() & 0xFFFF
    for bit in range(16):
        assert abs(((drawn >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 16, 64, 768, 1024, 2048, 4096])
def test_draws_of_elements_are_independent(lag: int) -> None:
    u = uniforms()
    cells = (u[:-lag] * 16).long() * 16 + (u[lag:] * 16).long()
    assert abs(chi_square(cells.bincount(minlength=256).double())) < 5
    assert abs(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize("other", [{"expert": 1}, {"seed": 1}, {"seed": -1}, {"tensor": "v"}, {"tensor": "w.a"}])
def test_draws_of_experts_seeds_and_tensors_are_independent(other: dict[str, object]) -> None:
    one, two = uniforms(), uniforms(**other)  # type: ignore[arg-type]
    cells = (one * 16).long() * 16 + (two * 16).long()
    assert abs(chi_square(cells.bincount(minlength=256).double())) < 5
    # Nor is one a shifted copy of the other near by.
    for lag in range(1, 64):
        assert (one[lag:] == two[:-lag]).double().mean() < 1e-3


@pytest.mark.parametrize("start", [0, 1, 2, 3, 99, 100_001, (1 << 31) - 3, (1 << 33) - 10])
def test_a_block_draws_what_the_whole_draws_there(start: int) -> None:
    whole = _random.draws(context(start=start), 0, 1000, CPU)
    for first in (1, 2, 501):
        block = _random.draws(context(start=start + first), 0, 300, CPU)
        assert torch.equal(block, whole[first : first + 300])


def split_mix(state: int) -> int:
    """The generator's output function, in Python's own integers."""
    mask = (1 << 64) - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("first", [0, 5, 1 << 31, (1 << 62) - 3])
@pytest.mark.parametrize("key", [0, 1, 0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210])
def test_signed_and_unsigned_arithmetic_are_splitmix(first: int, key: int) -> None:
    signed = _random.mixed(torch.arange(1000), first, key)
    want = [split_mix((key + (first + i + 1) * 0x9E3779B97F4A7C15) % (1 << 64)) for i in range(3)]
    assert [word % (1 << 64) for word in signed[:3].tolist()] == want
    assert torch.equal(signed, _random.hashed(first, 1000, key, CPU))
    assert len(signed.unique()) == 1000


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.1, 0.5, 0.999, 1.0])
def test_the_share_that_is_kept_is_the_one_that_is_named(density: float) -> None:
    share = _random.share(density)
    assert abs(share - density) <= 2**-16
    kept = _random.kept(context(), 0, N, density, CPU)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert abs(kept.double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / N)


def test_the_draws_do_not_change_from_release_to_release() -> None:
    assert _random.draws(context(seed=7), 1, 6, CPU).tolist() == DRAWN


DRAWN = [-6665, -11674, 15941, -13161, -3312, -10125]
