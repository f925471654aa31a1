"""What a run needs: bytes of memory, host and device, bytes on the disk, and bytes that it reads.

One function for each stage, named like it. A stage that changes its buffers changes its function here;
tests/engine/test_memory.py watches real processes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from modelmerge.checkpoint.header import Change
from modelmerge.devices import free_memory
from modelmerge.engine.batches import as_one, group
from modelmerge.engine.job import AHEAD, ALONE, MODEST, ON_HOST, ONE_BY_ONE, Job, Source
from modelmerge.engine.pieces import Sample
from modelmerge.engine.units import done_on
from modelmerge.errors import UsageError
from modelmerge.methods import selection
from modelmerge.methods.contract import Correction
from modelmerge.methods.work import NOTHING, Work
from modelmerge.plan.tensors import Plan, TensorPlan, Tensors

# Elements of a product that is made only to be measured, a run of rows at a time.
PRODUCT_RUN = 1 << 22
# Share of a device's free memory that is planned with; the rest is for fragments and the libraries' own.
_USABLE = 0.9
# Anonymous memory of a process that has imported torch and the packages around it, in bytes, with room for the
# allocator's slack; measured 120 to 190 MB, and 280 to 320 with the libraries of a build for cards.
_BUILT_FOR_CARDS = torch.version.cuda is not None or torch.version.hip is not None
PROCESS_BYTES = 360_000_000 if _BUILT_FOR_CARDS else 230_000_000
# A survey's integers: counters of each task vector, the most that any method has.
_COUNTERS = 1 << 18


class Bytes(NamedTuple):
    """Memory that a stage needs on the host and, where the work is done on a device, there."""

    host: int
    device: int


_NOTHING = Bytes(0, 0)


@dataclass(frozen=True, slots=True)
class Needs:
    """What fitting a transform takes, and what it keeps.

    `reads`: how many times which tensors' task vectors are read. `working`: memory while it fits. `resident`: bytes of
    memory in every pass after it. `scratch`: bytes on the disk. `work`: what it does beside reading.
    """

    reads: tuple[tuple[float, Tensors], ...] = ()
    working: Bytes = _NOTHING
    resident: int = 0
    scratch: int = 0
    work: Work = NOTHING


# Whole runs.


def peak_memory(job: Job) -> dict[str, int]:
    """The most anonymous memory that a merge needs, in bytes: `host`, and `device` (0 on the CPU).

    Mapped files and the page cache are not counted; the run does not need them.
    """
    return peak(job, survey(job), merge_blocks(job), merge_wholes(job))


def vector_memory(job: Job, tensors: Tensors, ranked: Tensors = (), factored: Tensors = ()) -> dict[str, int]:
    """The most anonymous memory that writing task vectors needs, in bytes, as `peak_memory` has it.

    Args:
        job: The models.
        tensors: Those that are written.
        ranked: Those whose singular values are found.
        factored: Those that are written as factors.
    """
    spectra = 8 * len(job.plan.experts) * sum(min(tensor.shape) for tensor in ranked)
    stages = (find_spectra(job.source, ranked), write_factors(job.source, factored))
    kept = (Bytes(stage.host + spectra, stage.device) for stage in stages)
    return peak(job, write_vectors(job.source, tensors), *kept)


def peak(job: Job, *stages: Bytes) -> dict[str, int]:
    """The most anonymous memory of a run of these stages, and of fitting the transforms, as `peak_memory` has it."""
    needs = needs_of(job)
    stages, resident = (*stages, *(each.working for each in needs)), sum(each.resident for each in needs)
    host, device = (max(column) + resident for column in zip(*stages, strict=True))
    return {"host": PROCESS_BYTES + host, "device": 0 if job.source.device.type == "cpu" else device}


def needs_of(job: Job, todo: Tensors | None = None) -> list[Needs]:
    """What each of the job's transforms needs, in their order, where `todo` alone is to be merged, or all."""
    return [transform.needs(job, job.taken(transform, todo)) for transform in job.transforms]


def scratch_bytes(job: Job, todo: Tensors | None = None) -> int:
    """Bytes on the disk while the run lasts."""
    return sum(needs.scratch for needs in needs_of(job, todo))


