"""Singular value calibration against its definition by a full decomposition in float64, behind all kinds of methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from tests.support.checkpoints import family, read
from tests.support.methods import merged, taus_of

OF = (
    "task-arithmetic scale=1.0",
    "ties density=0.4",
    "ties trim-scope=tensor",
    "kron",
    "wudi solver=spectral",
    "tsv-m",
)


def float64_svc(merged_: Tensor, taus: Tensor, published: bool, floor: float = 0.3) -> Tensor:
    """Direction by direction, as the paper writes it; pooled over the experts where it is not the published form."""
    u, s, v = torch.linalg.svd(merged_.double(), full_matrices=False)
    rows = [[(u[:, k] @ merged_.double(), u[:, k] @ tau) for tau in taus.double()] for k in range(len(s))]
    products, squares = (
        [[float(a @ b) for a, b in row] for row in rows],
        [[float(b @ b) for _, b in row] for row in rows],
    )
    whole = sum(map(sum, products)) / sum(map(sum, squares))
    for k, (product, square) in enumerate(zip(products, squares, strict=True)):
        if published:
            shares = [max(1 / len(taus), p / q) for p, q in zip(product, square, strict=True)]
            s[k] *= len(taus) / sum(shares)
        else:
            s[k] /= max(sum(product) / sum(square), floor * whole)
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (1, 30), (30, 1)])
@pytest.mark.parametrize("of", OF)
def test_it_agrees(of: str, shape: tuple[int, int], published: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    taus = 1e-2 * torch.randn(3, *shape, generator=generator) + 5e-3 * torch.randn(*shape, generator=generator)
    name, *words = of.split()
    values = {word.split("=")[0].replace("-", "_"): word.split("=")[1] for word in words}
    values = {key: float(value) if value[0].isdigit() else value for key, value in values.items()}
    want = float64_svc(merged(name, taus, **values), taus, published)
    got = merged("svc", taus, of=of, published=published, scale=0.7)
    assert (got.double() - 0.7 * want).norm() <= 1e-5 * want.norm()


def test_what_all_experts_share_counts_once() -> None:
    tau = taus_of(1)
    assert torch.allclose(merged("svc", tau.repeat(4, 1, 1)), tau[0], atol=1e-7)


def test_experts_that_share_nothing_come_out_as_their_sum() -> None:
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    taus = torch.stack(
        [q[:, 4 * i : 4 * i + 4] @ (torch.arange(1.0, 5.0)[:, None] * q[4 * i : 4 * i + 4]) for i in range(3)]
    )
    assert (merged("svc", taus) - taus.sum(0)).norm() <= 1e-5 * taus.sum(0).norm()


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_the_scale_of_the_method_makes_no_difference(factor: float) -> None:
    taus = taus_of(4)
    one, other = (merged("svc", taus, of=f"task-arithmetic scale={scale}") for scale in (1.0, factor))
    assert (one - other).norm() <= 1e-5 * one.norm()


def test_weights_scale_what_each_expert_has() -> None:
    taus, weights = taus_of(3), (0.5, 2.0, 0.0)
    scaled = torch.stack([tau * weight for tau, weight in zip(taus, weights, strict=True)])
    assert (merged("svc", taus, weights) - merged("svc", scaled)).norm() <= 1e-5 * taus.norm()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    "taus",
    [
        taus_of(4) * torch.tensor([1.0, -1.0, 0.0, 1e-6])[:, None, None],
        taus_of(3)[:, :, :2] @ taus_of(3, seed=5)[:, :2] * 1e2,
        taus_of(30),
        taus_of(3) * 1e6,
    ],
    ids=["opposite", "low rank", "many", "huge"],
)
def test_awkward_task_vectors(taus: Tensor, published: bool) -> None:
    for of in OF:
        got = merged("svc", taus, of=of, published=published)
        assert got.isfinite().all()
        assert got.norm() <= 30 * taus.norm()


@pytest.mark.parametrize(
    ("of", "says", "hint"),
    [
        ("svc", "of cannot be 'svc'", "any number of experts"),
        ("adamerging", "of cannot be 'adamerging'", "no data"),
        ("passthrough", "of cannot be 'passthrough'", "any number of experts"),
        ("slerp", "of cannot be 'slerp'", "any number of experts"),
        ("tise", "of 'tise': there is no merge method 'tise'", "did you mean 'ties'?"),
        ("ties desnity=1", "of 'ties desnity=1': 'ties' has no option 'desnity'", "did you mean 'density'?"),
        ("ties density=2", "of 'ties density=2': density must be above 0 and at most 1, not 2", None),
        ("ties density", "of 'ties density': 'density' is not OPTION=V", "ties density=0.2"),
        ("density=1", "of 'density=1' does not begin with a method's name", "ties density=0.2"),
    ],
)
def test_what_cannot_stand_there_is_refused_by_name(of: str, says: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as refused:
        make_options(registry.load("svc"), "svc", {"of": of})
    assert refused.value.message == says
    assert (refused.value.hint or "").find(hint or "") >= 0


def test_options_are_completed_by_those_of_the_method() -> None:
    options = make_options(registry.load("svc"), "svc", {"of": "wudi"})
    assert options.of == "wudi solver=exact published=false ridge=0.3 scale=1.0"
    assert make_options(registry.load("svc"), "svc", {"of": options.of}) == options


def test_it_stands_in_an_override_and_in_a_recipe(tmp_path: Path) -> None:
    """With what the method measures over the model, and its options among others."""
    base, *experts = family(tmp_path / "models", experts=3)
    of = "ties density=0.4 reduce=mean"
    modelmerge.merge(base, experts, tmp_path / "alone", method="svc", of=of, scale=0.5)
    override = f"*: svc 'of={of}' scale=0.5"
    modelmerge.merge(base, experts, tmp_path / "override", method="average", at=[override])
    recipe = str(tmp_path / "override" / "modelmerge.json")
    assert main(["merge", "--recipe", recipe, "-o", str(tmp_path / "again"), "-q"]) == 0
    one, *others = (read(tmp_path / name) for name in ("alone", "override", "again"))
    assert all(torch.equal(one[key], other[key]) for other in others for key in one)
    card = (tmp_path / "alone" / "README.md").read_text()
    assert all(name in card for name in ("@misc{li2026", "@misc{yadav2023", "arxiv.org/abs/2306.01708"))
