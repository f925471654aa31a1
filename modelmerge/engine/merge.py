"""Merging: every tensor of a plan, streamed through its method into the output."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import as_bytes
from modelmerge.checkpoint.staging import Staging
from modelmerge.devices import Sender, current
from modelmerge.engine.batches import load, stacked
from modelmerge.engine.job import AHEAD, ALONE, ONE_BY_ONE, SMALL, Findings, Job
from modelmerge.engine.loader import Loader, expert_values, loader_of, rounded, whole
from modelmerge.engine.memory import batches, together, ways
from modelmerge.engine.parallel import in_parallel, prepare_process, run_interruptibly, side_by_side, threads
from modelmerge.engine.pieces import Piece, Pieces, item_bytes
from modelmerge.engine.rounding import Rounding, squared, stored_narrow
from modelmerge.engine.transforms import Factors, FittedJob, fit
from modelmerge.engine.units import Alone, Crew, Unit, merge_work, piece_cost, shard_units
from modelmerge.errors import CheckpointError
from modelmerge.methods.contract import Apart, Context, Vectors, measured_at_once
from modelmerge.methods.options import is_linear
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

_REACH = 1 << 26  # bytes: little beside the memory that systems give to files, and what is measured may be some


class Written(Protocol):
    """What a merge writes into."""

    def write(self, tensor: str, offset: int, data: memoryview) -> object:
        """Write a piece of a tensor, `offset` bytes from its start; from any thread, in any order, each byte once."""


@dataclass(frozen=True, slots=True)
class _Output:
    """Where a merge goes, the findings of it, and by tensor a factor on its merged task vector."""

    staging: Written
    findings: Findings
    factors: Mapping[str, float]

    def write(self, piece: Piece, data: Tensor) -> None:
        """Write the piece's values, flat, as they are stored."""
        start = piece.start * item_bytes(piece.tensor.out_dtype)
        self.staging.write(piece.tensor.name, start, as_bytes(data))


_Merged = Iterator[tuple[_Output, Tensor]]
Batch = list[Piece]


def run(job: Job, staging: Staging, progress: Reporter) -> Findings:
    """Merge every tensor of the plan into the staging directory.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The output cannot be written.
        DeviceError: The device has too little memory left.
    """
    output = _Output(staging, nothing_found(job), {})
    _run(job, (output,), staging, progress)
    return output.findings


def run_shared(
    job: Job, crew: Crew, shard: Callable[[Unit], AbstractContextManager[Written]], progress: Reporter
) -> Findings:
    """Merge every tensor of the plan together with others.

    Args:
        job: The merge.
        crew: Who does its units.
        shard: The weight file of a unit, which is finished when the block ends.
        progress: Shows the progress.

    Raises:
        CheckpointError: As for `run`.
        OutputError: As for `run`.
    """
    prepare_process()
    todo = [tensor for tensor in job.plan.in_order() if tensor.numel]
    units = shard_units(job, todo)

    def merge_shard(unit: Unit) -> dict[str, Any]:
        findings = nothing_found(job)
        with shard(unit) as file:
            _merge(fitted, unit.tensors, (_Output(file, findings, {}),), progress)
        return findings.to_dict()

    findings = nothing_found(job)
    with current(job.source.device):
        fitted = fit(job, todo, crew, progress)
        _begin(units, progress)
        for _, part in crew.share(units, merge_shard):
            findings.add(part)
    return findings


def nothing_found(job: Job) -> Findings:
    """The findings of a run that has merged nothing yet."""
    return Findings(rounding=Rounding() if stored_narrow(job.plan) else None)


