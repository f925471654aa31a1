"""Optimise one shared correction per linear layer, off the subspace the tasks share, so that each expert is kept.

Adaptive Projective Gradient Descent (Wei et al., ICML 2025; its code calls it DOGE). Per weight [m, n], in float32:

1. `lambda_i`, each task's factor, from the untrimmed task vectors (w_i is --weight). `--lambda-mode paper`:
   `eta * w_i / ||tau_i||`. `relative`: `scale * w_i * mean_j ||tau_j|| / ||tau_i||`, which does not depend on the task
   vectors' size. `matched`: the same with the scale at which `sum_i lambda_i tau_i` is as long as the task vectors are
   on average: 1 / sqrt(T) for tasks at right angles, 1 / T for tasks that agree.
2. B: basis of the subspace the tasks share (`_linalg.shared_subspace`).
3. D [m, n] minimises `sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row)^2` off B. `--solver adam` is the
   published descent: Adam from zero on the gradient without its part in B. `--solver exact` goes to the shortest
   minimiser at once: D = (I - B B^T) A with A in the span of the task vectors, row by row, by preconditioned
   conjugate gradients in the coefficients [m, T], with a ridge.
4. mask_i keeps the largest entries of tau_i, counted over the whole task vector or each tensor.
5. merged task vector: `sum_i lambda_i mask_i (tau_i + D)`, shortened to `norm_cap * sqrt(||tau|| ||theta||)` where
   it is longer (||tau|| and ||theta||: means over the experts, ||theta_i|| taken as ||theta_0|| + ||tau_i||).

`--solver adam` (or any option that only the published form has) makes everything else as published: lambda of the
paper, 30 % of the entries, a shared rank of min(m, n) / 6, the rest from the base. By itself the method takes what
did best on small real experts (`python -m tests.benchmarks.choose apgd`): the exact solver with a ridge as large as a
row's mean squared norm, matched lambda, no trim, min(m, n) / 12, the rest averaged. The ridge is what matters: the
loss is a first-order picture of what a task needs, and meeting it to the letter makes D long wherever the tasks'
rows are nearly dependent. The cap only acts on experts that went far from the base (from about a seventh of its
norm), where all methods want smaller steps than near it.

Where paper and code differ, the code is followed: the paper gives one rank for both steps of B (`--shared-rank` equal
to `--task-rank` restores that), and projects the gradient, not the update, so that Adam's element-wise step leaves
the complement of B a little. `--inner matrix` takes the inner product over the whole weight rather than per row, as a
port of the code does. Adam stops once the loss has fallen below --tolerance of its first value, which is below what
float32 can resolve; the published loop runs all steps (--tolerance 0). The loss has many minimisers, and the two
solvers end at different ones. An expert that (nearly) did not change a weight would get a boundless lambda there: it
is left out of that weight, and said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modelmerge.methods import linalg, presence, threshold
from modelmerge.methods.contract import Citation, Context, Method
from modelmerge.methods.options import option

if TYPE_CHECKING:
    from torch import Tensor

# Losses are looked at every so many steps of Adam. On a GPU the loss of the look before is waited for, so that the
# queue never runs dry, and the answer still does not depend on timing.
_LOOK = 10
# Conjugate gradients: relative residual in the preconditioner's norm, and a bound on the iterations.
_RESIDUAL, _ITERATIONS = 1e-6, 200
# Bytes of task vectors that one turn of the descent works on: read twice, so they should still be in the cache.
_CHUNK = 2 << 20
# What Adam and the paper's lambda are by default; None elsewhere, where they have no effect.
_ADAM = {"steps": 400, "lr": 1e-4, "tolerance": 1e-11}


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionOptions:
    """What finding D can be told; None stands for a default that follows from the others.

    Raises:
        ValueError: An option has no effect with the solver or lambda mode that is asked for.
    """

    solver: Literal["exact", "adam"] | None = option(
        None, "exact: the shortest minimiser; adam: the published descent. Default: exact."
    )
    lambda_mode: Literal["matched", "relative", "paper"] | None = option(
        None, "How long each task's share is made. Default: matched; paper with adam."
    )
    eta: float | None = option(
        None, "With lambda mode paper: size of a task's share. Default: 0.07; 0.15 for language.", above=0.0
    )
    scale: float | None = option(
        None, "With lambda mode relative: factor on task vectors of even length. Default: 0.35.", above=0.0
    )
    density: float | None = option(
        None,
        "Share of each task vector's entries that is kept. Default: 1; 0.3 with lambda mode paper.",
        above=0.0,
        maximum=1.0,
    )
    trim_scope: Literal["model", "tensor"] = option(
        "model", "Where the share is counted: over the whole task vector, or in each tensor."
    )
    task_rank: int | None = option(None, "Directions taken from each task. Default: min(m, n) / T.", minimum=0)
    shared_rank: int | None = option(
        None, "Dimension of the shared subspace. Default: min(m, n) / 12; / 6 with lambda mode paper.", minimum=0
    )
    inner: Literal["row", "matrix"] = option("row", "Where the inner product of the loss is taken.")
    ridge: float | None = option(
        None,
        "exact: ridge, in units of a row's mean squared norm. Default: 1; paper: 1e-4.",
        minimum=0.0,
    )
    steps: int | None = option(None, "adam: steps at most. Default: 400.", minimum=0)
    lr: float | None = option(None, "adam: learning rate, in units of the weights. Default: 1e-4.", above=0.0)
    relative_lr: float | None = option(
        None, "adam: learning rate in units of rms(tau), instead of --lr; try 0.3.", above=0.0
    )
    tolerance: float | None = option(
        None, "adam stops once loss / first loss is below; 0: all steps. Default: 1e-11.", minimum=0.0
    )

    def __post_init__(self) -> None:
        descends = [name for name in (*_ADAM, "relative_lr") if getattr(self, name) is not None]
        published = descends or self.eta is not None or self.lambda_mode == "paper"
        solver = self.solver or ("adam" if published else "exact")
        if solver == "exact" and descends:
            raise ValueError(f"--{descends[0].replace('_', '-')} has no effect with --solver exact")
        if solver == "adam" and self.ridge is not None:
            raise ValueError("--ridge has no effect with --solver adam")
        own = "relative" if self.scale is not None else "matched"
        mode = self.lambda_mode or ("paper" if solver == "adam" or self.eta is not None else own)
        for name, place in (("eta", "paper"), ("scale", "relative")):
            if getattr(self, name) is not None and mode != place:
                raise ValueError(f"--{name} has no effect with --lambda-mode {mode}")
        paper = mode == "paper"
        follow: dict[str, float | str | None] = {
            "solver": solver,
            "lambda_mode": mode,
            "density": 0.3 if paper else 1.0,
        }
        follow |= {"eta": 0.07} if paper else {}
        follow |= {"scale": 0.35} if mode == "relative" else {}
        follow |= {"ridge": 1e-4 if paper else 1.0} if solver == "exact" else _ADAM
        for name, value in follow.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # frozen for everybody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(CorrectionOptions):
    """What APGD can be told; None stands for a default that follows from the others.

    Raises:
        ValueError: An option has no effect with the solver or lambda mode that is asked for.
    """

    norm_cap: float | None = option(
        None,
        "Bound on the merged task vector's norm. Default: 0.45 with lambda mode matched, else none.",
        above=0.0,
    )

    def __post_init__(self) -> None:
        CorrectionOptions.__post_init__(self)
        if self.norm_cap is None and self.lambda_mode == "matched":
            object.__setattr__(self, "norm_cap", 0.45)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    merged = torch.zeros_like(taus[0])
    found = find(taus, options, context)
    if found is None:
        return merged
    for i, lam in zip(found.active, found.lambdas, strict=True):
        part = taus[i] + found.correction
        if found.thresholds is not None:
            part.mul_(taus[i].abs() >= found.thresholds[i])
        merged.add_(part.mul_(lam))
    if options.norm_cap is None:
        return merged
    return capped(merged, list(found.lengths), options.norm_cap, context)


@dataclass(frozen=True, slots=True)
class Found:
    """What is found for one weight.

    `active`: the experts that changed it, by position, with the norms of their task vectors and their lambdas.
    `thresholds` [T]: magnitudes below which entries are trimmed, if any are. `correction`: D [m, n]; or one of each
    active expert, [t, m, n].
    """

    active: tuple[int, ...]
    lengths: tuple[float, ...]
    lambdas: tuple[float, ...]
    thresholds: Tensor | None
    correction: Tensor


def find(taus: Tensor, options: CorrectionOptions, context: Context, *, each: bool = False) -> Found | None:
    """The correction of task vectors [T, m, n]; None where no expert changed the weight.

    With `each`, the descent moves a correction of each task's own, and the shared rank is min(m, n) / T by default.
    """
    norms = presence.changed(taus, context)
    active = [i for i in norms if context.weights[i] != 0.0]
    if not active:
        return None
    vectors = taus if len(active) == len(taus) else taus[active]
    lengths = [norms[i] for i in active]
    lambdas = task_lambdas(vectors, lengths, [context.weights[i] for i in active], options)
    thresholds = context.measured
    if options.trim_scope == "tensor":
        thresholds = threshold.per_tensor(taus, [known(options.density)] * len(taus))

    factors = context.factors and [context.factors[i] for i in active]
    basis = task_basis(vectors, options, factors, each=each)
    if options.solver == "exact":
        correction = solve(vectors, lambdas, basis, options, context)
    else:
        correction = descend(vectors, lambdas, basis, options, context, each=each)
    return Found(tuple(active), tuple(lengths), tuple(lambdas), thresholds, correction)


def task_lambdas(taus: Tensor, norms: list[float], weights: list[float], options: CorrectionOptions) -> list[float]:
    """The factor of each task vector, from [T, m, n] and their norms."""
    mean = sum(norms) / len(norms)
    if options.lambda_mode == "paper":
        return [known(options.eta) * weight / norm for norm, weight in zip(norms, weights, strict=True)]
    if options.lambda_mode == "relative":
        scale = known(options.scale)
    else:
        even = torch.tensor([1.0 / norm for norm in norms], dtype=taus.dtype, device=taus.device)
        # Experts that cancel one another are not blown up to make up for it.
        scale = 1.0 / max(float(torch.linalg.vector_norm(torch.tensordot(even, taus, dims=1))), 1.0)
    return [scale * mean * weight / norm for norm, weight in zip(norms, weights, strict=True)]


def task_basis(
    taus: Tensor,
    options: CorrectionOptions,
    factors: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    *,
    each: bool = False,
) -> Tensor:
    """Basis of the shared subspace with the ranks asked for, float32 [m, k], from [T, m, n] or factors of them."""
    smaller = min(taus[0].shape)
    task_rank = smaller // len(taus) if options.task_rank is None else min(options.task_rank, smaller)
    shared_rank = options.shared_rank
    if shared_rank is None:
        shared_rank = smaller // (len(taus) if each else 6 if options.lambda_mode == "paper" else 12)
    # What is faithful to the paper is so to its singular vectors too.
    approximate = options.lambda_mode != "paper"
    return linalg.shared_subspace(list(taus), task_rank, shared_rank, factors, approximate=approximate).float()


def capped(merged: Tensor, norms: list[float], cap: float, context: Context) -> Tensor:
    """The merged task vector [m, n], shortened where it is long against the experts' change and the weight; in place.

    From the norms of the task vectors and `context.base`. A step that is the geometric mean of the two norms is far
    outside of what fine-tuning does to a weight that it changes little, and well inside where it changes it a lot.
    """
    assert context.base is not None, "the method asks for the base"
    mean = sum(norms) / len(norms)
    expert = float(torch.linalg.vector_norm(context.base, dtype=torch.float64)) + mean
    length = float(torch.linalg.vector_norm(merged, dtype=torch.float64))
    bound = cap * (mean * expert) ** 0.5
    if length <= bound:
        return merged
    context.tell({"shortened": bound / length})
    return merged.mul_(bound / length)


def descend(
    taus: Tensor,
    lambdas: list[float],
    basis: Tensor,
    options: CorrectionOptions,
    context: Context,
    *,
    each: bool = False,
) -> Tensor:
    """The correction D [m, n] where Adam stops, from task vectors [T, m, n] and the shared basis [m, k].

    The gradient needs no autograd: with `e_jr = <tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row r`, that of row r is
    `2 sum_i lambda_i * sum_j e_jr tau_j[r]`. With `each`, the loss has a D_i in the place of D, whose gradient is
    `2 lambda_i * sum_j e_jr tau_j[r]`, and [T, m, n] comes back.
    """
    # The loss in units of the task vectors' size is the same loss: D scales with them. Adam's eps is then small too.
    unit = 1.0 if options.relative_lr is None else float(taus.square().mean().sqrt())
    rate = known(options.lr) if options.relative_lr is None else options.relative_lr
    tolerance, steps = known(options.tolerance), known(options.steps)
    # The loss sees `total` times one matrix: D itself, or the sum of all lambda_i D_i.
    total = 1.0 if each else sum(lambdas)
    rows = side_by_side(taus, options)
    if unit != 1.0:
        rows = rows / unit
    # What e is at D = 0.
    offset = -wanted(rows, lambdas).mT
    correction, gradient = torch.zeros_like(taus if each else taus[0]), torch.empty_like(taus[0])
    adam = torch.optim.Adam([correction], lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    seen = torch.zeros_like(taus[0]) if each else correction
    shares = torch.tensor(lambdas, dtype=taus.dtype, device=taus.device)
    size = len(rows) if rows.is_cuda else max(1, _CHUNK // rows[0].nbytes)
    flat = [whole.view(len(rows), 1, -1) for whole in (seen, gradient)]
    parts = list(zip(*(whole.split(size) for whole in (rows, offset, *flat)), strict=True))
    enough = tolerance * float(offset.square().sum())
    taken, losses = 0, [lambda: math.inf] * (2 if rows.is_cuda else 1)
    for taken in range(1, int(steps) + 1):
        looks, loss = taken % _LOOK == 0 and tolerance > 0, offset.new_zeros(())
        for own, at_zero, d, g in parts:
            errors = torch.bmm(d, own.mT).mul_(total).add_(at_zero)
            if looks:
                loss += errors.square().sum()
            torch.bmm(errors.mul_(2.0 * total), own, out=g)
        if looks:
            losses = [*losses[1:], _read_later(loss)]
            if losses[0]() < enough:
                taken -= 1
                break
        linalg.remove_subspace(gradient, basis)
        correction.grad = gradient * shares[:, None, None] if each else gradient
        adam.step()
        if each:
            seen.copy_(torch.tensordot(shares, correction, dims=1))
    context.tell({"steps": taken})
    return correction.mul_(unit)


def _read_later(value: Tensor) -> Callable[[], float]:
    """The value, once asked for: on a GPU a copy is sent off now, and only asking waits for it."""
    if not value.is_cuda:
        return lambda: float(value)
    host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        there.synchronize()
        return float(host)

    return read


def solve(taus: Tensor, lambdas: list[float], basis: Tensor, options: CorrectionOptions, context: Context) -> Tensor:
    """The shortest D [m, n] off the basis [m, k] that minimises the loss, from task vectors [T, m, n].

    With V the rows' task vectors and P = I - B B^T, zero loss asks `V P D = c`; the shortest solution is `P V^T a`
    where `(V P V^T + ridge) a = c`, a [m, T]: conjugate gradients, preconditioned by the rows' own T x T systems, which
    are the whole answer where there is no basis. The ridge makes it the least-squares solution where zero loss is
    out of reach (more tasks than columns, experts that contradict one another); a much smaller one would let float32's
    rounding of the products through, magnified by its inverse.
    """
    rows = side_by_side(taus, options)
    shape = taus[0].shape
    target = (wanted(rows, lambdas) / sum(lambdas)).double()
    if options.inner == "matrix" and basis.shape[1]:
        off = torch.stack([linalg.remove_subspace(tau.clone(), basis) for tau in taus]).flatten(1)[None]
        grams = (off @ off.mT).double()
    else:
        grams = (rows @ rows.mT).double()
    # Rows that no task changed have nothing to solve: any positive shift gives them zero.
    shift = grams.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    shift = torch.where(shift > 0, shift, 1.0) * max(known(options.ridge), 1e-14)
    inverse = torch.linalg.inv(grams + shift * torch.eye(len(taus), dtype=grams.dtype, device=grams.device))

    def spread(a: Tensor) -> Tensor:
        """P V^T a: [m, T, 1] -> [m, n]."""
        return linalg.remove_subspace((a.float().mT @ rows).view(shape), basis)

    solution = inverse @ target
    if not basis.shape[1] or options.inner == "matrix":
        return spread(solution)

    def system(a: Tensor) -> Tensor:
        return (rows @ spread(a)[:, :, None]).double() + shift * a

    residual = target - system(solution)
    enough = _RESIDUAL**2 * (target * (inverse @ target)).sum()
    toward = inverse @ residual
    direction = toward
    square = (residual * toward).sum()
    # Looking at the residual waits for a GPU; iterations past the end change nothing.
    taken, look = 0, 8 if rows.is_cuda else 1
    while taken < _ITERATIONS and (taken % look or bool(square > enough)):
        image = system(direction)
        length = torch.where(square > enough, square / (direction * image).sum(), 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        toward = inverse @ residual
        square, before = (residual * toward).sum(), square
        direction = toward + torch.where(before > 0, square / before, 0.0) * direction
        taken += 1
    context.tell({"iterations": taken})
    return spread(solution)


def known(option: float | None) -> float:
    """An option that has been given or has followed from the others."""
    assert option is not None, "an option is used that the others say has no effect"
    return option


def side_by_side(taus: Tensor, options: CorrectionOptions) -> Tensor:
    """Per row, [m, T, n]: the T vectors of a row together, for batched products. Per matrix, [1, T, m * n]."""
    return taus.transpose(0, 1).contiguous() if options.inner == "row" else taus.flatten(1)[None]


def wanted(rows: Tensor, lambdas: list[float]) -> Tensor:
    """What `sum_i lambda_i <tau_j, D>` has to be for zero loss: `<tau_j, tau_j - sum_i lambda_i tau_i>`, [b, T, 1]."""
    weights = torch.tensor(lambdas, dtype=rows.dtype, device=rows.device)
    merged = torch.matmul(weights, rows)[:, :, None]
    squares = torch.linalg.vector_norm(rows, dim=2, keepdim=True).square_()
    return squares - torch.matmul(rows, merged)


CITATION = Citation(
    "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent", "Yongxian Wei and others", "ICML 2025"
)
METHOD = Method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2501.01230",
    citation=CITATION,
    matrices=True,
    rest=lambda options: "base" if options.lambda_mode == "paper" else "average",
    wants_base=True,
    blockwise=lambda options: False,
    survey=lambda options, each: (
        threshold.survey(each.get("density", options.density)) if options.trim_scope == "model" else None
    ),
    published={"solver": "adam", "lambda_mode": "paper"},
    # The descent holds the task vectors twice and Adam's state; the bases before it, the eigendecomposition of a
    # float64 Gram matrix with LAPACK's workspace (measured on square and oblong matrices: tests/engine/test_memory.py).
    workspace=lambda tasks: max(2.0 * tasks + 8.0, 26.0),
)
