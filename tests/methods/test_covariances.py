"""ACTMat, ACE and SWUDI's filter against their definitions in float64, by decompositions of whole matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from tests.support.methods import context_of, leaves_out_and_says, merged, taus_of

SHAPES = [(24, 18), (18, 24), (20, 20), (2, 50), (50, 2)]


def random_taus(shape: tuple[int, int], tasks: int = 4) -> Tensor:
    """Of unlike lengths."""
    lengths = torch.linspace(0.5, 1.5, tasks)[:, None, None]
    return torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(1)) * lengths * 1e-2


def grams(x: Tensor) -> Tensor:
    return x.mT @ x


def float64_actmat(taus: Tensor, density: float, cutoff: float) -> Tensor:
    kept = round(density * taus[0].numel())
    limits = taus.abs().flatten(1).topk(kept).values[:, -1, None, None]
    covariances = grams(torch.where(taus.abs() >= limits, taus, 0.0).double())
    return (taus.double() @ covariances).sum(0) @ torch.linalg.pinv(covariances.sum(0), rtol=cutoff, hermitian=True)


def float64_swudi(taus: Tensor, time: float, share: float) -> Tensor:
    """The filter between the start and the least-squares solution, eigenvalue by eigenvalue."""
    taus = taus.double()
    covariances = grams(taus) / taus.square().sum((1, 2))[:, None, None]
    values, vectors = torch.linalg.eigh(covariances.sum(0))
    start, target, merged_ = taus.sum(0), (taus @ covariances).sum(0), taus.sum(0)
    for value, v in list(zip(values, vectors.T, strict=True))[-math.ceil(share * len(values)) :]:
        if value > 1e-10:
            merged_ = merged_ + (1 - torch.exp(-value * time)) * torch.outer(target @ v / value - start @ v, v)
    return merged_


def float64_ace(taus: Tensor, *, published: bool, share: float = 0.3, ridge: float = 1.0) -> Tensor:
    """Term by term, as the authors' code has it; by default free of units."""
    taus = taus.double()
    (tasks, m, n), squares = taus.shape, taus.square().sum((1, 2))
    logs = squares.log()
    uneven = not published or bool(logs.var() > 0.3 * logs.mean() ** 2)
    centred = taus - taus.mean(1, keepdim=True)
    covariances, ridges = grams(centred), torch.full((tasks,), 0.01 if published else ridge / n, dtype=torch.float64)
    if uneven:
        own = centred.square().sum((1, 2))
        covariances, ridges = covariances / own[:, None, None], ridges / own if published else ridges
    full = covariances + ridges[:, None, None] * torch.eye(n, dtype=torch.float64)
    inverse = full.sum(0)
    if published:
        inverse = inverse + covariances.sum(0).mean(0) / (squares.mean() if uneven else 1.0)
    merged_ = ((centred if published else taus) @ full).sum(0) @ torch.linalg.inv(inverse)
    if uneven:
        u, s, v = torch.linalg.svd(merged_ + (taus @ (covariances - full.mean(0))).sum(0), full_matrices=False)
        k = int(share * min(m, n))
        merged_ = merged_ + (s[:k].mean() * u[:, :k] @ v[:k] if k else 0.0)
    return merged_


