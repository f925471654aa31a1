"""How methods are found: by their files, without importing torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from modelmerge.errors import UsageError, suggestion
from modelmerge.methods.contract import Method, TransformSpec

_METHODS = Path(__file__).parent


@functools.cache  # a plan asks for the method of every tensor, and a directory is not read in no time
def names(kind: str = "merge") -> tuple[str, ...]:
    """The methods of a kind, by name, found by their files; nothing is imported."""
    return tuple(sorted(f.stem.replace("_", "-") for f in (_METHODS / kind).glob("[!_]*.py")))


def data_free() -> tuple[str, ...]:
    """The merge methods that need nothing but the models, by name."""
    return tuple(name for name in names() if not load(name).on_data)


def summary(name: str, kind: str = "merge") -> str:
    """A method's help line: the first line of its file's docstring, read without importing it."""
    return first_line(_METHODS / kind / f"{name.replace('-', '_')}.py")


def first_line(file: Path) -> str:
    """The first line of a file's docstring. Python's own parser would take a tenth of a second for all methods."""
    with file.open(encoding="utf-8") as stream:
        return stream.readline().strip().removeprefix("r").strip('"')


@typing.overload
def load(name: str, kind: Literal["merge"] = "merge") -> Method: ...


@typing.overload
def load(name: str, kind: Literal["transform"]) -> TransformSpec: ...


def load(name: str, kind: str = "merge") -> Method | TransformSpec:
    """The method of that name. Importing its file does not import torch: that happens on its first use.

    Raises:
        UsageError: There is no such method.
    """
    if name not in names(kind):
        hint = suggestion(name, names(kind), f"there are: {', '.join(names(kind))}")
        raise UsageError(f"there is no {kind} method '{name}'", hint=hint)
    with _deferred_torch():
        return importlib.import_module(f"modelmerge.methods.{kind}.{name.replace('-', '_')}").METHOD


class _DeferredTorch(ModuleType):
    """Stands in for torch in a method's file until the first attribute is asked for."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module("torch"), attribute)


@contextlib.contextmanager
def _deferred_torch() -> Iterator[None]:
    """Let `import torch` inside the block cost nothing: importing torch takes seconds, and help needs none of it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = _DeferredTorch("torch")
    try:
        yield
    finally:
        del sys.modules["torch"]
