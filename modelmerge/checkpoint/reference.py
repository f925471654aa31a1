"""References: how a checkpoint is named on the command line, `[NAME=]REF` or `[NAME=]MODEL+ADAPTER`.

REF is a path that exists (a checkpoint directory or a `.safetensors` file), else a repository on the Hub:
`org/name[@revision]`, or `hf://org/name[/folder or file][@revision]`. A branch, a tag or a pull request (`refs/pr/32`)
is pinned to its commit here, before anything is read. What starts with `./`, `/`, `~` or `../` is a path even if
nothing is there, so that a misspelt path never turns into a request to the Hub.

MODEL+ADAPTER is a model with an adapter on it, each a REF of its own; of several adapters each goes onto what stands
before it. A path with a `+` in it that exists is that path.

NAME is whatever a directory can be called, in any script and with any marks: of several `=`, the first that leaves a
REF behind it ends the name. `Named` has the two apart, for readers and writers of files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modelmerge.errors import ReferenceNotFound, UsageError, suggestion

if TYPE_CHECKING:
    from modelmerge.hub import repository

_HUB = re.compile(r"(?:(?P<scheme>hf://))?(?P<repo>[\w.\-]+/[\w.\-]+)(?P<inside>/[^@]+)?(?:@(?P<revision>.+))?")
_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|json|ya?ml)")
_PATHS = ("./", "../", "/", "~")  # what is a path begins so, even if nothing is there
STAGE = "stage:"  # begins the reference to what a recipe merges before, by its name there
_GENERIC_STEMS = ("model", "pytorch_model", "adapter_model")


Stages = Mapping[str, Path]  # where what a recipe merges before lies, by its name there
NO_STAGES: Stages = {}


class Named(NamedTuple):
    """A reference and its name, apart: either may hold any mark."""

    name: str
    reference: str

    def __str__(self) -> str:
        return f"{self.name}={self.reference}"


@dataclass(frozen=True, slots=True)
class Reference:
    """A named checkpoint: `text` as the user wrote it, `path` where it lies.

    Of one on the Hub, `text` holds the commit, and `path` is the outline that `repository` shows it by. Of a model with
    adapters on it, `path` and `repository` are the model's.
    """

    name: str
    text: str
    path: Path
    repository: repository.Repository | None = None
    model: Reference | None = None  # of a model with adapters on it, the model alone, and
    adapters: tuple[Reference, ...] = ()  # these
    is_stage: bool = False  # what a recipe merges before, which is gone when all is done

    @property
    def parts(self) -> tuple[Reference, ...]:
        """The model and the adapters on it."""
        return (self,) if self.model is None else (self.model, *self.adapters)

    @property
    def is_here(self) -> bool:
        """Whether all of it lies on this machine."""
        return all(part.repository is None for part in self.parts)

    @property
    def location(self) -> str:
        """The reference that leads here from any directory."""
        return "+".join(str(p.path) if p.repository is None and not p.is_stage else p.text for p in self.parts)

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
        if self.is_stage:
            return f"{self.text}/{file.relative_to(self.path)}"
        return str(file) if self.repository is None else self.repository.address(file)


def is_stage_name(name: str) -> bool:
    """Whether references can name a stage so, and a directory can be called so, with room for an ending."""
    return bool(name.strip(".")) and not set("/+@\0") & set(name) and len(os.fsencode(name)) <= 100


def parse(text: str | Named, stages: Stages = NO_STAGES) -> Reference:
    """The checkpoint that `[NAME=]REF` names; `stages` are the places of what a recipe merges before.

    Raises:
        UsageError: No directory could be called so, or the reference is empty.
        ReferenceNotFound: Nothing is there, or it is a kind that cannot be read.
        HubError: The Hub refuses, or cannot be reached.
    """
    name, ref = text if isinstance(text, Named) else _split(text)
    if name is not None and (name in ("", ".", "..") or "/" in name or "\0" in name):
        raise UsageError(f"'{name}' cannot be the name of a model", hint="a name is what a directory can be called")
    if not ref:
        raise UsageError(f"'{text}' names no model", hint="a variable of the shell may be empty there")
    try:
        path = Path(ref).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long for a name, no such user, a zero byte
        raise ReferenceNotFound(f"'{ref[:200]}' cannot be a path: {error}") from error
    if not exists and (pieces := _pieces(ref)):
        return _with_adapters(name, [parse(piece, stages) for piece in pieces])
    if not exists and ref.startswith(STAGE) and ref.removeprefix(STAGE) in stages:
        stage = ref.removeprefix(STAGE)
        return Reference(name or stage, ref, stages[stage], is_stage=True)
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
    pieces = [ref] if _is_there(ref) else _pieces(ref) or [ref]
    return parse(text) if all(_is_there(piece) or not _on_hub(piece) for piece in pieces) else None


def _with_adapters(name: str | None, parts: Sequence[Reference]) -> Reference:
    """A model with adapters on it, as one reference."""
    model, *adapters = parts
    name = name or "+".join(part.name for part in parts)
    text = "+".join(part.text for part in parts)
    return Reference(name, text, model.path, model.repository, model, tuple(adapters))


def _pieces(ref: str) -> list[str]:
    """What MODEL+ADAPTER names, in order, where a text can be read so."""
    for place in reversed([place for place, letter in enumerate(ref) if letter == "+"]):
        front, back = ref[:place], ref[place + 1 :]
        if _leads(back):
            pieces = [front] if _is_there(front) else _pieces(front) or ([front] if _leads(front) else [])
            if pieces:
                return [*pieces, back]
        if front and back and (_is_there(front) or _is_there(back)):  # then it is the other that is missing
            return [front, back]
    return []


def _leads(ref: str) -> bool:
    """Whether a text names a checkpoint, here or on the Hub, as far as its form tells."""
    return ref.startswith((*_PATHS, STAGE)) or _is_there(ref) or _on_hub(ref) is not None


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


def parse_experts(texts: Iterable[str | Named], stages: Stages = NO_STAGES) -> tuple[Reference, ...]:
    """The experts, in the order given; each name once. `stages` as for `parse`.

    Raises:
        UsageError: There is no expert, or two have one name.
    """
    items = list(texts)
    if not items:
        raise UsageError("no expert is named", hint="give at least one expert after the base: BASE EXPERT...")
    return parse_all(items, "expert", stages)


def parse_all(texts: Iterable[str | Named], kind: str, stages: Stages = NO_STAGES) -> tuple[Reference, ...]:
    """The references, in the order given; each name once. `kind` is what errors call them; `stages` as for `parse`.

    Raises:
        UsageError: Two have one name.
    """
    references = tuple(parse(text, stages) for text in texts)
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
