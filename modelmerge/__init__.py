"""Merge fine-tuned experts of one base model into one checkpoint.

The verbs of the command line as functions: `modelmerge.merge(base, experts, out, method="ties", density=0.1)`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelmerge._version import __version__

__all__ = [
    "__version__", "disentangle", "evaluate", "extract", "merge", "push", "render", "replay", "search", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from modelmerge.verbs.evaluate import evaluate
    from modelmerge.verbs.merge import merge, replay
    from modelmerge.verbs.push import push
    from modelmerge.verbs.render import render
    from modelmerge.verbs.search import search
    from modelmerge.verbs.vectors import disentangle, extract
    from modelmerge.verbs.verify import verify

_HOMES = {"replay": "merge", "extract": "vectors", "disentangle": "vectors"}  # the others live in files of their names


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # Importing a verb imports torch, which takes seconds; `modelmerge --help` and `--version` shall not.
    if name in __all__:
        return getattr(importlib.import_module(f"modelmerge.verbs.{_HOMES.get(name, name)}"), name)
    raise AttributeError(f"module 'modelmerge' has no attribute '{name}'")
