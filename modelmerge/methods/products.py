"""Products of matrices by whatever library multiplies them fastest on this processor, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from modelmerge.devices import multiplies_by_onednn
from modelmerge.methods.contract import Tensor

# Elements from which on another library pays, and of a part of a product whose memory is not mapped anew each time.
_SMALL, _PART = 1 << 16, 3 << 18


def remove_subspace(x: Tensor, basis: Tensor) -> Tensor:
    """`x - B (B^T x)`, in place: x [m, n] without its part in the span of the orthonormal basis B [m, k]."""
    if not basis.shape[-1]:
        return x
    if not _by_onednn(x):
        return added(x, basis, basis.mT @ x, alpha=-1.0)
    within = _ready(basis.mT)(x)
    for rows, directions in zip(*(whole.split(max(1, _PART // x.shape[1])) for whole in (x, basis)), strict=True):
        rows.sub_(_ready(directions)(within))
    return x


def added(total: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """`beta * total + alpha * left @ right`, in place."""
    add = total.addmm_ if total.dim() == 2 else total.baddbmm_
    return add(left, right, alpha=alpha, beta=beta)


def multiplier(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives `x @ y` for matrices y [k, n]; x [m, k] is prepared once."""
    return _ready(x) if _by_onednn(x) else x.__matmul__


def _ready(x: Tensor) -> Callable[[Tensor], Tensor]:
    # Neither factor nor the product is copied into a layout of oneDNN's, as `to_mkldnn` and `to_dense` do.
    ready = x.contiguous()
    return lambda y: torch.ops.mkldnn._linear_pointwise(ready, y.T, None, "none", [], "")


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies such a matrix [m, n] faster than what torch takes for it."""
    large = x.dim() == 2 and x.numel() >= _SMALL
    return large and x.device.type == "cpu" and x.dtype == torch.float32 and multiplies_by_onednn()
