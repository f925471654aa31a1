"""Which row belongs to which token: the map from tokens to ids, of the tokenizer files beside a model's weights.

Files are read as what they are, JSON, text and protobuf, without the libraries that run them.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from modelmerge.checkpoint.documents import parse_json, read_bytes, read_json
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import CheckpointError

if TYPE_CHECKING:
    from modelmerge.hub.repository import RemoteFile

TOKENIZER_JSON, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
DECODER = "added_tokens_decoder"  # the entry of tokenizer_config.json
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
_LIKE = ("vocab.json", "vocab.txt", "tekken.json", "tokenizer.model", "spiece.model", "spm.model")
# Their ids are not their places in the file: such files can be told apart, and no more.
_OTHERS = ("sentencepiece.bpe.model", "source.spm", "sentencepiece.model", "vocab.bpe")
_RANKED = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n?")  # a line of a tiktoken file
_MERGES, _LAST = re.compile(rb'"merges"\s*:\s*\['), re.compile(rb"\]\s*\}\s*\}\s*\Z")
_BLOCK = 1 << 20
_IDS = 1 << 31  # no id is so large


class Tokenizer:
    """A model's tokenizer, as far as its files tell.

    Args:
        model: Whose it is.
        main: The file that has the vocabulary.
        more: Files that may add tokens to it, by name.
    """

    def __init__(self, model: Checkpoint, main: _File, more: Mapping[str, _File]) -> None:
        self.model, self.main, self._more = model, main, more

    @cached_property
    def ids(self) -> dict[str, int] | None:
        """The id of every token; None where its files are of a kind that cannot be read.

        Raises:
            CheckpointError: A file is malformed.
        """
        if self._vocabulary is None:
            return None
        ids = dict(self._vocabulary)
        for token, (place, _) in self.additions.items():
            ids.setdefault(token, place)
        return ids

    @cached_property
    def _vocabulary(self) -> dict[str, int] | None:
        """The ids in the main file, without what was added; None where it is of a kind that cannot be read."""
        read = next((read for names, read in _READERS if self.main.name.endswith(names)), None)
        return None if read is None else read(self.main.here())

    @cached_property
    def additions(self) -> dict[str, tuple[int, dict[str, bool]]]:
        """The id and the flags of every token that was added to the vocabulary."""
        entries: dict[str, tuple[int, dict[str, bool]]] = {}
        if self.main.name == TOKENIZER_JSON:
            file = self.main.here()
            entries_there = _object(file, _json(file)).get("added_tokens") or []
            for entry in entries_there if isinstance(entries_there, list) else [None]:
                if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                    raise _malformed(file, "an entry of added_tokens has no content")
                entries[entry["content"]] = _id(file, entry.get("id")), _flags(entry)
        return self._overlay | entries

    @cached_property
    def _overlay(self) -> dict[str, tuple[int, dict[str, bool]]]:
        """The tokens that small files add."""
        entries: dict[str, tuple[int, dict[str, bool]]] = {}
        if ADDED in self._more:
            file = self._more[ADDED].here()
            entries = {token: (place, _flags({})) for token, place in _ids(file, _json(file)).items()}
        if CONFIG in self._more:
            file = self._more[CONFIG].here()
            for place, entry in _object(file, _object(file, _json(file)).get(DECODER) or {}).items():
                if isinstance(entry, str):
                    entry = {"content": entry}
                if not place.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                    raise _malformed(file, f"an entry of {DECODER} is no token")
                entries[entry["content"]] = _id(file, int(place[:20])), _flags(entry)
        return entries

    @property
    def following(self) -> int | None:
        """The id that a further token gets; None where tokens cannot be added to files of that kind."""
        name = self.main.name
        ranked = name.endswith((".tiktoken", "tekken.json")) or (
            name.endswith(".model") and _RANKED.match(self.main.here().read_bytes()) is not None
        )
        if ranked or self.ids is None or self._vocabulary is None:
            return None
        if name == TOKENIZER_JSON:
            # As the tokenizers library counts, which does not heed the id that the file states.
            return max([len(self._vocabulary), *(place + 1 for place, _ in self.additions.values())])
        return max(self.ids.values(), default=-1) + 1

    def same_files(self, other: Tokenizer) -> bool:
        """Whether it is, to the byte, the other's: then no vocabulary needs to be read."""
        return self.main.same(other.main) and (
            (
                self._more.keys() == other._more.keys()
                and all(file.same(other._more[name]) for name, file in self._more.items())
            )
            or self._overlay == other._overlay
        )


