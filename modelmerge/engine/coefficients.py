"""Weights of experts and tensors, found on unlabelled data before anything is merged.

Whole models are held in memory: `theta_0`, every task vector, the merged model, and its gradient. All tasks'
classifiers share the merged model's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelmerge.checkpoint.staging import Scratch
from modelmerge.engine.given import give
from modelmerge.engine.job import Findings, Job
from modelmerge.engine.loader import piece_bytes, wholes
from modelmerge.engine.parallel import current, prepare_process
from modelmerge.errors import CheckpointError, ModelMergeError, PlanError
from modelmerge.methods.contract import Finder
from modelmerge.plan.tensors import TensorPlan
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
class Found:
    """What was found: by tensor, a weight for each expert; and the losses on the way, [steps][tasks]."""

    weights: dict[str, tuple[float, ...]]
    losses: list[list[float]]


def find_weights(
    job: Job, problems: Callable[[], Iterable[Problem]], scratch: Callable[[int], Scratch], reporter: Reporter
) -> Found:
    """Find the weights that the job's method asks for, on the data of its tasks.

    They stand in front of the experts' own (`--weight`, `--vary`), which count as part of the task vectors.

    Args:
        job: The merge.
        problems: Makes the tasks' problems, one after the other, once the models have been read.
        scratch: Gives room of so many bytes on the disk.
        reporter: Is told the progress.

    Raises:
        CheckpointError: A weight or a prediction is NaN or Inf.
        PlanError: A module and the checkpoint do not go together.
        ModelMergeError: A module cannot be called with its data, or does not give logits.
    """
    prepare_process()
    (part,) = job.parts
    assert part.method.finder is not None, "only methods with a finder look for weights"
    # Tied tensors are one: they have one value and the same weights.
    tied = {t.name: t.twin or t.name for t in part.tensors if t.numel}
    with current(job.source.device):
        changed, still = _read(job, part.surveyed(), scratch, reporter)
        if not changed:
            raise PlanError(
                "all experts are the same as the base: there are no weights to find", hint="check the references"
            )
        finder, losses = part.method.finder(changed, part.options), []
        values = {name: finder.values.get(first, still.get(first)) for name, first in tied.items()}
        for problem in problems():  # one at a time: each comes with a whole module
            _put_in(problem, values, changed, job)
            losses.append(_loss_of(problem, finder))
        for value in finder.values.values():
            value.requires_grad_()
        reporter.stage("adapting", part.options.steps, "steps")
        told: list[list[float]] = []
        for step in finder.steps(losses):
            if not told:
                _refuse_unread(finder.unread())
            told.append(step)
            reporter.advance(1, f"entropy {sum(step) / len(step):.4f}")
    found = finder.found()
    return Found({name: found[first] for name, first in tied.items() if first in found}, told)


def _read(
    job: Job, tensors: Sequence[TensorPlan], scratch: Callable[[int], Scratch], reporter: Reporter
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """`theta_0` and task vectors of the tensors that change, by name; and `theta_0` of those that do not."""
    given = give(job, Findings(), scratch, reporter)
    reporter.stage("reading", sum(job.plan.stored_bytes(t, experts=True) for t in tensors))
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    still: dict[str, Tensor] = {}
    for piece, theta_0, taus in wholes(job.source, tensors, check=True):
        name = piece.tensor.name
        given.ready(piece, taus)
        setting = job.settings.get(name)
        weights = job.weights if setting is None else setting.weights
        for tau, weight in zip(taus, weights, strict=True):
            if weight != 1.0:
                tau.mul_(weight)
        if bool(taus.any()):
            changed[name] = theta_0.to(taus.dtype), taus
        else:
            still[name] = torch.nn.Parameter(theta_0.to(taus.dtype), requires_grad=False)
        reporter.advance(piece_bytes(job.plan, piece), name)
    return changed, still


def _put_in(problem: Problem, values: Mapping[str, Tensor | None], changed: Container[str], job: Job) -> None:
    """Have a module use these tensors in the place of its own, wherever it does; its own learn nothing."""
    module = problem.module.float().to(job.source.device).eval().requires_grad_(False)
    own = module.state_dict(keep_vars=True)
    wanted = {name: value for name, value in values.items() if value is not None}
    lacking = [name for name in wanted if name in changed and problem.names.get(name) not in own]
    if lacking:
        raise PlanError(
            f"the module of '{problem.name}' lacks {len(lacking)} of the tensors that the experts changed: "
            f"{_listed(lacking)}; it has {_listed(list(own))}",
            hint="its state dict must name them as the checkpoint does; --exclude GLOB takes the base's instead",
        )
    # A tensor that is used in two places is replaced in both.
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for part in module.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            places.setdefault(id(tensor), []).append((part, name))
    for name, value in wanted.items():
        key = problem.names.get(name)
        if key not in own:
            continue
        if own[key].shape != value.shape:
            raise PlanError(
                f"the module of '{problem.name}' has '{key}' of shape {list(own[key].shape)}, and the base has "
                f"{list(value.shape)}",
                hint="is it made by the base's config?",
            )
        for part, place in places[id(own[key])]:
            setattr(part, place, value)


def _loss_of(problem: Problem, finder: Finder) -> Callable[[], Tensor]:
    """What a finder calls for a task's loss on the next batch."""

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
                hint="a smaller --lr or --init may help; are the data and the experts' weights whole?",
            )
        return finder.loss(logits)

    return loss


def _refuse_unread(names: Sequence[str]) -> None:
    if names:
        raise PlanError(
            f"no prediction depends on {len(names)} of the tensors that the experts changed: {_listed(names)}",
            hint="no weights can be found for them; --exclude GLOB takes the base's instead",
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_FEW])
    return f"{shown} and {len(names) - _FEW} more" if len(names) > _FEW else shown
