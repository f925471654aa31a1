"""Keep what each expert does where its task vector says that it matters: on its inputs and its outputs.

Fisher merging (Matena & Raffel, NeurIPS 2022) weights each expert's parameters by how much its loss would suffer from
a change there, which takes data. Here the weighting is read off the task vectors. A step of training on one weight
[m, n] is a sum of outer products of output gradients and inputs, so after training a power of tau tau^T stands for the
covariance of the gradients and one of tau^T tau for that of the inputs. The square roots are the estimate that Shampoo
(Gupta et al., arXiv 1802.09568) makes of a gradient's curvature, from the one sum of gradients there is; on the
narrower side of a weight the covariance falls faster than that, on the wider side slower (`kron.md`). With

    L_i = (tau_i tau_i^T)^a / tr    R_i = (tau_i^T tau_i)^b / tr    M0 = sum_i w_i tau_i    u = T / (m n)

a = b = 9/16 for a square weight, 3/4 on the narrower side and 3/8 on the wider where that is twice as wide or more, and
values between for shapes between, the merged task vector M minimises, by conjugate gradients,

    sum_i tr (M - w_i tau_i)^T L_i (M - w_i tau_i) R_i  +  ridge * u * ||M - M0||^2

and is multiplied by `scale / (1 + damping * (5 - 3 share^2) / 4 * ||M|| / ||theta_0||)`, in spectral norms: where the
update is as large as the weight it is added to, the experts' features no longer add up, and less of it serves all of
them better. `share` is that of the weight's directions which the experts take up, sum_i ||tau_i||_*^2 / ||tau_i||^2
over min(m, n), 1 at most: what they do to one another in other directions is not in the sum above. m and n of u count
the directions that experts of low rank take up (`modelmerge.methods.cores`), and what these make is no longer than they
are on average.

WUDI is this without L_i, with tau^T tau for the inputs and without the damping. Its other neighbours: MaTS (Tam et al.,
arXiv 2312.04339) solves the same linear system by conjugate gradients, with both covariances from data; ACTMat (Hameed
et al., arXiv 2604.01329) and ACE-Merging (Xu et al., CVPR 2026) take tau^T tau for the inputs' covariance as WUDI does,
in closed form. Both sides from the task vectors, with square roots and damping, are this package's own: no paper that
could be found describes it. `tests/benchmarks/kron.md` has the reasons, the figures on small real experts, and what
else was tried.

Each iteration costs 4 T m n min(m, n) + 2 T min(m, n)^3 FLOP, and 20 to 60 are taken. An expert that did not change a
weight is left out of it, and said. The tensors that are not weights of linear layers are
averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modelmerge import interrupts
from modelmerge.methods import cores, linalg, presence, work
from modelmerge.methods.contract import Citation, Context, Tensor, matrix_method
from modelmerge.methods.options import option
from modelmerge.methods.sums import weighted_sum

_ITERATIONS = 200  # a bound; a tolerance of 1e-3 takes 20 to 60
_USUAL = 30
_LITTLE = 1 << 22  # entries: an iteration on more takes a card milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of kron."""

    ridge: float = option(0.3, "Pull towards the sum of the task vectors, in units of the mean weighting.", above=0.0)
    damping: float = option(1.0, "How much a merged vector as large as its weight is shortened.", minimum=0.0)
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)
    tolerance: float = option(1e-3, "Conjugate gradients stop at this relative residual.", above=0.0)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    norms = presence.changed(taus, context)
    if not norms:
        return torch.zeros_like(taus[0])
    vectors = taus if len(norms) == len(taus) else taus[list(norms)]
    weights = [context.weights[i] for i in norms]
    core = cores.of(vectors, context, list(norms))
    # The factors of cores would be no smaller than they are.
    factors = core.pairs if core.left is core.right is None else [None] * len(vectors)
    m, n = taus.shape[-2:]
    merged, directions = solve(core.taus, weights, factors, _exponents(m, n), options, context)
    if options.damping:
        share = (directions / min(m, n)).clamp(max=1.0)
        cores.damped(merged, context.base, options.damping * (5.0 - 3.0 * share * share) / 4.0)
    return core.whole(core.shortened(merged, norms.values(), weights)).mul_(options.scale)


