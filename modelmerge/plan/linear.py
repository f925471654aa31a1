"""Which tensors are the weights of linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from modelmerge.checkpoint.header import MERGEABLE_DTYPES, TensorInfo
from modelmerge.checkpoint.names import matches
from modelmerge.plan.stacks import is_stack

# Two-dimensional weights that are look-up tables or output heads, not linear layers, by the names the field uses.
_NOT_LINEAR = (
    "*wte.weight", "*wpe.weight", "shared.weight", "*.shared.weight", "*relative_attention_bias*", "*lm_head*",
    "*position_encoding*", "*token_type*", "*_bias", "*_bias_table", "*pos_emb*", "*label_emb.weight",
    "*scale_shift_table",
)  # fmt: skip
# Modules named for an embedding that hold numbered linear layers: of denoisers, for times and texts.
_EMBEDDERS = ("time_embed", "time_embedding", "text_embedding")


def is_linear(info: TensorInfo, include: Sequence[str]) -> bool:
    """Whether it is the weight of a linear layer, or a stack of such: two-dimensional, and no table or head by name.

    Who includes tensors by name knows them: then the name does not count.
    """
    if is_stack(info):
        return True
    if len(info.shape) != 2 or not min(info.shape) or info.dtype not in MERGEABLE_DTYPES:
        return False
    name = info.name.lower().rpartition("/")[2]
    return bool(include) or not (matches(name, _NOT_LINEAR) or _is_embedding(name))


def _is_embedding(name: str) -> bool:
    """Whether a tensor belongs to an embedding by the name of its own module; an embedder is a linear layer."""
    *front, module = name.removesuffix(".weight").split(".")
    if module.isdigit() and front:
        return "embed" in front[-1] and not front[-1].endswith((*_EMBEDDERS, "embedder"))
    return "embed" in module and not module.endswith("embedder")
