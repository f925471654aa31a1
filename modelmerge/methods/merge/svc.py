"""Calibrate the singular values of what another method makes.

Singular Value Calibration (Li et al., ICML 2026). Where task vectors share singular directions, a sum counts these once
for each expert, and should count them once. Per weight [m, n]: with `M = U S V^T` the singular value decomposition of
what the method `of` makes of the `w_i tau_i`, direction k has these shares of the experts, by least squares in its row
space:

    s_ki = <u_k^T M, w_i u_k^T tau_i> / ||w_i u_k^T tau_i||^2

`--published` divides S_k by the mean over the experts of `max(1 / T, s_ki)`. By default there is one share for all
experts,

    s_k = sum_i <u_k^T M, w_i u_k^T tau_i> / sum_i ||w_i u_k^T tau_i||^2

so that those who have nothing in a direction have no say there, and S_k is divided by `max(floor * s, s_k)`, with s the
same of the whole of M. A factor on M then changes nothing. The result is multiplied by `scale`.

`of` is any method that takes any number of experts and no data, with its options in one string: `--of "ties
density=0.1"`. It does to the weights of linear layers what it does by itself, what it measures over the model included;
an option that can differ between the experts has one value there. The other tensors are averaged.

Deviations: singular values of M below 1e-5 of its largest count as missing. The authors' code leaves a direction alone
where any s_ki is negative, and has a floor of 1 behind TSV-Merge.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from modelmerge import interrupts
from modelmerge.errors import UsageError, named
from modelmerge.methods import linalg, work
from modelmerge.methods.contract import Citation, Context, Method, Tensor, matrix_method
from modelmerge.methods.options import PUBLISHED, follow, option, refuse_idle
from modelmerge.methods.words import as_typed, parse_method


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of SVC; `of` is completed by the defaults of the method that it names.

    Raises:
        UsageError: `of` names no method that can stand there, or an option that it does not have; or `floor` is beside
            `published`.
    """

    of: str = option("task-arithmetic", "The method that merges, with its options: 'ties density=0.1'.")
    published: bool = option(False, PUBLISHED)
    floor: float | None = option(
        None, "Least share that a direction is taken to have, in units of the whole's. Default: 0.3.", above=0.0
    )
    scale: float = option(1.0, "Factor on the merged task vector.", varies="tensor", linear=True)

    def __post_init__(self) -> None:
        name, method, options = parse_method(self.of, "of")
        if method is METHOD or method.on_data or method.most_experts is not None:
            raise UsageError(
                f"cannot be '{name}'", option="of", hint="name a method that takes any number of experts and no data"
            )
        object.__setattr__(self, "of", as_typed(name, options))  # frozen for everybody else
        if self.published:
            refuse_idle(self, ["floor"], f"with {named('published')}")
        else:
            follow(self, floor=0.3)


def apply(taus: Tensor, options: Options, context: Context) -> Tensor:
    """[T, m, n] -> [m, n]: the merged task vector."""
    method, inner = _of(options)
    merged = method.apply(taus, inner, context)
    return calibrated(merged, taus, context.weights, options).mul_(options.scale)


def calibrated(merged: Tensor, taus: Tensor, weights: tuple[float, ...], options: Options) -> Tensor:
    """A merged task vector [m, n] with the singular values that the task vectors [T, m, n] give its directions."""
    left, s, right = linalg.leading_triplets(merged, min(merged.shape))
    rows, columns = left.T.float(), right.float()
    shared, squares = (s.new_zeros(len(taus), len(s)) for _ in range(2))
    for i, (tau, weight) in enumerate(zip(taus, weights, strict=True)):
        interrupts.check()
        part = (rows @ tau).mul_(weight)  # [k, n]
        squares[i] = part.square().sum(1, dtype=torch.float64)
        shared[i] = (part * columns).sum(1, dtype=torch.float64) * s
    if options.published:
        shares = torch.where(squares > 0, shared / squares, 0.0).clamp(min=1.0 / len(taus)).mean(0)
    else:
        assert options.floor is not None, "it has one by default"
        whole = shared.sum() / squares.sum()
        shares = torch.maximum(shared.sum(0) / squares.sum(0), options.floor * whole)
        # A merge that is turned away from the experts as a whole has no share of them.
        shares = torch.where(whole > 0, shares, 1.0)
    return ((left * (s / shares)) @ right).float()


@functools.lru_cache
def _read(text: str) -> tuple[str, Method, Any]:
    return parse_method(text, "of")


def _of(options: Options) -> tuple[Method, Any]:
    """The method that merges, and its options."""
    return _read(options.of)[1:]


def _work(options: Options, m: int, n: int, tasks: int) -> work.Work:
    method, inner = _of(options)
    k = min(m, n)
    return method.work(inner, m, n, tasks) + work.triplets(m, n, k) + work.product(k, m, n) * (tasks + 2.0)


def _workspace(options: Options, tasks: int) -> float:
    method, inner = _of(options)
    return max(method.workspace(inner, tasks), 18.0) + 1.0


METHOD = matrix_method(
    options=Options,
    apply=apply,
    paper="https://arxiv.org/abs/2602.05536",
    citation=Citation(
        "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", "Yayuan Li and others", "ICML 2026"
    ),
    behind=lambda options: _read(options.of)[0],
    normalises=lambda options: _of(options)[0].normalises(_of(options)[1]),
    wants_base=True,
    survey=lambda options, each: _of(options)[0].survey(_of(options)[1], each),
    moments=lambda options, each: _of(options)[0].moments(_of(options)[1], each),
    workspace=_workspace,
    squares=lambda options, m, n, tasks: _of(options)[0].squares(_of(options)[1], m, n, tasks),
    work=_work,
)
