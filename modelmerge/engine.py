"""Streams task vectors through a method: the only place that knows devices, dtypes, passes and workers.

The way of the data, for each piece of a tensor: the stored bytes of the base and of every expert are read; both are
widened to float32 (float64 where that is stored) and subtracted; the task vectors [T, *shape], float32 on the device,
go through the method; `theta_0` plus the merged task vector is rounded once, to the output's dtype, and written at
its final place in the output file.

Element-wise methods take tensors in blocks small enough to stay in the processor's cache; each worker thread reads,
computes and writes its own blocks, so that reading, maths and writing overlap and memory does not grow with the
tensors. Methods that need whole matrices get them one by one, with the next one being read and the last one being
written meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.header import DTYPE_BITS
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.writer import Staging
from modelmerge.errors import CheckpointError, DeviceError
from modelmerge.method import Context, Method, Survey
from modelmerge.plan import Plan, TensorPlan
from modelmerge.report import Reporter

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# Elements per block. On a CPU a worker's buffers should fit its share of the L2/L3 cache (measured: 64 Ki and 1 Mi
# elements cost 10 to 35 % more); a GPU wants blocks that are large against the launch of a kernel.
CPU_BLOCK = 1 << 18
CUDA_BLOCK = 1 << 24
# Matrices of up to so many elements go through a method on one thread: they are done before others have woken up.
SMALL = 1 << 18
# Anonymous memory of a process that has imported torch and the packages around it, in bytes, with room for the
# allocator's slack; measured 120 to 190 MB.
PROCESS_BYTES = 230_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """A merge, ready to run: the plan, the method with its options, and the method for the rest (if any)."""

    plan: Plan
    method: Method
    options: Any
    rest: tuple[Method, Any] | None
    weights: tuple[float, ...]
    device: torch.device
    workers: int  # threads for element-wise work

    @property
    def block(self) -> int:
        """Elements of a block of element-wise work."""
        return CPU_BLOCK if self.device.type == "cpu" else CUDA_BLOCK


@dataclass(slots=True)
class Findings:
    """What a run noticed: (tensor, expert, reason) for every expert that was left out of a tensor."""

    left_out: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a tensor's elements."""

    tensor: TensorPlan
    start: int
    stop: int
    whole: bool  # keep the tensor's shape; otherwise the run is flat


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


def passes(job: Job) -> int:
    """How many times the task vectors are read: once to merge, and once for each pass of the method's survey."""
    survey = job.method.survey(job.options)
    return 1 + (len(survey.passes) if survey else 0)


def bytes_read(job: Job) -> int:
    """Bytes of tensors that a run reads, all passes counted."""
    plan, merged = job.plan, job.plan.select("merge")
    once = sum(plan.stored_bytes(t, experts=True) for t in [*merged, *plan.select("rest")])
    again = (passes(job) - 1) * sum(plan.stored_bytes(t, experts=True) for t in merged)
    return once + again + sum(plan.stored_bytes(t, experts=False) for t in plan.select("copy"))


def peak_memory(job: Job) -> dict[str, int]:
    """The most anonymous memory that a run needs, in bytes: `host`, and `device` (0 on the CPU).

    Mapped files and the page cache are not counted; the run does not need them.
    """
    tasks, plan = len(job.plan.experts), job.plan
    merged = plan.select("merge")
    workspace = job.method.workspace(tasks)
    block = min(job.block, max((t.numel for t in plan.tensors.values()), default=0))
    # Bytes per element: task vectors and theta_0; the method's own; a survey's integers; stored bytes in and out.
    per_element = 4 * (tasks + 1) + max(4 * workspace, 24) + 8 + 4
    # A survey's counters: the totals of every worker, and the counters of the block each is at.
    counters = 2 * tasks * (1 << 16) * 8 if job.method.survey(job.options) else 0
    streaming = int(job.workers * (block * per_element + counters))
    whole = 0
    if merged and not job.method.blockwise(job.options):
        sizes = sorted((t.numel for t in merged), reverse=True)
        widest = max(model.tensors[t.name].nbytes for t in merged for model in (plan.base, *plan.experts))
        ahead = sizes[1] if len(sizes) > 1 else 0
        # At hand and being read ahead: task vectors and theta_0; then the method's own; one result being written.
        whole = int((sizes[0] + ahead) * 4 * (tasks + 1) + sizes[0] * 4 * (workspace + 1)) + 2 * widest
    working = max(streaming, whole)
    if job.device.type == "cpu":
        return {"host": PROCESS_BYTES + working, "device": 0}
    return {"host": PROCESS_BYTES + working, "device": working}


