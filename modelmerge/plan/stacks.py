"""Weights that are merged as matrices and are none in files.

Stacks hold the weights of a layer's experts in one tensor [E, m, n]. A plan has an entry for each of the E matrices,
`STACK[INDEX]`, so that a stack is merged as the same matrices are that a model stores one by one. Kernels of
convolutions [out, in, *size] are, where an override names a method for matrices for them, merged as one matrix
[out, in * size] each.

mergekit does otherwise: it sees the gates and ups of a layer's experts as one tensor, and their downs as another. A
plan for one of its configurations has entries of that kind, whose rows are those of all the matrices, however files
store them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modelmerge.checkpoint.experts import stack_all
from modelmerge.checkpoint.header import DTYPE_BITS, MERGEABLE_DTYPES, Change, TensorInfo, joined, matrix
from modelmerge.checkpoint.layout import Entry, Inside
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    from modelmerge.plan.tensors import TensorPlan

# Names of the layers whose experts are stacked: of most families, and of Granite's and JetMoE's.
_STACKS = ("*expert*", "*moe.input_linear.weight", "*moe.output_linear.weight", "*mlp.input_linear.weight",
           "*mlp.output_linear.weight")  # fmt: skip


def is_stack(info: TensorInfo) -> bool:
    """Whether it holds the weights of a layer's experts, a matrix each."""
    if len(info.shape) != 3 or not min(info.shape) or info.dtype not in MERGEABLE_DTYPES:
        return False
    return matches(info.name.lower(), _STACKS)


def is_kernel(info: TensorInfo) -> bool:
    """Whether it is the kernel of a convolution, over one to three dimensions."""
    if not 3 <= len(info.shape) <= 5 or not min(info.shape) or info.dtype not in MERGEABLE_DTYPES:
        return False
    # A table of positions or of shifts has a front axis of length one, and no `weight` at the end of its name.
    return info.name.endswith(".weight") and info.shape[0] > 1 and not is_stack(info)


def matrix_name(stack: str, index: int) -> str:
    """The name of a matrix of a stack in plans, manifests and task vectors."""
    return f"{stack}[{index}]"


