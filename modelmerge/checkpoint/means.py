"""Rows that no file has: means of rows of models, or zeros, which are made when they are read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import TORCH_DTYPES, as_bytes
from modelmerge.checkpoint.header import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    from modelmerge.checkpoint.reader import Checkpoint

_BLOCK = 1 << 18  # elements that are read at once


@dataclass(frozen=True, slots=True)
class _Mean:
    """The mean of what its parts have, each taken as rows of `numel` elements; zeros where there is no part."""

    start: int
    dtype: str
    numel: int
    parts: tuple[TensorInfo, ...]


class Means:
    """A file that there is not, of tensors that are made of those of models.

    `reader` is a model that can read all of them; it is known once the tensors are.
    """

    def __init__(self) -> None:
        self.file = Path("means of rows")
        self.reader: Checkpoint | None = None
        self._means: list[_Mean] = []
        self._rows: dict[int, Tensor] = {}  # means over many rows, by their start: they are wanted more than once

    def add(self, name: str, dtype: str, shape: tuple[int, ...], parts: Sequence[TensorInfo] = ()) -> TensorInfo:
        """A tensor that is the mean of the parts: of each, so many rows as it is longer; zeros without parts."""
        last = self._means[-1] if self._means else _Mean(0, dtype, 0, ())
        start = last.start + last.numel * DTYPE_BITS[last.dtype] // 8
        numel = math.prod(shape)
        self._means.append(_Mean(start, dtype, numel, tuple(parts)))
        return TensorInfo(name, dtype, shape, self.file, start, numel * DTYPE_BITS[dtype] // 8)

    def _open(self, file: Path) -> Means:
        """Itself, as it is the only file that it has."""
        assert file == self.file
        return self

    def read(self, buffer: memoryview, position: int, *, follow: bool) -> int:
        """Make what lies from `position` on, as far as the tensor there goes; the number of bytes."""
        mean = self._means[bisect_right(self._means, position, key=lambda each: each.start) - 1]
        item = DTYPE_BITS[mean.dtype] // 8
        first = (position - mean.start) // item
        count = min(len(buffer) // item, mean.numel - first)
        values = self._values(mean, first, count).to(TORCH_DTYPES[mean.dtype])
        buffer[: count * item] = as_bytes(values)
        return count * item

    def _values(self, mean: _Mean, first: int, count: int) -> Tensor:
        """Elements of a mean, float64 [count]; a mean over rows is found as a whole, and kept."""
        if all(part.numel == mean.numel for part in mean.parts):
            sums = [self._sum(part, mean.numel, first, count) for part in mean.parts]
            return sum(sums, torch.zeros(count, dtype=torch.float64)) / max(len(sums), 1)
        if mean.start not in self._rows:  # several threads may do this at once; they find the same
            total = torch.stack([self._sum(part, mean.numel, 0, mean.numel) for part in mean.parts]).sum(0)
            self._rows[mean.start] = total / sum(part.numel // mean.numel for part in mean.parts)
        return self._rows[mean.start][first : first + count]

    def _sum(self, part: TensorInfo, width: int, first: int, count: int) -> Tensor:
        """The sum over a part's rows of that width, of each the elements from `first` on: float64 [count]."""
        assert self.reader is not None, "what it reads is known"
        item, rows = DTYPE_BITS[part.dtype] // 8, part.numel // width
        step = max(_BLOCK // width, 1) if count == width else 1
        total = torch.zeros(count, dtype=torch.float64)
        for row in range(0, rows, step):
            taken = min(step, rows - row)
            raw = torch.empty(taken * count * item, dtype=torch.uint8)
            offset = (row * width + first) * item
            self.reader.read_into(part, offset, as_bytes(raw), follow=False)
            total += raw.view(TORCH_DTYPES[part.dtype]).view(taken, count).double().sum(0)
        return total
