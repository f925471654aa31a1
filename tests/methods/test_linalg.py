"""Subspaces of matrices that are known as products."""

from __future__ import annotations

import pytest
import torch

from modelmerge.methods import leading, linalg, products


def factors(m: int, n: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
@pytest.mark.parametrize("r", [1, 4, 25])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_directions_of_a_product_are_those_of_its_dense_form(shape: tuple[int, int], r: int, rank: int) -> None:
    left, right = factors(*shape, r)
    got = linalg.left_singular_vectors_of_product(left, right, rank)
    k = min(rank, r)
    want = torch.linalg.svd(left.double() @ right.double()).U[:, :k]
    assert got.shape == (shape[0], k)
    assert torch.allclose(got.T @ got, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)


def test_a_product_has_no_more_directions_than_its_rank() -> None:
    left, right = factors(30, 20, 6)
    left[:, 3:] = left[:, :3]  # rank 3
    assert linalg.left_singular_vectors_of_product(left, right, 6).shape == (30, 3)
    assert linalg.left_singular_vectors_of_product(torch.zeros(30, 6), right, 6).shape == (30, 0)
    assert linalg.left_singular_vectors_of_product(left[:, :0], right[:0], 6).shape == (30, 0)


@pytest.mark.parametrize("shape", [(640, 520), (520, 640), (600, 600)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_subspace_iteration_holds_nearly_all_the_energy_there_is_to_hold(shape: tuple[int, int], decay: float) -> None:
    generator, small = torch.Generator().manual_seed(3), min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, small, generator=generator)).Q for side in shape)
    values = torch.arange(1, small + 1) ** -decay if decay else torch.linalg.svdvals(torch.randn(small, small))
    x = left * values @ right.T * 1e-4
    got = leading.iterated(x, 60, 3)[0]
    assert torch.allclose(got.T @ got, torch.eye(60, dtype=torch.float64), atol=1e-12)
    held = (got.T @ x.double()).square().sum() / (1e-8 * values.double().square()[:60].sum())
    assert (0.98 if decay else 0.85) < held <= 1 + 1e-6
    assert torch.equal(got, leading.iterated(x, 60, 3)[0])


