"""References: how a checkpoint is named on the command line, `[NAME=]REF`.

REF is a path that exists (a checkpoint directory or a `.safetensors` file), else a repository on the Hub:
`org/name[@revision]`, or `hf://org/name[/folder or file][@revision]`. A branch, a tag or a pull request (`refs/pr/32`)
is pinned to its commit here, before anything is read. What starts with `./`, `/`, `~` or `../` is a path even if
nothing is there, so that a misspelt path never turns into a request to the Hub.

NAME is whatever a directory can be called, in any script and with any marks: of several `=`, the first that leaves a
REF behind it ends the name. `Named` has the two apart, for readers and writers of files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modelmerge.errors import ReferenceNotFound, UsageError, suggestion

if TYPE_CHECKING:
    from modelmerge.hub import repository

_HUB = re.compile(r"(?:(?P<scheme>hf://))?(?P<repo>[\w.\-]+/[\w.\-]+)(?P<inside>/[^@]+)?(?:@(?P<revision>.+))?")
_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|json|ya?ml)")
_PATHS = ("./", "../", "/", "~")  # what is a path begins so, even if nothing is there
_GENERIC_STEMS = ("model", "pytorch_model", "adapter_model")


class Named(NamedTuple):
    """A reference and its name, apart: either may hold any mark."""

    name: str
    reference: str

    def __str__(self) -> str:
        return f"{self.name}={self.reference}"


@dataclass(frozen=True, slots=True)
class Reference:
    """A named checkpoint: `text` as the user wrote it, `path` where it lies.

    Of one on the Hub, `text` holds the commit, and `path` is the outline that `repository` shows it by.
    """

    name: str
    text: str
    path: Path
    repository: repository.Repository | None = None

    @property
    def location(self) -> str:
        """The reference that leads here from any directory."""
        return str(self.path) if self.repository is None else self.text

    @property
    def named(self) -> Named:
        """The reference that leads here from any directory, with the name."""
        return Named(self.name, self.location)

    @property
    def title(self) -> str:
        """What it is called where it lies: its path, or its repository's name."""
        return self.text if self.repository is None else self.repository.name

    def address(self, file: Path) -> str:
        """What a manifest calls a file of it."""
        return str(file) if self.repository is None else self.repository.address(file)


def parse(text: str | Named) -> Reference:
    """The checkpoint that `[NAME=]REF` names.

    Raises:
        UsageError: No directory could be called so.
        ReferenceNotFound: Nothing is there, or it is a kind that cannot be read.
        HubError: The Hub refuses, or cannot be reached.
    """
    name, ref = text if isinstance(text, Named) else _split(text)
    if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name):
        raise UsageError(f"'{name}' cannot be the name of a model", hint="a name is what a directory can be called")
    try:
        path = Path(ref).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long for a name, no such user, a zero byte
        raise ReferenceNotFound(f"'{ref[:200]}' cannot be a path: {error}") from error
    if not exists:
        repository = _on_the_hub(ref, path)
        there = Path(repository.name) / repository.inside
        name = name or _default_name(there, folder=repository.inside not in repository.files)
        return Reference(name, repository.text, repository.directory / repository.inside, repository)
    path = path.resolve()
    return Reference(name or _default_name(path, folder=path.is_dir()), ref, path)


def parse_here(text: str | Named) -> Reference | None:
    """The checkpoint that `[NAME=]REF` names, where that is a path; None where it may be a name on the Hub.

    Raises:
        UsageError: As for `parse`.
        ReferenceNotFound: It is neither.
    """
    ref = text.reference if isinstance(text, Named) else _split(text)[1]
    return None if _on_hub(ref) and not _is_there(ref) else parse(text)


def _split(text: str) -> tuple[str | None, str]:
    """The name, if there is one, and the reference behind it."""
    with contextlib.suppress(ValueError):  # a zero byte
        if os.path.lexists(text):
            return None, text
    places = [place for place, letter in enumerate(text) if letter == "="]
    ways = [(text[:place], text[place + 1 :]) for place in places]
    ways = [way for way in ways if way[0] not in ("", ".", "..") and "/" not in way[0]]
    for leads in (_is_there, lambda ref: ref.startswith(_PATHS) or _HUB.fullmatch(ref)):
        for name, ref in ways:
            if leads(ref):
                return name, ref
    return ways[0] if ways else (None, text)


def _is_there(ref: str) -> bool:
    try:
        return bool(ref) and Path(ref).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def parse_experts(texts: Iterable[str | Named]) -> tuple[Reference, ...]:
    """The experts, in the order given; each name once.

    Raises:
        UsageError: There is no expert, or two have one name.
    """
    items = list(texts)
    if not items:
        raise UsageError("no expert is named", hint="give at least one expert after the base: BASE EXPERT...")
    return parse_all(items, "expert")


def parse_all(texts: Iterable[str | Named], kind: str) -> tuple[Reference, ...]:
    """The references, in the order given; each name once. `kind` is what errors call them.

    Raises:
        UsageError: Two have one name.
    """
    references = tuple(parse(text) for text in texts)
    twice = [name for name, count in Counter(each.name for each in references).items() if count > 1]
    if twice:
        where = ", ".join(each.text for each in references if each.name == twice[0])
        raise UsageError(
            f"two {kind}s are called '{twice[0]}': {where}", hint="name them apart: first=PATH second=OTHER_PATH"
        )
    return references


def _default_name(path: Path, *, folder: bool) -> str:
    if folder:
        return path.name or "root"
    return path.parent.name if path.stem in _GENERIC_STEMS else path.stem


def _on_hub(ref: str) -> re.Match[str] | None:
    """The parts of a reference that may name a repository."""
    match = None if ref.startswith(_PATHS) else _HUB.fullmatch(ref)
    return None if match and not match["scheme"] and (match["inside"] or _FILE.fullmatch(ref)) else match


def _on_the_hub(ref: str, path: Path) -> repository.Repository:
    """The repository that a reference names which is no path.

    Raises:
        ReferenceNotFound: It cannot name one, or there is none.
        HubError: The Hub refuses, or cannot be reached.
    """
    match = _on_hub(ref)
    if match is None:
        raise _missing(ref, path)
    # The Hub's client takes a fifth of a second to import, and most models are here.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from modelmerge.hub import repository

    try:
        validate_repo_id(match["repo"])
    except HFValidationError:
        raise _missing(ref, path) from None
    try:
        return repository.find(match["repo"], match["revision"], (match["inside"] or "").strip("/"))
    except ReferenceNotFound as error:
        near = None if match["scheme"] or match["revision"] else _beside(path)
        raise ReferenceNotFound(error.template, hint=near or error.hint_template) from error


def _missing(ref: str, path: Path) -> ReferenceNotFound:
    return ReferenceNotFound(
        f"'{ref}': no such file or directory", hint=_beside(path) or "name a checkpoint directory or .safetensors file"
    )


def _beside(path: Path) -> str | None:
    """What lies where the path should."""
    near = path.parent
    beside = sorted(p.name for p in near.iterdir() if not p.name.startswith(".")) if near.is_dir() else []
    some = f"{near} holds: {', '.join(beside[:8])}{', ...' if beside[8:] else ''}" if beside else ""
    return suggestion(path.name, beside, some, show=lambda name: str(path.with_name(name)))
