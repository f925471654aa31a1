"""What was measured once is remembered: by the model's digest, the task and all that the score depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.digest import cache_directory

_FORMAT = 1  # of the entries: older ones are not read


def key(content: Mapping[str, Any]) -> str:
    """The name of an entry: a digest of what it depends on."""
    return hashlib.sha256(json.dumps([_FORMAT, content], sort_keys=True).encode()).hexdigest()


def recall(name: str, part: str = "scores") -> dict[str, Any] | None:
    """The entry of that name, which has that part; None where there is none that can be read."""
    try:
        entry = json.loads(_file(name).read_bytes())
        return entry if isinstance(entry[part], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(name: str, entry: Mapping[str, Any]) -> None:
    """Keep an entry, whole or not at all. A cache that cannot be written costs time, never a result."""
    file = _file(name)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entry))
        os.replace(temporary, file)


def _file(name: str) -> Path:
    return cache_directory() / "eval" / f"{name}.json"
