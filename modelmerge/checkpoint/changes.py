"""From stored factors to what they change: the arithmetic of adapters and low-rank task vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.header import DTYPE_BITS, Change, TensorInfo
from modelmerge.checkpoint.reader import Checkpoint

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
Place = tuple[int, int, int]  # a row of a tensor, and of what begins there the first and last element
Norms = dict[tuple[str, str], Tensor]  # by model and tensor, of columns: [n], float64


class Changes:
    """A thread's way from an expert's stored factors to its task vectors.

    Args:
        device: Where they shall be.
        block: Elements of the base that are read at once where norms are found.
        norms: Norms of columns, which every piece of a tensor needs; threads may share them.
    """

    def __init__(self, device: torch.device, block: int, norms: Norms) -> None:
        self._device, self._block, self._norms = device, block, norms
        self._right: dict[str, tuple[TensorInfo, Tensor]] = {}  # by expert, the last right factor

    def load(
        self, expert: Checkpoint, info: TensorInfo, base: Checkpoint, target: TensorInfo, start: int, theta_0: Tensor,
        tau: Tensor,
    ) -> None:  # fmt: skip
        """A task vector that is stored as a change, from the element `start` on, into `tau`, flat.

        Args:
            expert: Whose it is.
            info: How it is stored.
            base: What it changes, and of that
            target: the tensor.
            start: The first element.
            theta_0: The base's elements there, as many as there are in `tau`.
            tau: Is filled.
        """
        assert info.change is not None, "what is loaded so is a change"
        stop = start + len(tau)
        if not info.change.runs:
            self._load(expert, info, base, target, (0, start, stop), theta_0, tau)
            return
        tau.zero_()
        width = target.numel // target.shape[0]
        for row, run in info.change.runs:
            first, last = max(start, row * width), min(stop, row * width + run.numel)
            if first < last:
                here = slice(first - start, last - start)
                place = (row, first - row * width, last - row * width)
                self._load(expert, run, base, target, place, theta_0[here], tau[here])

    def _load(
        self, expert: Checkpoint, info: TensorInfo, base: Checkpoint, target: TensorInfo, place: Place,
        theta_0: Tensor, tau: Tensor,
    ) -> None:  # fmt: skip
        """A task vector that is stored as factors, flat: `f (origin + product) - theta_0`.

        f is DoRA's factor of each row or column. Written so that what is left is not a difference of large numbers.
        """
        change, (row, start, stop) = info.change, place
        if change is None:  # other rows of the tensor have one
            tau.copy_(self.elements(expert, info, start, stop) - theta_0)
            return
        if change.factors is None:
            tau.copy_(self.elements(expert, info, start, stop)).mul_(change.scale)
            return
        width = target.numel // target.shape[0]
        first, last = start // width, -(-stop // width)
        rows = self.product(expert, change, first, last)
        inside = slice(start - first * width, stop - first * width)
        tau.copy_(rows.flatten()[inside])
        origin = theta_0 if change.origin is None else self.elements(expert, change.origin, start, stop)
        if change.magnitude is not None:
            factors = self.rescaling(expert, change, base, target, row, first, last)
            factors = factors[None, :] if change.transposed else factors[:, None]
            spread, beyond = (f.float().expand(last - first, width).flatten()[inside] for f in (factors, factors - 1))
            tau.mul_(spread).addcmul_(origin.to(tau.dtype), beyond)
        if change.origin is not None:
            tau.add_(origin - theta_0)

    def rescaling(
        self, expert: Checkpoint, change: Change, base: Checkpoint, target: TensorInfo, row: int, first: int, last: int
    ) -> Tensor:
        """DoRA's factors, float64: of the rows from `first` to `last`, or of all columns if it is `transposed`.

        Rows are counted from the target's `row` on, which is 0 where the change is that of the whole tensor.
        """
        assert change.magnitude is not None
        if not change.transposed:
            learnt = self.elements(expert, change.magnitude, first, last)
            norms = self._changed_norms(expert, change, base, target, row, first, last, 1)
            return learnt.double() / torch.cat(list(norms))
        key = (expert.name, target.name)
        if key not in self._norms:
            # Several threads may do this at once; they find the same.
            parts = self._changed_norms(expert, change, base, target, row, 0, target.shape[0], 0)
            self._norms[key] = sum(part.square() for part in parts).sqrt()  # type: ignore[union-attr]
        learnt = self.elements(expert, change.magnitude, 0, target.shape[1])
        return learnt.double() / self._norms[key].to(self._device)  # whoever found them may be elsewhere

    def _changed_norms(
        self, expert: Checkpoint, change: Change, base: Checkpoint, target: TensorInfo, row: int, first: int, last: int,
        dim: int,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Norms over a dimension of the changed tensor's rows from `first` to `last`, some rows at a time, float64."""
        width = target.numel // target.shape[0]
        model, info = base, target
        if change.origin is not None:
            model, info, row = expert, change.origin, 0
        step = max(self._block // width, 1)
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = self.elements(model, info, (row + start) * width, (row + stop) * width).view(-1, width)
            rows = rows + self.product(expert, change, start, stop)
            yield torch.linalg.vector_norm(rows, dim=dim, dtype=torch.float64)

    def product(self, expert: Checkpoint, change: Change, first: int, last: int) -> Tensor:
        """What the factors make, times the scale, rows from `first` to `last`: [rows, n], float32 or float64."""
        if change.product == "product":
            left, right = self.factors(expert, change, first, last)
            return left @ right
        assert change.factors is not None
        one, other = change.factors
        first, last = first + change.first, last + change.first
        if change.product == "elementwise":
            a, b = _alike(self._matrix(expert, one, first, last), self._matrix(expert, other, first, last))
            return a.mul_(change.scale).mul_(b)
        if change.product == "kernel":
            a, b = _alike(self._matrix(expert, one, first, last), self._matrix(expert, other, 0, other.shape[0]))
            return torch.einsum("rsk,si->rik", a.view(last - first, len(b), -1) * change.scale, b).flatten(1)
        a, b = _alike(*(self._matrix(expert, factor, 0, factor.shape[0]) for factor in (one, other)))
        rows = torch.arange(first, last, device=a.device)
        outer, inner = a[rows // len(b)] * change.scale, b[rows % len(b)]
        return (outer[:, :, None] * inner[:, None, :]).flatten(1)

    def _matrix(self, expert: Checkpoint, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows of a factor, which is stored or made: [rows, n], float32 or float64."""
        if info.change is not None:
            return self.product(expert, info.change, first, last)
        width = info.numel // info.shape[0]
        return self.elements(expert, info, first * width, last * width).view(-1, width)

    def factors(self, expert: Checkpoint, change: Change, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The factors as [rows, r], times the scale, and [r, n], of the rows from `first` to `last`.

        Of a tensor that changes run by run, they are those of all runs side by side, of all rows.
        """
        if change.runs:
            return self._factors_of_runs(expert, change, last)
        assert change.factors is not None
        left, right = change.factors
        if self._right.get(expert.name, (None,))[0] is not right:  # every piece of a tensor needs the whole of it
            values = self._matrix(expert, right, 0, right.shape[0])
            self._right[expert.name] = right, values.T if change.transposed else values
        _, values = self._right[expert.name]
        first, last = first + change.first, last + change.first
        if change.transposed:
            rank, m = left.shape
            rows = torch.stack([self.elements(expert, left, k * m + first, k * m + last) for k in range(rank)]).T
        else:
            rank = left.shape[1]
            rows = self.elements(expert, left, first * rank, last * rank).view(-1, rank)
        rows, values = _alike(rows, values)
        return rows * change.scale, values

    def _factors_of_runs(self, expert: Checkpoint, change: Change, count: int) -> tuple[Tensor, Tensor]:
        lefts, rights = [], []
        for row, run in change.runs:
            assert run.change is not None, "what has factors is a change"
            left, right = self.factors(expert, run.change, 0, run.shape[0])
            lefts.append(torch.nn.functional.pad(left, (0, 0, row, count - row - len(left))))
            rights.append(right)
        return torch.cat(lefts, 1), torch.cat(rights)

    def elements(self, model: Checkpoint, info: TensorInfo, start: int, stop: int) -> Tensor:
        """A stored tensor's elements from `start` to `stop`, flat, float32 or (if stored so) float64."""
        size = DTYPE_BITS[info.dtype] // 8
        raw = torch.empty((stop - start) * size, dtype=torch.uint8)
        model.read_into(info, start * size, as_bytes(raw))
        values = raw.view(TORCH_DTYPES[info.dtype]).to(self._device)
        return values if values.dtype == torch.float64 else values.float()


def as_bytes(data: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, not copied."""
    array: Any = data.view(torch.uint8).numpy()  # shares the tensor's memory
    return memoryview(array)


def _alike(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 where one is."""
    return (left, right) if left.dtype == right.dtype else (left.double(), right.double())
