"""Merging: every tensor of a plan, streamed through its method into the output."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from modelmerge.checkpoint.writer import Staging
from modelmerge.engine.front import Front, fit
from modelmerge.engine.job import SMALL, Findings, Job, allow_many_files, threads
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
from modelmerge.method import Context, Survey
from modelmerge.plan import TensorPlan
from modelmerge.report import Reporter


def run(job: Job, staging: Staging, reporter: Reporter) -> Findings:
    """Merge every tensor of the plan into the staging directory.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The output cannot be written.
        UsageError: Disentangling would need more memory than there is.
    """
    allow_many_files()
    findings = Findings()
    plan = job.plan
    todo = [t for t in plan.in_order() if t.numel and not staging.is_finished(t.name)]
    if not todo:
        return findings
    front = fit(job.source, job.front, job.disentangled(), reporter) if job.front else None
    merged = [t for t in plan.select("merge") if t.numel]
    measured = _survey(job, job.survey, front, merged, reporter) if job.survey else None

    wholes = [t for t in todo if t.action == "merge" and not job.blockwise]
    streamed = [t for t in todo if t not in wholes]
    reporter.stage("merging", sum(plan.stored_bytes(t, experts=t.action != "copy") for t in todo))

    def merge_piece(piece: Piece, loader: Loader) -> None:
        if piece.tensor.action == "copy":
            data = loader.copy(piece)
        else:
            theta_0, taus = loader.load(piece, check=True)
            if front is not None:
                front.take_out(piece, taus)
            data = _merged(job, piece, theta_0, taus, measured, findings)
        staging.write(piece.tensor.name, piece.start * item_bytes(piece.tensor.out_dtype), as_bytes(data))
        reporter.advance(piece_bytes(plan, piece), piece.tensor.name)

    in_parallel(job.source, list(pieces(streamed, job.source.block)), merge_piece)
    _run_whole(job, front, wholes, measured, findings, staging, reporter)
    return findings


def _survey(job: Job, survey: Survey, front: Front | None, merged: Sequence[TensorPlan], reporter: Reporter) -> Tensor:
    totals: tuple[Tensor, ...] = ()
    size = sum(job.plan.stored_bytes(t, experts=True) for t in merged)
    for number, measure in enumerate(survey.passes):
        reporter.stage(f"measuring {number + 1}/{len(survey.passes)}", size)
        parts: dict[int, Tensor] = {}  # one running total per worker

        def add(piece: Piece, loader: Loader) -> None:
            _, taus = loader.load(piece, check=number == 0)  # noqa: B023 - used up before the loop goes on
            if front is not None:
                front.take_out(piece, taus)
            counts = measure(taus, totals)  # noqa: B023
            mine = threading.get_ident()
            parts[mine] = parts[mine].add_(counts) if mine in parts else counts  # noqa: B023
            reporter.advance(piece_bytes(job.plan, piece), piece.tensor.name)

        in_parallel(job.source, list(pieces(merged, job.source.block)), add)
        totals = (*totals, torch.stack(list(parts.values())).sum(0))
    return survey.conclude(totals)


def _run_whole(
    job: Job,
    front: Front | None,
    tensors: Sequence[TensorPlan],
    measured: Tensor | None,
    findings: Findings,
    staging: Staging,
    reporter: Reporter,
) -> None:
    """Merge tensors that a method wants whole: read one ahead, write one behind."""
    with ThreadPoolExecutor(1, "read") as reading, ThreadPoolExecutor(1, "write") as writing:

        def read(tensor: TensorPlan) -> Future[tuple[Piece, Tensor, Tensor]]:
            return reading.submit(whole, job.source, tensor, check=job.survey is None)

        ahead = read(tensors[0]) if tensors else None
        behind: Future[None] | None = None
        for i, tensor in enumerate(tensors):
            assert ahead is not None
            piece, theta_0, taus = ahead.result()
            ahead = read(tensors[i + 1]) if i + 1 < len(tensors) else None
            theta_0, taus = theta_0.to(job.source.device), taus.to(job.source.device)
            with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
                if front is not None:
                    front.take_out(piece, taus)
                data = _merged(job, piece, theta_0, taus, measured, findings)
            if behind is not None:
                behind.result()
            behind = writing.submit(staging.write, tensor.name, 0, as_bytes(data))
            reporter.advance(piece_bytes(job.plan, piece), tensor.name)
        if behind is not None:
            behind.result()


def _merged(
    job: Job, piece: Piece, theta_0: Tensor, taus: Tensor, measured: Tensor | None, findings: Findings
) -> Tensor:
    """The piece's merged values, flat, as they will be stored; `theta_0` is used up."""
    chosen = job.method if piece.tensor.action == "merge" else job.rest
    assert chosen is not None, "the plan leaves tensors to a method that the job does not name"
    method, options = chosen

    def leave_out(expert: int, reason: str) -> None:
        findings.left_out.append((piece.tensor.name, job.plan.experts[expert].name, reason))

    def tell(figures: Mapping[str, float]) -> None:
        findings.figures[piece.tensor.name] = dict(figures)

    context = Context(tensor=piece.tensor.name, weights=job.weights, measured=measured, leave_out=leave_out, tell=tell)
    return rounded(piece, theta_0.add_(method.apply(taus, options, context)))
