"""The safetensors header: what a file holds, checked before a single tensor is read.

Format (safetensors documentation): 8 bytes little-endian length N; N bytes of JSON mapping each tensor's name to
`dtype`, `shape` and `data_offsets` [begin, end) counted from byte 8 + N; then the data, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from modelmerge.checkpoint.documents import open_plain, shown
from modelmerge.errors import CheckpointError, ReferenceNotFound

# Bits per element of every dtype the format knows. The 4- and 6-bit kinds pack several elements into bytes.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
MERGEABLE_DTYPES = ("F64", "F32", "F16", "BF16")  # the floating kinds that arithmetic can be done on
HALF_DTYPES = ("F16", "BF16")
QUANTISED_DTYPES = tuple(d for d in DTYPE_BITS if d.startswith(("F8_", "F6_", "F4")))
# Tensors that hold state, not weights, in the names frameworks give them: a difference of theirs means nothing.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq", "masked_bias")
MOST_AXES = 64  # torch has no tensors of more
MOST_LETTERS = 2000  # of a name
MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a longer header is an attack or not safetensors at all


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; nothing of its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # first byte of the data, counted from the start of the file
    nbytes: int
    strides: tuple[int, ...] | None = None  # in elements, where they do not lie in their order
    change: Change | None = None  # set where the values are not the tensor's weights
    blocks: tuple[TensorInfo, ...] = ()  # where it is stored in pieces: its elements are theirs, one after the other

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def files(self) -> set[Path]:
        """Every file that it is read from."""
        parts = (*(self.change.parts if self.change is not None else ()), *self.blocks)
        return {file for part in parts for file in part.files} if parts else {self.file}


# How two matrices make one: their product; element by element; each element of the first times the whole second; or,
# of a convolution, the first a kernel [r, s, *kernel] and the second what comes before it, [s, in, 1, 1].
Product = Literal["product", "elementwise", "kronecker", "kernel"]


@dataclass(frozen=True, slots=True)
class Change:
    """How stored values tell what a tensor differs by from the base's.

    They are the difference divided by `scale`; or, with `factors`, the difference is `scale * left @ right`, the tensor
    taken as a matrix of its first dimension's rows; or, with `matrices`, each of a stack's matrices has its own; or,
    with `runs`, each of some runs of rows has its own.

    Args:
        scale: A factor on the whole.
        factors: [m, r] and [r, n], of convolutions [m, r, 1, 1] and [r, *kernel]. A factor with a `change` is not
            stored but made likewise, out of factors of its own.
        transposed: The factors are stored as [r, m] and [n, r].
        origin: Stands in for the base's tensor [m, n]; the difference is to be seen from there.
        magnitude: Norms [m] (`transposed`: [n]) to which the rows (columns) of the changed tensor are rescaled, as in
            DoRA.
        matrices: Of a stack [E, m, n], how each matrix changes; None where it does not.
        runs: The first row of a run, and how its rows change; others do not.
        product: How the factors make the difference, where not by a product of matrices.
        first: The row of what they make that is the tensor's first.
    """

    scale: float = 1.0
    factors: tuple[TensorInfo, TensorInfo] | None = None
    transposed: bool = False
    origin: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    matrices: tuple[TensorInfo | None, ...] = ()
    runs: tuple[tuple[int, TensorInfo], ...] = ()
    product: Product = "product"
    first: int = 0

    @property
    def low_rank(self) -> bool:
        """Whether the difference is the product of factors and nothing else, in every run of rows."""
        if self.runs:
            return all(run.change is not None and run.change.low_rank for _, run in self.runs)
        plain = self.origin is None and self.magnitude is None
        return self.factors is not None and self.product == "product" and plain

    @property
    def rank(self) -> int:
        """The columns of the factors of a difference that is `low_rank`, of all runs together."""
        if self.factors is None:
            return sum(run.change.rank for _, run in self.runs if run.change is not None)
        return self.factors[0].shape[0 if self.transposed else 1]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Every tensor that takes part in it, as stored."""
        each = (*(self.factors or ()), self.origin, self.magnitude, *self.matrices, *(run for _, run in self.runs))
        parts: tuple[TensorInfo, ...] = ()
        for part in each:
            if part is not None:
                parts += (part.change.parts if part.change else ()) or (part,)
        return parts

    @property
    def factored(self) -> bool:
        """Whether factors make it, or a run of its rows."""
        return self.factors is not None or any(run.change is not None and run.change.factored for _, run in self.runs)


