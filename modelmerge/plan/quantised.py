"""Models whose weights are quantised: what shows it, and that they are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modelmerge.checkpoint.header import QUANTISED_DTYPES, TensorInfo
from modelmerge.checkpoint.pairing import config_of
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, named

# Ends of the names of what quantised weights consist of.
_QUANTISED_ENDS = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".g_idx": "GPTQ",
    ".weight.absmax": "bitsandbytes, 4 bits", ".weight.quant_map": "bitsandbytes, 4 bits",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes, 4 bits", ".quant_state.bitsandbytes__fp4": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits", ".weight_format": "bitsandbytes, 8 bits",
    ".weight_scale": "fp8 or int8", ".weight_scale_inv": "fp8", ".weight_scale_2": "fp4", ".weight_packed": "packed",
    ".W_q": "HQQ", "_proj_blocks": "MXFP4",
    "scaled_fp8": "fp8, as ComfyUI stores it", ".scale_weight": "fp8, as ComfyUI stores it",
    ".comfy_quant": "as ComfyUI stores it",
}  # fmt: skip


def refuse_quantised(models: Sequence[Checkpoint]) -> None:
    """Refuse models whose weights are stored in a form that arithmetic cannot be done on.

    Raises:
        PlanError: One of them is such.
    """
    for model in models:
        configs = [config_of(model, folder) for folder in model.components]
        quantisation: Any = next((c["quantization_config"] for c in configs if c.get("quantization_config")), None)
        kinds = ((name, _quantised_kind(name, info)) for name, info in model.tensors.items())
        signs = [f"{kind}, by its tensor '{name}'" for name, kind in kinds if kind]
        if quantisation:
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
            signs = [f"{method}, says its config.json"]
        if signs:
            message = f"{model.reference.text}: its weights are quantised ({signs[0]})"
            raise PlanError(message, hint="use the unquantised weights, of 16 bits or more")


def refuse_8_bits(base: Checkpoint, experts: Sequence[Checkpoint], merges: Callable[[str], bool]) -> None:
    """Refuse models with weights of 8 bits or fewer that are to be merged: one error, not one for each tensor.

    Raises:
        PlanError: There are such.
    """
    names = [n for n in base.tensors if merges(n) and any(n in e.tensors for e in experts)]
    signs = []
    for model in (base, *experts):
        narrow = [n for n in names if n in model.tensors and model.tensors[n].dtype in QUANTISED_DTYPES]
        if narrow:
            more = f" and {len(narrow) - 1} more" if narrow[1:] else ""
            kind = model.tensors[narrow[0]].dtype
            signs.append(f"{model.reference.text}: its weights are quantised ({kind}: '{narrow[0]}'{more})")
    if signs:
        hint = f"use the 16-bit weights, or convert these to 16 bits; {named('exclude')} GLOB copies the base's"
        raise PlanError("; ".join(signs), hint=hint)


def _quantised_kind(name: str, info: TensorInfo) -> str | None:
    """How weights are quantised that a tensor of this name or dtype belongs to, if they are."""
    if name.endswith(tuple(_QUANTISED_ENDS)):
        return next(kind for end, kind in _QUANTISED_ENDS.items() if name.endswith(end))
    if name.endswith(".weight") and len(info.shape) == 2 and info.dtype in ("I8", "U8", "I32"):
        return f"{info.dtype} weights"
    return None
