"""A model as functions see it: a mapping of names to tensors that are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.changes import TORCH_DTYPES
from modelmerge.checkpoint.layout import Inside
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.engine.job import Source
from modelmerge.engine.loader import read_tensor, whole
from modelmerge.errors import CheckpointError
from modelmerge.plan.stacks import entries
from modelmerge.plan.tensors import make_plan


class Model(Mapping[str, Tensor]):
    """A model as a function sees it: its tensors by name, each read when it is asked for, and where it lies.

    `dict(model)` is a state dict. An adapter or a task vector gives the base's tensors with its changes, in the base's
    dtypes. Of a model with an adapter on it, `path` is the model's, whose weights there lack the adapter.

    Args:
        checkpoint: The model, its weights on this machine.
        base: The base, where `checkpoint` is an adapter or a task vector of it, or shall be seen by the base's names.
        device: Where a function that computes should do it; the tensors are on the CPU.
    """

    def __init__(
        self, checkpoint: Checkpoint, base: Checkpoint | None, device: torch.device, *, onto_base: bool = False
    ) -> None:
        self.name = checkpoint.name
        self.reference = checkpoint.reference.text
        self.path = checkpoint.reference.path  # a directory with config and tokenizer, or a lone file of weights
        self.device = device
        self.checkpoint = checkpoint
        self._source: Source | None = None
        self._stacks: Mapping[str, Inside] = {}  # by stack, its matrices in the plan
        self.base = base
        self.base_path = base.reference.path if base is not None else None
        if checkpoint.vector is not None or onto_base:
            assert base is not None, "a change needs what it changes"
            plan = make_plan(base, [checkpoint])
            self._source = Source(plan, torch.device("cpu"), 1)
            self._stacks = entries(plan.tensors.values())[1]

    def check(self) -> None:
        """Make sure that its files are what they were when it was opened.

        Raises:
            CheckpointError: One has changed since.
        """
        self.checkpoint.digests()

    def __getitem__(self, tensor: str) -> Tensor:
        if self._source is None:
            if tensor not in self.checkpoint.tensors:
                raise KeyError(tensor)
            return read_tensor(self.checkpoint, tensor)
        if tensor in self._stacks:
            return torch.stack([self._of_plan(part) for part in self._stacks[tensor].written])
        return self._of_plan(tensor)

    def _of_plan(self, tensor: str) -> Tensor:
        assert self._source is not None, "only a change is read by way of a plan"
        plan = self._source.plan.tensors[tensor]
        if plan.action == "copy" or not plan.numel:
            return read_tensor(self._source.plan.base, tensor)
        expert = self._source.plan.experts[0]
        info = expert.tensors.get(tensor)
        if info is not None and info.change is None and info.shape == plan.shape:
            return read_tensor(expert, tensor)  # as it is, not by way of a difference
        _, theta_0, taus = whole(self._source, plan, check=True)
        return (theta_0 + taus[0]).to(TORCH_DTYPES[plan.dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors if self._source is None else self._names())

    def __len__(self) -> int:
        return len(self.checkpoint.tensors if self._source is None else self._names())

    def _names(self) -> list[str]:
        assert self._source is not None, "only a change is read by way of a plan"
        return list(dict.fromkeys(tensor.stored_name for tensor in self._source.plan.tensors.values()))


def refuse_kernels(config: Mapping[str, Any], where: object, *, below: bool = False) -> None:
    """Refuse a config.json that names code on the Hub, `org/name`, as its attention: transformers would run it.

    `below`: all of the config is the value of such an entry.

    Raises:
        CheckpointError: It does.
    """
    for name, value in config.items():
        inside = below or name.endswith("_implementation")
        if isinstance(value, Mapping):
            refuse_kernels(value, where, below=inside)
        elif inside and isinstance(value, str) and "/" in value:
            hint = f"where you trust it, take '{name}' out of config.json: the usual attention gives the same"
            raise CheckpointError(f"{where}: its config.json names code to run, '{value}'", hint=hint)
