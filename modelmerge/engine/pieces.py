"""Runs of a tensor's elements, which are read and merged one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from modelmerge.checkpoint.header import DTYPE_BITS
from modelmerge.plan.tensors import Plan, TensorPlan

# Runs of a sample, and the elements of one: a sixteenth of a tensor of 3 million, and enough of one of 100 million.
_RUNS, _RUN = 48, 1 << 12


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a tensor's elements."""

    tensor: TensorPlan
    start: int
    stop: int
    whole: bool = False  # keep the tensor's shape; otherwise the run is flat
    sampled: bool = False  # others around it are not read: no occasion to hash the file


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tensors cut into pieces of about `block` elements, matrices between rows; each is made when it is asked for.

    `by_rows`: no row of such a tensor is cut, whatever its shape. `share`: of the pieces, one in so many. `before`: so
    many pieces, uncounted, come before these.
    """

    tensors: Sequence[TensorPlan]
    block: int
    by_rows: Callable[[TensorPlan], bool] = lambda tensor: False
    share: int = 1
    before: int = 0

    def __iter__(self) -> Iterator[Piece]:
        before = self.before
        for tensor in self.tensors:
            starts = self._starts(tensor)
            for start in starts[-before % self.share :: self.share]:
                yield Piece(tensor, start, min(start + starts.step, starts.stop), sampled=self.share > 1)
            before += len(starts)

    def __len__(self) -> int:
        stop = self.before + sum(len(self._starts(tensor)) for tensor in self.tensors)
        return -(-stop // self.share) - -(-self.before // self.share)

    @property
    def largest(self) -> int:
        """Elements of the largest piece."""
        cuts = [self._starts(tensor) for tensor in self.tensors]
        return max((min(starts.step, starts.stop) for starts in cuts), default=0)

    def _starts(self, tensor: TensorPlan) -> range:
        # Kinds that pack several elements into a byte are only ever copied, and are cut by bytes.
        count = tensor.numel * DTYPE_BITS[tensor.dtype] // 8 // item_bytes(tensor.dtype)
        width = tensor.row if self.by_rows(tensor) else _width(tensor)
        return range(0, count, max(self.block // width, 1) * width)


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of each tensor: as many runs, all of one length, evenly spread, and in matrices of whole rows."""

    tensors: Sequence[TensorPlan]
    MOST: ClassVar[int] = _RUNS * _RUN  # elements of one tensor's, unless its rows are longer

    def __iter__(self) -> Iterator[Piece]:
        for tensor in self.tensors:
            width, run = _width(tensor), self._run(tensor)
            for i in range(_RUNS):
                start = (tensor.numel - run) // width * i // (_RUNS - 1) * width
                yield Piece(tensor, start, start + run, sampled=True)

    def __len__(self) -> int:
        return _RUNS * len(self.tensors)

    @property
    def largest(self) -> int:
        """Elements of the largest piece."""
        return max(map(self._run, self.tensors), default=0)

    @staticmethod
    def _run(tensor: TensorPlan) -> int:
        width = _width(tensor)
        return max(min(tensor.numel // _RUNS // 16, _RUN) // width, 1) * width


def _width(tensor: TensorPlan) -> int:
    """What is not cut: a matrix's row."""
    return tensor.row if len(tensor.shape) == 2 else 1


def item_bytes(dtype: str) -> int:
    """Bytes of what a piece counts: an element, or a byte where elements are smaller."""
    return max(DTYPE_BITS[dtype] // 8, 1)


def piece_bytes(plan: Plan, piece: Piece) -> int:
    """Bytes that a piece takes in all the files it is read from."""
    stored = plan.stored_bytes(piece.tensor, experts=piece.tensor.action != "copy")
    return stored * (piece.stop - piece.start) // max(piece.tensor.numel, 1)
