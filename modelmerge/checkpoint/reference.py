"""References: how a checkpoint is named on the command line, `[NAME=]REF`.

REF is a path that exists (a checkpoint directory or a `.safetensors` file). What starts with `./`, `/`, `~` or `../`
is a path even if nothing is there, so that a misspelt path never turns into a request to the Hub.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelmerge.errors import ReferenceNotFound, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")
_HUB = re.compile(r"(hf://)?[\w.\-]+/[\w.\-]+(@.+)?")
_GENERIC_STEMS = ("model", "pytorch_model", "adapter_model")


@dataclass(frozen=True, slots=True)
class Reference:
    """A named checkpoint: `text` as the user wrote it, `path` where it lies."""

    name: str
    text: str
    path: Path


def parse(text: str) -> Reference:
    """The checkpoint that `[NAME=]REF` names.

    Raises:
        ReferenceNotFound: Nothing is there, or it is a kind that cannot be read.
    """
    name, ref = None, text
    left, equals, right = text.partition("=")
    if equals and _NAME.fullmatch(left) and not os.path.lexists(text):
        name, ref = left, right
    try:
        path = Path(ref).expanduser()
        found = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long for a name, no such user, a zero byte
        raise ReferenceNotFound(f"'{ref[:200]}' cannot be a path: {error}") from error
    if not found:
        raise _missing(ref, path)
    path = path.resolve()
    return Reference(name or _default_name(path), ref, path)


def parse_experts(texts: Iterable[str] | Mapping[str, str]) -> tuple[Reference, ...]:
    """The experts, in the order given; each name once.

    Raises:
        UsageError: There is no expert, or two have one name.
    """
    items = [f"{name}={ref}" for name, ref in texts.items()] if isinstance(texts, Mapping) else list(texts)
    experts = tuple(parse(item) for item in items)
    if not experts:
        raise UsageError("no expert is named", hint="give at least one expert after the base: BASE EXPERT...")
    twice = [name for name, count in Counter(expert.name for expert in experts).items() if count > 1]
    if twice:
        where = ", ".join(expert.text for expert in experts if expert.name == twice[0])
        raise UsageError(
            f"two experts are called '{twice[0]}': {where}", hint="name them apart: first=PATH second=OTHER_PATH"
        )
    return experts


def _default_name(path: Path) -> str:
    if path.is_dir():
        return path.name or "root"
    return path.parent.name if path.stem in _GENERIC_STEMS else path.stem


def _missing(ref: str, path: Path) -> ReferenceNotFound:
    is_path = ref.startswith(("./", "../", "/", "~")) or ref in (".", "..")
    if not is_path and _HUB.fullmatch(ref):
        repo = ref.removeprefix("hf://").partition("@")[0]
        return ReferenceNotFound(
            f"'{ref}' is not a path here, and references to the Hugging Face Hub cannot be read yet",
            hint=f"download it first: hf download {repo} --local-dir {repo.rpartition('/')[2]}",
        )
    near = path.parent if path.parent.is_dir() else None
    beside = sorted(p.name for p in near.iterdir() if not p.name.startswith("."))[:8] if near else []
    return ReferenceNotFound(
        f"'{ref}': no such file or directory",
        hint=f"{near} holds: {', '.join(beside)}" if beside else "name a checkpoint directory or .safetensors file",
    )
