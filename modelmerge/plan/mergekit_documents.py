"""The documents of a mergekit YAML: one merge, or several where one is made of what others make; and their references.

As mergekit-multi has it: a document may have a `name`, by which others use its result as a model. The unnamed one, or
else the last, is the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.documents import parse_documents, read_bytes, shown
from modelmerge.checkpoint.reference import STAGE, is_stage_name
from modelmerge.errors import RecipeError, suggestion

_NAMED_IN = ("models", "slices", "modules", "base_model", "tokenizer_source", "tokenizer")  # keys that models stand in


_MOST = 100  # documents
_MOE = "mergekit-moe", "make the mixture with mergekit; modelmerge merges mixtures that have the same experts"
_EVOLVE = "mergekit-evolve", "modelmerge search tries values of a method's options and keeps the best"
_OTHERS = {"gate_mode": _MOE, "experts": _MOE, "genome": _EVOLVE}  # what a file of another of its tools has


@dataclass(frozen=True, slots=True)
class Document:
    """A merge of a file; `place` says in errors which, where there are several."""

    name: str | None
    place: str
    config: Mapping[str, Any]


def read_documents(file: Path) -> tuple[list[Document], list[str]]:
    """The documents that the output takes, each after those that it is made of; and the names of all others.

    Raises:
        RecipeError: The file cannot be read or is no configuration; names come twice or lead in a circle; or it is not
            said which document is the output.
    """
    try:
        configs = [config for config in parse_documents(read_bytes(file).decode()) if config is not None]
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such file") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{file}: cannot be read as YAML: {error}") from error
    if len(configs) > _MOST:
        raise RecipeError(f"{file}: has {len(configs)} documents, and {_MOST} are the most that are merged")
    several = len(configs) > 1
    documents = []
    for number, config in enumerate(configs, 1):
        which = f", document {number}" if several else ""
        if not isinstance(config, dict) or "merge_method" not in config:
            raise _no_configuration(f"{file}{which}", config)
        name = config.get("name")
        if several and "name" in config and not (isinstance(name, str) and is_stage_name(name)):
            raise RecipeError(f"{file}{which}: name: must be a short word without / + @, not {shown(name)}")
        place = f"document {number} ('{name}'): " if name else f"document {number}: "
        rest = {key: value for key, value in config.items() if key != "name"}
        documents.append(Document(name, place if several else "", rest))
    if not documents:
        raise _no_configuration(str(file))
    return _in_order(file, documents)


def _no_configuration(where: str, config: Any = None) -> RecipeError:
    other = next((tool for key, tool in _OTHERS.items() if isinstance(config, dict) and key in config), None)
    if other is not None:
        return RecipeError(f"{where}: it is for {other[0]}, which has no counterpart here", hint=other[1])
    return RecipeError(
        f"{where}: no mergekit configuration: it has no 'merge_method'",
        hint="a YAML recipe is mergekit's; modelmerge's own is the modelmerge.json of a merged checkpoint",
    )


def _in_order(file: Path, documents: list[Document]) -> tuple[list[Document], list[str]]:
    if len(documents) == 1:
        return documents, []
    names = [document.name for document in documents if document.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{file}: two documents are called '{twice}'", hint="give each a name of its own")
    unnamed = [document for document in documents if document.name is None]
    if len(unnamed) > 1:
        raise RecipeError(
            f"{file}: {len(unnamed)} documents have no name: which one is the output cannot be told",
            hint="give a name to those that others are made of",
        )
    by_name = {document.name: document for document in documents if document.name is not None}
    needs = {id(document): _needs(document, by_name) for document in documents}
    final = unnamed[0] if unnamed else documents[-1]
    order: list[Document] = []

    def take(document: Document, way: tuple[Document, ...]) -> None:
        if document in way:
            circle = " -> ".join(f"'{each.name}'" for each in (*way[way.index(document) :], document))
            raise RecipeError(f"{file}: documents are made of one another: {circle}", hint="one has to come first")
        if not any(document is each for each in order):
            for name in needs[id(document)]:
                take(by_name[name], (*way, document))
            order.append(document)

    for document in documents:  # a circle is an error wherever it is
        take(document, ())
    user = next((document for document in documents if final.name in needs[id(document)]), None)
    if user is not None:
        raise RecipeError(
            f"{file}: no document is the output: the last, '{final.name}', is used by '{user.name}'",
            hint="leave the name of the output out, or put it last",
        )
    order.clear()
    take(final, ())
    return order, [name for name, document in by_name.items() if not any(document is each for each in order)]


def _needs(document: Document, names: Mapping[str, Document]) -> list[str]:
    """The documents that one is made of, by their names, in the order of its lines."""
    words = (word for key in _NAMED_IN for word in _words(document.config.get(key)))
    return [name for name in dict.fromkeys(word.partition("+")[0] for word in words) if name in names]


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from () if key in ("parameters", "lora", "filter") else _words(each)
    elif isinstance(value, list):
        for each in value:
            yield from _words(each)


class References:
    """What a document's references to models are here.

    Args:
        names: Of the documents.
    """

    def __init__(self, names: frozenset[str] = frozenset()) -> None:
        self._names = names

    def read(self, entry: Any, base: str | None = None) -> str:
        """The reference that mergekit's stands for; of the base with an adapter on it, the adapter's.

        mergekit takes `PATH[@REVISION][+ADAPTER[@REVISION]]`, or these parts as entries.

        Raises:
            ValueError: It is none; the message says why.
        """
        if isinstance(entry, dict) and "model" in entry and set(entry) <= {"model", "lora", "override_architecture"}:
            if entry.get("lora") is None:
                return self.read(entry["model"], base)
            model, adapter = self._model(_path(entry["model"])), _path(entry["lora"])
        else:
            front, plus, adapter = _path(entry).partition("+")
            if not plus or Path(_path(entry)).exists():
                return self._model(_path(entry))
            model = self._model(front)
            if not front or not adapter:
                raise ValueError(f"must be MODEL+ADAPTER, not {shown(entry)}")
        return _local(adapter) if model == base else f"{model}+{_local(adapter)}"

    def _model(self, path: str) -> str:
        if path in self._names:
            return f"{STAGE}{path}"
        if self._names and "/" not in path and not Path(path).expanduser().exists():
            near = suggestion(path, sorted(self._names), f"there are: {', '.join(sorted(self._names))}")
            raise ValueError(f"'{path}' is no document of this file, and nothing here is called so; {near}")
        return _local(path)


def _local(path: str) -> str:
    """A path, without its revision where there is a folder: it has none."""
    front, _, _ = path.rpartition("@")
    return front if front and Path(front).is_dir() and not Path(path).exists() else path


def _path(entry: Any) -> str:
    """A path or a name on the Hub, with its revision."""
    if isinstance(entry, dict) and "path" in entry and set(entry) <= {"path", "revision"}:
        revision = entry.get("revision")
        entry = f"{entry['path']}@{revision}" if revision and isinstance(entry["path"], str) else entry["path"]
    if not isinstance(entry, str) or not entry:
        raise ValueError(f"only a path or a name on the Hub can be honoured, not {shown(entry)}")
    return entry
