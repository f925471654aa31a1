"""A device that is not there: tensors that say `sim:0` or `sim:1`, and are computed on the CPU.

    with simulated() as machine:
        modelmerge.merge(..., device="sim:1")
    assert not machine.waits

It behaves as a card does where the processor's program can get it wrong. Tensors of two devices in one operation are
an error, but for what torch allows on CUDA: scalars, and indices that lie on the host. Its memory is as large as it
says, and an allocation beyond that is torch's own OutOfMemoryError. Where the processor waits for it, it takes note.
What one stream has written is an error on another that has not waited for it, and so is memory of one stream that
another uses without `record_stream`. What is copied to pinned memory arrives when the processor waits for it, and is
NaN before.

It cannot show kernels that differ, times, or what libraries wait for within a decomposition. It is torch's private use
backend, so that nothing of torch is replaced, and every thread sees it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

from modelmerge.devices import KINDS

COUNT = 2
_aten = torch.ops.aten
# What makes the processor wait on CUDA, beside copies to the host: it has to know a number, or how many there are.
_WAITS = {
    _aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.masked_select, _aten.bincount, _aten._unique2,
    _aten.unique_dim, _aten.unique_consecutive,
}  # fmt: skip
_WITH_INDICES = {_aten.index, _aten.index_put_, _aten.index_put, _aten._index_put_impl_}


class Stream:
    """A queue of work. `ticks`: how far it is; `seen`: how far the streams are that it has waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ticks = device, 0
        self.seen: dict[Stream, int] = {}
        self.arrivals: list[tuple[int, Callable[[], object]]] = []  # copies to pinned memory

    def wait_event(self, event: Event) -> None:
        """Let what comes wait for what was queued before the event."""
        for stream, ticks in event.marks.items():
            self.seen[stream] = max(ticks, self.seen.get(stream, 0))

    def arrive(self, ticks: int) -> None:
        """The processor has waited until then."""
        for at, copy in self.arrivals:
            if at <= ticks:
                copy()
        self.arrivals = [each for each in self.arrivals if each[0] > ticks]


class Event:
    """A mark in a stream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.marks: dict[Stream, int] = {}
        self._stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        """Put it into a stream."""
        self._stream, self.marks = stream, {**stream.seen, stream: stream.ticks}

    def synchronize(self) -> None:
        """Let the processor wait for it."""
        assert self._stream is not None, "it was recorded nowhere"
        self._machine.note_wait("synchronize")
        self._stream.arrive(self.marks[self._stream])


class Memory:
    """A piece of the device's memory, which tensors share; freed with the last of them."""

    def __init__(self, machine: Machine, device: torch.device, storage: torch.UntypedStorage, stream: Stream) -> None:
        self.device, self.nbytes = device, storage.nbytes()
        self.stream, self.written = stream, (stream, stream.ticks)
        self.streams = {stream}
        self._machine = machine
        machine.allocate(device, self.nbytes)
        self._storage = storage  # no other is in its place as long as this is there

    def __del__(self) -> None:
        if hasattr(self, "_storage"):
            self._machine.free_bytes(self.device, self.nbytes)


