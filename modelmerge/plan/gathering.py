"""Rows of a table in another order, as a tensor that lies in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    if np.array_equal(places, np.arange(row_count(info))):
        return replace(info, name=name, shape=shape)

    def take(table: TensorInfo) -> TensorInfo:
        taken = [rows(table, *run) for run in _runs(places)]
        return joined_blocks(table.name, (len(places), *table.shape[1:]), taken)

    if info.change is None or info.change.factors is None:
        return replace(take(as_rows(info)), name=name, shape=shape)
    return replace(with_left(info, len(places), take), name=name, shape=shape)


def with_left(info: TensorInfo, count: int, take: Callable[[TensorInfo], TensorInfo]) -> TensorInfo:
    """A low-rank change to a table that gets other rows, still in the shape that it had.

    Args:
        info: How the change is stored.
        count: How many rows the table gets.
        take: Makes them of the left factor, or of a column of it where it is stored on its side.

    Raises:
        PlanError: It is a change that cannot be cut.
    """
    change = info.change
    if change is None or change.factors is None or not change.low_rank or change.first or change.factors[0].strides:
        raise PlanError(
            f"{info.file}: its change to '{info.name}' cannot be put into another order of tokens",
            hint="merge the adapter into its base with peft and name the result",
        )
    left, right = change.factors
    if change.transposed:
        rank, height = left.shape
        flat = replace(left, shape=(rank * height,))
        columns = [take(rows(flat, k * height, (k + 1) * height)) for k in range(rank)]
        left = joined_blocks(left.name, (rank, count), columns)
    else:
        left = take(left)
    return replace(info, nbytes=left.nbytes + right.nbytes, change=replace(change, factors=(left, right)))


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


def as_rows(info: TensorInfo) -> TensorInfo:
    """A table with its rows in front; some biases are stored as one row [1, V]."""
    return replace(info, shape=(row_count(info),)) if info.shape[:1] == (1,) else info


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