def passes(job: Job) -> float:
    """How many times task vectors are read at most: to merge, and before that."""
    fitting = sum(times for needs in needs_of(job) for times, _ in needs.reads)
    return 1.0 + max((group.reads() for group in job.groups), default=0.0) + fitting


def fitting_bytes(job: Job, todo: Tensors | None = None, *, streamed: bool = False) -> int:
    """Bytes of tensors that fitting the transforms reads; or only from models that are streamed."""
    return _bytes_of([pair for needs in needs_of(job, todo) for pair in needs.reads], job.plan, streamed=streamed)


def bytes_read(job: Job, todo: Tensors, *, streamed: bool = False) -> int:
    """Bytes of tensors that a merge of `todo` reads, all passes counted; or only from models that are streamed."""
    copies = (tensor for tensor in todo if tensor.action == "copy")
    copying = sum(job.plan.stored_bytes(tensor, experts=False, streamed=streamed) for tensor in copies)
    return _bytes_of(reads_of(job, todo), job.plan, streamed=streamed) + copying


def reads_of(job: Job, todo: Tensors) -> list[tuple[float, Tensors]]:
    """How many times which tensors of all models are read: to merge `todo`, and before that."""
    names = {tensor.name for tensor in todo}
    # What is measured over the model is measured over all of it.
    surveys = [(g.reads(), [t for t in g.surveyed() if g.survey or t.name in names]) for g in job.groups]
    fits = [pair for needs in needs_of(job, todo) for pair in needs.reads]
    return [(1.0, [tensor for tensor in todo if tensor.action != "copy"]), *surveys, *fits]


def _bytes_of(reads: Sequence[tuple[float, Tensors]], plan: Plan, *, streamed: bool) -> int:
    return int(sum(times * plan.stored_bytes(t, experts=True, streamed=streamed) for times, ts in reads for t in ts))


# Fitting transforms.


