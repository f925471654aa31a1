"""Reading a checkpoint: all headers at once, tensors a piece at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict

from modelmerge import interrupts
from modelmerge.checkpoint import manifest_file
from modelmerge.checkpoint.adapter_config import CONFIG, WEIGHTS, Adapter, read_adapter
from modelmerge.checkpoint.adapter_config import PICKLED as PICKLED_ADAPTER
from modelmerge.checkpoint.components import (
    INDEX,
    INDEX_END,
    MODEL_CONFIG,
    PICKLED,
    PICKLED_INDEX,
    PICKLES,
    SINGLE,
    Component,
    Weights,
    find_weights,
    folders_of,
    named_folders,
)
from modelmerge.checkpoint.digest import FileDigest
from modelmerge.checkpoint.documents import read_json, shown
from modelmerge.checkpoint.header import Change, TensorInfo, foreign, read_header, read_metadata
from modelmerge.checkpoint.lora_keys import LORA_WEIGHTS, is_lora, lora_metadata
from modelmerge.checkpoint.pickled import gather, read_pickle
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import CheckpointError, ReferenceNotFound

if TYPE_CHECKING:
    from modelmerge.checkpoint.means import Means
    from modelmerge.checkpoint.sums import Sum
    from modelmerge.hub.ranges import Ranges

MANIFEST = "modelmerge.json"
VECTOR_KIND = "task-vector"  # what a task vector's manifest says it is
LEFT, RIGHT = ".left", ".right"  # ends of the names of a low-rank task vector's factors [m, r] and [r, n]
_MOST_ABSENT = 10_000  # tensors that an index may list and no shard holds, beside those that are there
_FOREIGN = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "HDF5", ".msgpack": "Flax msgpack", ".ot": "rust-bert"}


@dataclass(frozen=True, slots=True)
class VectorOf:
    """What a task vector is the difference to, and which tensors it leaves out because they did not change."""

    base: str
    base_sha256: tuple[str, ...] | None  # of the base's weight files, sorted; None where that was not recorded
    unchanged: frozenset[str]


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint's tensors by name, in file order, and the bytes behind them.

    Reads are thread-safe: every read names its own position.
    """

    reference: Reference
    tensors: dict[str, TensorInfo]
    files: dict[Path, os.stat_result]  # the weight files (and an adapter's config) as they were when they were opened
    directory: Path | None  # where config and tokenizer lie; None for a lone .safetensors file
    config: dict[str, Any]
    vector: VectorOf | None = None  # set where it tells what changed in a base, not a whole model
    remarks: tuple[str, ...] = ()  # what a person should know of how it was read, a clause each
    absent: frozenset[str] = frozenset()  # what its index lists and no shard holds
    adapter: Adapter | None = (
        None  # set for a PEFT adapter and a LoRA file; until `attach`, its tensors go by its own keys
    )
    excluded: frozenset[str] = frozenset()  # keys of an adapter that have no place in its base, and that globs exclude
    # Of tensors in another model's files, that model; of those that are made, what makes them.
    lenders: Mapping[Path, Checkpoint | Means] = field(default_factory=dict)
    components: Mapping[str, Component] = field(default_factory=lambda: {"": Component()})  # by folder
    hashes_along: bool = True  # its files' digests follow the reads; else whoever wants them has them read apart
    folders: tuple[str, ...] = ()  # all that it consists of, those without weights too; "" is the directory itself
    sum: Sum | None = None  # set for a model with an adapter on it: what both make
    _sources: dict[Path, FileDigest | Ranges] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The name the user knows it by."""
        return self.reference.name

    @property
    def streamed(self) -> bool:
        """Whether its tensors come over the network as things are."""
        if self.sum is not None:
            return any(part.streamed for part in self.sum.parts)
        remote = self.reference.repository
        return remote is not None and not all(map(remote.is_here, self.files))

    @property
    def parts(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that it is made of: itself, or a model and the adapters on it."""
        return (self,) if self.sum is None else (*self.sum.model.parts, self.sum.adapter)

    def part_of(self, file: Path) -> Checkpoint:
        """The part that one of its files belongs to."""
        return next((part for part in self.parts if file in part.files), self)

    def address(self, file: Path) -> str:
        """What a manifest calls one of its files."""
        return self.part_of(file).reference.address(file)

    def stored_dtype(self, info: TensorInfo) -> str:
        """What an output stores one of its tensors as: what is made of a model is stored as the model has it."""
        owner = self if info.file in self.files else self.lenders.get(info.file, self)
        made = owner.sum if isinstance(owner, Checkpoint) else None
        return info.dtype if made is None else made.stored_dtype(info)

    def has(self, tensor: str) -> bool:
        """Whether it says anything about a tensor: holds it, or as a task vector knows it to be zero."""
        return tensor in self.tensors or (self.vector is not None and tensor in self.vector.unchanged)

    def lost(self, tensor: str) -> bool:
        """Whether its index lists a tensor that no shard holds, by this name or by one with words in front."""
        return any(f".{tensor}".endswith(f".{name}") or name.endswith(f".{tensor}") for name in self.absent)

    def owner(self, tensor: str) -> Checkpoint:
        """The model whose tensor it is: itself, or another that lends it."""
        info = self.tensors.get(tensor)
        lender = self if info is None or info.file in self.files else self.lenders.get(info.file, self)
        return lender if isinstance(lender, Checkpoint) else self

    def stored_bytes(self, tensor: str) -> int:
        """Bytes that a tensor takes in its files."""
        return self.tensors[tensor].nbytes if tensor in self.tensors else 0

    def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview, *, follow: bool = True) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; with `follow`, the file's digest comes along.

        Raises:
            CheckpointError: The file ends before that, or cannot be read.
        """
        interrupts.check()
        follow = follow and self.hashes_along
        if tensor.blocks:
            self._read_blocks(tensor, offset, buffer, follow=follow)
            return
        source = self._open(tensor.file)
        if tensor.strides is not None:
            gather(source, tensor, offset, buffer)
            return
        position, done = tensor.start + offset, 0
        try:
            while done < len(buffer):
                count = source.read(buffer[done:], position + done, follow=follow)
                if not count:
                    raise CheckpointError(f"{tensor.file}: ended while tensor '{tensor.name}' was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' cannot be read: {error.strerror}") from error

    def _read_blocks(self, tensor: TensorInfo, offset: int, buffer: memoryview, *, follow: bool) -> None:
        for block in tensor.blocks:
            if offset < block.nbytes and len(buffer):
                count = min(block.nbytes - offset, len(buffer))
                self.read_into(block, offset, buffer[:count], follow=follow)
                buffer, offset = buffer[count:], 0
            else:
                offset -= min(block.nbytes, offset)

    def digests(self) -> dict[Path, str]:
        """The sha256 of every weight file; what reading has not passed yet is read now.

        Raises:
            CheckpointError: A file from the Hub is not what the Hub has.
        """
        return {file: self.digest(file) for file in self.files}

    def digest(self, file: Path) -> str:
        """The sha256 of one weight file, as `digests` has it."""
        if (part := self.part_of(file)) is not self:
            return part.digest(file)
        digest, remote = self._stored(file).finish(), self.reference.repository
        if remote is not None and digest != (remote.sha256(file) or digest):
            raise CheckpointError(
                f"{file}: not what the Hub has: its copy in the cache is damaged (the sha256 differs)",
                hint=f"remove {file.resolve()} and run the command again",
            )
        return digest

    def close(self) -> None:
        """Let go of the files."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()
        if self.sum is not None:
            self.sum.close()

    def look_again(self) -> None:
        """Take the files as they are now: some may have been fetched since the headers were read."""
        self.close()
        self.files.update({file: file.stat() for file in self.files})
        for part in self.parts if self.sum is not None else ():
            part.look_again()

    def _open(self, file: Path) -> FileDigest | Ranges | Means | Sum:
        if file in self.lenders and file not in self.files:
            return self.lenders[file]._open(file)
        if self.sum is not None:
            return self.sum if file == self.sum.file else self.sum.owner(file)._open(file)
        return self._stored(file)

    def _stored(self, file: Path) -> FileDigest | Ranges:
        with self._lock:
            if file not in self._sources:
                remote = self.reference.repository
                if remote is not None and not remote.is_here(file):
                    self._sources[file] = remote.ranges(file)
                else:
                    self._sources[file] = FileDigest(file, self.files[file])
            return self._sources[file]


