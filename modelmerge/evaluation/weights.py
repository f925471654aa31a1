"""Merged weights beside the experts': cosines, distances, conflicts of signs and of subspaces, rounding. Needs no data.

One pass over the tensors. All figures are sums over tensors or means over matrices, so that the model, each type of
layer and each tensor have the same ones. They explain conflicts; they do not predict accuracy.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import TORCH_DTYPES
from modelmerge.checkpoint.documents import read_entries
from modelmerge.checkpoint.header import HALF_DTYPES
from modelmerge.checkpoint.names import layer_type
from modelmerge.checkpoint.opening import as_references, open_references
from modelmerge.checkpoint.reader import MANIFEST, Checkpoint
from modelmerge.checkpoint.reference import Named, Reference, parse, parse_all, parse_experts
from modelmerge.devices import current
from modelmerge.engine.figures import entanglement_of
from modelmerge.engine.job import SMALL, Source
from modelmerge.engine.loader import Loader, factors_of, wholes
from modelmerge.engine.parallel import prepare_process, run_interruptibly, source_of, summed, threads
from modelmerge.engine.pieces import Piece, piece_bytes
from modelmerge.errors import UsageError, named
from modelmerge.evaluation import interference
from modelmerge.evaluation.bench import Models, Running, merge_inputs
from modelmerge.evaluation.report import Report
from modelmerge.methods.transform import awd
from modelmerge.plan.downloads import fetch
from modelmerge.plan.tensors import ON_MISMATCH, TensorPlan, make_plan
from modelmerge.progress import Reporter
from modelmerge.record.manifest import record, remarks, stamp

REMARK = "These figures explain where experts conflict and what a merge kept of each; they do not predict accuracy."


def evaluate(
    models: Models,
    running: Running,
    *,
    per_layer: bool = False,
    decompose: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_mismatch: str = "error",
) -> Report:
    """How the weights of merged models stand to those of the experts, in one pass over the tensors.

    Args:
        models: References of the models.
        running: What all suites share; of it, base, experts, device and progress. Where base or experts are not named,
            a merge's own `modelmerge.json` names them.
        per_layer: Give the figures of each tensor too, not only of the model and of each type of layer.
        decompose: Also find what takes decompositions of matrices: subspace alignment, singular task interference, and
            where APGD would start and arrive.
        include: Globs of the tensors to look at; all if empty.
        exclude: Globs of the tensors to leave out.
        on_mismatch: What becomes of tensors whose shapes differ: error, copy (they are left out), common-rows.

    Returns:
        The report: figures of the `model`, of `layer_types` and of `tensors`, with `experts` and `models` in each; see
        the papers named in `modelmerge.evaluation.interference`.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    prepare_process()
    if on_mismatch not in ON_MISMATCH:
        raise UsageError(f"must be one of {', '.join(ON_MISMATCH)}, not '{on_mismatch}'", option="on_mismatch")
    ours = parse_all(as_references(models), "model")
    if not ours:
        raise UsageError("no model is named", hint="give at least one MODEL")
    base, references = _origins(ours, running.base, as_references(running.experts))
    experts = parse_experts(references)
    names, columns = [expert.name for expert in experts], [model.name for model in ours]
    # Readers tell models apart by their names; an expert may be looked at as a model too.
    others = [replace(model, name=f"model {model.name}") if model.name in names else model for model in ours]
    origin, checkpoints = open_references(parse(str(base)), [*experts, *others], exclude)
    plan = make_plan(origin, checkpoints, include=include, exclude=exclude, on_mismatch=on_mismatch)
    try:
        source = source_of(plan, running.device)
        fetch(plan, running.progress, beside="nothing", stream=False)
        tensors = [tensor for tensor in plan.select("merge") if tensor.numel and tensor.twin is None]
        with current(source.device):
            sums = measure(source, len(experts), tensors, running.progress, decompose=decompose)
        tables = describe(sums, names, columns, per_layer=per_layer)
        inputs = [record(model, model.digests()) for model in plan.models]
        rows = zip(columns, inputs[1 + len(experts) :], checkpoints[len(experts) :], strict=True)
        merged = [
            {**entry, "name": name, "measured_rounding": _measured_rounding(model)} for name, entry, model in rows
        ]
        skipped = {tensor.name: tensor.reason for tensor in plan.tensors.values() if tensor.action == "copy"}
        return cast(Report, {
            "suite": "weights", **stamp(source.device), "base": inputs[0], "experts": inputs[1 : 1 + len(experts)],
            "models": merged, "remark": REMARK, "notes": remarks(plan), "left_out": skipped, **tables,
        })  # fmt: skip
    finally:
        plan.close()


