"""Merged weights beside the experts': cosines, distances, conflicts of signs and of subspaces, rounding. Needs no data.

One pass over the tensors. All of it is a sum over tensors, or a mean over matrices, so that it is told of the model, of
each type of layer and of each tensor alike. It explains conflicts; it does not predict accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.header import HALF_DTYPES
from modelmerge.engine.figures import entanglement_of
from modelmerge.engine.job import SMALL, Source
from modelmerge.engine.loader import TORCH_DTYPES, Loader, Piece, piece_bytes, wholes
from modelmerge.engine.parallel import gathered, threads
from modelmerge.evaluation import interference
from modelmerge.methods.transform import awd
from modelmerge.plan.tensors import TensorPlan, layer_type
from modelmerge.progress import Reporter

REMARK = "These figures explain where experts conflict and what a merge kept of each; they do not predict accuracy."


@dataclass(frozen=True, slots=True)
class Sums:
    """What tensors tell, added up. T experts, K models, N = T + K task vectors.

    Of all tensors: `entries`; `base_square`, the base's squared norm; `gram` [N, N]; `signs` [4] (`sign_counts`);
    `rounding` [K], the expected squared distance to the exact merge where a model is stored in 16 bits.
    Of the weights of linear layers: `gaps` [K + 1] of the models and of the base. Of those that were decomposed:
    `solved` [2], APGD's gap where it starts and where it arrives, and `solved_base` that of the base there;
    `alignments` and `aligned` [K, T], the sum of the ratios and their number; `interference` [2], as published and
    relative, over `matrices`; and `orthogonality` [2] of AWD, before and after, over `disentangled` tensors.
    """

    entries: int
    base_square: float
    gram: Tensor
    signs: Tensor
    rounding: Tensor
    gaps: Tensor
    solved: Tensor
    solved_base: float
    alignments: Tensor
    aligned: Tensor
    interference: Tensor
    matrices: int
    orthogonality: Tensor
    disentangled: int

    def __add__(self, other: Sums) -> Sums:
        """That of both together."""
        return Sums(*(getattr(self, name) + getattr(other, name) for name in Sums.__slots__))


def measure(
    source: Source, experts: int, tensors: Sequence[TensorPlan], reporter: Reporter, *, decompose: bool = True
) -> dict[str, Sums]:
    """Read every tensor once; what each tells.

    Args:
        source: The plan's first `experts` experts are the experts, the others the models that are looked at.
        experts: T.
        tensors: Those to look at, none of them empty.
        reporter: Is told the progress.
        decompose: Also find what needs decompositions of matrices.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    whole = [tensor for tensor in tensors if decompose and tensor.linear]
    cut = [tensor for tensor in tensors if tensor not in whole]
    reporter.stage("measuring", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))

    def look(piece: Piece, loader: Loader) -> Sums:
        theta_0, taus = loader.load(piece, check=True)
        if piece.tensor.linear:
            theta_0, taus = theta_0.view(-1, piece.tensor.row), taus.view(len(taus), -1, piece.tensor.row)
        found = _look(source, experts, piece, theta_0, taus)
        reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)
        return found

    sums: dict[str, Sums] = {}
    for piece, part in gathered(source, cut, look):
        sums[piece.tensor.name] = sums[piece.tensor.name] + part if piece.start else part
    for piece, theta_0, taus in wholes(source, whole, check=True):
        with threads(1 if piece.tensor.numel <= SMALL else torch.get_num_threads()):
            # Some rows at a time, as if it were cut: float64 copies of the whole would be the largest thing in memory.
            step = max(source.block // piece.tensor.row, 1)
            rows = zip(theta_0.split(step), taus.split(step, dim=1), strict=True)
            part = _sum(_look(source, experts, piece, *some) for some in rows)
            sums[piece.tensor.name] = _decomposed(part, piece, theta_0, taus[:experts], taus[experts:])
        reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)
    for name, told in sums.items():
        # A tensor that a model has not changed was not rounded either.
        changed = told.gram.diagonal()[experts:] > 0
        sums[name] = replace(told, rounding=told.rounding * changed)
    _add_orthogonality(sums, [tensor.name for tensor in tensors if tensor.linear], experts)
    return {tensor.name: sums[tensor.name] for tensor in tensors}


def _look(source: Source, experts: int, piece: Piece, theta_0: Tensor, taus: Tensor) -> Sums:
    """What needs no decomposition; the piece of a linear layer comes as rows."""
    wide = taus.flatten(1).double()
    models = source.plan.experts[experts:]
    rounding, gaps = torch.zeros(len(models), dtype=torch.float64), torch.zeros(len(models) + 1, dtype=torch.float64)
    for k, model in enumerate(models):
        info = model.tensors.get(piece.tensor.name)
        if info is not None and info.change is None and info.dtype in HALF_DTYPES:
            rounding[k] = interference.expected_rounding(theta_0 + taus[experts + k], TORCH_DTYPES[info.dtype])
    if piece.tensor.linear:
        for k, merged in enumerate([*taus[experts:], torch.zeros_like(taus[0])]):
            gaps[k] = interference.gap(taus[:experts], merged)
    return Sums(
        entries=theta_0.numel(), base_square=float(theta_0.double().square().sum()),
        gram=(wide @ wide.T).cpu(), signs=interference.sign_counts(taus[:experts]).cpu(), rounding=rounding,
        gaps=gaps, solved=torch.zeros(2, dtype=torch.float64), solved_base=0.0,
        alignments=torch.zeros(len(models), experts, dtype=torch.float64),
        aligned=torch.zeros(len(models), experts, dtype=torch.int64),
        interference=torch.zeros(2, dtype=torch.float64), matrices=0,
        orthogonality=torch.zeros(2, dtype=torch.float64), disentangled=0,
    )  # fmt: skip


