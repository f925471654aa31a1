"""How far each expert went from the base, and how much the experts overlap: weights and a scale that follow from it.

A task vector several times as long as the others drowns them, whatever the method. Its expert's weight becomes the
inverse of how many times as long it is as that of the expert in the middle. And a sum of task vectors that overlap is
longer than one of task vectors at right angles, so that it wants a smaller scale. The lengths are Frobenius norms over
the weights of linear layers, from some rows of a few matrices of each type: kilobytes to some megabytes of each model.
Whether they are measured on these or on all that is merged changes a ratio by a few per cent (tests/benchmarks/
balanced.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from modelmerge.checkpoint.names import layer_type
from modelmerge.engine.job import Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import give_memory_back, threads
from modelmerge.engine.pieces import Piece, piece_bytes
from modelmerge.methods.options import at_right_angles
from modelmerge.plan.tensors import Plan, TensorPlan

# So many rows of a matrix are read, of so many matrices of a type: the first layer's, the last's and between.
_ROWS, _EACH = 64, 3
_MOST = 1 << 19  # entries of a matrix
_AT_ONCE = 1 << 16  # of these, in float64
# Experts that went up to so many times as far as the one in the middle keep their weight: even sets stay as they are.
FAR = 1.5


@dataclass(frozen=True, slots=True)
class Balance:
    """An expert's weight, and why: `ratio` is its length in units of that of the expert in the middle."""

    ratio: float
    weight: float


def balance(plan: Plan) -> tuple[Balance, ...]:
    """Each expert's weight by its length. The bytes of the rows that are looked at are read, and no others.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    return weigh(products(plan).diagonal().sqrt().nan_to_num(0.0, 0.0, 0.0).tolist())


def overlap_scale(products: Tensor) -> float:
    """The inverse length of the sum of unit task vectors, by their inner products [T, T], float64.

    That is 1 / sqrt(T) at right angles, and no more where they are turned away from one another; 1 / T where they are
    the same. One that changed nothing that was looked at counts as at right angles to all. In three digits, as it is
    told, so that a rounding of the products makes no other scale.
    """
    lengths = products.diagonal().sqrt()
    cosines = (products / lengths / lengths[:, None]).nan_to_num(0.0, 0.0, 0.0).fill_diagonal_(1.0)
    return min(round(float(cosines.sum().clamp(min=1.0)) ** -0.5, 3), at_right_angles(len(lengths)))


def weigh(norms: Sequence[float]) -> tuple[Balance, ...]:
    """The weights of task vectors of these lengths.

    Of an even number of experts the shorter of the two in the middle is the measure. An expert that changed nothing
    that was looked at counts for nothing and keeps its weight.
    """
    middle = median_low(sorted(norm for norm in norms if norm > 0) or [1.0])
    # In three digits, as they are told, so that a rounding of the lengths makes no other weight.
    ratios = [float(f"{norm / middle:.3g}") for norm in norms]
    return tuple(Balance(ratio, float(f"{1 / ratio:.3g}") if ratio > FAR else 1.0) for ratio in ratios)


def products(plan: Plan) -> Tensor:
    """The inner products of the task vectors over the matrices of the plan, as far as a sample tells them.

    [T, T], float64.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    return _products(plan)[1:, 1:]


def reach(plan: Plan) -> float:
    """How long the task vector of the expert in the middle is beside the base, in the same sample.

    Raises:
        CheckpointError: A weight cannot be read.
    """
    base, *norms = _products(plan).diagonal().sqrt().nan_to_num(0.0, 0.0, 0.0).tolist()
    return median_low(sorted(norms)) / base if base else 0.0


def _products(plan: Plan) -> Tensor:
    """`products` with those of the base, which comes first."""
    total = _measure(plan)
    give_memory_back()  # a plan of the merge does not have it
    return total


def _measure(plan: Plan) -> Tensor:
    types = _by_type(plan)
    looked = [tensor for tensors in types for tensor in _some(tensors)]
    cpu, elements = torch.device("cpu"), max((_sample(tensor).stop for tensor in looked), default=0)
    loader = Loader(Source(plan, cpu, 1), elements, elements * 8, cpu)
    total = torch.zeros((len(plan.models),) * 2, dtype=torch.float64)
    with threads(1):
        for tensors in types:
            some = _some(tensors)
            for tensor in some:
                piece = _sample(tensor)
                theta_0, taus = loader.load(piece, check=False)
                share = len(tensors) / len(some) * tensor.numel / piece.stop
                for base, changes in zip(theta_0.split(_AT_ONCE), taus.split(_AT_ONCE, dim=1), strict=True):
                    wide = torch.cat([base[None], changes]).double()
                    total += wide @ wide.T * share
    return total


def look_bytes(plan: Plan) -> int:
    """Bytes that `products` reads of all models."""
    return sum(piece_bytes(plan, _sample(tensor)) for tensors in _by_type(plan) for tensor in _some(tensors))


def _by_type(plan: Plan) -> list[list[TensorPlan]]:
    """The weights of linear layers that are merged, by the type of layer; of a model without any, all weights."""
    merged = [tensor for tensor in plan.select("merge") if tensor.numel and not tensor.new and tensor.twin is None]
    types: dict[str, list[TensorPlan]] = defaultdict(list)
    for tensor in [tensor for tensor in merged if tensor.linear] or merged:
        types[layer_type(tensor.name)].append(tensor)
    return list(types.values())


def _some(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """A few of them, evenly spread."""
    last = len(tensors) - 1
    return [tensors[place] for place in sorted({last * i // (_EACH - 1) for i in range(_EACH)})]


def _sample(tensor: TensorPlan) -> Piece:
    rows = max(min(_ROWS, _MOST // tensor.row), 1)
    return Piece(tensor, 0, min(rows * tensor.row, tensor.numel), sampled=True)
