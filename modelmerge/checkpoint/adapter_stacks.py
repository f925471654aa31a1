"""PEFT adapters on stacks of experts: `target_parameters`, which is what `all-linear` means on mixtures of experts.

The conventions are those of peft (0.21): a parameter [E, m, n] has one A [E r, in] and one B [out, r E]; expert e has
rows e r to (e + 1) r of A and every E-th column of B from e on. Where the module keeps [E, out, in], its change is
s B_e A_e, and the transpose where it keeps [E, in, out]. Of several parameters of a module, the first is `base_layer`
of the second in the keys, and so on: the shapes tell which is which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelmerge.checkpoint.adapter import scale_of
from modelmerge.checkpoint.adapter_config import MERGE_FIRST, PREFIX, Adapter
from modelmerge.checkpoint.adapter_places import Places
from modelmerge.checkpoint.experts import stack_all
from modelmerge.checkpoint.header import DTYPE_BITS, Change, TensorInfo, matrix, rows
from modelmerge.checkpoint.names import family_of
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError

_A, _B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True, slots=True)
class View:
    """A base as it is in memory, where adapters are trained: its names there, its experts in stacks.

    Args:
        base: The base, by those names.
        names: The names that the same have in files, stacks by the names that these would have.
        origins: By such a name of a stack, its parts in files, each with the number of the expert and with its first
            and last row in the expert's matrix.
    """

    base: Checkpoint
    names: dict[str, str]
    origins: dict[str, list[tuple[str, int, int, int]]]

    def back(self, changes: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Changes to these tensors as changes to the base's."""
        tensors: dict[str, TensorInfo] = {}
        for name, info in changes.items():
            own = self.names.get(name, name)
            if own not in self.origins:
                tensors[own] = replace(info, name=own)
                continue
            for part, number, first, last in self.origins[own]:
                whole = info.change.matrices[number] if info.change is not None else matrix(info, number)
                assert whole is not None, "an adapter changes all matrices of a stack"
                tensors[part] = replace(_rows(whole, first, last), name=part)
        return tensors


def in_memory(base: Checkpoint) -> View:
    """The base as it is in memory."""
    family = family_of(base.config)
    stacks, origins = stack_all(base.tensors)
    names = {name: family.name(name) for name in stacks}
    if len(set(names.values())) < len(names):  # two would be one
        names = dict(zip(stacks, stacks, strict=True))
    tensors = {names[name]: replace(info, name=names[name]) for name, info in stacks.items()}
    return View(replace(base, tensors=tensors), {new: name for name, new in names.items()}, origins)


def _rows(info: TensorInfo, first: int, last: int) -> TensorInfo:
    """Some rows of a matrix, which was trained whole or changes by factors."""
    change = info.change
    if change is None or change.factors is None:
        return rows(info, first, last)
    left, right = change.factors
    if change.transposed:
        raise PlanError(
            f"{info.file}: the base stores its experts one by one, and the adapter was trained on a transposed stack",
            hint=MERGE_FIRST,
        )
    factors = (rows(left, first, last), right)
    shape = (last - first, *info.shape[1:])
    return replace(info, shape=shape, change=replace(change, factors=factors))


def on_stacks(expert: Checkpoint, base: Checkpoint) -> tuple[dict[str, TensorInfo], Checkpoint]:
    """The adapter's changes to stacks of experts, by the base's names, and the adapter without their keys.

    Raises:
        PlanError: Such a change fits no stack of the base.
    """
    adapter = expert.adapter
    assert adapter is not None, "the expert is an adapter"
    words: list[str] = adapter.config.get("target_parameters") or []
    modules: dict[str, dict[str, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for key, info in expert.tensors.items():
        name = key.removeprefix(PREFIX)
        end = next((end for end in (_A, _B) if name.endswith(f".{end}")), None)
        if end is not None:
            level = name.removesuffix(f".{end}")
            modules[level.replace(".base_layer", "")][level][end] = info
    wanted: dict[str, tuple[tuple[int, ...], ...]] = {}
    factors: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    for module, levels in modules.items():
        for word in dict.fromkeys(word.rpartition(".")[2] for word in words):
            parameter = f"{module}.{word}"
            rank = int(adapter.value_of("rank", parameter))
            for parts in levels.values():
                if word == "weight" or len(parts) < 2 or parts[_A].shape[0] % rank or parts[_A].shape[0] == rank:
                    continue
                count = parts[_A].shape[0] // rank
                shapes = _shapes(count, parts[_A], parts[_B])
                if _ends_with(base, parameter, shapes):
                    wanted[parameter], factors[parameter] = shapes, (parts[_A], parts[_B])
    if not wanted:
        return {}, expert
    changes = {}
    for parameter, place in Places(adapter, base.tensors, None).find(wanted).items():
        a, b = factors[parameter]
        changes[place] = _change(adapter, parameter, a, b, base.tensors[place])
    keys = {info.name for pair in factors.values() for info in pair}
    return changes, replace(expert, tensors={k: i for k, i in expert.tensors.items() if i.name not in keys})


def _shapes(count: int, a: TensorInfo, b: TensorInfo) -> tuple[tuple[int, ...], ...]:
    return (count, b.shape[0], a.shape[1]), (count, a.shape[1], b.shape[0])


def _ends_with(base: Checkpoint, parameter: str, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the base has a stack that may be the parameter, whatever stands in front of its name."""
    end = ".".join(parameter.split(".")[-2:])
    return any(name.endswith(end) and info.shape in shapes for name, info in base.tensors.items())


def _change(adapter: Adapter, parameter: str, a: TensorInfo, b: TensorInfo, stack: TensorInfo) -> TensorInfo:
    """The change of a stack, matrix by matrix."""
    count, *shape = stack.shape
    rank = a.shape[0] // count
    straight = (b.shape[0], a.shape[1]) == tuple(shape)
    if b.shape[0] == a.shape[1] and _is_transposed(adapter, parameter):
        straight = False
    item = DTYPE_BITS[b.dtype] // 8
    matrices = []
    for number in range(count):
        a_e = rows(a, number * rank, (number + 1) * rank)
        b_e = replace(b, shape=(b.shape[0], rank), start=b.start + number * item, strides=(b.shape[1], count),
                      nbytes=b.nbytes // count)  # fmt: skip
        factors = (b_e, a_e) if straight else (a_e, b_e)
        change = Change(scale_of(adapter, parameter, rank), factors, transposed=not straight)
        nbytes = a_e.nbytes + b_e.nbytes
        matrices.append(TensorInfo(stack.name, a.dtype, tuple(shape), a.file, a.start, nbytes, change=change))
    nbytes = a.nbytes + b.nbytes
    change = Change(matrices=tuple(matrices))
    return TensorInfo(stack.name, a.dtype, stack.shape, a.file, a.start, nbytes, change=change)


def _is_transposed(adapter: Adapter, parameter: str) -> bool:
    """Whether a square stack is kept as [E, in, out], as the families do that peft knows to."""
    kind = str((adapter.config.get("auto_mapping") or {}).get("parent_library", ""))
    return any(f".{family}." in kind for family in ("gpt_oss", "llama4"))
