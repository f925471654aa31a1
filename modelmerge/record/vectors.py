"""Reports and manifests of task vectors as files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.names import layer_type
from modelmerge.checkpoint.reader import VECTOR_KIND
from modelmerge.engine.figures import Entanglement, Figures
from modelmerge.engine.vectors import Measured
from modelmerge.plan.tensors import Plan, TensorPlan
from modelmerge.record.manifest import record, remarks, stamp

_EPSILON = float(torch.finfo(torch.float32).eps)
Ranks = Mapping[str, tuple[int, ...]]  # by tensor, the rank of each expert's factors; 0: unchanged


def measured_report(
    names: Sequence[str], tensors: Sequence[TensorPlan], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """The measures of one pass: by expert, and the cosines between experts, of the model and by type of layer."""
    total = _sum(measured.values())
    entries = sum(tensor.numel for tensor in tensors)
    kinds: dict[str, list[Measured]] = {}
    for tensor in tensors:
        kinds.setdefault(layer_type(tensor.name), []).append(measured[tensor.name])
    norms = total.gram.diagonal().sqrt().tolist()
    return {
        "experts": [
            {
                "name": name,
                "norm": norms[i],
                "relative_norm": norms[i] / total.base_square**0.5 if total.base_square else None,
                "changed": total.nonzero[i] / entries,
                "unchanged_tensors": [t.name for t in tensors if not measured[t.name].nonzero[i]],
                # Where base + task vector, rounded to the expert's dtype, is not the expert to the last bit.
                "entries_not_restored": total.inexact[i],
            }
            for i, name in enumerate(names)
        ],
        "cosines": {
            "model": _cosines(total.gram),
            "layer_types": {kind: _cosines(_sum(parts).gram) for kind, parts in kinds.items()},
        },
    }


def _sum(parts: Iterable[Any]) -> Any:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def _cosines(gram: Tensor) -> list[list[float | None]]:
    """The matrix of cosines; None where a task vector is zero."""
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    rows = (gram / (norms[:, None] * norms[None, :])).clamp(-1.0, 1.0)
    return [[float(value) if bool(value.isfinite()) else None for value in row] for row in rows]


def numerical_ranks(
    names: Sequence[str], tensors: Sequence[TensorPlan], spectra: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Numerical rank of some layers: singular values above max(m, n) * eps of the first."""
    return [
        {
            "tensor": tensor.name,
            "shape": list(tensor.shape),
            "numerical_rank": {
                name: int((values > values[0] * max(tensor.shape) * _EPSILON).sum())
                for name, values in zip(names, spectra[tensor.name], strict=True)
            },
        }
        for tensor in tensors
    ]


def low_rank_report(
    names: Sequence[str], measured: Mapping[str, Measured], ranks: Ranks, errors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any] | None:
    """How much the factors lose: relative error of each expert's task vector, and of each of its tensors."""
    if not ranks:
        return None
    report = {}
    for i, name in enumerate(names):
        square = sum(float(part.gram[i, i]) for part in measured.values())
        total = sum(error[i] for error in errors.values())
        tensors = {
            tensor: {
                "rank": ranks[tensor][i],
                "relative_error": (error[i] / float(measured[tensor].gram[i, i])) ** 0.5 if ranks[tensor][i] else 0.0,
            }
            for tensor, error in errors.items()
        }
        report[name] = {"relative_error": (total / square) ** 0.5 if square else 0.0, "tensors": tensors}
    return report


def transform_report(names: Sequence[str], method: str, options: Mapping[str, Any], figures: Figures) -> dict[str, Any]:
    """What a transform did: cosines before and after, the size of the change, the loss at each step."""
    losses = list(figures.losses)
    return {
        "method": method,
        "options": dict(options),
        "steps": figures.steps,
        "loss": {"first": losses[0], "lowest": min(losses), "curve": losses},
        "model": _entangled(_sum(figures.entanglement.values())),
        "tensors": {tensor: _entangled(part) for tensor, part in figures.entanglement.items()},
        "experts": [{"name": name} for name in names],
    }


def _entangled(part: Entanglement) -> dict[str, Any]:
    size = float(part.before.diagonal().mean().sqrt())
    return {
        "before": _summary(part.before),
        "after": _summary(part.after),
        # ||delta|| over the root mean square of the task vectors' norms.
        "redundant": part.change**0.5 / size if size else 0.0,
    }


def _summary(gram: Tensor) -> dict[str, float | None]:
    values = [abs(v) for i, row in enumerate(_cosines(gram)) for j, v in enumerate(row) if i < j and v is not None]
    return {"mean_cosine": sum(values) / len(values) if values else None, "largest_cosine": max(values, default=None)}


def vector_manifests(
    verb: str, plan: Plan, device: object, unchanged: Mapping[str, Sequence[str]], ranks: Ranks,
    digests: Sequence[Mapping[Path, str]],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:  # fmt: skip
    """The manifest of each directory of a task vector, by its name, and the beginning of that of the whole.

    Args:
        verb: The verb that wrote them.
        plan: The models.
        device: Where the work was done.
        unchanged: By directory, the tensors that it leaves out: those of the experts, and others.
        ranks: Of tensors that are written as factors.
        digests: Those of each model's files.
    """
    base, *experts = map(record, plan.models, digests)
    common, places = stamp(device), {expert.name: i for i, expert in enumerate(plan.experts)}
    each = {
        name: {
            **common,
            "kind": VECTOR_KIND,
            "verb": verb,
            "inputs": {"base": base, **({"expert": experts[places[name]]} if name in places else {})},
            "unchanged": list(tensors),
            "ranks": {tensor: of_experts[places[name]] for tensor, of_experts in ranks.items() if name in places},
        }
        for name, tensors in unchanged.items()
    }
    return each, {**common, "kind": verb, "inputs": {"base": base, "experts": experts}, "remarks": remarks(plan)}
