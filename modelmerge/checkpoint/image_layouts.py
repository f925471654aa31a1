"""A model of images in the other layout than the base, or under other words in front: seen as the base has it.

Nothing is read or copied: the views are rows of stored tensors, one below the other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from modelmerge.checkpoint.diffusion import Network, Piece, networks
from modelmerge.checkpoint.header import TensorInfo, joined, reshaped, rows, transposed
from modelmerge.checkpoint.leftovers import is_weight, refusal
from modelmerge.errors import PlanError

Tensors = Mapping[str, TensorInfo]


def in_image_layout_of(
    name: str, base: Tensors, expert: Tensors, merges: Callable[[str], bool]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """The expert's tensors as the base has them, and remarks where that changed anything.

    What the base has no place for keeps its own name.

    Args:
        name: The expert's.
        base: The base's tensors.
        expert: The expert's tensors.
        merges: Whether a tensor of that name is to be merged.

    Raises:
        PlanError: A network could be one of several of the base's, has only some of the rows of a tensor, or has
            tensors under names that the table lacks.
    """
    tensors = dict(expert)
    if expert.keys() <= base.keys():
        return tensors, []
    ours, theirs = networks(base), networks(expert)
    pairs = [(network, own) for network in theirs for own in _partners(name, network, theirs, ours)]
    known = {key for network in theirs for key in network.pieces}
    strangers = {key: info for key, info in expert.items() if key not in known and is_weight(info)}
    counts: dict[str, int] = defaultdict(int)
    for network, own in pairs:
        if network.pieces.keys() <= base.keys():
            continue
        views = _views(name, base, expert, network, own)
        lacks = [base[key] for key in own.pieces if key not in views and merges(key)]
        if network.single != own.single:
            _refuse_unknown(name, lacks, [info for key, info in strangers.items() if key.startswith(network.prefix)])
        placed = {piece.diffusers.partition("/")[2] for each in own.pieces.values() for piece in each}
        for key, pieces in network.pieces.items():
            if all(piece.diffusers.partition("/")[2] in placed for piece in pieces):
                del tensors[key]
        counts[_change(network, own)] += len(views)
        tensors |= views
    return tensors, [f"{change}: {count} of the base's tensors are read so" for change, count in counts.items()]


def _partners(name: str, network: Network, theirs: tuple[Network, ...], ours: tuple[Network, ...]) -> list[Network]:
    """The base's network that an expert's is; none where the base has none of its kind."""
    some = [own for own in ours if own.kind == network.kind]
    others = [other for other in theirs if other.kind == network.kind]
    if len(some) <= 1 and len(others) == 1:
        return some
    same = [own for own in some if network.folder and own.folder == network.folder]
    if same or not some or (network.kind in _TEXT and network.folder):
        return same
    what, places = ("denoiser", sorted(f"'{each.prefix}'" for each in (some if len(some) > 1 else others)))
    what = {"vae": "autoencoder", "wan-vae": "autoencoder", "clip": "text encoder"}.get(network.kind, what)
    mine, base = ("its", "the base's") if len(some) > 1 else ("the base's", "its")
    raise PlanError(
        f"'{name}': {mine} {what} could be {base} {' or '.join(places)}; which is meant cannot be told",
        hint="name the folder of the one that is meant",
    )


_TEXT = ("clip", "t5")


def _change(network: Network, own: Network) -> str:
    """How the expert's network lies other than the base's, in words."""
    if network.single != own.single:
        mine, base = ("a single file's", "diffusers'") if network.single else ("diffusers'", "a single file's")
        return f"its layout is {mine}, the base's is {base}"
    front, other = network.prefix, own.prefix
    if front == other:
        return "some of its names are older or newer than the base's"
    if front and other:
        return f"its names are the base's with '{other}' in place of '{front}'"
    return f"its names are the base's {f'with {other!r} in front' if other else f'without {front!r}'}"


Segment = tuple[int, int, TensorInfo]  # first row, the row after the last, and what holds them


def _views(name: str, base: Tensors, expert: Tensors, network: Network, own: Network) -> dict[str, TensorInfo]:
    """By the base's names, the expert's tensors as the base has them."""
    theirs, ours = _segments(expert, network), _segments(base, own)
    views: dict[str, TensorInfo] = {}
    for key, each in own.pieces.items():
        pieces = sorted(each, key=lambda piece: piece.single_first if own.single else piece.diffusers_first)
        keys = [piece.diffusers.partition("/")[2] for piece in pieces]
        absent = [part for part in keys if part not in theirs]
        if len(absent) == len(keys):
            continue
        if absent:
            raise PlanError(
                f"'{name}': '{absent[0]}' is missing, and the base's '{key}' has its rows",
                hint="copy or download the expert again",
            )
        parts: list[TensorInfo] = []
        for part, piece in zip(keys, pieces, strict=True):
            first, last = _rows_of(base[key], piece)
            height, other = (side[part][-1][1] for side in (ours, theirs))
            if height != other:  # of another size: all of it, which its shape will tell
                first, last = 0, other
            parts += _between(theirs[part], first, last)
        views[key] = _fitted(key, base[key], [transposed(p) for p in parts] if pieces[0].transposed else parts)
    return views


def _refuse_unknown(name: str, lacks: list[TensorInfo], strangers: list[TensorInfo]) -> None:
    """Refuse tensors by names that the table lacks, where the base has such that nothing came for."""
    by_shape = {info.shape: info for info in strangers}
    pairs = [(info, by_shape[info.shape]) for info in lacks if info.shape in by_shape]
    if pairs:
        raise refusal(name, pairs)


def _rows_of(info: TensorInfo, piece: Piece) -> tuple[int, int]:
    """The first row of a piece and the one after its last, in diffusers' layout."""
    count = info.shape[-1 if piece.transposed else 0] if info.shape else 1
    return piece.diffusers_first, piece.diffusers_first + (count if piece.rows is None else piece.rows)