def run_scaled(jobs: Sequence[Job], option: str, stagings: Sequence[Staging], progress: Reporter) -> list[Findings]:
    """Several merges in one pass over the models: `run` for each, to the same bits.

    Args:
        jobs: They differ in nothing but that option of the merge's own method.
        option: One that is declared linear: the merged task vector is found once, at 1, and multiplied for each.
        stagings: Where each goes.
        progress: Shows the progress.

    Raises:
        CheckpointError: As for `run`.
        OutputError: As for `run`.
    """
    linear = [group for group in jobs[0].groups if is_linear(group.method, option)]
    names = {tensor.name for group in linear for tensor in group.tensors}

    def at_one(holder: Any) -> Any:
        return dataclasses.replace(holder, options=dataclasses.replace(holder.options, **{option: 1.0}))

    settings = {name: at_one(each) if name in names else each for name, each in jobs[0].settings.items()}
    groups = tuple(at_one(group) if group in linear else group for group in jobs[0].groups)
    # The methods notice the same whatever the factor.
    shared, outputs = Findings(), []
    for job, staging in zip(jobs, stagings, strict=True):
        rounding = nothing_found(job).rounding
        factors = {name: float(getattr(job.settings[name].options, option)) for name in names}
        outputs.append(_Output(staging, dataclasses.replace(shared, rounding=rounding), factors))
    _run(dataclasses.replace(jobs[0], groups=groups, settings=settings), outputs, stagings[0], progress)
    return [output.findings for output in outputs]


def _run(job: Job, outputs: Sequence[_Output], staging: Staging, progress: Reporter) -> None:
    """Merge into each of the outputs, without the tensors that the first one's staging has already."""
    prepare_process()
    todo = [t for t in job.plan.in_order() if t.numel and not staging.is_finished(t.name)]
    if not todo:
        return
    crew = Alone(staging.scratch)
    units = shard_units(job, todo)
    with current(job.source.device):
        fitted = fit(job, todo, crew, progress)
        _begin(units, progress)
        for _ in crew.share(units, lambda unit: _merge(fitted, unit.tensors, outputs, progress)):
            pass


def _begin(units: Sequence[Unit], progress: Reporter) -> None:
    progress.stage("merging", sum(unit.cost for unit in units), "work")


def _merge(fitted: FittedJob, todo: Sequence[TensorPlan], outputs: Sequence[_Output], progress: Reporter) -> None:
    """Merge these tensors into each of the outputs."""
    job = fitted.job
    work = {tensor.name: merge_work(job, tensor) for tensor in todo}
    for output in outputs:
        output.findings.merged = sum(t.action != "copy" for t in todo)
    wholes = [t for t in todo if t.action != "copy" and job.whole(t)]
    with_moments = [t for t in todo if job.is_measured(t)]
    streamed = [t for t in todo if t.action == "copy" or not (job.whole(t) or job.is_measured(t))]

    def in_rows(tensor: TensorPlan) -> bool:
        return tensor.action != "copy" and job.group(tensor).by_rows

    def merge_piece(piece: Piece, loader: Loader) -> None:
        if piece.tensor.action == "copy":
            data = loader.copy(piece)
            for output in outputs:
                output.write(piece, data)
        else:
            after = job.group(piece.tensor).method.checked_after
            theta_0, taus = loader.load(piece, check=fitted.unchecked(piece.tensor) and not after)
            fitted.chain.apply(piece, taus)
            if in_rows(piece.tensor):
                theta_0, taus = theta_0.view(-1, piece.tensor.row), taus.view(len(taus), -1, piece.tensor.row)
            try:
                vector = merged_vector(fitted, [piece], theta_0, taus, outputs[0].findings)
                for output, data in _merged(fitted, piece, theta_0, taus, outputs, vector):
                    output.write(piece, data)
            except CheckpointError:
                loader.refuse_nonfinite(piece)
                raise
        progress.advance(piece_cost(job.plan, piece, work[piece.tensor.name]), piece.tensor.name)

    def merge_cut(tensors: Sequence[TensorPlan]) -> None:
        in_parallel(job.source, Pieces(tensors, job.source.block, in_rows), merge_piece)

    merge_cut(streamed)
    for some in _in_reach(fitted, with_moments):
        fitted.measure(some, progress)
        merge_cut(some)
        for tensor in some:
            del fitted.measured[tensor.name]  # which may be large
    _run_whole(fitted, wholes, outputs, progress)


def _in_reach(fitted: FittedJob, tensors: Sequence[TensorPlan]) -> Iterator[list[TensorPlan]]:
    """The tensors in batches that are still in the page cache when they are read the second time."""
    batch: list[TensorPlan] = []
    size = 0
    for tensor in tensors:
        batch.append(tensor)
        size += fitted.job.plan.stored_bytes(tensor, experts=True)
        if size >= _REACH or tensor is tensors[-1]:
            yield batch
            batch, size = [], 0


