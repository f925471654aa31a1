"""What a run needs: bytes of memory, host and device, and bytes that it reads. One function for each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modelmerge.checkpoint.as_lora import Role, Size
from modelmerge.checkpoint.header import DTYPE_BITS
from modelmerge.engine.job import MODEST, Job, Source
from modelmerge.errors import UsageError
from modelmerge.methods import linalg
from modelmerge.methods.contract import Correction, Disentangler
from modelmerge.plan.tensors import Plan, TensorPlan

_ROWS = 1 << 22  # elements of a product that is made only to be measured


def adapted_memory(job: Job, wanted: Size) -> dict[str, int]:
    """The most anonymous memory that `adapt` needs, in bytes, `host` and `device`."""
    tasks, plan = len(job.plan.experts), job.plan
    todo = job.merged()
    workspace = max(part.method.workspace(tasks) for part in job.parts)
    largest = max((t.numel for t in todo), default=0)
    widest = max((model.stored_bytes(t.name) for t in todo for model in plan.models), default=0)
    # Task vectors, theta_0 and the merged one, the method's own, bytes as stored.
    merging = int(largest * 4 * (tasks + 2 + workspace)) + 2 * widest + unfolding(plan, largest)
    # The merged one in float64 with its factors, and the eigendecomposition: see `vector_memory`. A small rank of a
    # large matrix needs some vectors of that number.
    splitting = 0
    for m, n in (t.shape for t in todo if len(t.shape) == 2):
        exact = wanted.rank is None or not linalg.iterates((m, n), wanted.rank)
        needed = m * n * 8 * 5 + 8 * 9 * min(m, n) ** 2 if exact else 8 * 6 * (m + n) * (wanted.rank or 0) + 24 * _ROWS
        splitting = max(splitting, 4 * m * n + needed)
    working = max(merging, splitting)
    return {"host": PROCESS_BYTES + working, "device": 0 if job.source.device.type == "cpu" else working}


def adapted_bytes(job: Job, table: Mapping[str, Role], wanted: Size, dtype: str) -> int:
    """The most bytes that the adapter can have."""
    total = 0
    for tensor in job.plan.tensors.values():
        role = table[tensor.name]
        if tensor.action != "copy" and role.kind == "low rank":
            m, n = tensor.shape
            total += min(wanted.rank or m, m, n) * (m + n) * DTYPE_BITS[dtype] // 8
        elif tensor.action != "copy" and role.kind != "no place":
            total += tensor.numel * DTYPE_BITS[tensor.out_dtype] // 8
    return total


def finding_memory(job: Job) -> dict[str, int]:
    """The most anonymous memory that finding weights needs beside the data and the module's activations, in bytes.

    `host`, and `device` (0 on the CPU).
    """
    tensors, tasks = [t for t in job.merged() if t.twin is None], len(job.plan.experts)
    fitting, kept = front_memory(job.source, job.front, job.disentangled())
    # theta_0 and the task vectors, the merged model, and its gradient or, before, a module's own weights.
    models = 4 * (tasks + 3) * sum(t.numel for t in tensors)
    # Two tensors at a time on their way from the files, as stored and as float32.
    reading = 2 * max((t.numel * (4 * (tasks + 1) + 8) for t in tensors), default=0)
    working = max(models + reading, fitting) + kept
    if job.source.device.type == "cpu":
        return {"host": PROCESS_BYTES + working, "device": 0}
    return {"host": PROCESS_BYTES + max(reading, fitting) + kept, "device": models + reading + kept}


def finding_reads(job: Job) -> tuple[float, int]:
    """How many times the task vectors are read to find weights, before those that merge them, and the bytes of that."""
    copied = sum(job.plan.stored_bytes(tensor, experts=False) for tensor in job.plan.select("copy"))
    return passes(job), bytes_read(job) - copied


def refuse_finding_beyond_memory(job: Job) -> None:
    """Refuse models that would not fit in memory together, before any work.

    Raises:
        UsageError: With the bytes they need and the bytes there are.
    """
    free = free_memory(job.source.device)
    needed = finding_memory(job)["host" if job.source.device.type == "cpu" else "device"]
    if free is not None and needed > free:
        raise UsageError(
            f"finding weights on data holds the base, {len(job.plan.experts)} task vectors and the merged model in "
            f"memory: {needed:,} bytes, and {free:,} are free on {job.source.device}",
            hint="other methods stream the models: `modelmerge merge` lists them",
        )


# Share of a device's free memory that is planned with; the rest is for fragments and the libraries' own.
_USABLE = 0.9


# Anonymous memory of a process that has imported torch and the packages around it, in bytes, with room for the
# allocator's slack; measured 120 to 190 MB.
PROCESS_BYTES = 230_000_000


def passes(job: Job) -> float:
    """How many times task vectors are read at most: to merge, and for all that has to be known before."""
    before = front_reads(job.front, job.disentangled())
    return 1.0 + max((part.reads() for part in job.parts), default=0.0) + before


def front_reads(front: tuple[Disentangler, Any] | None, tensors: Sequence[TensorPlan]) -> float:
    """How many times the tensors' task vectors are read to find out how they are disentangled."""
    if front is None:
        return 0.0
    chosen, options = front
    survey = chosen.by.survey(options) if isinstance(chosen.by, Correction) else None
    return 1.0 + (survey.reads(sum(tensor.numel for tensor in tensors if tensor.twin is None)) if survey else 0.0)


