"""The two-sided weighting against its definition, solved as one dense linear system in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelmerge.methods import registry
from tests.support.methods import context_of, leaves_out_and_says, merged, taus_of


def power(x: Tensor, exponent: float) -> Tensor:
    """A power of a Gram matrix, at trace 1."""
    values, vectors = torch.linalg.eigh(x)
    powered = (vectors * values.clamp(min=0) ** exponent) @ vectors.T
    return powered / powered.trace()


def powers(m: int, n: int) -> tuple[float, float]:
    """Those of the rows' and the columns' Gram matrices: 3/4 on the side that is narrower by half or more."""
    tilt = 3 / 16 * min(1.0, abs(math.log2(m) - math.log2(n)))
    narrower, wider = 9 / 16 + tilt, 9 / 16 - tilt
    return (narrower, wider) if m <= n else (wider, narrower)


def float64_minimiser(taus: Tensor, ridge: float, weights: tuple[float, ...] | None = None) -> Tensor:
    taus = taus.double()
    tasks, m, n = taus.shape
    wanted = taus * torch.tensor(weights or (1.0,) * tasks, dtype=torch.float64)[:, None, None]
    pull, (rows, columns) = ridge * tasks / (m * n), powers(m, n)
    system = pull * torch.eye(m * n, dtype=torch.float64)
    target = pull * wanted.sum(0).flatten()
    for tau, want in zip(taus, wanted, strict=True):
        weighting = torch.kron(power(tau @ tau.T, rows), power(tau.T @ tau, columns))
        system += weighting
        target += weighting @ want.flatten()
    return torch.linalg.solve(system, target).view(m, n)


@pytest.mark.parametrize("ridge", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (5, 15), (15, 5), (10, 10), (1, 15), (15, 1)])
def test_finds_the_minimiser(shape: tuple[int, int], ridge: float) -> None:
    taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    want = float64_minimiser(taus, ridge)
    got = merged("kron", taus, ridge=ridge, damping=0.0, tolerance=1e-6)
    assert (got.double() - want).norm() <= 1e-4 * want.norm()


def test_the_default_tolerance_is_near_enough() -> None:
    taus = taus_of(4)
    want = float64_minimiser(taus, 0.3)
    assert (merged("kron", taus, damping=0.0).double() - want).norm() <= 1e-2 * want.norm()


def test_weights_scale_what_each_expert_wants() -> None:
    taus, weights = taus_of(3), (0.5, 2.0, 0.0)
    want = float64_minimiser(taus, 0.3, weights)
    got = merged("kron", taus, weights, damping=0.0, tolerance=1e-6)
    assert (got.double() - want).norm() <= 1e-4 * want.norm()


def test_one_expert_comes_out_as_itself() -> None:
    tau = taus_of(1)
    assert torch.allclose(merged("kron", tau, damping=0.0), tau[0], atol=1e-8)


def test_a_large_ridge_is_task_arithmetic() -> None:
    taus = taus_of(3)
    assert torch.allclose(merged("kron", taus, ridge=1e9, damping=0.0), taus.sum(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("base", [1.0, 0.05, 0.0])
@pytest.mark.parametrize(("experts", "fall"), [(1, 0.7), (2, 0.7), (3, 1.0)])
def test_damping_shortens_what_is_large_beside_its_weight(experts: int, fall: float, base: float) -> None:
    """By five quarters where the experts take up few of the directions, by half where they take up all."""
    left, s, right = torch.linalg.svd(taus_of(experts), full_matrices=False)
    s = s * fall ** torch.arange(s.shape[1])
    taus = (left * s[:, None]) @ right
    chosen = registry.load("kron")
    theta_0 = base * torch.randn(taus.shape[1:], generator=torch.Generator().manual_seed(5))
    plain = merged("kron", taus, damping=0.0)
    damped = chosen.apply(taus, chosen.options(), context_of(chosen, chosen.options(), taus, base=theta_0))
    size = torch.linalg.matrix_norm(plain, 2) / torch.linalg.matrix_norm(theta_0, 2) if base else 0.0
    directions = (s.sum(1) ** 2 / s.square().sum(1)).sum()
    share = min(1.0, float(directions) / min(taus.shape[1:]))
    assert torch.allclose(damped * (1 + (5 - 3 * share**2) / 4 * size), plain, rtol=1e-4, atol=1e-9)


def test_scale_is_a_factor() -> None:
    taus = taus_of(3)
    assert torch.allclose(merged("kron", taus, scale=0.5), 0.5 * merged("kron", taus), rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_it_is_free_of_units(factor: float) -> None:
    """A model and its task vectors in other units give the merge in those units."""
    taus = taus_of(3)
    chosen = registry.load("kron")
    options = chosen.options()
    context = context_of(chosen, options, taus)
    assert context.base is not None
    there = context_of(chosen, options, taus, base=factor * context.base)
    one, other = chosen.apply(taus, options, context), chosen.apply(factor * taus, options, there)
    assert (other - factor * one).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: taus_of(1).repeat(4, 1, 1),
        lambda: taus_of(1) * torch.tensor([1.0, -1.0])[:, None, None],
        lambda: taus_of(30),
        lambda: taus_of(4) * torch.tensor([1.0, 1e-6, 0.0, 1.0])[:, None, None],
        lambda: taus_of(3)[:, :, :2] @ taus_of(3, seed=5)[:, :2] * 1e2,
        lambda: taus_of(3) * (torch.arange(18) != 4),
        lambda: taus_of(3) * 1e6,
    ],
    ids=["identical", "opposite", "more tasks than columns", "nearly zero", "low rank", "a dead column", "huge"],
)
def test_awkward_task_vectors(make: object) -> None:
    assert callable(make)
    taus = make()
    got = merged("kron", taus, damping=0.0)
    assert got.isfinite().all()
    assert got.norm() <= 2 * taus.sum(0).norm() + 2 * taus.norm()


def test_a_negligible_task_vector_is_left_out_and_said() -> None:
    leaves_out_and_says("kron")
