"""About how long a merge takes: its work by formula, at rates that are measured on the device beforehand."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable

import torch

from modelmerge.engine.job import SMALL, Job
from modelmerge.engine.memory import beyond_device, needs_of, reads_of
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
    merged = {tensor.name: tensor for tensor in todo if tensor.action != "copy"}
    away = beyond_device(job) & merged.keys()
    work = besides + _total(job, (tensor for tensor in merged.values() if tensor.name not in away))
    work = sum((needs.work for needs in needs_of(job, todo)), work) + _reading(job, todo)
    wholes = [tensor for tensor in job.wholes() if tensor.name in merged]
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


def _reading(job: Job, todo: Tensors) -> Work:
    """Making task vectors of what is read, and adding them up.

    Those of adapters are as long as others, though less is read, and so are those of what an expert did not change.
    """
    plan = job.plan
    total = Work(moved=_MOVED * sum(plan.stored_bytes(t, experts=False) for t in todo if t.action == "copy"))
    for times, tensors in reads_of(job, todo):
        for tensor in tensors:
            infos = [expert.tensors.get(tensor.name) for expert in plan.experts_of(tensor)]
            changes = [info.change if info else None for info in infos if info is None or info.change is not None]
            rank = sum(change.rank for change in changes if change and change.low_rank)
            # Made once more; and products of narrow matrices reach half of the rate, at most.
            made = 2.0 * len(changes) * plan.stored_bytes(tensor, experts=False)
            moved = _MOVED * (plan.stored_bytes(tensor, experts=True) + made)
            total += Work(single=4.0 * tensor.numel * rank, moved=moved) * times
    return total


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


def _shortest(do: Callable[[], object]) -> float:
    """Seconds of the shortest of some runs, after one that sets things up; to look at a result waits for a device."""
    took: list[float] = []
    while len(took) <= _TIMES or sum(took) < _WHILE:
        start = time.perf_counter()
        if isinstance(result := do(), torch.Tensor):
            result.flatten()[0].item()
        took.append(time.perf_counter() - start)
    return min(took[1:])


@functools.cache
def _hash_rate() -> float:
    """Bytes that one thread hashes in a second."""
    content = bytes(1 << 21)
    return len(content) / _shortest(lambda: hashlib.sha256(content))
