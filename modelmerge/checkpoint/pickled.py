"""PyTorch's pickled checkpoints, read as safetensors are: what each tensor is and where its bytes lie, and no code run.

Two layouts. Since torch 1.6 a zip archive: the pickle `NAME/data.pkl`, and each storage uncompressed as
`NAME/data/KEY`. Before, one after another: magic number, version, system, the pickle, the storages' keys; then each
storage as its length and its bytes. In both, the pickle says of a tensor which storage it lies in, where, its shape and
its strides.

The names a pickle may ask for are those that `torch.load(weights_only=True)` allows, and what it gets for them are
stand-ins that only take notes. Any other name is refused: it could be anything, `os.system` included.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from modelmerge.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, MERGEABLE_DTYPES, TensorInfo, damaged, foreign
from modelmerge.errors import CheckpointError, ReferenceNotFound

# By the names that pickles use: the safetensors dtype, or None for kinds that safetensors has no name for.
_DTYPES: dict[str, str | None] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    **dict.fromkeys(("complex128", "complex32", "qint8", "qint32", "quint8", "quint4x2", "quint2x4")),
}  # fmt: skip
_STORAGES: dict[str, str | None] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
    **dict.fromkeys(("ComplexDoubleStorage", "QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage",
                     "QUInt2x4Storage")),
}  # fmt: skip
# What rebuilds tensors that are no plain run of numbers, and what kind each is.
_KINDS = {
    "_rebuild_sparse_tensor": "sparse", "_rebuild_qtensor": "quantised", "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "on the meta device, without data", "_rebuild_wrapper_subclass": "a subclass",
    "_rebuild_device_tensor_from_numpy": "of a foreign device",
    "_rebuild_device_tensor_from_cpu_tensor": "of a foreign device",
}  # fmt: skip
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_DEPTH = 3  # so far down a state dict is looked for
_TRAINING = ("optim", "sched", "scaler", "rng", "callbacks", "loops")  # in the names of what is never the weights
# What pickles of torch.save consist of: protocol 2, in the part of it that torch.load(weights_only=True) reads.
_OPCODES = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS",
    "SETITEM", "SETITEMS", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1",
    "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
}  # fmt: skip
# Names that may stand in a pickle for things that nobody here needs.
_IGNORED = {
    ("torch", "device"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"), ("builtins", "bytearray"), ("__builtin__", "bytearray"),
    *(("torch", f"per_{scheme}_affine") for scheme in ("tensor", "channel")),
    ("torch", "per_tensor_symmetric"), ("torch", "per_channel_symmetric"),
    ("torch", "per_channel_affine_float_qparams"),
}  # fmt: skip
_SAVE_STATE = "save the model's state dict: torch.save(model.state_dict(), ...)"
_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and extra field


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str
    code: str | None


@dataclass(frozen=True, slots=True)
class _Storage:
    key: Any
    dtype: _Dtype
    offset: Any  # elements


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the pickle describes it; nothing of it is checked yet."""

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True, slots=True)
class _Odd:
    """A tensor that is no plain run of numbers."""

    kind: str


class _StandIn:
    """Called where the pickle calls a function of torch's; made anew for each pickle, so that none can change another.

    A call with arguments that do not fit raises, which ends the reading.
    """

    __slots__ = ("_work",)

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def __call__(self, *args: Any) -> Any:
        return self._work(*args)