def run(job: Job, staging: Staging, reporter: Reporter) -> Findings:
    """Merge every tensor of the plan into the staging directory.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The output cannot be written.
    """
    _allow_many_files()
    findings = Findings()
    plan = job.plan
    survey = job.method.survey(job.options)
    merged = [t for t in plan.select("merge") if t.numel]
    todo = [t for t in merged if not staging.is_finished(t.name)]
    measured = _survey(job, survey, merged, reporter) if survey and todo else None

    blockwise = job.method.blockwise(job.options)
    streamed = [t for t in plan.tensors.values() if t.numel and not staging.is_finished(t.name)]
    if not blockwise:
        streamed = [t for t in streamed if t.action != "merge"]
    order = {name: i for i, name in enumerate(n for shard in plan.layout.shards for n in shard.tensors)}
    streamed.sort(key=lambda t: order[t.name])

    total = sum(plan.stored_bytes(t, experts=t.action != "copy") for t in streamed)
    if not blockwise:
        total += sum(plan.stored_bytes(t, experts=True) for t in todo)
    reporter.stage("merging", total)

    def merge_piece(piece: _Piece, loader: _Loader) -> None:
        if piece.tensor.action == "copy":
            data = loader.copy(piece)
        else:
            method, options = (job.method, job.options) if piece.tensor.action == "merge" else _known(job.rest)
            theta_0, taus = loader.load(piece, check=survey is None or piece.tensor.action == "rest")
            context = _context(job, piece.tensor, measured, findings)
            data = _finish(piece, theta_0, method.apply(taus, options, context))
        staging.write(piece.tensor.name, piece.start * _item_bytes(piece.tensor.out_dtype), _bytes(data))
        reporter.advance(_piece_bytes(plan, piece), piece.tensor.name)

    _in_parallel(job, list(_pieces(streamed, job.block)), merge_piece)
    if not blockwise:
        _run_whole(job, todo, measured, findings, staging, reporter, check=survey is None)
    return findings


def _survey(job: Job, survey: Survey, merged: Sequence[TensorPlan], reporter: Reporter) -> Tensor:
    totals: tuple[Tensor, ...] = ()
    size = sum(job.plan.stored_bytes(t, experts=True) for t in merged)
    for number, measure in enumerate(survey.passes):
        reporter.stage(f"measuring {number + 1}/{len(survey.passes)}", size)
        parts: dict[int, Tensor] = {}  # one running total per worker

        def add(piece: _Piece, loader: _Loader) -> None:
            _, taus = loader.load(piece, check=number == 0)  # noqa: B023 - used up before the loop goes on
            counts = measure(taus, totals)  # noqa: B023
            mine = threading.get_ident()
            parts[mine] = parts[mine].add_(counts) if mine in parts else counts  # noqa: B023
            reporter.advance(_piece_bytes(job.plan, piece), piece.tensor.name)

        _in_parallel(job, list(_pieces(merged, job.block)), add)
        totals = (*totals, torch.stack(list(parts.values())).sum(0))
    return survey.conclude(totals)


def _run_whole(
    job: Job,
    tensors: Sequence[TensorPlan],
    measured: Tensor | None,
    findings: Findings,
    staging: Staging,
    reporter: Reporter,
    *,
    check: bool,
) -> None:
    """Merge tensors that a method wants whole: read one ahead, write one behind."""
    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:

        def read(tensor: TensorPlan) -> tuple[Tensor, Tensor]:
            # A loader of its own: the pieces that the method works on must not be read over.
            piece = _Piece(tensor, 0, tensor.numel, whole=True)
            stored = max(model.tensors[tensor.name].nbytes for model in (job.plan.base, *job.plan.experts))
            return _Loader(job, tensor.numel, stored, torch.device("cpu")).load(piece, check=check)

        ahead: Future[tuple[Tensor, Tensor]] | None = reading.submit(read, tensors[0]) if tensors else None
        behind: Future[None] | None = None
        try:
            for i, tensor in enumerate(tensors):
                assert ahead is not None
                theta_0, taus = (t.to(job.device) for t in ahead.result())
                ahead = reading.submit(read, tensors[i + 1]) if i + 1 < len(tensors) else None
                context = _context(job, tensor, measured, findings)
                with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
                    delta = job.method.apply(taus, job.options, context)
                piece = _Piece(tensor, 0, tensor.numel, whole=True)
                data = _bytes(_finish(piece, theta_0, delta))
                if behind is not None:
                    behind.result()
                behind = writing.submit(staging.write, tensor.name, 0, data)
                reporter.advance(_piece_bytes(job.plan, piece), tensor.name)
            if behind is not None:
                behind.result()
        except BaseException:
            if ahead is not None:
                ahead.cancel()
            raise


