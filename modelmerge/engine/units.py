"""Units: the pieces of a merge that any process can do, and who does them.

A stage of a merge is cut into units of consecutive tensors, the same in every process. A crew has each of them done
once, by whom it pleases, and hands out what they gave in their order: sums of floats must not depend on who did what.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.scratch import Room, Scratch
from modelmerge.engine.job import Job
from modelmerge.engine.pieces import Piece, piece_bytes
from modelmerge.methods.work import Work
from modelmerge.plan.tensors import Plan, TensorPlan, Tensors

_PARTS = 64  # units of a stage before the merge, if they are not too small
LITTLE = 1 << 24  # bytes that a unit reads at least, unless it is the last
MUCH = 1 << 28  # the same where everybody reads megabytes of each unit's result
_FLOPS = 32.0  # operations that take as long as a byte that is read, hashed or written

Result = TypeVar("Result")
OnShape = Callable[[int, int, int], Work]  # given m, n and T, what is done on [T, m, n]


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work: some consecutive tensors of a stage.

    Args:
        name: `survey:GROUP:PASS:i`, `fit:TRANSFORM:i`, `shard:FILE` or `hash:MODEL:FILE`.
        stage: All tensors of the stage.
        first: The first of the unit's own.
        stop: The first after them.
        nbytes: Bytes that are read.
        work: The computation on them, in bytes that take as long to read.
    """

    name: str
    stage: Tensors = ()
    first: int = 0
    stop: int = 0
    nbytes: int = 0
    work: int = 0

    @property
    def tensors(self) -> Tensors:
        """The tensors of this unit."""
        return self.stage[self.first : self.stop]

    @property
    def before(self) -> Tensors:
        """The tensors of the stage that come before."""
        return self.stage[: self.first]

    @property
    def cost(self) -> int:
        """How long it takes beside others, in bytes that take as long to read."""
        return self.nbytes + self.work


class Crew(Protocol):
    """Who does the units of a job."""

    def share(self, units: Sequence[Unit], work: Callable[[Unit], Result]) -> Iterator[tuple[Unit, Result]]:
        """Have all units done; each with what it gave, in their order. Neighbours may be done as one.

        Args:
            units: All units of a stage.
            work: Does one. What it gives is plain data and tensors.
        """

    def keep(self, unit: Unit, nbytes: int) -> Scratch:
        """Room of so many bytes on the disk for what a unit gives besides; for the one who does it.

        Raises:
            OutputError: There is not so much.
        """

    def kept(self, unit: Unit) -> Scratch:
        """What a unit that is done keeps there."""


class Alone:
    """A crew of one, which does a stage in one go."""

    def __init__(self, room: Room) -> None:
        """`room` gives room of so many bytes on the disk."""
        self._room = room
        self._rooms: dict[str, Scratch] = {}

    def share(self, units: Sequence[Unit], work: Callable[[Unit], Result]) -> Iterator[tuple[Unit, Result]]:
        """Do them as one unit."""
        if units:
            whole = replace(units[0], stop=units[-1].stop)
            yield whole, work(whole)

    def keep(self, unit: Unit, nbytes: int) -> Scratch:
        """Room that goes with this process."""
        self._rooms[unit.name] = self._room(nbytes)
        return self._rooms[unit.name]

    def kept(self, unit: Unit) -> Scratch:
        """What the unit has written there."""
        return self._rooms[unit.name]


