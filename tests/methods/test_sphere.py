"""slerp, Multi-SLERP, the Karcher mean and NearSwap against their definitions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelmerge.methods import sphere
from modelmerge.methods.registry import load
from tests.support.methods import context_of, merged, taus_of


def base_of(name: str, taus: Tensor) -> Tensor:
    chosen = load(name)
    base = context_of(chosen, chosen.options(), taus).base
    assert base is not None
    return base.double()


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("points", ["weights", "task-vectors"])
def test_slerp_agrees_with_float64(points: str, size: float, t: float) -> None:
    taus = taus_of(2) * size
    base = base_of("slerp", taus) * (points == "weights")
    want = arc(*(base + taus.double()), t) - base
    got = merged("slerp", taus, t=t, points=points)
    # The reference itself loses digits where task vectors are small beside the weights.
    assert (got.double() - want).norm() <= max(1e-6, 1e-9 / size) * want.norm()
    shifted = merged("slerp", taus, (1.0, 3.0), t=t, points=points)
    assert torch.allclose(shifted, merged("slerp", taus, t=3 * t / (1 - t + 3 * t), points=points))


def test_slerp_of_one_expert_starts_at_the_base() -> None:
    taus = taus_of(1) * 100
    base = base_of("slerp", taus)
    want = arc(base, base + taus[0].double(), 0.3) - base
    assert (merged("slerp", taus, t=0.3).double() - want).norm() <= 1e-6 * want.norm()
    assert torch.allclose(merged("slerp", taus, t=0.3, points="task-vectors"), 0.3 * taus[0])


def test_slerp_goes_straight_where_there_is_no_arc() -> None:
    one = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    for second in (2 * one, -one, 0 * one):
        got = merged("slerp", torch.stack([one, second]), t=0.25, points="task-vectors")
        assert torch.allclose(got, 0.75 * one + 0.25 * second, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 5), (7,), (4, 3, 2, 5)])
@pytest.mark.parametrize("points", ["weights", "task-vectors"])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("scope", ["row", "column", "line"])
def test_each_row_column_or_line_has_an_angle_of_its_own(
    scope: str, experts: int, points: str, shape: tuple[int, ...]
) -> None:
    taus = torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))
    base = base_of("slerp", taus) * (points == "weights")
    two = torch.cat([base[None] * 0, taus.double()])[-2:] + base
    groups = [one.reshape(len(one), -1) if len(shape) > 1 else one[None] for one in two]
    groups = [one.reshape(-1, shape[-1]) for one in two] if scope == "line" else groups
    groups = [group.T if scope == "column" and len(shape) > 1 else group for group in groups]
    if points == "weights" or experts == 2:
        want = torch.stack([arc(a, b, 0.3) for a, b in zip(*groups, strict=True)])
    else:
        want = 0.3 * groups[1]  # from nothing
    want = (want.T if scope == "column" and len(shape) > 1 else want).reshape(shape) - base
    got = merged("slerp", taus, t=0.3, points=points, scope=scope)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_slerp_goes_straight_above_a_cosine() -> None:
    one = torch.tensor([[1.0, 0.0]])
    for angle in (0.3, 3.0):
        two = torch.tensor([[math.cos(angle), math.sin(angle)]])
        straight = 0.25 * one + 0.75 * two
        for limit in (abs(math.cos(angle)) + 1e-4, 1.0):
            got = merged("slerp", torch.stack([one, two]), t=0.75, points="task-vectors", straight_above=limit)
            assert (got - straight).norm() > 1e-3
            assert torch.allclose(got, arc(one.double(), two.double(), 0.75).float(), atol=1e-6)
        limit = abs(math.cos(angle)) - 1e-4
        got = merged("slerp", torch.stack([one, two]), t=0.75, points="task-vectors", straight_above=limit)
        assert torch.allclose(got, straight)


def test_zeros_may_stand_at_a_right_angle() -> None:
    one = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    for scope in ("tensor", "row", "column", "line"):
        options = {"t": 0.25, "points": "task-vectors", "scope": scope, "zeros": "right-angle", "straight_above": 0.9}
        got = merged("slerp", torch.stack([0 * one, one]), **options)
        assert torch.allclose(got, math.sin(math.pi / 8) * one)
        assert not merged("slerp", torch.zeros(2, 5, 5), **options).any()


def test_weights_of_slerp_that_cancel_leave_the_share() -> None:
    taus = taus_of(2)
    for weights in ((1.0, -1.0), (0.0, 0.0)):
        assert torch.equal(merged("slerp", taus, weights), merged("slerp", taus))


def test_slerp_goes_beyond_its_ends() -> None:
    """Half the way from a point beyond the end back to the first lies the end."""
    one, two = taus_of(2, seed=1)
    two = two * one.norm() / two.norm()
    there = merged("slerp", torch.stack([one, two]), t=2.0, points="task-vectors")
    assert torch.allclose(merged("slerp", torch.stack([one, there]), t=0.5, points="task-vectors"), two, atol=1e-6)


def karcher(points: Tensor, alphas: Tensor) -> Tensor:
    """By small steps on the sphere itself."""
    flat = points.flatten(1)
    units = flat / flat.norm(dim=1, keepdim=True)
    at = units.mean(0) / units.mean(0).norm()
    for _ in range(300):
        dots = units @ at
        angles = dots.clamp(-1, 1).arccos()
        logs = (angles / angles.sin())[:, None] * (units - dots[:, None] * at)
        step = 0.5 * (alphas[:, None] * logs).sum(0)
        at = step.norm().cos() * at + torch.sinc(step.norm() / torch.pi) * step
    return ((alphas * flat.norm(dim=1)).sum() * at).view_as(points[0])


def test_karcher_ends_after_so_many_steps_or_at_a_small_one() -> None:
    taus = taus_of(3)
    taus[2] *= 5
    options = {"points": "task-vectors"}
    end = merged("karcher", taus, (1.0, 4.0, 1.0), **options)
    steps = [merged("karcher", taus, (1.0, 4.0, 1.0), steps=n, **options) for n in range(6)]
    far = [float((step - end).norm() / end.norm()) for step in steps]
    assert far == sorted(far, reverse=True)
    assert far[0] > 1e-2
    # The first has the direction of the mean of directions, which Multi-SLERP takes.
    assert torch.allclose(steps[0], merged("multislerp", taus, (1.0, 4.0, 1.0), **options), atol=1e-7)
    assert torch.equal(merged("karcher", taus, (1.0, 4.0, 1.0), tolerance=1.0, **options), steps[0])
    assert torch.equal(merged("karcher", taus, (1.0, 4.0, 1.0), tolerance=0.0, steps=2, **options), steps[2])


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("points", ["weights", "task-vectors"])
def test_karcher_agrees_with_float64(points: str, size: float) -> None:
    taus, weights = taus_of(4) * size, (1.0, 2.0, 0.5, 1.5)
    base = base_of("karcher", taus) * (points == "weights")
    want = karcher(base + taus.double(), torch.tensor(weights).double() / 5) - base
    got = merged("karcher", taus, weights, points=points)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("points", ["weights", "task-vectors"])
def test_karcher_of_two_is_half_the_way(points: str) -> None:
    taus = taus_of(2) * 100
    taus[1] *= taus[0].norm() / taus[1].norm()
    taus[1] += 0.1
    base = base_of("karcher", taus) * (points == "weights")
    one, two = base + taus.double()
    half = arc(one / one.norm(), two / two.norm(), 0.5) * (one.norm() + two.norm()) / 2
    assert (merged("karcher", taus, points=points).double() - (half - base)).norm() <= 1e-6 * half.norm()


def test_directions_that_cancel_are_no_error() -> None:
    one = torch.ones(3, 3)
    assert merged("karcher", torch.stack([one, -one]), points="task-vectors").isfinite().all()


def test_inner_products_are_those_of_the_points() -> None:
    taus, base = 1e-3 * torch.randn(3, 10_000), torch.randn(10_000)
    moments = sphere.moments(taus, base)
    for weights in (True, False):
        points = taus.double() + base.double() * weights
        got, want = sphere.inner_products(moments, weights=weights), points @ points.T
        assert torch.allclose(got, want, rtol=1e-6)
        # What tells the angles: the distances between the points.
        got, want = (p.diagonal()[:, None] + p.diagonal() - 2 * p for p in (got, want))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-9)


def test_nearswap_follows_its_formula() -> None:
    taus = taus_of(1)
    distance = taus[0].double().abs()
    want = taus[0].double() * (2e-3 / distance.clamp(min=1e-6)).clamp(0, 1)
    assert (merged("nearswap", taus, t=2e-3).double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("points", ["weights", "task-vectors"])
@pytest.mark.parametrize(
    ("reduce", "weights"),
    [("mean", (1.0, 0.5, 2.0, 1.5)), ("sum", (1.0, 0.5, 2.0, 1.5)), ("sum", (1.0, -2.0, 0.5, -1.0)),
     ("sum", (1.0, -2.0, 0.5, 0.5))],
)  # fmt: skip
def test_multislerp_agrees_with_float64(reduce: str, weights: tuple[float, ...], points: str) -> None:
    taus, weights = taus_of(4), torch.tensor(weights, dtype=torch.float64)
    base = base_of("multislerp", taus) * (points == "weights")
    flat = (base + taus.double()).flatten(1)
    alphas = weights / (weights.sum() if reduce == "mean" else 1.0)
    mean = (alphas[:, None] * flat / flat.norm(dim=1, keepdim=True)).sum(0)
    want = ((alphas * flat.norm(dim=1)).sum() * mean / mean.norm()).view_as(base) - base
    got = merged("multislerp", taus, tuple(weights.tolist()), points=points, reduce=reduce)
    assert (got.double() - want).norm() <= 2e-6 * want.norm()


def test_multislerp_of_directions_that_cancel_is_the_mean() -> None:
    one = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(merged("multislerp", torch.stack([one, -one, 0 * one])), 0 * one, atol=1e-7)
    assert torch.allclose(merged("multislerp", torch.stack([one, -3 * one])), -one, atol=1e-7)
