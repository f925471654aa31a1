"""Disentangling on the way: fit coefficients in one pass, take the redundant vector out in every pass after it.

The redundant vector is a combination of the task vectors, so a few coefficients for each group (a row, a tensor, the
model) are all that is kept between the passes: models far larger than memory go through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modelmerge.engine.job import Source
from modelmerge.engine.stream import Loader, Piece, gathered, piece_bytes, whole
from modelmerge.method import Disentangler, Solution, Watch
from modelmerge.plan import TensorPlan
from modelmerge.report import Reporter


@dataclass(frozen=True, slots=True)
class Entanglement:
    """One tensor's inner products: float64 [T, T] before and after, and the redundant vector's squared norm."""

    before: Tensor
    after: Tensor
    redundant: float

    def __add__(self, other: Entanglement) -> Entanglement:
        """That of two parts together."""
        return Entanglement(self.before + other.before, self.after + other.after, self.redundant + other.redundant)


@dataclass(slots=True)
class Front:
    """A fitted disentangler.

    `coefficients` [G, T] float32 and `active` [G, T] are by tensor; G is the tensor's rows, or 1.
    """

    by_row: bool
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    active: dict[str, Tensor] = field(default_factory=dict)
    entanglement: dict[str, Entanglement] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # mean over the groups, at each step

    def take_out(self, piece: Piece, taus: Tensor) -> Tensor | None:
        """Subtract the redundant vector from the task vectors [T, *shape], in place; the vector [*shape] itself.

        None for a tensor that is not disentangled. Product by product, not as a matrix product, so that the bits do
        not depend on where a tensor is cut.
        """
        if piece.tensor.name not in self.coefficients:
            return None
        coefficients, active = self._of(piece)
        grouped = self._grouped(piece, taus)
        delta = grouped[0] * coefficients[:, :1]
        for k in range(1, len(grouped)):
            delta.add_(grouped[k] * coefficients[:, k : k + 1])
        for k in range(len(grouped)):
            if bool(active[:, k].all()):
                grouped[k].sub_(delta)
            else:
                grouped[k].sub_(delta * active[:, k : k + 1])
        return delta.view(taus.shape[1:])

    def _of(self, piece: Piece) -> tuple[Tensor, Tensor]:
        coefficients, active = self.coefficients[piece.tensor.name], self.active[piece.tensor.name]
        if not self.by_row:
            return coefficients, active
        width = piece.tensor.shape[1]
        rows = slice(piece.start // width, piece.stop // width)
        return coefficients[rows], active[rows]

    def _grouped(self, piece: Piece, taus: Tensor) -> Tensor:
        """The task vectors [T, *shape] as [T, G, n], sharing memory."""
        return taus.view(len(taus), -1, piece.tensor.shape[1]) if self.by_row else taus.view(len(taus), 1, -1)

    def settle(self, tensor: str, solution: Solution, device: torch.device) -> None:
        """Keep what was found for a tensor (or, row by row, for its next rows)."""
        found = (solution.coefficients.to(device, torch.float32), solution.active.to(device, torch.float32))
        for kept, new in zip((self.coefficients, self.active), found, strict=True):
            kept[tensor] = torch.cat([kept[tensor], new]) if tensor in kept else new


def fit(
    source: Source,
    chosen: tuple[Disentangler, Any],
    tensors: Sequence[TensorPlan],
    reporter: Reporter,
) -> Front:
    """Find the redundant vector of every group of the tensors, in one pass over them.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    method, options = chosen
    front = Front(by_row=options.granularity == "row")
    reporter.stage("disentangling", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))
    if options.granularity == "row":
        _fit_rows(source, method, options, tensors, front, reporter)
    elif options.solver == "gram":
        grams = _grams(source, method, tensors, reporter)
        names = list(grams)
        by_tensor = options.granularity == "tensor"
        stacked = torch.stack([grams[name] for name in names])
        solution = method.solve(
            stacked if by_tensor else stacked.sum(0, keepdim=True), options, _watch(options, reporter)
        )
        _share_out(source, solution, grams, options, front)
    else:
        _fit_vectors(source, method, options, tensors, front, reporter)
    return front


