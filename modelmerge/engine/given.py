"""What methods are given: task vectors disentangled and scaled, and what passes over all of them have found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from modelmerge.checkpoint.staging import Scratch
from modelmerge.engine.job import Findings, Job
from modelmerge.engine.loader import Loader, Piece, known_factors, piece_bytes, wholes
from modelmerge.engine.parallel import gathered
from modelmerge.engine.survey import run_survey
from modelmerge.engine.transforms import Front, fit
from modelmerge.methods import lambdas, larv
from modelmerge.plan.overrides import layer_of, layers
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

Factors = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A job with all that has to be known before its first tensor is merged.

    Args:
        job: The job.
        front: What disentangles the task vectors, fitted.
        scales: By tensor, the factor on all its task vectors, where it is not 1.
        lambdas: By tensor, the task-aware lambda of each expert, where there are any.
        measured: By tensor, what its method's survey concludes from all the tensors that the method merges, or the
            tensor's own moments.
    """

    job: Job
    front: Front | None
    scales: Mapping[str, float]
    lambdas: Mapping[str, tuple[float, ...]]
    measured: dict[str, Tensor] = field(default_factory=dict)

    def ready(self, piece: Piece, taus: Tensor) -> None:
        """Make task vectors [T, *shape] as they were read those that are merged, in place."""
        if self.front is not None:
            self.front.take_out(piece, taus)
        scale = self.scales.get(piece.tensor.name, 1.0)
        if scale != 1.0:
            taus.mul_(scale)

    def factors(self, tensor: TensorPlan) -> Factors | None:
        """The factors of task vectors that are products still: what a front has changed is none any more."""
        known = known_factors(self.job.source, tensor) if self.front is None else None
        scale = self.scales.get(tensor.name, 1.0)
        if known is None or scale == 1.0:
            return known
        return tuple(None if pair is None else (pair[0] * scale, pair[1]) for pair in known)

    def weights(self, tensor: TensorPlan, told: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights on the tensor, of those that were told."""
        return tuple(w * own for w, own in zip(told, self.lambdas.get(tensor.name, (1.0,) * len(told)), strict=True))

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
    findings.scales = _by_larv(job, front, reporter) if job.larv else job.scales
    findings.lambdas = _task_lambdas(job, job.task_lambda, front, findings, reporter) if job.task_lambda else {}
    given = Given(job, front, findings.scales, findings.lambdas)
    for part in job.parts:
        if part.survey is not None:
            found = run_survey(job.source, part.survey, given.ready, part.surveyed(), reporter)
            given.measured.update(dict.fromkeys((tensor.name for tensor in part.tensors), found))
    return given


def _by_larv(job: Job, front: Front | None, reporter: Reporter) -> dict[str, float]:
    """The factor that LARV finds for each tensor in a numbered layer."""
    matrices = job.looked_at()
    contrasts: dict[tuple[str, int], list[float]] = defaultdict(list)
    conflicts: dict[tuple[str, int], list[float]] = defaultdict(list)
    reporter.stage("layer scale", sum(job.plan.stored_bytes(t, experts=True) for t in matrices))
    for piece, theta_0, taus in wholes(job.source, matrices, check=True):
        if front is not None:
            front.take_out(piece, taus)
        layer, update = layer_of(piece.tensor.name), taus.sum(0)
        assert layer is not None, "only tensors in layers are looked at"
        if bool(update.any()) and bool(theta_0.any()):
            contrasts[layer].append(larv.effective_rank(theta_0) / larv.effective_rank(update))
            conflicts[layer].append(larv.conflict(theta_0, update))
        reporter.advance(piece_bytes(job.plan, piece), piece.tensor.name)
    count = layers(tensor.name for tensor in job.merged())
    score = larv.scores(
        {layer: fmean(values) for layer, values in contrasts.items()},
        {layer: fmean(values) for layer, values in conflicts.items()},
        {(prefix, number): (number + 1) / count[prefix] for prefix, number in contrasts},
    )
    factors = larv.tiers(score)
    return {t.name: factors[layer] for t in job.merged() if (layer := layer_of(t.name)) in factors}


def _task_lambdas(
    job: Job, mode: lambdas.Mode, front: Front | None, findings: Findings, reporter: Reporter
) -> dict[str, tuple[float, ...]]:
    """Each expert's lambda on each tensor; an expert that did not change it is told to be left out."""
    tensors = [tensor for tensor in job.merged() if tensor.numel]
    reporter.stage("task lambdas", sum(job.plan.stored_bytes(t, experts=True) for t in tensors))

    def measure(piece: Piece, loader: Loader) -> Tensor:
        _, taus = loader.load(piece, check=True)
        if front is not None:
            front.take_out(piece, taus)
        reporter.advance(piece_bytes(job.plan, piece), piece.tensor.name)
        wide = taus.double()
        return (wide @ wide.mT).cpu()

    grams: dict[str, Tensor] = {}
    for piece, gram in gathered(job.source, tensors, measure):
        name = piece.tensor.name
        grams[name] = grams[name] + gram if name in grams else gram
    found = {tensor.name: lambdas.task_lambdas(grams[tensor.name], mode) for tensor in tensors}
    for name, values in found.items():
        for expert, value in zip(job.plan.experts, values, strict=True):
            if value == 0.0:
                findings.left_out.append((name, expert.name, "it hardly changed this weight"))
    return found
