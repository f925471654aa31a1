"""Devices, threads, and work that is shared out among them."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from modelmerge.engine.job import Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.pieces import Piece, Pieces, Sample
from modelmerge.errors import DeviceError, OutputError, named
from modelmerge.plan.tensors import Plan, TensorPlan

MOST_THREADS = 1024  # that torch is given because a file says so
ALL_CARDS = "cuda:all"
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # torchrun's and SLURM's numbers of a machine's processes


def find_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, cuda:N, or auto (a CUDA device if there is one).

    Raises:
        DeviceError: It is not there, or is no device modelmerge knows.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if "," in name or name == ALL_CARDS:
        raise DeviceError(f"{named('device')} {name}: only a merge takes several devices", hint="name one of them")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise DeviceError(f"{named('device')} '{name}' is no device", hint="use cpu, cuda, cuda:0, cuda:1, ... or auto")
    if kind == "cpu":
        return torch.device("cpu")
    count = len(_cards())
    if int(number or 0) >= count:
        have = f"there {'are' if count > 1 else 'is'} {', '.join(_cards())}" if count else "this torch sees none"
        raise DeviceError(f"{named('device')} {name}: no such CUDA device; {have}", hint="use cpu or auto")
    return torch.device("cuda", int(number or 0))


def find_devices(names: str) -> tuple[torch.device, ...]:
    """The devices of these names: one as `find_device` has it, several with commas between them, or cuda:all.

    A processor may be named several times, a card once.

    Raises:
        DeviceError: One is not there, or they are not alike, so that bits would depend on who does what.
    """
    if names == ALL_CARDS:
        names = ",".join(_cards()) or "cuda"
    devices = tuple(find_device(name.strip()) for name in names.split(","))
    cards = [device for device in devices if device.type == "cuda"]
    if len(set(cards)) < len(cards):
        raise DeviceError(f"{named('device')} {names} names a card twice", hint=f"{ALL_CARDS} names each once")
    kinds = {device_kind(device): device for device in devices}
    if len(kinds) > 1:
        what = " and ".join(f"{device} is {kind}" for kind, device in kinds.items())
        raise DeviceError(f"{named('device')} {names}: {what}, whose bits differ", hint="name devices of one kind")
    return devices


def device_kind(device: torch.device) -> str:
    """The kind of a device, whose results have the same bits whichever of that kind it is."""
    return f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def local_card() -> tuple[torch.device, str] | None:
    """The card for this process among those that its launcher starts on this machine, and the variable that says so.

    None where there is one card at most, or no launcher that counts its processes.
    """
    cards = _cards()
    variable = next((name for name in _LOCAL_RANKS if os.environ.get(name, "").isdecimal()), None)
    if len(cards) < 2 or variable is None:
        return None
    return torch.device("cuda", int(os.environ[variable]) % len(cards)), variable


def _cards() -> list[str]:
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def default_workers(device: torch.device) -> int:
    """Threads for element-wise work: the processors this process may use, unless torch was set to fewer."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), processors)) if device.type == "cpu" else 2


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch so many threads inside the block.

    More than the work can use are worse than none: OpenMP's idle threads spin, and on a busy machine everybody waits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a CUDA device this thread's own inside the block.

    Pinned memory and streams belong to the current device, which is the first one unless a thread says otherwise: a run
    on another card would take memory on that one too.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def prepare_process(files: int = 0) -> None:
    """Set this process's limits for streaming, which opens so many files at once.

    Open files: nine models of 200 shards are more than the usual 1024, and macOS has 256. Memory: glibc by and by
    stops giving freed matrices back to the system, and gives blocks back only to fault them in again; fixed thresholds
    keep the peak to what is in use.

    Raises:
        OutputError: The system does not allow so many open files.
    """
    needed = files + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Without end only if it is needed: there are programs that go through all descriptors that could be.
    most = max(needed, _MANY_FILES) if hard == resource.RLIM_INFINITY else min(max(needed, _MANY_FILES), hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    if files and soft != resource.RLIM_INFINITY and needed > soft:
        raise OutputError(
            f"{needed:,} files have to be open at once, and this system allows {soft:,}",
            hint=f"allow more: ulimit -n {needed}; or have fewer and larger shards: {named('max_shard_size')}",
        )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 4 << 20)
        mallopt(trim_threshold, 64 << 20)


