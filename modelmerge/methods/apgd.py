"""The mathematics of Adaptive Projective Gradient Descent: what `merge apgd` and `disentangle apgd` share.

Wei et al., ICML 2025, arXiv 2501.01230; its code calls it DOGE. Per weight [m, n], in float32:

1. `lambda_i`, each task's factor, from the untrimmed task vectors (w_i is the expert's weight). Published:
   `eta * w_i / ||tau_i||`. By default `scale * w_i * mean_j ||tau_j|| / ||tau_i||` with the scale at which
   `sum_i lambda_i tau_i` is as long as the task vectors are on average: 1 / sqrt(T) for tasks at right angles, 1 / T
   for tasks that agree. That does not depend on the size of the task vectors.
2. B: basis of the subspace the tasks share (`linalg.shared_subspace`), from min(m, n) / T directions of each task. By
   default it has at most half of the directions that experts of low rank take up (`modelmerge.methods.cores`).
3. D [m, n] minimises `sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>_row)^2` off B. The solver `adam` is
   the published descent: Adam from zero on the gradient without its part in B. The solver `exact` goes to the shortest
   minimiser at once: D = (I - B B^T) A with A in the span of the task vectors, row by row, by preconditioned
   conjugate gradients in the coefficients [m, T], with a ridge.

Where paper and code differ, the code is followed: the paper gives one rank for both steps of B, and projects the
gradient, not the update, so that Adam's element-wise step leaves the complement of B a little. Adam stops once the loss
has fallen below `TOLERANCE` of its first value, which is below what float32 can resolve; the published loop runs all
steps. The loss has many minimisers, and the two solvers end at different ones. An expert that (nearly) did not change a
weight would get a boundless lambda there: it is left out of that weight, with a remark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from modelmerge import devices, interrupts
from modelmerge.errors import named
from modelmerge.methods import cores, leading, linalg, presence, products, work
from modelmerge.methods.contract import Citation, Context, Tensor, Vectors
from modelmerge.methods.options import PUBLISHED, follow, option, refuse_idle
from modelmerge.methods.sums import weighted_sum

PAPER = "https://arxiv.org/abs/2501.01230"
CITATION = Citation(
    "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent", "Yongxian Wei and others", "ICML 2025"
)
# Adam stops once the loss is this share of the first one; with 0 it takes all steps.
TOLERANCE = 1e-11
# On a CPU Adam's loss is looked at in each step; on a GPU in every so many, and the loss of the look before is waited
# for, so that the queue never runs dry, and the answer still does not depend on timing.
_LOOK = 10
# Conjugate gradients: relative residual in the preconditioner's norm, and a bound on the iterations.
_RESIDUAL, _ITERATIONS = 1e-6, 200
_USUAL = 30.0  # iterations
# Bytes of task vectors that one turn of the descent works on: read twice, so they should still be in the cache.
_CHUNK = 3 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionOptions:
    """How D is found. Where no value is named, one follows from the others; None is left where none has an effect.

    Raises:
        UsageError: An option has no effect with the solver, or without `published`.
    """

    solver: Literal["exact", "adam"] | None = option(
        None, "exact: the shortest minimiser; adam: the published descent. Default: exact; adam as published."
    )
    published: bool = option(False, PUBLISHED)
    eta: float | None = option(
        None, "As published: size of a task's share; try 0.15 for language. Default: 0.07.", above=0.0
    )
    density: float | None = option(
        None, "Share of each task vector's entries that is kept. Default: 1; 0.3 as published.", above=0.0, maximum=1.0
    )
    shared_rank: int | None = option(
        None, "Dimension of the shared subspace. Default: min(m, n) / 12; min(m, n) / 6 as published.", minimum=0
    )
    ridge: float | None = option(
        None, "exact: ridge, in units of a row's mean squared norm. Default: 1; 1e-4 as published.", minimum=0.0
    )
    steps: int | None = option(None, "adam: steps at most. Default: 400.", minimum=0)
    lr: float | None = option(None, "adam: learning rate, in units of the weights. Default: 1e-4.", above=0.0)

    def __post_init__(self) -> None:
        follow(self, solver="adam" if self.published else "exact", density=0.3 if self.published else 1.0)
        if self.published:
            follow(self, eta=0.07)
        else:
            refuse_idle(self, ["eta"], f"without {named('published')}")
        if self.solver == "exact":
            refuse_idle(self, ["steps", "lr"], f"with {named('solver')} exact")
            follow(self, ridge=1e-4 if self.published else 1.0)
        else:
            refuse_idle(self, ["ridge"], f"with {named('solver')} adam")
            follow(self, steps=400, lr=1e-4)

    @property
    def rank_divisor(self) -> int | None:
        """The shared rank of a weight is min(m, n) divided by this, where none is named; None: by the tasks."""
        return 6 if self.published else 12

    def describe(self) -> dict[str, str]:
        """What follows from the options, in words."""
        return {
            "lambda": "eta / ||tau||" if self.published else "matched",
            "task_rank": "min(m, n) / T",
            **({"shared_rank": f"min(m, n) / {self.rank_divisor or 'T'}"} if self.shared_rank is None else {}),
        }


@dataclass(frozen=True, slots=True)
class Fit:
    """What is found for one weight.

    `active`: the experts that changed it, by position, with the norms of their task vectors and their lambdas.
    `thresholds` [T]: magnitudes below which entries are trimmed, if any are. `correction`: D [m, n]; or one of each
    active expert, [t, m, n].
    """

    active: tuple[int, ...]
    lengths: tuple[Any, ...]
    lambdas: tuple[Any, ...]
    thresholds: Tensor | None
    correction: Tensor


def fit(taus: Tensor, options: CorrectionOptions, context: Context, *, each: bool = False) -> Fit | None:
    """The correction of task vectors [T, m, n]; None where no expert changed the weight.

    With `each`, the descent moves a correction for each task. The exact solver takes batches [T, B, m, n], whose
    lengths and lambdas are tensors [B, 1, 1].
    """
    norms = presence.changed(taus, context)
    active = [i for i in norms if context.weights[i] != 0.0]
    if not active:
        return None
    vectors = taus if len(active) == len(taus) else taus[active]
    lengths = [norms[i] for i in active]
    lambdas = task_lambdas(vectors, lengths, [context.weights[i] for i in active], options)
    # What is faithful to the paper takes task vectors as they are.
    core = cores.Cores(vectors) if options.published else cores.of(vectors, context, active, left=False)
    pairs = core.pairs or (context.factors and [context.factors[i] for i in active])
    basis = task_basis(vectors, options, pairs, core.rank)
    if options.solver == "exact":
        correction = core.whole(solve(core.taus, lambdas, basis, options, context))
    else:
        correction = descend(vectors, lambdas, basis, options, context, each=each)
    return Fit(tuple(active), tuple(lengths), tuple(lambdas), context.measured, correction)


def task_lambdas(taus: Tensor, norms: list[Any], weights: list[float], options: CorrectionOptions) -> list[Any]:
    """The factor of each task vector, from [T, m, n] and their norms."""
    if options.published:
        return [_value(options.eta) * weight / norm for norm, weight in zip(norms, weights, strict=True)]
    mean = sum(norms) / len(norms)
    if taus.dim() == 4:
        together = sum(tau / norm.to(tau.dtype) for tau, norm in zip(taus, norms, strict=True))
        length = torch.linalg.vector_norm(together, dim=(-2, -1), keepdim=True).double().clamp(min=1.0)
        return [mean * weight / (norm * length) for norm, weight in zip(norms, weights, strict=True)]
    even = torch.tensor([1.0 / norm for norm in norms], dtype=taus.dtype, device=taus.device)
    # Experts that cancel one another are not blown up to make up for it.
    together = weighted_sum(taus, even.tolist()) if isinstance(taus, Vectors) else torch.tensordot(even, taus, dims=1)
    scale = 1.0 / max(float(torch.linalg.vector_norm(together)), 1.0)
    return [scale * mean * weight / norm for norm, weight in zip(norms, weights, strict=True)]


def task_basis(
    taus: Tensor,
    options: CorrectionOptions,
    factors: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    occupied: int | None = None,
) -> Tensor:
    """Basis of the shared subspace, float32 [m, k], from task vectors [T, m, n] or factors of them.

    Where they take up only so many directions between them, half of those at most is shared: in a basis of all of them
    D has nothing left to do.
    """
    smaller, shared_rank = min(taus.shape[-2:]), options.shared_rank
    if shared_rank is None:
        shared_rank = smaller // (options.rank_divisor or len(taus))
        shared_rank = shared_rank if occupied is None else min(shared_rank, occupied // 2)
    # What is faithful to the paper is so to its singular vectors too.
    approximate = not options.published
    rank = smaller // len(taus)
    return linalg.shared_subspace(taus, rank, shared_rank, factors, approximate=approximate).float()


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
    # The loss sees `total` times one matrix: D itself, or the sum of all lambda_i D_i.
    total = 1.0 if each else sum(lambdas)
    rows, lr = rows_of(taus), _value(options.lr)
    # 2 total e, which the gradient and the loss are taken from, is this at D = 0.
    at_zero = targets(rows, lambdas)[:, :, 0].mul_(-2.0 * total)
    correction, gradient = torch.zeros_like(taus if each else taus[0]), torch.empty_like(taus[0])
    # Adam's state. torch.optim takes a second to be imported, and on small weights a tenth of each step.
    mean, square, taken = torch.zeros_like(correction), torch.zeros_like(correction), at_zero.new_zeros(())
    sight = torch.zeros_like(taus[0]) if each else correction
    shares = torch.tensor(lambdas, dtype=taus.dtype, device=taus.device)
    on_device = rows.device.type != "cpu"
    size, look = (len(rows), _LOOK) if on_device else (max(1, _CHUNK // rows[0].nbytes), 1)
    parts = list(zip(*(whole.split(size) for whole in (rows, at_zero, sight, gradient)), strict=True))
    enough = TOLERANCE * float(at_zero.square().sum())
    step, losses = 0, [lambda: math.inf] * (2 if on_device else 1)
    for step in range(1, int(_value(options.steps)) + 1):
        looks, loss = step % look == 0 and TOLERANCE > 0, at_zero.new_zeros(())
        interrupts.check()
        for vectors, start, d, g in parts:
            errors = torch.add(start, inner(vectors, d), alpha=2.0 * total**2)
            if looks:
                loss += errors.square().sum()
            g.copy_(combined(vectors, errors))
        parts.reverse()  # the last part's vectors are still in the cache
        if looks:
            losses = [*losses[1:], devices.read_later(loss)]
            if losses[0]() < enough:
                step -= 1
                break
        products.remove_subspace(gradient, basis)
        slope = gradient * shares[:, None, None] if each else gradient
        torch._fused_adam_(
            [correction], [slope], [mean], [square], [], [taken.add_(1.0)],
            lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
        if each:
            sight.copy_(torch.tensordot(shares, correction, dims=1))
    context.tell({"steps": step})
    return correction


def solve(taus: Tensor, lambdas: list[Any], basis: Tensor, options: CorrectionOptions, context: Context) -> Tensor:
    """The shortest D [m, n] off the basis [m, k] that minimises the loss, from task vectors [T, m, n].

    With V the rows' task vectors and P = I - B B^T, zero loss asks `V P D = c`; the shortest solution is `P V^T a`
    where `(V P V^T + ridge) a = c`, a [m, T]: conjugate gradients, preconditioned by the rows' own T x T systems, which
    are the whole answer where there is no basis. The ridge makes it the least-squares solution where zero loss is
    out of reach (more tasks than columns, experts that contradict one another); a much smaller one would let float32's
    rounding of the products through, magnified by its inverse.
    """
    rows = rows_of(taus)
    total = sum(lambdas)
    target = (targets(rows, lambdas) / (total[..., None] if rows.dim() == 4 else total)).double()
    grams = (rows @ rows.mT).double()
    # Rows that no task changed have nothing to solve: any positive shift gives them zero.
    shift = grams.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    shift = torch.where(shift > 0, shift, 1.0) * max(_value(options.ridge), 1e-14)
    inverse = torch.linalg.inv(grams + shift * torch.eye(len(taus), dtype=grams.dtype, device=grams.device))

    def spread(a: Tensor) -> Tensor:
        """P V^T a: [m, T, 1] -> [m, n]."""
        return products.remove_subspace(combined(rows, a[..., 0].float()), basis)

    solution = inverse @ target
    if not basis.shape[-1]:
        return spread(solution)

    def system(a: Tensor) -> Tensor:
        return inner(rows, spread(a))[..., None].double() + shift * a

    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-3, -2, -1), keepdim=True)

    residual = target - system(solution)
    enough = _RESIDUAL**2 * product(target, inverse @ target)
    toward = inverse @ residual
    direction = toward
    square = product(residual, toward)
    # Looking at the residual waits for a GPU; iterations past the end change nothing.
    iteration, look = 0, 1 if rows.device.type == "cpu" else 8
    taken = torch.zeros_like(square)
    while iteration < _ITERATIONS and (iteration % look or bool((square > enough).any())):
        interrupts.check()
        image = system(direction)
        length = torch.where(square > enough, square / product(direction, image), 0.0)
        taken += square > enough
        solution = solution + length * direction
        residual = residual - length * image
        toward = inverse @ residual
        square, before = product(residual, toward), square
        direction = toward + torch.where(before > 0, square / before, 0.0) * direction
        iteration += 1
    context.tell({"iterations": taken.int().flatten().tolist() if rows.dim() == 4 else int(taken)})
    return spread(solution)


def rows_of(taus: Tensor) -> Tensor:
    """[T, m, n] -> [m, T, n]: the T vectors of a row together, for batched products; or from and to [..., m, n]."""
    *before, m, n = taus.shape[1:]
    rows = torch.empty(*before, m, len(taus), n, dtype=taus.dtype, device=taus.device)
    for i, tau in enumerate(taus):
        rows[..., i, :] = tau
    return rows


def targets(rows: Tensor, lambdas: list[Any]) -> Tensor:
    """What `sum_i lambda_i <tau_j, D>` has to be for zero loss: `<tau_j, tau_j - sum_i lambda_i tau_i>`, [m, T, 1]."""
    if rows.dim() == 4:
        weights = torch.cat(lambdas, dim=-1).to(rows.dtype)  # [B, 1, T]
    else:
        weights = torch.tensor(lambdas, dtype=rows.dtype, device=rows.device)
    merged = combined(rows, weights.expand(rows.shape[:-1]))
    squares = torch.linalg.vector_norm(rows, dim=-1).square_()
    return (squares - inner(rows, merged))[..., None]


def combined(rows: Tensor, weights: Tensor) -> Tensor:
    """`sum_j w_j v_j` for each row: [m, n] from its vectors [m, T, n] and their weights [m, T]; or batches of these."""
    if rows.device.type != "cpu" or rows.dim() == 4:
        return (weights[..., None, :] @ rows)[..., 0, :]
    # Products as thin as these run at a third of the rate at which memory is read; a weighted sum of embeddings at it.
    count, tasks, n = rows.shape
    places, firsts = torch.arange(count * tasks), torch.arange(0, count * tasks, tasks)
    # Mode 0 is the sum. torch.nn.functional has it too, but looks at what it is given for as long as short rows take.
    return torch.embedding_bag(rows.view(-1, n), places, firsts, False, 0, False, weights.reshape(-1))[0]


def inner(rows: Tensor, x: Tensor) -> Tensor:
    """`<v_j, x>` for each row: [m, T] from its vectors [m, T, n] and those of x [m, n]; or batches of these."""
    if rows.device.type != "cpu" or rows.dim() == 4:
        return (x[..., None, :] @ rows.mT)[..., 0, :]
    # The derivative of `combined` by its weights: no graph has to be kept for it.
    count, tasks, n = rows.shape
    bags = torch.arange(count)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, rows.view(-1, n), torch.arange(count * tasks), bags * tasks, bags.repeat_interleave(tasks), 0
    ).view(count, tasks)


def workspace(tasks: int) -> float:
    """How many float32 copies of a weight finding D needs at once beside the task vectors.

    The descent holds the task vectors twice and Adam's state; the bases before it, the eigendecomposition of a float64
    Gram matrix with LAPACK's workspace (measured on square and oblong matrices: tests/test_memory.py).
    """
    return max(2.0 * tasks + 8.0, 26.0)


def one_by_one(m: int, n: int, tasks: int) -> float:
    """How many float32 numbers that is where the task vectors come one at a time: they are held once, by rows."""
    return max((tasks + 6.0) * m * n, 9.0 * m * n + 12.0 * min(m, n) ** 2)


def work_of(options: CorrectionOptions, m: int, n: int, tasks: int, k: int | None = None) -> work.Work:
    """What finding the correction of one weight takes; `k`: the directions of task vectors that are products."""
    side = min(m, n)
    rank, shared = side // tasks, options.shared_rank
    shared = side // (options.rank_divisor or tasks) if shared is None else shared

    def basis(n: int, rank: int) -> work.Work:
        iterates = not options.published and leading.iterates((m, n), rank)
        return (work.iterated if iterates else work.triplets)(m, n, rank)

    # A product of a matrix and a vector for each row, twice, and all of the correction a few times.
    read, written = 8.0 * tasks * m * n, 16.0 * m * n
    if options.solver == "adam":
        steps, step = float(options.steps or 0), work.Work(moved=read + written + 28.0 * m * n)
    else:
        steps, step = _USUAL, work.Work(moved=read + written)
    bases = basis(n, rank) * tasks
    if k is not None:
        rank, shared, bases = k // tasks, min(shared, k // 2), work.Work(double=8.0 * (m + n) * k**2 / tasks)
    step += work.product(m, n, 2 * min(shared, m))
    return bases + basis(rank * tasks, shared) + step * steps + work.Work(moved=5.0 * read)


def _value(option: float | None) -> float:
    """The value of an option that has one, since it has an effect with the others."""
    assert option is not None, "an option is used that the others say has no effect"
    return option
