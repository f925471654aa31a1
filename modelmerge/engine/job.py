"""A merge that is ready to run, and what it will need: devices, threads, bytes, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from modelmerge.engine.rounding import Rounding
from modelmerge.methods.contract import Method, Moments, Survey
from modelmerge.plan.overrides import Setting
from modelmerge.plan.tensors import Plan, TensorPlan, Tensors

if TYPE_CHECKING:
    from modelmerge.engine.transforms import Transform

# Elements per block. On a CPU a worker's buffers should fit its share of the L2/L3 cache (measured: 64 Ki and 1 Mi
# elements cost 10 to 35 % more); a GPU wants blocks that are large against the launch of a kernel.
CPU_BLOCK = 1 << 18
CUDA_BLOCK = 1 << 24
# To measure a tensor and to merge it are two trips, whose many small steps cost more than a cache misses.
AT_ONCE = 1 << 20
# Elements of each run of a sample: short, so that it takes something of every few rows, and long enough to be worth
# the trip.
SAMPLE_RUN = 1 << 14
# Matrices of up to so many elements go through a method on one thread: they are done before others have woken up.
SMALL = 1 << 18
# Elements of the matrices that a device merges at once. Libraries make products in tiles of 128 x 128 or so: these are
# 512, a few for each processor of the largest cards, and a product on them takes long against its launch.
BATCH = 1 << 23
# Matrices of up to so many elements are merged several at a time, each on one thread: products and decompositions of
# that size gain little from a second thread (1.2 x at 768 x 768), and memory is that of a few of them.
MODEST = 1 << 22
# How a tensor that comes whole is merged: while the next one is on its way to the device; without it; its task vectors
# coming one at a time from the host's memory; or on the host, whatever the device.
AHEAD, ALONE, ONE_BY_ONE, ON_HOST = "ahead", "alone", "one by one", "on the host"


@dataclass(frozen=True, slots=True)
class Source:
    """Where task vectors come from: the models' plan, the device they go to, the threads that read them."""

    plan: Plan
    device: torch.device
    workers: int  # threads for element-wise work
    # By expert and tensor: norms of columns, which every piece of the tensor needs. [n], float64.
    norms: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def block(self) -> int:
        """Elements of a block of element-wise work."""
        return CPU_BLOCK if self.device.type == "cpu" else CUDA_BLOCK

    @property
    def at_once(self) -> int:
        """Elements of the largest tensor that comes whole where it has to be measured first."""
        return AT_ONCE if self.device.type == "cpu" else CUDA_BLOCK


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of a merge that one method takes.

    Args:
        name: The method's name.
        method: The method.
        options: Its options.
        tensors: What it merges, in the order of the output's bytes.
        each: The values of the options that a survey asks for and that differ between the experts.
    """

    name: str
    method: Method
    options: Any
    tensors: tuple[TensorPlan, ...]
    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def survey(self) -> Survey | None:
        """The quantity of all its tensors together that the method needs."""
        return self.method.survey(self.options, self.each)

    @property
    def measures(self) -> bool:
        """Whether each of its tensors is measured before the method takes it."""
        return self.method.moments(self.options, self.each) is not None

    @property
    def blockwise(self) -> bool:
        """Whether the method takes tensors cut into blocks, anywhere or by rows."""
        return self.method.blockwise(self.options) or self.by_rows

    @property
    def by_rows(self) -> bool:
        """Whether the method takes blocks of whole rows only."""
        return not self.method.blockwise(self.options) and self.method.by_rows(self.options)

    def surveyed(self) -> list[TensorPlan]:
        """The tensors that count in its survey: those it merges, tied ones once; those that are measured."""
        once = not self.measures
        return [tensor for tensor in self.tensors if tensor.numel and not (once and tensor.twin is not None)]

    def reads(self) -> float:
        """How many times the task vectors are read before they are merged."""
        measured = float(self.measures)
        return self.survey.reads(sum(tensor.numel for tensor in self.surveyed())) if self.survey else measured


@dataclass(frozen=True)
class Job:
    """A merge, ready to run.

    Args:
        source: Where the task vectors come from.
        groups: The methods, each with the tensors that it merges; together they merge all that is not copied.
        weights: Each expert's weight.
        transforms: What changes the task vectors before they are merged, in this order.
        seed: The seed of random draws.
        settings: By tensor, how it is merged.
    """

    source: Source
    groups: tuple[Group, ...]
    weights: tuple[float, ...]
    transforms: tuple[Transform, ...] = ()
    seed: int = 0
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """What happens to each tensor."""
        return self.source.plan

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, in their order."""
        return tuple(expert.name for expert in self.plan.experts)

    @cached_property
    def _takers(self) -> dict[str, Group]:
        return {tensor.name: group for group in self.groups for tensor in group.tensors}

    def group(self, tensor: TensorPlan) -> Group:
        """The group that merges the tensor."""
        return self._takers[tensor.name]

    def merged(self) -> list[TensorPlan]:
        """All that is merged, in the order of the output's bytes."""
        return [tensor for tensor in self.plan.in_order() if tensor.action != "copy"]

    def moments(self, tensor: TensorPlan) -> Moments | None:
        """What measures the tensor before its method takes it, if anything."""
        setting = self.settings[tensor.name]
        return self.group(tensor).method.moments(setting.options, setting.each)

    def is_measured(self, tensor: TensorPlan) -> bool:
        """Whether a pass over the tensor comes before its merge."""
        return tensor.action != "copy" and not self.whole(tensor) and self.moments(tensor) is not None

    def whole(self, tensor: TensorPlan) -> bool:
        """Whether the tensor comes whole: its method wants it so, or has it measured first and it is small."""
        blockwise = self.group(tensor).blockwise
        return not blockwise or (tensor.numel <= self.source.at_once and self.moments(tensor) is not None)

    def wholes(self) -> list[TensorPlan]:
        """The tensors that come whole."""
        return [tensor for group in self.groups for tensor in group.tensors if self.whole(tensor)]

    def taken(self, transform: Transform, todo: Tensors | None = None) -> list[TensorPlan]:
        """The merged tensors that a transform is fitted on; of `todo` alone, where what others are has no effect."""
        alone = all(each.by_tensor for each in self.transforms) and not any(group.survey for group in self.groups)
        names = {tensor.name for tensor in (todo if todo is not None and alone else self.merged())}
        return [tensor for tensor in self.merged() if tensor.name in names and transform.takes(tensor)]


@dataclass(slots=True)
class Findings:
    """What a run noticed.

    `left_out`: (tensor, expert, reason) for every expert that was left out of a tensor. `figures`: by tensor, those
    of the method there. `rounding`: what storing in 16 bits lost, where anything is stored so. `merged`:
    the tensors that this run merged, and no interrupted one before it.
    """

    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    rounding: Rounding | None = None
    merged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for another process."""
        rounding = self.rounding.to_list() if self.rounding else None
        return {"left_out": self.left_out, "figures": self.figures, "rounding": rounding, "merged": self.merged}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add what a run of other tensors noticed, as plain data."""
        self.left_out += part["left_out"]
        self.figures |= part["figures"]
        self.merged += part["merged"]
        if self.rounding is not None:
            self.rounding.add(part["rounding"])