def _origins(
    models: Sequence[Reference], base: str | Path | None, experts: tuple[str | Named, ...]
) -> tuple[str | Path, tuple[str | Named, ...]]:
    """The base and the experts, from the models' manifests where they are not named.

    Raises:
        UsageError: No manifest names them, or several name different ones.
    """
    if base is not None and experts:
        return base, experts
    inputs = [merge_inputs(model.path) for model in models]
    origins = [each for each in inputs if each]
    if not origins:
        lacking = " and ".join(named(n) for n, there in (("base", base is not None), ("experts", experts)) if not there)
        raise UsageError(
            f"{lacking} must be named: beside '{models[0].name}' lies no {MANIFEST} of a merge that would tell",
            hint=f"{named('base')} REF {named('experts')} NAME=REF {named('experts')} NAME=REF",
        )
    if any(each != origins[0] for each in origins):
        hint = f"name those to compare with: {named('base')}, {named('experts')}"
        raise UsageError("the models are merges of different experts", hint=hint)
    pairs = zip(origins[0]["experts"], origins[0]["paths"], strict=True)
    return base if base is not None else origins[0]["base"], experts or tuple(Named(name, path) for name, path in pairs)


def _measured_rounding(model: Checkpoint) -> float | None:
    """What storing lost of the merged task vector, as the merge itself measured it."""
    rounding = read_entries(model.directory / MANIFEST).get("rounding") if model.directory is not None else None
    error = rounding.get("relative_error") if isinstance(rounding, dict) else None
    return error if isinstance(error, float) else None


@dataclass(frozen=True, slots=True)
class Sums:
    """What tensors come to, added up. T experts, K models, N = T + K task vectors.

    Of all tensors: `entries`; `base_square`, the base's squared norm; `gram` [N, N]; `signs` [4] (`sign_counts`);
    `rounding` [K], the expected squared distance to the exact merge where a model is stored in 16 bits.
    Of the weights of linear layers: `gaps` [K + 1] of the models and of the base. Of those that were decomposed:
    `apgd` [2], APGD's gap where it starts and where it arrives, and `apgd_base` that of the base there; `alignments`
    and `ratios` [K, T], the sum of the ratios and their number; `interference` [2], as published and relative, over
    `matrices`; and `orthogonality` [2] of AWD, before and after, over `awd_tensors`; zero where nothing was.
    """

    entries: int
    base_square: float
    gram: Tensor
    signs: Tensor
    rounding: Tensor
    gaps: Tensor
    apgd: Any = 0.0
    apgd_base: float = 0.0
    alignments: Any = 0.0
    ratios: Any = 0
    interference: Any = 0.0
    matrices: int = 0
    orthogonality: Any = 0.0
    awd_tensors: int = 0

    def __add__(self, other: Sums) -> Sums:
        """That of both together."""
        return Sums(*(getattr(self, name) + getattr(other, name) for name in Sums.__slots__))


