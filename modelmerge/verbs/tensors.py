"""Merging tensors that are in memory: the same way, and the same bits, as through files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from modelmerge.checkpoint.reference import Named
from modelmerge.errors import UsageError

State = Mapping[str, Tensor]


def is_state(model: object) -> bool:
    """Is it a mapping of names to tensors?"""
    return isinstance(model, Mapping) and all(isinstance(tensor, Tensor) for tensor in model.values())


def states_of(base: object, experts: object) -> tuple[State, dict[str, State]] | None:
    """The tensors of the base and of the experts by name; None where they are references.

    Raises:
        UsageError: Some are tensors and others are references.
    """
    if isinstance(experts, Mapping):
        states = dict(experts)
    else:
        states = {f"expert_{i}": state for i, state in enumerate(experts if isinstance(experts, list | tuple) else ())}
    tensors = [is_state(model) and bool(model) for model in (base, *states.values())]
    if not any(tensors):
        return None
    if not all(tensors):
        raise UsageError(
            "the base and the experts must all be mappings of tensors, or all be references",
            hint="load the others, for example with safetensors.torch.load_file",
        )
    return base, states  # type: ignore[return-value]


def merge_tensors(
    base: State, experts: Mapping[str, State], make: Callable[[str, list[Named], Path], dict[str, Any]]
) -> dict[str, Any]:
    """The merged tensors, on the devices of the base's; `make` merges a base and experts into a directory.

    The tensors go through files in a temporary directory, so that one way of merging serves all.
    """
    with tempfile.TemporaryDirectory(prefix="modelmerge-") as folder:
        places = {name: Path(folder, f"model_{i}.safetensors") for i, name in enumerate(("", *experts))}
        for state, place in zip((base, *experts.values()), places.values(), strict=True):
            # Views and tied tensors share memory, which a file cannot say.
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, place)
        files = [Named(name, str(place)) for name, place in places.items() if name]
        out = Path(folder, "merged")
        result = make(str(places[""]), files, out)
        if not out.exists():
            return result  # a plan
        merged: dict[str, Tensor] = {}
        for file in sorted(out.glob("*.safetensors")):
            merged |= load_file(file)
        return {name: merged[name].to(base[name].device) if name in base else tensor for name, tensor in merged.items()}
