"""About how long a merge takes: its work by formula, at rates that are measured on the device beforehand."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable

import torch

from modelmerge.engine.job import SMALL, Job
from modelmerge.engine.memory import beyond_device, bytes_read, needs_of
from modelmerge.engine.parallel import threads
from modelmerge.engine.units import work_of
from modelmerge.methods.work import NOTHING, Work
from modelmerge.plan.tensors import TensorPlan, Tensors

# Bytes that are moved for each that is read: widened, subtracted, scaled, added up, stored.
_MOVED = 6.0
# The side of the matrices that rates are measured on, at most: larger ones do not go much faster.
_LEAST_SIDE, _MOST_SIDE = 64, 512
_LONG = 1 << 22  # entries of a vector that fits in no cache
# Runs of each kind of work, of which the shortest counts: so many at least, and for so many seconds. On a busy machine
# short runs are broken off by others now and then, but not each of many.
_TIMES, _WHILE = 3, 0.02


def seconds(job: Job, todo: Tensors, besides: Work = NOTHING) -> float | None:
    """About how long the merge of `todo` and some work `besides` takes; within a factor of two on a CPU.

    Start and downloads are not in it. Matrices that do not fit on the device are counted at the CPU's rates. None where
    the device has no memory left to measure its rates in.
    """
    names = {tensor.name for tensor in todo}
    wholes = [tensor for tensor in job.wholes() if tensor.name in names]
    away = beyond_device(job) & names
    work = _total(job, (tensor for tensor in wholes if tensor.name not in away))
    work = sum((needs.work for needs in needs_of(job, todo)), work + besides) + Work(
        moved=_MOVED * bytes_read(job, todo)
    )
    side = max((min(tensor.row, tensor.numel // tensor.row) for tensor in wholes if tensor.numel), default=0)
    try:
        rates = rates_of(job.source.device, min(max(side, _LEAST_SIDE), _MOST_SIDE))
    except torch.OutOfMemoryError:
        return None
    hashed = sum(stat.st_size for model in job.plan.models for stat in model.files.values())
    return work.seconds(rates) + seconds_on_cpu(job, away) + hashed / _hash_rate() / job.source.workers


def seconds_on_cpu(job: Job, names: Iterable[str]) -> float:
    """About how long these tensors take on the CPU."""
    tensors = [job.plan.tensors[name] for name in names]
    return _total(job, tensors).seconds(rates_of(torch.device("cpu"), _MOST_SIDE)) if tensors else 0.0


def _total(job: Job, tensors: Iterable[TensorPlan]) -> Work:
    return sum((work_of(job, tensor) for tensor in tensors), NOTHING)


@functools.cache
def rates_of(device: torch.device, side: int) -> Work:
    """What a device does of each kind of work in a second; it takes some tenths of one to find out.

    `side`: of the matrices that are multiplied and decomposed.
    """
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(device)
    fine, long = x.double(), torch.zeros(_LONG, device=device)
    gram, doubled = fine @ fine.T, torch.empty_like(long)
    product = 2.0 * side**3
    with threads(1 if side**2 <= SMALL else torch.get_num_threads()):  # as in a merge
        return Work(
            product / _shortest(lambda: x @ x),
            product / _shortest(lambda: fine @ fine),
            9.0 * side**3 / _shortest(lambda: torch.linalg.eigh(gram).eigenvalues),
            3.0 * long.nbytes / _shortest(lambda: torch.add(long, long, out=doubled)),
        )


def _shortest(do: Callable[[], torch.Tensor]) -> float:
    """Seconds of the shortest of some runs, after one that sets things up; to look at a result waits for a device."""
    took: list[float] = []
    while len(took) <= _TIMES or sum(took) < _WHILE:
        start = time.perf_counter()
        do().flatten()[0].item()
        took.append(time.perf_counter() - start)
    return min(took[1:])


@functools.cache
def _hash_rate() -> float:
    """Bytes that one thread hashes in a second."""
    content, start = bytes(1 << 22), time.perf_counter()
    hashlib.sha256(content)
    return len(content) / (time.perf_counter() - start)
