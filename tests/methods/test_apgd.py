"""APGD's parts against plain float64: loss and gradient, projection, trim, guards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelmerge
from modelmerge.cli import main
from modelmerge.errors import UsageError
from modelmerge.methods import apgd, linalg, registry
from modelmerge.methods.contract import Context
from modelmerge.methods.merge.apgd import Options
from modelmerge.methods.options import change_options, describe, make_options
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.prepare import prepare
from tests.support.checkpoints import read
from tests.support.float64 import apgd_loss
from tests.support.methods import merged, taus_of

PUBLISHED = {
    "solver": "adam", "published": True, "eta": 0.07, "scale": 1.0, "density": 0.3, "shared_rank": None, "ridge": None,
    "steps": 400, "lr": 1e-4, "norm_cap": None,
}  # fmt: skip


def float64_descent(taus: Tensor, lambdas: list[float], basis: Tensor, options: Options) -> Tensor:
    """Adam by autograd with the projected gradient, in float64."""
    taus, basis = taus.double(), basis.double()
    correction = torch.zeros_like(taus[0], requires_grad=True)
    adam = torch.optim.Adam([correction], lr=options.lr)
    for _ in range(options.steps):
        adam.zero_grad()
        apgd_loss(correction, taus, lambdas).backward()
        correction.grad -= basis @ (basis.T @ correction.grad)
        adam.step()
    return correction.detach()


@pytest.mark.parametrize("shape", [(24, 18), (18, 24), (700, 520)])
def test_the_descent_agrees_with_float64_autograd(shape: tuple[int, int]) -> None:
    taus = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)) * 3e-3
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    options = Options(published=True, steps=60)
    basis = apgd.task_basis(taus, options)
    got = apgd.descend(taus, lambdas, basis, options, Context(tensor="w", weights=(1.0,) * len(taus)))
    want = float64_descent(taus, lambdas, basis, options)
    assert (got.double() - want).norm() <= 1e-4 * want.norm()
    assert apgd_loss(got.double(), taus.double(), lambdas) < apgd_loss(torch.zeros_like(want), taus.double(), lambdas)


@pytest.mark.parametrize(("tasks", "m", "n"), [(3, 20, 30), (1, 5, 7), (20, 33, 1)])
def test_sums_and_inner_products_of_rows_agree_with_float64(tasks: int, m: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, weights, x = (torch.randn(shape, generator=generator) for shape in ((m, tasks, n), (m, tasks), (m, n)))
    want = torch.einsum("mtn,mt->mn", rows.double(), weights.double())
    assert torch.allclose(apgd.combined(rows, weights).double(), want, atol=1e-5)
    want = torch.einsum("mtn,mn->mt", rows.double(), x.double())
    assert torch.allclose(apgd.inner(rows, x).double(), want, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20)])
def test_left_singular_vectors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    got = linalg.left_singular_vectors(x, 7)
    want = torch.linalg.svd(x.double()).U[:, :7]
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)
    assert torch.allclose(got.T @ got, torch.eye(7, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_left_singular_vectors_of_a_low_rank_matrix_stay_orthonormal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    got = linalg.left_singular_vectors(x, 8)
    assert torch.allclose(got.T @ got, torch.eye(8, dtype=torch.float64), atol=1e-10)
    x = x.double()
    assert (x - got @ (got.T @ x)).norm() <= 1e-6 * x.norm()


def test_the_shared_subspace_is_the_published_one() -> None:
    taus = taus_of(3)
    bases = torch.cat([torch.linalg.svd(tau.double(), full_matrices=False).U[:, :6] for tau in taus], 1)
    want = torch.linalg.svd(bases, full_matrices=False).U[:, :3]
    got = linalg.shared_subspace(list(taus), 6, 3)
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-9)


def test_without_steps_the_merge_is_the_trimmed_weighted_sum() -> None:
    taus = taus_of(3)
    got = merged("apgd", taus, published=True, steps=0, density=0.3, eta=0.2)
    want = torch.zeros_like(taus[0])
    for tau in taus:
        size = tau.numel()
        limit = tau.abs().flatten().kthvalue(size - int(0.3 * size)).values
        want += 0.2 / tau.norm() * tau * (tau.abs() >= limit)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-9)


def test_density_one_keeps_everything() -> None:
    taus = taus_of(3)
    want = sum(0.2 / tau.norm() * tau for tau in taus)
    assert torch.allclose(
        merged("apgd", taus, published=True, steps=0, density=1.0, eta=0.2), want, rtol=1e-5, atol=1e-9
    )


def test_ranks_of_zero_mean_no_projection() -> None:
    taus = taus_of(2)
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    options = Options(published=True, shared_rank=0, steps=20)
    assert apgd.task_basis(taus, options).shape == (24, 0)
    want = float64_descent(taus, lambdas, torch.zeros(24, 0), options)
    got = apgd.descend(taus, lambdas, torch.zeros(24, 0), options, Context(tensor="w", weights=(1.0, 1.0)))
    assert (got.double() - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(("size", "says"), [(0.0, "did not change"), (1e-5, "hardly changed")])
def test_a_negligible_task_vector_is_left_out_and_said(size: float, says: str) -> None:
    taus = taus_of(4)
    taus[2] *= size
    told: list[tuple[int, str]] = []
    chosen = registry.load("apgd")
    options = make_options(chosen, "apgd", {"published": True, "density": 1.0, "steps": 30})

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
    chosen = registry.load("apgd")
    options = make_options(chosen, "apgd", {"published": True, "density": 1.0, "steps": 1})
    chosen.apply(taus, options, Context(tensor="w", weights=(1.0,) * 3, leave_out=lambda i, why: told.append(i)))
    assert told == []


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (2, 3), (1, 1)])
def test_matrices_smaller_than_the_number_of_tasks(shape: tuple[int, int]) -> None:
    taus = torch.randn(5, *shape, generator=torch.Generator().manual_seed(4)) * 1e-2
    assert merged("apgd", taus, solver="adam", steps=5).isfinite().all()


def quiet(tasks: int, told: dict[str, float] | None = None) -> Context:
    return Context(
        tensor="w", weights=(1.0,) * tasks, tell=lambda figures: told.update(figures) if told is not None else None
    )


def dense_minimiser(taus: Tensor, lambdas: list[float], basis: Tensor) -> Tensor:
    """The shortest minimiser off the basis, float64, by a pseudo-inverse of the whole linear system in D."""
    taus, basis = taus.double(), basis.double()
    _, m, n = taus.shape
    off = torch.eye(m, dtype=torch.float64) - basis @ basis.T
    total = sum(lambdas)
    gap = taus - sum(lam * tau for lam, tau in zip(lambdas, taus, strict=True))
    rows, right = [], []
    for tau, rest in zip(taus, gap, strict=True):
        # <tau_r, (off @ D)_r> for each row r, as a linear function of all entries of D.
        rows.append(total * torch.einsum("rk,rn->rkn", off, tau).reshape(m, m * n))
        right.append((tau * rest).sum(1))
    shortest = torch.linalg.pinv(torch.cat(rows), rtol=1e-10) @ torch.cat(right)
    return off @ shortest.view(m, n)


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


@pytest.mark.parametrize("shared_rank", [0, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_exact_solver_finds_the_shortest_minimiser(case: str, shared_rank: int) -> None:
    taus = CASES[case]()
    lambdas = [0.3 * taus[0].norm().item() / tau.norm().item() for tau in taus]
    options = Options(shared_rank=shared_rank, ridge=1e-9)
    basis = apgd.task_basis(taus, options)
    got = apgd.solve(taus, lambdas, basis, options, quiet(len(taus))).double()
    want = dense_minimiser(taus, lambdas, basis)
    assert (got - want).norm() <= 1e-3 * want.norm()
    zero = torch.zeros_like(got)
    assert apgd_loss(got, taus.double(), lambdas) <= 1e-5 * apgd_loss(zero, taus.double(), lambdas)
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
    options = Options(ridge=1e-4)
    norms = [tau.norm().item() for tau in taus]
    lambdas = [0.35 * sum(norms) / len(norms) / norm for norm in norms]
    basis = apgd.task_basis(taus, options)
    got = apgd.solve(taus, lambdas, basis, options, quiet(len(taus), told)).double()
    assert got.isfinite().all(), case
    assert told.get("iterations", 0) < 200  # none at all where there is no basis
    at_zero = apgd_loss(torch.zeros_like(got), taus.double(), lambdas)
    assert apgd_loss(got, taus.double(), lambdas) <= at_zero * (1 + 1e-3)
    assert (basis.double().T @ got).norm() <= 1e-5 * got.norm() + 1e-12
    assert got.norm() < 100 * taus.norm()


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("factor", [10.0, 1e-3])
def test_matched_lambdas_are_free_of_scale(factor: float, density: float) -> None:
    taus = taus_of(4)
    one, other = (merged("apgd", vectors, density=density, norm_cap=1e9) for vectors in (taus, taus * factor))
    assert (other - factor * one).norm() <= 1e-3 * factor * one.norm()


def test_a_tolerance_stops_adam_and_changes_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taus = taus_of(3) * 0.3
    lambdas = [0.07 / tau.norm().item() for tau in taus]
    results, steps = [], []
    for tolerance in (0.0, 1e-11, 0.5):
        monkeypatch.setattr(apgd, "TOLERANCE", tolerance)
        options, told = Options(published=True), dict[str, float]()
        basis = apgd.task_basis(taus, options)
        results.append(apgd.descend(taus, lambdas, basis, options, quiet(3, told)))
        steps.append(told["steps"])
    assert steps[0] == 400
    assert steps[2] < 200
    assert (results[1] - results[0]).norm() <= 1e-4 * results[0].norm()


@pytest.mark.parametrize(
    ("taus", "scale"),
    [
        (taus_of(1).repeat(3, 1, 1), 1 / 3),  # experts that agree: their mean
        (torch.eye(4).view(4, 2, 2), 1 / 2),  # at right angles: 1 / sqrt(T)
        (taus_of(1) * torch.tensor([1.0, -1.0])[:, None, None], 1.0),  # that cancel: not blown up
    ],
    ids=["equal", "orthogonal", "opposite"],
)
def test_matched_lambdas_keep_the_length_of_a_task_vector(taus: Tensor, scale: float) -> None:
    lambdas = apgd.task_lambdas(taus, [tau.norm().item() for tau in taus], [1.0] * len(taus), Options())
    assert lambdas == pytest.approx([scale] * len(taus), rel=1e-5)


def test_matched_lambdas_even_out_the_tasks_and_keep_the_weights() -> None:
    taus = taus_of(3) * torch.tensor([1.0, 4.0, 0.2])[:, None, None]
    norms = [tau.norm().item() for tau in taus]
    lambdas = apgd.task_lambdas(taus, norms, [1.0, 1.0, 1.0], Options())
    assert [lam * norm for lam, norm in zip(lambdas, norms, strict=True)] == pytest.approx([lambdas[0] * norms[0]] * 3)
    merged_ = torch.tensordot(torch.tensor(lambdas), taus, dims=1)
    assert merged_.norm().item() == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert apgd.task_lambdas(taus, norms, [2.0, 1.0, 1.0], Options())[0] == pytest.approx(2 * lambdas[0])


@pytest.mark.parametrize("cap", [0.02, 0.3])
def test_a_merged_vector_beyond_the_cap_is_shortened_to_it(cap: float) -> None:
    taus, told = taus_of(4), dict[str, float]()
    weight = torch.randn(24, 18, generator=torch.Generator().manual_seed(9))
    chosen = registry.load("apgd")

    def run(norm_cap: float) -> Tensor:
        context = Context(tensor="w", weights=(1.0,) * 4, base=weight, tell=told.update)
        return chosen.apply(taus, Options(norm_cap=norm_cap), context)

    free = run(1e9)
    assert "shortened" not in told
    got = run(cap)
    mean = sum(tau.norm().item() for tau in taus) / 4
    bound = cap * (mean * (mean + weight.norm().item())) ** 0.5
    assert got.norm().item() == pytest.approx(min(bound, free.norm().item()), rel=1e-5)
    assert torch.allclose(got, free * (got.norm() / free.norm()), rtol=1e-5)
    if bound < free.norm().item():
        assert told["shortened"] == pytest.approx(bound / free.norm().item(), rel=1e-5)


def test_a_larger_ridge_ends_nearer_to_no_correction() -> None:
    taus, norms = taus_of(4), []
    for ridge in (1e-4, 0.1, 1.0, 1e3):
        options = Options(ridge=ridge)
        lambdas = apgd.task_lambdas(taus, [tau.norm().item() for tau in taus], [1.0] * 4, options)
        norms.append(apgd.solve(taus, lambdas, apgd.task_basis(taus, options), options, quiet(4)).norm().item())
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-2 * norms[0]


DEFAULTS = {
    "solver": "exact", "published": False, "eta": None, "scale": 1.0, "density": 1.0, "shared_rank": None,
    "ridge": 1.0, "steps": None, "lr": None, "norm_cap": 0.45,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, DEFAULTS),
        ({"published": True}, PUBLISHED),
        ({"solver": "adam"}, DEFAULTS | {"solver": "adam", "ridge": None, "steps": 400, "lr": 1e-4}),
        ({"published": True, "solver": "exact"},
         PUBLISHED | {"solver": "exact", "ridge": 1e-4, "steps": None, "lr": None}),
        ({"published": True, "eta": 0.15, "density": 1.0, "norm_cap": 2.0},
         PUBLISHED | {"eta": 0.15, "density": 1.0, "norm_cap": 2.0}),
    ],
    ids=str,
)  # fmt: skip
def test_options_follow_from_one_another(values: dict[str, Any], want: dict[str, Any]) -> None:
    chosen = registry.load("apgd")
    options = dataclasses.asdict(make_options(chosen, "apgd", values))
    assert options == want
    # A manifest records what followed, and reading it back changes nothing.
    assert dataclasses.asdict(make_options(chosen, "apgd", options)) == options


def test_what_followed_follows_anew_when_recorded_options_are_changed() -> None:
    chosen = registry.load("apgd")
    for values, changes in (
        ({}, {"solver": "adam"}),
        ({}, {"published": True}),
        ({"published": True}, {"solver": "exact"}),
        ({"published": True}, {"published": False}),
        ({"solver": "adam", "density": 0.5}, {"published": True, "scale": 2.0}),
        ({"ridge": 0.5}, {"density": 0.2}),
    ):
        recorded = dataclasses.asdict(make_options(chosen, "apgd", values))
        assert change_options(chosen, "apgd", recorded, changes, 2) == make_options(
            chosen, "apgd", {**values, **changes}
        )


def test_what_runs_is_described_with_what_follows_from_it() -> None:
    told = describe(Options())
    assert (told["solver"], told["lambda"], told["ridge"], told["norm_cap"]) == ("exact", "matched", 1.0, 0.45)
    assert told["shared_rank"] == "min(m, n) / 12"
    assert "steps" not in told
    told = describe(Options(published=True, shared_rank=4))
    assert (told["solver"], told["lambda"], told["eta"], told["density"]) == ("adam", "eta / ||tau||", 0.07, 0.3)
    assert (told["shared_rank"], told["task_rank"]) == (4, "min(m, n) / T")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 5}, "steps has no effect with solver exact"),
        ({"published": True, "solver": "exact", "lr": 1e-4}, "lr has no effect with solver exact"),
        ({"solver": "adam", "ridge": 0.1}, "ridge has no effect with solver adam"),
        ({"published": True, "ridge": 1e-4}, "ridge has no effect with solver adam"),
        ({"eta": 0.07}, "eta has no effect without published"),
    ],
)
def test_options_without_effect_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_options(registry.load("apgd"), "apgd", values)


def test_published_on_the_command_line(models: list[Path], tmp_path: Path) -> None:
    words = ["merge", "apgd", *map(str, models), "-q"]
    assert main([*words, "-o", str(tmp_path / "a"), "--published", "--steps", "3"]) == 0
    spelt = ["--solver", "adam", "--eta", "0.07", "--density", "0.3", "--rest", "base"]
    assert main([*words, "-o", str(tmp_path / "b"), "--published", "--steps", "3", *spelt]) == 0
    assert main([*words, "-o", str(tmp_path / "c")]) == 0
    first, second, third = (read(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], second[key]) for key in first)
    origin = read(models[0])
    assert torch.equal(first["model.layers.0.norm.weight"], origin["model.layers.0.norm.weight"])
    assert not torch.equal(third["model.layers.0.norm.weight"], origin["model.layers.0.norm.weight"])
    assert not torch.equal(third["model.layers.0.q_proj.weight"], first["model.layers.0.q_proj.weight"])


def test_bases_of_low_rank_experts_come_from_their_factors() -> None:
    generator = torch.Generator().manual_seed(5)
    factors = [(torch.randn(24, 2, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(3)]
    taus = torch.stack([left @ right for left, right in factors])
    options = Options(shared_rank=3)
    got, want = apgd.task_basis(taus, options, factors), apgd.task_basis(taus, options)
    assert torch.allclose(got @ got.T, want @ want.T, atol=1e-5)
    told: dict[str, Any] = {"tensor": "w", "weights": (1.0,) * 3, "base": torch.randn(24, 6, generator=generator)}
    one = registry.load("apgd").apply(taus, options, Context(**told))
    other = registry.load("apgd").apply(taus, options, Context(**told, factors=tuple(factors)))
    assert (one - other).norm() <= 1e-4 * one.norm()


def test_an_option_without_effect_is_spelt_as_it_was_typed(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", "apgd", *map(str, models), "-o", str(tmp_path / "a")]
    assert main([*words, "--lr", "1e-4"]) == 2
    assert "--lr has no effect with --solver exact" in capsys.readouterr().err
    assert main([*words, "--eta", "0.07", "--json"]) == 2
    assert "--eta has no effect without --published" in capsys.readouterr().out


def test_the_scale_multiplies_after_the_cap() -> None:
    taus, weight = taus_of(4), torch.randn(24, 18, generator=torch.Generator().manual_seed(9))
    context = Context(tensor="w", weights=(1.0,) * 4, base=weight)
    chosen = registry.load("apgd")
    for cap in (0.02, 0.45):
        one = chosen.apply(taus, Options(norm_cap=cap), context)
        for scale in (0.3, 4.0):
            assert torch.equal(chosen.apply(taus, Options(norm_cap=cap, scale=scale), context), one * scale)


def test_the_solver_alone_changes_the_minimiser_alone() -> None:
    taus, contexts = taus_of(4), []
    for values in ({}, {"solver": "adam"}):
        figures: dict[str, float] = {}
        context = Context(tensor="w", weights=(1.0,) * 4, tell=figures.update)
        fit = apgd.fit(taus, Options(**values), context)
        assert fit is not None
        contexts.append((fit.lambdas, fit.thresholds, set(figures)))
    assert contexts[0][:2] == contexts[1][:2]
    assert (contexts[0][2], contexts[1][2]) == ({"iterations"}, {"steps"})
    exact, adam = Options(shared_rank=3), Options(solver="adam", shared_rank=3)
    assert torch.equal(apgd.task_basis(taus, exact), apgd.task_basis(taus, adam))


def test_the_steps_of_the_exact_solver_stand_in_the_manifest(models: list[Path], tmp_path: Path) -> None:
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", solver="exact")
    figures = manifest["tensors"]["figures"]
    assert set(figures) == {
        "model.layers.0.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
    }  # fmt: skip
    assert all(0 <= told["iterations"] < 200 for told in figures.values())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, {"solver": "exact", "published": False, "lambda": "matched", "ridge": 1.0, "norm_cap": 0.45}),
        ({"solver": "adam", "steps": 2}, {"solver": "adam", "published": False, "lambda": "matched", "steps": 2}),
        ({"published": True, "steps": 2}, {"solver": "adam", "lambda": "eta / ||tau||", "eta": 0.07, "density": 0.3}),
    ],
    ids=["default", "adam", "published"],
)
def test_plan_manifest_and_card_say_what_ran(
    values: dict[str, Any], says: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    recipe = Recipe(method="apgd", base=str(models[0]), experts=tuple(map(str, models[1:])), options=values)
    plan = prepare(recipe).describe()
    manifest = modelmerge.merge(models[0], models[1:], tmp_path / "out", method="apgd", **values)
    for parts in (plan["groups"], manifest["tensors"]["groups"]):
        assert says.items() <= next(part["settings"] for part in parts if part["method"] == "apgd").items()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `--solver` | {says['solver']} |" in card
    assert "| `lambda` | " in card
