"""What methods are given: task vectors disentangled and scaled, and what passes over all of them have found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from modelmerge.checkpoint.staging import Scratch
from modelmerge.engine.job import Findings, Job
from modelmerge.engine.loader import Loader, Piece, known_factors, piece_bytes
from modelmerge.engine.parallel import gathered
from modelmerge.engine.survey import run_survey
from modelmerge.engine.transforms import Front, fit
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

Factors = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A job with all that has to be known before its first tensor is merged.

    Args:
        job: The job.
        front: What disentangles the task vectors, fitted.
        measured: By tensor, what its method's survey concludes from all the tensors that the method merges, or the
            tensor's own moments.
    """

    job: Job
    front: Front | None
    measured: dict[str, Tensor] = field(default_factory=dict)

    def ready(self, piece: Piece, taus: Tensor) -> None:
        """Make task vectors [T, *shape] as they were read those that are merged, in place."""
        if self.front is not None:
            self.front.take_out(piece, taus)

    def factors(self, tensor: TensorPlan) -> Factors | None:
        """The factors of task vectors that are products still: what a front has changed is none any more."""
        return known_factors(self.job.source, tensor) if self.front is None else None

    def unchecked(self, tensor: TensorPlan) -> bool:
        """Whether nobody has looked for NaN and Inf before the merge: who measures does."""
        return self.job.part(tensor).survey is None and tensor.name not in self.measured

    def measure(self, tensors: Sequence[TensorPlan], reporter: Reporter) -> None:
        """Find the moments of tensors whose method takes them in blocks and needs that.

        Raises:
            CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        """
        source = self.job.source

        def look(piece: Piece, loader: Loader) -> Tensor:
            theta_0, taus = loader.load(piece, check=True)
            self.ready(piece, taus)
            reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)
            moments = self.job.part(piece.tensor).moments
            assert moments is not None, "only what has moments is measured"
            return moments(taus, theta_0)

        totals: dict[str, Tensor] = {}
        for piece, part in gathered(source, tensors, look):
            totals[piece.tensor.name] = totals[piece.tensor.name] + part if piece.start else part
        self.measured.update(totals)


def give(job: Job, findings: Findings, scratch: Callable[[int], Scratch], reporter: Reporter) -> Given:
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