_MANY_FILES = 1 << 16
_OTHER_FILES = 32  # of Python, libraries, and what is written beside the weights

Result = TypeVar("Result")
_AHEAD = 8  # pieces that each worker may be ahead of what has been taken up


def in_parallel(source: Source, pieces: Pieces, work: Callable[[Piece, Loader], None]) -> None:
    """Do all pieces, in about the order given, on the source's workers; the first error stops them all."""
    with _serving(source, pieces, iter(pieces), work):
        pass


@contextlib.contextmanager
def _serving(
    source: Source, pieces: Pieces | Sample, ahead: Iterator[Piece], work: Callable[[Piece, Loader], None]
) -> Iterator[list[Future[None]]]:
    """Workers that do the pieces as they come from `ahead`, until none is left or the block ends in an error."""
    mutex, stop = threading.Lock(), threading.Event()
    capacity = pieces.largest

    def serve() -> None:
        try:
            with current(source.device):
                loader = Loader(source, capacity, capacity * 8, source.device)  # 8: the widest dtype there is
                while not stop.is_set():
                    with mutex:
                        piece = next(ahead, None)
                    if piece is None:
                        return
                    work(piece, loader)
        except BaseException:
            stop.set()
            raise

    workers = max(1, min(source.workers, len(pieces)))
    # One thread of torch's own to a worker: the workers fill the processors already.
    with threads(1), ThreadPoolExecutor(workers, "merge") as pool:
        futures = [pool.submit(serve) for _ in range(workers)]
        try:
            yield futures
            for future in futures:
                future.result()
        finally:
            stop.set()


def side_by_side(source: Source, tensors: Sequence[TensorPlan], work: Callable[[TensorPlan], None]) -> None:
    """Do whole tensors of modest size, each on one thread of torch's, as many at a time as the source has workers.

    The first error ends them all.
    """
    with threads(1), ThreadPoolExecutor(source.workers, "whole") as pool:
        futures = [pool.submit(work, tensor) for tensor in tensors]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(
    source: Source,
    pieces: Pieces | Sample,
    look: Callable[[Piece, Loader], Result],
    take: Callable[[Piece, Result], None],
) -> None:
    """Hand what `look` gives for each piece to `take`, in their order: sums of floats must not depend on the workers.

    `take` is called on this thread, as soon as the pieces before are there; workers come no further ahead than some
    pieces. A small result that stays where a worker has made it, amid blocks of memory that are used again and again,
    keeps them from being joined again: by and by, each block takes memory of its own.
    """
    results, over = queue.SimpleQueue[Any](), threading.Event()
    room = threading.Semaphore(_AHEAD * source.workers)
    early: dict[tuple[str, int], Result] = {}

    def admitted() -> Iterator[Piece]:
        for piece in pieces:
            room.acquire()  # before the piece is handed out: the one that all others wait for is always at work
            if over.is_set():
                return
            yield piece

    def work(piece: Piece, loader: Loader) -> None:
        results.put(((piece.tensor.name, piece.start), look(piece, loader)))

    with _serving(source, pieces, admitted(), work) as futures:
        for future in futures:
            future.add_done_callback(results.put)
        try:
            for piece in pieces:
                place = (piece.tensor.name, piece.start)
                while place not in early:
                    result = results.get()
                    if isinstance(result, Future):
                        result.result()  # the error it ended with, if any
                    else:
                        early[result[0]] = result[1]
                    del result
                take(piece, early.pop(place))
                room.release()
        finally:
            over.set()
            room.release()


def summed(source: Source, tensors: Sequence[TensorPlan], look: Callable[[Piece, Loader], Result]) -> dict[str, Result]:
    """What `look` gives for a tensor's pieces, added up, by tensor."""
    totals: dict[str, Any] = {}

    def add(piece: Piece, part: Any) -> None:
        # A copy: see `in_order`.
        totals[piece.tensor.name] = totals[piece.tensor.name] + part if piece.start else copy.deepcopy(part)

    in_order(source, Pieces(tensors, source.block), look, add)
    return totals


def source_of(plan: Plan, device: str) -> Source:
    """Where the plan's task vectors come from, on the device of that name.

    Raises:
        DeviceError: There is no such device.
    """
    place = find_device(device)
    return Source(plan, place, default_workers(place))
