"""Unlabelled data for a merged model to predict: batches without end, drawn by the seed, and logits of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelmerge.errors import ModelMergeError, PlanError
from modelmerge.evaluation.custom import Script, in_words, seed_all
from modelmerge.evaluation.model import Model


def draws(count: int, size: int, seed: int, name: str) -> Iterator[list[int]]:
    """Places of `size` of `count` items at a time, without end: each once in an order drawn by the seed, then again."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def classifier_of(script: Script, expert: Model, size: int, seed: int) -> tuple[torch.nn.Module, Iterator[Any]]:
    """The module and the endless batches that a user's function gives for an expert.

    Raises:
        ModelMergeError: The function raises, or returns something else.
    """
    where = f"{script.label} for '{expert.name}'"
    seed_all(seed)
    try:
        result = script.metric(expert)
    except ModelMergeError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelMergeError(f"{script.label} failed on '{expert.name}': {in_words(error)}") from error
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], torch.nn.Module):
        raise ModelMergeError(
            f"{where} returned {type(result).__name__}, which is not what was asked for",
            hint="return (module, inputs): a torch.nn.Module that gives logits, and its unlabelled inputs",
        )
    return result[0], batches(result[1], size, seed, expert.name, where)


def batches(inputs: Any, size: int, seed: int, name: str, where: str) -> Iterator[Any]:
    """Batches without end.

    Args:
        inputs: A tensor [N, ...], or a tuple or a mapping of such, which `size` rows are drawn from at a time. Or
            something that gives batches each time it is iterated over, such as a list of them or a DataLoader.
        size: Rows of a batch.
        seed: Of what is drawn.
        name: Of the task, which has an order of its own.
        where: What errors call it.

    Raises:
        ModelMergeError: There are none, or no more.
    """
    tensors = (
        list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs) if isinstance(inputs, tuple) else []
    )
    tensors = [inputs] if isinstance(inputs, Tensor) else tensors
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        return _again_and_again(inputs, where)
    counts = sorted({len(tensor) for tensor in tensors})
    if len(counts) > 1 or not counts[0]:
        raise ModelMergeError(
            f"{where}: its inputs are {' and '.join(map(str, counts))} rows",
            hint="as many rows in each tensor, and some",
        )
    return (_rows(inputs, places) for places in draws(counts[0], size, seed, name))


def _rows(inputs: Any, places: Sequence[int]) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[places]
    if isinstance(inputs, tuple):
        return tuple(tensor[places] for tensor in inputs)
    return {name: tensor[places] for name, tensor in inputs.items()}


def _again_and_again(inputs: Any, where: str) -> Iterator[Any]:
    times = 0
    while True:
        try:
            batch = None
            for batch in inputs:
                yield batch
        except ModelMergeError:
            raise
        except Exception as error:
            raise ModelMergeError(f"{where}: its inputs cannot be read: {in_words(error)}") from error
        if batch is None:
            what = "there are no inputs" if not times else "its inputs could be iterated over once only"
            raise ModelMergeError(f"{where}: {what}", hint="return tensors, a list of batches, or a DataLoader")
        times += 1


def predictor(
    where: str, module: torch.nn.Module, batches: Iterator[Any], device: torch.device
) -> Callable[[], Tensor]:
    """A function that gives the module's logits of the next batch, computed on the device.

    A tensor is the module's argument, a tuple or list are its arguments, a mapping its named ones. Logits are what it
    returns, or have that name in it.

    Raises:
        ModelMergeError: When called: the module raises, or returns no logits.
    """

    def predict() -> Tensor:
        batch = _on_device(next(batches), device)
        try:
            if isinstance(batch, Mapping):
                output = module(**batch)
            else:
                output = module(*batch) if isinstance(batch, tuple | list) else module(batch)
        except Exception as error:
            raise ModelMergeError(f"{where}: its module fails on its inputs: {in_words(error)}") from error
        in_mapping = isinstance(output, Mapping) and "logits" in output
        logits = output["logits"] if in_mapping else getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ModelMergeError(f"{where}: its module returns {type(output).__name__}", hint="it must return logits")
        return logits

    return predict


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on_device(each, device) for name, each in batch.items()}
    return type(batch)(_on_device(each, device) for each in batch) if type(batch) in (tuple, list) else batch


def names_in(keys: Collection[str], tensors: Collection[str], where: str) -> dict[str, str]:
    """By the names of a checkpoint's tensors, those of a module's state dict: the same, or all behind one prefix.

    Raises:
        PlanError: Two prefixes would do.
    """
    by_prefix = {"": {name: name for name in tensors if name in keys}}
    for name in tensors:
        for key in keys:
            if key.endswith(f".{name}"):
                by_prefix.setdefault(key.removesuffix(name), {})[name] = key
    most = max(map(len, by_prefix.values()))
    best = [prefix for prefix, names in by_prefix.items() if len(names) == most]
    if most and len(best) > 1:
        raise PlanError(
            f"{where}: its module has the checkpoint's tensors twice: behind '{best[0]}' and '{best[1]}'",
            hint="return a module that holds the model once",
        )
    return by_prefix[best[0]]
