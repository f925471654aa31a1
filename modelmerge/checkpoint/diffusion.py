"""Models of images in their two layouts: the single file of the original's program, and diffusers' folders.

`diffusion.json` says, network by network, what a tensor is called in either. In its names `#` is a number, `*` any
words, `$` the number of the last block, and `~` a number that counts from the other end; what follows a name, such as
`.weight`, is carried over. Several names against one are its rows, one below the other; "swapped" are its two halves,
and "transposed" its axes. Where several rows of the table have one name, the first is the one in use today. The numbers
of blocks that are counted otherwise in the two layouts are reckoned from the names that are there, so that small models
are read as large ones are. A test compares all of it with diffusers' (0.42) own converters.

Denoisers: Stable Diffusion 1, 2 and XL, 3 and 3.5, FLUX.1, Wan 2 and Qwen-Image. Autoencoders: of all of these (Wan's
that of 2.1). Text encoders: those that lie in single files: CLIP's, OpenCLIP's and T5.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.header import TensorInfo

_TABLE = Path(__file__).with_name("diffusion.json")
_WILD = re.compile(r"[*#$~]")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor in one layout that are rows of a tensor in the other.

    Args:
        single: The name in a single file, with the usual words in front: `model.diffusion_model.out.2.weight`.
        diffusers: The name in diffusers' layout with its folder: `unet/conv_out.weight`.
        single_first: The first row in the one.
        diffusers_first: The first row in the other.
        rows: How many rows; None for all that both have.
        transposed: The one is the other's transpose.
    """

    single: str
    diffusers: str
    single_first: int = 0
    diffusers_first: int = 0
    rows: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a model of images.

    Args:
        kind: What it is: `unet`, `flux`, `sd3`, `wan`, `qwen-image`; `vae`, `wan-vae`; `clip`, `t5`.
        single: Whether it lies as in a single file.
        folder: Its folder in a pipeline of diffusers; empty where the model does not say.
        prefix: What stands in front of its names in this model.
        pieces: By the name in this model of each tensor of it, with the prefix, its pieces.
    """

    kind: str
    single: bool
    folder: str
    prefix: str
    pieces: Mapping[str, tuple[Piece, ...]]


def networks(tensors: Mapping[str, TensorInfo]) -> tuple[Network, ...]:
    """The networks of a model that the table knows; none where it is no model of images."""
    folders = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
    places = [place for folder in folders for table in _tables() for place in table.places(folder, tensors)]
    networks: list[Network] = []
    taken: set[str] = set()
    for table, single, folder, prefix in sorted(places, key=lambda place: -len(place[3])):
        names = [name for name in tensors if name.startswith(prefix) and name not in taken]
        pieces = table.pieces([n for n in names if "/" not in n[len(prefix) :]], tensors, single, folder, prefix)
        taken |= pieces.keys()
        networks.append(Network(table.kind, single, folder, prefix, pieces))
    return tuple(networks)


Place = tuple["_Table", bool, str, str]  # a table, whether it is a single file's side, the folder and the prefix


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the table with its wildcards filled in: a name in a single file, and those in diffusers' layout."""

    single: str
    diffusers: tuple[str, ...]
    part: int  # which of these it was found by
    how: str


