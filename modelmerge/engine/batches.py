"""Small matrices that a device merges at once: one alone would leave most of a card idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modelmerge.engine.job import BATCH, Job
from modelmerge.engine.loader import Loader, whole
from modelmerge.engine.pieces import Piece
from modelmerge.methods.contract import alike
from modelmerge.plan.tensors import TensorPlan, Tensors

Factors = tuple[tuple[Tensor, Tensor] | None, ...]


def group(job: Job, tensors: Tensors, fits: Callable[[TensorPlan], bool]) -> list[list[TensorPlan]]:
    """Whole tensors as they are merged: those of one list at once, the others alone.

    They lie in one weight file, and are alike in shape, method, options, and in who stores them. Bits may depend on
    what is together, which therefore does not depend on who merges which weight file. Models that are streamed are read
    in their order.

    Args:
        job: The merge.
        tensors: Those of it that are merged.
        fits: Whether a batch, as one tensor, fits on the device beside the next one.
    """
    streamed = any(model.streamed for model in job.plan.models)
    files = {name: shard.filename for shard in job.plan.layout.shards for name in shard.tensors}
    growing: dict[str, list[TensorPlan]] = {}
    batches: list[list[TensorPlan]] = []
    for tensor in tensors:
        setting = job.settings[tensor.name]
        takes = job.group(tensor).method.batches(setting.options) and tensor.rows is None and not job.transforms
        most = BATCH // max(tensor.numel, 1) if takes else 1
        while most > 1 and not fits(as_one([tensor] * most)):
            most //= 2
        stored = [(expert.name, tensor.name in expert.tensors) for expert in job.plan.experts_of(tensor)]
        key = repr((files.get(tensor.name), tensor.shape, tensor.dtype, setting, stored))
        if streamed and key not in growing:
            growing.clear()
        if most < 2 or len(growing.get(key, ())) % most == 0:
            growing[key] = []
            batches.append(growing[key])
        growing[key].append(tensor)
    return batches


def as_one(batch: Tensors) -> TensorPlan:
    """A batch as one tensor [B, *shape]: for its size."""
    first = batch[0]
    return replace(first, shape=(len(batch), *first.shape)) if len(batch) > 1 else first


def load(job: Job, batch: Tensors, *, check: bool, loader: Loader | None = None) -> tuple[list[Piece], Tensor, Tensor]:
    """The pieces of B tensors of one shape, `theta_0` [B, *shape] and task vectors [T, B, *shape], on the host."""
    loaded = (whole(job.source, tensor, check=check, loader=loader) for tensor in batch)
    if len(batch) == 1:
        piece, theta_0, taus = next(loaded)
        return [piece], theta_0[None], taus[:, None]
    # Copies: the loader's buffer is written over.
    pieces, bases, vectors = zip(*((piece, base, taus.clone()) for piece, base, taus in loaded), strict=True)
    return list(pieces), torch.stack(bases), torch.stack(vectors, dim=1)


def stacked(factors: Sequence[Factors | None]) -> Factors | None:
    """The factors of B matrices as those of a batch: of each expert [B, m, r] and [B, r, n].

    Raises:
        Apart: They are not of the same ranks.
    """
    alike([pair and pair[0].shape for pair in pairs or ()] for pairs in factors)
    experts = zip(*(pairs or () for pairs in factors), strict=True)
    sides = [list(zip(*(pair for pair in pairs if pair), strict=True)) for pairs in experts]
    return tuple((torch.stack(both[0]), torch.stack(both[1])) if both else None for both in sides) or None
