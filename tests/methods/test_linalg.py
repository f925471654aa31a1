"""Subspaces of matrices that are known as products."""

from __future__ import annotations

import pytest
import torch

from modelmerge.methods import _linalg


def factors(m: int, n: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("r", [1, 4, 25])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_directions_of_a_product_are_those_of_its_dense_form(shape: tuple[int, int], r: int, rank: int) -> None:
    left, right = factors(*shape, r)
    got = _linalg.left_singular_vectors_of_product(left, right, rank)
    k = min(rank, r)
    want = torch.linalg.svd(left.double() @ right.double()).U[:, :k]
    assert got.shape == (shape[0], k)
    assert torch.allclose(got.T @ got, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)


def test_a_product_has_no_more_directions_than_its_rank() -> None:
    left, right = factors(30, 20, 6)
    left[:, 3:] = left[:, :3]  # rank 3
    assert _linalg.left_singular_vectors_of_product(left, right, 6).shape == (30, 3)
    assert _linalg.left_singular_vectors_of_product(torch.zeros(30, 6), right, 6).shape == (30, 0)
    assert _linalg.left_singular_vectors_of_product(left[:, :0], right[:0], 6).shape == (30, 0)
