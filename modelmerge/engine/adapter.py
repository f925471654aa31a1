"""Merging into an adapter: the merged task vector as factors, matrix by matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelmerge.checkpoint.as_lora import Role, Size, kept_whole, key, refuse_change
from modelmerge.checkpoint.changes import TORCH_DTYPES, as_bytes
from modelmerge.checkpoint.layout import Entry
from modelmerge.checkpoint.scratch import Scratch
from modelmerge.devices import current
from modelmerge.engine.adapter_needs import Table, of_factors
from modelmerge.engine.job import SMALL, Findings, Job
from modelmerge.engine.loader import loaded, rounded, whole
from modelmerge.engine.memory import PRODUCT_RUN
from modelmerge.engine.merge import merged_vector
from modelmerge.engine.parallel import prepare_process, run_interruptibly, threads
from modelmerge.engine.pieces import Piece
from modelmerge.engine.rounding import squared
from modelmerge.engine.transforms import Factors, FittedJob, fit
from modelmerge.engine.units import Alone, merge_work, piece_cost
from modelmerge.methods import linalg
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

# The share of a merged task vector's squared norm that the rounding of float32 may put out of where it lies.
_ROUNDING = 1e-10


class Span(NamedTuple):
    """A merged task vector `outer @ core @ across.T`, float64: orthonormal [m, k] and [n, k] about [k, k]."""

    outer: Tensor
    core: Tensor
    across: Tensor


@dataclass(slots=True)
class Adapted:
    """What a merge became as an adapter.

    `entries`: dtype, shape and bytes of each key of the adapter's file, and `places` where in the spool they lie.
    By tensor, `ranks`, and the squared norms of what the factors miss, `errors`, and of the merged task vector,
    `squares`. `modules`: those that are kept whole, with their tensors. `biases`: those of adapted layers.
    """

    findings: Findings = field(default_factory=Findings)
    entries: dict[str, Entry] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    modules: dict[str, list[str]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)

    def relative_error(self, tensor: str | None = None) -> float:
        """`||merged - factors|| / ||merged||`, of one tensor's merged task vector or of the whole one."""
        names = self.squares if tensor is None else (tensor,)
        size = sum(self.squares[name] for name in names)
        return (sum(self.errors.get(name, 0.0) for name in names) / size) ** 0.5 if size else 0.0