@dataclass
class Machine:
    """The simulated devices: a kind of device, and what was seen of it.

    `capacity`: bytes of each device's memory. `last`: the number of the allocation after which nothing is free.
    `waits`: where the processor waited, and for what. `peak`: bytes that were held at most, by device, and
    `pinned_peak` of the host's pinned memory. `used`: devices that were current where such memory or a stream was made.
    """

    capacity: int = 1 << 40
    last: int | None = None
    waits: list[str] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    peak: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    used: set[int] = field(default_factory=set)
    pinned_peak: int = 0
    allocations: int = 0

    def __post_init__(self) -> None:
        self._lock, self._thread = threading.RLock(), threading.local()
        self._streams = [Stream(torch.device("sim", i)) for i in range(COUNT)]
        self._pinned: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self._memory: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()

    def forget(self) -> None:
        """Begin to count anew."""
        self.waits.clear()
        self.peak.clear()

    # The kind of device.

    def count(self) -> int:
        return COUNT

    def name(self, device: torch.device) -> str:
        return "simulated device"

    def free(self, device: torch.device) -> int:
        return self.capacity - self.held[device.index]

    @contextlib.contextmanager
    def current(self, device: torch.device) -> Iterator[None]:
        before = self._current
        self._thread.device = device.index
        try:
            yield
        finally:
            self._thread.device = before

    @property
    def _current(self) -> int:
        return getattr(self._thread, "device", 0)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.used.add(self._current)
        host = torch.empty(shape, dtype=dtype)
        self._pinned[host.untyped_storage()._cdata] = host.untyped_storage()
        self.pinned_peak = max(self.pinned_peak, sum(storage.nbytes() for storage in self._pinned.values()))
        return host

    def is_pinned(self, host: Tensor) -> bool:
        return host.untyped_storage()._cdata in self._pinned

    def stream(self, device: torch.device) -> Stream:
        self.used.add(self._current)
        return Stream(device)

    def current_stream(self, device: torch.device) -> Stream:
        chosen: Stream | None = getattr(self._thread, "stream", None)
        return chosen if chosen is not None and chosen.device == device else self._streams[device.index]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._thread, "stream", None)
        self._thread.stream = stream
        try:
            with self.current(stream.device):
                yield
        finally:
            self._thread.stream = before

    def event(self) -> Event:
        return Event(self)

    # What happens on it.

    def allocate(self, device: torch.device, nbytes: int) -> None:
        with self._lock:
            self.allocations += bool(nbytes)
            if nbytes > self.free(device) or (self.last is not None and nbytes and self.allocations > self.last):
                raise torch.OutOfMemoryError(f"{device} out of memory: tried to allocate {nbytes:,} bytes")
            self.held[device.index] += nbytes
            self.peak[device.index] = max(self.peak[device.index], self.held[device.index])

    def free_bytes(self, device: torch.device, nbytes: int) -> None:
        with self._lock:
            self.held[device.index] -= nbytes

    def memory_of(self, inner: Tensor, device: torch.device) -> Memory:
        storage = inner.untyped_storage()
        with self._lock:
            memory = self._memory.get(storage._cdata)
            if memory is None:
                stream = self.current_stream(device)
                memory = self._memory[storage._cdata] = Memory(self, device, storage, stream)
            return memory

    def note_wait(self, what: str) -> None:
        """The processor waits, at the package's last line on the stack."""
        frames = [frame for frame in traceback.extract_stack() if "/modelmerge/" in frame.filename]
        place = frames[-1] if frames else None
        at = f"{place.filename.rpartition('/modelmerge/')[2]}:{place.lineno} {place.line}" if place else "?"
        self.waits.append(f"{what} at {at}")

    def queue(self, function: Any, tensors: list[Simulated], results: list[Simulated], *, writes: bool) -> None:
        """Queue an operation on this thread's stream."""
        device = (tensors + results)[0].device
        stream = self.current_stream(device)
        for memory in {id(t.memory): t.memory for t in tensors}.values():
            writer, ticks = memory.written
            if writer is not stream and stream.seen.get(writer, 0) < ticks:
                raise RuntimeError(f"{function} uses what another stream has not been waited for to write")
            if stream not in memory.streams:
                raise RuntimeError(f"{function} uses memory of another stream without record_stream")
        with self._lock:
            stream.ticks += 1
            made = {id(t.memory) for t in results} - {id(t.memory) for t in tensors}
            for result in results:
                if writes or id(result.memory) in made:
                    result.memory.written = (stream, stream.ticks)


class Simulated(torch.Tensor):
    """A tensor on the device; `inner` is where its numbers are, `memory` what it holds there."""

    inner: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Simulated:
        memory = _machine().memory_of(inner, device)
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        self.inner, self.memory = inner, memory
        return self  # type: ignore[no-any-return]

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        """All is done in `__new__`."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.inner!r} on {self.device}"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it to subclasses

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)  # torch forgets which of the two

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _read_back, (self.cpu(), str(self.device))

    def __deepcopy__(self, memo: Any) -> Tensor:  # type: ignore[override]
        return self.clone()

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.streams.add(stream)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _read_back(values: Tensor, device: str) -> Tensor:
    """From a file to where it was, as torch.load does."""
    return values.to(device)


torch.serialization.add_safe_globals([_read_back])


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet, flat = function.overloadpacket, tree_leaves((args, kwargs))
    there = [each for each in flat if isinstance(each, Simulated)]
    if packet is _aten.copy_:
        return _copy(*args, **kwargs)
    if packet is _aten._to_copy:
        return _moved(args[0], kwargs)
    machine = _machine()
    _refuse_mixed(packet, there, flat)
    masks = packet in _WITH_INDICES and any(
        isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in tree_leaves(args[1])
    )
    if packet in _WAITS or masks:
        machine.note_wait(packet.__name__)
        stream = machine.current_stream(there[0].device)
        stream.arrive(stream.ticks)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else there[0].device
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu") if device.type == "sim" else device}
    kwargs.pop("pin_memory", None)
    result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if device.type != "sim":
        return result
    return _wrapped(function, result, there, device)


def _wrapped(function: Any, result: Any, there: list[Simulated], device: torch.device) -> Any:
    """The result's tensors on the device: those that were written to as the same objects."""
    same = {id(each.inner): each for each in there}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = same.get(id(value))
        return known if known is not None and known.shape == value.shape else Simulated(value, device)

    wrapped = tree_map(wrap, result)
    results = [each for each in tree_leaves(wrapped) if isinstance(each, Simulated)]
    if there or results:
        _machine().queue(function, there, results, writes=function._schema.is_mutable)
    return wrapped


