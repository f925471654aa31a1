"""`digits` and `lora`: the demo's network on six views of the digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modelmerge.evaluation import digits
from tests.benchmarks.experts.training import SPLITS, Batch, Evaluate, ExpertSet, State, keep, reproducible, train

_LORA_RANK, _LORA_STEPS, _LORA_RATE = 4, 250, 1e-2


def build_digits(seed: int) -> ExpertSet:
    """The demo's experts: a transformer, six views of the digits, short fine-tuning with SGD."""
    tasks, evaluate = _views(seed)
    with reproducible(seed):
        base = keep(digits.train_base)(tasks, seed=seed)
        experts = {name: keep(digits.train_expert)(base, task, seed=seed) for name, task in tasks.items()}
    return ExpertSet("digits", "transformer, six views of digits, short SGD", base, experts, evaluate)


def build_lora(seed: int) -> ExpertSet:
    """The demo's network and views, fine-tuned by low-rank updates of the attention alone."""
    tasks, evaluate = _views(seed)
    with reproducible(seed):
        base = keep(digits.train_base)(tasks, seed=seed)
        experts = {}
        for name, task in tasks.items():
            network = digits._build(seed)
            network.load_state_dict(base)
            loras: State = {}
            for weight, value in base.items():
                if weight.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")):
                    # The one half is zero, so that training begins at the base.
                    loras[f"{weight}.up"] = torch.zeros(value.shape[0], _LORA_RANK, requires_grad=True)
                    down = torch.randn(_LORA_RANK, value.shape[1]) / math.sqrt(value.shape[1])
                    loras[f"{weight}.down"] = down.requires_grad_()

            def sample(order: torch.Generator, task: digits.Task = task) -> Batch:
                batch = torch.randint(len(task.train_y), (64,), generator=order)
                return task.train_x[batch], torch.full((64,), task.index), task.train_y[batch]

            optimizer = torch.optim.Adam(loras.values(), lr=_LORA_RATE)
            experts[name] = train(network, optimizer, sample, _LORA_STEPS, seed, loras)
    return ExpertSet("lora", f"transformer, six views of digits, LoRA of rank {_LORA_RANK}", base, experts, evaluate)


def _views(seed: int) -> tuple[dict[str, digits.Task], Evaluate]:
    # The demo has no validation split: a quarter of its training images becomes one. They are shuffled already.
    tasks: dict[str, digits.Task] = {}
    judged: dict[str, dict[str, digits.Task]] = {split: {} for split in SPLITS}
    for name, task in digits.load_tasks(seed).items():
        held_out = len(task.train_y) // 4
        tasks[name] = replace(task, train_x=task.train_x[:-held_out], train_y=task.train_y[:-held_out])
        judged["test"][name] = task
        judged["validation"][name] = replace(task, test_x=task.train_x[-held_out:], test_y=task.train_y[-held_out:])

    def evaluate(state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        return {name: digits.accuracy(state, task) for name, task in judged[split].items()}

    return tasks, evaluate
