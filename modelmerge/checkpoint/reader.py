"""Reading a checkpoint: all headers at once, tensors a piece at a time."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from modelmerge.checkpoint.digest import FileDigest
from modelmerge.checkpoint.header import TensorInfo, read_header
from modelmerge.checkpoint.hub import Ranges
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import CheckpointError, ReferenceNotFound

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "modelmerge.json"
VECTOR_KIND = "task-vector"  # what a task vector's manifest says it is
LEFT, RIGHT = ".left", ".right"  # ends of the names of a low-rank task vector's factors [m, r] and [r, n]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "HDF5", ".msgpack": "Flax msgpack", ".ot": "rust-bert"}


@dataclass(frozen=True, slots=True)
class VectorOf:
    """What a task vector is the difference to, and which tensors it leaves out because they did not change."""

    base: str
    base_sha256: tuple[str, ...]  # of the base's weight files, sorted
    unchanged: frozenset[str]


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint's tensors by name, in file order, and the bytes behind them.

    Reads are thread-safe: every read names its own position.
    """

    reference: Reference
    tensors: dict[str, TensorInfo]
    files: dict[Path, os.stat_result]  # the weight files, as they were when their headers were read
    directory: Path | None  # where config and tokenizer lie; None for a lone .safetensors file
    config: dict[str, Any]
    vector: VectorOf | None = None  # set where the tensors are differences to a base, not weights
    _sources: dict[Path, FileDigest | Ranges] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The name the user knows it by."""
        return self.reference.name

    @property
    def streamed(self) -> bool:
        """Whether its tensors come over the network as things are."""
        remote = self.reference.repository
        return remote is not None and any(map(remote.is_outlined, self.files))

    def has(self, tensor: str) -> bool:
        """Whether it says anything about a tensor: holds it, or as a task vector knows it to be zero."""
        return tensor in self.tensors or (self.vector is not None and tensor in self.vector.unchanged)

    def stored_bytes(self, tensor: str) -> int:
        """Bytes that a tensor takes in its files."""
        return self.tensors[tensor].nbytes if tensor in self.tensors else 0

    def read_into(self, tensor: TensorInfo, offset: int, buffer: memoryview, *, follow: bool = True) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; with `follow`, the file's digest comes along.

        Raises:
            CheckpointError: The file ends before that, or cannot be read.
        """
        source = self._open(tensor.file)
        position, done = tensor.start + offset, 0
        try:
            while done < len(buffer):
                got = source.read(buffer[done:], position + done, follow=follow)
                if not got:
                    raise CheckpointError(f"{tensor.file}: ended while tensor '{tensor.name}' was read")
                done += got
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: tensor '{tensor.name}' cannot be read: {error.strerror}") from error

    def digests(self) -> dict[Path, str]:
        """The sha256 of every weight file; what reading has not passed yet is read now.

        Raises:
            CheckpointError: A file from the Hub is not what the Hub has.
        """
        return {file: self._digest(file) for file in self.files}

    def close(self) -> None:
        """Let go of the files."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    def _open(self, file: Path) -> FileDigest | Ranges:
        with self._lock:
            if file not in self._sources:
                remote = self.reference.repository
                if remote is not None and remote.is_outlined(file):
                    self._sources[file] = remote.ranges(file)
                else:
                    self._sources[file] = FileDigest(file, self.files[file])
            return self._sources[file]

    def _digest(self, file: Path) -> str:
        remote = self.reference.repository
        promised = remote.sha256(file) if remote else None
        if promised and remote and remote.is_outlined(file):
            return promised
        found = self._open(file).finish()
        if promised and found != promised:
            raise CheckpointError(
                f"{file}: not what the Hub has: its copy in the cache is damaged (the sha256 differs)",
                hint=f"remove {file.resolve()} and run the command again",
            )
        return found


def open_checkpoint(reference: Reference) -> Checkpoint:
    """The checkpoint behind a reference: every header read and checked, no tensor touched.

    Raises:
        ReferenceNotFound: The path holds no checkpoint, or a kind that cannot be read.
        CheckpointError: A file of it is malformed.
    """
    path = reference.path if reference.repository is None else reference.repository.outline()
    if path.is_dir():
        return _open_directory(reference, path)
    if path.suffix in _PICKLES:
        raise _pickle(path)
    if path.suffix in _FOREIGN:
        raise _foreign(path)
    tensors = read_header(path)
    return Checkpoint(reference, tensors, {path: path.stat()}, None, {})


def _open_directory(reference: Reference, directory: Path) -> Checkpoint:
    single, index = directory / SINGLE, directory / INDEX
    if (directory / "adapter_config.json").exists():
        raise ReferenceNotFound(
            f"{directory} is a PEFT adapter, and adapters cannot be read yet",
            hint="merge it into its base first: PeftModel.merge_and_unload() and save_pretrained()",
        )
    weight_map = _read_index(index) if index.exists() else None
    if weight_map and single.exists() and set(weight_map.values()) != {SINGLE}:
        raise CheckpointError(
            f"{directory} holds both {SINGLE} and {INDEX}: loaders take the first and ignore the shards",
            hint="remove the one that is stale, or name the file itself",
        )
    if weight_map:
        tensors = _read_shards(directory, weight_map)
    elif single.exists():
        tensors = read_header(single)
    else:
        raise _no_weights(directory)
    files = {file: file.stat() for file in dict.fromkeys(tensor.file for tensor in tensors.values()) or (single,)}
    vector = _read_vector(directory)
    if vector is not None:
        tensors = _joined(tensors)
    return Checkpoint(reference, tensors, files, directory, _read_config(directory), vector)


def _read_vector(directory: Path) -> VectorOf | None:
    file = directory / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_bytes())
        if manifest.get("kind") != VECTOR_KIND:
            return None
        base = manifest["inputs"]["base"]
        digests = sorted(entry["sha256"] for entry in base["files"].values())
        return VectorOf(str(base["name"]), tuple(digests), frozenset(manifest["unchanged"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: malformed: it does not say what its task vector belongs to") from error


def _joined(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a task vector, each pair of factors as the one tensor that is their product."""
    joined = {name: info for name, info in tensors.items() if not name.endswith((LEFT, RIGHT))}
    for name, left in tensors.items():
        if name.endswith(LEFT):
            whole = name.removesuffix(LEFT)
            right = tensors.get(whole + RIGHT)
            if right is None or len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
                raise CheckpointError(f"{left.file}: tensor '{name}' has no matching factor '{whole + RIGHT}'")
            shape, nbytes = (left.shape[0], right.shape[1]), left.nbytes + right.nbytes
            joined[whole] = TensorInfo(whole, left.dtype, shape, left.file, left.start, nbytes, (left, right))
    return joined


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())
        ):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index}: malformed: it has no 'weight_map' of tensor names to file names") from error
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from error
    for name, file in weight_map.items():
        # Lexically: the Hub's cache is made of symlinks that do leave the directory, and may.
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file or not file:
            raise CheckpointError(f"{index}: tensor '{name}' points outside the directory: '{file}'")
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: missing {len(missing)} of {len(shards)} shards that {INDEX} names: {', '.join(missing)}",
            hint="copy or download them again",
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in read_header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{directory / shard}: holds tensor '{name}', which {INDEX} does not place there")
            tensors[name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{directory / weight_map[lost[0]]}: lacks tensor '{lost[0]}', which {INDEX} places there"
        )
    return tensors


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _no_weights(directory: Path) -> ReferenceNotFound:
    found = sorted(p for p in directory.iterdir() if p.is_file())
    pickle = next((p for p in found if p.suffix in _PICKLES or p.name.endswith(".bin.index.json")), None)
    foreign = next((p for p in found if p.suffix in _FOREIGN), None)
    loose = [p.name for p in found if p.suffix == ".safetensors"]
    if loose:
        hint = f"it holds {', '.join(loose[:4])}: name one file, or restore {INDEX} if they are shards"
        return ReferenceNotFound(f"{directory} has neither {SINGLE} nor {INDEX}", hint=hint)
    if pickle:
        return _pickle(pickle)
    if foreign:
        return _foreign(foreign)
    return ReferenceNotFound(
        f"{directory} holds no checkpoint: neither {SINGLE} nor {INDEX}", hint="name a directory that holds one"
    )


def _pickle(path: Path) -> ReferenceNotFound:
    return ReferenceNotFound(
        f"{path} is a PyTorch pickle, and pickles cannot be read yet",
        hint="save the model as safetensors first: save_pretrained(..., safe_serialization=True)",
    )


def _foreign(path: Path) -> ReferenceNotFound:
    return ReferenceNotFound(
        f"{path} is {_FOREIGN[path.suffix]}, which cannot be merged", hint="use the model's safetensors weights"
    )
