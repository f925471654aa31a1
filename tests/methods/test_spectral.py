"""TSV-Merge, Iso-C, Iso-CTS and KnOTS against their definitions by full singular value decompositions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modelmerge.methods import linalg, registry
from modelmerge.methods.merge import iso_cts
from tests.support.float64 import ties as float64_ties
from tests.support.methods import context_of, merged

SHAPES = [(24, 18), (18, 24), (20, 20), (3, 40), (40, 3)]


def random_taus(tasks: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(seed)) * 1e-3


def lora_taus(tasks: int, shape: tuple[int, int], rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(tasks, shape[0], rank, generator=generator)
    return left @ torch.randn(tasks, rank, shape[1], generator=generator) * 1e-3


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(x.double(), full_matrices=False)


def procrustes(x: Tensor) -> Tensor:
    u, _, v = svd(x)
    return u @ v


def float64_iso_c(taus: Tensor) -> Tensor:
    u, s, v = svd(taus.double().sum(0))
    return s.mean() * u @ v


def float64_tsv_m(taus: Tensor) -> Tensor:
    rank = min(taus.shape[1:]) // len(taus)
    parts = [svd(tau) for tau in taus]
    u = procrustes(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
    v = procrustes(torch.cat([v[:rank] for _, _, v in parts]))
    return u @ torch.diag(torch.cat([s[:rank] for _, s, _ in parts])) @ v


def float64_iso_cts(taus: Tensor, fraction: float) -> Tensor:
    smaller, tasks = min(taus.shape[1:]), len(taus)
    own = round((smaller - int(smaller * fraction)) / tasks)
    u, s, v = svd(taus.double().sum(0))
    u, s, v = u[:, : smaller - own * tasks], s[: smaller - own * tasks], v[: smaller - own * tasks]
    parts = [(u, s, v)]
    for tau in taus.double():
        left, values, right = svd(tau - u @ u.T @ tau)
        parts.append((left[:, :own], values[:own], right[:own]))
    left, values, right = (torch.cat([part[k] for part in parts], dim=int(k == 0)) for k in range(3))
    return values.mean() * procrustes(left) @ procrustes(right)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_agrees(shape: tuple[int, int]) -> None:
    taus = random_taus(3, shape)
    want = float64_iso_c(taus)
    assert (merged("iso-c", taus).double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_agrees(shape: tuple[int, int]) -> None:
    taus = random_taus(3, shape)
    want = float64_tsv_m(taus)
    assert (merged("tsv-m", taus, scale=0.7).double() - 0.7 * want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (21, 21)])
def test_iso_cts_agrees(shape: tuple[int, int], fraction: float) -> None:
    taus = random_taus(3, shape)
    want = float64_iso_cts(taus, fraction)
    got = merged("iso-cts", taus, common_fraction=fraction)
    assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_iso_cts_with_all_directions_common_is_iso_c() -> None:
    taus = random_taus(3, (24, 18))
    one, other = merged("iso-cts", taus, common_fraction=1.0), merged("iso-c", taus)
    assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("smaller", "tasks", "fraction", "want"),
    [(24, 4, 0.8, (20, 1)), (768, 8, 0.8, (616, 19)), (24, 16, 0.8, (24, 0)), (3, 2, 0.0, (1, 1)), (2, 5, 0.0, (2, 0))],
)
def test_the_ranks_of_iso_cts_come_out_even(smaller: int, tasks: int, fraction: float, want: tuple[int, int]) -> None:
    assert iso_cts.ranks(smaller, tasks, fraction) == want


def float64_knots(taus: Tensor, density: float, scale: float, reduce: str) -> Tensor:
    u, s, v = svd(torch.cat(list(taus.double()), 1))
    kept = s > 1e-5 * s[0]
    coordinates = torch.stack(torch.split(s[kept, None] * v[kept], taus.shape[2], dim=1))
    weights = [1.0] * len(taus)
    return u[:, kept] @ float64_ties(coordinates, density, scale, reduce, "tensor", weights)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_knots_agrees(shape: tuple[int, int], reduce: str) -> None:
    taus = lora_taus(3, shape, rank=2)
    want = float64_knots(taus, 0.2, 0.6, reduce)
    assert (merged("knots", taus, reduce=reduce).double() - want).norm() <= 1e-4 * want.norm()


def test_knots_without_trim_and_with_one_expert_is_the_expert() -> None:
    tau = random_taus(1, (12, 30))
    assert torch.allclose(merged("knots", tau, density=1.0, scale=1.0), tau[0], atol=1e-8)


def test_singular_values_become_equal() -> None:
    s = svd(merged("iso-c", random_taus(4, (24, 18))))[1]
    assert s.max() <= (1 + 1e-5) * s.min()


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    basis = torch.linalg.qr(random_taus(1, (24, 24))[0]).Q
    taus = torch.stack([basis[:, 4 * i : 4 * i + 4] @ random_taus(1, (4, 24), i)[0] for i in range(3)])
    taus = torch.stack(
        [tau @ basis[:, 8 * i : 8 * i + 8] @ basis[:, 8 * i : 8 * i + 8].T for i, tau in enumerate(taus)]
    )
    want = taus.sum(0)
    assert (merged("tsv-m", taus) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_low_rank_experts_stay_in_the_space_they_span(shape: tuple[int, int]) -> None:
    """What an SVD would put into the directions that no expert has is left out."""
    taus = lora_taus(3, shape, rank=2)
    span = svd(torch.cat(list(taus.double()), 1))[0][:, :6]
    for name in ("iso-c", "iso-cts", "tsv-m", "knots"):
        got = merged(name, taus).double()
        assert (got - span @ (span.T @ got)).norm() <= 1e-5 * got.norm(), name
        assert int((svd(got)[1] > 1e-4 * svd(got)[1][0]).sum()) == 6, name
    s = svd(taus.double().sum(0))[1][:6]
    assert svd(merged("iso-c", taus))[1][:6].double() == pytest.approx(s.mean().item(), rel=1e-4)


CASES: dict[str, Callable[[], Tensor]] = {
    "identical": lambda: random_taus(1, (24, 18)).repeat(4, 1, 1),
    "nearly identical": lambda: random_taus(1, (24, 18)) + 1e-6 * random_taus(4, (24, 18), 1),
    "opposite": lambda: random_taus(1, (24, 18)) * torch.tensor([1.0, -1.0])[:, None, None],
    "more tasks than columns": lambda: random_taus(30, (24, 18)),
    "a nearly zero one": lambda: random_taus(4, (24, 18)) * torch.tensor([1.0, 1e-6, 1.0, 1.0])[:, None, None],
    "a dead column": lambda: random_taus(3, (24, 18)) * (torch.arange(18) != 4),
    "huge": lambda: random_taus(3, (24, 18)) * 1e6,
    "one row": lambda: random_taus(3, (1, 18)),
    "one column": lambda: random_taus(3, (24, 1)),
}


@pytest.mark.parametrize("name", ["tsv-m", "iso-c", "iso-cts", "knots"])
@pytest.mark.parametrize("case", CASES)
def test_awkward_task_vectors(case: str, name: str) -> None:
    taus = CASES[case]()
    got = merged(name, taus)
    assert got.isfinite().all()
    assert got.norm() <= 5 * taus.norm()
    if case != "opposite":
        assert got.any()


def test_tsv_m_of_identical_experts_is_one_of_them_cut_to_its_rank() -> None:
    tau = random_taus(1, (24, 18))[0]
    u, s, v = svd(tau)
    want = u[:, :6] @ torch.diag(s[:6]) @ v[:6]
    assert (merged("tsv-m", tau.repeat(3, 1, 1)).double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_gram_matrices_lose_nothing_that_counts(shape: tuple[int, int], condition: float) -> None:
    """Against the full float64 SVD of float32 matrices: triplets to 1e-6, polar factors to 1e-5."""
    u, _, v = svd(random_taus(1, shape)[0])
    x = ((u * torch.logspace(0, -torch.tensor(condition).log10().item(), 40)) @ v).float()
    u, s, v = svd(x)
    kept = s > linalg.SUPPORT * s[0]
    factor, mean = linalg.polar(x)
    assert (factor - u[:, kept] @ v[kept]).norm() <= 1e-5 * factor.norm()
    assert torch.allclose(mean, s[kept].mean(), rtol=1e-6, atol=0)
    left, some, right = linalg.leading_triplets(x, 12)
    assert torch.allclose(some, s[:12], rtol=1e-8)
    assert torch.allclose((left * some) @ right, (u[:, :12] * s[:12]) @ v[:12], atol=1e-9)


@pytest.mark.parametrize("condition", [1.0, 1e1, 1e3, 0.9e5, 1.2e5, 1e7, math.inf])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 2), (40, 40), (40, 100)])
def test_polar_factors_by_products(shape: tuple[int, int], condition: float) -> None:
    """Against the singular vectors that x is made of; refused as soon as one direction is missing."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, shape[0], generator=generator).double()).Q for n in shape)
    s = 3e-4 * torch.logspace(0, -math.log10(condition), shape[0]) if condition < math.inf else torch.zeros(shape[0])
    x = (u * s) @ v.T
    factor, sound = linalg.polar_by_products(x)
    assert bool(sound) == bool((s > linalg.SUPPORT * s[0]).all())
    if sound:
        limit = 1e-12 if condition <= 10 else 1e-9
        assert (factor - u @ v.T).norm() <= limit * shape[0] ** 0.5


