"""What methods are given: task vectors disentangled and scaled, and what passes over all of them have found."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelmerge.engine.front import Front, fit
from modelmerge.engine.job import SAMPLE_RUN, Job, Part
from modelmerge.engine.stream import Loader, Piece, in_parallel, known_factors, piece_bytes, pieces
from modelmerge.method import Pass
from modelmerge.plan import TensorPlan
from modelmerge.report import Reporter

Factors = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A job with all that has to be known before its first tensor is merged.

    Args:
        job: The job.
        front: What disentangles the task vectors, fitted.
        measured: By tensor, what its method's survey concludes from all the tensors that the method merges.
    """

    job: Job
    front: Front | None
    measured: dict[str, Tensor] = field(default_factory=dict)

    def ready(self, piece: Piece, taus: Tensor) -> None:
        """Make task vectors [T, *shape] as they were read those that are merged, in place."""
        if self.front is not None:
            self.front.take_out(piece, taus)
        scale = self.job.scales.get(piece.tensor.name, 1.0)
        if scale != 1.0:
            taus.mul_(scale)

    def factors(self, tensor: TensorPlan) -> Factors | None:
        """The factors of task vectors that are products still: what a front has changed is none any more."""
        known = known_factors(self.job.source, tensor) if self.front is None else None
        scale = self.job.scales.get(tensor.name, 1.0)
        if known is None or scale == 1.0:
            return known
        return tuple(None if pair is None else (pair[0] * scale, pair[1]) for pair in known)

    def unchecked(self, tensor: TensorPlan) -> bool:
        """Whether nobody has looked for NaN and Inf before the merge: a survey does."""
        return self.job.part(tensor).survey is None


def give(job: Job, reporter: Reporter) -> Given:
    """Go over the task vectors as often as has to be before they are merged.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    front = fit(job.source, job.front, job.disentangled(), reporter) if job.front else None
    given = Given(job, front)
    for part in job.parts:
        if part.survey is not None:
            found = _survey(given, part, reporter)
            given.measured.update(dict.fromkeys((tensor.name for tensor in part.tensors), found))
    return given


def _survey(given: Given, part: Part, reporter: Reporter) -> Tensor:
    """What the part's survey concludes from its tensors."""
    assert part.survey is not None, "only what has a survey is surveyed"
    counted = part.surveyed()
    search = part.survey.find(sum(tensor.numel for tensor in counted))
    wanted, checked = next(search), False
    while True:
        full = wanted.share == 1
        total = _one_pass(given, wanted, counted, reporter, check=full and not checked)
        checked = checked or full
        try:
            wanted = search.send(total)
        except StopIteration as found:
            measured: Tensor = found.value
            return measured


def _one_pass(given: Given, wanted: Pass, tensors: Sequence[TensorPlan], reporter: Reporter, *, check: bool) -> Tensor:
    source, sampled = given.job.source, wanted.share > 1
    runs = list(pieces(tensors, SAMPLE_RUN if sampled else source.block, sampled=sampled))[:: wanted.share]
    reporter.stage("sampling" if sampled else "measuring", sum(piece_bytes(source.plan, run) for run in runs))
    parts: dict[int, Tensor] = {}  # one running total per worker

    def add(piece: Piece, loader: Loader) -> None:
        _, taus = loader.load(piece, check=check)
        given.ready(piece, taus)
        mine = threading.get_ident()
        if mine not in parts:
            parts[mine] = taus.new_zeros((len(taus), wanted.counters), dtype=torch.int64)
        wanted.measure(taus, parts[mine])
        reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)

    in_parallel(source, runs, add)
    return torch.stack(list(parts.values())).sum(0)
