"""A merge that is ready to run, and what it will need: devices, threads, bytes, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from modelmerge.engine.rounding import Rounding
from modelmerge.errors import DeviceError, UsageError
from modelmerge.method import Correction, Disentangler, Method, Survey
from modelmerge.methods._lambdas import Mode
from modelmerge.plan import Plan, TensorPlan
from modelmerge.vary import Setting, layer_of

# Elements per block. On a CPU a worker's buffers should fit its share of the L2/L3 cache (measured: 64 Ki and 1 Mi
# elements cost 10 to 35 % more); a GPU wants blocks that are large against the launch of a kernel.
CPU_BLOCK = 1 << 18
CUDA_BLOCK = 1 << 24
# Elements of each run of a sample: short, so that it takes something of every few rows, and long enough to be worth
# the trip.
SAMPLE_RUN = 1 << 14
# Matrices of up to so many elements go through a method on one thread: they are done before others have woken up.
SMALL = 1 << 18
# Matrices of up to so many elements are merged several at a time, each on one thread: products and decompositions of
# that size gain little from a second thread (1.2 x at 768 x 768), and memory is that of a few of them.
MODEST = 1 << 22
# Share of a device's free memory that is planned with; the rest is for fragments and the libraries' own.
_USABLE = 0.9
# Anonymous memory of a process that has imported torch and the packages around it, in bytes, with room for the
# allocator's slack; measured 120 to 190 MB.
PROCESS_BYTES = 230_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """Where task vectors come from: the models' plan, the device they go to, the threads that read them."""

    plan: Plan
    device: torch.device
    workers: int  # threads for element-wise work
    # By expert and tensor: norms of columns, which every piece of the tensor needs. [n], float64.
    norms: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def block(self) -> int:
        """Elements of a block of element-wise work."""
        return CPU_BLOCK if self.device.type == "cpu" else CUDA_BLOCK


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of a merge that one method takes.

    Args:
        name: The method's name.
        method: The method.
        options: Its options.
        tensors: What it merges, in the order of the output's bytes.
        glob: The names that a rule gave to it; None for the merge's own method and the one for the rest.
        for_survey: The options as its survey is told them, where something varies.
    """

    name: str
    method: Method
    options: Any
    tensors: tuple[TensorPlan, ...]
    glob: str | None = None
    for_survey: Any = None

    @property
    def rest(self) -> bool:
        """Whether it is for what a method for linear layers leaves."""
        return bool(self.tensors) and self.tensors[0].action == "rest"

    @property
    def survey(self) -> Survey | None:
        """The quantity of all its tensors together that the method needs."""
        return self.method.survey(self.options if self.for_survey is None else self.for_survey)

    @property
    def moments(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """What measures each of its tensors before the method takes it, if anything."""
        return self.method.moments(self.options)

    @property
    def blockwise(self) -> bool:
        """Whether the method takes tensors cut into blocks, anywhere or by rows."""
        return self.method.blockwise(self.options) or self.by_rows

    @property
    def by_rows(self) -> bool:
        """Whether the method takes blocks of whole rows only."""
        return not self.method.blockwise(self.options) and self.method.by_rows(self.options)

    def surveyed(self) -> list[TensorPlan]:
        """The tensors that count in its survey: those it merges, tied ones once; those that are measured."""
        once = self.moments is None
        return [tensor for tensor in self.tensors if tensor.numel and not (once and tensor.twin is not None)]

    def reads(self) -> float:
        """How many times the task vectors are read before they are merged."""
        measured = float(self.moments is not None)
        return self.survey.reads(sum(tensor.numel for tensor in self.surveyed())) if self.survey else measured


@dataclass(frozen=True)
class Job:
    """A merge, ready to run.

    Args:
        source: Where the task vectors come from.
        parts: The methods, each with the tensors that it merges; together they merge all that is not copied.
        weights: Each expert's weight.
        front: What disentangles the task vectors before they are merged, with its options, if anything.
        seed: The seed of random draws.
        settings: By tensor, what its method is told instead where something varies.
        scales: By tensor, the factor on the task vectors before anything but disentangling, where it is not 1.
        larv: LARV finds these factors, layer by layer.
        task_lambda: How each expert's weight is made task-aware on each tensor, if it is.
    """

    source: Source
    parts: tuple[Part, ...]
    weights: tuple[float, ...]
    front: tuple[Disentangler, Any] | None
    seed: int = 0
    settings: Mapping[str, Setting] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    larv: bool = False
    task_lambda: Mode | None = None

    @property
    def plan(self) -> Plan:
        """What happens to each tensor."""
        return self.source.plan

    @cached_property
    def _takers(self) -> dict[str, Part]:
        return {tensor.name: part for part in self.parts for tensor in part.tensors}

    def part(self, tensor: TensorPlan) -> Part:
        """The part that merges the tensor."""
        return self._takers[tensor.name]

    def options_of(self, tensor: str) -> Any:
        """What the tensor's method is told for it."""
        return self.settings[tensor].options if tensor in self.settings else self._takers[tensor].options

    def merged(self) -> list[TensorPlan]:
        """All that is merged, in the order of the output's bytes."""
        return [tensor for tensor in self.plan.in_order() if tensor.action != "copy"]

    def wholes(self) -> list[TensorPlan]:
        """The tensors that their method wants whole."""
        return [tensor for part in self.parts if not part.blockwise for tensor in part.tensors]

    def looked_at(self) -> list[TensorPlan]:
        """The matrices by which LARV tells layers apart: linear layers' weights in numbered ones, tied ones once."""
        linear = [tensor for tensor in self.merged() if tensor.linear and tensor.numel and tensor.twin is None]
        return [tensor for tensor in linear if layer_of(tensor.name)] if self.larv else []

    def disentangled(self) -> list[TensorPlan]:
        """The tensors whose task vectors are disentangled before they are merged."""
        return [tensor for tensor in self.merged() if tensor.linear] if self.front else []


