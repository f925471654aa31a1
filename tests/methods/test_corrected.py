"""APGD's corrections in front of other methods, against plain float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.methods import apgd
from modelmerge.methods.contract import Context, Corrected
from modelmerge.methods.transform import apgd as front
from tests.support.float64 import apgd_loss
from tests.support.methods import merged, surveyed, taus_of


def found(taus: Tensor, **told: Any) -> Corrected:
    options = front.Options(**told)
    survey = front.METHOD.by.survey(options)
    thresholds = surveyed(survey, taus.flatten(1)) if survey else None
    context = Context(tensor="w", weights=(1.0,) * len(taus), measured=thresholds)
    return front.find(taus, options, context)


def corrected(taus: Tensor, **told: Any) -> Tensor:
    made, flat = found(taus, **told), taus.clone().flatten(1)
    front.correct(flat, made.matrices.flatten(1), made.numbers)
    return flat.view_as(taus)


def uneven() -> Tensor:
    return taus_of(3) * torch.tensor([1.0, 0.5, 2.0])[:, None, None]


@pytest.mark.parametrize("told", [{}, {"density": 0.4}, {"solver": "adam"}, {"published": True}])
def test_plain_sums_of_the_shared_form_are_apgd(told: dict[str, Any]) -> None:
    taus = uneven()
    want = merged("apgd", taus, norm_cap=1e9, **told)
    assert torch.allclose(corrected(taus, lengths="lambda", **told).sum(0), want, rtol=1e-5, atol=1e-9)
    # And with lengths of their own, only the lambdas are missing.
    lambdas = apgd.task_lambdas(taus, [float(tau.norm()) for tau in taus], [1.0] * 3, front.Options(**told))
    weighted = torch.tensordot(torch.tensor(lambdas), corrected(taus, **told), dims=1)
    assert torch.allclose(weighted, want, rtol=1e-5, atol=1e-9)


def test_corrections_of_each_task_are_the_shortest_that_meet_the_loss() -> None:
    taus, told = uneven(), {"shared_rank": 0, "ridge": 1e-9}
    got = (corrected(taus, correction="task", **told) - taus).double()
    lambdas = torch.tensor(apgd.task_lambdas(taus, [float(tau.norm()) for tau in taus], [1.0] * 3, front.Options()))
    for row in range(taus.shape[1]):
        # <tau_j, sum_i lambda_i (tau_i + D_i)> = |tau_j|^2 for all j, in the stacked unknowns D_1, D_2, D_3.
        vectors, lam = taus[:, row].double(), lambdas.double()
        wanted = vectors.square().sum(1) - vectors @ (lam @ vectors)
        system = torch.cat([weight * vectors for weight in lam], dim=1)
        shortest = torch.linalg.pinv(system) @ wanted
        assert torch.allclose(got[:, row].flatten(), shortest, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(got[0], got[1])


def test_the_descent_on_each_task_agrees_with_float64_autograd() -> None:
    taus = uneven() * 0.3
    got = found(taus, published=True, correction="task", steps=40, density=1.0)
    assert got.matrices.shape == taus.shape
    lambdas = torch.tensor([0.07 / tau.norm().item() for tau in taus], dtype=torch.float64)
    options = front.Options(published=True, correction="task")
    basis = apgd.task_basis(taus, options).double()
    assert basis.shape[1] == min(taus.shape[1:]) // 3, "both ranks are min(m, n) / T"
    wide, own = taus.double(), torch.zeros_like(taus, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([own], lr=1e-4)
    for _ in range(40):
        adam.zero_grad()
        together = torch.tensordot(lambdas, wide + own, dims=1)
        sum(((tau * (together - tau)).sum(1) ** 2).sum() for tau in wide).backward()
        own.grad -= basis @ (basis.T @ own.grad)
        adam.step()
    assert (got.matrices.double() - own).norm() <= 1e-4 * own.norm()
    assert got.losses[1] < got.losses[0]


@pytest.mark.parametrize(
    "told", [{}, {"published": True, "steps": 30}, {"solver": "adam", "steps": 30}, {"correction": "task"}]
)
def test_the_losses_are_those_of_what_was_found(told: dict[str, Any]) -> None:
    taus = uneven()
    made = found(taus, density=1.0, **told)
    lambdas = apgd.task_lambdas(taus, [float(tau.norm()) for tau in taus], [1.0] * 3, front.Options(**told))
    parts = [part for _, part, _ in made.numbers]
    mean = sum(part * lam for part, lam in zip(parts, lambdas, strict=True)) / sum(lambdas)
    for scale, got in zip((0.0, mean), made.losses, strict=True):
        want = apgd_loss(scale * made.matrices[0].double(), taus.double(), lambdas)
        assert got == pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("told", [{}, {"correction": "task"}, {"correction": "task", "solver": "adam", "steps": 5}])
@pytest.mark.parametrize("size", [0.0, 1e-5])
def test_a_negligible_task_vector_keeps_itself(size: float, told: dict[str, Any]) -> None:
    taus = taus_of(4)
    taus[2] *= size
    got = corrected(taus, density=1.0, **told)
    assert torch.equal(got[2], taus[2])
    assert torch.equal(got[[0, 1, 3]], corrected(taus[[0, 1, 3]], density=1.0, **told))
    assert not corrected(taus, lengths="lambda", **told)[2].any(), "its lambda has no bound"


def test_zero_task_vectors_stay_zero() -> None:
    for told in ({}, {"correction": "task", "solver": "adam"}):
        assert not corrected(torch.zeros(3, 6, 5), **told).any()


def test_without_a_correction_there_is_the_task_aware_lambda() -> None:
    taus = uneven()
    got = corrected(taus, lengths="lambda", ridge=1e12)
    sizes = torch.linalg.vector_norm(got, dim=(1, 2))
    assert torch.allclose(sizes, sizes[:1], rtol=1e-4), "each as long as the others"
    assert torch.allclose(torch.cosine_similarity(got.flatten(1), taus.flatten(1)), torch.ones(3))


def test_its_input_is_left_alone() -> None:
    taus = uneven()
    before = taus.clone()
    found(taus, density=0.5, correction="task")
    assert torch.equal(taus, before)