def fit_shared_vector(source: Source, tensors: Tensors, granularity: str) -> Needs:
    """Fitting a shared vector: Gram matrices, and coefficients from them."""
    if not tensors:
        return Needs()
    tasks, block = len(source.plan.experts), min(source.block, max(t.numel for t in tensors))
    resident = tasks * 8 * {"row": sum(t.shape[0] for t in tensors), "tensor": len(tensors), "model": 1}[granularity]
    # Row by row, each of a block's rows is solved while others are read: some 24 arrays of T x T numbers.
    groups = -(-block // min(t.shape[1] for t in tensors)) if granularity == "row" else 1
    taus_and_base, in_float64, bytes_as_stored = 4 * (tasks + 1), 8 * (tasks + 1), 12
    of_block = block * (taus_and_base + in_float64 + bytes_as_stored)
    working = source.workers * (of_block + groups * tasks * tasks * 8 * 24)
    return Needs(((1.0, tensors),), Bytes(working, working), resident)


def fit_correction(source: Source, tensors: Tensors, by: Correction, options: Any) -> Needs:
    """Fitting matrices that correct whole weights, which wait on the disk."""
    if not tensors:
        return Needs()
    count, largest = by.matrices(options, len(source.plan.experts)), max(t.numel for t in tensors)
    thresholds = by.survey(options)
    reads = 1.0 + (thresholds.reads(sum(t.numel for t in tensors if t.twin is None)) if thresholds else 0.0)
    widest = max(model.stored_bytes(t.name) for t in tensors for model in source.plan.models)
    working = _correction_bytes(source, tensors, by, options) + 2 * widest + unfolding(source.plan, largest)
    block = min(source.block, largest)
    if thresholds:
        working = max(working, _survey_bytes(source, block))
    # In later passes, the matrices of what each worker is at.
    at_once = source.workers * max([block, *(t.numel for t in tensors if together(source, t))])
    return Needs(
        ((reads, tensors),), Bytes(working, working), 4 * count * max(at_once, largest),
        sum(matrix_bytes(tensor, count) for tensor in tensors),
        sum((done_on(source.plan, t, functools.partial(by.work, options)) for t in tensors), NOTHING),
    )  # fmt: skip


def matrix_bytes(tensor: TensorPlan, count: int) -> int:
    """Bytes of so many float32 matrices of the tensor's shape."""
    return 4 * tensor.numel * count


def correction_beyond_device(source: Source, tensors: Tensors, by: Correction, options: Any) -> frozenset[str]:
    """The tensors of which two at a time would need more than the device's free memory: the CPU corrects those."""
    room = _room(source.device)
    return frozenset(t.name for t in tensors if _correction_bytes(source, [t, t], by, options) > room)


def _room(device: torch.device) -> float:
    return math.inf if device.type == "cpu" else _USABLE * (free_memory(device) or 0)


def _correction_bytes(source: Source, tensors: Tensors, by: Correction, options: Any) -> int:
    workspace = by.workspace(options, len(source.plan.experts))
    return _bytes_of_wholes(source, tensors, lambda tensor: tensor.numel * 4 * workspace)


def fit_coefficients(job: Job, tensors: Tensors, before: Sequence[Needs]) -> Needs:
    """Finding coefficients: whole models in memory, beside the data and the modules' activations.

    `before` are the needs of the transforms before it, which are fitted once more for it.
    """
    tasks = len(job.plan.experts)
    # theta_0 and the task vectors, the merged model, and its gradient or, before, a module's own weights.
    models = 4 * (tasks + 3) * sum(t.numel for t in tensors)
    # Two tensors at a time on their way from the files, as stored and as float32.
    reading = 2 * max((t.numel * (4 * (tasks + 1) + 8) for t in tensors), default=0)
    host = models + reading if job.source.device.type == "cpu" else reading
    return Needs((*(pair for needs in before for pair in needs.reads), (1.0, tensors)), Bytes(host, models + reading))


def refuse_beyond_memory(job: Job) -> None:
    """Refuse transforms whose fit would not fit in memory, before any work.

    Raises:
        UsageError: With the bytes it needs and the bytes there are.
    """
    place = "host" if job.source.device.type == "cpu" else "device"
    needed = peak(job)[place] if job.transforms else 0
    free = free_memory(job.source.device)
    if free is not None and needed > free:
        raise UsageError(
            f"finding weights on data holds the base, {len(job.plan.experts)} task vectors and the merged model in "
            f"memory: {needed:,} bytes, and {free:,} are free on {job.source.device}",
            hint="other methods stream the models: `modelmerge merge` lists them",
        )


# Surveys and merges.


def survey(job: Job) -> Bytes:
    """Surveys: blocks of task vectors, counted by integers."""
    if not any(group.survey for group in job.groups):
        return _NOTHING
    needed = _survey_bytes(job.source, _block(job))
    return Bytes(needed, needed)


def _survey_bytes(source: Source, block: int) -> int:
    tasks = len(source.plan.experts)
    taus_and_base, integers, bytes_as_stored = 4 * (tasks + 1), 24, 12
    # The totals of every worker and of them all, and the sums that the ranks are looked up in.
    counters = (source.workers + 4) * tasks * _COUNTERS * 8
    total = block * (taus_and_base + integers + bytes_as_stored) + unfolding(source.plan, block)
    return source.workers * total + counters


def merge_blocks(job: Job) -> Bytes:
    """Element-wise methods: a block for each worker."""
    tasks, block = len(job.plan.experts), _block(job)
    blockwise = (group for group in job.groups if group.blockwise)
    workspace = max((group.method.workspace(group.options, tasks) for group in blockwise), default=0.0)
    # At least what moments take of a block: some copies of it in float64.
    taus_and_base, of_method, bytes_as_stored = 4 * (tasks + 1), max(4 * workspace, 24), 12
    total = int(block * (taus_and_base + of_method + bytes_as_stored)) + unfolding(job.plan, block)
    working = job.source.workers * total + _gathered(job)
    return Bytes(working, working)


def _gathered(job: Job) -> int:
    """What is kept of tensors that are measured first: a sample of one, what lies near its two places, and places."""
    measured = [t.numel for g in job.groups if g.measures for t in g.tensors if not job.whole(t)]
    if not measured:
        return 0
    entries = min(int(selection.GATHERED * max(measured)), selection.MOST)
    places = min(int(selection.KEPT * max(measured)), selection.MOST // 2)
    return 4 * len(job.plan.experts) * (2 * entries + 3 * Sample.MOST) + 18 * places


def _block(job: Job) -> int:
    """Elements of the largest block."""
    block = min(job.source.block, max((t.numel for t in job.plan.tensors.values()), default=0))
    return max([block, *(t.row for group in job.groups if group.by_rows for t in group.tensors)])


def merge_wholes(job: Job) -> Bytes:
    """Methods that take whole tensors: modest ones side by side, large ones in turn, batches as one."""
    tensors = [as_one(batch) for batch in batches(job, job.wholes())]
    if not tensors:
        return _NOTHING
    widest = max(model.stored_bytes(t.name) for t in tensors for model in job.plan.models)
    host = _whole_bytes(job, tensors) + 2 * widest + unfolding(job.plan, max(t.numel for t in tensors))
    way_of = ways(job)
    ahead, alone, one_by_one = ([t for t in tensors if way_of[t.name] == way] for way in (AHEAD, ALONE, ONE_BY_ONE))
    if job.source.device.type != "cpu":  # copies that the device reads, of one on its way and of the one after it
        host += 2 * 4 * (len(job.plan.experts) + 1) * max((t.numel for t in (*ahead, *alone)), default=0)
    each = [*(_whole_bytes(job, [t]) for t in alone), *(_bytes_one_by_one(job, t) for t in one_by_one)]
    return Bytes(host, max([_whole_bytes(job, ahead), *map(int, each)]))


def together(source: Source, tensor: TensorPlan) -> bool:
    """Whether a whole tensor is worked on beside others, by one thread each."""
    return source.device.type == "cpu" and tensor.numel <= MODEST


def ways(job: Job) -> dict[str, str]:
    """How each tensor that comes whole is merged, by what the device's free memory has room for."""
    if job.source.device.type == "cpu":
        return dict.fromkeys((tensor.name for tensor in job.wholes()), AHEAD)
    room = _room(job.source.device)

    def way(tensor: TensorPlan) -> str:
        two, one = (_whole_bytes(job, [tensor] * count) for count in (2, 1))
        needed = {AHEAD: two, ALONE: one, ONE_BY_ONE: _bytes_one_by_one(job, tensor), ON_HOST: 0}
        return next(way for way, nbytes in needed.items() if nbytes <= room)

    return {tensor.name: way(tensor) for tensor in job.wholes()}


def beyond_device(job: Job) -> frozenset[str]:
    """The tensors whose merge would not fit in the device's free memory: the CPU merges those."""
    return frozenset(name for name, way in ways(job).items() if way == ON_HOST)


def _bytes_one_by_one(job: Job, tensor: TensorPlan) -> float:
    """Bytes that merging a tensor takes whose task vectors come one at a time; theta_0 and the result are there too."""
    group, tasks = job.group(tensor), len(job.plan.experts)
    held = group.method.one_by_one(group.options, *tensor.shape, tasks) if len(tensor.shape) == 2 else None
    return math.inf if held is None else 4 * (held + 2 * tensor.numel)


def batches(job: Job, tensors: Tensors) -> list[list[TensorPlan]]:
    """Whole tensors in batches that the device holds two at a time; on a CPU each is one."""
    if job.source.device.type == "cpu":
        return [[tensor] for tensor in tensors]
    way_of, room = ways(job), _room(job.source.device)
    return group(job, tensors, lambda one: way_of[one.name] == AHEAD and _whole_bytes(job, [one, one]) <= room)


def _whole_bytes(job: Job, tensors: Tensors) -> int:
    """Bytes that merging whole tensors takes."""
    tasks = len(job.plan.experts)

    def of_method(tensor: TensorPlan) -> float:
        """The method's own: copies of the tensor, and squares of its width."""
        group = job.group(tensor)
        copies = group.method.workspace(group.options, tasks)
        *batch, m, n = tensor.shape if len(tensor.shape) > 1 else (0, 0)
        squares = math.prod(batch) * group.method.squares(group.options, m, n, tasks)
        return tensor.numel * 4 * copies + 8 * squares

    return _bytes_of_wholes(job.source, tensors, of_method)


def _bytes_of_wholes(source: Source, tensors: Tensors, beside: Callable[[TensorPlan], float]) -> int:
    """Bytes that work on whole tensors takes, `beside` being what it takes beside the task vectors and its result.

    Of those in turn: two as task vectors, one of them in the method's hands, one result. Of those side by side: all
    that with one as task vectors, and what is read of it, for each worker.
    """
    tasks = len(source.plan.experts)
    in_turn = [t for t in tensors if not together(source, t)]
    sizes = [*sorted((t.numel for t in in_turn), reverse=True), 0, 0]
    one = (sizes[0] + sizes[1]) * 4 * (tasks + 1) + max((beside(t) + 4 * t.numel for t in in_turn), default=0)
    modest = (t.numel * (4 * (tasks + 1) + 12) + beside(t) for t in tensors if together(source, t))
    return int(max(one, source.workers * max(modest, default=0)))


# Task vectors as files.


def write_vectors(source: Source, tensors: Tensors) -> Bytes:
    """Measuring and writing task vectors, a block for each worker."""
    tasks, block = len(source.plan.experts), min(source.block, max((t.numel for t in tensors), default=0))
    # Task vectors and theta_0, their float64 copy for inner products, the shared vector, stored bytes in and out.
    per_element = 4 * (tasks + 1) + 8 * tasks + 16 + 12
    total = source.workers * (block * per_element + unfolding(source.plan, block))
    return Bytes(total, total)


def find_spectra(source: Source, tensors: Tensors) -> Bytes:
    """Singular values of matrices, one after the other: the Gram matrix, LAPACK's copy of it, and some for its own."""
    return _decomposed(source, tensors, 8, 3)


def write_factors(source: Source, tensors: Tensors) -> Bytes:
    """Factors of matrices, one after the other: their product in float64 and what it misses.

    And the Gram matrix's eigenvectors with LAPACK's workspace, measured at eight to ten such matrices.
    """
    return _decomposed(source, tensors, 8 * 4, 10)


def _decomposed(source: Source, tensors: Tensors, wide: int, squares: int) -> Bytes:
    """One expert's task vector of a matrix at a time, in float64 with what is made of it."""
    if not tensors:
        return _NOTHING
    largest, side = max(tensor.numel for tensor in tensors), max(min(tensor.shape) for tensor in tensors)
    stored = max(model.stored_bytes(tensor.name) for tensor in tensors for model in source.plan.models)
    # Beside it theta_0, both in float32, and the bytes as stored.
    reading = largest * 4 * 2 + stored + unfolding(source.plan, largest)
    working = largest * wide + 8 * squares * side * side
    return Bytes(reading + working, working + largest * 4)


def unfolding(plan: Plan, elements: int) -> int:
    """Bytes that making so many elements of a task vector out of factors takes: the factors and their product."""
    on_models = [part for model in plan.models for part in model.parts[1:]]
    infos = [info for expert in (*plan.experts, *on_models) for info in expert.tensors.values()]
    changes = [info.change for info in infos if info.change is not None and info.change.factored]
    factors = max((8 * _factor_elements(change) for change in changes), default=0) * len((*plan.experts, *on_models))
    # DoRA: the product again with the base's rows, for norms; two factors for each element.
    runs = [run.change for change in changes for _, run in change.runs if run.change is not None]
    each = 4 * bool(changes) + 16 * any(change.magnitude is not None for change in (*changes, *runs))
    each += 8 * any(change.product != "product" for change in (*changes, *runs))
    each += 12 * bool(on_models)  # the sum, its task vector, and the model's own bytes
    return factors + each * elements


def _factor_elements(change: Change) -> int:
    """Elements of all factors of a change, of those too that are made of others but for what is made row by row."""
    parts = [*(change.factors or ()), *(run for _, run in change.runs)]
    nested = sum(_factor_elements(part.change) for part in parts if part.change is not None)
    stored = () if change.product == "elementwise" else change.factors or ()
    return nested + sum(factor.numel for factor in stored)
