"""What a model consists of: the components that its folder names, and what the weights of each are called.

sentence-transformers names the folders of its modules in `modules.json`, and those of a router's in
`router_config.json`; diffusers those of a pipeline in `model_index.json`. Weights go by the names that the libraries
give them: `model*` and `pytorch_model*` (transformers, sentence-transformers), `diffusion_pytorch_model*` (diffusers),
each with a variant in the middle or without (`model.fp16.safetensors`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from modelmerge.checkpoint.documents import read_bytes, read_json, shown
from modelmerge.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # what a checkpoint is called that has no safetensors weights
PICKLED_INDEX = "pytorch_model.bin.index.json"
INDEX_END = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MODEL_CONFIG = "config.json"
CLASS = "_class_name"  # an entry of the configs that diffusers writes
MODULES, PIPELINE = "modules.json", "model_index.json"
_ROUTER = "router_config.json"
_DEEPEST = 4  # folders of modules in folders of modules
_OURS, _DIFFUSERS = ("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")


@dataclass(frozen=True, slots=True)
class Component:
    """A folder of a model and the names of its weights, as its library writes them.

    `folder` is empty for the model's own. `filename` is what the weights are called as one file, `index` what their
    index is called where they are several. `alone`: a file of its own name, which programs load by that name: they take
    no shards. `metadata` is what such a file says of itself.
    """

    folder: str = ""
    filename: str = SINGLE
    index: str = INDEX
    config: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What stands before the names of its tensors."""
        return f"{self.folder}/" if self.folder else ""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a folder: one, or those that an index names; one of the two names may lead nowhere."""

    single: str
    index: str
    variant: str | None = None
    alone: bool = False

    @property
    def component_names(self) -> tuple[str, str]:
        """What one file and an index are called in safetensors."""
        name = as_safetensors(self.single)
        front, variant = (name, "") if self.variant is None else (_without(name, self.variant), f"{self.variant}.")
        return name, f"{front}.index.{variant}json"


def folder_of(name: str, folders: Iterable[str]) -> str:
    """The innermost of the folders that a tensor of that name lies in."""
    return max((folder for folder in folders if name.startswith(f"{folder}/")), key=len, default="")


def as_safetensors(filename: str) -> str:
    """What a weight file is called in safetensors: pickles by their stem, but for transformers' own name for them."""
    stem, dot, end = filename.rpartition(".")
    if f".{end}" not in PICKLES or not dot:
        return filename
    if stem == "pytorch_model" or stem.startswith("pytorch_model."):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors"


def named_folders(directory: Path) -> list[str]:
    """The folders in a directory that its own files name as a model's; "" is the directory itself.

    Raises:
        CheckpointError: A file is malformed, or names a folder outside.
    """
    names: list[str] = []
    if (file := directory / MODULES).exists():
        modules = read_json(file, list[dict[str, Any]])
        names += [_checked(file, each.get("path", "")) for each in modules]
    if (file := directory / PIPELINE).exists():
        entries = read_json(file, dict[str, Any])
        names += [_checked(file, name) for name, value in entries.items() if _is_component(name, value)]
    if (file := directory / _ROUTER).exists():
        router = read_json(file)
        types = router.get("types") if isinstance(router, dict) else None
        names += [_checked(file, name) for name in types] if isinstance(types, dict) else []
    return list(dict.fromkeys(names))


def folders_of(directory: Path) -> list[str]:
    """The folders of a model, those in them too, that are there; "" is the directory itself.

    Raises:
        CheckpointError: A file is malformed, or names a folder outside.
    """
    folders = dict.fromkeys(_below(directory, "", _DEEPEST))
    return list(folders) or [""]


def _below(directory: Path, front: str, depth: int) -> Iterator[str]:
    for name in named_folders(directory):
        folder = f"{front}/{name}".strip("/")
        if os.path.isdir(directory / name):
            yield folder
            if name and depth:
                yield from _below(directory / name, folder, depth - 1)


def _is_component(name: str, value: Any) -> bool:
    """Whether an entry of a pipeline is a component, `[library, class]`, that it has."""
    return not name.startswith("_") and isinstance(value, list) and len(value) > 1 and value[1] is not None


def _checked(file: Path, name: Any) -> str:
    path = PurePosixPath(name) if isinstance(name, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or "\\" in str(name) or "\0" in str(name):
        raise CheckpointError(f"{file}: names a folder outside the directory: {shown(name)}")
    return "" if str(path) == "." else path.as_posix()


def find_weights(directory: Path, *, known: bool) -> Weights | None:
    """The weight files of a folder, by their names; None where it has none.

    Safetensors come first, as in loaders: where both kinds lie side by side they hold the same. A variant is taken
    where nothing else is there.

    Args:
        directory: The folder.
        known: It is known to hold a model, so that a file of any name is meant.

    Raises:
        CheckpointError: There are several, and which is meant cannot be told.
    """
    names = sorted(file.name for file in directory.iterdir() if file.is_file())
    config = directory / MODEL_CONFIG
    diffusers = config.is_file() and f'"{CLASS}"'.encode() in read_bytes(config)
    stems = (_DIFFUSERS, _OURS) if diffusers else (_OURS, _DIFFUSERS)
    kinds = [(stem, ".safetensors") for stem, _ in stems] + [(stem, ".bin") for _, stem in stems]
    for stem, end in kinds:
        if f"{stem}{end}" in names or f"{stem}{end}.index.json" in names:
            return Weights(f"{stem}{end}", f"{stem}{end}.index.json")
    for stem, end in kinds:
        variants = {match[1] for name in names for match in [_variant(stem, end).fullmatch(name)] if match}
        indexed = {match[1] for name in names for match in [_variant_index(stem, end).fullmatch(name)] if match}
        if len(variants | indexed) > 1:
            raise _unsure(directory, sorted(f"{stem}.{variant}{end}" for variant in variants | indexed))
        for variant in variants | indexed:
            return Weights(f"{stem}.{variant}{end}", f"{stem}{end}.index.{variant}.json", variant)
    indices = [name for name in names if name.endswith(INDEX_END)]
    if len(indices) > 1:
        raise _unsure(directory, indices)
    if indices:
        return Weights(indices[0].removesuffix(".index.json"), indices[0])
    loose = [name for name in names if name.endswith(".safetensors")]
    if len(loose) == 1 and (known or diffusers):
        return Weights(loose[0], f"{loose[0]}.index.json", alone=True)
    return None


def _variant(stem: str, end: str) -> re.Pattern[str]:
    return re.compile(rf"{stem}\.((?!.*-\d+-of-\d+)[\w-]+){re.escape(end)}")


def _variant_index(stem: str, end: str) -> re.Pattern[str]:
    return re.compile(rf"{stem}{re.escape(end)}\.index\.([\w-]+)\.json")


def _without(name: str, variant: str) -> str:
    stem, _, end = name.rpartition(".")
    return f"{stem.removesuffix(f'.{variant}')}.{end}"


def _unsure(directory: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{directory} holds {', '.join(names)}: which is meant cannot be told",
        hint="name one file, or leave one of them there",
    )