def _run_whole(
    fitted: FittedJob, tensors: Sequence[TensorPlan], outputs: Sequence[_Output], progress: Reporter
) -> None:
    """Merge tensors that a method wants whole: modest ones side by side, large ones in turn."""
    job = fitted.job

    def merge(piece: Piece, theta_0: Tensor, taus: Tensor, vector: Tensor | None = None) -> _Merged:
        fitted.chain.apply(piece, taus)
        if taus.device != (there := theta_0.device):  # which has no room for all of them
            coming = Vectors(functools.partial(_sent, taus, there), tuple(taus.shape), there, taus.dtype)
            taus = cast(Tensor, coming)
        if vector is None:
            factors = fitted.factors(piece.tensor, there)
            vector = merged_vector(fitted, [piece], theta_0, taus, outputs[0].findings, factors)
        return _merged(fitted, piece, theta_0, taus, outputs, vector)

    modest, thread = [tensor for tensor in tensors if together(job.source, tensor)], threading.local()

    def merge_alone(tensor: TensorPlan) -> None:
        if not hasattr(thread, "loader"):
            thread.loader = loader_of(job.source, modest)
        progress.begin(tensor.name)
        piece, theta_0, taus = whole(job.source, tensor, check=fitted.unchecked(tensor), loader=thread.loader)
        for output, data in merge(piece, theta_0, taus):
            output.write(piece, data)
        progress.advance(piece_cost(job.plan, piece, merge_work(job, tensor)), tensor.name)

    side_by_side(job.source, modest, merge_alone)
    in_turn = batches(job, [tensor for tensor in tensors if not together(job.source, tensor)])
    _run_in_turn(fitted, in_turn, merge, outputs[0].findings, progress)


def _run_in_turn(
    fitted: FittedJob,
    tensors: Sequence[Sequence[TensorPlan]],
    merge: Callable[[Piece, Tensor, Tensor, Tensor | None], _Merged],
    findings: Findings,
    progress: Reporter,
) -> None:
    """Merge batches of tensors, most of them of one, one after the other: read one ahead, write one behind."""
    job = fitted.job
    device, all_ways = job.source.device, ways(job)
    way_of = [all_ways[first.name] for first, *_ in tensors]

    # Buffers that are used again cost no page faults: one is read into, one is merged from. The two largest tensors,
    # as a rule embedding and head, are not worth holding that much for all others: they have memory of their own.
    sizes = sorted(some[0].numel for some in tensors)
    most = sizes[-3] if len(sizes) > 2 else 0
    loaders = [loader_of(job.source, [t for t, *_ in tensors[turn::2] if t.numel <= most]) for turn in (0, 1)]

    def fetch(turn: int) -> tuple[list[Piece], Tensor, Tensor, Callable[[], None]]:
        first = tensors[turn][0]
        loader = loaders[turn % 2] if first.numel <= most else None
        with current(device):
            pieces, theta_0, taus = load(job, tensors[turn], check=fitted.unchecked(first), loader=loader)
            if not goes_ahead(turn):
                return pieces, theta_0, taus, lambda: None
            (theta_0, taus), arrive = sender.send([theta_0, taus])
            return pieces, theta_0, taus, arrive

    def goes_ahead(turn: int) -> bool:
        """Whether the device has room for it beside the one before."""
        return all(way == AHEAD for way in way_of[max(turn - 1, 0) : turn + 1])

    with current(device), ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:
        sender = Sender(device)

        def read(turn: int) -> Future[tuple[list[Piece], Tensor, Tensor, Callable[[], None]]]:
            return reading.submit(fetch, turn)

        ahead = read(0) if tensors else None
        behind: Future[None] | None = None
        for i, (tensor, *_) in enumerate(tensors):
            assert ahead is not None
            progress.begin(tensor.name)
            pieces, theta_0, taus, arrive = ahead.result()
            ahead = read(i + 1) if i + 1 < len(tensors) else None
            if way_of[i] in (AHEAD, ALONE) and not goes_ahead(i):
                (theta_0, taus), arrive = sender.send([theta_0, taus])
            elif way_of[i] == ONE_BY_ONE:
                theta_0 = theta_0.to(device)
            arrive()
            with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
                vectors = _vectors(fitted, pieces, theta_0, taus, findings) if len(pieces) > 1 else [None]
                for j, piece in enumerate(pieces):
                    for output, data in merge(piece, theta_0[j], taus[:, j], vectors[j]):
                        if behind is not None:
                            behind.result()
                        behind = writing.submit(output.write, piece, data)
                    progress.advance(piece_cost(job.plan, piece, merge_work(job, piece.tensor)), piece.tensor.name)
                del vectors
        if behind is not None:
            behind.result()


