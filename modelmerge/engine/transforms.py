"""Transforms: each turns T task vectors into T others, fitted in passes of its own and applied in every pass after.

A merge is a chain: read, transforms, one method, add, write. A transform is fitted on what the transforms before it
make of the task vectors. To add a kind of transform, write one class that fulfils `Transform` and name it in `_KINDS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from modelmerge.engine.corrections import CorrectionTransform
from modelmerge.engine.figures import Figures
from modelmerge.engine.job import Job
from modelmerge.engine.loader import factors_of
from modelmerge.engine.memory import Needs
from modelmerge.engine.pieces import Piece
from modelmerge.engine.shared_vector import VectorTransform
from modelmerge.engine.survey import run_moments, run_survey
from modelmerge.engine.units import Crew
from modelmerge.methods.contract import Correction, SharedVector, TransformSpec
from modelmerge.plan.overrides import Setting
from modelmerge.plan.tensors import TensorPlan, Tensors
from modelmerge.progress import Reporter

Factors = tuple[tuple[Tensor, Tensor] | None, ...]


class Fitted(Protocol):
    """A fitted transform."""

    @property
    def keeps_factors(self) -> bool:
        """Whether task vectors that are products remain the same products."""

    def apply(self, piece: Piece, taus: Tensor) -> Tensor | None:
        """Change the task vectors [T, *shape] of any piece, in place.

        Returns:
            The one vector [*shape] that was subtracted from all of them, if it is one.
        """

    def weights(self, tensor: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights on a tensor, after it."""

    def figures(self) -> Figures:
        """The figures of the fit."""


class Transform(Protocol):
    """How task vectors change before the method merges them."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def options(self) -> Any:
        """Its options, a dataclass."""

    @property
    def shares_vector(self) -> bool:
        """Whether it subtracts one vector from all task vectors."""

    @property
    def by_tensor(self) -> bool:
        """Whether what becomes of a tensor does not depend on others."""

    def takes(self, tensor: TensorPlan) -> bool:
        """Whether it is fitted on this tensor."""

    def needs(self, job: Job, tensors: Tensors) -> Needs:
        """What fitting on the tensors takes."""

    def fit(self, job: Job, tensors: Tensors, before: Chain, crew: Crew, progress: Reporter) -> Fitted:
        """Fit it on the tensors.

        Args:
            job: The merge.
            tensors: Those that it takes.
            before: The transforms before it, fitted.
            crew: Does the work.
            progress: Shows the progress.

        Raises:
            CheckpointError: A weight is NaN or Inf, or a file cannot be read.
            OutputError: There is no room on the disk.
        """


@dataclass(frozen=True, slots=True)
class Chain:
    """Fitted transforms, in their order."""

    links: tuple[Fitted, ...] = ()

    @property
    def keeps_factors(self) -> bool:
        """Whether task vectors that are products remain the same products."""
        return all(link.keeps_factors for link in self.links)

    def apply(self, piece: Piece, taus: Tensor) -> None:
        """Change the task vectors [T, *shape] of any piece, in place."""
        for link in self.links:
            link.apply(piece, taus)

    def weights(self, tensor: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights on a tensor, after all transforms."""
        for link in self.links:
            weights = link.weights(tensor, weights)
        return weights


# The engine's way to fit and apply each kind of mathematics.
_KINDS: Mapping[type, Callable[[str, Any, Any], Transform]] = {
    SharedVector: VectorTransform,
    Correction: CorrectionTransform,
}


def transform_of(name: str, spec: TransformSpec, options: Any) -> Transform:
    """A transform that is ready to be fitted."""
    return _KINDS[type(spec.by)](name, spec.by, options)


def fit_chain(job: Job, todo: Tensors | None, crew: Crew, progress: Reporter) -> Chain:
    """Fit the job's transforms, one after the other, where `todo` alone is to be merged, or all.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: There is no room on the disk.
    """
    chain = Chain()
    for transform in job.transforms:
        chain = Chain((*chain.links, transform.fit(job, job.taken(transform, todo), chain, crew, progress)))
    return chain


@dataclass(frozen=True, slots=True)
class FittedJob:
    """A job plus the results of its preliminary passes.

    Args:
        job: The job.
        chain: Its transforms, fitted.
        measured: By tensor, what its method's survey concludes from all the tensors that the method merges, or the
            tensor's own moments.
    """

    job: Job
    chain: Chain
    measured: dict[str, Tensor] = field(default_factory=dict)

    def setting(self, tensor: TensorPlan) -> Setting:
        """The options and weights of the tensor's method there."""
        setting = self.job.settings[tensor.name]
        return dataclasses.replace(setting, weights=self.chain.weights(tensor.name, setting.weights))

    def factors(self, tensor: TensorPlan, device: torch.device) -> Factors | None:
        """The factors, on the device, of task vectors that are still products."""
        return factors_of(self.job.source, tensor, device) if self.chain.keeps_factors else None

    def unchecked(self, tensor: TensorPlan) -> bool:
        """True if no earlier pass has checked this tensor for NaN and Inf."""
        return self.job.group(tensor).survey is None and tensor.name not in self.measured

    def measure(self, tensors: Tensors, progress: Reporter) -> None:
        """Find the moments of tensors whose method takes them in blocks and needs that.

        Raises:
            CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        """
        moments = {tensor.name: each for tensor in tensors if (each := self.job.moments(tensor))}
        self.measured.update(run_moments(self.job.source, moments, self.chain.apply, tensors, progress))


def fit(job: Job, todo: Tensors | None, crew: Crew, progress: Reporter) -> FittedJob:
    """Make the passes over the task vectors that come before the merge: transforms, then surveys.

    Where `todo` alone is to be merged, others are read for what is measured over the model.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: There is no room on the disk.
    """
    fitted = FittedJob(job, fit_chain(job, todo, crew, progress))
    for i, group in enumerate(job.groups):
        if group.survey is not None:
            name, apply = f"{group.name}-{i}", fitted.chain.apply
            measured = run_survey(job.source, group.survey, name, apply, group.surveyed(), crew, progress)
            fitted.measured.update(dict.fromkeys((tensor.name for tensor in group.tensors), measured))
    return fitted
