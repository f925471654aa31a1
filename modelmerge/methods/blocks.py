"""Element-wise work on whole tensors, a block at a time: its temporaries stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from modelmerge import interrupts
from modelmerge.methods.contract import Tensor

# Elements: what starts a step costs as much as some ten thousand of them. A GPU takes them all at once.
_BLOCK = 1 << 17
# For work of many steps that each take little: threads wait for one another to begin one.
MANY_STEPS = 1 << 18


def in_blocks(taus: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work`, which is element-wise, [T, n] -> [n], on every part of [T, *shape]: [*shape]."""
    flat = taus.reshape(len(taus), -1)
    merged = torch.empty_like(flat[0])
    for block in blocks(flat):
        merged[block] = work(flat[:, block])
    return merged.view(taus.shape[1:])


def blocks(flat: Tensor, size: int = _BLOCK) -> Iterator[slice]:
    """The parts of [T, n] that are worked on at a time, of so many elements on a CPU."""
    step = size if flat.device.type == "cpu" else max(flat.shape[1], 1)
    for start in range(0, flat.shape[1], step):
        interrupts.check()
        yield slice(start, start + step)
