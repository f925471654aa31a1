"""push: a finished directory to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.adapter_config import CONFIG as ADAPTER
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.manifest_file import Made, Output
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.errors import HubError, OutputError
from modelmerge.hub.upload import Pushed, Target, check, parse_target, upload
from modelmerge.record import card
from modelmerge.record.redaction import local_models, published, renamed


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
    read_manifest(Path(directory, MANIFEST), Made)  # before a repository is made for nothing
    check(target)
    done = push_to(target, Path(directory), progress=progress)
    return {"url": done.url, "commit": done.commit}


def push_to(target: Target, directory: Path, *, progress: bool) -> Pushed:
    """Push a finished output to a target that has been checked.

    Raises:
        OutputError: The directory is no finished output.
        HubError: The Hub refuses, or cannot be reached.
    """
    instead, whole = {}, read_manifest(directory / MANIFEST, Made)
    for file in directory.rglob(MANIFEST):
        instead[file.relative_to(directory).as_posix()] = _text(published(read_manifest(file)))
    if (config := directory / ADAPTER).exists():
        instead[ADAPTER] = _text(renamed(read_json(config), local_models(whole)))  # its base's path
    if (directory / CARD).exists():
        text = (directory / CARD).read_text(encoding="utf-8")
        instead[CARD] = card.published(text, whole, published(whole)).encode()
    try:
        return upload(target, directory, instead, target.message or _message(whole), progress=progress)
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


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _message(manifest: Mapping[str, Any]) -> str:
    count = len(manifest["inputs"]["experts"])
    experts = f"{count} expert{'s' * (count != 1)}"
    if "recipe" in manifest:
        return f"Merge of {experts} by {manifest['recipe']['method']}"
    return f"{'Disentangled t' if manifest.get('kind') == 'disentangle' else 'T'}ask vectors of {experts}"
