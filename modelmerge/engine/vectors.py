"""Task vectors as files: measured in one pass, written in another, in units that any process can do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import as_bytes
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.reader import LEFT, RIGHT
from modelmerge.checkpoint.shard_file import ShardFile
from modelmerge.engine.job import SMALL, Source
from modelmerge.engine.loader import Loader, loader_of, rounded
from modelmerge.engine.parallel import in_parallel, run_interruptibly, summed, threads
from modelmerge.engine.pieces import Piece, Pieces, item_bytes, piece_bytes
from modelmerge.engine.transforms import Fitted
from modelmerge.engine.units import LITTLE, Crew, Unit, cut, work_on
from modelmerge.methods import linalg
from modelmerge.methods.work import spectra as spectra_work
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

Errors = dict[str, tuple[float, ...]]  # by tensor, the squared error of each expert's factors


@dataclass(frozen=True, slots=True)
class Measured:
    """The measures of one pass over a tensor's task vectors.

    `gram` [T, T] float64: inner products; `base_square`: the base's squared norm; `nonzero` [T]: entries that are not
    zero; `inexact` [T]: entries where base plus task vector, rounded to the expert's dtype, is not the expert.
    """

    gram: Tensor
    base_square: float
    nonzero: tuple[int, ...]
    inexact: tuple[int, ...]

    def __add__(self, other: Measured) -> Measured:
        """That of two parts of a tensor, or of two tensors, together."""
        nonzero = tuple(map(operator.add, self.nonzero, other.nonzero))
        inexact = tuple(map(operator.add, self.inexact, other.inexact))
        return Measured(self.gram + other.gram, self.base_square + other.base_square, nonzero, inexact)


class Written(Protocol):
    """What task vectors are written into."""

    def write(self, tensor: str, offset: int, data: memoryview) -> object:
        """Write a piece of a tensor, `offset` bytes from its start."""

    def write_if_wanted(self, tensor: str, offset: int, data: memoryview) -> object:
        """The same, where there is a place for it."""


def measure(source: Source, tensors: Sequence[TensorPlan], crew: Crew, progress: Reporter) -> dict[str, Measured]:
    """Read all task vectors once and measure them.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    experts, units = source.plan.experts, cut("measure", source.plan, tensors, LITTLE)
    progress.stage("measuring", sum(unit.cost for unit in units))

    def look(piece: Piece, loader: Loader) -> Measured:
        theta_0, taus = loader.load(piece, check=True)
        wide = taus.double()
        inexact = [0] * len(taus)
        for i, expert in enumerate(experts):
            info = expert.tensors.get(piece.tensor.name)
            if info is not None and info.change is None:
                stored = loader.stored(expert, piece)
                inexact[i] = int(((theta_0 + taus[i]).to(stored.dtype) != stored).sum())
        progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)
        square, nonzero = float(theta_0.double().square().sum()), tuple(taus.count_nonzero(1).tolist())
        return Measured((wide @ wide.T).cpu(), square, nonzero, tuple(inexact))

    def measure_unit(unit: Unit) -> dict[str, tuple[Any, ...]]:
        sums = summed(source, unit.tensors, look)
        return {name: (each.gram, each.base_square, each.nonzero, each.inexact) for name, each in sums.items()}

    return {name: Measured(*each) for _, part in crew.share(units, measure_unit) for name, each in part.items()}


def spectra(source: Source, tensors: Sequence[TensorPlan], crew: Crew, progress: Reporter) -> dict[str, Tensor]:
    """Singular values of each expert's task vector on whole matrices, float64 [T, min(m, n)], largest first."""
    costs = {t.name: source.plan.stored_bytes(t, experts=True) + work_on(source.plan, t, spectra_work) for t in tensors}
    progress.stage("spectra", sum(costs.values()), "work")

    def find(unit: Unit) -> dict[str, Tensor]:
        values, loader = {}, loader_of(source, unit.tensors)
        for tensor in unit.tensors:
            progress.begin(tensor.name)
            with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
                taus = loader.each(tensor, check=False)
                values[tensor.name] = torch.stack(
                    [run_interruptibly(linalg.singular_values, tau.to(source.device)).cpu() for tau in taus]
                )
            progress.advance(costs[tensor.name], tensor.name)
        return values

    units = cut("spectra", source.plan, tensors, LITTLE, does=spectra_work)
    return {name: each for _, part in crew.share(units, find) for name, each in part.items()}


@dataclass(frozen=True, slots=True)
class Places:
    """Where each tensor is written.

    `vectors`: the folder of each expert's task vector, and `redundant` that of the shared vector (both float32; a
    key that the layout lacks is left out). `full`: the folder of each expert's base plus task vector, if any.
    `ranks`: by tensor, the rank of each expert's factors, for tensors written as factors.
    """

    vectors: tuple[str, ...]
    redundant: str | None = None
    full: tuple[str, ...] = ()
    ranks: Mapping[str, tuple[int, ...]] | None = None