def _sent(taus: Tensor, device: torch.device, i: int) -> Tensor:
    return taus[i].to(device)


def _vectors(
    fitted: FittedJob, pieces: Batch, theta_0: Tensor, taus: Tensor, findings: Findings
) -> Sequence[Tensor | None]:
    """The merged task vectors of a batch, found at once; None where each has to be found for itself."""
    noticed = nothing_found(fitted.job)
    try:
        factors = stacked([fitted.factors(piece.tensor, taus.device) for piece in pieces])
        vectors = merged_vector(fitted, pieces, theta_0, taus, noticed, factors)
    except (Apart, torch.OutOfMemoryError):
        return [None] * len(pieces)
    findings.add(noticed.to_dict())
    return list(vectors)


def _merged(
    fitted: FittedJob, piece: Piece, theta_0: Tensor, taus: Tensor, outputs: Sequence[_Output], vector: Tensor
) -> _Merged:
    """The piece's merged values, flat, as each output will store them; `theta_0` is used up."""
    # The base plus the whole of one task vector is its expert, to the last digit; the sum may miss that.
    only = len(taus) == 1 and not fitted.job.transforms and torch.equal(vector.flatten(), taus[0].flatten())
    alone = expert_values(fitted.job.plan, piece, vector.device) if only else None
    if not len(taus) and not bool(vector.any()):
        alone = theta_0  # nothing added would still turn -0 into 0
    for output in outputs:
        factor, rounding = output.factors.get(piece.tensor.name), output.findings.rounding
        delta = vector if factor is None else vector * factor
        if rounding is not None:
            rounding.squares.add(squared(delta))
        if alone is not None and factor is None:
            values = alone
        else:
            values = theta_0.add_(delta) if output is outputs[-1] else theta_0 + delta
        yield output, rounded(piece, values, rounding=rounding)


def merged_vector(
    fitted: FittedJob, pieces: Batch, theta_0: Tensor, taus: Tensor, findings: Findings, factors: Factors | None = None
) -> Tensor:
    """A piece's merged task vector; or those of the pieces of a batch.

    Raises:
        Apart: The batch has to be merged one by one.
    """
    job, piece = fitted.job, pieces[0]
    group, setting = job.group(piece.tensor), fitted.setting(piece.tensor)

    experts = tuple(expert.name for expert in job.plan.experts_of(piece.tensor))

    def leave_out(expert: int, reason: str) -> None:
        findings.left_out += [(piece.tensor.name, experts[expert], reason) for piece in pieces]

    def tell(figures: Mapping[str, Any]) -> None:
        for i, piece in enumerate(pieces):
            mine = {name: value[i] if isinstance(value, list) else value for name, value in figures.items()}
            if mine := {name: value for name, value in mine.items() if value is not None}:
                findings.figures.setdefault(piece.tensor.name, {}).update(mine)

    measured = fitted.measured.get(piece.tensor.name)
    moments = job.moments(piece.tensor) if measured is None else None
    if moments is not None:  # it is here as a whole
        measured = measured_at_once(moments, taus.reshape(len(taus), -1), theta_0.reshape(-1))
    if measured is not None and taus.device.type == "cpu":  # what does not fit on the device is merged here
        measured = measured.cpu()
    context = Context(
        tensor=piece.tensor.twin or piece.tensor.name, weights=setting.weights,
        experts=experts, measured=measured,
        base=theta_0 if group.method.wants_base else None, factors=factors, seed=job.seed, start=piece.start,
        leave_out=leave_out, tell=tell, varied=setting.each,
    )  # fmt: skip
    if group.blockwise:
        delta = group.method.apply(taus, setting.options, context)
    else:
        delta = run_interruptibly(group.method.apply, taus, setting.options, context)
    if piece.tensor.rows is not None:
        delta = delta.contiguous()
        delta.view(-1)[max(piece.tensor.common - piece.start, 0) :] = 0
    return delta
