"""What methods need to know of a model, or of a tensor: found by streaming before anything is done with it."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelmerge.engine.job import SAMPLE_RUN, Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import in_order, in_parallel
from modelmerge.engine.pieces import Piece, Pieces, Sample, piece_bytes
from modelmerge.engine.units import MUCH, Crew, Unit, cut
from modelmerge.methods.contract import Gathered, Moments, Pass, Survey
from modelmerge.plan.tensors import Tensors
from modelmerge.progress import Reporter

Apply = Callable[[Piece, Tensor], None]


def run_survey(
    source: Source, survey: Survey, name: str, apply: Apply, tensors: Tensors, crew: Crew, progress: Reporter
) -> Tensor:
    """What a survey of that name concludes from the tensors' task vectors, which `apply` changes in place before.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    search = survey.find(sum(tensor.numel for tensor in tensors))
    trip, checked = next(search), False
    for number in itertools.count():
        full = trip.share == 1
        units = cut(f"survey:{name}:{number}", source.plan, tensors, MUCH, share=trip.share)
        total = _one_pass(source, trip, apply, units, crew, progress, check=full and not checked)
        checked = checked or full
        try:
            trip = search.send(total)
        except StopIteration as end:
            measured: Tensor = end.value
            return measured
    raise AssertionError("a survey comes to an end")


def _one_pass(
    source: Source, trip: Pass, apply: Apply, units: Sequence[Unit], crew: Crew, progress: Reporter, *, check: bool
) -> Any:
    sampled = trip.share > 1
    block = SAMPLE_RUN if sampled else source.block
    progress.stage("sampling" if sampled else "measuring", sum(unit.nbytes for unit in units))

    def measure(unit: Unit) -> tuple[Tensor, Tensor | None]:
        parts: dict[int, Tensor] = {}  # one running total per worker
        gathered = Gathered(torch.empty(trip.room, dtype=torch.int64, device=source.device))

        def add(piece: Piece, loader: Loader) -> None:
            _, taus = loader.load(piece, check=check)
            apply(piece, taus)
            thread = threading.get_ident()
            if thread not in parts:
                parts[thread] = zeros.clone()
            if (numbers := trip.measure(taus, parts[thread])) is not None:
                gathered.add(numbers)
            progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)

        in_parallel(source, Pieces(unit.tensors, block, share=trip.share, before=len(Pieces(unit.before, block))), add)
        return sum(parts.values(), zeros), None if gathered.values is None else gathered.values.clone()

    experts = source.plan.experts_of(units[0].tensors[0]) if units else ()  # the same of all that are surveyed together
    zeros = torch.zeros((len(experts), trip.counters), dtype=torch.int64, device=source.device)
    results = [each for _, each in crew.share(units, measure)]
    total: Tensor = sum((part for part, _ in results), zeros)
    keys = [part for _, part in results if part is not None]
    return (total, torch.cat(keys) if len(keys) == len(results) > 0 else total[:0, 0]) if trip.room else total


def run_moments(
    source: Source, moments: Mapping[str, Moments], apply: Apply, tensors: Tensors, progress: Reporter
) -> dict[str, Tensor]:
    """What each tensor's moments tell of its task vectors, which `apply` changes in place before; by tensor.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    searches = {tensor.name: moments[tensor.name](tensor.numel, False) for tensor in tensors}
    looks = {name: next(search) for name, search in searches.items()}
    totals, measured, checked = dict[str, Any](), dict[str, Tensor](), set[str]()

    def measure(piece: Piece, loader: Loader) -> Any:
        name = piece.tensor.name
        first = not piece.sampled and name not in checked
        theta_0, taus = loader.load(piece, check=first)
        apply(piece, taus)
        if first:
            progress.advance(piece_bytes(source.plan, piece), name)
        return now[name].measure(taus, theta_0)

    def add(piece: Piece, part: Any) -> None:
        name, part = piece.tensor.name, _copied(part)
        totals[name] = totals[name] + part if name in totals else part
        coming[name] -= 1
        if coming[name]:
            return
        if not piece.sampled:
            checked.add(name)
        try:
            looks[name] = searches[name].send(totals.pop(name))
        except StopIteration as end:
            measured[name] = end.value
            del looks[name]

    while looks:
        now = dict(looks)
        sampled = any(look.sampled for look in now.values())
        some = [tensor for tensor in tensors if tensor.name in now and now[tensor.name].sampled == sampled]
        pieces = Sample(some) if sampled else Pieces(some, source.block)
        coming = Counter(piece.tensor.name for piece in pieces)
        in_order(source, pieces, measure, add)
    return measured


def _copied(part: Any) -> Any:
    """Tensors and numbers in memory that this thread has made: see `in_order`."""
    if isinstance(part, list | tuple):
        return type(part)(map(_copied, part))
    return part.clone() if isinstance(part, Tensor) else part