def scratch_bytes(source: Source, front: tuple[Disentangler, Any] | None, tensors: Sequence[TensorPlan]) -> int:
    """Bytes that matrices take on the disk while they wait for the merge."""
    if front is None or not isinstance(front[0].by, Correction):
        return 0
    count = front[0].by.matrices(front[1], len(source.plan.experts))
    return sum(matrix_bytes(tensor, count) for tensor in tensors)


def matrix_bytes(tensor: TensorPlan, count: int) -> int:
    """Bytes of so many float32 matrices of the tensor's shape."""
    return 4 * tensor.numel * count


def bytes_read(job: Job, *, streamed: bool = False) -> int:
    """Bytes of tensors that a run reads, all passes counted; or only from models that are streamed."""
    plan = job.plan
    apart, once = job.disentangled(), job.merged()
    fitting = front_reads(job.front, apart)
    times = [(1.0, once), (fitting, apart), *((part.reads(), part.surveyed()) for part in job.parts)]
    read = sum(c * plan.stored_bytes(t, experts=True, streamed=streamed) for c, tensors in times for t in tensors)
    return int(read) + sum(plan.stored_bytes(t, experts=False, streamed=streamed) for t in plan.select("copy"))


def peak_memory(job: Job) -> dict[str, int]:
    """The most anonymous memory that a run needs, in bytes: `host`, and `device` (0 on the CPU).

    Mapped files and the page cache are not counted; the run does not need them.
    """
    tasks, plan, device = len(job.plan.experts), job.plan, job.source.device
    workspace = max((part.method.workspace(tasks) for part in job.parts), default=0.0)
    block = min(job.source.block, max((t.numel for t in plan.tensors.values()), default=0))
    block = max([block, *(t.row for part in job.parts if part.by_rows for t in part.tensors)])
    # Bytes per element: task vectors and theta_0; the method's own; a survey's integers; stored bytes in and out.
    per_element = 4 * (tasks + 1) + max(4 * workspace, 24) + 8 + 4
    # A survey's counters: the totals of every worker, and the counters of the block each is at.
    counters = 2 * tasks * (1 << 16) * 8 if any(part.survey for part in job.parts) else 0
    fitting, kept = front_memory(job.source, job.front, job.disentangled())
    from_factors = unfolding(plan, block)
    streaming = max(int(job.source.workers * (block * per_element + counters + from_factors)), fitting) + kept
    whole = on_device = 0
    wholes = job.wholes()
    if wholes:
        widest = max(model.stored_bytes(t.name) for t in wholes for model in plan.models)
        whole = _whole_bytes(job, wholes) + 2 * widest + kept + unfolding(plan, max(t.numel for t in wholes))
        left = beyond_device(job)
        on_device = _whole_bytes(job, [t for t in wholes if t.name not in left])
    working = max(streaming, whole)
    on_device = 0 if device.type == "cpu" else max(streaming, on_device)
    return {"host": PROCESS_BYTES + working, "device": on_device}


