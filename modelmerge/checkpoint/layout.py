"""Where every tensor of the output will lie, byte for byte, before the first is computed.

Because all offsets are known, shards are made at their full size at once and blocks are written in place, in any
order and from any thread, with nothing gathered in memory.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from modelmerge.checkpoint.components import Component, folder_of
from modelmerge.checkpoint.header import DTYPE_BITS

SHARD_BYTES = 5_000_000_000  # of tensors in a file, where nothing else is said
_PLAIN = Component()
Entry = tuple[str, tuple[int, ...], int]  # dtype, shape, bytes
Kind = TypeVar("Kind")


class Inside(NamedTuple):
    """Of a tensor's bytes, in their order: what is written one by one, with its bytes, and what the file has there."""

    written: Mapping[str, int]
    stored: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its header's bytes and where each tensor starts."""

    filename: str
    header: bytes  # with its length in front, as it stands in the file
    tensors: dict[str, int]  # key -> first byte in the file, in file order
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The output's weight files and, where a checkpoint has several, their index.

    Tensors go by keys: their names, with the checkpoint's folder in front where there is one.
    """

    shards: tuple[Shard, ...]
    indices: dict[str, bytes]  # file name -> content
    shard_of: dict[str, Shard]  # key -> its shard


def lay_out_model(
    entries: Mapping[str, Entry],
    components: Mapping[str, Component],
    max_shard_size: int | None,
    *,
    parts: Mapping[str, Inside] | None = None,
    folder: str = "",
) -> Layout:
    """Files of every component in its folder, named and split as its library does.

    Args:
        entries: As for `lay_out`, by the names that tensors have in the whole.
        components: By folder.
        max_shard_size: As for `lay_out`.
        parts: As for `lay_out`.
        folder: As for `lay_out`.
    """
    contents: dict[str, dict[str, Entry]] = {place: {} for place in components}
    for name, entry in entries.items():
        contents[folder_of(name, components)][name] = entry
    layouts = []
    for place, component in components.items():
        front = component.prefix
        inner = {
            name.removeprefix(front): Inside(_behind(front, inside.written), _behind(front, inside.stored))
            for name, inside in (parts or {}).items()
            if name in contents[place]
        }
        content = _behind(front, contents[place])
        layouts.append(lay_out(
            content, max_shard_size, parts=inner, folder=f"{folder}{front}", component=component
        ))  # fmt: skip
    return together(layouts)


def _behind(front: str, names: Mapping[str, Kind]) -> dict[str, Kind]:
    return {name.removeprefix(front): each for name, each in names.items()}


def lay_out(
    entries: Mapping[str, Entry],
    max_shard_size: int | None,
    *,
    parts: Mapping[str, Inside] | None = None,
    folder: str = "",
    component: Component = _PLAIN,
) -> Layout:
    """Files of at most `max_shard_size` bytes of tensors, named and split as the model's library does.

    Args:
        entries: Name to dtype, shape and bytes, in the order they shall have.
        max_shard_size: In bytes; None for the usual one, and one file where programs take no shards.
        parts: By tensor, what is inside, where it is not written or not stored as one.
        folder: Where in the output the checkpoint goes; ends in a slash, or is empty for the output itself.
        component: How its files are called.
    """
    usual = sys.maxsize if component.alone else SHARD_BYTES
    stem, dot, end = component.filename.rpartition(".")
    contents = _split(entries, usual if max_shard_size is None else max_shard_size)
    ends = [""] if len(contents) == 1 else [f"-{i:05d}-of-{len(contents):05d}" for i in range(1, len(contents) + 1)]
    files = {f"{stem}{number}{dot}{end}": names for number, names in zip(ends, contents, strict=True)}
    shards = tuple(
        _shard(folder, filename, {name: entries[name] for name in names}, parts or {}, component.metadata)
        for filename, names in files.items()
    )
    shard_of = {key: shard for shard in shards for key in shard.tensors}
    indices = {}
    if len(files) > 1:
        metadata = {"total_size": sum(nbytes for _, _, nbytes in entries.values())}
        stored = {name: list(inside.stored) for name, inside in (parts or {}).items()}
        weight_map = {
            each: file for file, names in files.items() for name in names for each in stored.get(name, [name])
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        indices[f"{folder}{component.index}"] = (json.dumps(index, indent=2) + "\n").encode()
    return Layout(shards, indices, shard_of)


def _split(entries: Mapping[str, Entry], most: int) -> list[list[str]]:
    """The tensors of each file, as the model's library splits them: one that is larger has a file of its own."""
    files: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, (_, _, nbytes) in entries.items():
        if nbytes > most:
            files.append([name])
            continue
        if size + nbytes > most:
            files.append(current)
            current, size = [], 0
        current.append(name)
        size += nbytes
    return [*files, current] if current or not files else files


def together(layouts: Iterable[Layout]) -> Layout:
    """One layout of several checkpoints in folders of their own."""
    parts = tuple(layouts)
    return Layout(
        tuple(shard for part in parts for shard in part.shards),
        {name: content for part in parts for name, content in part.indices.items()},
        {key: shard for part in parts for key, shard in part.shard_of.items()},
    )


def _shard(
    folder: str, filename: str, entries: Mapping[str, Entry], parts: Mapping[str, Inside], metadata: Mapping[str, str]
) -> Shard:
    # Widest dtype first, so that every tensor starts at a multiple of its item size, as readers that map files need.
    names = sorted(entries, key=lambda name: -DTYPE_BITS[entries[name][0]])
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position, relative = 0, {}
    for name in names:
        inside, place = parts.get(name) or Inside({name: entries[name][2]}, {name: entries[name]}), position
        for part, size in inside.written.items():
            relative[part] = position
            position += size
        for each, (dtype, shape, nbytes) in inside.stored.items():
            header[each] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + nbytes]}
            place += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    tensors = {f"{folder}{name}": len(prefix) + start for name, start in relative.items()}
    return Shard(f"{folder}{filename}", prefix, tensors, len(prefix) + position)
