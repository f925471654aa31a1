"""Merge fine-tuned experts of one base model into one checkpoint.

The verbs of the command line as functions: `modelmerge.merge(base, experts, out, method="ties", density=0.1)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "merge", "replay"]

if TYPE_CHECKING:
    from modelmerge.verbs.merge import merge, replay


def __getattr__(name: str) -> Any:
    # Importing a verb imports torch, which takes seconds; `modelmerge --help` and `--version` shall not.
    if name in ("merge", "replay"):
        from modelmerge.verbs import merge as module

        return getattr(module, name)
    raise AttributeError(f"module 'modelmerge' has no attribute '{name}'")