class _Loader:
    """A thread's buffers, and the way from stored bytes to task vectors.

    Args:
        job: The merge.
        elements: Capacity: elements of the largest piece that will be loaded.
        stored: Capacity: bytes of the largest piece as any model stores it.
        device: Where `theta_0` and the task vectors shall be.
    """

    def __init__(self, job: Job, elements: int, stored: int, device: torch.device) -> None:
        self._models = (job.plan.base, *job.plan.experts)
        self._device = device
        pinned = device.type == "cuda"
        self._raw = torch.empty(stored, dtype=torch.uint8, pin_memory=pinned)
        self._theta_0 = torch.empty(elements, dtype=torch.float32, device=device)
        self._taus = torch.empty(len(job.plan.experts) * elements, dtype=torch.float32, device=device)

    def load(self, piece: _Piece, *, check: bool) -> tuple[Tensor, Tensor]:
        """`theta_0` [*shape], float32 or float64, and the task vectors [T, *shape], float32.

        Both lie in buffers that the next call writes over.

        Raises:
            CheckpointError: With `check`, a weight is NaN or Inf.
        """
        shape = piece.tensor.shape if piece.whole else (piece.stop - piece.start,)
        taus = self._taus[: len(self._models[1:]) * (piece.stop - piece.start)].view(len(self._models) - 1, *shape)
        theta_0 = self._widened(self._models[0], piece).view(shape)
        for tau, expert in zip(taus, self._models[1:], strict=True):
            stored = self._stored(expert, piece).view(shape)
            if torch.float64 in (stored.dtype, theta_0.dtype):
                tau.copy_(stored.double() - theta_0.double())
            else:
                tau.copy_(stored).sub_(theta_0)
        # One sum finds any NaN or Inf of base and experts, for both stay in a difference and in a sum. A sum that is
        # not finite may also be an overflow of finite numbers: look again, one model at a time.
        if check and not bool(taus.sum().isfinite()):
            self._refuse_nonfinite(piece)
        return theta_0, taus

    def copy(self, piece: _Piece) -> Tensor:
        """The base's own elements, flat, in the output's dtype (raw bytes where it stays the same)."""
        raw = self._read(self._models[0], piece)
        if piece.tensor.checked and not bool(raw.view(_TORCH_DTYPES[piece.tensor.dtype]).float().sum().isfinite()):
            self._refuse_nonfinite(piece, self._models[:1])
        if piece.tensor.out_dtype == piece.tensor.dtype:
            return raw
        return _rounded(piece, self._widened(self._models[0], piece))

    def _refuse_nonfinite(self, piece: _Piece, models: Sequence[Checkpoint] | None = None) -> None:
        for model in models or self._models:
            values = self._stored(model, piece)
            if not bool(values.isfinite().all()):
                kind = "NaN" if bool(values.isnan().any()) else "Inf"
                info = model.tensors[piece.tensor.name]
                raise CheckpointError(
                    f"{info.file}: tensor '{info.name}' of '{model.name}' holds {kind}",
                    hint=f"--exclude '{info.name}' copies it from the base unchecked, if that is meant to be so",
                )

    def _widened(self, model: Checkpoint, piece: _Piece) -> Tensor:
        """A model's elements, flat, in float32, or float64 where they are stored so; in a buffer, as `_stored`."""
        stored = self._stored(model, piece)
        if stored.dtype == torch.float64:
            return stored.clone()
        return self._theta_0[: len(stored)].copy_(stored)

    def _stored(self, model: Checkpoint, piece: _Piece) -> Tensor:
        """A model's elements, flat, as stored, on the device; in a buffer that the next call writes over."""
        return self._read(model, piece).view(_TORCH_DTYPES[model.tensors[piece.tensor.name].dtype]).to(self._device)

    def _read(self, model: Checkpoint, piece: _Piece) -> Tensor:
        info = model.tensors[piece.tensor.name]
        first, last = piece.start * _item_bytes(info.dtype), piece.stop * _item_bytes(info.dtype)
        raw = self._raw[: last - first]
        model.read_into(info, first, _buffer(raw))
        return raw


