"""LARV's quantities, against singular values and commutators as they are defined."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from modelmerge.methods import larv


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 12), (9, 20), (20, 9)])
def test_effective_rank_and_conflict_are_as_defined(shape: tuple[int, int]) -> None:
    a, b = matrix(*shape), matrix(*shape, seed=1) * torch.linspace(0.1, 3, shape[1])
    shares = torch.linalg.svdvals(b.double()).square()
    shares = shares / shares.sum()
    assert larv.effective_rank(b) == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-6)
    a64, b64 = a.double(), b.double()
    left, right = (a64 @ b64.T - b64 @ a64.T).norm(), (a64.T @ b64 - b64.T @ a64).norm()
    want = float((left + right) / (2 * a64.norm() * b64.norm()))
    assert larv.conflict(a, b) == pytest.approx(want, rel=1e-9)
    assert larv.conflict(a.T, b.T) == pytest.approx(want, rel=1e-9)


def test_their_limits() -> None:
    assert larv.effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-6)
    assert larv.effective_rank(matrix(6, 1) @ matrix(1, 8)) == pytest.approx(1, rel=1e-4)
    square = matrix(6, 6)
    assert larv.conflict(square, 3 * square) == pytest.approx(0, abs=1e-7)
    antisymmetric = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert larv.conflict(torch.eye(2), antisymmetric) == pytest.approx(math.sqrt(2))


def test_scores_by_hand() -> None:
    found = larv.scores({"a": 2.0, "b": 3.0}, {"a": 0.1, "b": 0.3}, {"a": 0.5, "b": 1.0})
    assert found["a"] == pytest.approx(2 * math.sqrt(0.5) / (1 + math.log(1 + math.exp(-1))))
    assert found["b"] == pytest.approx(3 / (1 + math.log(1 + math.e)))
    alike = larv.scores({"a": 2.0, "b": 2.0}, {"a": 0.1, "b": 0.1}, {"a": 1.0, "b": 1.0})
    assert alike["a"] == alike["b"] == pytest.approx(2 / (1 + math.log(2)))


@pytest.mark.parametrize(
    ("count", "want"), [(1, (0, 1, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)), (12, (4, 4, 4))]
)
def test_tiers_are_thirds(count: int, want: tuple[int, int, int]) -> None:
    score = {i: float((7 * i) % count) for i in range(count)}
    factors = larv.tiers(score)
    assert tuple(list(factors.values()).count(factor) for factor in larv.FACTORS) == want
    assert [factors[i] for i in sorted(score, key=lambda i: score[i])] == sorted(factors.values())
