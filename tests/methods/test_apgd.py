"""APGD's parts against plain float64: loss and gradient, projection, trim, guards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmerge import method
from modelmerge.method import Context
from modelmerge.methods import _linalg
from modelmerge.methods.merge import apgd
from tests.test_every_method import merged, taus_of


def loss(correction: Tensor, taus: Tensor, lambdas: list[float], inner: str) -> Tensor:
    """`sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>)^2`, as the paper writes it."""
    merged_ = sum(lam * (tau + correction) for lam, tau in zip(lambdas, taus, strict=True))
    dims = (1,) if inner == "row" else (0, 1)
    return sum(((tau * (merged_ - tau)).sum(dims) ** 2).sum() for tau in taus)


def float64_descent(taus: Tensor, lambdas: list[float], basis: Tensor, options: apgd.Options) -> Tensor:
    """Adam by autograd with the projected gradient, in float64."""
    taus, basis = taus.double(), basis.double()
    correction = torch.zeros_like(taus[0], requires_grad=True)
    adam = torch.optim.Adam([correction], lr=options.lr)
    for _ in range(options.steps):
        adam.zero_grad()
        loss(correction, taus, lambdas, options.inner).backward()
        correction.grad -= basis @ (basis.T @ correction.grad)
        adam.step()
    return correction.detach()


@pytest.mark.parametrize("inner", ["row", "matrix"])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_the_descent_agrees_with_float64_autograd(shape: tuple[int, int], inner: str) -> None:
    taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 3e-3
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    options = apgd.Options(inner=inner, steps=60)
    basis = apgd.task_basis(list(taus), options)
    got = apgd.descend(taus, lambdas, basis, options, Context(tensor="w", weights=(1.0,) * len(taus)))
    want = float64_descent(taus, lambdas, basis, options)
    assert (got.double() - want).norm() <= 1e-4 * want.norm()
    assert loss(got.double(), taus.double(), lambdas, inner) < loss(
        torch.zeros_like(want), taus.double(), lambdas, inner
    )


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_left_singular_vectors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    got = _linalg.left_singular_vectors(x, 7)
    want = torch.linalg.svd(x.double()).U[:, :7]
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)
    assert torch.allclose(got.T @ got, torch.eye(7, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_left_singular_vectors_of_a_low_rank_matrix_stay_orthonormal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    got = _linalg.left_singular_vectors(x, 8)
    assert torch.allclose(got.T @ got, torch.eye(8, dtype=torch.float64), atol=1e-10)
    x = x.double()
    assert (x - got @ (got.T @ x)).norm() <= 1e-6 * x.norm()


def test_the_shared_subspace_is_the_published_one() -> None:
    taus = taus_of(3)
    bases = torch.cat([torch.linalg.svd(tau.double(), full_matrices=False).U[:, :6] for tau in taus], 1)
    want = torch.linalg.svd(bases, full_matrices=False).U[:, :3]
    got = _linalg.shared_subspace(list(taus), 6, 3)
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)


def test_without_steps_the_merge_is_the_trimmed_weighted_sum() -> None:
    taus = taus_of(3)
    got = merged("apgd", taus, steps=0, density=0.3, trim_scope="tensor", eta=0.2)
    want = torch.zeros_like(taus[0])
    for tau in taus:
        size = tau.numel()
        limit = tau.abs().flatten().kthvalue(size - int(0.3 * size)).values
        want += 0.2 / tau.norm() * tau * (tau.abs() >= limit)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-9)


def test_density_one_keeps_everything() -> None:
    taus = taus_of(3)
    want = sum(0.2 / tau.norm() * tau for tau in taus)
    assert torch.allclose(merged("apgd", taus, steps=0, density=1.0, eta=0.2), want, rtol=1e-5, atol=1e-9)


def test_ranks_of_zero_mean_no_projection() -> None:
    taus = taus_of(2)
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    options = apgd.Options(shared_rank=0, steps=20)
    assert apgd.task_basis(list(taus), options).shape == (24, 0)
    want = float64_descent(taus, lambdas, torch.zeros(24, 0), options)
    got = apgd.descend(taus, lambdas, torch.zeros(24, 0), options, Context(tensor="w", weights=(1.0, 1.0)))
    assert (got.double() - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(("size", "says"), [(0.0, "did not change"), (1e-5, "hardly changed")])
def test_a_negligible_task_vector_is_left_out_and_said(size: float, says: str) -> None:
    taus = taus_of(4)
    taus[2] *= size
    told: list[tuple[int, str]] = []
    chosen = method.load("apgd")
    options = method.make_options(chosen, "apgd", {"trim_scope": "tensor", "steps": 30})

    def run(vectors: Tensor) -> Tensor:
        context = Context(tensor="w", weights=(1.0,) * len(vectors), leave_out=lambda i, why: told.append((i, why)))
        return chosen.apply(vectors, options, context)

    with_it = run(taus)
    assert [i for i, _ in told] == [2]
    assert says in told[0][1]
    without = run(taus[[0, 1, 3]])
    assert torch.equal(with_it, without)


def test_a_tiny_but_fair_task_vector_takes_part() -> None:
    taus = taus_of(3)
    taus[1] *= 0.05
    told: list[int] = []
    chosen = method.load("apgd")
    options = method.make_options(chosen, "apgd", {"trim_scope": "tensor", "steps": 1})
    chosen.apply(taus, options, Context(tensor="w", weights=(1.0,) * 3, leave_out=lambda i, why: told.append(i)))
    assert told == []


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 3), (1, 1)])
def test_matrices_smaller_than_the_number_of_tasks(shape: tuple[int, int]) -> None:
    taus = torch.randn(5, *shape, generator=torch.Generator().manual_seed(4)) * 1e-2
    assert merged("apgd", taus, steps=5).isfinite().all()
