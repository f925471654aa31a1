"""One vector that is subtracted from all task vectors, fitted in one pass.

The vector is a combination of the task vectors, so a few coefficients for each group (a row, a tensor, the model) are
all that is kept between the passes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelmerge.engine import memory
from modelmerge.engine.figures import Entanglement, Figures, entanglement_of
from modelmerge.engine.job import Job, Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import in_order, summed
from modelmerge.engine.pieces import Piece, Pieces, piece_bytes
from modelmerge.engine.units import LITTLE, Crew, Unit, cut
from modelmerge.methods.contract import SharedVector, Solution, Watch
from modelmerge.plan.tensors import TensorPlan, Tensors
from modelmerge.progress import Reporter

if TYPE_CHECKING:
    from modelmerge.engine.transforms import Chain


@dataclass(slots=True)
class FittedVector:
    """The vector of each group, as coefficients.

    `coefficients` [G, T] float32 and `active` [G, T], on the host, are by tensor; G is the tensor's rows, or 1.
    """

    by_row: bool
    keeps_factors = False
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    active: dict[str, Tensor] = field(default_factory=dict)
    entanglement: dict[str, Entanglement] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # mean over the groups, at each step

    def apply(self, piece: Piece, taus: Tensor) -> Tensor | None:
        """Subtract the vector from the task vectors [T, *shape], in place; the vector [*shape] itself.

        None for a tensor that has none. Product by product, not as a matrix product, so that the bits do not depend
        on where a tensor is cut.
        """
        if piece.tensor.name not in self.coefficients:
            return None
        coefficients, active = self._groups_of(piece)
        coefficients = coefficients.to(taus.device)
        grouped = taus.view(len(taus), -1, piece.tensor.shape[1]) if self.by_row else taus.view(len(taus), 1, -1)
        delta = grouped[0] * coefficients[:, :1]
        for k in range(1, len(grouped)):
            delta.add_(grouped[k] * coefficients[:, k : k + 1])
        for k in range(len(grouped)):
            takes_part = active[:, k : k + 1]
            grouped[k].sub_(delta if bool(takes_part.all()) else delta * takes_part.to(taus.device))
        return delta.view(taus.shape[1:])

    def _groups_of(self, piece: Piece) -> tuple[Tensor, Tensor]:
        width = piece.tensor.shape[1]
        rows = slice(piece.start // width, piece.stop // width) if self.by_row else slice(None)
        return self.coefficients[piece.tensor.name][rows], self.active[piece.tensor.name][rows]

    def weights(self, tensor: str, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The experts' weights, which stay."""
        return weights

    def figures(self) -> Figures:
        """The loss at each step, and inner products by tensor."""
        return Figures(self.losses, len(self.losses) - 1, self.entanglement)

    def keep(self, tensor: str, solution: Solution, device: torch.device) -> None:
        """Keep the solution of a tensor (or, row by row, of its next rows)."""
        parts = (solution.coefficients.to(device, torch.float32), solution.active.to("cpu", torch.float32))
        for kept, part in zip((self.coefficients, self.active), parts, strict=True):
            kept[tensor] = torch.cat([kept[tensor], part]) if tensor in kept else part


