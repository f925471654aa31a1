"""Element-wise work on whole tensors, a block at a time: its temporaries stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 18  # elements; a GPU takes them all at once


def in_blocks(taus: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work`, which is element-wise, [T, n] -> [n], on every part of [T, *shape]: [*shape]."""
    flat = taus.reshape(len(taus), -1)
    step = _BLOCK if taus.device.type == "cpu" else flat.shape[1]
    merged = torch.empty_like(flat[0])
    for start in range(0, len(merged), step):
        merged[start : start + step] = work(flat[:, start : start + step])
    return merged.view(taus.shape[1:])
