"""What a device can do beside arithmetic: how many there are, their memory, and copies that run beside their work.

Nothing else speaks of pinned memory, streams and events. A kind of device that is no CPU is one entry of `KINDS`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from modelmerge.errors import DeviceError, named

if TYPE_CHECKING:  # a method's options are read without torch
    from torch import Tensor


class Kind(Protocol):
    """A kind of device. Streams and events are those of torch.cuda, or behave like them."""

    def count(self) -> int:
        """How many this process sees."""

    def name(self, device: torch.device) -> str:
        """What its maker calls the device."""

    def free(self, device: torch.device) -> int:
        """Bytes of its memory that are free."""

    def current(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make the device this thread's own inside the block."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host [*shape], not filled, that the device copies from and to by itself."""

    def stream(self, device: torch.device) -> Any:
        """A new stream: what is queued on it runs beside the work of others."""

    def current_stream(self, device: torch.device) -> Any:
        """The stream that this thread's work on the device is queued on."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue this thread's work on the stream inside the block."""

    def event(self) -> Any:
        """A mark to put into a stream, which others can wait for."""


class Cuda:
    """CUDA devices: torch.cuda."""

    def count(self) -> int:
        """How many this process sees."""
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def name(self, device: torch.device) -> str:
        """What its maker calls the device."""
        return torch.cuda.get_device_name(device)

    def free(self, device: torch.device) -> int:
        """Bytes of its memory that are free, those too that torch keeps for what comes next."""
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept

    def current(self, device: torch.device) -> AbstractContextManager[Any]:
        """Make the device this thread's own inside the block."""
        return torch.cuda.device(device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked memory of the host [*shape], not filled."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def stream(self, device: torch.device) -> Any:
        """A new stream."""
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        """The stream that this thread's work on the device is queued on."""
        return torch.cuda.current_stream(device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue this thread's work on the stream inside the block."""
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """A mark to put into a stream."""
        return torch.cuda.Event()


KINDS: dict[str, Kind] = {"cuda": Cuda()}
ALL_CARDS = "cuda:all"
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # torchrun's and SLURM's numbers of a machine's processes


def find_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, cuda:N, or auto (a CUDA device if there is one).

    Raises:
        DeviceError: It is not there, or is no device modelmerge knows.
    """
    if name == "auto":
        return next((torch.device(kind, 0) for kind, each in KINDS.items() if each.count()), torch.device("cpu"))
    if "," in name or name == ALL_CARDS:
        raise DeviceError(f"{named('device')} {name}: only a merge takes several devices", hint="name one of them")
    kind, _, number = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind not in KINDS or (number and not number.isdigit()):
        raise DeviceError(f"{named('device')} '{name}' is no device", hint="use cpu, cuda, cuda:0, cuda:1, ... or auto")
    seen = _names(kind)
    if int(number or 0) >= len(seen):
        have = f"there {'are' if len(seen) > 1 else 'is'} {', '.join(seen)}" if seen else "this torch sees none"
        raise DeviceError(f"{named('device')} {name}: no such {kind.upper()} device; {have}", hint="use cpu or auto")
    return torch.device(kind, int(number or 0))


def find_devices(names: str) -> tuple[torch.device, ...]:
    """The devices of these names: one as `find_device` has it, several with commas between them, or cuda:all.

    A processor may be named several times, a card once.

    Raises:
        DeviceError: One is not there, or they are not alike, so that bits would depend on who does what.
    """
    if names == ALL_CARDS:
        names = ",".join(_names("cuda")) or "cuda"
    devices = tuple(find_device(name.strip()) for name in names.split(","))
    cards = [device for device in devices if device.type in KINDS]
    if len(set(cards)) < len(cards):
        raise DeviceError(f"{named('device')} {names} names a card twice", hint=f"{ALL_CARDS} names each once")
    kinds = {device_kind(device): device for device in devices}
    if len(kinds) > 1:
        what = " and ".join(f"{device} is {kind}" for kind, device in kinds.items())
        raise DeviceError(f"{named('device')} {names}: {what}, whose bits differ", hint="name devices of one kind")
    return devices


def device_kind(device: torch.device) -> str:
    """The kind of a device, whose results have the same bits whichever of that kind it is."""
    kind = KINDS.get(device.type)
    return device.type if kind is None else f"{device.type}, {kind.name(device)}"


def local_card() -> tuple[torch.device, str] | None:
    """The card for this process among those that its launcher starts on this machine, and the variable that says so.

    None where there is one card at most, or no launcher that counts its processes.
    """
    cards = _names("cuda")
    variable = next((name for name in _LOCAL_RANKS if os.environ.get(name, "").isdecimal()), None)
    if len(cards) < 2 or variable is None:
        return None
    return torch.device("cuda", int(os.environ[variable]) % len(cards)), variable


def _names(kind: str) -> list[str]:
    return [f"{kind}:{i}" for i in range(KINDS[kind].count())]


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a device this thread's own inside the block; the CPU is everybody's.

    Pinned memory and streams belong to the current device, which is the first one unless a thread says otherwise: a run
    on another card would take memory on that one too.

    Raises:
        DeviceError: The work inside needs more memory than the device has left.
    """
    if device.type == "cpu":
        yield
        return
    with KINDS[device.type].current(device):
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{device} has too little memory left: {KINDS[device.type].free(device):,} bytes are free",
                hint=f"use another device, or {named('device')} cpu; or end what else holds its memory",
            ) from error


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory that are free on a device; None where the system does not say."""
    if device.type != "cpu":
        return KINDS[device.type].free(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # no such file on this system: the allocator will have to say it
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes of the host's memory, not filled, that are to be copied to the device."""
    if device.type == "cpu":
        return torch.empty(nbytes, dtype=torch.uint8)
    return KINDS[device.type].pinned((nbytes,), torch.uint8)


class Sender:
    """Copies from the host to a device that run beside its other work; without one for the CPU, where nothing moves."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._kind = device, KINDS.get(device.type)
        self._stream = self._kind.stream(device) if self._kind is not None else None

    def send(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
        """The tensors on the device, and what to call before they are used.

        Calling makes the thread's own stream, not the processor, wait for the copies.
        """
        kind, stream = self._kind, self._stream
        if kind is None:
            return tensors, lambda: None
        with kind.on(stream):
            there = [
                kind.pinned(tuple(tensor.shape), tensor.dtype).copy_(tensor).to(self._device, non_blocking=True)
                for tensor in tensors
            ]
            copied = kind.event()
            copied.record(stream)

        def arrive() -> None:
            consumer = kind.current_stream(self._device)
            consumer.wait_event(copied)
            for tensor in there:
                tensor.record_stream(consumer)  # its memory is no other copy's before this stream is done with it

        return there, arrive


def read_later(value: Tensor) -> Callable[[], float]:
    """The value [0-d], once asked for: a copy is sent off now, and only asking waits for it."""
    if value.device.type == "cpu":
        return lambda: float(value)
    kind = KINDS[value.device.type]
    host = kind.pinned((), value.dtype).copy_(value, non_blocking=True)
    there = kind.event()
    there.record(kind.current_stream(value.device))

    def read() -> float:
        there.synchronize()
        return float(host)

    return read


@functools.cache
def multiplies_by_onednn() -> bool:
    """Whether oneDNN multiplies large matrices on the CPU faster than MKL does, which most builds of torch take for it.

    On processors that are not Intel's, MKL leaves the wider half of AVX-512's registers alone: half the rate.
    """
    wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    with contextlib.suppress(OSError):
        return wide and "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8")
    return False