def measure(
    source: Source, experts: int, tensors: Sequence[TensorPlan], progress: Reporter, *, decompose: bool = True
) -> dict[str, Sums]:
    """Read every tensor once; the sums of each.

    Args:
        source: The plan's first `experts` experts are the experts, the others the models.
        experts: T.
        tensors: Those to look at, none of them empty.
        progress: Receives the progress.
        decompose: Also find what needs decompositions of matrices.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    whole = [tensor for tensor in tensors if decompose and tensor.linear]
    cut = [tensor for tensor in tensors if tensor not in whole]
    progress.stage("measuring", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))

    def look(piece: Piece, loader: Loader) -> Sums:
        theta_0, taus = loader.load(piece, check=True)
        if piece.tensor.linear:
            theta_0, taus = theta_0.view(-1, piece.tensor.row), taus.view(len(taus), -1, piece.tensor.row)
        part = _look(source, experts, piece, theta_0, taus)
        progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)
        return part

    sums = summed(source, cut, look)
    for piece, theta_0, taus in wholes(source, whole, check=True):
        with threads(1 if piece.tensor.numel <= SMALL else torch.get_num_threads()):
            # Some rows at a time, as if it were cut: float64 copies of the whole would be the largest thing in memory.
            step = max(source.block // piece.tensor.row, 1)
            rows = zip(theta_0.split(step), taus.split(step, dim=1), strict=True)
            part = _sum(_look(source, experts, piece, *some) for some in rows)
            pairs = factors_of(source, piece.tensor, taus.device) or (None,) * len(taus)
            sums[piece.tensor.name] = run_interruptibly(
                _conflicts, taus[:experts], taus[experts:], theta_0, part, piece.tensor.name, pairs
            )
        progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)
    for name, part in sums.items():
        # A tensor that a model has not changed was not rounded either.
        moves = part.gram.diagonal()[experts:] > 0
        sums[name] = replace(part, rounding=part.rounding * moves)
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
        for k, merge in enumerate([*taus[experts:], torch.zeros_like(taus[0])]):
            gaps[k] = interference.gap(taus[:experts], merge)
    return Sums(
        entries=theta_0.numel(), base_square=float(theta_0.double().square().sum()), gram=(wide @ wide.T).cpu(),
        signs=interference.sign_counts(taus[:experts]).cpu(), rounding=rounding, gaps=gaps,
    )  # fmt: skip


def _conflicts(
    taus: Tensor, models: Tensor, theta_0: Tensor, part: Sums, tensor: str, factors: interference.Pairs
) -> Sums:
    if not bool(taus.any()):  # nobody changed it: no conflict to speak of
        return part
    mine, theirs = factors[: len(taus)], factors[len(taus) :]
    aligned = zip(models, theirs, strict=True)
    rows = [interference.subspace_alignment(taus, merge, pair).cpu() for merge, pair in aligned]
    alignments = torch.stack(rows) if rows else torch.zeros(0, len(taus))
    counts = ~alignments.isnan()
    return replace(
        part,
        apgd=torch.tensor(interference.apgd_gaps(taus, theta_0, tensor, mine), dtype=torch.float64),
        apgd_base=float(part.gaps[-1]),
        alignments=alignments.nan_to_num(0.0), ratios=counts.long(),
        interference=torch.tensor(interference.singular_interference(taus, mine), dtype=torch.float64), matrices=1,
    )  # fmt: skip


def _add_orthogonality(sums: dict[str, Sums], linear: Sequence[str], experts: int) -> None:
    """AWD by tensor, at its defaults, from the Gram matrices."""
    grams = {name: sums[name].gram[:experts, :experts] for name in linear}
    # A cosine takes two task vectors that are there.
    grams = {name: gram for name, gram in grams.items() if int((gram.diagonal() > 0).sum()) > 1}
    if not grams:
        return
    stack = torch.stack(list(grams.values()))
    solution = awd.solve(stack, awd.Options())
    parts = [
        entanglement_of(gram[None], replace(solution, coefficients=coefficients[None], active=active[None]))
        for gram, coefficients, active in zip(stack, solution.coefficients, solution.active, strict=True)
    ]
    before = interference.orthogonality(stack)
    after = interference.orthogonality(torch.stack([part.after for part in parts]))
    for name, pair in zip(grams, torch.stack([before, after], dim=1), strict=True):
        sums[name] = replace(sums[name], orthogonality=pair, awd_tensors=1)


def describe(
    sums: Mapping[str, Sums], experts: Sequence[str], models: Sequence[str], *, per_layer: bool
) -> dict[str, Any]:
    """The figures of the model, of each type of layer and, with `per_layer`, of each tensor, as plain data.

    Args:
        sums: By tensor.
        experts: Their names.
        models: Their names, in the order of the task vectors after those of the experts.
        per_layer: Give them for each tensor too.
    """
    kinds: dict[str, list[Sums]] = {}
    for name, part in sums.items():
        kinds.setdefault(layer_type(name), []).append(part)
    tables: dict[str, Any] = {
        "model": _figures(_sum(sums.values()), experts, models),
        "layer_types": {kind: _figures(_sum(parts), experts, models) for kind, parts in kinds.items()},
    }
    if per_layer:
        tables["tensors"] = {name: _figures(each, experts, models) for name, each in sums.items()}
    return tables


def _sum(parts: Iterable[Sums]) -> Sums:
    return functools.reduce(operator.add, parts)


def _figures(sums: Sums, experts: Sequence[str], models: Sequence[str]) -> dict[str, Any]:
    norms = sums.gram.diagonal().clamp(min=0.0).sqrt()
    entries, both, changes, fewer = sums.signs.tolist()
    count = len(experts)
    relative = [_ratio(norm, math.sqrt(sums.base_square)) for norm in norms.tolist()]
    vectors = {
        "norms": dict(zip(experts, norms.tolist(), strict=False)),
        "relative_norms": dict(zip(experts, relative, strict=False)),
        "cosines": [[_cosine(sums.gram, i, j) for j in range(count)] for i in range(count)],
        "sign_conflict": _ratio(both, entries), "minority_sign_share": _ratio(fewer, changes),
        "singular_task_interference": _means(("mean", "relative"), sums.interference, sums.matrices),
        "awd_orthogonality": _means(("before", "after"), sums.orthogonality, sums.awd_tensors),
        "apgd_gap": _means(("start", "solved"), sums.apgd, sums.apgd_base),
    }  # fmt: skip
    of_models = {name: _of_model(sums, experts, k) for k, name in enumerate(models)}
    return {"entries": sums.entries, "matrices": sums.matrices, "experts": vectors, "models": of_models}


def _of_model(sums: Sums, experts: Sequence[str], k: int) -> dict[str, Any]:
    """One model: its distance from the base, how much of it is rounding, and how close it is to each expert."""
    gram, place = sums.gram, len(experts) + k
    square, error = float(gram[place, place]), float(sums.rounding[k])
    closeness: dict[str, Any] = {}
    for i, name in enumerate(experts):
        expert = float(gram[i, i])
        distance = math.sqrt(max(square + expert - 2 * float(gram[place, i]), 0.0))
        ratios = int(sums.ratios[k, i]) if sums.matrices else 0
        closeness[name] = {
            "cosine": _cosine(gram, place, i), "distance": distance,
            "relative_distance": _ratio(distance, math.sqrt(expert)),
            "subspace_alignment": float(sums.alignments[k, i]) / ratios if ratios else None,
        }  # fmt: skip
    return {
        "norm": math.sqrt(square),
        "relative_norm": _ratio(math.sqrt(square), math.sqrt(sums.base_square)),
        # What is stored holds the rounding too: without it, the exact merge was that much shorter.
        "expected_rounding": _ratio(math.sqrt(error), math.sqrt(max(square - error, 0.0))) if error else None,
        "apgd_gap": _ratio(float(sums.gaps[k]), float(sums.gaps[-1])),
        "experts": closeness,
    }


def _cosine(gram: Tensor, i: int, j: int) -> float | None:
    norm = math.sqrt(max(float(gram[i, i]), 0.0)) * math.sqrt(max(float(gram[j, j]), 0.0))
    return max(-1.0, min(1.0, float(gram[i, j]) / norm)) if norm else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _means(names: tuple[str, str], totals: Tensor, count: float) -> dict[str, float] | None:
    return dict(zip(names, (totals / count).tolist(), strict=True)) if count else None
