"""Low rank as low rank: task vectors that are products go through a method as small cores.

Adapters of rank r take up T r directions of a weight [m, n] between them. A method that is the same in any orthonormal
basis then gives the same in a basis of these directions, where a task vector is [T r, T r] at most (Core Space,
Panariello et al., NeurIPS 2025, arXiv 2509.17786); what a method measures against the mean over all directions is
measured against those that are taken up.

An expert is of low rank if it comes as factors, or if it is stored as a whole and all but a few of its singular values
lie within what storing has rounded away, so that both give the same but for that rounding. What full fine-tuning leaves
has a spectrum that falls without an end, and goes through a method as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from modelmerge.methods import linalg
from modelmerge.methods.contract import Context, Tensor, alike

Pair = tuple[Tensor, Tensor]

# Low is a rank of at most one in so many; where storing has rounded away next to nothing, also such a rank.
LOW, _SMALL, _NOTHING = 8, 64, 1e-6
# Singular values that stand out of rounding's by that factor count; so do none below that share of the first.
MARGIN, FLOOR = 1.5, 1e-6
# Where rounding is a larger share of the squared norm, the end of a falling spectrum may lie hidden in it. To take what
# is of full rank for an adapter would cost more than the other way round. What is dropped may be so many times as much.
_HIDDEN, _DROPPED = 0.1, 1.2
# Directions of several experts that agree to that share count as one.
_SAME = 1e-4
# Explicit bits of the mantissa of what weights are stored in, and of float32's.
_MANTISSA, _BITS = {"float16": 10, "bfloat16": 7}, 23  # by name: the import of a method asks nothing of torch


@dataclass(frozen=True, slots=True)
class Cores:
    """Task vectors [T, p, q] in bases of the directions that they take up: `tau_i = left @ taus[i] @ right`.

    A base that is None is not needed: that side is as it was. `pairs` are the experts' factors, [m, r] and [r, n], as
    far as they have any; `rank` is how many directions are taken up, None where some expert takes up all.
    """

    taus: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    pairs: tuple[Pair | None, ...] = ()
    rank: int | None = None

    def whole(self, core: Tensor) -> Tensor:
        """What a core [p, q] is of the weight, [m, n]."""
        core = core if self.left is None else self.left.to(core.dtype) @ core
        return core if self.right is None else core @ self.right.to(core.dtype)

    def shortened(self, core: Tensor, norms: Iterable[float], weights: Sequence[float]) -> Tensor:
        """A core that is no longer than the weighted task vectors are on average, if all are of low rank; in place.

        Their directions are mostly no other's, so that nothing in a method shortens what it sums: the more experts,
        the further it takes the weight out of where any of them was trained.
        """
        if self.rank is None:
            return core
        own = torch.linalg.vector_norm(core, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        length = sum(norm * abs(weight) for norm, weight in zip(norms, weights, strict=True)) / len(weights)
        return core.mul_((length / own).clamp(max=1.0).to(core.dtype))


def damped(merged: Tensor, base: Tensor | None, damping: Tensor | float) -> Tensor:
    """A merged task vector [m, n], or its core, times `1 / (1 + damping * ||merged|| / ||base||)`; in place.

    The norms are spectral: where the update is as large as the weight, the experts' features no longer add up.
    """
    assert base is not None, "the method wants the base"
    size = linalg.spectral_norm(base)
    factor = 1.0 / (1.0 + damping * linalg.spectral_norm(merged) / size)
    # A weight that is zero at the base has no features to disturb.
    return merged.mul_(torch.where(size > 0, factor, 1.0).to(merged.dtype)[..., None, None])


def of(
    taus: Tensor, context: Context, active: Sequence[int] | None = None, *, left: bool = True, right: bool = True
) -> Cores:
    """Task vectors [T, m, n] as cores, on the sides that are asked for.

    Args:
        taus: Those of the experts at the positions `active`, or of all.
        context: Their base and factors.
        active: The experts' positions in the context.
        left: Whether the method is the same in any basis of the m rows.
        right: The same of the n columns.
    """
    pairs = factors(taus, context, range(len(taus)) if active is None else active)
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return Cores(taus, pairs=pairs)
    m, n = taus.shape[-2:]
    lefts, rights = (_span(each) for each in zip(*((a, b.mT) for a, b in known), strict=True))
    rank = min(lefts.shape[-1], rights.shape[-1])
    if not rank:
        return Cores(taus, pairs=pairs)
    outer = lefts if left and lefts.shape[-1] < m else None
    inner = rights.mT.contiguous() if right and rights.shape[-1] < n else None
    if outer is None and inner is None:
        return Cores(taus, pairs=pairs, rank=rank)
    sides = (
        (a.double() if outer is None else outer.mT @ a.double(), b.double() if inner is None else b.double() @ inner.mT)
        for a, b in known
    )
    return Cores(torch.stack([(a @ b).float() for a, b in sides]), outer, inner, pairs, rank)


def factors(taus: Tensor, context: Context, active: Sequence[int]) -> tuple[Pair | None, ...]:
    """The factors of each expert's task vector [m, n], [m, r] and [r, n]; None for those that are not of low rank.

    The columns of the first are orthogonal, the rows of the second orthonormal. A rank above half of the smaller side
    is not low either, nor is any in a weight so small that none could be told of stored experts.
    """
    smaller = min(taus.shape[-2:])
    limit = smaller // 2 if smaller >= 2 * LOW else 0
    given = [context.factors[i] if context.factors else None for i in active]
    stored = [i for i, pair in enumerate(given) if pair is None]
    pairs = dict(zip(stored, _products(taus, stored, context.base), strict=True))
    for i, pair in enumerate(given):
        if pair is not None:
            low = pair[0].shape[-1] <= limit
            pairs[i] = _pair(*linalg.leading_triplets(taus[i], limit, pair)) if low else None
    return tuple(pairs[i] for i in range(len(given)))


def _pair(left: Tensor, s: Tensor, right: Tensor) -> Pair:
    return (left * s[..., None, :]).float(), right.float()


def _span(factors: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis [m, p] of the directions of factors [m, r] of orthogonal columns, float64."""
    beside = torch.cat([torch.nn.functional.normalize(factor.double(), dim=-2) for factor in factors], dim=-1)
    tall = beside.shape[-2] > beside.shape[-1]
    squares, vectors = torch.linalg.eigh(beside.mT @ beside if tall else beside @ beside.mT)
    count = alike((squares > _SAME**2).sum(-1).view(-1).tolist())
    vectors = vectors[..., squares.shape[-1] - count :].contiguous()
    return torch.linalg.qr(beside @ vectors).Q if tall else vectors


