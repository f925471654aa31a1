"""What a manifest says of a merge that was made, for a merge that repeats it: the same bits, or an error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from modelmerge.checkpoint.adapter_config import CONFIG
from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.manifest_file import FileEntry
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.engine.parallel import MOST_THREADS
from modelmerge.errors import RecipeError, named
from modelmerge.plan.recipe import FORMAT
from modelmerge.record.fingerprint import circumstances

_PLACED = (CARD, CONFIG)  # they name the output, or where the base lies
_SHOWN = 3  # files that an error names
_RUN = 1 << 22  # elements that are compared at a time, in float64


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a replay must find again.

    Args:
        file: The manifest.
        inputs: sha256 by input file.
        files: sha256 by file of the output; None where another merge is asked for, which has nothing to repeat.
        threads: How many torch had; None where that was not recorded.
        script: sha256 by the names of a script's files.
        circumstances: On what the merge was made.
        lenient: Bits may differ, which is then noted.
    """

    file: Path
    inputs: Mapping[str, str]
    files: Mapping[str, str] | None
    threads: int | None = None
    script: Mapping[str, str] = field(default_factory=dict)
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    lenient: bool = False


class _Adaptation(TypedDict, total=False):
    script: dict[str, str]


class _Entries(TypedDict, total=False):
    format: int
    files: dict[str, FileEntry]
    adaptation: _Adaptation
    threads: int | None


def read_recorded(file: Path, inputs: Mapping[str, str], *, repeated: bool, lenient: bool) -> Recorded:
    """What the manifest records; `inputs` has the sha256 of the input files. The merge is `repeated`, or changed.

    Raises:
        RecipeError: It is not a manifest that merge wrote.
    """
    file = file / MANIFEST if file.is_dir() else file
    manifest: _Entries = read_json(file, _Entries, error=RecipeError)
    threads = manifest.get("threads")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise RecipeError(f"{file}: records {threads} threads")
    files = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
    script = manifest.get("adaptation", {}).get("script", {})
    made = {name: manifest[name] for name in circumstances("") if name in manifest}  # type: ignore[literal-required]
    # Format 1 is what a version without some of today's results wrote, on a number of threads that it does not say.
    compared = repeated and manifest.get("format") == FORMAT
    return Recorded(file, inputs, files if compared else None, threads, script, made, lenient)


def refuse_unrecorded(recorded: Recorded) -> None:
    """Refuse a recipe that cannot be held to: one without digests of its inputs or of what it wrote.

    Raises:
        RecipeError: It lacks them, and other bits are not allowed.
    """
    lacking = "the inputs" if not recorded.inputs else "what was written" if recorded.files == {} else None
    if lacking and not recorded.lenient:
        raise RecipeError(
            f"{recorded.file}: has no sha256 of {lacking}: whether it is the same cannot be known",
            hint=f"where other bits will do: {named('allow_different_bits')}",
        )


def other_bits(recorded: Recorded, staging: Publication, device: object) -> list[str]:
    """Notes on what was written and is not what the manifest records, if anything is not and that is allowed.

    Raises:
        RecipeError: It is not allowed.
    """
    notes = ["The recipe has no sha256 of its inputs: whether they are the same is not known."] * (not recorded.inputs)
    before = {name: digest for name, digest in (recorded.files or {}).items() if name not in _PLACED}
    after = {name: digest for name, digest in staging.digests.items() if name not in _PLACED} if before else {}
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if not names:
        return notes
    folder = recorded.file.parent
    shown = [f"{n} {_in_words(folder / n, before.get(n), staging.place_of(n), after.get(n))}" for n in names[:_SHOWN]]
    files = "; ".join([*shown, *([f"{len(names) - _SHOWN} files more"] if len(names) > _SHOWN else [])])
    there, here = dict(_flat(recorded.circumstances)), dict(_flat(circumstances(device)))
    others = [f"{name} {value}, here {here.get(name)}" for name, value in there.items() if value != here.get(name)]
    because = f"It was made with {'; '.join(others)}." if others else ""
    if not recorded.lenient:
        hint = f"{because} Where other bits will do: {named('allow_different_bits')}".strip()
        raise RecipeError(f"the merge gives other bits than {recorded.file} records: {files}", hint=hint)
    return [*notes, f"These are other bits than the recipe records: {files}. {because}".strip()]


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Entries and those inside of them, as words."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, str(value)


def _in_words(old: Path, expected: str | None, new: Path, digest: str | None) -> str:
    """How a file differs from the one that was recorded, each with its sha256, None where there is none."""
    if expected is None or digest is None:
        return "is new" if expected is None else "is not written"
    if old.suffix == ".safetensors" and old.is_file() and sha256(old) == expected:
        tensor, distance = _largest(old, new)
        if tensor is not None:
            return f"('{tensor}' differs by {distance:.2g} of its norm)"
    return f"(sha256 {digest[:12]} and not {expected[:12]})"


def _largest(old: Path, new: Path) -> tuple[str | None, float]:
    """The tensor that differs most between two files, and how much, as a share of its norm in the first."""
    distances = {}
    with contextlib.suppress(SafetensorError), safe_open(old, "pt") as first, safe_open(new, "pt") as second:
        for name in set(first.keys()) & set(second.keys()):
            a, b = first.get_tensor(name), second.get_tensor(name)
            if a.shape == b.shape:
                square = sum(float((x.double() - y.double()).square().sum()) for x, y in _runs(a, b))
                norm = sum(float(x.double().square().sum()) for x, _ in _runs(a, a))
                distances[name] = math.sqrt(square / norm) if norm else (math.inf if square else 0.0)
    largest = max(distances, key=lambda name: distances[name], default=None)
    return largest, distances.get(largest, 0.0) if largest is not None else 0.0


def _runs(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(a.flatten().split(_RUN), b.flatten().split(_RUN), strict=True)