def tokenizer_of(model: Checkpoint) -> Tokenizer | None:
    """The tokenizer beside a model's weights; None where none of its files is there.

    Nothing is read yet.
    """
    files = _beside(model)
    names = [TOKENIZER_JSON, *_LIKE, *(name for name in files if name.endswith(".tiktoken")), *_OTHERS]
    main = next((files[name] for name in names if name in files), None)
    more = {name: files[name] for name in (ADDED, CONFIG) if name in files}
    return None if main is None else Tokenizer(model, main, more)


def with_tokenizer_of(model: Checkpoint, folder: str) -> Checkpoint:
    """The model with the folder for its own where a component's tokenizer lies: beside it, or as pipelines have it.

    That is `tokenizer_2/` for `text_encoder_2/`; a model without either is as one without a tokenizer.
    """
    if model.directory is None:
        return model
    own, other = (model.directory / name for name in (folder, folder.replace("text_encoder", "tokenizer")))
    return replace(model, directory=own if tokenizer_of(replace(model, directory=own)) else other)


@dataclass(frozen=True, slots=True)
class _File:
    """A file beside a model's weights, on the disk or still on the Hub."""

    model: Checkpoint
    name: str

    @property
    def _path(self) -> Path:
        assert self.model.directory is not None, "it lies in a directory"
        return self.model.directory / self.name

    @property
    def _remote(self) -> RemoteFile | None:
        remote = self.model.reference.repository
        return None if remote is None else remote.files[remote.place(self._path)]

    def _digests(self, other: _File) -> tuple[str | None, str | None]:
        """The file's sha256 and git's digest, as far as the Hub knows them or the other's are to be compared."""
        mine, theirs = self._remote, other._remote
        if mine is not None:
            return mine.sha256, None if mine.sha256 else mine.blob
        if theirs is None:
            return None, None
        content = self._path.read_bytes()
        return hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def here(self) -> Path:
        """The file on the disk, fetched if need be."""
        remote = self.model.reference.repository
        if remote is not None and not self._path.exists():
            remote.bring(remote.place(self._path))
        return self._path

    def same(self, other: _File) -> bool:
        """Whether two files have the same bytes; where the Hub's digests tell, nothing is fetched."""
        try:
            for mine, theirs in zip(self._digests(other), other._digests(self), strict=True):
                if mine and theirs:
                    return mine == theirs
            one, two = self.here(), other.here()
            if one.stat().st_size != two.stat().st_size:
                return False
            with one.open("rb") as first, two.open("rb") as second:
                while block := first.read(_BLOCK):
                    if block != second.read(_BLOCK):
                        return False
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be compared with {other._path}: {error.strerror}") from error
        return True


def _beside(model: Checkpoint) -> dict[str, _File]:
    """The files beside a model's weights, by name."""
    if model.directory is None:
        return {}
    remote = model.reference.repository
    if remote is None:
        there = model.directory.iterdir() if model.directory.is_dir() else ()
        return {path.name: _File(model, path.name) for path in there if path.is_file()}
    folder = PurePosixPath(remote.place(model.directory))
    places = map(PurePosixPath, remote.files)
    return {place.name: _File(model, place.name) for place in places if place.parent == folder}


# --- the kinds of files ---


def _of_tokenizer_json(file: Path) -> dict[str, int] | None:
    model = _object(file, _json(file)).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if vocabulary is None:
        return None
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary):
            raise _malformed(file, "an entry of its vocab is no piece with a score")
        return {entry[0]: place for place, entry in enumerate(vocabulary)}
    return _ids(file, vocabulary)


def _of_lines(file: Path) -> dict[str, int]:
    try:
        return {
            line.rstrip("\r"): place
            for place, line in enumerate(file.read_text("utf-8").removesuffix("\n").split("\n"))
        }
    except (OSError, ValueError) as error:
        raise _malformed(file, f"it is no text: {error}") from error


