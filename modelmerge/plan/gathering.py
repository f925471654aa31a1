"""Rows of a table in another order, as a tensor that lies in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmerge.checkpoint.header import MERGEABLE_DTYPES, TensorInfo, joined, rows
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, named
from modelmerge.plan.overrides import layer_of
from modelmerge.plan.vocabulary import is_table, row_count

if TYPE_CHECKING:
    from modelmerge.plan.tensors import TensorPlan

_WAYS = 512  # blocks in a block: readers pass over what lies before the part they want

Places = np.ndarray[Any, np.dtype[np.int64]]


def gathered(info: TensorInfo, places: Places, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """A table's rows from those places, as a stored tensor of that name and shape.

    Raises:
        PlanError: It is a change that cannot be cut.
    """
    table = replace(info, shape=(row_count(info),)) if info.shape[:1] == (1,) else info
    if np.array_equal(places, np.arange(row_count(info))):
        return replace(info, name=name, shape=shape)
    change = info.change
    if change is None or change.factors is None:
        return joined_blocks(name, shape, [rows(table, *run) for run in _runs(places)])
    left, right = change.factors
    if not change.low_rank or left.strides is not None:
        raise PlanError(
            f"{info.file}: its change to '{info.name}' cannot be put into another order of tokens",
            hint="merge the adapter into its base with peft and name the result",
        )
    if change.transposed:
        rank, count = left.shape
        flat = replace(left, shape=(rank * count,))
        blocks = [rows(flat, k * count + first, k * count + last) for k in range(rank) for first, last in _runs(places)]
        left = joined_blocks(left.name, (rank, len(places)), blocks)
    else:
        shaped = (len(places), *left.shape[1:])
        left = joined_blocks(left.name, shaped, [rows(left, *run) for run in _runs(places)])
    change = replace(change, factors=(left, right))
    return replace(info, name=name, shape=shape, nbytes=left.nbytes + right.nbytes, change=change)


def _runs(places: Places) -> list[tuple[int, int]]:
    """Places as runs of rows that follow one another: the first, and the one after the last."""
    ends = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
    return [(int(places[first]), int(places[last - 1]) + 1) for first, last in pairwise([0, *ends, len(places)])]


def joined_blocks(name: str, shape: tuple[int, ...], blocks: Sequence[TensorInfo]) -> TensorInfo:
    """`joined`, with many blocks in blocks of their own."""
    if len(blocks) <= _WAYS:
        return joined(name, shape, blocks)
    some = [blocks[start : start + _WAYS] for start in range(0, len(blocks), _WAYS)]
    parts = [joined(name, (sum(b.shape[0] for b in each), *blocks[0].shape[1:]), each) for each in some]
    nbytes = sum(part.nbytes for part in parts)
    return replace(blocks[0], name=name, shape=shape, nbytes=nbytes, strides=None, blocks=tuple(parts))


def count_of(expert: Checkpoint, table: TensorInfo) -> int:
    """How many rows of a table of the base an expert has."""
    if table.name in expert.tensors:
        return row_count(expert.tensors[table.name])
    return row_count(table) if expert.has(table.name) else 0


def refuse_hidden_tables(
    base: Checkpoint, plans: Mapping[str, TensorPlan], sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse to leave as it is what may have a row for each token under a name that does not say so."""
    counts = {count for count, _ in sizes.values()}
    for name, info in base.tensors.items():
        hidden = info.dtype in MERGEABLE_DTYPES and info.shape and layer_of(name) is None and not is_table(info)
        if hidden and row_count(info) in counts and plans[name].reason != "excluded":
            raise PlanError(
                f"'{name}' {list(info.shape)} may have a row for each token, and its name does not say so",
                hint=f"if it has not, {named('exclude')} '{name}' copies it as it is",
            )
