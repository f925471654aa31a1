"""Whether experts are merged LoRA adapters: of a few matrices, some rows are enough to see it.

A task vector that was a product B A of rank r is still one in every run of rows, but for what storing the expert has
rounded away. What is of low rank there is to be so for the methods too: `modelmerge.methods.cores` says what that is.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from modelmerge.checkpoint.names import layer_type
from modelmerge.engine.job import Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import threads
from modelmerge.engine.pieces import Piece, piece_bytes
from modelmerge.methods import cores
from modelmerge.methods.contract import Context
from modelmerge.plan.tensors import Plan, TensorPlan

# So many rows of a matrix are looked at: enough for an adapter of rank 64, and done in milliseconds.
ROWS = 512
# Of so many matrices that the expert changed, each of another type; and no more types than that are tried.
_CHANGED, _TYPES = 3, 12


def looked_at(plan: Plan) -> list[Piece]:
    """Of the matrices that `is_low_rank` looks at, at most, its rows: the first of each type, the narrow ones first."""
    first: dict[str, TensorPlan] = {}
    for tensor in plan.select("merge"):
        if tensor.linear and min(tensor.shape) >= 2 * cores.LOW:
            first.setdefault(layer_type(tensor.name), tensor)
    narrow = sorted(first.values(), key=lambda tensor: (tensor.shape[1], tensor.name))[:_TYPES]
    return [Piece(tensor, 0, min(ROWS, tensor.shape[0]) * tensor.shape[1], sampled=True) for tensor in narrow]


def look_bytes(plan: Plan) -> int:
    """Bytes that looking at all experts reads, where they changed the first matrices that are looked at."""
    return sum(piece_bytes(plan, piece) for piece in looked_at(plan)[:_CHANGED])


def is_low_rank(plan: Plan, expert: int) -> bool:
    """Whether an expert's task vectors are of low rank, up to what storing has rounded away.

    Only the bytes of the rows that are looked at are read, of the base and that expert. False where the expert changed
    none of the matrices.

    Raises:
        CheckpointError: A file cannot be read.
    """
    alone = Source(replace(plan, experts=(plan.experts[expert],)), torch.device("cpu"), 1)
    count = 0
    for piece in looked_at(plan):
        theta_0, taus = Loader(alone, piece.stop, piece.stop * 8, alone.device).load(piece, check=False)
        if not bool(taus.any()):
            continue
        with threads(1):
            context = Context(tensor=piece.tensor.name, weights=(1.0,), base=theta_0.view(-1, piece.tensor.row))
            if cores.of(taus.view(1, -1, piece.tensor.row), context).rank is None:
                return False
        count += 1
        if count == _CHANGED:
            break
    return count > 0