class _Table:
    """What the table says of one network."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.kind: str = entry["kind"]
        self._signs: dict[str, list[str]] = entry["signs"]
        self._folders: dict[str, str] = entry["single"]  # by what stands in front of the names
        self._number = _NUMBERINGS.get(entry.get("numbering", ""), _in_order)
        self._parts: dict[str, list[str]] = {}  # by a name in single files, the names of today in diffusers' layout
        self._rules: dict[bool, list[tuple[str, str, str, int, str]]] = {True: [], False: []}
        for single, diffusers, *how in entry["names"]:
            parts = diffusers if isinstance(diffusers, list) else [diffusers]
            self._parts.setdefault(single, parts)
            for side, names in ((True, [single]), (False, parts)):
                for part, name in enumerate(names):
                    word = max(_WILD.split(name), key=len)
                    self._rules[side].append((word, name, single, part, "".join(how)))

    def places(self, folder: str, tensors: Mapping[str, TensorInfo]) -> Iterator[Place]:
        """Where in a folder of a model such a network lies: in diffusers' layout, or behind one of the prefixes."""
        front = f"{folder}/" if folder else ""
        several = len(set(self._folders.values())) > 1  # text encoders, each of which has its own prefix
        for words, name in self._folders.items():
            if self._is_at(f"{front}{words}", "single", tensors):
                yield self, True, folder or (name if several else ""), f"{front}{words}"
                if not several:
                    return
        if self._is_at(front, "diffusers", tensors):
            yield self, False, folder, front

    def _is_at(self, prefix: str, side: str, tensors: Mapping[str, TensorInfo]) -> bool:
        return side in self._signs and all(f"{prefix}{sign}" in tensors for sign in self._signs[side])

    def pieces(
        self, names: Iterable[str], tensors: Mapping[str, TensorInfo], single: bool, folder: str, prefix: str
    ) -> dict[str, tuple[Piece, ...]]:
        """The pieces of the tensors of these names that the table knows."""
        usual = next(iter(self._folders.values()))
        front = next((p for p, name in self._folders.items() if name == (folder or usual)), next(iter(self._folders)))
        own = [name.removeprefix(prefix) for name in names]
        blocks = self._number(own, single)
        there, back = dict(blocks), {other: one for one, other in blocks}
        pieces: dict[str, tuple[Piece, ...]] = {}
        for name in own:
            line = self._line(_moved(name, there) if single else name, own, single)
            heights = _heights(line, name, tensors, single, prefix) if line is not None else None
            if line is not None and heights is not None:
                sole = front + _moved(line.single, back)
                each = [f"{folder or usual}/{other}" for other in line.diffusers]
                pieces[prefix + name] = tuple(_pieces(sole, each, heights, None if single else line.part, line.how))
        return pieces

    def _line(self, name: str, names: list[str], single: bool) -> _Line | None:
        for word, template, sole, part, how in self._rules[single]:
            match = _pattern(template).fullmatch(name) if word in name else None
            if match is None:
                continue
            *here, tail = match.groups()
            there, kinds = list(here), _WILD.findall(template)
            if "$" in kinds or "~" in kinds:
                place = next(i for i, kind in enumerate(kinds) if kind in "$~")
                last = _count(names, _WILD.split(template)[0]) - 1
                if kinds[place] == "$" and int(here[place]) != last:
                    continue
                if kinds[place] == "~":
                    there[place] = str(last - int(here[place]))
            values, others = (here, there) if single else (there, here)
            parts = tuple(_put(each, others, tail) for each in self._parts[sole])
            return _Line(_put(sole, values, tail), parts, part, how)
        return None


