"""Matrices that correct whole weights, solved once and kept in a file beside the output.

They come back in whatever pieces a pass asks for: to find them anew in each pass would take some thirty times the work
of all that reading (7 s of processor time against 0.2 s for two blocks of a ViT-B/32 and eight experts, three passes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import as_bytes
from modelmerge.checkpoint.scratch import Scratch
from modelmerge.devices import current
from modelmerge.engine import memory
from modelmerge.engine.figures import Entanglement, Figures
from modelmerge.engine.job import SMALL, Job
from modelmerge.engine.loader import factors_of, whole, wholes
from modelmerge.engine.parallel import run_interruptibly, side_by_side, threads
from modelmerge.engine.pieces import Piece
from modelmerge.engine.survey import run_survey
from modelmerge.engine.units import LITTLE, Crew, Unit, cut, piece_cost, work_on
from modelmerge.methods.contract import Context, Correction
from modelmerge.methods.work import Work
from modelmerge.plan.tensors import TensorPlan, Tensors
from modelmerge.progress import Reporter

if TYPE_CHECKING:
    from modelmerge.engine.transforms import Chain

_RUN = 1 << 16  # entries of each vector that are widened at a time


@dataclass(slots=True)
class FittedCorrection:
    """Matrices in files.

    `places`: in which file those of each tensor are, and where they begin there, one after the other, float32.
    `numbers` as `find` gave them.
    """

    by: Correction
    matrices: int
    places: dict[str, tuple[Scratch, int]] = field(default_factory=dict)
    keeps_factors = False
    numbers: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    entanglement: dict[str, Entanglement] = field(default_factory=dict)
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # before and after, summed over the tensors

    def apply(self, piece: Piece, taus: Tensor) -> None:
        """Correct the task vectors [T, *shape], in place; a tensor without matrices stays as it is."""
        if piece.tensor.name not in self.places:
            return
        matrices = torch.empty(self.matrices, piece.stop - piece.start)
        scratch, start = self.places[piece.tensor.name]
        for i, matrix in enumerate(matrices):
            scratch.read_into(start + 4 * (i * piece.tensor.numel + piece.start), as_bytes(matrix))
        self.by.correct(taus.view(len(taus), -1), matrices.to(taus.device), self.numbers[piece.tensor.name])

    def weights(self, tensor: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights, which stay."""
        return weights

    def figures(self) -> Figures:
        """The losses before and after, and inner products by tensor."""
        return Figures(self.losses, None, self.entanglement)


@dataclass(frozen=True, slots=True)
class CorrectionTransform:
    """Finds matrices weight by weight and corrects with them."""

    name: str
    by: Correction
    options: Any
    shares_vector = False

    @property
    def by_tensor(self) -> bool:
        """Whether nothing is counted over the model."""
        return self.by.survey(self.options) is None

    def takes(self, tensor: TensorPlan) -> bool:
        """Whether it is the weight of a linear layer."""
        return tensor.linear

    def _does(self, m: int, n: int, tasks: int) -> Work:
        """What finding the matrices of one weight is."""
        return self.by.work(self.options, m, n, tasks)

    def needs(self, job: Job, tensors: Tensors) -> memory.Needs:
        """What fitting takes."""
        return memory.fit_correction(job.source, tensors, self.by, self.options)

    def fit(self, job: Job, tensors: Tensors, before: Chain, crew: Crew, progress: Reporter) -> FittedCorrection:
        """Find the matrices: of modest weights side by side, of large ones in turn."""
        source, name = job.source, f"{self.name}-{len(before.links)}"
        survey = self.by.survey(self.options)
        measured = None
        if survey:
            counted = [tensor for tensor in tensors if tensor.twin is None]
            measured = run_survey(source, survey, name, before.apply, counted, crew, progress)
        units = cut(f"fit:{name}", source.plan, tensors, LITTLE, does=self._does)
        progress.stage("disentangling", sum(unit.cost for unit in units), "work")
        count = self.by.matrices(self.options, len(job.plan.experts))
        fitted, losses = FittedCorrection(self.by, count), []

        def solve(unit: Unit) -> dict[str, Any]:
            return self._solve(job, unit, before, count, measured, crew, progress)

        for unit, found in crew.share(units, solve):
            starts, _ = _places(unit, count)
            for tensor in unit.tensors:
                fitted.numbers[tensor.name], each, entanglement = found[tensor.name]
                fitted.entanglement[tensor.name] = Entanglement(*entanglement)
                fitted.places[tensor.name] = crew.kept(unit), starts[tensor.name]
                losses.append(each)
        fitted.losses = [math.fsum(each) for each in zip(*losses, strict=True)]
        return fitted

    def _solve(
        self, job: Job, unit: Unit, before: Chain, count: int, measured: Tensor | None, crew: Crew, progress: Reporter
    ) -> dict[str, Any]:
        """Numbers, losses and inner products by tensor; the matrices go into what the unit keeps."""
        source, tasks, tensors = job.source, len(job.plan.experts), unit.tensors
        on_host = memory.correction_beyond_device(source, unit.stage, self.by, self.options)
        starts, nbytes = _places(unit, count)
        scratch, found = crew.keep(unit, nbytes), {}

        def solve(piece: Piece, taus: Tensor) -> None:
            name = piece.tensor.name
            factors = factors_of(source, piece.tensor, taus.device) if before.keeps_factors else None
            context = Context(
                tensor=name, weights=(1.0,) * tasks, experts=job.experts, factors=factors,
                measured=None if measured is None else measured.to(taus.device),
            )  # fmt: skip
            solved = run_interruptibly(self.by.find, taus, self.options, context)
            flat = taus.view(tasks, -1)
            gram, square = _gram(flat), float(_gram(solved.matrices.view(count, -1)).trace()) / count
            scratch.write(starts[name], as_bytes(solved.matrices.flatten().cpu()))
            self.by.correct(flat, solved.matrices.view(count, -1), solved.numbers)
            found[name] = (solved.numbers, solved.losses, (gram, _gram(flat), square))
            progress.advance(piece_cost(source.plan, piece, work_on(source.plan, piece.tensor, self._does)), name)

        def solve_alone(tensor: TensorPlan) -> None:
            progress.begin(tensor.name)
            piece, _, taus = whole(source, tensor, check=measured is None)
            before.apply(piece, taus)
            solve(piece, taus)

        side_by_side(source, [tensor for tensor in tensors if memory.together(source, tensor)], solve_alone)
        large = [tensor for tensor in tensors if not memory.together(source, tensor)]
        with current(source.device):
            for piece, _, taus in wholes(source, large, check=measured is None, on_host=on_host):
                progress.begin(piece.tensor.name)
                with threads(1 if piece.tensor.numel <= SMALL else torch.get_num_threads()):
                    before.apply(piece, taus)
                    solve(piece, taus)
        return found


def _places(unit: Unit, count: int) -> tuple[dict[str, int], int]:
    """Where the `count` matrices of each tensor begin in what a unit keeps, and how many bytes that is."""
    starts, end = {}, 0
    for tensor in unit.tensors:
        starts[tensor.name] = end
        end += memory.matrix_bytes(tensor, count)
    return starts, end


def _gram(vectors: Tensor) -> Tensor:
    """The inner products of vectors [T, n], float64 [T, T], on the host; some entries at a time."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for part in vectors.split(_RUN, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total.cpu()