def together(source: Source, tensor: TensorPlan) -> bool:
    """Whether a whole tensor is worked on beside others, by one thread each."""
    return source.device.type == "cpu" and tensor.numel <= MODEST


def _whole_bytes(job: Job, tensors: Sequence[TensorPlan]) -> int:
    """Bytes that merging whole tensors takes."""
    tasks = len(job.plan.experts)

    def own(tensor: TensorPlan) -> float:
        """The method's own: copies of the tensor, and squares of its width."""
        method = job.part(tensor).method
        return tensor.numel * 4 * method.workspace(tasks) + 8 * method.squares * _width(tensor, tasks) ** 2

    return _bytes_of_wholes(job.source, tensors, own)


def _bytes_of_wholes(source: Source, tensors: Sequence[TensorPlan], own: Callable[[TensorPlan], float]) -> int:
    """Bytes that work on whole tensors takes, `own` being what it takes beside the task vectors and its result.

    Of those in turn: two as task vectors, one of them in the method's hands, one result. Of those side by side: all
    that with one as task vectors, and what is read of it, for each worker.
    """
    tasks = len(source.plan.experts)
    in_turn = [t for t in tensors if not together(source, t)]
    sizes = [*sorted((t.numel for t in in_turn), reverse=True), 0, 0]
    one = (sizes[0] + sizes[1]) * 4 * (tasks + 1) + max((own(t) + 4 * t.numel for t in in_turn), default=0)
    beside = (t.numel * (4 * (tasks + 1) + 12) + own(t) for t in tensors if together(source, t))
    return int(max(one, source.workers * max(beside, default=0)))


def beyond_device(job: Job) -> frozenset[str]:
    """The tensors whose merge would not fit in the device's free memory beside the next one: the CPU merges those."""
    wholes = job.wholes()
    if job.source.device.type == "cpu" or not wholes:
        return frozenset()
    free = free_memory(job.source.device) or 0
    return frozenset(t.name for t in wholes if _whole_bytes(job, [t, t]) > _USABLE * free)


def correcting_beyond(source: Source, by: Correction, options: Any, tensors: Sequence[TensorPlan]) -> frozenset[str]:
    """The tensors whose correction would not fit in the device's free memory: it is found on the CPU."""
    if source.device.type == "cpu":
        return frozenset()
    free = free_memory(source.device) or 0
    return frozenset(t.name for t in tensors if _correcting_bytes(source, by, options, [t, t]) > _USABLE * free)


def _correcting_bytes(source: Source, by: Correction, options: Any, tensors: Sequence[TensorPlan]) -> int:
    workspace = by.workspace(options, len(source.plan.experts))
    return _bytes_of_wholes(source, tensors, lambda tensor: tensor.numel * 4 * workspace)


def _width(tensor: TensorPlan, tasks: int) -> int:
    return min(tensor.shape[1], tasks * tensor.shape[0]) if len(tensor.shape) == 2 else 0