def _segments(tensors: Tensors, network: Network) -> dict[str, list[Segment]]:
    """By the name of a tensor in diffusers' layout, without its folder, what holds its rows, in their order."""
    segments: dict[str, list[Segment]] = defaultdict(list)
    for key, pieces in network.pieces.items():
        for piece in pieces:
            first, last = _rows_of(tensors[key], piece)
            start = piece.single_first if network.single else first
            part = tensors[key] if piece.rows is None else rows(tensors[key], start, start + last - first)
            whole = transposed(part) if piece.transposed and network.single else part
            segments[piece.diffusers.partition("/")[2]].append((first, last, whole))
    return {key: sorted(each, key=lambda segment: segment[0]) for key, each in segments.items()}


def _between(segments: list[Segment], first: int, last: int) -> list[TensorInfo]:
    """What holds the rows from `first` to `last`."""
    parts = []
    for start, stop, info in segments:
        if start < last and first < stop:
            whole = first <= start and stop <= last
            parts.append(info if whole else rows(info, max(first - start, 0), min(last, stop) - start))
    return parts


def _fitted(name: str, own: TensorInfo, parts: list[TensorInfo]) -> TensorInfo:
    """Parts one below the other as one tensor, in the base's shape where the two differ by axes of length one alone."""
    shape = parts[0].shape
    odd = next((part for part in parts if part.dtype != parts[0].dtype), None)
    if odd is not None:
        raise PlanError(
            f"{odd.file}: tensor '{odd.name}' is {odd.dtype}, and '{parts[0].name}' is {parts[0].dtype}; the base has "
            f"both as rows of '{name}'",
            hint="store both in one dtype",
        )
    if len(parts) > 1:
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    info = joined(name, shape, parts) if len(parts) > 1 else replace(parts[0], name=name)
    alike = [n for n in shape if n != 1] == [n for n in own.shape if n != 1] and math.prod(shape) == own.numel
    return reshaped(info, own.shape) if alike else info
