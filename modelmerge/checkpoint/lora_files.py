"""LoRA files of models of images: what they change in a base's tensors.

sd-scripts (kohya), LyCORIS, diffusers and peft write them. With rank r and scale s = alpha / r (1 without alpha):

- LoRA and LoCon: s up down, with down [r, in, *kernel] and up [out, r, 1, 1]; with a kernel `mid` [r, r, *kernel]
  between them, of convolutions, down [r, in, 1, 1];
- LoHa: s (w1_a w1_b) * (w2_a w2_b), element by element; LoKr: the Kronecker product of w1 and w2, each whole or a
  product of factors, times s where one is; a kernel `t1`, `t2` stands between factors whose first is stored [r, out];
- DoRA, with each of them: base plus that, each output's weights rescaled to the norm that was learnt for it;
- differences that stand in the file as they are.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from modelmerge.checkpoint.adapter import Translation, scale_of
from modelmerge.checkpoint.adapter_config import Adapter, checked_adapter
from modelmerge.checkpoint.header import Change, Product, TensorInfo, rows, transposed
from modelmerge.checkpoint.lora_keys import Module, modules_of
from modelmerge.checkpoint.lora_places import Places, Spot, known_front
from modelmerge.checkpoint.names import matches
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import CheckpointError, PlanError, ReferenceNotFound, named

_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def translate_file(expert: Checkpoint, base: Checkpoint, exclude: Sequence[str] = ()) -> Translation:
    """The modules of a LoRA file as changes to the base's tensors; those whose keys `exclude` matches are left out.

    Raises:
        CheckpointError: Keys that belong together are missing, or disagree.
        PlanError: A key has no place in the base, or its change does not fit there.
        ReferenceNotFound: The base is no model of images.
    """
    assert expert.adapter is not None, "the expert is a LoRA file"
    places, file = Places(base), expert.adapter.file
    modules, strangers = modules_of(expert.tensors)
    if not places.of_images and not all(known_front(name) for name in modules):
        raise ReferenceNotFound(
            f"{file} is a LoRA file, by its key '{next(iter(expert.tensors))}', and {base.reference.text} no model of "
            "images: what it changes cannot be told",
            hint="is it an adapter's? Then name the folder with its adapter_config.json; or merge it into its base "
            "first, with the program that it was made for, and name the result",
        )
    excluded = [key for key in strangers if matches(key, exclude)]
    lost = [Module(key, {}) for key in strangers if key not in excluded]
    read, runs = _Reader(expert), defaultdict[str, list[tuple[int, TensorInfo]]](list)
    for module in modules.values():
        keys = [info.name for info in module.parts.values()]
        if all(matches(key, exclude) for key in keys):
            excluded += keys
            continue
        ends, changes = places.find(module), read.changes(module)
        if ends is None or not ends.keys() >= changes.keys():
            lost.append(module)
            continue
        for end, change in changes.items():
            for spot in ends[end]:
                runs[spot.name].append((spot.first, _placed(change, spot, base.tensors[spot.name], module)))
    if lost:
        raise _unplaced(expert, lost, places)
    tensors = {name: _joined(base.tensors[name], each) for name, each in runs.items()}
    if not tensors:
        raise PlanError(f"{file}: all of its keys are excluded", hint=f"check {named('exclude')}")
    more = f" and {len(excluded) - 1} more" if excluded[1:] else ""
    remarks = (f"its '{excluded[0]}'{more} is left out, as excluded",) if excluded else ()
    return Translation(tensors, frozenset(excluded), remarks)


class _Reader:
    """Reads what the parts of a module make."""

    def __init__(self, expert: Checkpoint) -> None:
        assert expert.adapter is not None, "the expert is a LoRA file"
        self._expert = expert
        self._file = expert.adapter.file
        self._config = expert.adapter.config
        self._adapters: dict[str, Adapter | None] = {}  # by component

    def changes(self, module: Module) -> dict[str, TensorInfo]:
        """How the module's weight and bias change, as a LoRA file has them: in the layout that it speaks of."""
        parts, changes = module.parts, {}
        kinds: dict[str, Callable[[Module], TensorInfo]] = {
            "up": self._lora, "hada_w1_a": self._loha, "lokr_": self._lokr, "diff": self._whole,
        }  # fmt: skip
        there = [make for start, make in kinds.items() if any(_is_of(part, start) for part in parts)]
        if len(there) > 1 or (not there and not parts.keys() & {"diff_b", "bias"}):
            some = next(iter(parts.values()))
            what = "of several kinds" if there else "incomplete: what it goes with is missing"
            raise CheckpointError(f"{some.file}: '{some.name}' is {what}")
        for make in there:
            changes["weight"] = self._rescaled(module, make(module))
        for part, scale in (("diff_b", 1.0), ("bias", None)):
            if part in parts:
                factor = (
                    self._scale(module, parts["down"].shape[0] if "down" in parts else 1) if scale is None else scale
                )
                changes["bias"] = replace(parts[part], change=Change(factor))
        return changes

    def _whole(self, module: Module) -> TensorInfo:
        return replace(module.parts["diff"], change=Change())

    def _lora(self, module: Module) -> TensorInfo:
        up, down, mid = self._part(module, "up"), self._part(module, "down"), module.parts.get("mid")
        rank = down.shape[0]
        right = down if mid is None else _made("kernel", mid, down, (mid.shape[0], down.shape[1], *mid.shape[2:]))
        fits = len(up.shape) > 1 and len(down.shape) > 1 and up.shape[1] == right.shape[0]
        if not fits or math.prod(up.shape[2:]) != 1 or (mid is not None and mid.shape[1] != rank):
            raise _misfit(up, down)
        return _made("product", up, right, (up.shape[0], *right.shape[1:]), self._scale(module, rank))

    def _loha(self, module: Module) -> TensorInfo:
        halves = [self._pair(module, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]
        if halves[0].shape != halves[1].shape:
            raise _misfit(*halves)
        scale = self._scale(module, self._part(module, "hada_w1_b").shape[0])
        return _made("elementwise", halves[0], halves[1], halves[0].shape, scale)

    def _lokr(self, module: Module) -> TensorInfo:
        parts, ranks, halves = module.parts, [], []
        for word in ("lokr_w1", "lokr_w2"):
            if word in parts:
                halves.append(parts[word])
            else:
                halves.append(self._pair(module, f"{word}_a", f"{word}_b", "lokr_t2" if word == "lokr_w2" else ""))
                ranks.append(parts[f"{word}_b"].shape[0])
        (a, b), (c, d, *kernel) = halves[0].shape[:2], halves[1].shape
        scale = self._scale(module, ranks[-1]) if ranks else 1.0  # without factors there is no rank
        return _made("kronecker", halves[0], halves[1], (a * c, b * d, *kernel), scale)

    def _pair(self, module: Module, first: str, second: str, kernel: str) -> TensorInfo:
        """The product of two factors, with a kernel between them if there is one."""
        left, right, between = self._part(module, first), self._part(module, second), module.parts.get(kernel)
        if len(left.shape) != 2 or len(right.shape) != 2:
            raise _misfit(left, right)
        if between is not None:
            left = transposed(left)
            if between.shape[:2] != (left.shape[1], right.shape[0]):
                raise _misfit(between, right)
            right = _made("kernel", between, right, (between.shape[0], right.shape[1], *between.shape[2:]))
        if left.shape[1] != right.shape[0]:
            raise _misfit(left, right)
        return _made("product", left, right, (left.shape[0], *right.shape[1:]))

    def _rescaled(self, module: Module, made: TensorInfo) -> TensorInfo:
        """The module's change with DoRA's norms, if it has any."""
        norms = module.parts.get("dora_scale") or module.parts.get("magnitude")
        if norms is None:
            return made
        change, height = made.change, made.shape[0]
        assert change is not None, "a module's change is one"
        by_row = "magnitude" in module.parts or norms.shape[:1] == (height,)
        if change.factors is not None and by_row and norms.numel == height:
            return replace(made, change=replace(change, magnitude=replace(norms, shape=(height,))))
        width = math.prod(made.shape[1:])
        if not by_row and change.low_rank and "mid" not in module.parts and norms.numel == made.shape[1] == width:
            left, right = (
                transposed(replace(f, shape=(f.shape[0], f.numel // f.shape[0]))) for f in change.factors or ()
            )
            change = replace(change, factors=(left, right), transposed=True, magnitude=replace(norms, shape=(width,)))
            return replace(made, change=change)
        raise CheckpointError(
            f"{norms.file}: '{norms.name}' {list(norms.shape)} rescales what cannot be rescaled here",
            hint="merge it into its base first, with the program that it was made for, and name the result",
        )

    def _part(self, module: Module, name: str) -> TensorInfo:
        if name not in module.parts:
            some = next(iter(module.parts.values()))
            raise CheckpointError(f"{some.file}: '{some.name}' has no matching {name} of '{module.name}'")
        info = module.parts[name]
        if not info.numel or not info.shape:
            raise CheckpointError(f"{info.file}: '{info.name}' has the shape {list(info.shape)}: no factor of a LoRA")
        return info

    def _scale(self, module: Module, rank: int) -> float:
        """Alpha over the rank: as the file's own keys say, or its metadata; else 1."""
        alpha = module.parts.get("alpha")
        if alpha is not None:
            return self._number(alpha) / rank
        component, _, inner = module.name.partition(".")
        if component not in self._adapters:
            self._adapters[component] = self._adapter(component)
        adapter = self._adapters[component]
        return 1.0 if adapter is None else scale_of(adapter, inner, rank)

    def _adapter(self, component: str) -> Adapter | None:
        """What the metadata say of a component's LoRA, as peft has it."""
        front = f"{component}."
        config = {key.removeprefix(front): value for key, value in self._config.items() if key.startswith(front)}
        config = config or ({} if any("." in key for key in self._config) else self._config)
        return checked_adapter(self._file, {"peft_type": "LORA", **config}) if config else None

    def _number(self, info: TensorInfo) -> float:
        buffer = bytearray(info.nbytes)
        if info.numel != 1 or info.dtype not in (*_SCALARS, "BF16"):
            raise CheckpointError(f"{info.file}: '{info.name}' is {info.dtype} {list(info.shape)}, and no number")
        self._expert.read_into(info, 0, memoryview(buffer), follow=self._expert.streamed)
        # The bytes of a bfloat16 are the upper half of a float's.
        raw, kind = (b"\0\0" + buffer, "<f") if info.dtype == "BF16" else (bytes(buffer), _SCALARS[info.dtype])
        (number,) = struct.unpack(kind, raw)
        if not math.isfinite(number):
            raise CheckpointError(f"{info.file}: '{info.name}' is {number}")
        return float(number)


def _is_of(part: str, start: str) -> bool:
    return part == start or (start.endswith("_") and part.startswith(start)) or (start == "up" and part == "down")


def _made(
    product: Product, left: TensorInfo, right: TensorInfo, shape: tuple[int, ...], scale: float = 1.0
) -> TensorInfo:
    """A tensor of that shape that two factors make."""
    change = Change(scale, (left, right), product=product)
    return replace(left, shape=shape, strides=None, blocks=(), nbytes=left.nbytes + right.nbytes, change=change)


def _misfit(left: TensorInfo, right: TensorInfo) -> CheckpointError:
    one, other = (f"'{info.name}' {list(info.shape)}" for info in (left, right))
    return CheckpointError(f"{left.file}: {one} and {other} do not go together")


def _placed(made: TensorInfo, spot: Spot, target: TensorInfo, module: Module) -> TensorInfo:
    """What of a change falls upon a spot of the base's tensor, as the rows there."""
    change = made.change
    assert change is not None, "a module's change is one"
    shape = made.shape
    if spot.transposed and len(shape) > 1:
        if not change.low_rank or change.transposed or change.first:
            raise _unfit(made, target, module)
        change = replace(change, factors=(change.factors or ())[::-1], transposed=True)  # type: ignore[arg-type]
        shape = shape[::-1]
    count = shape[0] - spot.begin if spot.rows is None else spot.rows
    wide = math.prod(shape[1:]) == target.numel // target.shape[0]
    alike = len(shape) <= 2 or len(target.shape) <= 2 or _kernel(shape) == _kernel(target.shape)
    whole = (spot.first, spot.begin, count) == (0, 0, target.shape[0]) and count == shape[0]
    inside = spot.begin + count <= shape[0] and spot.first + count <= target.shape[0]
    # Where nothing says which rows are meant, all must be there.
    if not (wide and alike and inside) or (spot.rows is None and not whole):
        raise _unfit(made, target, module)
    made = replace(made, shape=(count, *target.shape[1:]), change=change)
    if whole:
        return made
    if change.factors is None:
        return replace(rows(replace(made, shape=(shape[0], *target.shape[1:])), spot.begin, spot.begin + count))
    if change.transposed and change.magnitude is not None:  # norms of columns are of whole ones
        raise _unfit(made, target, module)
    norms = change.magnitude and rows(change.magnitude, spot.begin, spot.begin + count)
    return replace(made, change=replace(change, first=change.first + spot.begin, magnitude=norms))


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape but for kernels of size 1 and its rows."""
    return (shape[1], *(size for size in shape[2:] if size != 1))


def _unfit(made: TensorInfo, target: TensorInfo, module: Module) -> PlanError:
    return PlanError(
        f"{made.file}: '{module.name}' changes a weight of shape {list(made.shape)}, but the base's '{target.name}' is "
        f"{list(target.shape)}",
        hint="is this a LoRA of this kind of model?",
    )


def _joined(target: TensorInfo, runs: list[tuple[int, TensorInfo]]) -> TensorInfo:
    """The base's tensor as it changes in these runs of its rows.

    Raises:
        PlanError: Two of them overlap.
    """
    runs = sorted(runs, key=lambda run: run[0])
    for (first, run), (after, other) in pairwise(runs):
        if first + run.shape[0] > after:
            raise PlanError(
                f"{run.file}: '{_first_key(run)}' and '{_first_key(other)}' change the same rows of '{target.name}'",
                hint=f"leave out those that are not meant: {named('exclude')} GLOB",
            )
    if len(runs) == 1 and runs[0][1].shape == target.shape:
        return replace(runs[0][1], name=target.name)
    (_, some), nbytes = runs[0], sum(run.nbytes for _, run in runs)
    named_runs = tuple((first, replace(run, name=target.name)) for first, run in runs)
    return replace(some, name=target.name, shape=target.shape, nbytes=nbytes, change=Change(runs=named_runs))


def _first_key(info: TensorInfo) -> str:
    return info.change.parts[0].name if info.change is not None and info.change.parts else info.name


def _unplaced(expert: Checkpoint, lost: Sequence[Module], places: Places) -> PlanError:
    """The error for modules that the base has no place for."""
    assert expert.adapter is not None, "the expert is a LoRA file"
    first, count = lost[0], len(lost)
    key = next((info.name for info in first.parts.values()), first.name)
    near = places.near(first)
    globs = dict.fromkeys(f"{known_front(module.name) or module.name}*" for module in lost)
    ways = " ".join(f"{named('exclude')} '{glob}'" for glob in list(globs)[:3])
    return PlanError(
        f"{expert.adapter.file}: the base has no place for {count} of its modules, such as that of its key '{key}'",
        hint=("is it a LoRA of this kind of model? " + (f"The base has '{near}'. " if near else ""))
        + f"Leave out what it has no place for: {ways}",
    )