def vector_memory(
    source: Source,
    front: tuple[Disentangler, Any] | None,
    tensors: Sequence[TensorPlan],
    decomposed: Sequence[TensorPlan] = (),
) -> dict[str, int]:
    """The most anonymous memory that writing task vectors needs, in bytes, `host` and `device`.

    `decomposed` are the matrices whose singular values or factors are computed.
    """
    tasks = len(source.plan.experts)
    linear = [tensor for tensor in tensors if tensor.linear] if front else []
    fitting, kept = front_memory(source, front, linear)
    block = min(source.block, max((t.numel for t in tensors), default=0))
    # Task vectors and theta_0, their float64 copy for inner products, the redundant vector, stored bytes in and out.
    streaming = source.workers * (block * (4 * (tasks + 1) + 8 * tasks + 16 + 12) + unfolding(source.plan, block))
    whole = 0
    if decomposed:
        largest = max(decomposed, key=lambda tensor: tensor.numel)
        side = max(min(tensor.shape) for tensor in decomposed)
        # All task vectors of one matrix as stored and read, one of them in float64 with its factors and their product;
        # and the Gram matrix's eigendecomposition with LAPACK's workspace, measured at eight to ten such matrices.
        whole = largest.numel * (4 * (tasks + 3) + 8 * 5) + 8 * 10 * side * side
        whole += unfolding(source.plan, largest.numel)
    working = max(streaming, fitting, whole) + kept
    return {"host": PROCESS_BYTES + working, "device": 0 if source.device.type == "cpu" else working}


def unfolding(plan: Plan, elements: int) -> int:
    """Bytes that making so many elements of a task vector out of factors takes: the factors and their product."""
    changes = [i.change for e in plan.experts for i in e.tensors.values() if i.change is not None and i.change.factors]
    factors = max((8 * sum(part.numel for part in change.factors or ()) for change in changes), default=0)
    factors *= len(plan.experts)
    # DoRA: the product again with the base's rows, for norms; two factors for each element.
    each = 4 * bool(changes) + 16 * any(change.magnitude is not None for change in changes)
    return factors + each * elements


def front_memory(
    source: Source, front: tuple[Disentangler, Any] | None, tensors: Sequence[TensorPlan]
) -> tuple[int, int]:
    """Bytes that disentangling needs while it fits, and bytes of coefficients that it keeps afterwards."""
    if front is None or not tensors:
        return 0, 0
    options, tasks = front[1], len(source.plan.experts)
    largest, total = max(t.numel for t in tensors), sum(t.numel for t in tensors)
    block = min(source.block, largest)
    if isinstance(front[0].by, Correction):
        by = front[0].by
        widest = max(model.stored_bytes(t.name) for t in tensors for model in source.plan.models)
        found = _correcting_bytes(source, by, options, tensors) + 2 * widest + unfolding(source.plan, largest)
        # Afterwards, the matrices of what each worker is at.
        at_once = source.workers * max([block, *(t.numel for t in tensors if together(source, t))])
        return found, 4 * by.matrices(options, tasks) * max(at_once, largest)
    rows = sum(t.shape[0] for t in tensors)
    kept = tasks * 8 * {"row": rows, "tensor": len(tensors), "model": 1}[options.granularity]
    if options.solver == "descent" and options.granularity != "row":
        elements = total if options.granularity == "model" else 2 * largest
        # Read as float32; iterated on in float64, with delta, its gradient and a temporary of each.
        return elements * (4 * (tasks + 1) + 8 * (2 * tasks + 4)), kept
    # Task vectors once more in float64, and some 24 arrays of T x T numbers for each row while it is solved.
    width = min(t.shape[1] for t in tensors)
    groups = -(-block // width) if options.granularity == "row" else 1
    return source.workers * (block * (12 * (tasks + 1) + 12) + groups * tasks * tasks * 8 * 24), kept


def refuse_too_large(source: Source, front: tuple[Disentangler, Any] | None, tensors: Sequence[TensorPlan]) -> None:
    """Refuse a descent on vectors that would not fit in memory, before any work.

    Raises:
        UsageError: With the bytes it needs and the bytes there are.
    """
    if front is None or isinstance(front[0].by, Correction):
        return
    needed, _ = front_memory(source, front, tensors)
    free = free_memory(source.device)
    if free is not None and needed > free:
        raise UsageError(
            f"disentangling whole vectors (--solver descent) needs {needed:,} bytes of memory, and {free:,} are free",
            hint="use --solver gram: it arrives at the same vector from T x T numbers",
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes of memory that are free on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # no such file on this system: the allocator will have to say it
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
