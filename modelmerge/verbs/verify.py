"""verify: whether the files of an output, and its inputs, are what its manifest says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.reference import Reference
from modelmerge.errors import OutputError
from modelmerge.progress import SILENT, Reporter


def verify(directory: str | Path, *, progress: Reporter = SILENT) -> dict[str, Any]:
    """Read every file that a manifest lists, and compare its sha256: `{"output", "files": [{"name", "same"}]}`.

    Files of the output are named by their places in it, those of the inputs as the manifest names them. `same` is
    False for a file of the output that is missing, and None for an input that cannot be found.

    Args:
        directory: What merge, search, extract or disentangle wrote.
        progress: Is told the progress.

    Raises:
        OutputError: The directory holds no manifest.
    """
    output = Path(directory).expanduser()
    manifest = _manifest(output)
    listed = [(name, output / name, entry, False) for name, entry in manifest["files"].items()]
    for model in _inputs(manifest):
        for name, entry in model["files"].items():
            listed.append((name, _found(name, output), entry, None))
    # An input that two models share is read once.
    unique = {name: (file, entry, absent) for name, file, entry, absent in listed}
    progress.stage("verifying", sum(int(entry["bytes"]) for _, entry, _ in unique.values()))
    files = []
    for name, (file, entry, absent) in unique.items():
        same = _is_same(file, entry) if file is not None and file.is_file() else absent
        files.append({"name": name, "same": same})
        progress.advance(int(entry["bytes"]), name)
    return {"output": str(directory), "files": files}