def adapt(
    job: Job,
    table: Table,
    size: Size,
    dtype: str,
    spool: BinaryIO,
    scratch: Callable[[int], Scratch],
    progress: Reporter,
) -> Adapted:
    """Merge every tensor of the plan, and spool what an adapter holds of it.

    Args:
        job: The merge.
        table: What becomes of each tensor.
        size: How small the factors shall be.
        dtype: safetensors dtype of the factors.
        spool: Gets the bytes.
        scratch: Gives room of so many bytes on the disk.
        progress: Shows the progress.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
        OutputError: A tensor changes that an adapter has no place for; or the spool cannot be written.
    """
    prepare_process()
    plan, adapted = job.plan, Adapted()
    todo = [tensor for tensor in job.merged() if tensor.numel]
    # What has no place is found out first: not at the end of a long merge.
    todo.sort(key=lambda tensor: table[tensor.name].kind != "no place")
    adapted.findings.merged, sums = len(todo), of_factors(job, table)
    fitted = fit(job, None, Alone(scratch), progress)
    work = {t.name: merge_work(job, t) for t in todo}
    progress.stage("merging", sum(plan.stored_bytes(t, experts=True) + work[t.name] for t in todo), "work")
    dense: set[str] = set()  # tensors that changed and are not low-rank

    def adapt_one(tensor: TensorPlan) -> None:  # whose matrices are gone before the next ones are read
        role = table[tensor.name]
        progress.begin(tensor.name)
        if tensor.name in sums:
            merge_factors(tensor, role)
        else:
            merge_whole(tensor, role)
        progress.advance(piece_cost(plan, Piece(tensor, 0, tensor.numel), work[tensor.name]), tensor.name)

    def merge_factors(tensor: TensorPlan, role: Role) -> None:
        if span := _merged_in_factors(fitted, tensor, adapted.findings):
            adapted.squares[tensor.name] = squared(span.core)
            _spool_factors(adapted, tensor, role, None, span, size, dtype, spool)

    def merge_whole(tensor: TensorPlan, role: Role) -> None:
        piece, theta_0, taus = whole(job.source, tensor, check=fitted.unchecked(tensor))
        theta_0, taus = theta_0.to(job.source.device), taus.to(job.source.device)
        with threads(1 if tensor.numel <= SMALL else torch.get_num_threads()):
            fitted.chain.apply(piece, taus)
            factors = fitted.factors(tensor, job.source.device)
            delta = merged_vector(fitted, [piece], theta_0, taus, adapted.findings, factors)
            del taus
            square = squared(delta)
            if square and role.kind == "no place":
                raise refuse_change(tensor.stored_name)
            if square:
                adapted.squares[tensor.name] = square
            if square and role.kind == "low rank":
                del theta_0
                span = _within(delta, factors, square)
                _spool_factors(adapted, tensor, role, delta, span, size, dtype, spool)
            elif square:
                dense.add(tensor.name)
                values = rounded(piece, theta_0.add_(delta))
                shape = tensor.stored_shape if tensor.stack is None else tensor.shape
                _spool(adapted, key(role, tensor.name, "whole"), tensor.out_dtype, values, shape, spool)

    with current(job.source.device):
        for tensor in todo:
            adapt_one(tensor)
    _complete(job, adapted, table, dense, dtype, spool)
    return adapted


def _spool_factors(
    adapted: Adapted,
    tensor: TensorPlan,
    role: Role,
    delta: Tensor | None,
    span: Span | None,
    size: Size,
    dtype: str,
    spool: BinaryIO,
) -> None:
    """Spool the factors of a merged task vector [m, n], which is `delta` or, without it, what the span holds."""
    core = delta if span is None else span.core
    assert core is not None, "there is one or the other"
    if size.rank is not None:
        rank = min(size.rank, *tensor.shape)
    else:
        shares = run_interruptibly(linalg.singular_values, core).square().cumsum(0)
        # The smallest rank whose share reaches the energy, but for rounding of the sums.
        rank = int((shares >= shares[-1] * ((size.energy or 0.0) - 1e-12)).float().argmax()) + 1
    left, right = run_interruptibly(linalg.balanced, core, min(rank, *core.shape))
    if span is not None:
        missing = rank - left.shape[1]  # directions that nothing lies in: the adapter has one rank nevertheless
        left, right = pad(span.outer @ left, (0, missing)), pad(right @ span.across.T, (0, 0, 0, missing))
    left, right = (factor.to(TORCH_DTYPES[dtype]) for factor in (left, right))
    adapted.ranks[tensor.name] = rank
    adapted.errors[tensor.name] = _error(delta, span, left, right)
    a, b = (left.T, right.T) if role.transposed else (right, left)
    for part, factor in (("A", a), ("B", b)):
        _spool(adapted, key(role, tensor.name, part), dtype, factor.contiguous().cpu(), tuple(factor.shape), spool)