@dataclass(frozen=True, slots=True)
class VectorTransform:
    """Fits and subtracts a shared vector."""

    name: str
    by: SharedVector
    options: Any
    shares_vector = True

    @property
    def by_tensor(self) -> bool:
        """Whether each row has a vector of its own; those of tensors are found together."""
        return bool(self.options.granularity == "row")

    def takes(self, tensor: TensorPlan) -> bool:
        """Whether it is the weight of a linear layer."""
        return tensor.linear

    def needs(self, job: Job, tensors: Tensors) -> memory.Needs:
        """What fitting takes."""
        return memory.fit_shared_vector(job.source, tensors, self.options.granularity)

    def fit(self, job: Job, tensors: Tensors, before: Chain, crew: Crew, progress: Reporter) -> FittedVector:
        """Find the vectors in one pass."""
        source, granularity = job.source, self.options.granularity
        fitted = FittedVector(by_row=granularity == "row")
        progress.stage("disentangling", sum(source.plan.stored_bytes(t, experts=True) for t in tensors))
        units = cut(f"fit:{self.name}-{len(before.links)}", source.plan, tensors, LITTLE)
        if fitted.by_row:
            self._fit_rows(source, units, before, fitted, crew, progress)
            return fitted
        grams: dict[str, Tensor] = {}
        for _, part in crew.share(units, lambda unit: self._grams(source, unit.tensors, before, progress)):
            grams |= part
        # The descent takes many small steps and shows each: a device would be waited for at every one.
        stacked = torch.stack(list(grams.values())).cpu()
        grams = dict(zip(grams, stacked, strict=True))
        groups = stacked if granularity == "tensor" else stacked.sum(0, keepdim=True)
        progress.stage("descending", self.options.steps + 1, "steps")
        watch: Watch = lambda loss: progress.advance(1, f"loss {loss:.4f}")  # noqa: E731
        self._share_out(source, self.by.solve(groups, self.options, watch), grams, fitted)
        return fitted

    def _fit_rows(
        self, source: Source, units: Sequence[Unit], before: Chain, fitted: FittedVector, crew: Crew, progress: Reporter
    ) -> None:

        def solve(piece: Piece, loader: Loader) -> tuple[Solution, Entanglement]:
            _, taus = loader.load(piece, check=True)
            before.apply(piece, taus)
            grams = self.by.measure(taus.view(len(taus), -1, piece.tensor.shape[1]))
            solution = self.by.solve(grams, self.options, None)
            loss = solution.losses[-1].item() / len(grams)
            progress.advance(piece_bytes(source.plan, piece), f"{piece.tensor.name}  loss {loss:.4f}")
            return solution, entanglement_of(grams, solution)

        def fit_unit(unit: Unit) -> dict[str, Any]:
            groups, losses, found = 0, torch.zeros(()), FittedVector(by_row=True)

            def keep(piece: Piece, solved: tuple[Solution, Entanglement]) -> None:
                nonlocal groups, losses
                name, (solution, part) = piece.tensor.name, solved
                found.keep(name, solution, source.device)
                groups += len(solution.active)
                losses = losses + solution.losses.cpu()
                entanglement = found.entanglement
                entanglement[name] = entanglement[name] + part if piece.start else copy.deepcopy(part)

            in_order(source, Pieces(unit.tensors, source.block), solve, keep)
            parts = {name: (part.before, part.after, part.change) for name, part in found.entanglement.items()}
            return {"coefficients": found.coefficients, "active": found.active, "entanglement": parts,
                    "losses": losses, "groups": groups}  # fmt: skip

        groups, losses = 0, torch.zeros(())
        for _, found in crew.share(units, fit_unit):
            groups, losses = groups + found["groups"], losses + found["losses"]
            fitted.coefficients |= found["coefficients"]
            fitted.active |= found["active"]
            fitted.entanglement |= {name: Entanglement(*part) for name, part in found["entanglement"].items()}
        fitted.losses = (losses / max(groups, 1)).tolist()

    def _grams(self, source: Source, tensors: Tensors, before: Chain, progress: Reporter) -> dict[str, Tensor]:
        """The Gram matrix of each tensor's task vectors, float64 [T, T]."""

        def measure(piece: Piece, loader: Loader) -> Tensor:
            _, taus = loader.load(piece, check=True)
            before.apply(piece, taus)
            progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)
            return self.by.measure(taus[:, None, :])[0]

        return summed(source, tensors, measure)

    def _share_out(self, source: Source, solution: Solution, grams: Mapping[str, Tensor], fitted: FittedVector) -> None:
        """Hand each tensor its part of a solution that has a group for each tensor, or one for the model."""
        for i, (name, gram) in enumerate(grams.items()):
            group = i if self.options.granularity == "tensor" else 0
            part = Solution(solution.coefficients[group][None], solution.active[group][None], solution.losses)
            fitted.keep(name, part, source.device)
            fitted.entanglement[name] = entanglement_of(gram[None], part)
        fitted.losses = (solution.losses.cpu() / len(solution.active)).tolist()
