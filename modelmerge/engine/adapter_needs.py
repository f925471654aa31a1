"""What a merge into an adapter needs: bytes of memory and on the disk, bytes that it reads, work."""

from __future__ import annotations

from collections.abc import Mapping

from modelmerge.checkpoint.as_lora import Role, Size
from modelmerge.checkpoint.header import DTYPE_BITS
from modelmerge.engine.job import Job
from modelmerge.engine.memory import PRODUCT_RUN, Bytes, bytes_read, peak, survey, unfolding
from modelmerge.engine.units import directions_of_sum
from modelmerge.methods import leading, work
from modelmerge.methods.work import NOTHING, Work

Table = Mapping[str, Role]  # what becomes of each tensor
Sums = Mapping[str, int]  # what `of_factors` gives


def of_factors(job: Job, table: Table) -> dict[str, int]:
    """The tensors that are made of the experts' factors alone, or not at all, and how many directions they have."""
    few = {tensor.name: directions_of_sum(job, tensor) for tensor in job.merged()}
    return {name: k for name, k in few.items() if k is not None and (not k or table[name].kind == "low rank")}


def adapter_memory(job: Job, sums: Sums, size: Size) -> dict[str, int]:
    """The most anonymous memory that a merge into an adapter needs, in bytes, as `peak_memory` has it."""
    return peak(job, survey(job), merge_into_adapter(job, sums, size))


def merge_into_adapter(job: Job, sums: Sums, size: Size) -> Bytes:
    """Merging matrix by matrix, each then split into factors."""
    tasks, plan, needed = len(job.plan.experts), job.plan, [0]
    for name, k in sums.items():
        # The experts' factors, orthonormal bases of them with LAPACK's copies, the new ones; cores and what splits one.
        bases = 8 * sum(plan.tensors[name].shape) * 4 * (k + (size.rank or k)) if k else 0
        needed.append(bases + 8 * (tasks + 14) * k * k)
    tensors = [tensor for tensor in job.merged() if tensor.name not in sums]
    workspace = max(group.method.workspace(group.options, tasks) for group in job.groups)
    largest = max((t.numel for t in tensors), default=0)
    widest = max((model.stored_bytes(t.name) for t in tensors for model in plan.models), default=0)
    # Task vectors, theta_0 and the merged one, the method's own, bytes as stored.
    needed.append(int(largest * 4 * (tasks + 2 + workspace)) + 2 * widest + unfolding(plan, largest))
    # The merged one in float64 with its factors, and the eigendecomposition: see `write_factors`. A small rank of a
    # large matrix needs some vectors of that number.
    for m, n in (t.shape for t in tensors if len(t.shape) == 2):
        exact = size.rank is None or not leading.iterates((m, n), size.rank)
        vectors = 8 * 6 * (m + n) * (size.rank or 0) + 24 * PRODUCT_RUN
        needed.append(4 * m * n + (m * n * 8 * 5 + 8 * 9 * min(m, n) ** 2 if exact else vectors))
    return Bytes(max(needed), max(needed))


def adapter_reads(job: Job, table: Table, *, streamed: bool = False) -> int:
    """Bytes of tensors that a merge into an adapter reads; or only from models that are streamed."""
    plan, sums = job.plan, of_factors(job, table)
    in_all, in_base = (
        sum(plan.stored_bytes(plan.tensors[name], experts=experts, streamed=streamed) for name in sums)
        for experts in (True, False)
    )
    return bytes_read(job, [t for t in job.merged() if t.name not in sums], streamed=streamed) + in_all - in_base


def adapter_work(job: Job, table: Table, sums: Sums, size: Size) -> Work:
    """Splitting the merged task vectors into factors, and finding out what these miss."""
    total = NOTHING
    for tensor in job.merged():
        k = sums.get(tensor.name)
        if table[tensor.name].kind != "low rank" or k == 0:
            continue
        m, n = tensor.shape
        rank = min(size.rank or k or m, m, n)
        if k is not None:
            total += Work(double=4.0 * (m + n) * (3 * k**2 + rank**2)) + work.eigen(k)
        else:
            quick = size.rank is not None and leading.iterates((m, n), rank)
            split = work.iterated(m, n, rank) * 2.0 if quick else work.triplets(m, n, rank)
            total += split + work.fine_product(m, rank, n)
    return total


def adapter_bytes(job: Job, table: Table, size: Size, dtype: str) -> int:
    """The most bytes on the disk that the adapter can have."""
    total, sums = 0, of_factors(job, table)
    for tensor in job.merged():
        role, directions = table[tensor.name], sums.get(tensor.name)
        if directions == 0:
            continue
        if role.kind == "low rank":
            m, n = tensor.shape
            total += min(size.rank or directions or m, m, n) * (m + n) * DTYPE_BITS[dtype] // 8
        elif role.kind != "no place":
            total += tensor.numel * DTYPE_BITS[tensor.out_dtype] // 8
    return total