def _decomposed(part: Sums, piece: Piece, theta_0: Tensor, taus: Tensor, models: Tensor) -> Sums:
    if not bool(taus.any()):  # nobody changed it: no conflict to speak of
        return part
    ratios = [interference.subspace_alignment(taus, merged).cpu() for merged in models]
    alignments = torch.stack(ratios) if ratios else part.alignments
    counts = ~alignments.isnan()
    return replace(
        part,
        solved=torch.tensor(interference.apgd_gaps(taus, theta_0, piece.tensor.name), dtype=torch.float64),
        solved_base=float(part.gaps[-1]),
        alignments=alignments.nan_to_num(0.0), aligned=counts.long(),
        interference=torch.tensor(interference.singular_interference(taus), dtype=torch.float64), matrices=1,
    )  # fmt: skip


def _add_orthogonality(sums: dict[str, Sums], linear: Sequence[str], experts: int) -> None:
    """AWD by tensor, at its defaults, from the Gram matrices."""
    grams = {name: sums[name].gram[:experts, :experts] for name in linear}
    # A cosine takes two task vectors that are there.
    grams = {name: gram for name, gram in grams.items() if int((gram.diagonal() > 0).sum()) > 1}
    if not grams:
        return
    stacked = torch.stack(list(grams.values()))
    solution = awd.solve(stacked, awd.Options())
    parts = [
        entanglement_of(gram[None], replace(solution, coefficients=coefficients[None], active=active[None]))
        for gram, coefficients, active in zip(stacked, solution.coefficients, solution.active, strict=True)
    ]
    before = interference.orthogonality(stacked)
    after = interference.orthogonality(torch.stack([part.after for part in parts]))
    for name, pair in zip(grams, torch.stack([before, after], dim=1), strict=True):
        sums[name] = replace(sums[name], orthogonality=pair, disentangled=1)


def describe(
    sums: Mapping[str, Sums], experts: Sequence[str], models: Sequence[str], *, per_layer: bool
) -> dict[str, Any]:
    """The figures of the model, of each type of layer and, with `per_layer`, of each tensor, as plain data.

    Args:
        sums: By tensor.
        experts: Their names.
        models: Their names, in the order of the task vectors after those of the experts.
        per_layer: Tell them of each tensor too.
    """
    kinds: dict[str, list[Sums]] = {}
    for name, told in sums.items():
        kinds.setdefault(layer_type(name), []).append(told)
    report = {
        "model": _told(_sum(sums.values()), experts, models),
        "layer_types": {kind: _told(_sum(parts), experts, models) for kind, parts in kinds.items()},
    }
    if per_layer:
        report["tensors"] = {name: _told(each, experts, models) for name, each in sums.items()}
    return report


def _sum(parts: Iterable[Sums]) -> Sums:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def _told(sums: Sums, experts: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    norms = sums.gram.diagonal().clamp(min=0.0).sqrt()
    touched, both, changes, fewer = sums.signs.tolist()
    count = len(experts)
    return {
        "entries": sums.entries,
        "matrices": sums.matrices,
        "experts": {
            "norms": dict(zip(experts, norms.tolist(), strict=False)),
            "relative_norms": {
                name: _ratio(norm, math.sqrt(sums.base_square))
                for name, norm in zip(experts, norms.tolist(), strict=False)
            },
            "cosines": [[_cosine(sums.gram, i, j) for j in range(count)] for i in range(count)],
            "sign_conflict": _ratio(both, touched),
            "minority_sign_share": _ratio(fewer, changes),
            "singular_task_interference": _pair(
                ("mean", "relative"), sums.interference / sums.matrices if sums.matrices else None
            ),
            "awd_orthogonality": _pair(
                ("before", "after"), sums.orthogonality / sums.disentangled if sums.disentangled else None
            ),
            "apgd_gap": _pair(("start", "solved"), sums.solved / sums.solved_base if sums.solved_base else None),
        },
        "models": {name: _told_of(sums, experts, k) for k, name in enumerate(models)},
    }


def _told_of(sums: Sums, experts: Sequence[str], k: int) -> dict[str, Any]:
    """One model: how far it went, what of that is rounding, and how it stands to each expert."""
    gram, place = sums.gram, len(experts) + k
    square, lost = float(gram[place, place]), float(sums.rounding[k])
    told: dict[str, Any] = {
        "norm": math.sqrt(square),
        "relative_norm": _ratio(math.sqrt(square), math.sqrt(sums.base_square)),
        # What is stored holds the rounding too: without it, the exact merge was that much shorter.
        "expected_rounding": _ratio(math.sqrt(lost), math.sqrt(max(square - lost, 0.0))) if lost else None,
        "apgd_gap": _ratio(float(sums.gaps[k]), float(sums.gaps[-1])),
        "experts": {},
    }
    for i, name in enumerate(experts):
        own = float(gram[i, i])
        distance = math.sqrt(max(square + own - 2 * float(gram[place, i]), 0.0))
        aligned = int(sums.aligned[k, i])
        told["experts"][name] = {
            "cosine": _cosine(gram, place, i),
            "distance": distance,
            "relative_distance": _ratio(distance, math.sqrt(own)),
            "subspace_alignment": float(sums.alignments[k, i]) / aligned if aligned else None,
        }
    return told


def _cosine(gram: Tensor, i: int, j: int) -> float | None:
    norm = math.sqrt(max(float(gram[i, i]), 0.0)) * math.sqrt(max(float(gram[j, j]), 0.0))
    return max(-1.0, min(1.0, float(gram[i, j]) / norm)) if norm else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _pair(names: tuple[str, str], values: Tensor | None) -> dict[str, float] | None:
    return dict(zip(names, values.tolist(), strict=True)) if values is not None else None
