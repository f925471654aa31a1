"""Whole-model quantities: found by streaming over all task vectors before anything is done with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modelmerge.engine.job import SAMPLE_RUN, Source
from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import in_parallel
from modelmerge.engine.pieces import Piece, Pieces, piece_bytes
from modelmerge.methods.contract import Pass, Survey
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter

Apply = Callable[[Piece, Tensor], None]


def run_survey(
    source: Source, survey: Survey, apply: Apply, tensors: Sequence[TensorPlan], progress: Reporter
) -> Tensor:
    """What a survey concludes from the tensors' task vectors, which `apply` changes in place before.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    search = survey.find(sum(tensor.numel for tensor in tensors))
    trip, checked = next(search), False
    while True:
        full = trip.share == 1
        total = _one_pass(source, trip, apply, tensors, progress, check=full and not checked)
        checked = checked or full
        try:
            trip = search.send(total)
        except StopIteration as end:
            measured: Tensor = end.value
            return measured


def _one_pass(
    source: Source, trip: Pass, apply: Apply, tensors: Sequence[TensorPlan], progress: Reporter, *, check: bool
) -> Tensor:
    sampled = trip.share > 1
    runs = Pieces(tensors, SAMPLE_RUN if sampled else source.block, share=trip.share)
    progress.stage("sampling" if sampled else "measuring", sum(piece_bytes(source.plan, run) for run in runs))
    parts: dict[int, Tensor] = {}  # one running total per worker

    def add(piece: Piece, loader: Loader) -> None:
        _, taus = loader.load(piece, check=check)
        apply(piece, taus)
        thread = threading.get_ident()
        if thread not in parts:
            parts[thread] = taus.new_zeros((len(taus), trip.counters), dtype=torch.int64)
        trip.measure(taus, parts[thread])
        progress.advance(piece_bytes(source.plan, piece), piece.tensor.name)

    in_parallel(source, runs, add)
    return torch.stack(list(parts.values())).sum(0)
