"""WUDI against its objective, minimised and descended by plain float64 means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import registry
from modelmerge.methods.contract import Context
from modelmerge.methods.options import make_options
from tests.support.methods import merged, taus_of


def loss(candidate: Tensor, taus: Tensor) -> Tensor:
    """`sum_i ||(M - tau_i) tau_i^T||^2 / ||tau_i||^2`, as the paper writes it."""
    return sum((((candidate - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus)


def float64_minimiser(taus: Tensor, ridge: float, weights: tuple[float, ...] | None = None) -> Tensor:
    taus = taus.double()
    targets = taus * torch.tensor(weights or (1.0,) * len(taus), dtype=torch.float64)[:, None, None]
    covariances = torch.stack([tau.T @ tau / (tau**2).sum() for tau in taus])
    ridge = ridge * torch.linalg.eigvalsh(covariances.sum(0)).mean()
    pull = (targets @ covariances).sum(0) + ridge * targets.sum(0)
    return pull @ torch.linalg.inv(covariances.sum(0) + ridge * torch.eye(taus.shape[2], dtype=torch.float64))


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (20, 20), (2, 50), (50, 2)])
def test_the_exact_solver_finds_the_minimiser(shape: tuple[int, int], ridge: float) -> None:
    taus = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    want = float64_minimiser(taus, ridge)
    assert (merged("wudi", taus, ridge=ridge).double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("size", [0.05, 2.0])
def test_adapters_have_a_ridge_by_their_rank_and_are_damped(size: float) -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(48, 64, generator=generator, dtype=torch.float64)
    factors = [(torch.randn(48, r, generator=generator), torch.randn(r, 64, generator=generator)) for r in (2, 4)]
    taus = torch.stack([left @ right * (size * base.norm() / (left @ right).norm()) for left, right in factors])
    # The mean eigenvalue is 2 / 3 over the three directions that an expert has, 2 / 64 over all.
    want = float64_minimiser(taus, 0.3 * 64 / 3)
    want /= 1 + 1.25 * torch.linalg.matrix_norm(want, 2) / torch.linalg.matrix_norm(base, 2)
    want *= min(1.0, float(taus.flatten(1).norm(dim=1).mean() / want.norm()))
    chosen = registry.load("wudi")
    got = chosen.apply(taus.float(), chosen.options(), Context(tensor="w", weights=(1.0, 1.0), base=base.float()))
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_weights_scale_what_each_expert_wants() -> None:
    taus, weights = taus_of(4), (0.5, 1.0, 2.0, 0.0)
    want = float64_minimiser(taus, 0.3, weights)
    assert (merged("wudi", taus, weights).double() - want).norm() <= 1e-5 * want.norm()


def test_the_minimiser_is_one() -> None:
    taus = taus_of(3).double()
    best = merged("wudi", taus_of(3), ridge=1e-6).double()
    assert loss(best, taus) < 0.5 * loss(taus.sum(0), taus)
    for seed in range(5):
        step = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1e-3
        assert loss(best, taus) < loss(best + step, taus)


def test_a_large_ridge_is_task_arithmetic() -> None:
    taus = taus_of(3)
    assert torch.allclose(merged("wudi", taus, ridge=1e9), taus.sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_the_descent_agrees_with_float64_autograd(shape: tuple[int, int]) -> None:
    taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 3e-3
    got = merged("wudi", taus, solver="adam", steps=60)
    want = taus.double().sum(0).requires_grad_()
    adam = torch.optim.Adam([want], lr=1e-5)
    for _ in range(60):
        adam.zero_grad()
        loss(want, taus.double()).backward()
        adam.step()
    assert (got.double() - want).norm() <= 1e-5 * want.norm()
    assert loss(got, taus) < loss(taus.sum(0), taus)


def test_the_relative_rate_is_free_of_scale() -> None:
    taus = taus_of(3)
    told = {"solver": "adam", "relative_lr": 0.1, "steps": 50}
    one, other = merged("wudi", taus, **told), merged("wudi", taus * 100, **told)
    assert (other - 100 * one).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("values", [{}, {"solver": "adam", "steps": 30}], ids=["exact", "adam"])
@pytest.mark.parametrize(("size", "says"), [(0.0, "did not change"), (1e-5, "hardly changed")])
def test_a_negligible_task_vector_is_left_out_and_said(size: float, says: str, values: dict[str, Any]) -> None:
    taus = taus_of(4)
    taus[2] *= size
    told: list[tuple[int, str]] = []
    chosen = registry.load("wudi")
    options = make_options(chosen, "wudi", values)
    context = Context(tensor="w", weights=(1.0,) * 4, leave_out=lambda i, why: told.append((i, why)))
    with_it = chosen.apply(taus, options, context)
    assert [i for i, _ in told] == [2]
    assert says in told[0][1]
    assert torch.equal(with_it, merged("wudi", taus[[0, 1, 3]], **values))


def test_identical_experts_come_out_as_themselves() -> None:
    tau = taus_of(1)
    got = merged("wudi", tau.repeat(4, 1, 1), ridge=1e-6)
    assert (got - tau[0]).norm() <= 1e-3 * tau.norm()


@pytest.mark.parametrize("values", [{}, {"solver": "adam", "steps": 10}], ids=["exact", "adam"])
def test_awkward_task_vectors(values: dict[str, Any]) -> None:
    one = taus_of(1)
    cases = [one.repeat(3, 1, 1), one * torch.tensor([1.0, -1.0])[:, None, None], taus_of(30), taus_of(3) * 1e6]
    for taus in cases:
        got = merged("wudi", taus, **values)
        assert got.isfinite().all()
        assert got.norm() <= 2 * taus.sum(0).norm() + taus.norm()
