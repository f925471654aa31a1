"""`modelmerge.json` as its readers need it: the entries that they rely on, and the types of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypedDict


class _Entry(TypedDict):
    sha256: str
    bytes: int


class FileEntry(_Entry, total=False):
    """A file of an output or an input; `instead` is what may be there after a kill while it was replaced."""

    instead: _Entry


class Input(TypedDict):
    """A base or an expert."""

    name: str
    reference: str
    path: str | None  # None where it was published from another machine
    files: dict[str, FileEntry]


class _Base(TypedDict):
    base: Input


class _Models(_Base):
    experts: list[Input]


class _Stage(TypedDict):
    """A merge before another one, whose result is gone."""

    inputs: _Models


class _Staged(TypedDict, total=False):
    stages: dict[str, _Stage]


class Output(_Staged):
    """The manifest of any finished output, or of one of the task vectors in it."""

    inputs: dict[str, Input | list[Input]]


class Listed(Output):
    """The manifest that lists all files of a finished output."""

    files: dict[str, FileEntry]


class _Share(TypedDict):
    number: int
    of: int
    host: str


class _Findings(TypedDict):
    left_out: list[list[str]]
    figures: dict[str, dict[str, float]]
    rounding: list[str] | None
    merged: int


class Made(_Staged):
    """The manifest of what was made of a base and experts: a merge, or task vectors."""

    inputs: _Models


class Part(TypedDict):
    """The manifest of a part of a merge."""

    part: _Share
    job: dict[str, Any]
    inputs: _Models
    findings: _Findings
    files: dict[str, FileEntry]
    device: str
    threads: int
    machine: dict[str, str | None]
    versions: dict[str, str]
    seconds: float


class Vector(TypedDict):
    """The manifest of a task vector."""

    inputs: _Base
    unchanged: list[str]


class Merge(Made):
    """The manifest of a merge, which can be replayed."""

    format: int
    recipe: dict[str, Any]


def inputs_of(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """The models that an output was made of, those of the merges before it too."""
    for made in (manifest, *manifest.get("stages", {}).values()):
        for models in made["inputs"].values():
            yield from models if isinstance(models, list) else [models]