def _pieces(tensors: Sequence[TensorPlan], block: int) -> Iterator[_Piece]:
    for tensor in tensors:
        # Kinds that pack several elements into a byte are only ever copied, and are cut by bytes.
        count = tensor.numel * DTYPE_BITS[tensor.dtype] // 8 // _item_bytes(tensor.dtype)
        for start in range(0, count, block):
            yield _Piece(tensor, start, min(start + block, count), whole=False)


def _in_parallel(job: Job, pieces: Sequence[_Piece], work: Callable[[_Piece, _Loader], None]) -> None:
    """Do all pieces, in about the order given, on the job's workers; the first error stops them all."""
    queue, mutex, stop = iter(pieces), threading.Lock(), threading.Event()
    capacity = max((piece.stop - piece.start for piece in pieces), default=0)

    def serve() -> None:
        loader = _Loader(job, capacity, capacity * 8, job.device)  # 8: the widest dtype there is
        try:
            while not stop.is_set():
                with mutex:
                    piece = next(queue, None)
                if piece is None:
                    return
                work(piece, loader)
        except BaseException:
            stop.set()
            raise

    workers = max(1, min(job.workers, len(pieces)))
    # One thread of torch's own to a worker: the workers fill the processors already.
    with threads(1), ThreadPoolExecutor(workers, "merge") as pool:
        futures = [pool.submit(serve) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


def _context(job: Job, tensor: TensorPlan, measured: Tensor | None, findings: Findings) -> Context:
    def leave_out(expert: int, reason: str) -> None:
        findings.left_out.append((tensor.name, job.plan.experts[expert].name, reason))

    return Context(tensor=tensor.name, weights=job.weights, measured=measured, leave_out=leave_out)


def _finish(piece: _Piece, theta_0: Tensor, delta: Tensor) -> Tensor:
    return _rounded(piece, theta_0.add_(delta))


def _rounded(piece: _Piece, merged: Tensor) -> Tensor:
    """The merged values, flat, in the output's dtype, on the host.

    Raises:
        CheckpointError: A value does not fit the dtype.
    """
    dtype = _TORCH_DTYPES[piece.tensor.out_dtype]
    stored = merged.to(dtype)
    # As in loading: a sum first, a closer look only where it is not finite. Only float16 has a smaller range.
    if not bool((stored.float() if dtype == torch.float16 else merged).sum().isfinite()):
        if not bool(merged.isfinite().all()):
            raise CheckpointError(
                f"tensor '{piece.tensor.name}': the merged values are not finite", hint="use a smaller scale or step"
            )
        if not bool(stored.isfinite().all()):
            raise CheckpointError(
                f"tensor '{piece.tensor.name}': the merged values overflow {str(dtype).removeprefix('torch.')}",
                hint="store it wider: --dtype float32",
            )
    return stored.flatten().cpu()


def _bytes(data: Tensor) -> memoryview:
    return _buffer(data.view(torch.uint8))


def _buffer(data: Tensor) -> memoryview:
    array: Any = data.numpy()  # shares the tensor's memory
    return memoryview(array)


def _item_bytes(dtype: str) -> int:
    """Bytes of what a piece counts: an element, or a byte where elements are smaller."""
    return max(DTYPE_BITS[dtype] // 8, 1)


def _piece_bytes(plan: Plan, piece: _Piece) -> int:
    stored = plan.stored_bytes(piece.tensor, experts=piece.tensor.action != "copy")
    return stored * (piece.stop - piece.start) // max(piece.tensor.numel, 1)


def _known(rest: tuple[Method, Any] | None) -> tuple[Method, Any]:
    assert rest is not None, "the plan leaves tensors to a method for the rest that the job does not name"
    return rest


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


def _allow_many_files() -> None:
    """Raise the soft limit of open files: nine models of 200 shards are more than the usual 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