def open_checkpoint(reference: Reference) -> Checkpoint:
    """The checkpoint behind a reference: every header read and checked, no tensor touched.

    Raises:
        ReferenceNotFound: The path holds no checkpoint, or a kind that cannot be read.
        CheckpointError: A file of it is malformed.
    """
    path = reference.path if reference.repository is None else reference.repository.outline(named_folders)
    if path.is_dir():
        return _open_directory(reference, path)
    if path.suffix in _FOREIGN:
        raise foreign(path, _FOREIGN[path.suffix])
    if path.name.endswith(INDEX_END):
        raise ReferenceNotFound(f"{path} is the index of shards", hint=f"name their folder: {path.parent}")
    tensors, remarks = read_file(path)
    if is_lora(path, tensors):
        return _lora_file(reference, path, tensors, remarks)
    component = Component(alone=True, metadata=_metadata(path))
    return Checkpoint(reference, tensors, {path: path.stat()}, None, {}, remarks=remarks, components={"": component})


def read_file(file: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """The tensors of a weight file, safetensors or pickled, and remarks on how it was read.

    Raises:
        ReferenceNotFound: It is a kind that cannot be read.
        CheckpointError: It is malformed, or a pickle that would run code.
    """
    return read_pickle(file) if file.suffix in PICKLES else (read_header(file), ())


def _open_directory(reference: Reference, directory: Path) -> Checkpoint:
    if (directory / CONFIG).exists():
        return _open_adapter(reference, directory)
    tensors: dict[str, TensorInfo] = {}
    remarks: tuple[str, ...] = ()
    absent: set[str] = set()
    files: dict[Path, os.stat_result] = {}
    components: dict[str, Component] = {}
    folders = folders_of(directory)
    for folder in folders:
        place = directory / folder
        weights = find_weights(place, known=bool(folder) or (directory / MANIFEST).exists())
        if weights is None:
            continue
        content, notes, gone = _read_weights(place, weights)
        # Without a config it is what a lone file is, as a merge of lone files writes it.
        alone = weights.alone or not ((place / "config.json").exists() or (place / weights.index).exists())
        metadata = _metadata(place / weights.single) if alone else {}
        component = Component(folder, *weights.component_names, _read_config(place), alone, metadata)
        if is_lora(place, content):
            raise ReferenceNotFound(f"{place} holds the factors of a LoRA, no weights", hint="name the file itself")
        read = dict.fromkeys(tensor.file for tensor in content.values()) or (place / weights.single,)
        files |= {file: file.stat() for file in read}
        if weights.variant is not None:
            notes += (f"it has no weights but those of the variant {weights.variant}, which are read",)
        remarks += tuple(f"{component.prefix}: {note}" if folder else note for note in notes)
        tensors |= with_prefix(component.prefix, content)
        absent |= {f"{component.prefix}{name}" for name in gone}
        components[folder] = component
    if not components and (directory / LORA_WEIGHTS).exists():
        return _lora_file(reference, directory / LORA_WEIGHTS, *read_file(directory / LORA_WEIGHTS))
    if not components:
        raise _no_weights(directory)
    vector = _read_vector(directory)
    if vector is not None:
        tensors = _joined(tensors)
    config = dict(components[""].config) if "" in components else _read_config(directory)
    return Checkpoint(
        reference, tensors, files, directory, config, vector, remarks, frozenset(absent), components=components,
        folders=tuple(folders),
    )  # fmt: skip


def _metadata(file: Path) -> dict[str, str]:
    return {} if file.suffix in PICKLES else read_metadata(file)


def with_prefix(prefix: str, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """A component's tensors by the names that they have in the whole."""
    if not prefix:
        return dict(tensors)
    return {f"{prefix}{name}": replace(info, name=f"{prefix}{info.name}") for name, info in tensors.items()}


Read = tuple[dict[str, TensorInfo], tuple[str, ...], frozenset[str]]  # tensors, remarks, and what is absent


def _read_weights(directory: Path, weights: Weights) -> Read:
    single, index = directory / weights.single, directory / weights.index
    weight_map = _read_index(index) if index.exists() else None
    if weight_map and single.exists() and set(weight_map.values()) != {single.name}:
        raise CheckpointError(
            f"{directory} holds both {single.name} and {index.name}: loaders take the first and ignore the shards",
            hint="remove the one that is stale, or name the file itself",
        )
    return _read_shards(directory, weight_map, index.name) if weight_map else (*read_file(single), frozenset())


def _open_adapter(reference: Reference, directory: Path) -> Checkpoint:
    config = directory / CONFIG
    adapter = read_adapter(config)
    weights = next((directory / name for name in (WEIGHTS, PICKLED_ADAPTER) if (directory / name).exists()), None)
    if weights is None:
        raise ReferenceNotFound(
            f"{directory} has {CONFIG}, but neither {WEIGHTS} nor {PICKLED_ADAPTER}",
            hint="copy or download the adapter again",
        )
    tensors, remarks = read_file(weights)
    remarks += adapter.remarks
    full = [name for name in (SINGLE, INDEX, PICKLED, PICKLED_INDEX) if (directory / name).exists()]
    if full:
        remarks += (f"{full[0]} lies beside the adapter and is not read: the adapter is taken",)
    files = {file: file.stat() for file in (weights, config)}
    return Checkpoint(reference, tensors, files, directory, {}, remarks=remarks, adapter=adapter)


def _lora_file(
    reference: Reference, file: Path, tensors: dict[str, TensorInfo], remarks: tuple[str, ...]
) -> Checkpoint:
    adapter = Adapter(file, "", lora_metadata(_metadata(file)), lone=True)
    return Checkpoint(reference, tensors, {file: file.stat()}, None, {}, remarks=remarks, adapter=adapter)


def _read_vector(directory: Path) -> VectorOf | None:
    file = directory / MANIFEST
    if not file.exists():
        return None
    if read_json(file, dict[str, Any]).get("kind") != VECTOR_KIND:
        return None
    manifest = read_json(file, manifest_file.Vector)
    base = manifest["inputs"]["base"]
    digests = sorted(entry["sha256"] for entry in base["files"].values())
    return VectorOf(base["name"], tuple(digests), frozenset(manifest["unchanged"]))


def _joined(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a task vector, each pair of factors as the one tensor that is their product."""
    products = {n: replace(info, change=Change()) for n, info in tensors.items() if not n.endswith((LEFT, RIGHT))}
    for name, left in tensors.items():
        if name.endswith(LEFT):
            whole = name.removesuffix(LEFT)
            right = tensors.get(whole + RIGHT)
            if right is None or len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
                raise CheckpointError(f"{left.file}: tensor '{name}' has no matching factor '{whole + RIGHT}'")
            shape, nbytes = (left.shape[0], right.shape[1]), left.nbytes + right.nbytes
            change = Change(factors=(left, right))
            products[whole] = TensorInfo(whole, left.dtype, shape, left.file, left.start, nbytes, change=change)
    return products


class _Index(TypedDict):
    weight_map: dict[str, str]


def _read_index(index: Path) -> dict[str, str]:
    weight_map: dict[str, str] = read_json(index, _Index)["weight_map"]
    if not weight_map:
        raise CheckpointError(f"{index}: malformed: its weight_map is empty")
    for file, name in {file: name for name, file in weight_map.items()}.items():
        # Lexically: the Hub's cache is made of symlinks that do leave the directory, and may.
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or not file:
            raise CheckpointError(f"{index}: tensor {shown(name)} points outside the directory: {shown(file)}")
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str], index: str) -> Read:
    """The tensors of all shards, as loaders read them: an index that is wrong about some is remarked upon."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not os.path.isfile(directory / shard)]
    if missing:
        raise CheckpointError(
            f"{directory}: missing {len(missing)} of {len(shards)} shards that {index} names: {', '.join(missing[:20])}"
            + ", ..." * (len(missing) > 20),
            hint="copy or download them again",
        )
    tensors: dict[str, TensorInfo] = {}
    remarks: tuple[str, ...] = ()
    for shard in shards:
        content, notes = read_file(directory / shard)
        remarks += notes
        for name, tensor in content.items():
            if name in tensors:
                raise CheckpointError(
                    f"{directory / shard}: holds tensor '{name}', and so does {tensors[name].file.name}",
                    hint="which is meant cannot be told: remove the one that is stale",
                )
            tensors[name] = tensor
    elsewhere = [name for name, tensor in tensors.items() if tensor.file != directory / weight_map.get(name, "")]
    absent = [name for name in weight_map if name not in tensors]
    if elsewhere:
        remarks += (f"{index} does not list {_some(elsewhere)} where it lies; all shards are read, as by loaders",)
    if len(absent) > _MOST_ABSENT + len(tensors):
        raise CheckpointError(f"{directory / index}: lists {len(absent):,} tensors that no shard holds")
    if absent:
        remarks += (f"{index} lists {_some(absent)}, which no shard holds",)
    return tensors, remarks, frozenset(absent)


def _some(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else "")


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / MODEL_CONFIG
    config = read_json(file) if file.exists() else None
    return config if isinstance(config, dict) else {}


def _no_weights(directory: Path) -> ReferenceNotFound:
    files = sorted(p for p in directory.iterdir() if p.is_file())
    other = next((p for p in files if p.suffix in _FOREIGN), None)
    loose = [p.name for p in files if p.suffix == ".safetensors"] or [p.name for p in files if p.suffix in PICKLES]
    if loose:
        hint = f"it holds {', '.join(loose[:4])}: name one file, or restore the index if they are shards"
        return ReferenceNotFound(f"{directory} has neither {SINGLE} nor {INDEX} nor {PICKLED}", hint=hint)
    if other:
        return foreign(other, _FOREIGN[other.suffix])
    return ReferenceNotFound(
        f"{directory} holds no checkpoint: neither {SINGLE} nor {INDEX} nor {PICKLED}",
        hint="name a directory that holds one",
    )