def _products(taus: Tensor, which: Sequence[int], base: Tensor | None) -> list[Pair | None]:
    """Those of [T, m, n] that are products but for what storing has rounded away, as factors; None for the others."""
    pairs: list[Pair | None] = [None] * len(which)
    m, n = taus.shape[-2:]
    if not which or min(m, n) < 2 * LOW:
        return pairs

    def counted(values: list[float], highest: float, noise: float, norm: float) -> int | None:
        rank = sum(value > max(MARGIN * noise * (m**0.5 + n**0.5), FLOOR * values[0]) for value in values)
        rest = norm**2 - sum(value**2 for value in values[:rank])
        low = rank <= highest and rest <= _DROPPED * noise**2 * m * n + _NOTHING * norm**2
        return rank if low else None

    # A few rows tell most of what is of full rank, and a device is waited for once.
    glances = torch.stack([_glance(taus[i], base) for i in which])
    for i, table in enumerate(glances.view(len(which), -1, 3).tolist()):
        if alike(norm == 0.0 for *_, norm in table):
            pairs[i] = (taus[which[i]][..., :0], taus[which[i]][..., :0, :])
        elif highest := alike(int(highest) for highest, *_ in table):
            left, s, right = linalg.quick_triplets(taus[which[i]], highest + 1)
            spectra = s.view(len(table), -1).tolist()
            rank = alike(counted(values, *row) for values, row in zip(spectra, table, strict=True))
            if rank is not None:
                pairs[i] = _pair(left[..., :rank], s[..., :rank], right[..., :rank, :])
    return pairs


def _glance(tau: Tensor, base: Tensor | None) -> Tensor:
    """The highest rank of a task vector [m, n] that is a low one, 0 if some rows have a higher; its noise and its norm.

    float64 [3]. The noise is what storing has rounded away, root mean square.
    """
    smaller = min(tau.shape[-2:])
    small = max(smaller // LOW, min(_SMALL, smaller // 2))
    step = max(tau.shape[-2] // (small + LOW), 1)
    rows = tau[..., ::step, :].double()
    noise = rounding(rows if base is None else rows + base[..., ::step, :])
    norm = torch.linalg.vector_norm(tau, dim=(-2, -1), dtype=torch.float64)
    share = noise**2 * math.prod(tau.shape[-2:]) / norm**2
    highest = torch.where(share > _HIDDEN, 0.0, torch.where(share > _NOTHING, float(smaller // LOW), float(small)))
    # Rounding errors are like noise, whose largest singular value is about its size times sqrt(m) + sqrt(n).
    values = linalg.singular_values(rows)
    limit = torch.maximum(MARGIN * noise * (rows.shape[-2] ** 0.5 + rows.shape[-1] ** 0.5), FLOOR * values[..., 0])
    rank = (values > limit[..., None]).sum(-1)
    return torch.stack([torch.where(rank <= highest, highest, 0.0), noise, norm], dim=-1)


def rounding(theta: Tensor) -> Tensor:
    """Root mean square of what storing weights has rounded away, by how many bits of them are used; float64 scalar."""
    bits = theta.new_full(theta.shape[:-2], float(_BITS))
    for dtype, fewer in _MANTISSA.items():
        stored = theta.to(getattr(torch, dtype)).double()
        bits = torch.where((stored == theta).double().mean((-2, -1)) > 0.99, float(fewer), bits)
    step = torch.exp2(torch.floor(torch.log2(theta.abs().clamp(min=1e-30))) - bits[..., None, None])
    return (step.double().square().mean((-2, -1)) / 12).sqrt()