def _refuse_mixed(packet: Any, there: list[Simulated], flat: list[Any]) -> None:
    devices = {each.device for each in there}
    on_host = [each for each in flat if isinstance(each, Tensor) and not isinstance(each, Simulated) and each.dim()]
    if len(devices) > 1 or (devices and on_host and packet not in _WITH_INDICES):
        shapes = [f"{tuple(each.shape)} on {each.device}" for each in flat if isinstance(each, Tensor)]
        raise RuntimeError(f"{packet} mixes devices: {', '.join(shapes)}")


def _moved(tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A copy of another dtype, or on another device."""
    target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else tensor.device
    kept = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "non_blocking")}
    moved = _aten._to_copy(_inner(tensor), **kept)
    if target.type != "sim":
        return _to_host(torch.empty_like(moved), tensor, moved)
    there = [tensor] if isinstance(tensor, Simulated) and tensor.device == target else []
    result = Simulated(moved, target)
    _machine().queue(_aten._to_copy, there, [result], writes=False)
    return result


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Simulated):
        if non_blocking and _machine().is_pinned(target):
            machine, snapshot = _machine(), _inner(source).clone()
            assert isinstance(source, Simulated)
            machine.queue(_aten.copy_, [source], [], writes=False)
            stream = machine.current_stream(source.device)
            stream.arrivals.append((stream.ticks, lambda: target.copy_(snapshot)))
            target.view(-1).view(torch.uint8).fill_(255)
            return target
        return _to_host(target, source, _inner(source))
    target.inner.copy_(_inner(source))
    there = [each for each in (target, source) if isinstance(each, Simulated) and each.device == target.device]
    _machine().queue(_aten.copy_, there, [target], writes=True)
    return target


def _to_host(target: Tensor, source: Tensor, values: Tensor) -> Tensor:
    machine = _machine()
    assert isinstance(source, Simulated)
    machine.note_wait("a copy to the host")
    machine.queue(_aten.copy_, [source], [], writes=False)
    stream = machine.current_stream(source.device)
    stream.arrive(stream.ticks)
    return target.copy_(values)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Simulated) else value


def _made(function: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation without a tensor of the device: it makes one."""
    return _run(function, args, kwargs)


_active: list[Machine] = []


def _machine() -> Machine:
    assert _active, "there are simulated devices inside `with simulated()` only"
    return _active[-1]


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return bool(_active)


class _Module(_DummyBackendModule):
    """torch.sim. Whoever else is in this process sees no device outside of `with simulated()`."""

    def is_available(self) -> bool:
        return bool(_active)

    def device_count(self) -> int:
        return COUNT if _active else 0


_setup_privateuseone_for_python_backend("sim", hook=_Hook(), backend_module=_Module())
_FALLBACK, _COPIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_FALLBACK.fallback(_made, "PrivateUse1")
# torch.tensor comes to these past `__torch_dispatch__`.
_COPIES.impl("copy_", _copy, "PrivateUse1")
_COPIES.impl("_local_scalar_dense", functools.partial(_made, _aten._local_scalar_dense.default), "PrivateUse1")


@contextlib.contextmanager
def simulated(capacity: int = 1 << 40, last: int | None = None) -> Iterator[Machine]:
    """Two devices, `sim:0` and `sim:1`, of so many bytes each; all that is seen of them."""
    machine = Machine(capacity, last)
    _active.append(machine)
    KINDS["sim"] = machine
    try:
        yield machine
    finally:
        del KINDS["sim"]
        _active.pop()
