"""Merging: every tensor of a plan, streamed through its method into the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from modelmerge.checkpoint.writer import Staging
from modelmerge.engine.given import Factors, Given, give
from modelmerge.engine.job import (
    SMALL,
    Findings,
    Job,
    beyond_device,
    current,
    prepare_process,
    threads,
    together,
)
from modelmerge.engine.rounding import Rounding, squared, stored_narrow
from modelmerge.engine.stream import (
    Loader,
    Piece,
    as_bytes,
    in_parallel,
    item_bytes,
    piece_bytes,
    pieces,
    rounded,
    whole,
)
from modelmerge.method import Context
from modelmerge.plan import TensorPlan
from modelmerge.report import Reporter
from modelmerge.vary import Setting


def run(job: Job, staging: Staging, reporter: Reporter) -> Findings:
    """Merge every tensor of the plan into the staging directory.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The output cannot be written.
    """
    prepare_process()
    plan = job.plan
    findings = Findings(scales=job.scales, rounding=Rounding() if stored_narrow(plan) else None)
    todo = [t for t in plan.in_order() if t.numel and not staging.is_finished(t.name)]
    findings.merged = sum(t.action != "copy" for t in todo)
    if not todo:
        return findings
    given = give(job, findings, staging.scratch, reporter)

    wholes = [t for t in todo if t.action != "copy" and not job.part(t).blockwise]
    streamed = [t for t in todo if t.action == "copy" or job.part(t).blockwise]
    reporter.stage("merging", sum(plan.stored_bytes(t, experts=t.action != "copy") for t in todo))

    def in_rows(tensor: TensorPlan) -> bool:
        return tensor.action != "copy" and job.part(tensor).by_rows

    def merge_piece(piece: Piece, loader: Loader) -> None:
        if piece.tensor.action == "copy":
            data = loader.copy(piece)
        else:
            theta_0, taus = loader.load(piece, check=given.unchecked(piece.tensor))
            given.ready(piece, taus)
            if in_rows(piece.tensor):
                theta_0, taus = theta_0.view(-1, piece.tensor.row), taus.view(len(taus), -1, piece.tensor.row)
            data = _merged(given, piece, theta_0, taus, findings)
        staging.write(piece.tensor.name, piece.start * item_bytes(piece.tensor.out_dtype), as_bytes(data))
        reporter.advance(piece_bytes(plan, piece), piece.tensor.name)

    cut = [piece for t in streamed for piece in pieces([t], job.source.block, by_rows=in_rows(t))]
    in_parallel(job.source, cut, merge_piece)
    _run_whole(given, wholes, findings, staging, reporter)
    return findings


def _run_whole(
    given: Given, tensors: Sequence[TensorPlan], findings: Findings, staging: Staging, reporter: Reporter
) -> None:
    """Merge tensors that a method wants whole: modest ones side by side, large ones in turn."""
    job = given.job

    def merge(piece: Piece, theta_0: Tensor, taus: Tensor) -> Tensor:
        given.ready(piece, taus)
        return _merged(given, piece, theta_0, taus, findings, given.factors(piece.tensor))

    def merge_alone(tensor: TensorPlan) -> None:
        piece, theta_0, taus = whole(job.source, tensor, check=given.unchecked(tensor))
        staging.write(tensor.name, 0, as_bytes(merge(piece, theta_0, taus)))
        reporter.advance(piece_bytes(job.plan, piece), tensor.name)

    modest = [tensor for tensor in tensors if together(job.source, tensor)]
    with threads(1), ThreadPoolExecutor(job.source.workers, "merge") as pool:
        futures = [pool.submit(merge_alone, tensor) for tensor in modest]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an error ends the others, too
    _run_in_turn(given, [tensor for tensor in tensors if not together(job.source, tensor)], merge, staging, reporter)


def _run_in_turn(
    given: Given,
    tensors: Sequence[TensorPlan],
    merge: Callable[[Piece, Tensor, Tensor], Tensor],
    staging: Staging,
    reporter: Reporter,
) -> None:
    """Merge tensors one after the other: read one ahead, write one behind."""
    job = given.job
    device, left = job.source.device, beyond_device(job)
    sending = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(tensor: TensorPlan) -> tuple[Piece, Tensor, Tensor, Callable[[], None]]:
        with current(device):
            piece, theta_0, taus = whole(job.source, tensor, check=given.unchecked(tensor))
            return piece, *_sent(theta_0, taus, None if tensor.name in left else sending)

    with current(device), ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:

        def read(tensor: TensorPlan) -> Future[tuple[Piece, Tensor, Tensor, Callable[[], None]]]:
            return reading.submit(fetch, tensor)

        ahead = read(tensors[0]) if tensors else None
        behind: Future[None] | None = None
        for i, tensor in enumerate(tensors):
            assert ahead is not None
            piece, theta_0, taus, arrive = ahead.result()
            ahead = read(tensors[i + 1]) if i + 1 < len(tensors) else None
            arrive()
            with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
                data = merge(piece, theta_0, taus)
            if behind is not None:
                behind.result()
            behind = writing.submit(staging.write, tensor.name, 0, as_bytes(data))
            reporter.advance(piece_bytes(job.plan, piece), tensor.name)
        if behind is not None:
            behind.result()


def _sent(theta_0: Tensor, taus: Tensor, stream: torch.cuda.Stream | None) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """The tensors on the stream's device, and what to call before they are used; as they are without a stream.

    The copy runs beside the work of other streams; calling makes the current stream, not the processor, wait for it.
    """
    if stream is None:
        return theta_0, taus, lambda: None
    with torch.cuda.stream(stream):
        there = [tensor.pin_memory().to(stream.device, non_blocking=True) for tensor in (theta_0, taus)]
        copied = torch.cuda.Event()
        copied.record(stream)

    def arrive() -> None:
        own = torch.cuda.current_stream(stream.device)
        own.wait_event(copied)
        for tensor in there:
            tensor.record_stream(own)  # its memory is not given to another copy before this stream is done with it

    return there[0], there[1], arrive


def _merged(
    given: Given, piece: Piece, theta_0: Tensor, taus: Tensor, findings: Findings, factors: Factors | None = None
) -> Tensor:
    """The piece's merged values, flat, as they will be stored; `theta_0` is used up."""
    delta = merged_vector(given, piece, theta_0, taus, findings, factors)
    if findings.rounding is not None:
        findings.rounding.merged.append(squared(delta))
    return rounded(piece, theta_0.add_(delta), rounding=findings.rounding)