def write(
    source: Source,
    tensors: Sequence[TensorPlan],
    transform: Fitted | None,
    places: Places,
    staging: Written,
    progress: Reporter,
) -> Errors:
    """Write every expert's task vector; the squared error of each expert's factors, by tensor, where there are any.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: The output cannot be written.
    """
    progress.stage("writing", sum(source.plan.stored_bytes(t, experts=t.action != "copy") for t in tensors))
    return _write(source, tensors, transform, places, staging, progress)


def write_shared(
    source: Source,
    tensors: Sequence[TensorPlan],
    places: Places,
    layout: Layout,
    crew: Crew,
    shard: Callable[[Unit], AbstractContextManager[ShardFile]],
    progress: Reporter,
) -> Errors:
    """The same together with others, without a transform; each file takes the base and one expert.

    Args:
        source: As for `write`.
        tensors: As for `write`.
        places: The experts' folders, and the ranks of factors.
        layout: The files.
        crew: Who does the units.
        shard: The weight file of a unit, which is finished when the block ends.
        progress: As for `write`.
    """
    ranks, units, alone = places.ranks or {}, [], {}
    for i, (folder, expert) in enumerate(zip(places.vectors, source.plan.experts, strict=True)):
        mine = replace(source, plan=replace(source.plan, experts=(expert,)))
        own = Places((folder,), ranks={name: (each[i],) for name, each in ranks.items()})
        for file in (file for file in layout.shards if file.filename.startswith(folder)):
            there = [t for t in tensors if any(f"{folder}{t.name}{end}" in file.tensors for end in ("", LEFT, RIGHT))]
            work = sum(work_on(mine.plan, tensor, spectra_work) for tensor in there if tensor.name in ranks)
            nbytes = sum(mine.plan.stored_bytes(tensor, experts=True) for tensor in there)
            unit = Unit(f"shard:{file.filename}", there, 0, len(there), nbytes, work)
            units.append(unit)
            alone[unit.name] = i, mine, own

    def write_unit(unit: Unit) -> dict[str, float]:
        _, mine, own = alone[unit.name]
        with shard(unit) as file:
            return {n: e for n, (e,) in _write(mine, unit.tensors, None, own, _Part(file), progress).items()}

    progress.stage("writing", sum(unit.cost for unit in units), "work")
    errors = {tensor: [0.0] * len(places.vectors) for tensor in ranks}  # of factors that are not there
    for unit, part in crew.share(units, write_unit):
        for tensor, error in part.items():
            errors[tensor][alone[unit.name][0]] = error
    return {tensor: tuple(each) for tensor, each in errors.items()}


class _Part:
    """A weight file that takes what belongs into it: the two factors of a tensor may lie in two files."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        if tensor in self._file.shard.tensors:
            self._file.write(tensor, offset, data)

    write_if_wanted = write


def _write(
    source: Source,
    tensors: Sequence[TensorPlan],
    transform: Fitted | None,
    places: Places,
    staging: Written,
    progress: Reporter,
) -> Errors:
    plan, ranks = source.plan, places.ranks or {}

    def put(piece: Piece, loader: Loader) -> None:
        name = piece.tensor.name
        offset = piece.start * item_bytes(piece.tensor.out_dtype)
        if piece.tensor.action == "copy":
            data = as_bytes(loader.copy(piece))
            for folder in places.full:
                staging.write(f"{folder}{name}", offset, data)
        else:
            theta_0, taus = loader.load(piece, check=True)
            delta = transform.apply(piece, taus) if transform is not None else None
            for folder, tau in zip(places.vectors, taus, strict=True):
                staging.write_if_wanted(f"{folder}{name}", piece.start * 4, as_bytes(tau.cpu()))
            if places.redundant is not None and delta is not None:
                staging.write(f"{places.redundant}{name}", piece.start * 4, as_bytes(delta.contiguous().cpu()))
            for folder, tau in zip(places.full, taus, strict=False):
                staging.write(f"{folder}{name}", offset, as_bytes(rounded(piece, theta_0 + tau)))
        progress.advance(piece_bytes(plan, piece), name)

    in_parallel(source, Pieces([t for t in tensors if t.name not in ranks], source.block), put)
    factored = [t for t in tensors if t.name in ranks]
    errors, loader = {}, loader_of(source, factored)
    for tensor in factored:
        progress.begin(tensor.name)
        errors[tensor.name] = tuple(
            _write_factors(staging, f"{folder}{tensor.name}", tau.to(source.device), rank)
            for folder, tau, rank in zip(
                places.vectors, loader.each(tensor, check=True), ranks[tensor.name], strict=True
            )
        )
        progress.advance(plan.stored_bytes(tensor, experts=True), tensor.name)
    return errors


def _write_factors(staging: Written, key: str, tau: Tensor, rank: int) -> float:
    if rank == 0:  # the tensor did not change and is left out
        return 0.0
    with threads(1 if tau.numel() <= SMALL else torch.get_num_threads()):
        left, right = (factor.float().contiguous() for factor in run_interruptibly(linalg.low_rank, tau, rank))
        error = float((tau.double() - left.double() @ right.double()).square().sum())
    staging.write(f"{key}{LEFT}", 0, as_bytes(left.flatten().cpu()))
    staging.write(f"{key}{RIGHT}", 0, as_bytes(right.flatten().cpu()))
    return error