def cut(
    name: str, plan: Plan, tensors: Tensors, least: int, *, share: int = 1, does: OnShape | None = None
) -> list[Unit]:
    """A pass over the tensors' task vectors, cut into units of some bytes; of the entries, one in `share` is read.

    `does`: what is computed on a tensor [T, m, n], if that is more than to look at it.
    """
    sizes = [plan.stored_bytes(tensor, experts=True) // share for tensor in tensors]
    most = max(sum(sizes) // _PARTS, least)
    units: list[Unit] = []
    first = size = 0
    for i, nbytes in enumerate(sizes):
        size += nbytes
        if size >= most or i == len(sizes) - 1:
            work = sum(work_on(plan, tensor, does) for tensor in tensors[first : i + 1]) if does else 0
            units.append(Unit(f"{name}:{len(units)}", tensors, first, i + 1, size, work))
            first, size = i + 1, 0
    return units


def shard_units(job: Job, tensors: Tensors) -> list[Unit]:
    """The merge of these tensors: a unit for each weight file of the output, those with none of them too."""
    plan, todo = job.plan, {tensor.name for tensor in tensors}
    stage: list[TensorPlan] = []
    units = []
    for shard in plan.layout.shards:
        mine = [plan.tensors[name] for name in shard.tensors if name in todo]
        first, stop = len(stage), len(stage) + len(mine)
        stage += mine
        reads = [*mine, *(tensor for tensor in mine if job.is_measured(tensor))]  # the latter twice
        nbytes = sum(plan.stored_bytes(tensor, experts=tensor.action != "copy") for tensor in reads)
        work = sum(merge_work(job, tensor) for tensor in mine)
        units.append(Unit(f"shard:{shard.filename}", stage, first, stop, nbytes, work))
    return units


def deal(units: Sequence[Unit], count: int) -> list[list[Unit]]:
    """Units in so many parts that take about as long, the same on every machine; each has one if there are enough."""
    parts: list[list[Unit]] = [[] for _ in range(count)]
    costs = [0] * count
    for unit in sorted(units, key=lambda unit: (-unit.cost, unit.name)):
        least = min(range(count), key=lambda i: (costs[i], len(parts[i])))
        parts[least].append(unit)
        costs[least] += unit.cost
    return parts


def spread(job: Job, workers: int | None) -> dict[str, Any]:
    """How the merge itself can be shared out; the passes before it are cut finely enough.

    Args:
        job: The merge.
        workers: How many share it; None: as many as may come.

    Returns:
        `count` of its units; `dearest`, a weight file of the output, and its `share` of the whole cost; `workers`; and
        the most `speed_up` over one worker, where each takes the dearest unit that is left.
    """
    units = shard_units(job, [tensor for tensor in job.plan.in_order() if tensor.numel])
    costs = sorted((max(unit.cost, 1) for unit in units), reverse=True)
    busy = [0] * min(workers or len(costs), len(costs))
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost)
    dearest = max(units, key=lambda unit: unit.cost)
    return {
        "count": len(units), "dearest": dearest.name.partition(":")[2], "share": costs[0] / sum(costs),
        "workers": workers, "speed_up": sum(costs) / max(busy),
    }  # fmt: skip


def work_of(job: Job, tensor: TensorPlan) -> Work:
    """What the tensor's method does on it."""
    group = job.group(tensor)
    of_products = None if job.transforms else group.method.work_of_products
    directions = _directions(job.plan, tensor) if of_products else None
    if of_products is None or directions is None:
        return done_on(job.plan, tensor, functools.partial(group.method.work, group.options))
    return done_on(job.plan, tensor, lambda m, n, tasks: of_products(group.options, m, n, tasks, directions))


def directions_of_sum(job: Job, tensor: TensorPlan) -> int | None:
    """How many directions a merged task vector has at most, where factors of adapters alone tell it; else None.

    They do where the method is linear, as long as they are few beside the matrix. 0 where no expert changes the tensor.
    """
    linear = not job.transforms and job.group(tensor).method.linear(job.settings[tensor.name].options)
    directions = _directions(job.plan, tensor) if linear else None
    return directions if directions is not None and directions <= min(tensor.shape, default=0) // 2 else None


def _directions(plan: Plan, tensor: TensorPlan) -> int | None:
    """How many directions the experts take up on a matrix at most, where all are products."""
    infos = [expert.tensors.get(tensor.name) for expert in plan.experts_of(tensor)]
    changes = [info.change for info in infos if info is not None]
    if changes and (tensor.rows is not None or len(tensor.shape) != 2 or not all(c and c.low_rank for c in changes)):
        return None
    return sum(each.rank for each in changes if each is not None)


def merge_work(job: Job, tensor: TensorPlan) -> int:
    """The same in bytes that take as long to read; 0 where it is copied."""
    return 0 if tensor.action == "copy" else int(work_of(job, tensor).cost / _FLOPS)


def work_on(plan: Plan, tensor: TensorPlan, does: OnShape) -> int:
    """What is done on a tensor's task vectors, in bytes that take as long to read."""
    return int(done_on(plan, tensor, does).cost / _FLOPS)


def done_on(plan: Plan, tensor: TensorPlan, does: OnShape) -> Work:
    """What is done on a tensor's task vectors, as a matrix of rows."""
    return does(max(tensor.numel // max(tensor.row, 1), 1), tensor.row, len(plan.experts_of(tensor)))


def piece_cost(plan: Plan, piece: Piece, work: int) -> int:
    """A piece's share of what its tensor costs, whose computation is so much `work`; the shares of all add up to it."""
    before, after = (work * place // max(piece.tensor.numel, 1) for place in (piece.start, piece.stop))
    return piece_bytes(plan, piece) + after - before


def hash_units(plan: Plan) -> list[tuple[Unit, Checkpoint, Path]]:
    """The sha256 of every weight file of the inputs: by whom it is done, the file, and whose it is."""
    return [
        (Unit(f"hash:{i}:{model.address(file)}", nbytes=stat.st_size), model, file)
        for i, model in enumerate(plan.models)
        for file, stat in model.files.items()
    ]