def _error(delta: Tensor | None, span: Span | None, left: Tensor, right: Tensor) -> float:
    """The squared norm of what factors [m, k] and [k, n] miss of a merged task vector."""
    if delta is None:
        assert span is not None, "there is one or the other"
        # Of the product [outer, left] diag(core, -1) [across, right^T]^T, by what QR leaves between both.
        sides = (
            torch.cat([basis, factor.double()], 1) for basis, factor in ((span.outer, left), (span.across, right.T))
        )
        rows, columns = (torch.linalg.qr(side, mode="r").R for side in sides)
        inner = torch.block_diag(span.core, -torch.eye(left.shape[1], dtype=span.core.dtype, device=left.device))
        return squared(rows @ inner @ columns.T)
    error, step = 0.0, max(PRODUCT_RUN // delta.shape[1], 1)
    for first in range(0, len(delta), step):
        error += squared(delta[first : first + step] - left[first : first + step].double() @ right.double())
    return error


def _merged_in_factors(fitted: FittedJob, tensor: TensorPlan, findings: Findings) -> Span | None:
    """What a linear method makes of task vectors that are products, without a matrix [m, n]; None for nothing.

    Raises:
        CheckpointError: A factor is NaN or Inf.
    """
    source = fitted.job.source
    pairs = [pair for pair in fitted.factors(tensor, source.device) or () if pair is not None]
    if not pairs:
        return None
    if not all(bool(factor.sum().isfinite()) for pair in pairs for factor in pair):
        whole(source, tensor, check=True)  # which names it
    outer, across = _bases(pairs)
    cores = torch.stack([(outer.T @ a.double()) @ (b.double() @ across) for a, b in pairs])
    with threads(1):
        core = merged_vector(fitted, [Piece(tensor, 0, tensor.numel)], outer, cores, findings)
    return Span(outer, core, across) if bool(core.any()) else None


def _bases(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Orthonormal bases [m, k] and [n, k], float64, of what factors [m, r] and [r, n] span."""
    outer = torch.linalg.qr(torch.cat([left for left, _ in pairs], dim=1).double()).Q
    return outer, torch.linalg.qr(torch.cat([right for _, right in pairs]).T.double()).Q


def _within(delta: Tensor, factors: Factors | None, square: float) -> Span | None:
    """A merged task vector [m, n] in bases of what the experts' factors span, if it lies there.

    So it does behind averages, sums and what goes through `cores`: a small matrix is decomposed in place of a large
    one. None where an expert has no factors, where they span half of the matrix, or where the merge went out of them.
    `square` is its squared norm.
    """
    pairs = [pair for pair in factors or () if pair is not None]
    directions = sum(left.shape[1] for left, _ in pairs)
    if factors is None or len(pairs) < len(factors) or not 0 < directions <= min(delta.shape) // 2:
        return None
    outer, across = _bases(pairs)
    core, step = outer.new_zeros(directions, directions), max(PRODUCT_RUN // delta.shape[1], 1)
    for first in range(0, len(delta), step):
        core += outer[first : first + step].T @ (delta[first : first + step].double() @ across)
    return Span(outer, core, across) if square - squared(core) <= _ROUNDING * square else None


def _complete(job: Job, adapted: Adapted, table: Table, dense: set[str], dtype: str, spool: BinaryIO) -> None:
    """Spool what peft wants with the tensors that are kept: the rest of their modules, the layers of biases."""
    tensors = job.plan.tensors
    adapted.modules = kept_whole(dense, table)
    for name in (name for names in adapted.modules.values() for name in names if name not in dense):
        values = loaded(job.source, tensors[name])
        _spool(adapted, key(table[name], name, "whole"), tensors[name].out_dtype, values, tensors[name].shape, spool)
    weights = {table[name].module for name in adapted.ranks}
    adapted.biases = sorted(name for name in dense if table[name].kind == "bias")
    for name in adapted.biases:
        weight = f"{table[name].module}.weight"
        if table[name].module in weights:
            continue
        # peft keeps a bias only with the layer it adapts: factors of rank 1 that change nothing.
        m, n = tensors[weight].shape[::-1] if table[weight].transposed else tensors[weight].shape
        adapted.ranks[weight] = 1
        for part, shape in (("A", (1, n)), ("B", (m, 1))):
            nothing = torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
            _spool(adapted, key(table[weight], weight, part), dtype, nothing, shape, spool)


def _spool(adapted: Adapted, name: str, dtype: str, values: Tensor, shape: tuple[int, ...], spool: BinaryIO) -> None:
    data = as_bytes(values.flatten())
    adapted.places[name] = spool.tell()
    adapted.entries[name] = (dtype, shape, len(data))
    spool.write(data)