def test_subspace_iteration_finds_all_of_a_low_rank_matrix() -> None:
    left, right = factors(600, 560, 5)
    got = leading.iterated(left @ right, 9, 3)[0]
    assert torch.allclose(got.T @ got, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert (left.double() - got @ (got.T @ left.double())).norm() <= 1e-5 * left.norm()


@pytest.mark.parametrize("shape", [(640, 520), (520, 640)])
def test_leading_directions_are_those_of_subspace_iteration(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    x = x @ torch.diag(torch.arange(1, shape[1] + 1) ** -0.5) * 1e-4
    got, want = leading.leading_directions(x, 60, 3), leading.iterated(x, 60, 3)[0]
    assert torch.allclose(got.T @ got, torch.eye(60, dtype=torch.float64), atol=1e-5)
    assert (got @ got.T - want @ want.T).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("shape", [(600, 520), (520, 600), (520, 520)])
@pytest.mark.parametrize(("decay", "works"), [(0.0, False), (0.2, True), (0.7, True), (2.0, False)])
def test_refined_vectors_are_those_of_float64(shape: tuple[int, int], decay: float, works: bool) -> None:
    """Also where float64 decomposes: without a gap after the last of them, and where the spectrum is too steep."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(side, 520, generator=generator)).Q for side in shape)
    x = left * torch.arange(1, 521) ** -decay @ right.T * 1e-4
    gram = x.double() @ x.double().T if shape[0] <= shape[1] else x.double().T @ x.double()
    assert (leading.refined(gram, 60) is not None) is works
    got, want = (linalg.left_singular_vectors(x, 60, refine=refine) for refine in (True, False))
    assert torch.allclose(got.T @ got, torch.eye(60, dtype=torch.float64), atol=1e-12)
    if decay:
        assert (got @ got.T - want @ want.T).norm() <= 1e-8 * want.norm()


def test_what_has_too_few_directions_is_not_refined() -> None:
    low = torch.randn(520, 9, generator=torch.Generator().manual_seed(5)).double()
    for gram in (low @ low.T, torch.zeros(520, 520).double(), low[:100] @ low[:100].T):
        assert leading.refined(gram, 60) is None


@pytest.mark.parametrize("held_back", [True, False])
@pytest.mark.parametrize("shape", [(700, 1500), (1500, 700), (30, 40)])
def test_the_library_that_multiplies_does_not_matter(
    held_back: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: held_back)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    basis = torch.linalg.qr(x[:, :20].double()).Q
    want = x.double() - basis @ (basis.T @ x.double())
    assert (products.remove_subspace(x.clone(), basis.float()).double() - want).norm() <= 1e-6 * x.norm()
    product = products.multiplier(x.T)(basis.float())
    assert (product.double() - x.T.double() @ basis).norm() <= 1e-6 * x.norm()


@pytest.mark.parametrize("approximate", [True, False])
def test_only_large_matrices_are_iterated_on(approximate: bool) -> None:
    x = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(4))
    got = linalg.shared_subspace(list(x), 5, 4, approximate=approximate)
    assert torch.equal(got, linalg.shared_subspace(list(x), 5, 4))
    large = torch.randn(2, 520, 520, generator=torch.Generator().manual_seed(4))
    one, other = (linalg.shared_subspace(list(large), 9, 7, approximate=how) for how in (True, False))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(700, 520), (520, 700)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_quick_factors_are_as_good_as_the_best(shape: tuple[int, int], decay: float) -> None:
    """From a flat spectrum, where no few directions stand out, to a steep one."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, 520, generator=generator)).Q for side in shape)
    values = torch.arange(1, 521).float().pow(-decay)
    x = (u * values) @ v.T
    assert leading.iterates(shape, 12)
    left, right = linalg.balanced(x, 12)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-6)
    best = values[12:].square().sum().sqrt().item()
    assert (x - left @ right).norm().item() <= 1.002 * best
    again = linalg.balanced(x, 12)
    assert torch.equal(left, again[0])


def test_quick_factors_of_a_product_lose_nothing() -> None:
    left, right = factors(700, 600, 8)
    x = left @ right
    a, b = linalg.balanced(x, 12)
    assert (x - a @ b).norm() <= 1e-6 * x.norm()
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()


@pytest.mark.parametrize("shape", [(520, 700), (700, 520), (520, 520)])
def test_the_shared_subspace_does_not_depend_on_signs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries and devices differ in the signs of singular vectors: a card once gave another merge by a quarter."""
    taus = list(torch.randn(8, *shape, generator=torch.Generator().manual_seed(6)))
    one = linalg.shared_subspace(taus, 65, 43, approximate=True)
    decompose, lead, generator = leading.iterated, leading.leading_directions, torch.Generator().manual_seed(7)

    def signs(rank: int) -> torch.Tensor:
        return torch.randint(0, 2, (rank,), generator=generator) * 2.0 - 1.0

    def flipped(x: torch.Tensor, rank: int, *rest: int) -> tuple[torch.Tensor, ...]:
        u, s, v = decompose(x, rank, *rest)
        flips = signs(rank)
        return u * flips, s, flips[:, None] * v

    monkeypatch.setattr(leading, "iterated", flipped)
    monkeypatch.setattr(leading, "leading_directions", lambda x, rank, *rest: lead(x, rank, *rest) * signs(rank))
    other = linalg.shared_subspace(taus, 65, 43, approximate=True)
    assert torch.allclose(one.T @ one, torch.eye(43, dtype=torch.float64), atol=1e-12)
    assert (one @ one.T - other @ other.T).norm() <= 1e-4