def _pieces(single: str, diffusers: list[str], heights: list[int], part: int | None, how: str) -> Iterator[Piece]:
    """The pieces of a tensor in a single file, or of one `part` of it in diffusers' layout."""
    if how == "swapped":
        (height,) = heights
        yield Piece(single, diffusers[0], 0, height // 2, height // 2)
        yield Piece(single, diffusers[0], height // 2, 0, height // 2)
    elif len(diffusers) == 1:
        yield Piece(single, diffusers[0], transposed=how == "transposed")
    else:
        for number, (name, height) in enumerate(zip(diffusers, heights, strict=True)):
            if part is None or part == number:
                yield Piece(single, name, sum(heights[:number]), 0, height)


def _heights(line: _Line, name: str, tensors: Mapping[str, TensorInfo], single: bool, prefix: str) -> list[int] | None:
    """The number of rows of each part in diffusers' layout; None where the shapes do not tell."""
    shape = tensors[prefix + name].shape
    if len(line.diffusers) == 1:
        return list(shape[:1])
    if not single:
        return [tensors.get(prefix + other, tensors[prefix + name]).shape[0] for other in line.diffusers]
    weight = tensors.get(prefix + re.sub("bias$", "weight", name))
    if weight is None:
        return None
    width, count = weight.shape[-1], len(line.diffusers)  # what is projected is as wide as what it is projected to
    rest = shape[0] - width * (count - 1)
    return [width] * (count - 1) + [rest] if rest > 0 else None


@functools.cache
def _tables() -> tuple[_Table, ...]:
    return tuple(map(_Table, json.loads(_TABLE.read_bytes())))


@functools.cache  # when it is asked for: to compile all of the table takes as long as to plan a merge
def _pattern(name: str) -> re.Pattern[str]:
    """What names are of a line of the table; its last group is what follows."""
    parts = ["" if part is None else re.escape(part) for part in re.split(r"([*#$~])", name)]
    return re.compile("".join(_GROUPS.get(part, part) for part in parts) + r"((?:\..+)?)")


_GROUPS = {r"\*": "(.+)", r"\#": r"(\d+)", r"\$": r"(\d+)", r"\~": r"(\d+)", "~": r"(\d+)"}


def _put(name: str, values: list[str], tail: str) -> str:
    """A name of the table with its wildcards filled in."""
    rest = iter(values)
    return _WILD.sub(lambda _: next(rest), name) + tail


def _count(names: Iterable[str], front: str) -> int:
    """How many numbered things there are behind these words."""
    numbers = (name[len(front) :].partition(".")[0] for name in names if name.startswith(front))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


# --- blocks that the two layouts count otherwise ---

Blocks = list[tuple[str, str]]  # what blocks are called in a single file and in diffusers' layout


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    """A name with the name of its block, if it has one, exchanged."""
    words = name.split(".")
    for count in range(len(words), 1, -1):
        front = ".".join(words[:count])
        if front in blocks:
            return blocks[front] + name[len(front) :]
    return name


def _in_order(names: list[str], single: bool) -> Blocks:
    return []


def _unet(names: list[str], single: bool) -> Blocks:
    """A UNet's: levels of resnets, each with its attention, and between levels one that changes the size.

    A single file numbers the blocks through all levels.
    """
    if single:
        count = _count(names, "input_blocks.")
        ends = [number for number in range(1, count) if f"input_blocks.{number}.0.op.weight" in names]
        depth = (ends[0] if ends else count) - 1
        levels = -(-(count - 1) // (depth + 1))
    else:
        depth, levels = _count(names, "down_blocks.0.resnets."), _count(names, "down_blocks.")
    blocks = [
        ("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"),
        ("middle_block.2", "mid_block.resnets.1"),
    ]  # fmt: skip
    for level in range(levels):
        start = level * (depth + 1)
        for i in range(depth):
            blocks.append((f"input_blocks.{start + 1 + i}.0", f"down_blocks.{level}.resnets.{i}"))
            blocks.append((f"input_blocks.{start + 1 + i}.1", f"down_blocks.{level}.attentions.{i}"))
        blocks.append((f"input_blocks.{start + 1 + depth}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
        for i in range(depth + 1):
            blocks.append((f"output_blocks.{start + i}.0", f"up_blocks.{level}.resnets.{i}"))
            blocks.append((f"output_blocks.{start + i}.1", f"up_blocks.{level}.attentions.{i}"))
        # What makes the picture larger stands behind the attention, where there is one.
        attends = any(name.startswith(f"up_blocks.{level}.attentions.") for name in names)
        for place in (1, 2) if single else (1 + attends,):
            blocks.append((f"output_blocks.{start + depth}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
    return blocks


def _wan_vae(names: list[str], single: bool) -> Blocks:
    """The decoder of Wan's autoencoder: its levels, whose blocks a single file numbers through."""
    if single:
        count = _count(names, "decoder.upsamples.")
        ends = [i for i in range(count) if f"decoder.upsamples.{i}.resample.1.weight" in names]
        depth = ends[0] if ends else count
        levels = -(-count // (depth + 1))
    else:
        depth, levels = _count(names, "decoder.up_blocks.0.resnets."), _count(names, "decoder.up_blocks.")
    blocks = []
    for level in range(levels):
        fronts = [f"resnets.{i}" for i in range(depth)] + ["upsamplers.0"]
        for i, front in enumerate(fronts):
            blocks.append((f"decoder.upsamples.{level * (depth + 1) + i}", f"decoder.up_blocks.{level}.{front}"))
    return blocks


_NUMBERINGS = {"unet": _unet, "wan-vae": _wan_vae}
