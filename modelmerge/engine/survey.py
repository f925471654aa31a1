"""Whole-model quantities: found by streaming over all task vectors before anything is done with them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modelmerge.engine.job import SAMPLE_RUN, Source
from modelmerge.engine.loader import Loader, Piece, piece_bytes, pieces
from modelmerge.engine.parallel import in_parallel
from modelmerge.methods.contract import Pass, Survey
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import Reporter


def run_survey(
    source: Source,
    survey: Survey,
    ready: Callable[[Piece, Tensor], None] | None,
    tensors: Sequence[TensorPlan],
    reporter: Reporter,
) -> Tensor:
    """What a survey concludes from the tensors' task vectors, as `ready`, if any, makes them in place.

    Raises:
        CheckpointError: A weight is NaN or Inf, or a file cannot be read.
    """
    search = survey.find(sum(tensor.numel for tensor in tensors))
    wanted, checked = next(search), False
    while True:
        full = wanted.share == 1
        total = _one_pass(source, wanted, ready, tensors, reporter, check=full and not checked)
        checked = checked or full
        try:
            wanted = search.send(total)
        except StopIteration as found:
            measured: Tensor = found.value
            return measured


def _one_pass(
    source: Source,
    wanted: Pass,
    ready: Callable[[Piece, Tensor], None] | None,
    tensors: Sequence[TensorPlan],
    reporter: Reporter,
    *,
    check: bool,
) -> Tensor:
    sampled = wanted.share > 1
    runs = list(pieces(tensors, SAMPLE_RUN if sampled else source.block, sampled=sampled))[:: wanted.share]
    reporter.stage("sampling" if sampled else "measuring", sum(piece_bytes(source.plan, run) for run in runs))
    parts: dict[int, Tensor] = {}  # one running total per worker

    def add(piece: Piece, loader: Loader) -> None:
        _, taus = loader.load(piece, check=check)
        if ready is not None:
            ready(piece, taus)
        mine = threading.get_ident()
        if mine not in parts:
            parts[mine] = taus.new_zeros((len(taus), wanted.counters), dtype=torch.int64)
        wanted.measure(taus, parts[mine])
        reporter.advance(piece_bytes(source.plan, piece), piece.tensor.name)

    in_parallel(source, runs, add)
    return torch.stack(list(parts.values())).sum(0)