def _fit_rows(
    source: Source, method: Disentangler, options: Any, tensors: Sequence[TensorPlan], front: Front, reporter: Reporter
) -> None:

    def solve(piece: Piece, loader: Loader) -> tuple[Solution, Entanglement]:
        _, taus = loader.load(piece, check=True)
        rows = taus.view(len(taus), -1, piece.tensor.shape[1])
        grams = method.measure(rows)
        if options.solver == "descent":
            solution = method.descend(rows, options, None)
        else:
            solution = method.solve(grams, options, None)
        loss = solution.losses[-1].item() / len(grams)
        reporter.advance(piece_bytes(source.plan, piece), f"{piece.tensor.name}  loss {loss:.4f}")
        return solution, entanglement_of(grams, solution)

    groups, losses = 0, torch.zeros(())
    for piece, (solution, part) in gathered(source, tensors, solve):
        name = piece.tensor.name
        front.settle(name, solution, source.device)
        groups += len(solution.active)
        losses = losses + solution.losses.cpu()
        front.entanglement[name] = front.entanglement[name] + part if piece.start else part
    front.losses = (losses / max(groups, 1)).tolist()


def _watch(options: Any, reporter: Reporter) -> Watch:
    """A stage of its own for a solver's steps, with the loss shown as it falls."""
    reporter.stage("descending", options.steps + 1, "steps")
    return lambda loss: reporter.advance(1, f"loss {loss:.4f}")


def _grams(
    source: Source, method: Disentangler, tensors: Sequence[TensorPlan], reporter: Reporter
) -> dict[str, Tensor]:
    """The Gram matrix of each tensor's task vectors, float64 [T, T]."""

    def measure(piece: Piece, loader: Loader) -> Tensor:
        _, taus = loader.load(piece, check=True)
        reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)
        return method.measure(taus[:, None, :])[0]

    grams: dict[str, Tensor] = {tensor.name: torch.zeros((), device=source.device) for tensor in tensors}
    for piece, gram in gathered(source, tensors, measure):
        grams[piece.tensor.name] = grams[piece.tensor.name] + gram
    return grams


def _fit_vectors(
    source: Source, method: Disentangler, options: Any, tensors: Sequence[TensorPlan], front: Front, reporter: Reporter
) -> None:
    """Descend on whole vectors, of each tensor or of the model."""

    def load(tensor: TensorPlan) -> Tensor:
        piece, _, taus = whole(source, tensor, check=True)
        reporter.advance(piece_bytes(source.plan, piece), tensor.name)
        return taus.flatten(1)[:, None, :].to(source.device)  # [T, 1, n]

    if options.granularity == "model":
        loaded = [load(tensor) for tensor in tensors]
        grams = {tensor.name: method.measure(taus)[0] for tensor, taus in zip(tensors, loaded, strict=True)}
        taus = torch.cat(loaded, dim=2)
        loaded.clear()
        _share_out(source, method.descend(taus, options, _watch(options, reporter)), grams, options, front)
        return
    grams, solutions = {}, []
    for tensor in tensors:
        taus = load(tensor)
        grams[tensor.name] = method.measure(taus)[0]
        solutions.append(method.descend(taus, options, None))
    joined = Solution(
        torch.cat([s.coefficients for s in solutions]),
        torch.cat([s.active for s in solutions]),
        sum((s.losses for s in solutions), torch.zeros((), device=source.device)),
    )
    _share_out(source, joined, grams, options, front)


def _share_out(source: Source, solution: Solution, grams: Mapping[str, Tensor], options: Any, front: Front) -> None:
    """Hand each tensor its part of a solution that has a group for each tensor, or one for the model."""
    for i, (name, gram) in enumerate(grams.items()):
        group = i if options.granularity == "tensor" else 0
        own = Solution(solution.coefficients[group][None], solution.active[group][None], solution.losses)
        front.settle(name, own, source.device)
        front.entanglement[name] = entanglement_of(gram[None], own)
    front.losses = (solution.losses.cpu() / len(solution.active)).tolist()


def entanglement_of(grams: Tensor, solution: Solution) -> Entanglement:
    """Inner products of all groups together, before and after: with `v_i = tau_i - active_i delta`, U K U^T."""
    identity = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device)
    change = identity - solution.active.to(grams.dtype)[:, :, None] * solution.coefficients[:, None, :]
    after = (change @ grams @ change.mT).sum(0)
    redundant = torch.einsum("gi,gij,gj->", solution.coefficients, grams, solution.coefficients)
    return Entanglement(grams.sum(0).cpu(), after.cpu(), max(float(redundant), 0.0))