def _of_tekken(file: Path) -> dict[str, int]:
    content = _object(file, _json(file))
    try:
        config = content["config"]
        special = int(config["default_num_special_tokens"])
        room = int(config["default_vocab_size"]) - special
        ids = {entry["token_str"]: int(entry["rank"]) for entry in content.get("special_tokens") or ()}
        for entry in content["vocab"]:
            if entry["rank"] < room:
                ids.setdefault(_as_text(base64.b64decode(entry["token_bytes"])), special + int(entry["rank"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _malformed(file, f"not as tekken.json is ({type(error).__name__}: {error})") from error
    return _ids(file, ids)


def _of_model(file: Path) -> dict[str, int]:
    """The pieces of a SentencePiece model, or the tokens of a tiktoken file."""
    try:
        content = file.read_bytes()
        if _RANKED.match(content):
            pairs = [line.split() for line in content.splitlines() if line.strip()]
            ranks = {_as_text(base64.b64decode(token, validate=True)): int(rank) for token, rank in pairs}
            return _ids(file, ranks)
        # ModelProto has repeated SentencePiece pieces = 1, of which piece = 1 is the text.
        pieces = [value for field, value in _fields(memoryview(content)) if field == 1]
        texts = [next(text for field, text in _fields(piece) if field == 1) for piece in pieces]  # type: ignore[arg-type]
        if not texts:
            raise ValueError("it has no pieces")
        return {str(text, "utf-8"): place for place, text in enumerate(texts)}  # type: ignore[arg-type]
    except (OSError, ValueError, IndexError, TypeError, StopIteration, binascii.Error) as error:
        raise _malformed(file, f"neither a SentencePiece model nor a tiktoken file ({error})") from error


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a protobuf message: number and value, of numbers of fixed width their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number without an end")

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 2: -1, 5: 4}[kind] if kind in (1, 2, 5) else 0
        size = varint() if size < 0 else size
        if not kind or kind not in (1, 2, 5) or at + size > len(message):
            raise ValueError("its fields do not fit it")
        yield key >> 3, message[at : at + size]
        at += size


_READERS: tuple[tuple[tuple[str, ...], Callable[[Path], dict[str, int] | None]], ...] = (
    ((TOKENIZER_JSON,), _of_tokenizer_json),
    (("vocab.json",), lambda file: _ids(file, _json(file))),
    (("vocab.txt",), _of_lines),
    (("tekken.json",), _of_tekken),
    (("tokenizer.model", "spiece.model", "spm.model", ".tiktoken"), _of_model),
)


def _printable() -> dict[int, str]:
    """A letter for each byte, as byte-level tokenizers write it: printable ones are themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = count(0x100)
    return {byte: chr(byte if byte in plain else next(others)) for byte in range(256)}


_LETTERS = _printable()


def _as_text(token: bytes) -> str:
    """A token of bytes in the letters that tokenizer.json has for it, so that both are one."""
    return "".join(map(_LETTERS.__getitem__, token))


def _ids(file: Path, content: Any) -> dict[str, int]:
    ids = _object(file, content)
    if not set(map(type, ids)) <= {str}:
        raise _malformed(file, "a token in its vocabulary is no text")
    if not all(type(place) is int and 0 <= place < _IDS for place in ids.values()):
        raise _malformed(file, f"an id in its vocabulary is no number from 0 to {_IDS - 1}")
    return dict(ids)


def _id(file: Path, value: Any) -> int:
    return _ids(file, {"": value})[""]


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry.get(flag)) for flag in FLAGS}


_READ: dict[tuple[Path, int, int], Any] = {}  # the last file, which is asked for its vocabulary and what was added


def _json(file: Path) -> Any:
    stat = file.stat()
    key = file, stat.st_size, stat.st_mtime_ns
    if key not in _READ:
        _READ.clear()
        _READ[key] = _without_merges(file) if file.name == TOKENIZER_JSON else read_json(file)
    return _READ[key]


def _without_merges(file: Path) -> Any:
    """A tokenizer.json, without the half of it that tells how tokens are put together, where that comes last."""
    content = read_bytes(file)
    merges = _MERGES.search(content)
    if merges and _LAST.search(content, len(content) - 100) and b'"added_tokens"' in content[: merges.start()]:
        with contextlib.suppress(ValueError):
            return parse_json(content[: merges.start()] + b'"merges": []}}')
    return read_json(file)


def _object(file: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _malformed(file, "not the object that it should hold")
    return content


def _malformed(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: malformed: {what}", hint="copy the tokenizer's files from the model again")
