"""The digest of everything that determines the bytes of the weights."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import version
from typing import Any

from modelmerge._version import __version__
from modelmerge.plan.tensors import Plan


def versions() -> dict[str, str]:
    """The versions that bear on the result's bits."""
    return {**_packages(), "python": platform.python_version()}


@cache  # reading a package's metadata takes milliseconds
def _packages() -> dict[str, str]:
    others = ("torch", "safetensors", "huggingface_hub", "numpy")
    return {"modelmerge": __version__, **{name: version(name) for name in others}}  # a source tree has no metadata


def fingerprint(plan: Plan, *settings: Any) -> str:
    """Digest of everything that determines the weights' bytes, as far as it can be had without reading tensors."""
    files = [
        (m.reference.address(file), stat.st_size, stat.st_mtime_ns if m.reference.repository is None else 0)
        for m in plan.models
        for file, stat in m.files.items()
    ]
    names = [model.name for model in plan.models]
    content = json.dumps([settings, names, files, versions()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
