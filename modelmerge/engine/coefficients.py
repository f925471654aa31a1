"""A factor on the weight of each expert and tensor, found on unlabelled data before anything is merged.

Whole models are held in memory: `theta_0`, every task vector, the merged model, and its gradient. All tasks'
classifiers share the merged model's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelmerge.devices import current
from modelmerge.engine import memory
from modelmerge.engine.figures import Figures
from modelmerge.engine.job import Job
from modelmerge.engine.loader import wholes
from modelmerge.engine.parallel import prepare_process
from modelmerge.engine.pieces import Piece, piece_bytes
from modelmerge.engine.transforms import Chain, FittedJob
from modelmerge.engine.units import Crew
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError, named
from modelmerge.methods.coefficients import Mixture, Options
from modelmerge.methods.signs import times
from modelmerge.plan.tensors import TensorPlan, Tensors
from modelmerge.progress import Reporter

_FEW = 3  # names that an error lists


@dataclass(frozen=True, slots=True)
class Problem:
    """A task: its classifier, and its unlabelled data.

    Args:
        name: The task's.
        module: The tensors that are merged are put into it; the rest stays as it is.
        names: By the names of tensors in the checkpoint, those in the module's state dict.
        predict: The logits [N, C] that the module gives of the next batch.
    """

    name: str
    module: torch.nn.Module
    names: Mapping[str, str]
    predict: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class CoefficientTable:
    """Coefficients by tensor, one for each expert, and the losses on the way to them, [steps][tasks].

    They multiply the experts' weights; the task vectors stay. A tensor without coefficients keeps its weights.
    """

    factors: Mapping[str, tuple[float, ...]]
    losses: Sequence[Sequence[float]] = ()
    keeps_factors = True

    def apply(self, piece: Piece, taus: Tensor) -> None:
        """Leave the task vectors as they are."""

    def weights(self, tensor: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights on a tensor times its coefficients."""
        factors = self.factors.get(tensor)
        return weights if factors is None else tuple(w * c for w, c in zip(weights, factors, strict=True))

    def figures(self) -> Figures:
        """The mean loss over the tasks, at each step."""
        return Figures([sum(step) / len(step) for step in self.losses], len(self.losses))


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Finds coefficients by losses of the merged model on unlabelled data.

    The experts' weights (`--weight`) count as part of the task vectors.

    Args:
        options: Those of the search.
        problems: Makes the tasks' problems, one after the other, once the models have been read.
        table: The coefficients, where an earlier search has found them.
    """

    options: Options | None = None
    problems: Callable[[], Iterable[Problem]] = field(default=tuple)
    table: CoefficientTable | None = None
    name = "coefficients"
    shares_vector = False

    @property
    def by_tensor(self) -> bool:
        """Whether they have been found, which takes the model."""
        return self.table is not None

    def takes(self, tensor: TensorPlan) -> bool:
        """Whether it has a value of its own: tied tensors are one, and have the same coefficients."""
        return bool(tensor.numel) and tensor.twin is None

    def needs(self, job: Job, tensors: Tensors) -> memory.Needs:
        """What finding them takes."""
        if self.table is not None:
            return memory.Needs()
        before = [t.needs(job, job.taken(t)) for t in job.transforms if t is not self]
        return memory.fit_coefficients(job, tensors, before)

    def fit(self, job: Job, tensors: Tensors, before: Chain, crew: Crew, progress: Reporter) -> CoefficientTable:
        """Find the coefficients.

        Raises:
            CheckpointError: A weight or a prediction is NaN or Inf.
            PlanError: A module and the checkpoint do not go together.
            ModelMergeError: A module cannot be called with its data, or does not give logits.
        """
        if self.table is not None:
            return self.table
        assert self.options is not None, "a search has options"
        prepare_process()
        firsts = {t.name: t.twin or t.name for t in job.merged() if t.numel}
        with current(job.source.device):
            parts, constants = _read(FittedJob(job, before), tensors, progress)
            if not parts:
                raise PlanError(
                    "all experts are the same as the base: there are no weights to find", hint="check the references"
                )
            mixture, losses = Mixture(parts, self.options), []
            values = {name: mixture.values.get(first, constants.get(first)) for name, first in firsts.items()}
            for problem in self.problems():  # one at a time: each comes with a whole module
                _put_in(problem, values, parts, job)
                losses.append(_loss_of(problem, mixture))
            for value in mixture.values.values():
                value.requires_grad_()
            progress.stage("adapting", self.options.steps, "steps")
            curve: list[list[float]] = []
            for step in mixture.steps(losses):
                if not curve and (unread := mixture.unread()):
                    some = f"{len(unread)} of the tensors that the experts changed: {_listed(unread)}"
                    raise PlanError(
                        f"no prediction depends on {some}",
                        hint=f"no weights can be found for them; {named('exclude')} GLOB takes the base's instead",
                    )
                curve.append(step)
                progress.advance(1, f"entropy {sum(step) / len(step):.4f}")
        rows = mixture.by_tensor()
        return CoefficientTable({name: rows[first] for name, first in firsts.items() if first in rows}, curve)


def _read(
    fitted: FittedJob, tensors: Tensors, progress: Reporter
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """`theta_0` and task vectors of the tensors that change, by name; and `theta_0` of those that do not."""
    source = fitted.job.source
    progress.stage("reading", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    constants: dict[str, Tensor] = {}
    for piece, theta_0, taus in wholes(source, tensors, check=True):
        name = piece.tensor.name
        fitted.chain.apply(piece, taus)
        for tau, weight in zip(taus, fitted.setting(piece.tensor).weights, strict=True):
            times(tau, weight)
        if bool(taus.any()):
            parts[name] = theta_0.to(taus.dtype), taus
        else:
            constants[name] = torch.nn.Parameter(theta_0.to(taus.dtype), requires_grad=False)
        progress.advance(piece_bytes(source.plan, piece), name)
    return parts, constants


def _put_in(problem: Problem, values: Mapping[str, Tensor | None], parts: Container[str], job: Job) -> None:
    """Have a module use these tensors in the place of its parameters, wherever it does; those learn nothing."""
    module = problem.module.float().to(job.source.device).eval().requires_grad_(False)
    parameters = module.state_dict(keep_vars=True)
    tensors = {name: value for name, value in values.items() if value is not None}
    lacking = [name for name in tensors if name in parts and problem.names.get(name) not in parameters]
    if lacking:
        raise PlanError(
            f"the module of '{problem.name}' lacks {len(lacking)} of the tensors that the experts changed: "
            f"{_listed(lacking)}; it has {_listed(list(parameters))}",
            hint="its state dict must name them as the checkpoint does; "
            f"{named('exclude')} GLOB takes the base's instead",
        )
    # A tensor that is used in two places is replaced in both.
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            places.setdefault(id(tensor), []).append((owner, name))
    for name, value in tensors.items():
        key = problem.names.get(name)
        if key not in parameters:
            continue
        if parameters[key].shape != value.shape:
            raise PlanError(
                f"the module of '{problem.name}' has '{key}' of shape {list(parameters[key].shape)}, and the base has "
                f"{list(value.shape)}",
                hint="is it made by the base's config?",
            )
        for owner, place in places[id(parameters[key])]:
            setattr(owner, place, value)


def _loss_of(problem: Problem, mixture: Mixture) -> Callable[[], Tensor]:
    """The function that gives a task's loss on the next batch."""

    def loss() -> Tensor:
        logits = problem.predict()
        if logits.ndim != 2 or logits.shape[1] < 2 or not logits.shape[0]:
            raise ModelMergeError(
                f"the module of '{problem.name}' gives a tensor of shape {list(logits.shape)}",
                hint="it must give logits: a row for each input, a column for each of two classes or more",
            )
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                f"the merged model gives NaN or Inf on the data of '{problem.name}'",
                hint=f"a smaller {named('lr')} or {named('init')} may help; are data and experts' weights whole?",
            )
        return mixture.loss(logits)

    return loss


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_FEW])
    return f"{shown} and {len(names) - _FEW} more" if len(names) > _FEW else shown