@dataclass(slots=True)
class Findings:
    """What a run noticed.

    `left_out`: (tensor, expert, reason) for every expert that was left out of a tensor. `figures`: by tensor, what
    the method told of its work there. `rounding`: what storing in 16 bits lost, where anything is stored so. `merged`:
    the tensors that this run merged, and no interrupted one before it.
    """

    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    lambdas: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rounding: Rounding | None = None
    merged: int = 0


def find_device(name: str) -> torch.device:
    """The device of that name: cpu, cuda, cuda:N, or auto (a CUDA device if there is one).

    Raises:
        DeviceError: It is not there, or is no device modelmerge knows.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise DeviceError(f"--device '{name}' is no device", hint="use cpu, cuda, cuda:0, cuda:1, ... or auto")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        have = f"there {'is' if count == 1 else 'are'} {count}" if count else "this torch sees none"
        raise DeviceError(f"--device {name}: no such CUDA device; {have}", hint="use --device cpu or auto")
    return torch.device("cuda", int(number or 0))


def default_workers(device: torch.device) -> int:
    """Threads for element-wise work: the processors this process may use, unless torch was told fewer."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), processors)) if device.type == "cpu" else 2


def passes(job: Job) -> float:
    """How many times task vectors are read at most: to merge, and for all that has to be known before."""
    before = front_reads(job.front, job.disentangled()) + job.larv + (job.task_lambda is not None)
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
    apart, once = job.disentangled(), [*job.merged(), *job.looked_at(), *(job.merged() if job.task_lambda else [])]
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
    spectra = spectra_bytes(job)
    working, on_device = max(streaming, whole, spectra), max(on_device, spectra)
    on_device = 0 if device.type == "cpu" else max(streaming, on_device)
    return {"host": PROCESS_BYTES + working, "device": on_device}


def spectra_bytes(job: Job) -> int:
    """Bytes that LARV takes: of two matrices the task vectors and the base, of one of them Gram matrices."""
    tasks, matrices = len(job.plan.experts), job.looked_at()
    largest = max((tensor.numel for tensor in matrices), default=0)
    widest = max((model.stored_bytes(t.name) for t in matrices for model in job.plan.models), default=0)
    # Two matrices in float64, their Gram matrices, and an eigendecomposition with LAPACK's workspace.
    side = max((min(tensor.shape) for tensor in matrices), default=0)
    return largest * (2 * 4 * (tasks + 1) + 2 * 8) + 2 * widest + 8 * 12 * side**2 + unfolding(job.plan, largest)


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


def prepare_process() -> None:
    """Set this process's limits for streaming.

    Open files: nine models of 200 shards are more than the usual 1024. Memory: glibc by and by stops giving freed
    matrices back to the system, and gives blocks back only to fault them in again; fixed thresholds keep the peak to
    what is in use.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 4 << 20)
        mallopt(trim_threshold, 64 << 20)
