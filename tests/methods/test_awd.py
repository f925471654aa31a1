"""AWD: loss and gradient against float64 autograd at each granularity, and the cases where it must do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modelmerge.methods import registry
from modelmerge.methods.contract import SharedVector
from modelmerge.methods.options import make_options, option_types
from modelmerge.methods.transform import awd

ORACLE = Path(__file__).parent.parent / "oracle"


def loss(delta: Tensor, taus: Tensor, alpha: float) -> Tensor:
    """One group's objective, as the paper writes it: taus [T, n], delta [n]."""
    rest = taus - delta
    units = rest / rest.norm(dim=1, keepdim=True).clamp(min=1e-8)
    cosines = units @ units.T
    pairs = len(taus) * (len(taus) - 1)
    return (cosines.abs().sum() - cosines.diagonal().abs().sum()) / pairs + alpha * delta.norm()


def autograd_descent(taus: Tensor, options: awd.Options) -> tuple[Tensor, Tensor]:
    """Plain gradient descent by float64 autograd: delta [n] and the loss before each step and after the last."""
    taus = taus.double()
    delta = torch.zeros_like(taus[0], requires_grad=True)
    losses = []
    for _ in range(options.steps):
        value = loss(delta, taus, options.alpha)
        (gradient,) = torch.autograd.grad(value, delta)
        losses.append(value.detach())
        with torch.no_grad():
            delta -= options.lr * gradient.nan_to_num(0.0)  # the norm's gradient at zero is taken as zero
    losses.append(loss(delta, taus, options.alpha).detach())
    return delta.detach(), torch.stack(losses)


def groups_of(taus: Tensor, granularity: str) -> Tensor:
    """[T, m, n] -> [T, G, k]: the rows, or the whole."""
    return taus if granularity == "row" else taus.flatten(1)[:, None, :]


def overlapping(experts: int = 4, shape: tuple[int, int] = (6, 40), seed: int = 0) -> Tensor:
    """Task vectors that share a direction, as those of one base do."""
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * (torch.randn(experts, *shape, generator=generator) + 0.7 * torch.randn(shape, generator=generator))


def solve(taus: Tensor, options: awd.Options) -> Any:
    return awd.solve(awd.measure(taus), options)


def delta_of(solution: Any, taus: Tensor) -> Tensor:
    return torch.einsum("gt,tgn->gn", solution.coefficients, taus.double())


@pytest.mark.parametrize("granularity", ["row", "tensor", "model"])
def test_agrees_with_float64_autograd(granularity: str) -> None:
    taus = groups_of(overlapping(), granularity)
    # Small steps: past a kink of |cos| rounding decides the sign, and only losses can be compared.
    options = awd.Options(alpha=0.05, lr=2e-5, steps=40, granularity=granularity, published=True)
    got = solve(taus, options)
    want = [autograd_descent(taus[:, g], options) for g in range(taus.shape[1])]
    assert torch.allclose(got.losses, sum(losses for _, losses in want), rtol=1e-9)
    deltas = torch.stack([delta for delta, _ in want])
    assert (delta_of(got, taus) - deltas).norm() <= 1e-6 * deltas.norm()
    assert got.losses[-1] < got.losses[0]


@pytest.mark.parametrize("family", ["four", "five-odd"])
def test_agrees_with_an_independent_implementation(family: str) -> None:
    oracle = load_file(ORACLE / family / "awd-float64.safetensors")
    taus = oracle["tau"][:, None, :]
    options = awd.Options(alpha=0.1, lr=1e-6, steps=200, published=True)
    got = solve(taus, options)
    assert torch.allclose(got.losses[:-1], oracle["gd_l2/loss"], atol=1e-12)
    delta = oracle["gd_l2/delta"]
    assert (delta_of(got, taus)[0] - delta).norm() <= 1e-9 * delta.norm()


@pytest.mark.parametrize("factor", [1e-4, 10.0, 1e4])
def test_relative_units_are_free_of_scale(factor: float) -> None:
    taus = overlapping()
    one, other = (solve(t.double(), awd.Options()).coefficients for t in (taus.double(), taus.double() * factor))
    assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)


