"""PyTorch's pickled checkpoints, read as safetensors are: what each tensor is and where its bytes lie, and no code run.

Two layouts. Since torch 1.6 a zip archive: the pickle `NAME/data.pkl`, and each storage uncompressed as
`NAME/data/KEY`. Before, one after another: magic number, version, system, the pickle, the storages' keys; then each
storage as its length and its bytes. In both, the pickle says of a tensor which storage it lies in, where, its shape and
its strides.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from modelmerge.checkpoint.digest import FileDigest
from modelmerge.checkpoint.documents import open_plain, shown
from modelmerge.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MERGEABLE_DTYPES,
    TensorInfo,
    can_be_shape,
    damaged,
    fault_of,
    foreign,
)
from modelmerge.checkpoint.unpickler import Dtype, Odd, Storage, View, item_bytes, unpickled
from modelmerge.errors import CheckpointError, ReferenceNotFound

if TYPE_CHECKING:
    from modelmerge.checkpoint.means import Means
    from modelmerge.checkpoint.sums import Sum
    from modelmerge.hub.ranges import Ranges

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_DEPTH = 3  # so far down a state dict is looked for
_TRAINING = ("optim", "sched", "scaler", "rng", "callbacks", "loops")  # in the names of what is never the weights
_SAVE_STATE = "save the model's state dict: torch.save(model.state_dict(), ...)"
_MOST_BYTES, _MOST_TIMES = 1 << 26, 100  # that tensors take, over so many times the bytes of the file
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and extra field


def read_pickle(file: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors of a pickled checkpoint in the order of their bytes, and what a person should know of the reading.

    Tensors of one storage, as tied weights are, lie at the same place.

    Raises:
        CheckpointError: It is no such file, is damaged, would run code, or holds no state dict, or several.
        ReferenceNotFound: It is of another kind: TorchScript, GGUF.
    """
    try:
        with open_plain(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            stream.seek(0)
            if start[:4] in (b"GGUF", b"tjgg", b"lmgg", b"fmgg"):
                raise foreign(file, "GGUF")
            if start.startswith(b"PK\x03\x04"):
                content, places = _open_archive(file, stream)
            elif start.startswith(b"\x80"):
                content, places = _open_legacy(file, stream)
            else:
                raise CheckpointError(
                    f"{file}: not a PyTorch checkpoint",
                    hint="is it a git-lfs pointer or an HTML page saved under this name?",
                )
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    state, remarks = _state_dict(file, content)
    infos = [_info(file, name, tensor, places) for name, tensor in state.items()]
    if (total := sum(info.nbytes for info in infos)) > _MOST_BYTES + _MOST_TIMES * size:
        raise CheckpointError(
            f"{file}: its tensors repeat what it stores: {size:,} bytes stand for {total:,}",
            hint="save the state dict with each of its tensors `.contiguous()`",
        )
    return {info.name: info for info in sorted(infos, key=lambda info: info.start)}, remarks


def gather(source: FileDigest | Ranges | Means | Sum, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes, from `offset` on, of a tensor whose elements do not lie in their order."""
    if isinstance(source, FileDigest):
        with mmap.mmap(source.descriptor, 0, access=mmap.ACCESS_READ) as mapped:
            _gather(mapped, tensor.start, tensor, offset, buffer)
        return
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides or (), strict=True))
    made, done = memoryview(bytearray(reach * DTYPE_BITS[tensor.dtype] // 8)), 0
    while done < len(made):
        done += source.read(made[done:], tensor.start + done, follow=True)
    _gather(made, 0, tensor, offset, buffer)


def _gather(content: Any, start: int, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
    item = DTYPE_BITS[tensor.dtype] // 8
    strides = [item * stride for stride in tensor.strides or ()]
    view: Any = np.ndarray(tensor.shape, f"V{item}", content, start, strides)
    buffer[:] = view.flat[offset // item : (offset + len(buffer)) // item].view(np.uint8).data
    del view  # a mapping that is looked at cannot be closed


Places = dict[str, tuple[int, int]]  # storage key -> first byte in the file, bytes


def _open_archive(file: Path, stream: BinaryIO) -> tuple[Any, Places]:
    """What the pickle of a zip archive holds, and where the storages are."""
    size = os.fstat(stream.fileno()).st_size

    def place(entry: zipfile.ZipInfo) -> tuple[int, int]:
        offset = min(max(entry.header_offset, 0), size)
        stream.seek(offset)
        header = stream.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
            raise damaged(file, f"damaged at '{entry.filename}'")
        start = offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError(
                f"{file}: '{entry.filename}' is compressed in it, as torch.save never does",
                hint="save the state dict again, with safetensors.torch.save_file or torch.save",
            )
        if start + entry.file_size > size:
            raise damaged(file, f"truncated in '{entry.filename}'")
        return start, entry.file_size

    def content(entry: zipfile.ZipInfo) -> bytes:
        start, length = place(entry)
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: '{entry.filename}' in it claims {length} bytes")
        stream.seek(start)
        return stream.read(length)

    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise damaged(file, f"truncated or damaged: {error}") from error
    root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
    if root is None or f"{root}constants.pkl" in entries:
        kind = "no PyTorch checkpoint, though a zip archive" if root is None else "a TorchScript archive"
        raise ReferenceNotFound(f"{file} is {kind}, which cannot be merged", hint=_SAVE_STATE)
    order = entries.get(f"{root}byteorder")
    if order is not None and content(order) != b"little":
        raise CheckpointError(f"{file}: written on a big-endian machine", hint="save it again on this machine")
    data = f"{root}data/"
    places = {name.removeprefix(data): place(entry) for name, entry in entries.items() if name.startswith(data)}
    return unpickled(file, io.BytesIO(content(entries[f"{root}data.pkl"]))), places


def _open_legacy(file: Path, stream: BinaryIO) -> tuple[Any, Places]:
    """What the main pickle of a file from before torch 1.6 holds, and where the storages are."""
    if unpickled(file, stream) != _LEGACY_MAGIC:
        raise CheckpointError(f"{file}: a pickle that torch.save did not write", hint=_SAVE_STATE)
    version, system = unpickled(file, stream), unpickled(file, stream)
    if not (isinstance(system, dict) and system.get("little_endian", True)):
        raise CheckpointError(f"{file}: written on a big-endian machine", hint="save it again on this machine")
    items: dict[Any, int] = {}
    content, keys = unpickled(file, stream, items), unpickled(file, stream)
    if version != _LEGACY_VERSION or not isinstance(keys, list) or not items.keys() >= set(keys):
        raise damaged(file, "damaged behind its pickle")
    places, position, size = {}, stream.tell(), os.fstat(stream.fileno()).st_size
    for key in keys:
        stream.seek(position)
        length = stream.read(8)
        nbytes = struct.unpack("<q", length)[0] * items[key] if len(length) == 8 else size
        if not 0 <= nbytes <= size - position - 8:
            raise damaged(file, "truncated")
        places[str(key)] = position + 8, nbytes
        position += 8 + nbytes
    return content, places


def _state_dict(file: Path, content: Any) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The one state dict in what a file holds, wherever it is nested, and what to say of it."""
    dicts = list(_search(content, (), set()))
    if len(dicts) > 1:
        # A tensor or two beside the nested weights are the state of a training run: a loss, a generator's.
        dicts = [entry for entry in dicts if any(map(_is_weight, entry[1].values()))] or dicts
    if not dicts:
        what = (
            f"a dict of {', '.join(map(shown, list(content)[:6]))}" if isinstance(content, dict) else "something else"
        )
        raise CheckpointError(f"{file}: holds no state dict, no dict of names to tensors, but {what}", hint=_SAVE_STATE)
    if len(dicts) > 1:
        some = ", ".join(_where(path) for path, _ in dicts[:6]) + ", ..." * (len(dicts) > 6)
        raise CheckpointError(
            f"{file}: holds several state dicts: {some}",
            hint="save the one that is meant by itself, with safetensors.torch.save_file",
        )
    ((path, state),) = dicts
    tensors = {name: value for name, value in state.items() if isinstance(value, (View, Odd))}
    remarks = [f"the weights are those under {_where(path)} in {file.name}"] if path else []
    plain = [name for name, value in state.items() if name not in tensors and not _is_empty(value)]
    if plain:
        remarks.append(f"{', '.join(map(shown, plain[:4]))} in {file.name} {'are' if plain[1:] else 'is'} no tensor")
    return tensors, tuple(remarks)


def _search(content: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every dict of names to tensors, once, with the way to it; the state of optimisers and the like left aside."""
    if not isinstance(content, dict) or len(path) > _DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    if not all(isinstance(name, str) for name in content):
        return
    if any(isinstance(value, (View, Odd)) for value in content.values()):
        yield path, content
    for name, value in content.items():
        if not any(word in name.lower() for word in _TRAINING):
            yield from _search(value, (*path, name), seen)


def _is_weight(value: Any) -> bool:
    """A tensor that a model could have learned: floating, with an axis."""
    return isinstance(value, View) and getattr(value.dtype, "code", None) in MERGEABLE_DTYPES and bool(value.shape)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


def _where(path: tuple[str, ...]) -> str:
    return " -> ".join(map(shown, path)) if path else "the top level"


def _info(file: Path, name: str, tensor: Any, places: Places) -> TensorInfo:
    """A tensor's place and kind, checked against the storage that it says it lies in."""

    def lie(what: str) -> CheckpointError:
        return damaged(file, f"tensor '{name}' {what}")

    if fault := fault_of(name):
        raise damaged(file, fault)
    if not isinstance(tensor, View) or not isinstance(tensor.dtype, Dtype) or tensor.dtype.code is None:
        kind = tensor.kind if isinstance(tensor, Odd) else getattr(tensor.dtype, "name", "of no dtype")
        raise CheckpointError(
            f"{file}: tensor '{name}' is {kind}, which cannot be merged", hint="save the model with plain tensors"
        )
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if not isinstance(storage, Storage) or str(storage.key) not in places:
        raise lie("lies in a storage that the file lacks")
    agree = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    numbers = (tensor.offset, storage.offset, *strides) if agree and can_be_shape(shape) else (None,)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise lie(f"has the shape {shown(shape)} and the strides {shown(strides)}")
    start, nbytes = places[str(storage.key)]
    item, numel = item_bytes(tensor.dtype), math.prod(shape)
    first = (storage.offset * item_bytes(storage.dtype)) + tensor.offset * item
    reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if numel else 0
    if first + reach * item > nbytes or numel * item >= 2**63:
        raise lie(f"lies in {nbytes} bytes of storage and reaches to byte {first + reach * item}")
    in_order, step = True, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        in_order, step = in_order and (n == 1 or stride == step), step * n
    stored_strides = None if in_order or not numel else tuple(strides)
    return TensorInfo(name, tensor.dtype.code, tuple(shape), file, start + first, numel * item, strides=stored_strides)