def merged_vector(
    given: Given, piece: Piece, theta_0: Tensor, taus: Tensor, findings: Findings, factors: Factors | None = None
) -> Tensor:
    """The piece's merged task vector."""
    job = given.job
    part = job.part(piece.tensor)
    setting = job.settings.get(piece.tensor.name) or Setting(part.options, job.weights, {})

    def leave_out(expert: int, reason: str) -> None:
        findings.left_out.append((piece.tensor.name, job.plan.experts[expert].name, reason))

    def tell(figures: Mapping[str, float]) -> None:
        findings.figures.setdefault(piece.tensor.name, {}).update(figures)

    context = Context(
        tensor=piece.tensor.twin or piece.tensor.name, weights=given.weights(piece.tensor, setting.weights),
        experts=tuple(expert.name for expert in job.plan.experts), measured=given.measured.get(piece.tensor.name),
        base=theta_0 if part.method.wants_base else None, factors=factors, seed=job.seed, start=piece.start,
        leave_out=leave_out, tell=tell, varied=setting.each,
    )  # fmt: skip
    delta = part.method.apply(taus, setting.options, context)
    if piece.tensor.rows is not None:
        delta = delta.contiguous()
        delta.view(-1)[max(piece.tensor.common - piece.start, 0) :] = 0
    return delta