def rows(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """The part of a stored tensor from `first` to `last` along its first axis."""
    shape = (last - first, *info.shape[1:])
    width, item = math.prod(info.shape[1:]), DTYPE_BITS[info.dtype] // 8
    if info.blocks:
        blocks, position = [], 0
        for block in info.blocks:
            start, stop = max(first * width - position, 0), min(last * width - position, block.numel)
            if start < stop:
                blocks.append(_run(block, start, stop))
            position += block.numel
        return joined(info.name, shape, blocks)
    step = width if info.strides is None else info.strides[0]
    return replace(info, shape=shape, start=info.start + first * step * item, nbytes=math.prod(shape) * item)


def matrix(info: TensorInfo, index: int) -> TensorInfo:
    """One matrix of a stored stack [E, m, n]: [m, n]."""
    part = rows(info, index, index + 1)
    return replace(part, shape=part.shape[1:], strides=part.strides and part.strides[1:])


def transposed(info: TensorInfo) -> TensorInfo:
    """A stored tensor with its last two axes exchanged."""
    strides = info.strides or tuple(math.prod(info.shape[axis + 1 :]) for axis in range(len(info.shape)))
    *front, m, n = range(len(info.shape))
    order = (*front, n, m)
    return replace(info, shape=tuple(info.shape[i] for i in order), strides=tuple(strides[i] for i in order))


def reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """A stored tensor in another shape that differs by axes of length one alone."""
    steps = iter([step for n, step in zip(info.shape, info.strides or (), strict=False) if n != 1])
    strides = None if info.strides is None else tuple(1 if n == 1 else next(steps) for n in shape)
    return replace(info, shape=shape, strides=strides)


def joined(name: str, shape: tuple[int, ...], blocks: Sequence[TensorInfo]) -> TensorInfo:
    """A tensor of that shape out of stored ones, whose elements it has one after the other."""
    first, nbytes = blocks[0], sum(block.nbytes for block in blocks)
    plain = not any(block.blocks or block.strides for block in blocks)
    if plain and all((a.file, a.start + a.nbytes) == (b.file, b.start) for a, b in pairwise(blocks)):
        return replace(first, name=name, shape=shape, nbytes=nbytes)
    parts = tuple(part for block in blocks for part in block.blocks or (block,))
    return TensorInfo(name, first.dtype, shape, first.file, first.start, nbytes, change=first.change, blocks=parts)


def _run(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """The elements of a stored tensor from `start` to `stop`: whole rows, or any where they lie in their order."""
    if (start, stop) == (0, info.numel):
        return info
    width = math.prod(info.shape[1:])
    if start % width == 0 and stop % width == 0:
        return rows(info, start // width, stop // width)
    assert not info.strides, "a tensor whose elements do not lie in their order is cut between rows"
    item = DTYPE_BITS[info.dtype] // 8
    return replace(info, shape=(stop - start,), start=info.start + start * item, nbytes=(stop - start) * item)


def is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor holds state, not weights, by its name; of GPT-2's masks, by their shape [1, 1, n, n] too."""
    *front, last = info.name.replace("/", ".").split(".")
    mask = last == "bias" and front[-1:] and front[-1].lower().endswith(("attn", "attention"))
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return last in BUFFERS or bool(mask and square)


def damaged(file: Path, what: str) -> CheckpointError:
    """The error for a file that did not arrive whole."""
    return CheckpointError(f"{file}: {what}", hint="copy or download the file again")


def foreign(file: Path, kind: str) -> ReferenceNotFound:
    """The error for weights in another format."""
    return ReferenceNotFound(f"{file} is {kind}, which cannot be merged", hint="use the model's safetensors weights")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: The file is no safetensors file, is truncated, or its header contradicts itself.
    """
    try:
        with open_plain(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: not a safetensors file: it is only {size} bytes long")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: not a safetensors file: its header claims {length} bytes",
                    hint="is it a pickle, a git-lfs pointer or an HTML page saved under this name?",
                )
            if 8 + length > size:
                raise damaged(file, f"truncated inside its header: {size} bytes of at least {8 + length}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    return _parse(file, size, 8 + length, text)


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file, whose header has been read, says of itself in words."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        metadata = json.loads(stream.read(length)).get("__metadata__")
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in entries if isinstance(value, str)}


def _parse(file: Path, size: int, data_start: int, text: bytes) -> dict[str, TensorInfo]:
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (ValueError, RecursionError) as error:  # no Unicode, no JSON, numbers too long, nested without end
        raise CheckpointError(f"{file}: its header is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object")
    raw.pop("__metadata__", None)
    tensors = sorted(
        (_entry(file, data_start, name, entry) for name, entry in raw.items()), key=lambda t: (t.start, t.nbytes)
    )
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(f"{file}: the header lies: tensor '{tensor.name}' {kind}")
        position += tensor.nbytes
    if position > size:
        raise damaged(file, f"truncated: {size} bytes of the {position} that its header promises")
    if position < size:
        raise CheckpointError(f"{file}: the header lies: {size - position} bytes after the last tensor")
    return {tensor.name: tensor for tensor in tensors}


def _entry(file: Path, data_start: int, name: str, entry: Any) -> TensorInfo:
    def lie(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: the header lies: tensor '{name}' {what}")

    if fault := fault_of(name):
        raise CheckpointError(f"{file}: the header lies: {fault}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise lie("lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise lie(f"has the unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not can_be_shape(shape):
        raise lie(f"has the shape {shown(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 2**63 for n in offsets)
    ):
        raise lie(f"has the data_offsets {shown(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise lie(f"is {dtype} {shape}, which ends within a byte")
    needed = bits // 8
    if end - begin != needed:
        raise lie(f"has {end - begin} bytes of data where {dtype} {shape} needs {needed}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, needed)


def can_be_shape(shape: Sequence[Any]) -> bool:
    """Whether these are the axes of a tensor that any file could hold."""
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        return False
    return math.prod(n for n in shape if n) < 2**56  # the others count where one is 0, too: steps are made of them


def fault_of(name: str) -> str | None:
    """Why a text cannot be a tensor's name; None where it can."""
    if len(name) > MOST_LETTERS:
        return f"the tensor name {shown(name)} has {len(name):,} letters"
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        return f"the tensor name {shown(name)} is no Unicode"
    return None


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise CheckpointError(f"{file}: the header lies: '{twice[:MOST_LETTERS]}' stands in it twice")
    return content