def test_polar_factors_of_many_by_products() -> None:
    """Each for itself; rows of zeros, a matrix of zeros and one that is not finite are refused."""
    x = torch.randn(5, 30, 50, generator=torch.Generator().manual_seed(0)).double()
    x[1, 7] = 0.0
    x[2] = 0.0
    x[3, 0, 0] = math.nan
    factor, sound = linalg.polar_by_products(x)
    assert sound.tolist() == [True, False, False, False, True]
    for i in (0, 4):
        u, _, v = svd(x[i])
        assert (factor[i] - u @ v).norm() <= 1e-12 * factor[i].norm()


@pytest.mark.parametrize("name", ["tsv-m", "kron"])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_known_factors_give_the_same_merge(name: str, shape: tuple[int, int]) -> None:
    """Also where one expert's are not known, one changed nothing, and one's rank is more than it needs."""
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(shape[0], r, generator=generator), torch.randn(r, shape[1], generator=generator) * 1e-3)
             for r in (2, 3, 4, 0)]  # fmt: skip
    pairs[1][0][:, 2] = pairs[1][0][:, 1]
    taus = torch.stack([left @ right for left, right in pairs])
    chosen = registry.load(name)
    options = chosen.options()
    want = chosen.apply(taus, options, context_of(chosen, options, taus))
    known = (*pairs[:2], None, pairs[3])
    got = chosen.apply(taus, options, context_of(chosen, options, taus, factors=known))
    assert (got - want).norm() <= 1e-4 * want.norm()
