"""Which component of an expert goes with which of the base: models of several components are compared one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from modelmerge.checkpoint.components import CLASS, Component, folder_of
from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.reader import Checkpoint, with_prefix
from modelmerge.errors import PlanError

Tensors = Mapping[str, TensorInfo]


def component_of(model: Checkpoint, folder: str, folders: Iterable[str]) -> Checkpoint:
    """A component as a model of its own, its tensors by the names that they have there.

    Args:
        model: The whole; a task vector has the base's components.
        folder: The component's folder.
        folders: Of all components.
    """
    count = len(folder) + bool(folder)

    def names(some: Iterable[str]) -> dict[str, str]:
        return {name[count:]: name for name in some if folder_of(name, folders) == folder}

    tensors = {name: _renamed(model.tensors[whole], count) for name, whole in names(model.tensors).items()}
    vector = model.vector and replace(model.vector, unchanged=frozenset(names(model.vector.unchanged)))
    return replace(
        model, tensors=tensors, absent=frozenset(names(model.absent)), vector=vector, remarks=(),
        config=config_of(model, folder), components={"": replace(model.components.get(folder, Component()), folder="")},
    )  # fmt: skip


def config_of(model: Checkpoint, folder: str) -> dict[str, Any]:
    """What a component's config says; nothing where it has none."""
    if not folder:
        return model.config
    component = model.components.get(folder)
    return dict(component.config) if component is not None else {}


def placed(base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """The expert with its components in the base's folders: one that is a component alone goes onto the base's.

    What fits nowhere keeps its place.

    Raises:
        PlanError: A component fits several of the base's.
    """
    ours, theirs = base.components, expert.components
    if expert.vector is not None or ours.keys() == theirs.keys():
        return expert
    several = len(theirs) > 1
    taken = set(ours.keys() & theirs.keys()) if several else set()
    moves: dict[str, str] = {}
    for folder in [folder for folder in theirs if folder not in taken]:
        part = component_of(expert, folder, theirs)
        free = {place: component_of(base, place, ours) for place in ours if place not in taken}
        place = _place_of(part, folder if several else expert.reference.path.name, free)
        if place is not None:
            taken.add(place)
            moves[folder] = place
    return _moved(expert, {folder: place for folder, place in moves.items() if folder != place})


def _place_of(part: Checkpoint, folder: str, free: Mapping[str, Checkpoint]) -> str | None:
    """The base's component that a component of an expert is, by its names and shapes, or by its config."""
    if part.adapter is not None:
        return None
    fits = {place: _common(ours.tensors, part.tensors) for place, ours in free.items()}
    most = max(fits.values(), default=0)
    kind = _kind(part)
    if most:
        best = [place for place, count in fits.items() if count == most]
    else:
        best = [place for place, ours in free.items() if kind is not None and _kind(ours) == kind]
    best = [place for place in best if place == folder] or best
    if len(best) > 1:
        raise PlanError(
            f"'{part.name}': its '{next(iter(part.tensors), folder)}' could be the base's in "
            f"{' or '.join(f'{place}/' for place in best)}; which is meant cannot be told",
            hint=f"name it by a folder that is called like the base's, such as .../{best[0]}",
        )
    return best[0] if best else None


def _common(ours: Tensors, theirs: Tensors) -> int:
    return sum(name in ours and ours[name].shape == info.shape for name, info in theirs.items())


def _kind(part: Checkpoint) -> Any:
    return part.config.get(CLASS) or (part.config.get("architectures") or [None])[0]


def _moved(expert: Checkpoint, moves: Mapping[str, str]) -> Checkpoint:
    """The expert with components in other folders."""
    if not moves:
        return expert
    tensors: dict[str, TensorInfo] = {}
    absent: set[str] = set()
    components: dict[str, Component] = {}
    remarks = []
    for folder, component in expert.components.items():
        new = replace(component, folder=moves.get(folder, folder))
        part = component_of(expert, folder, expert.components) if len(expert.components) > 1 else expert
        tensors |= with_prefix(new.prefix, part.tensors)
        absent |= {f"{new.prefix}{name}" for name in part.absent}
        components[new.folder] = new
        if folder in moves:
            what, where = (f" in '{each}/'" if each else "" for each in (folder, new.folder))
            remarks.append(f"its tensors{what} are the base's{where}")
    return replace(
        expert, tensors=tensors, absent=frozenset(absent), components=components,
        config=dict(components[""].config) if "" in components else {},
        remarks=(*expert.remarks, *remarks),
    )  # fmt: skip


def _renamed(info: TensorInfo, count: int) -> TensorInfo:
    return replace(info, name=info.name[count:]) if count else info
