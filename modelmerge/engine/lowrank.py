"""Whether experts are merged LoRA adapters: of a few matrices, some rows are enough to see it.

A task vector that was a product B A of rank r is still one in every run of rows, but for what storing the expert has
rounded away; and how much that is, the stored weights tell themselves. What full fine-tuning leaves has a spectrum that
falls without an end: of the sets of `tests/benchmarks/experts`, stored in 32 and in 16 bits, the fewest directions
that stood out of rounding were a seventh of all, and mostly all.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modelmerge.checkpoint.header import DTYPE_BITS
from modelmerge.checkpoint.names import layer_type
from modelmerge.engine.job import Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import threads
from modelmerge.engine.pieces import Piece
from modelmerge.methods import cores
from modelmerge.plan.tensors import Plan, TensorPlan

# So many rows of a matrix are looked at: enough for an adapter of rank 64, and done in milliseconds.
ROWS = 512
# Of so many matrices that the expert changed, each of another type; and no more types than that are tried.
_CHANGED, _TYPES = 3, 12
# Where rounding is a larger share of the squared norm, the end of a falling spectrum may lie hidden in it. To take what
# is of full rank for an adapter would cost more than the other way round.
_HIDDEN = 0.02


def looked_at(plan: Plan) -> list[TensorPlan]:
    """The matrices that `is_low_rank` looks at, at most: the first of each type, the narrow ones first."""
    first: dict[str, TensorPlan] = {}
    for tensor in plan.select("merge"):
        if tensor.linear and min(tensor.shape) >= 2 * cores.LOW:
            first.setdefault(layer_type(tensor.name), tensor)
    return sorted(first.values(), key=lambda tensor: (tensor.shape[1], tensor.name))[:_TYPES]


def look_bytes(plan: Plan) -> int:
    """Bytes that looking at all experts reads, where they changed the first matrices that are looked at."""
    total = 0
    for tensor in looked_at(plan)[:_CHANGED]:
        elements = min(ROWS, tensor.shape[0]) * tensor.shape[1]
        held = [model.tensors[tensor.name] for model in plan.models if tensor.name in model.tensors]
        total += sum(elements * DTYPE_BITS[info.dtype] // 8 for info in held)
    return total


def is_low_rank(plan: Plan, expert: int) -> bool:
    """Whether an expert's task vectors are of low rank, up to what storing has rounded away.

    Only the bytes of the rows that are looked at are read, of the base and that expert. False where the expert changed
    none of the matrices.

    Raises:
        CheckpointError: A file cannot be read.
    """
    cpu = torch.device("cpu")
    alone = Source(replace(plan, experts=(plan.experts[expert],)), cpu, 1)
    count = 0
    for tensor in looked_at(plan):
        rows, width = min(ROWS, tensor.shape[0]), tensor.shape[1]
        piece = Piece(tensor, 0, rows * width, sampled=True)
        theta_0, taus = Loader(alone, piece.stop, piece.stop * 8, cpu).load(piece, check=False)
        if not bool(taus.any()):
            continue
        with threads(1):
            if not _stands_out_little(taus[0].view(rows, width), theta_0.view(rows, width)):
                return False
        count += 1
        if count == _CHANGED:
            break
    return count > 0


def _stands_out_little(tau: Tensor, theta_0: Tensor) -> bool:
    """Whether few singular values of [m, n] stand out of those of rounding, and rounding is small beside them."""
    noise = cores.rounding(tau.double() + theta_0)
    if bool(noise**2 * tau.numel() > _HIDDEN * tau.double().square().sum()):
        return False
    return int(cores.standing_out(tau, noise)) <= min(tau.shape) // cores.LOW
