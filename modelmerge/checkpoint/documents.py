"""Small files of strangers, read as data: JSON and YAML whose size, depth and types are checked at the door.

What they hold may be anything, so nothing that reads them may cost more than their size: no nesting without end, no
aliases that stand for millions of nodes, no numbers that are no numbers of any machine, no file that never ends.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

from modelmerge.errors import CheckpointError, ModelMergeError

MOST = 200_000_000  # bytes of a document: tokenizers and indices of the largest models have a tenth
_MOST_YAML = 2_000_000  # characters
_NODES = 100_000  # of a YAML document, each as often as aliases stand for it
_DEEP = 100  # objects in objects
_LONG = 10_000  # characters of a YAML scalar that may be a number
_BITS = 1000  # of a number: a float holds all of fewer
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 4, 4, 4


def shown(value: Any) -> str:
    """A stranger's value as a message shows it: short, whatever it is."""
    return _SHORT.repr(value)


def open_plain(file: Path) -> BinaryIO:
    """A file for reading; what is none, such as a pipe or a device, is refused and never waited for.

    Raises:
        OSError: It is none, or cannot be read.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file")
    return os.fdopen(descriptor, "rb")


def read_bytes(file: Path) -> bytes:
    """What a small file holds.

    Raises:
        OSError: It is no plain file, cannot be read, or is not small.
    """
    try:
        with open_plain(file) as stream:
            if (size := os.fstat(stream.fileno()).st_size) > MOST:
                raise OSError(errno.EFBIG, f"{size:,} bytes are more than such a file has")
            return stream.read(MOST)
    except ValueError as error:  # a zero byte in its name
        raise OSError(errno.EINVAL, str(error)) from error


def read_json(
    file: Path, kind: Any = Any, *, error: type[ModelMergeError] = CheckpointError, hint: str | None = None
) -> Any:
    """What a file of JSON holds, which must be of a kind, see `check`.

    Raises:
        ModelMergeError: It cannot be read, is no JSON, or of another kind; an `error`, which names file and entry.
    """
    try:
        return check(parse_json(read_bytes(file)), kind)
    except FileNotFoundError as reason:
        raise error(f"{file}: no such file") from reason
    except OSError as reason:
        raise error(f"{file}: cannot be read: {reason.strerror}") from reason
    except Malformed as reason:
        raise error(f"{file}: malformed: {reason}", hint=hint) from reason
    except ValueError as reason:
        raise error(f"{file}: not valid JSON: {reason}", hint=hint) from reason


def read_entries(file: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty where there is none that can be read, for it is only looked at."""
    try:
        content = parse_json(read_bytes(file))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_json(content: bytes) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: It is none, or goes deeper or has larger numbers than any document.
    """
    try:
        text = content.decode(json.detect_encoding(content))
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None
    strings = _SURROGATE.search(text) is not None
    level, depth = [value], 0
    while level:  # by depth, for a recursion could go too deep
        depth += 1
        if depth > _DEEP:
            raise ValueError(f"it is nested more than {_DEEP} deep")
        below: list[Any] = []
        for each in level:
            if type(each) is dict:
                below += each.values()
                if strings:
                    "".join(each).encode(errors="surrogateescape")  # names of files may be no Unicode
            elif type(each) is list:
                below += each
            elif type(each) is int:
                _refuse_large(each)
            elif strings and type(each) is str:
                each.encode(errors="surrogateescape")
        level = below
    return value


def _refuse_large(number: int) -> None:
    if number.bit_length() > _BITS:
        raise ValueError(f"it has a number of more than {_BITS * 3 // 10} digits")


def parse_yaml(text: str) -> Any:
    """What a YAML text says, which has no key twice.

    Raises:
        ValueError: It is no YAML, or costs more than any configuration.
    """
    documents = parse_documents(text)
    if len(documents) > 1:
        raise ValueError(f"it has {len(documents)} documents, and one is expected")
    return documents[0] if documents else None


def parse_documents(text: str) -> list[Any]:
    """What the documents of a YAML text say, none of which has a key twice.

    Raises:
        ValueError: It is no YAML, or costs more than any configuration.
    """
    try:
        for _ in _events(text):
            pass
        return list(yaml.load_all(text, _UniqueLoader))
    except Malformed:
        raise
    except Exception as error:  # its constructors raise anything, at dates and numbers that are none
        raise ValueError(" ".join(str(error).split())[:500]) from error


def top_entries(text: str) -> dict[str, str]:
    """The entries of a YAML mapping whose values are plain words; all else is passed over.

    Raises:
        ValueError: It is no YAML, or costs more than any front matter.
    """
    entries: dict[str, str] = {}
    depth, key = 0, None
    try:
        for event in _events(text):
            if depth == 0 and isinstance(event, yaml.SequenceStartEvent):
                raise Malformed("it is a list")
            if depth == 1 and isinstance(event, yaml.ScalarEvent) and key is None:
                key = event.value
                continue
            if depth == 1 and isinstance(event, yaml.ScalarEvent) and event.value not in ("", "~", "null"):
                entries[str(key)] = event.value
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            key = key if depth > 1 else None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(" ".join(str(error).split())[:500]) from error
    return entries


def _events(text: str) -> Any:
    """The events of a YAML text, which is refused as soon as it has too many."""
    if len(text) > _MOST_YAML:
        raise Malformed(f"it has {len(text):,} characters")
    sizes: dict[str | None, int] = {}  # by anchor, the nodes that an alias stands for
    inside: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, _Loader):
        anchor = getattr(event, "anchor", None)
        total += 1
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append((anchor, total))
            if len(inside) > _DEEP:
                raise Malformed(f"it is nested more than {_DEEP} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            start, first = inside.pop()
            if start:
                sizes[start] = total - first
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise Malformed(f"its alias '{str(anchor)[:60]}' stands inside what it stands for, or for nothing")
            total += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            if anchor:
                sizes[anchor] = 1
            if event.implicit[0] and len(event.value) > _LONG:
                raise Malformed(f"it has a word of {len(event.value):,} characters")
        if total > _NODES:
            raise Malformed(f"it has more than {_NODES:,} nodes, each counted as often as aliases stand for it")
        yield event


class _UniqueLoader(_Loader):  # type: ignore[misc]
    """The safe loader, which also refuses a key that comes twice or is no text, and numbers of no machine."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice[0]}' comes twice", node.start_mark)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if not key.tag.endswith((":str", ":merge")):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        if type(value) is int:
            _refuse_large(value)
        return value