def test_two_task_vectors_become_orthogonal_where_that_costs_nothing() -> None:
    taus = overlapping(2)
    got = solve(taus, awd.Options(alpha=0.0, steps=1000, lr=0.003))
    left, right = taus[0].double() - delta_of(got, taus), taus[1].double() - delta_of(got, taus)
    cosines = (left * right).sum(1) / left.norm(dim=1) / right.norm(dim=1)
    assert cosines.abs().max() < 0.01


def test_two_task_vectors_end_near_the_best_point_of_their_plane() -> None:
    taus = overlapping(2, shape=(1, 30)).double()
    taus /= taus.square().sum(2).mean().sqrt()  # relative units are these vectors' own
    got = solve(taus, awd.Options(alpha=0.1, steps=1000, lr=0.002))
    grid = torch.linspace(-0.5, 1.5, 201, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid) @ taus[:, 0]
    best = torch.vmap(lambda delta: loss(delta, taus[:, 0], 0.1))(points).min()
    assert got.losses.min() <= best + 2e-3


def test_the_loss_is_never_worse_than_doing_nothing() -> None:
    for options in (awd.Options(lr=5.0), awd.Options(lr=0.3, published=True), awd.Options(alpha=10.0)):
        taus = overlapping()
        found = delta_of(solve(taus, options), taus)
        size = taus.double().square().sum(2).mean(0).sqrt() if not options.published else torch.ones(6)
        for g in range(taus.shape[1]):
            units = taus[:, g].double() / size[g]
            before = loss(torch.zeros_like(units[0]), units, options.alpha)
            assert loss(found[g] / size[g], units, options.alpha) <= before + 1e-9


def test_an_alpha_so_large_that_nothing_moves() -> None:
    assert not solve(overlapping(), awd.Options(alpha=1e6)).coefficients.any()


def test_identical_experts_stay_as_they_are() -> None:
    taus = overlapping(1).repeat(3, 1, 1)
    got = solve(taus, awd.Options())
    assert got.coefficients.isfinite().all()
    assert delta_of(got, taus).norm() <= 1e-3 * taus.norm()


def test_orthogonal_experts_stay_as_they_are() -> None:
    taus = torch.zeros(3, 2, 9)
    for i in range(3):
        taus[i, :, 3 * i : 3 * i + 3] = 1.0
    assert not solve(taus, awd.Options()).coefficients.any()


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_a_negligible_task_vector_takes_no_part(size: float) -> None:
    taus = overlapping(4)
    taus[2] *= size
    got, without = solve(taus, awd.Options()), solve(taus[[0, 1, 3]], awd.Options())
    assert not got.active[:, 2].any()
    assert got.active[:, [0, 1, 3]].all()
    assert not got.coefficients[:, 2].any()
    assert torch.allclose(got.coefficients[:, [0, 1, 3]], without.coefficients, atol=1e-9)


def test_all_zero_task_vectors_change_nothing() -> None:
    got = solve(torch.zeros(3, 4, 5), awd.Options())
    assert not got.coefficients.any()
    assert not got.active.any()
    assert got.losses.isfinite().all()


def test_one_active_task_vector_has_no_pair() -> None:
    taus = overlapping(3)
    taus[1:] = 0
    assert not solve(taus, awd.Options()).coefficients.any()


def test_no_steps_change_nothing() -> None:
    got = solve(overlapping(), awd.Options(steps=0))
    assert not got.coefficients.any()
    assert len(got.losses) == 1


@pytest.mark.parametrize("name", registry.names("transform"))
def test_every_disentangler_has_a_help_line_and_options_that_are_allowed(name: str) -> None:
    chosen = registry.load(name, "transform")
    assert registry.summary(name, "transform").endswith(".")
    assert chosen.paper.startswith("https://")
    assert make_options(chosen, name, {"published": True}) != chosen.options()
    if isinstance(chosen.by, SharedVector):
        assert "granularity" in option_types(chosen.options)


def test_the_granularity_follows_from_the_published_form() -> None:
    assert awd.Options() == awd.Options(granularity="tensor")
    assert awd.Options(published=True) == awd.Options(published=True, granularity="model")
    assert awd.Options(published=True, granularity="row").granularity == "row"