def solve(
    taus: Tensor,
    weights: list[float],
    factors: Sequence[tuple[Tensor, Tensor] | None],
    exponents: tuple[float, float],
    options: Options,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """The minimiser [m, n], from task vectors [T, m, n] and what is known of their factors.

    Also how many directions the task vectors take up together, each counted by `(sum s)^2 / sum s^2`. `exponents` are
    those of the singular values in the weighting of the rows and in that of the columns.
    """
    if taus.shape[-2] > taus.shape[-1]:
        turned = [(pair[1].mT, pair[0].mT) if pair else None for pair in factors]
        merged, directions = solve(taus.mT, weights, turned, exponents[::-1], options, context)
        return merged.mT.contiguous(), directions
    tasks, (m, n) = len(taus), taus.shape[-2:]
    ridge = options.ridge * tasks / (m * n)
    each = [_half_weightings(tau, pair, exponents) for tau, pair in zip(taus, factors, strict=True)]
    halves = [(left, right) for left, right, _ in each]

    def weighted(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """L_i x R_i."""
        return (left @ (x @ right.mT)) @ right

    def system(x: Tensor) -> Tensor:
        total = ridge * x
        for half in halves:
            interrupts.check()
            total.add_(weighted(x, *half))
        return total

    merged = weighted_sum(taus, weights)
    target = ridge * merged
    for tau, weight, half in zip(taus, weights, halves, strict=True):
        target.add_(weighted(tau, *half), alpha=weight)
    del tau  # a large one, that comes alone, would leave too little room
    enough = options.tolerance**2 * _product(target, target)
    residual = target.sub_(system(merged))
    direction, square = residual.clone(), _product(residual, residual)
    # Looking waits for a device, which takes longer than iterations on little; those past the end change nothing.
    look = 1 if taus.device.type == "cpu" or target.numel() > _LITTLE else 8
    iteration, taken = 0, torch.zeros_like(square)
    while iteration < _ITERATIONS and (iteration % look or bool((square > enough).any())):
        image = system(direction)
        length = torch.where(square > enough, square / _product(direction, image), 0.0)
        _go(merged, length, direction)
        _go(residual, -length, image)
        del image
        taken += square > enough
        square, before = _product(residual, residual), square
        quotient = torch.where(before > 0, square / before, 0.0)
        direction.mul_(quotient.to(direction.dtype)[..., None, None]).add_(residual)
        iteration += 1
    context.tell({"iterations": taken.int().tolist()})
    return merged, torch.stack([directions for *_, directions in each]).sum(0)


def _exponents(m: int, n: int) -> tuple[float, float]:
    """Those of the singular values in L and in R, of a weight [m, n]: twice the powers of the Gram matrices."""
    unlike = max(-1.0, min(1.0, math.log2(n / m)))
    return (9 + 3 * unlike) / 8, (9 - 3 * unlike) / 8


def _half_weightings(
    tau: Tensor, factors: tuple[Tensor, Tensor] | None, exponents: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """L [m, m] and a factor W [k, n] of R = W^T W, both of trace 1, of a task vector [m, n] with m <= n; float32.

    Also how many directions it takes up.
    """
    left, s, right = linalg.leading_triplets(tau, tau.shape[-2], factors)
    s = s / s.sum(-1, keepdim=True)
    rows, columns = (s**exponent / (s**exponent).sum(-1, keepdim=True) for exponent in exponents)
    weighting = ((left * rows[..., None, :]) @ left.mT).float()
    return weighting, right.mul_(columns.sqrt()[..., None]).float(), 1.0 / s.square().sum(-1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of matrices, float64."""
    return (x * y).sum((-2, -1)).double()


def _go(x: Tensor, length: Tensor, direction: Tensor) -> None:
    """Add so much of the direction to x, in place."""
    if x.device.type == "cpu":
        x.add_(direction, alpha=float(length))
    else:
        x.addcmul_(direction, length.to(x.dtype)[..., None, None])


def _one_by_one(options: Options, m: int, n: int, tasks: int) -> float:
    """L_i and the factors W of all R_i, and five matrices of the iteration or, before, a decomposition in float64."""
    square, whole = min(m, n) ** 2, m * n
    return tasks * (whole + square) + max(5.0 * whole + 2.0 * square, 2.0 * whole + 10.0 * square)


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    k, g = sorted((m, n))
    halves = work.triplets(k, g, k) + work.fine_product(k, k, k)
    step = work.product(k, g, k) * 2.0 + work.product(k, k, k)
    return (halves + step * (_USUAL + 2)) * tasks + _norm(options, k, g) * 2.0


def _norm(options: Options, m: int, n: int) -> work.Work:
    return work.spectral_norm(m, n) if options.damping else work.NOTHING


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2111.09832",  # Fisher merging, of which this is a kind
    citation=Citation(
        "Merging Models with Fisher-Weighted Averaging", "Michael Matena and Colin Raffel", "NeurIPS 2022"
    ),
    wants_base=True,
    workspace=lambda options, tasks: 2.0 * tasks + 12.0,
    one_by_one=_one_by_one,
    work=_work,
    work_of_products=work.through_cores(_work, _norm),
    batches=lambda options: True,
)
