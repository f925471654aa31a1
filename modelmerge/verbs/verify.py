"""verify: whether the files of an output, and its inputs, are what its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.manifest_file import Listed, inputs_of
from modelmerge.checkpoint.output import is_recorded
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.reference import STAGE
from modelmerge.errors import OutputError
from modelmerge.hub.repository import cached
from modelmerge.progress import SILENT, Reporter
from modelmerge.verbs.push import read_manifest


def verify(directory: str | Path, *, progress: Reporter = SILENT) -> dict[str, Any]:
    """Read every file that a manifest lists, and compare its sha256: `{"output", "files": [{"name", "same"}]}`.

    Files of the output are named by their places in it, those of the inputs as the manifest names them. `same` is
    False for a file of the output that is missing, and None for an input that cannot be found.

    Args:
        directory: What merge, search, extract or disentangle wrote.
        progress: Receives the progress.

    Raises:
        OutputError: The directory holds no manifest.
    """
    output = Path(directory).expanduser()
    manifest = read_manifest(output / MANIFEST, Listed)
    expected = {name: (output / name, entry) for name, entry in manifest["files"].items()}
    models = inputs_of(manifest)
    named = {name: entry for each in models for name, entry in each["files"].items() if not name.startswith(STAGE)}
    inputs = {name: (_place_of(name), entry) for name, entry in named.items()}
    progress.stage("verifying", sum(entry["bytes"] for _, entry in (*expected.values(), *inputs.values())))
    files = []
    for missing, part in ((False, expected), (None, inputs)):
        for name, (file, entry) in part.items():
            progress.begin(name)
            files.append({"name": name, "same": missing if file is None else _is_same(file, entry, missing)})
            progress.advance(entry["bytes"], name)
    return {"output": str(directory), "files": files}


def _is_same(file: Path, entry: Mapping[str, Any], missing: bool | None) -> bool | None:
    """Whether the file's bytes, read now, have the digest of the manifest; `missing` where there is no such file."""
    try:
        return is_recorded(file, entry)
    except FileNotFoundError:
        return missing
    except OSError as error:
        raise OutputError(f"{file}: cannot be read: {error.strerror}") from error


def _place_of(name: str) -> Path | None:
    """Where an input's file lies, by what the manifest calls it."""
    return cached(name) if name.startswith("hf://") else Path(name)
