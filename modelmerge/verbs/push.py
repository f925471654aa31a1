"""push: a finished directory to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.adapter_config import CONFIG as ADAPTER
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.manifest_file import Made, Output
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.portable import leads_out, portable
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.errors import HubError, OutputError, named
from modelmerge.hub.upload import Pushed, Target, check, parse_target, upload
from modelmerge.record import card
from modelmerge.record.loading import code_of
from modelmerge.record.manifest import as_file
from modelmerge.record.redaction import local_models, published, published_report, renamed
from modelmerge.text import visible

_WEIGHTS = (".safetensors", ".bin")  # which people keep on other disks
_LONGEST = 1 << 24  # bytes of a file of JSON that may hold paths; lists of tokens are longer


def push(
    directory: str | Path,
    to: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    progress: bool = False,
) -> dict[str, str]:
    """Push what merge, extract or disentangle wrote; the page's `url` and the `commit`.

    Models that lie on this machine go by their names there: the copies of the manifest and of the card on the Hub tell
    no paths.

    Args:
        directory: A finished output.
        to: `org/name`, or `org/name@branch`; made if it does not exist.
        private: Make it a private repository; refuse a public one.
        create_pr: Open a pull request instead of committing.
        commit_message: The commit's first line.
        progress: Draw the client's progress bars.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    target = parse_target(to, private=private, create_pr=create_pr, message=commit_message)
    content = _content(Path(directory), target.name)  # before a repository is made for nothing
    check(target)
    done = _upload(target, Path(directory), content, progress=progress)
    return {"url": done.url, "commit": done.commit}


def push_to(target: Target, directory: Path, *, progress: bool) -> Pushed:
    """Push a finished output to a target that has been checked.

    Raises:
        OutputError: The directory is no finished output.
        HubError: The Hub refuses, or cannot be reached.
    """
    return _upload(target, directory, _content(directory, target.name), progress=progress)


def _content(directory: Path, name: str) -> dict[str, bytes]:
    """By place, the content of those files of an output whose copy for others, in the repository `name`, is another.

    Raises:
        OutputError: The directory is no finished output, or holds what cannot be published.
    """
    whole = read_manifest(directory / MANIFEST, Made)
    if "part" in whole:
        hint = f"put all parts together first: {named('finish')}"
        raise OutputError(f"{directory} is a part of a merge, which nobody can load", hint=hint)
    instead = {
        place: content
        for place, file in _files(directory)
        if (content := _as_published(place, file, whole, name)) is not None
    }
    shown = published(whole)
    for place, content in instead.items():
        if place in shown["files"]:
            shown["files"][place] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    return instead | {MANIFEST: as_file(shown)}


def _upload(target: Target, directory: Path, content: Mapping[str, bytes], *, progress: bool) -> Pushed:
    message = target.message or _message(json.loads(content[MANIFEST]))
    try:
        return upload(target, directory, content, message, progress=progress)
    except HubError as error:
        again = f"`modelmerge push {directory} {target.name}` goes on from here"
        raise HubError(error.template, hint=f"{directory} is complete: {again}") from error


def read_manifest(file: Path, kind: Any = Output) -> dict[str, Any]:
    """The manifest of a finished output.

    Raises:
        OutputError: There is none, or it is malformed.
    """
    hint = "name what merge, extract or disentangle wrote"
    try:
        return read_json(file, kind, error=OutputError, hint=hint)
    except OutputError as error:
        if file.exists():
            raise
        raise OutputError(f"{file.parent} holds no finished output: {MANIFEST} is missing", hint=hint) from error


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """The files of an output, by their places.

    Raises:
        OutputError: One is a link to elsewhere, whose content nobody expects there.
    """
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        place = file.relative_to(directory).as_posix()
        if leads_out(file, directory) and file.suffix not in _WEIGHTS:
            hint = "put the file itself in its place, or remove the link"
            raise OutputError(f"{directory / place} is a link that leads out of {directory}", hint=hint)
        if not place.isprintable():
            hint = "name its expert otherwise: NAME=REF"
            raise OutputError(f"{directory}: on the Hub no file can be called '{visible(place)}'", hint=hint)
        yield place, file


def _as_published(place: str, file: Path, whole: Mapping[str, Any], name: str) -> bytes | None:
    """A file's content as others may see it; None where that is its own."""
    if file.name == MANIFEST:
        return as_file(published(read_manifest(file)))
    if place == CARD:
        text = file.read_text(encoding="utf-8", errors="backslashreplace")
        load = renamed(code_of(file.parent, name, hub=True), local_models(whole))
        return card.published(text, whole, published(whole), load).encode()
    if file.suffix != ".json" or file.stat().st_size > _LONGEST:
        return None
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    if isinstance(content, dict) and {"suite", "models", "versions"} <= content.keys():
        return as_file(published_report(content))
    named_so = as_file(renamed(content, local_models(whole))) if file.name == ADAPTER else file.read_bytes()
    changed = portable(place, named_so)
    return changed if isinstance(changed, bytes) and changed != file.read_bytes() else None


def _message(manifest: Mapping[str, Any]) -> str:
    count = len(manifest["inputs"]["experts"])
    experts = f"{count} expert{'s' * (count != 1)}"
    if "recipe" in manifest:
        return f"Merge of {experts} by {manifest['recipe']['method']}"
    return f"{'Disentangled t' if manifest.get('kind') == 'disentangle' else 'T'}ask vectors of {experts}"
