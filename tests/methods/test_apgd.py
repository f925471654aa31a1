"""APGD's parts against plain float64: loss and gradient, projection, trim, guards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import modelmerge
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
        limit = tau.abs().flatten().kthvalue(size - int(0.3 * size) + 1).values
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


def quiet(tasks: int, told: dict[str, float] | None = None) -> Context:
    return Context(
        tensor="w", weights=(1.0,) * tasks, tell=lambda figures: told.update(figures) if told is not None else None
    )


def dense_minimiser(taus: Tensor, lambdas: list[float], basis: Tensor, inner: str) -> Tensor:
    """The shortest minimiser off the basis, float64, by a pseudo-inverse of the whole linear system in D."""
    taus, basis = taus.double(), basis.double()
    _, m, n = taus.shape
    off = torch.eye(m, dtype=torch.float64) - basis @ basis.T
    total = sum(lambdas)
    gap = taus - sum(lam * tau for lam, tau in zip(lambdas, taus, strict=True))
    rows, right = [], []
    for tau, rest in zip(taus, gap, strict=True):
        if inner == "row":
            # <tau_r, (off @ D)_r> for each row r, as a linear function of all entries of D.
            rows.append(total * torch.einsum("rk,rn->rkn", off, tau).reshape(m, m * n))
            right.append((tau * rest).sum(1))
        else:
            rows.append(total * (off @ tau).reshape(1, m * n))
            right.append((tau * rest).sum()[None])
    found = torch.linalg.pinv(torch.cat(rows), rtol=1e-10) @ torch.cat(right)
    return off @ found.view(m, n)


CASES = {
    "ordinary": lambda: taus_of(4) * 0.3,
    "two tasks": lambda: taus_of(2),
    "very uneven": lambda: taus_of(3) * torch.tensor([1.0, 0.05, 3.0])[:, None, None],
    "large": lambda: taus_of(3) * 1e3,
    "tiny": lambda: taus_of(3) * 1e-4,
    "low rank": lambda: torch.randn(3, 24, 2, generator=torch.Generator().manual_seed(7))
    @ torch.randn(3, 2, 18, generator=torch.Generator().manual_seed(8)) * 1e-2,
    "a row that no task changed": lambda: taus_of(3) * (torch.arange(24) != 5)[:, None],
}  # fmt: skip


@pytest.mark.parametrize("inner", ["row", "matrix"])
@pytest.mark.parametrize("shared_rank", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_solver_finds_the_shortest_minimiser(case: str, shared_rank: int, inner: str) -> None:
    taus = CASES[case]()
    lambdas = [0.3 * taus[0].norm().item() / tau.norm().item() for tau in taus]
    options = apgd.Options(solver="exact", inner=inner, shared_rank=shared_rank, ridge=1e-9)
    basis = apgd.task_basis(list(taus), options)
    got = apgd.solve(taus, lambdas, basis, options, quiet(len(taus))).double()
    want = dense_minimiser(taus, lambdas, basis, inner)
    assert (got - want).norm() <= 1e-3 * want.norm()
    zero = torch.zeros_like(got)
    assert loss(got, taus.double(), lambdas, inner) <= 1e-5 * loss(zero, taus.double(), lambdas, inner)
    assert (basis.double().T @ got).norm() <= 1e-5 * got.norm()


@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("identical experts", lambda: taus_of(1).repeat(4, 1, 1)),
        ("nearly identical experts", lambda: taus_of(1) + 1e-5 * taus_of(4, seed=3)),
        ("opposite experts", lambda: taus_of(1) * torch.tensor([1.0, -1.0, 1.0])[:, None, None]),
        ("more tasks than columns", lambda: taus_of(30)),
        ("one expert", lambda: taus_of(1)),
        ("a nearly zero one", lambda: taus_of(4) * torch.tensor([1.0, 1.0, 2e-3, 1.0])[:, None, None]),
    ],
)
def test_the_exact_solver_converges_where_the_system_is_singular(case: str, make: Callable[[], Tensor]) -> None:
    taus, told = make(), dict[str, float]()
    options = apgd.Options(solver="exact", lambda_mode="relative")
    lambdas = apgd.task_lambdas([tau.norm().item() for tau in taus], [1.0] * len(taus), options)
    basis = apgd.task_basis(list(taus), options)
    got = apgd.solve(taus, lambdas, basis, options, quiet(len(taus), told)).double()
    assert got.isfinite().all(), case
    assert told.get("iterations", 0) < 200  # none at all where there is no basis
    at_zero = loss(torch.zeros_like(got), taus.double(), lambdas, "row")
    assert loss(got, taus.double(), lambdas, "row") <= at_zero * (1 + 1e-3)
    assert (basis.double().T @ got).norm() <= 1e-5 * got.norm() + 1e-12
    assert got.norm() < 100 * taus.norm()


@pytest.mark.parametrize("solver", ["exact", "adam"])
@pytest.mark.parametrize("factor", [10.0, 1e-3])
def test_relative_lambdas_are_free_of_scale(factor: float, solver: str) -> None:
    taus = taus_of(4)
    told = {
        "solver": solver,
        "lambda_mode": "relative",
        "relative_lr": 0.3,
        "density": 0.5,
        "steps": 50,
        "tolerance": 0.0,
    }
    one, other = (merged("apgd", vectors, **told) for vectors in (taus, taus * factor))
    assert (other - factor * one).norm() <= 1e-3 * factor * one.norm()


def test_a_tolerance_stops_adam_and_changes_next_to_nothing() -> None:
    taus = taus_of(3) * 0.3
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    results, steps = [], []
    for tolerance in (0.0, 1e-11, 0.5):
        options, told = apgd.Options(tolerance=tolerance, steps=400), dict[str, float]()
        basis = apgd.task_basis(list(taus), options)
        results.append(apgd.descend(taus, lambdas, basis, options, quiet(3, told)))
        steps.append(told["steps"])
    assert steps[0] == 400
    assert steps[2] < 200
    assert (results[1] - results[0]).norm() <= 1e-4 * results[0].norm()


def test_the_exact_solver_is_told_in_the_manifest(models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", solver="exact")
    figures = manifest["tensors"]["figures"]
    assert set(figures) == {
        "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip
    assert all(0 <= told["iterations"] < 200 for told in figures.values())