@pytest.mark.parametrize(("density", "cutoff"), [(1.0, 1e-2), (0.5, 1e-2), (1.0, 0.2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_actmat_agrees(shape: tuple[int, int], density: float, cutoff: float) -> None:
    taus = random_taus(shape)
    want = float64_actmat(taus, density, cutoff)
    assert (merged("actmat", taus, density=density, cutoff=cutoff).double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("time", "share"), [(1300.0, 0.65), (3.0, 1.0), (1e6, 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_swudi_agrees(shape: tuple[int, int], time: float, share: float) -> None:
    taus = random_taus(shape)
    want = float64_swudi(taus, time, share)
    got = merged("wudi", taus, solver="spectral", time=time, share=share)
    assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_swudi_goes_from_the_sum_to_the_minimiser() -> None:
    taus = taus_of(3)
    start, end = (merged("wudi", taus, solver="spectral", time=time, share=1.0) for time in (1e-9, 1e9))
    assert torch.allclose(start, taus.sum(0), atol=1e-7)
    assert (end - merged("wudi", taus, ridge=1e-9)).norm() <= 1e-4 * end.norm()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["even", "uneven"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 2 not in shape])
def test_ace_agrees(shape: tuple[int, int], spread: float, published: bool) -> None:
    taus = random_taus(shape)
    taus[0] *= spread
    want = float64_ace(taus, published=published)
    assert (merged("ace", taus, published=published).double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("share", "ridge"), [(0.0, 0.1), (1.0, 3.0)])
def test_the_options_of_ace(share: float, ridge: float) -> None:
    taus = random_taus((24, 18))
    want = float64_ace(taus, published=False, share=share, ridge=ridge)
    assert (merged("ace", taus, share=share, ridge=ridge).double() - want).norm() <= 1e-5 * want.norm()


CASES: dict[str, dict[str, Any]] = {"actmat": {}, "ace": {}, "wudi": {"solver": "spectral"}}


@pytest.mark.parametrize("name", CASES)
def test_weights_scale_what_each_expert_wants(name: str) -> None:
    """The covariance stays that of the expert: a weight of 2 on the only expert there is doubles it."""
    taus = taus_of(3)
    one, other = (merged(name, taus, (w, w, w), **CASES[name]) for w in (1.0, 2.0))
    assert (other - 2.0 * one).norm() <= 1e-5 * one.norm()
    assert not torch.allclose(merged(name, taus, (2.0, 1.0, 1.0), **CASES[name]), one, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_they_are_free_of_units(factor: float, name: str) -> None:
    taus = taus_of(3)
    one, other = merged(name, taus, **CASES[name]), merged(name, factor * taus, **CASES[name])
    assert (other - factor * one).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "taus",
    [
        taus_of(1).repeat(4, 1, 1),
        taus_of(1) * torch.tensor([1.0, -1.0])[:, None, None],
        taus_of(30),
        taus_of(4) * torch.tensor([1.0, 1e-6, 0.0, 1.0])[:, None, None],
        taus_of(3)[:, :, :2] @ taus_of(3, seed=5)[:, :2] * 1e2,
        taus_of(3) * (torch.arange(18) != 4),
        taus_of(3) * 1e6,
    ],
    ids=["identical", "opposite", "more tasks than columns", "nearly zero", "low rank", "a dead column", "huge"],
)
def test_awkward_task_vectors(taus: Tensor, name: str) -> None:
    got = merged(name, taus, **CASES[name])
    assert got.isfinite().all()
    assert got.norm() <= 2 * taus.sum(0).norm() + 2 * taus.norm()


def test_low_rank_experts_of_unlike_inputs_come_out_as_their_sum() -> None:
    """Where inputs share nothing, no expert disturbs another, and each is fitted in full."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    taus = torch.stack([torch.randn(30, 4, generator=generator) @ inputs[4 * i : 4 * i + 4] for i in range(4)]) * 1e-2
    for name, values in (("actmat", {}), ("wudi", {"solver": "spectral", "time": 1e6})):
        got = merged(name, taus, **values)
        assert (got - taus.sum(0)).norm() <= 1e-4 * got.norm(), name


def test_ace_leaves_a_negligible_task_vector_out_and_says_so() -> None:
    leaves_out_and_says("ace")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_adapters_give_the_same_merge_as_factors_and_as_a_whole(shape: tuple[int, int], name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator) * 1e-3)
             for _ in range(3)]  # fmt: skip
    taus, chosen = torch.stack([left @ right for left, right in pairs]), registry.load(name)
    options = make_options(chosen, name, CASES[name])
    whole = chosen.apply(taus, options, context_of(chosen, options, taus))
    factored = chosen.apply(taus, options, context_of(chosen, options, taus, factors=tuple(pairs)))
    assert (factored - whole).norm() <= 1e-4 * whole.norm()
    assert int((torch.linalg.svdvals(whole.double()) > 1e-5 * whole.norm()).sum()) == 9
    if name == "actmat":
        want = float64_actmat(taus, 1.0, 0.01)
        assert (factored.double() - want).norm() <= 1e-4 * want.norm()
