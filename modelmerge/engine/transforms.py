"""Disentangling on the way: fit in one pass, change the task vectors in every pass after it.

A redundant vector is a combination of the task vectors, so a few coefficients for each group (a row, a tensor, the
model) are all that is kept between the passes. Matrices that correct whole weights wait in a file beside the output,
and come back in whatever pieces a pass wants: to find them anew in each pass would take some thirty times the work of
all that reading (7 s of processor time against 0.2 s for two blocks of a ViT-B/32 and eight experts, three passes).
Either way models far larger than memory go through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from modelmerge.checkpoint.staging import Scratch
from modelmerge.engine.job import SMALL, Source
from modelmerge.engine.loader import Loader, Piece, as_bytes, known_factors, piece_bytes, whole, wholes
from modelmerge.engine.memory import correcting_beyond, matrix_bytes, together
from modelmerge.engine.parallel import current, gathered, side_by_side, threads
from modelmerge.engine.survey import run_survey
from modelmerge.methods.contract import Context, Correction, Disentangler, Redundancy, Solution, Watch
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

_RUN = 1 << 16  # entries of each vector that are widened at a time


@dataclass(frozen=True, slots=True)
class Entanglement:
    """One tensor's inner products: float64 [T, T] before and after, and the squared norm of what was taken out.

    Of a matrix that corrects it; of several, the mean.
    """

    before: Tensor
    after: Tensor
    redundant: float

    def __add__(self, other: Entanglement) -> Entanglement:
        """That of two parts together."""
        return Entanglement(self.before + other.before, self.after + other.after, self.redundant + other.redundant)


class Front(Protocol):
    """A fitted disentangler."""

    entanglement: dict[str, Entanglement]  # by tensor
    losses: list[float]

    def take_out(self, piece: Piece, taus: Tensor) -> Tensor | None:
        """Change the task vectors [T, *shape] of any piece, in place; the one vector taken out of all, if it is one."""


@dataclass(slots=True)
class Redundant:
    """One vector that is taken out of all task vectors, in each group.

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


@dataclass(slots=True)
class Correcting:
    """Matrices in a file that correct whole weights.

    `places`: where those of each tensor begin there, one after the other, float32. `numbers` as `find` gave them.
    """

    by: Correction
    scratch: Scratch
    matrices: int
    places: dict[str, int]
    numbers: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    entanglement: dict[str, Entanglement] = field(default_factory=dict)
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # before and after, summed over the tensors

    def take_out(self, piece: Piece, taus: Tensor) -> None:
        """Correct the task vectors [T, *shape], in place; what is not corrected stays as it is."""
        if piece.tensor.name not in self.places:
            return
        matrices = torch.empty(self.matrices, piece.stop - piece.start)
        for i, matrix in enumerate(matrices):
            place = self.places[piece.tensor.name] + 4 * (i * piece.tensor.numel + piece.start)
            self.scratch.read_into(place, as_bytes(matrix))
        self.by.correct(taus.view(len(taus), -1), matrices.to(taus.device), self.numbers[piece.tensor.name])


def fit(
    source: Source,
    chosen: tuple[Disentangler, Any],
    tensors: Sequence[TensorPlan],
    scratch: Callable[[int], Scratch],
    reporter: Reporter,
) -> Front:
    """Find how the tensors' task vectors are to be changed, in one pass over them, or more if that takes a survey.

    Args:
        source: Where the task vectors come from.
        chosen: The disentangler with its options.
        tensors: The weights of linear layers.
        scratch: Gives room of so many bytes on the disk, for matrices that wait.
        reporter: Is told the progress.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The matrices do not fit on the disk.
    """
    method, options = chosen
    if isinstance(method.by, Correction):
        return _fit_matrices(source, method.by, options, tensors, scratch, reporter)
    return _fit_redundant(source, method.by, options, tensors, reporter)


def _fit_matrices(
    source: Source,
    by: Correction,
    options: Any,
    tensors: Sequence[TensorPlan],
    scratch: Callable[[int], Scratch],
    reporter: Reporter,
) -> Correcting:
    """Modest weights side by side, large ones in turn."""
    tasks, survey = len(source.plan.experts), by.survey(options)
    count, places, end = by.matrices(options, tasks), {}, 0
    for tensor in tensors:
        places[tensor.name] = end
        end += matrix_bytes(tensor, count)
    front = Correcting(by, scratch(end), count, places)
    counted = [tensor for tensor in tensors if tensor.twin is None]
    measured = run_survey(source, survey, None, counted, reporter) if survey else None
    reporter.stage("disentangling", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))
    losses: dict[str, tuple[float, float]] = {}
    left = correcting_beyond(source, by, options, tensors)

    def solve(piece: Piece, taus: Tensor) -> None:
        name = piece.tensor.name
        context = Context(
            tensor=name, weights=(1.0,) * tasks, experts=tuple(expert.name for expert in source.plan.experts),
            measured=measured, factors=known_factors(source, piece.tensor) if piece.tensor.name not in left else None,
        )  # fmt: skip
        found = by.find(taus, options, context)
        flat = taus.view(tasks, -1)
        before, square = _gram(flat), float(_gram(found.matrices.view(count, -1)).trace()) / count
        front.scratch.write(places[name], as_bytes(found.matrices.flatten().cpu()))
        by.correct(flat, found.matrices.view(count, -1), found.numbers)
        front.numbers[name], losses[name] = found.numbers, found.losses
        front.entanglement[name] = Entanglement(before, _gram(flat), square)
        reporter.advance(piece_bytes(source.plan, piece), name)

    def solve_alone(tensor: TensorPlan) -> None:
        piece, _, taus = whole(source, tensor, check=survey is None)
        solve(piece, taus)

    side_by_side(source, [tensor for tensor in tensors if together(source, tensor)], solve_alone)
    with current(source.device):
        for piece, _, taus in wholes(source, [t for t in tensors if not together(source, t)], check=survey is None):
            with threads(1 if piece.tensor.numel <= SMALL else torch.get_num_threads()):
                solve(piece, taus.cpu() if piece.tensor.name in left else taus)
    front.entanglement = {tensor.name: front.entanglement[tensor.name] for tensor in tensors}
    front.losses = [math.fsum(found) for found in zip(*losses.values(), strict=True)]
    return front


def _gram(vectors: Tensor) -> Tensor:
    """The inner products of vectors [T, n], float64 [T, T], on the host; some entries at a time."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for part in vectors.split(_RUN, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total.cpu()


def _fit_redundant(
    source: Source, method: Redundancy, options: Any, tensors: Sequence[TensorPlan], reporter: Reporter
) -> Redundant:
    front = Redundant(by_row=options.granularity == "row")
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
    source: Source,
    method: Redundancy,
    options: Any,
    tensors: Sequence[TensorPlan],
    front: Redundant,
    reporter: Reporter,
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


def _grams(source: Source, method: Redundancy, tensors: Sequence[TensorPlan], reporter: Reporter) -> dict[str, Tensor]:
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
    source: Source,
    method: Redundancy,
    options: Any,
    tensors: Sequence[TensorPlan],
    front: Redundant,
    reporter: Reporter,
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


def _share_out(source: Source, solution: Solution, grams: Mapping[str, Tensor], options: Any, front: Redundant) -> None:
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
