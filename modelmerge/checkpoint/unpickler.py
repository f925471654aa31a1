"""Pickles taken apart without importing anything for them, at a cost that their length bounds.

The names that a pickle may ask for are those that `torch.load(weights_only=True)` allows, and what it gets for them are
stand-ins that only take notes. Any other name is refused: it could be anything, `os.system` included.
"""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from modelmerge.checkpoint.header import DTYPE_BITS, damaged
from modelmerge.errors import CheckpointError

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
# What pickles of torch.save consist of: protocol 2, in the part of it that torch.load(weights_only=True) reads.
_OPCODES = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS",
    "SETITEM", "SETITEMS", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1",
    "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
}  # fmt: skip
# Names that may stand in a pickle for things that nobody here needs.
_IGNORED = {
    ("torch", "device"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("bytearray", "set", "complex")),
    *(("torch", f"per_{scheme}_affine") for scheme in ("tensor", "channel")),
    ("torch", "per_tensor_symmetric"), ("torch", "per_channel_symmetric"),
    ("torch", "per_channel_affine_float_qparams"),
}  # fmt: skip
_LINE = 1000  # bytes of a name that a pickle asks for
_MOST_ITEMS = 100_000  # of a tuple, with those of the tuples in it


_Python: Any = pickle._Unpickler  # no part of the module that is promised, and the same since Python 3.0


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype by its names: the pickle's, and safetensors', which not all have."""

    name: str
    code: str | None


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle refers to it."""

    key: Any
    dtype: Dtype
    offset: Any  # elements


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as the pickle describes it; nothing of it is checked yet."""

    storage: Any
    dtype: Any
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True, slots=True)
class Odd:
    """A tensor that is no plain run of numbers."""

    kind: str


class _StandIn:
    """Called where the pickle calls a function of torch's; arguments that do not fit raise, which ends the reading."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[..., Any]) -> None:
        self._work = work

    def __call__(self, *args: Any) -> Any:
        return self._work(*args)


class _Tuple(tuple):  # type: ignore[type-arg]
    """A tuple that knows how much lies in it, shared parts counted each time: what walks it costs that much."""

    size: int

    def __new__(cls, items: Iterable[Any] = ()) -> _Tuple:
        self = super().__new__(cls, items)
        self.size = 1 + sum(item.size if isinstance(item, _Tuple) else 1 for item in self)
        if self.size > _MOST_ITEMS:
            raise pickle.UnpicklingError("it has tuples in tuples without end")
        return self


class _Bounded:
    """A stream as an unpickler reads it, which makes no room for what the file does not have."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, start = stream, stream.tell()
        self._size = stream.seek(0, os.SEEK_END)
        stream.seek(start)

    def read(self, count: int) -> bytes:
        if count > _MOST_ITEMS and count > self._size - self._stream.tell():
            raise EOFError
        return self._stream.read(count)

    def readline(self) -> bytes:
        return self._stream.readline(_LINE)


class _Unpickler(_Python):  # type: ignore[misc]
    """Takes a pickle apart without importing anything for it, at a cost that its length bounds.

    It is Python's own, not the one in C: so each step that the file can ask for is one of `_OPCODES`, keys are looked
    at before they are hashed, and tuples are counted, for a few hundred bytes can make one of 2^45 items.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}

    def __init__(self, file: Path, stream: BinaryIO, items: dict[Any, int]) -> None:
        super().__init__(_Bounded(stream), encoding="utf-8")
        self._file = file
        self._items = items

    def _put_tuple(self, count: int | None) -> None:
        items = self.pop_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.append(_Tuple(items))

    def _put_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise pickle.UnpicklingError("it puts entries into what is no dict")
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def _put_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put_items((key, value))

    def _drop_state(self) -> None:
        self.stack.pop()  # such as the versions of modules, which nobody here needs

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch._utils", "torch._tensor") and (name in _REBUILDERS or name in _KINDS):
            return _StandIn(_REBUILDERS.get(name) or (lambda *args: Odd(_KINDS[name])))
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return Dtype(name, _STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return Dtype(name, _DTYPES[name])
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
        if label not in ("storage", b"storage") or not isinstance(kind, Dtype) or _key(key) is not key:
            raise pickle.UnpicklingError("it refers to what is no storage")
        self._items.setdefault(key, item_bytes(kind))
        return Storage(key, kind, view[0][1] if view and view[0] is not None else 0)


for _name, _work in {
    **{name: _Python.dispatch[getattr(pickle, name)[0]] for name in _OPCODES},
    "TUPLE": lambda self: self._put_tuple(None), "EMPTY_TUPLE": lambda self: self._put_tuple(0),
    **{f"TUPLE{count}": functools.partial(_Unpickler._put_tuple, count=count) for count in (1, 2, 3)},
    "SETITEM": _Unpickler._put_one, "SETITEMS": lambda self: self._put_items(self.pop_mark()),
    "BUILD": _Unpickler._drop_state, "NEWOBJ": _Python.load_reduce,
}.items():  # fmt: skip
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = _work


def _key(value: Any) -> Any:
    """A key that costs nothing to hash; what is no name and no number is one that nothing else is."""
    plain = type(value) is str or (type(value) is int and -(2**60) < value < 2**60)  # hashes of larger ones collide
    return value if plain else object()


def _pairs(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


# What stands in for the functions that rebuild tensors; each drops what a merge has no use for.
_REBUILDERS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": lambda storage, offset, shape, strides: View(storage, storage.dtype, offset, shape, strides),
    "_rebuild_tensor_v2": lambda storage, offset, shape, strides, grad, hooks, metadata=None: (
        Odd("conjugated or negated") if metadata else View(storage, storage.dtype, offset, shape, strides)
    ),
    "_rebuild_tensor_v3": lambda storage, offset, shape, strides, grad, hooks, dtype, metadata=None: (
        Odd("conjugated or negated") if metadata else View(storage, dtype, offset, shape, strides)
    ),
    "_rebuild_parameter": lambda data, grad, hooks: data,
    "_rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
    "_rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
}
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StandIn(_pairs), ("collections", "Counter"): _StandIn(_pairs),
    ("torch", "Size"): _StandIn(_Tuple),
}  # fmt: skip


def unpickled(file: Path, stream: BinaryIO, items: dict[Any, int] | None = None) -> Any:
    """A pickle's content; `items` gets the bytes of an element of each storage it speaks of."""
    try:
        return _Unpickler(file, stream, {} if items is None else items).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(file, f"its pickle is damaged ({type(error).__name__}: {str(error)[:200]})") from error


def item_bytes(dtype: Dtype) -> int:
    """Bytes of an element."""
    return DTYPE_BITS[dtype.code] // 8 if dtype.code else 16