class Malformed(ValueError):
    """A document that is not of the kind that it should be; the sentence begins with the entry."""


_NOUNS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def check(value: Any, kind: Any, place: str = "") -> Any:
    """A document's value, which must be of a kind: a type with its parts, as an annotation says it.

    Known are `Any`, `None`, `str`, `bool`, `int` (of 64 bits), `float` (finite, or whole), `Literal`, unions, lists and
    tuples of any length, mappings with keys of text, and typed dicts, whose other entries are not looked at.

    Raises:
        Malformed: It is of another; the message names the entry.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        return _check_entries(value, kind, place)
    if origin in (typing.Union, types.UnionType):
        nested = [part for part in parts if _is_of(value, part)]
        if nested:
            return check(value, nested[0], place)
    elif origin is Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return value
    elif _is_of(value, kind):
        if parts and parts[-1] is str and isinstance(value, dict) and set(map(type, value.values())) <= {str}:
            return value  # a map of a million tensors, at once
        if origin in (list, tuple):
            for i, each in enumerate(value):
                check(each, parts[0], f"{place}[{i}]")
        elif isinstance(value, Mapping) and parts:
            for key, each in value.items():
                check(each, parts[1], f"{place}.{str(key)[:60]}".removeprefix("."))
        return value
    raise Malformed(f"{place or 'it'} must be {_noun(kind)}, not {shown(value)}")


def _check_entries(value: Any, kind: Any, place: str) -> Any:
    """A value that must be a typed dict."""
    if not isinstance(value, dict):
        needed = f" with {', '.join(sorted(kind.__required_keys__))}" if kind.__required_keys__ else ""
        raise Malformed(f"{place or 'it'} must be an object{needed}, not {shown(value)}")
    for key, part in typing.get_type_hints(kind).items():
        inside = f"{place}.{key}".removeprefix(".")
        if key in value:
            check(value[key], part, inside)
        elif key in kind.__required_keys__:
            raise Malformed(f"{inside} is missing")
    return value


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, its parts not looked at."""
    origin = typing.get_origin(kind) or kind
    if origin is Any:
        return True
    if origin is None or origin is type(None):
        return value is None
    if typing.is_typeddict(origin) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return isinstance(value, dict)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if origin is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if origin is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in typing.get_args(kind))
    return isinstance(value, origin)


def _noun(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_noun, parts)))
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (list, tuple):
        return "a list"
    return _NOUNS.get(kind, "an object")
