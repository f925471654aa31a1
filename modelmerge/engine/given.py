"""What methods are given: task vectors disentangled and scaled, and what passes over all of them have found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from modelmerge.checkpoint.writer import Scratch
from modelmerge.engine.front import Front, fit
from modelmerge.engine.job import Job
from modelmerge.engine.stream import Piece, known_factors
from modelmerge.engine.surveying import run_survey
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


def give(job: Job, scratch: Callable[[int], Scratch], reporter: Reporter) -> Given:
    """Go over the task vectors as often as has to be before they are merged.

    `scratch` gives room of so many bytes on the disk, for what a front keeps there.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: There is no such room.
    """
    front = fit(job.source, job.front, job.disentangled(), scratch, reporter) if job.front else None
    given = Given(job, front)
    for part in job.parts:
        if part.survey is not None:
            found = run_survey(job.source, part.survey, given.ready, part.surveyed(), reporter)
            given.measured.update(dict.fromkeys((tensor.name for tensor in part.tensors), found))
    return given
