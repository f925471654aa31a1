"""What may leave this machine: no paths in configs, and no files that links outside a model's directory lead to."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

# By its beginning: a path from the root, the home or here, of a network, of Windows, or as an address.
_PATH = re.compile(r"(?:/|~/|\.{1,2}/|\\\\|[A-Za-z]:[\\/]|file:/)[^\n]*", re.IGNORECASE)
_NAMES = "name_or_path"  # ends the keys that say where a model came from
_TEXTS = re.compile(r"(token|template|content|prompt|text|pattern|regex)s?$")  # keys of what only looks like a path
_CONFIG = re.compile(r"(?!tokenizer\.json|vocab|added_tokens|special_tokens).*\.json")


def is_path(text: str) -> bool:
    """Whether a text is a path of some machine, and not the name of a repository or anything else."""
    folders = re.split(r"[\\/]", text.rstrip("/\\"))
    return _PATH.fullmatch(text) is not None and len(folders) > 2 and all(folders[2:])


def model_name(text: str) -> str:
    """What a model is called by its path; the name of a repository is that already."""
    one_path = _PATH.fullmatch(text) or text.count("/") > 1 or "\\" in text
    return (PureWindowsPath(text) if "\\" in text else PurePosixPath(text)).name if one_path else text


def portable(place: str, content: bytes | Path) -> bytes | Path:
    """A file that goes beside weights as it may leave this machine; a JSON file that tells no path stays as it is.

    Where a model came from is told by name; other paths go.
    """
    if not _CONFIG.fullmatch(PurePosixPath(place).name):
        return content
    try:
        before = json.loads(content.read_bytes() if isinstance(content, Path) else content)
        after = _without_paths(before, "")
    except (OSError, ValueError, RecursionError):
        return content  # whoever reads it says so
    return content if after == before else (json.dumps(after, indent=2) + "\n").encode()


def _without_paths(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v, k) for k, v in value.items() if not _tells(v, k)}
    if isinstance(value, list):
        return [_without_paths(each, key) for each in value if not _tells(each, key)]
    return model_name(value) if isinstance(value, str) and key.endswith(_NAMES) else value


def _tells(value: Any, key: str) -> bool:
    """Whether an entry tells a path, and is nothing without."""
    return isinstance(value, str) and not key.endswith(_NAMES) and not _TEXTS.search(key) and is_path(value)


def leads_out(file: Path, directory: Path) -> bool:
    """Whether a file of a model's directory is a link to elsewhere; the Hub's cache is made of links to its blobs."""
    target, home = file.resolve(), directory.resolve()
    if target.is_relative_to(home):
        return False
    snapshots = next((folder for folder in home.parents if folder.name == "snapshots"), None)
    return snapshots is None or target.parent != snapshots.parent / "blobs"
