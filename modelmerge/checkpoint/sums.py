"""A model with an adapter on it, MODEL+ADAPTER: read as if the sum lay in a file.

What the adapter does not change is read where the model has it. What it changes is made when it is read, a piece at a
time: the model's elements, widened to float32, plus the change, as peft's `merge_and_unload` finds it in float32.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import Changes, Norms, as_bytes
from modelmerge.checkpoint.header import DTYPE_BITS, MERGEABLE_DTYPES, TensorInfo, matrix
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import CheckpointError

_BLOCK = 1 << 18  # elements of the model that are read at once where norms are found


@dataclass(frozen=True, slots=True)
class Sum:
    """The tensors that a model and its adapter make, in a file that there is not: they are made when they are read.

    Args:
        file: What it is called.
        model: The model.
        adapter: The adapter, as changes to the model's tensors.
        tensors: What is made, in the order of the file.
    """

    file: Path
    model: Checkpoint
    adapter: Checkpoint
    tensors: tuple[TensorInfo, ...]
    _norms: Norms = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Checkpoint, Checkpoint]:
        """What it is made of."""
        return self.model, self.adapter

    def owner(self, file: Path) -> Checkpoint:
        """The part that reads a file."""
        inside = self.model.sum is not None and file == self.model.sum.file
        return self.adapter if file in self.adapter.files and not inside else self.model

    def stored_dtype(self, info: TensorInfo) -> str:
        """What the model stores a tensor as, whatever it is called by now; one that it lacks is as the adapter's."""
        target = self.model.tensors.get(info.name if info.file != self.file else self._at(info.start).name)
        return info.dtype if target is None else self.model.stored_dtype(target)

    def _at(self, position: int) -> TensorInfo:
        return self.tensors[bisect.bisect_right(self.tensors, position, key=lambda each: each.start) - 1]

    def read(self, buffer: memoryview, position: int, *, follow: bool) -> int:
        """Make what lies from `position` on, as far as the tensor there goes; the number of bytes."""
        info = self._at(position)
        item = DTYPE_BITS[info.dtype] // 8
        start, count = (position - info.start) // item, min(len(buffer), info.start + info.nbytes - position) // item
        values = torch.empty(count, dtype=torch.float64 if info.dtype == "F64" else torch.float32)
        target, change = self.model.tensors[info.name], self.adapter.tensors[info.name]
        changes = Changes(torch.device("cpu"), _BLOCK, self._norms)
        matrices = change.change.matrices if change.change is not None else ()
        if not matrices:
            self._make(changes, change, target, start, values)
        width = info.numel // len(matrices) if matrices else info.numel
        for place, part in enumerate(matrices):
            first, last = max(start, place * width), min(start + count, (place + 1) * width)
            if first < last:
                some = values[first - start : last - start]
                self._make(changes, part, matrix(target, place), first - place * width, some)
        buffer[: count * item] = as_bytes(values)
        return count * item

    def _make(
        self, changes: Changes, change: TensorInfo | None, target: TensorInfo, start: int, values: Tensor
    ) -> None:
        """Fill `values`, flat, with the sum from the element `start` on."""
        values.copy_(changes.elements(self.model, target, start, start + len(values)))
        if change is not None:
            tau = torch.empty_like(values)
            changes.load(self.adapter, change, self.model, target, start, values, tau)
            values += tau

    def close(self) -> None:
        """Let go of the files."""
        for part in self.parts:
            part.close()


def with_adapter(model: Checkpoint, adapter: Checkpoint, reference: Reference) -> Checkpoint:
    """The model with an adapter, which is there as changes to the model's tensors, under a reference to both.

    Raises:
        CheckpointError: It changes a tensor that is not of floating numbers.
    """
    tensors, made, end = dict(model.tensors), [], 0
    file = Path("+".join(part.text for part in reference.parts[: len(model.parts) + 1]))
    for name, info in adapter.tensors.items():
        target = model.tensors.get(name)
        if info.change is None or target is None:
            tensors[name] = info
            continue
        if target.dtype not in MERGEABLE_DTYPES:
            raise CheckpointError(f"{info.file}: changes '{name}', which is {target.dtype} in '{model.name}'")
        dtype = "F64" if target.dtype == "F64" else "F32"
        if not target.numel:
            continue
        nbytes = target.numel * DTYPE_BITS[dtype] // 8
        tensors[name] = TensorInfo(name, dtype, target.shape, file, end, nbytes)
        made.append(tensors[name])
        end += nbytes
    total = Sum(file, model, adapter, tuple(made))
    return replace(
        model, reference=reference, tensors=tensors, files={**model.files, **adapter.files},
        remarks=(*model.remarks, *adapter.remarks), sum=total, _sources={},
    )  # fmt: skip
