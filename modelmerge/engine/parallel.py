"""Threads, and work that is shared out among them."""

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
from torch import Tensor

from modelmerge import interrupts
from modelmerge.devices import current, find_device
from modelmerge.engine.job import SMALL, Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.pieces import Piece, Pieces, Sample
from modelmerge.errors import OutputError, named
from modelmerge.plan.tensors import Plan, TensorPlan

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 1024  # that torch is given because a file says so


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


def run_interruptibly(work: Callable[..., Result], x: Tensor, *more: Any) -> Result:
    """`work(x, *more)`, which a signal need not wait for: no decomposition of a matrix can be broken off.

    Small ones are done soon; and work on a device belongs to the thread that has chosen it.

    Raises:
        KeyboardInterrupt: A signal has come.
    """
    if x.device.type != "cpu" or x.numel() <= SMALL:
        return work(x, *more)
    return interrupts.abandonable(lambda: work(x, *more))


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
    trim_threshold, mmap_threshold = -1, -3
    # Above AT_ONCE elements in float32: what each small tensor takes anew would cost page faults.
    _ask_glibc("mallopt", mmap_threshold, 6 << 20)
    _ask_glibc("mallopt", trim_threshold, 64 << 20)


def give_memory_back() -> None:
    """Give the system the memory that work of another kind has left behind: some tens of megabytes."""
    _ask_glibc("malloc_trim", 0)


def _ask_glibc(function: str, *numbers: int) -> None:
    call = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if call is not None:
        call(*numbers)


_MANY_FILES = 1 << 16
_OTHER_FILES = 32  # of Python, libraries, and what is written beside the weights

_AHEAD = 8  # pieces that each worker may be ahead of what has been taken up


def in_parallel(source: Source, pieces: Pieces, work: Callable[[Piece, Loader], None]) -> None:
    """Do all pieces, in about the order given, on the source's workers; the first error stops them all."""
    with _serving(source, pieces, iter(pieces), work):
        pass


@contextlib.contextmanager
def _serving(
    source: Source, pieces: Pieces | Sample, ahead: Iterator[Item], work: Callable[[Item, Loader], None]
) -> Iterator[list[Future[None]]]:
    """Workers that do what comes from `ahead`, the pieces, until nothing is left or the block ends in an error."""
    mutex, stop = threading.Lock(), threading.Event()
    capacity = pieces.largest

    def serve() -> None:
        try:
            with current(source.device):
                loader = Loader(source, capacity, capacity * 8, source.device)  # 8: the widest dtype there is
                while not stop.is_set():
                    with mutex:
                        item = next(ahead, None)
                    if item is None:
                        return
                    work(item, loader)
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
    early: dict[int, Result] = {}  # by their place in the order: a sample of a small tensor has a run several times

    def admitted() -> Iterator[tuple[int, Piece]]:
        for item in enumerate(pieces):
            room.acquire()  # before the piece is handed out: the one that all others wait for is always at work
            if over.is_set():
                return
            yield item

    def work(item: tuple[int, Piece], loader: Loader) -> None:
        results.put((item[0], look(item[1], loader)))

    with _serving(source, pieces, admitted(), work) as futures:
        for future in futures:
            future.add_done_callback(results.put)
        try:
            for place, piece in enumerate(pieces):
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