def restack(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """A task vector that holds matrices of the base's stacks one by one, as one that holds the stacks."""
    vector = expert.vector
    if vector is None:
        return expert
    changes: dict[str, TensorInfo] = {}
    unchanged = set(vector.unchanged)
    for stack, info in base.tensors.items():
        parts = [matrix_name(stack, index) for index in range(info.shape[0])] if is_stack(info) else []
        matrices = tuple(expert.tensors.get(part) for part in parts)
        some = next((matrix for matrix in matrices if matrix is not None), None)
        if some is not None and all(part in expert.tensors or part in unchanged for part in parts):
            nbytes = sum(matrix.nbytes for matrix in matrices if matrix is not None)
            changes[stack] = replace(info, dtype=some.dtype, file=some.file, start=some.start, nbytes=nbytes,
                                     change=Change(matrices=matrices))  # fmt: skip
        elif parts and unchanged.issuperset(parts):
            unchanged.add(stack)
    parts_of_any = {m.name for info in changes.values() if info.change for m in info.change.matrices if m is not None}
    tensors = {name: info for name, info in expert.tensors.items() if name not in parts_of_any} | changes
    return replace(expert, tensors=tensors, vector=replace(vector, unchanged=frozenset(unchanged)))


def as_matrices(
    base: Checkpoint, experts: Sequence[Checkpoint], tensors: Mapping[str, TensorPlan]
) -> tuple[Checkpoint, tuple[Checkpoint, ...], dict[str, TensorPlan]]:
    """The models and the plan with matrices in the place of the stacks and kernels that are merged as linear layers."""
    plans: dict[str, TensorPlan] = {}
    for name, plan in tensors.items():
        if plan.action != "merge" or not plan.linear or len(plan.shape) < 3:
            plans[name] = plan
            continue
        if not is_stack(base.tensors[name]):  # the models' bytes lie as the matrix's do
            plans[name] = replace(plan, shape=(plan.shape[0], plan.row), whole=plan.shape)
            continue
        for index in range(plan.shape[0]):
            part = matrix_name(name, index)
            plans[part] = replace(plan, name=part, shape=plan.shape[1:], stack=name, whole=plan.shape)
    stacks = {plan.stack for plan in plans.values() if plan.stack is not None}
    if not stacks:
        return base, tuple(experts), plans
    models = [replace(model, tensors=_matrices(model.tensors, stacks)) for model in (base, *experts)]
    return models[0], tuple(models[1:]), plans


def _matrices(tensors: Mapping[str, TensorInfo], stacks: set[str]) -> dict[str, TensorInfo]:
    """A model's tensors, those stacks in their matrices."""
    parts: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name not in stacks:
            parts[name] = info
            continue
        each = info.change.matrices if info.change is not None else ()
        for index, part in enumerate(each or [matrix(info, index) for index in range(info.shape[0])]):
            if part is not None:
                parts[matrix_name(name, index)] = replace(part, name=matrix_name(name, index))
    return parts


_APART = "afmoe"  # the family whose experts mergekit does not put together


def as_wholes(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    tensors: Mapping[str, TensorPlan],
    kind: Callable[[TensorPlan], object],
) -> tuple[Checkpoint, tuple[Checkpoint, ...], dict[str, TensorPlan]]:
    """The models and the plan with the experts of a layer as tensors [rows, n], as mergekit sees them.

    Experts that are not merged alike stay apart. `kind` is the same of tensors that are, and None of one that is not
    merged, or by a method for matrices.
    """
    groups = {name: [name] for name, info in base.tensors.items() if is_stack(info)}
    if base.config.get("model_type") != _APART:
        groups |= {name: [origin[0] for origin in parts] for name, parts in stack_all(base.tensors)[1].items()}
    wholes: dict[str, TensorPlan] = {}  # by their first members
    for name, members in groups.items():
        first, kinds = tensors[members[0]], [kind(tensors[member]) for member in members]
        if None not in kinds and all(each == kinds[0] for each in kinds):
            stored = tuple((member, tensors[member].shape) for member in members)
            rows = sum(math.prod(shape[:-1]) for _, shape in stored)
            wholes[first.name] = replace(first, name=name, shape=(rows, first.shape[-1]), members=stored)
    inside = {member for whole in wholes.values() for member, _ in whole.members}
    plans = [wholes.get(name, plan) for name, plan in tensors.items() if name in wholes or name not in inside]
    models = []
    for model in (base, *experts):
        kept = {name: info for name, info in model.tensors.items() if name not in inside}
        made = (_whole(model, whole) for whole in wholes.values())
        models.append(replace(model, tensors=kept | {info.name: info for info in made if info is not None}))
    return models[0], tuple(models[1:]), {plan.name: plan for plan in plans}


def _whole(model: Checkpoint, plan: TensorPlan) -> TensorInfo | None:
    """A model's experts of a layer as one tensor, run by run where those are not alike; None where nothing changes."""
    runs: list[tuple[int, TensorInfo]] = []
    row = 0
    for name, shape in plan.members:
        info, height = model.tensors.get(name), math.prod(shape[:-1])
        if info is not None and len(shape) == 3:
            each = info.change.matrices if info.change is not None else ()
            matrices = each or [matrix(info, index) for index in range(shape[0])]
            runs += [(row + i * shape[1], part) for i, part in enumerate(matrices) if part is not None]
        elif info is not None:
            inner = info.change.runs if info.change is not None else ()
            runs += [(row + first, run) for first, run in inner or ((0, info),)]
        row += height
    if not runs:
        return None
    parts = [part for _, part in runs]
    if len({part.dtype for part in parts}) == 1 and all(part.change is None for part in parts):
        return joined(plan.name, plan.shape, parts)
    nbytes, change = sum(part.nbytes for part in parts), Change(runs=tuple(runs))
    return TensorInfo(plan.name, parts[0].dtype, plan.shape, parts[0].file, parts[0].start, nbytes, change=change)


def entries(tensors: Iterable[TensorPlan]) -> tuple[dict[str, Entry], dict[str, Inside]]:
    """What a checkpoint of these tensors stores, stacks whole; and what is inside of those, and of what has members."""
    stored: dict[str, Entry] = {}
    parts: dict[str, Inside] = {}
    for tensor in tensors:
        whole, dtype, size = tensor.stack or tensor.name, tensor.out_dtype, tensor.out_bytes
        if tensor.members:
            bits = DTYPE_BITS[dtype]
            each = {name: (dtype, shape, math.prod(shape) * bits // 8) for name, shape in tensor.members}
            parts[whole] = Inside({whole: size}, each)
        elif tensor.stack is not None:
            written = {**(parts[whole].written if whole in parts else {}), tensor.name: size}
            size = sum(written.values())
            parts[whole] = Inside(written, {whole: (dtype, tensor.stored_shape, size)})
        stored[whole] = (dtype, tensor.stored_shape, size)
    return stored, parts
