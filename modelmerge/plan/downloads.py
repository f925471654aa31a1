"""What a run needs from the Hub: which files, how many bytes, and the download itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelmerge.checkpoint.companions import is_companion, kind_of
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.plan.tensors import Plan
from modelmerge.progress import Reporter

if TYPE_CHECKING:  # most models are here, and the Hub's client takes long to import
    from modelmerge.hub import repository

Beside = Literal["all", "cards", "nothing"]  # what of the files beside the weights a run needs


def input_paths(plan: Plan) -> list[Path]:
    """Every path that an output must keep away from."""
    parts = [part for model in (*plan.models, plan.giver) for part in model.parts]
    local = [part for part in parts if part.reference.repository is None]
    paths = [path for part in local for path in (part.reference.path, *part.files)]
    if len(local) == len(parts):
        return paths
    from modelmerge.hub import repository

    return [*paths, repository.cache_directory()]


def wanted(plan: Plan, *, beside: Beside, stream: bool = False) -> list[tuple[repository.Repository, list[str]]]:
    """What a run needs of the repositories on the Hub: weight files, but for a stream, and what lies beside them.

    Args:
        plan: The plan.
        beside: Of what lies beside the weights: the models' cards, and with `all` the base's companions too, and what
            comes from an expert in place of them.
        stream: Weight files are to be read over ranges, where that can be.
    """
    needed = []
    for model, part in [(each, part) for each in plan.models for part in each.parts]:
        remote, first = part.reference.repository, part is model.parts[0]
        if remote is not None:
            goes_along: list[Callable[[str], bool]] = [_is_card] * (beside != "nothing")
            goes_along += [_companion_of(part)] * (beside == "all" and first and model is plan.base)
            goes_along += [_is_taken] * (beside == "all" and first and model is plan.giver)
            needed.append((remote, _places(part, remote, goes_along, stream=stream)))
    return needed


def _places(
    model: Checkpoint, remote: repository.Repository, goes_along: list[Callable[[str], bool]], *, stream: bool = False
) -> list[str]:
    """The files of a model's repository that are needed, by their place there."""
    # A tensor whose elements lie in another order would be read over and over again.
    infos = model.tensors.values()
    parts = [*infos, *(part for info in infos if info.change for part in info.change.parts)]
    parts += [block for part in parts for block in part.blocks]
    gathered = {part.file for part in parts if part.strides is not None or any(block.blocks for block in part.blocks)}
    places = [remote.place(file) for file in model.files if not stream or file in gathered]
    if model.directory is not None:
        places += [place for name, place in remote.below.items() if any(each(name) for each in goes_along)]
    return places


def _companion_of(model: Checkpoint) -> Callable[[str], bool]:
    return lambda place: is_companion(place, model.folders)


def _is_card(place: str) -> bool:
    return place == CARD


def _is_taken(place: str) -> bool:
    """Whether a file of that place comes from an expert, where that is asked for."""
    return kind_of(place) is not None


def with_downloads(shown: dict[str, Any], plan: Plan, *, beside: Beside, streamed: int | None) -> dict[str, Any]:
    """A plan as it is shown, with the bytes to download, the shared cache they go to, and a stream's memory.

    `streamed` are the bytes to be read over ranges, where weight files are not stored.
    """
    needed = wanted(plan, beside=beside, stream=streamed is not None)
    shown["bytes"], shown["cache"] = {"download": streamed or 0, **shown["bytes"]}, None
    if needed:
        from modelmerge.hub import ranges, repository

        stored = sum(repository.download_bytes(remote, places) for remote, places in needed)
        shown["bytes"]["download"] += stored
        free = repository.free_bytes()
        cache = {"directory": str(repository.cache_directory()), "free": free, "enough": stored <= free}
        shown["cache"] = cache if streamed is None else None
        if streamed:
            shown["peak_memory"]["host"] += ranges.STREAM_BYTES * sum(model.streamed for model in plan.models)
    return shown


def fetch(plan: Plan, progress: Reporter, *, beside: Beside, stream: bool) -> None:
    """Have what a run needs of repositories on the Hub in the shared cache; nothing to do for local models.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    _fetch(wanted(plan, beside=beside, stream=stream), plan.models, progress)


def fetch_whole(models: Iterable[Checkpoint], progress: Reporter) -> None:
    """Have whole models from the Hub in the shared cache, with what lies beside their weights.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    remote = [model for model in models if not model.reference.is_here]
    parts = [(part, part.reference.repository) for model in remote for part in model.parts]
    needed = [(there, _places(part, there, [_companion_of(part)])) for part, there in parts if there is not None]
    _fetch(needed, remote, progress)


def _fetch(
    needed: list[tuple[repository.Repository, list[str]]], models: Iterable[Checkpoint], progress: Reporter
) -> None:
    if needed:
        from modelmerge.hub import repository

        repository.fetch(needed, progress)
    for model in models:
        if not model.reference.is_here:
            model.look_again()