def read_pickle(file: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors of a pickled checkpoint in the order of their bytes, and what a person should know of the reading.

    Tensors of one storage, as tied weights are, lie at the same place.

    Raises:
        CheckpointError: It is no such file, is damaged, would run code, or holds no state dict, or several.
        ReferenceNotFound: It is of another kind: TorchScript, GGUF.
    """
    try:
        with file.open("rb") as stream:
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
    return {info.name: info for info in sorted(infos, key=lambda info: info.start)}, remarks


def gather(descriptor: int, tensor: TensorInfo, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes, from `offset` on, of a tensor whose elements do not lie in their order."""
    item = DTYPE_BITS[tensor.dtype] // 8
    first = offset // item
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        strides = [item * stride for stride in tensor.strides or ()]
        view: Any = np.ndarray(tensor.shape, f"V{item}", mapped, tensor.start, strides)
        buffer[:] = view.flat[first : first + len(buffer) // item].view(np.uint8).data
        del view  # a mapping that is looked at cannot be closed


class _Unpickler(pickle.Unpickler):
    """Takes a pickle apart without importing anything for it."""

    def __init__(self, file: Path, stream: BinaryIO, items: dict[Any, int]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._file = file
        self._items = items

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch._utils", "torch._tensor") and (name in _REBUILDERS or name in _KINDS):
            return _StandIn(_REBUILDERS.get(name) or (lambda *args: _Odd(_KINDS[name])))
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _Dtype(name, _STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Dtype(name, _DTYPES[name])
        if module == "_codecs" and name == "encode":  # how protocol 2 writes bytes
            return _StandIn(lambda text, how: text.encode("latin1"))
        plain = _PLAIN.get((module, name))
        if plain is not None:
            return plain
        if (module, name) in _IGNORED:
            return _StandIn(lambda *args: None)
        raise CheckpointError(
            f"{self._file}: asks for '{module}.{name}' to be run when it is loaded; pickles with code are refused",
            hint="where you trust the file, load it with torch.load(..., weights_only=False) yourself "
            "and save its state dict with safetensors.torch.save_file",
        )

    def persistent_load(self, identifier: Any) -> Any:
        label, kind, key, _, _, *view = identifier
        if label not in ("storage", b"storage") or not isinstance(kind, _Dtype):
            raise pickle.UnpicklingError("it refers to what is no storage")
        self._items.setdefault(key, _item(kind))
        return _Storage(key, kind, view[0][1] if view and view[0] is not None else 0)


# What stands in for the functions that rebuild tensors; each drops what a merge has no use for.
_REBUILDERS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": lambda storage, offset, shape, strides: _View(storage, storage.dtype, offset, shape, strides),
    "_rebuild_tensor_v2": lambda storage, offset, shape, strides, grad, hooks, metadata=None: (
        _Odd("conjugated or negated") if metadata else _View(storage, storage.dtype, offset, shape, strides)
    ),
    "_rebuild_tensor_v3": lambda storage, offset, shape, strides, grad, hooks, dtype, metadata=None: (
        _Odd("conjugated or negated") if metadata else _View(storage, dtype, offset, shape, strides)
    ),
    "_rebuild_parameter": lambda data, grad, hooks: data,
    "_rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
    "_rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
}
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict, ("collections", "Counter"): dict, ("torch", "Size"): tuple,
    ("builtins", "set"): set, ("builtins", "complex"): complex,
    ("__builtin__", "set"): set, ("__builtin__", "complex"): complex,
}  # fmt: skip


def _unpickled(file: Path, stream: BinaryIO, items: dict[Any, int] | None = None) -> Any:
    """A pickle's content; `items` gets the bytes of an element of each storage it speaks of."""
    start = stream.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if opcode.name not in _OPCODES or (opcode.name == "LONG_BINPUT" and int(argument or 0) > count):
                raise pickle.UnpicklingError(f"{opcode.name} {argument} is nothing that torch.save writes")
        stream.seek(start)
        return _Unpickler(file, stream, {} if items is None else items).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(file, f"its pickle is damaged ({type(error).__name__}: {error})") from error


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
    return _unpickled(file, io.BytesIO(content(entries[f"{root}data.pkl"]))), places


def _open_legacy(file: Path, stream: BinaryIO) -> tuple[Any, Places]:
    """What the main pickle of a file from before torch 1.6 holds, and where the storages are."""
    if _unpickled(file, stream) != _LEGACY_MAGIC:
        raise CheckpointError(f"{file}: a pickle that torch.save did not write", hint=_SAVE_STATE)
    version, system = _unpickled(file, stream), _unpickled(file, stream)
    if not (isinstance(system, dict) and system.get("little_endian", True)):
        raise CheckpointError(f"{file}: written on a big-endian machine", hint="save it again on this machine")
    items: dict[Any, int] = {}
    content, keys = _unpickled(file, stream, items), _unpickled(file, stream)
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
    dicts = list(_search(content, ()))
    if len(dicts) > 1:
        # A tensor or two beside the nested weights are the state of a training run: a loss, a generator's.
        dicts = [entry for entry in dicts if any(map(_is_weight, entry[1].values()))] or dicts
    if not dicts:
        what = f"a dict of {', '.join(map(repr, list(content)[:6]))}" if isinstance(content, dict) else "something else"
        raise CheckpointError(f"{file}: holds no state dict, no dict of names to tensors, but {what}", hint=_SAVE_STATE)
    if len(dicts) > 1:
        raise CheckpointError(
            f"{file}: holds several state dicts: {', '.join(_where(path) for path, _ in dicts)}",
            hint="save the one that is meant by itself, with safetensors.torch.save_file",
        )
    ((path, state),) = dicts
    tensors = {name: value for name, value in state.items() if isinstance(value, (_View, _Odd))}
    remarks = [f"the weights are those under {_where(path)} in {file.name}"] if path else []
    plain = [name for name, value in state.items() if name not in tensors and not _is_empty(value)]
    if plain:
        remarks.append(f"{', '.join(map(repr, plain[:4]))} in {file.name} {'are' if plain[1:] else 'is'} no tensor")
    return tensors, tuple(remarks)


def _search(content: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every dict of names to tensors, with the way to it; the state of optimisers and the like left aside."""
    if not isinstance(content, dict) or len(path) > _DEPTH or not all(isinstance(name, str) for name in content):
        return
    if any(isinstance(value, (_View, _Odd)) for value in content.values()):
        yield path, content
    for name, value in content.items():
        if not any(word in name.lower() for word in _TRAINING):
            yield from _search(value, (*path, name))


def _is_weight(value: Any) -> bool:
    """A tensor that a model could have learned: floating, with an axis."""
    return isinstance(value, _View) and getattr(value.dtype, "code", None) in MERGEABLE_DTYPES and bool(value.shape)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple, set)) and not value)


def _where(path: tuple[str, ...]) -> str:
    return " -> ".join(map(repr, path)) if path else "the top level"


def _info(file: Path, name: str, tensor: Any, places: Places) -> TensorInfo:
    """A tensor's place and kind, checked against the storage that it says it lies in."""

    def lie(what: str) -> CheckpointError:
        return damaged(file, f"tensor '{name}' {what}")

    if not isinstance(tensor, _View) or not isinstance(tensor.dtype, _Dtype) or tensor.dtype.code is None:
        kind = tensor.kind if isinstance(tensor, _Odd) else getattr(tensor.dtype, "name", "of no dtype")
        raise CheckpointError(
            f"{file}: tensor '{name}' is {kind}, which cannot be merged", hint="save the model with plain tensors"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise lie(f"has a name that is no Unicode: {name!r}")
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if not isinstance(storage, _Storage) or str(storage.key) not in places:
        raise lie("lies in a storage that the file lacks")
    agree = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    numbers = (tensor.offset, storage.offset, *shape, *strides) if agree else (None,)
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise lie(f"has the shape {shape!r} and the strides {strides!r}")
    start, nbytes = places[str(storage.key)]
    item, numel = _item(tensor.dtype), math.prod(shape)
    first = (storage.offset * _item(storage.dtype)) + tensor.offset * item
    reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if numel else 0
    if first + reach * item > nbytes or numel * item >= 2**63:
        raise lie(f"lies in {nbytes} bytes of storage and reaches to byte {first + reach * item}")
    in_order, step = True, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        in_order, step = in_order and (n == 1 or stride == step), step * n
    stored_strides = None if in_order or not numel else tuple(strides)
    return TensorInfo(name, tensor.dtype.code, tuple(shape), file, start + first, numel * item, strides=stored_strides)


def _item(dtype: _Dtype) -> int:
    """Bytes of an element."""
    return DTYPE_BITS[dtype.code] // 8 if dtype.code else 16
