"""A tokenizer's files with tokens more, and what a config says of tokens that are more or lie elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.configs import text_parts
from modelmerge.checkpoint.tokens import ADDED, CONFIG, DECODER, TOKENIZER_JSON

New = Mapping[str, tuple[int, dict[str, bool] | None]]  # tokens with their ids, and the flags of those that were added

# An ordinary piece of another vocabulary is cut out of texts only where it stands as a word.
_PIECE = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_VOCAB_TXT, _SIZE = "vocab.txt", "vocab_size"
_OF_TOKENS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")


def with_tokens(files: Mapping[str, bytes | Path], new: New) -> dict[str, bytes | Path]:
    """Files that lie beside weights, those of a tokenizer with new tokens that follow its last one.

    What a token is in the model that has it, special or cut out with the space beside it, it stays.

    Args:
        files: The content, or the file, by name.
        new: The tokens.
    """
    changed = dict(files)
    if not new:
        return changed
    entries = {token: (place, flags or _PIECE) for token, (place, flags) in new.items()}
    if TOKENIZER_JSON in files:
        content = _read(files[TOKENIZER_JSON])
        more = [{"id": place, "content": token, **flags} for token, (place, flags) in entries.items()]
        content["added_tokens"] = [*(content.get("added_tokens") or ()), *more]
        changed[TOKENIZER_JSON] = written_json(content)
    config = _read(files[CONFIG]) if CONFIG in files else {}
    if DECODER in config or (config and TOKENIZER_JSON not in files):
        more_by_id = {str(place): {"content": token, **flags} for token, (place, flags) in entries.items()}
        changed[CONFIG] = written_json({**config, DECODER: {**(config.get(DECODER) or {}), **more_by_id}})
    if ADDED in files or TOKENIZER_JSON not in files:
        ids = _read(files[ADDED]) if ADDED in files else {}
        changed[ADDED] = written_json({**ids, **{token: place for token, (place, _) in entries.items()}})
    if _VOCAB_TXT in files:
        lines = _content(files[_VOCAB_TXT]).decode().removesuffix("\n").split("\n")
        if len(lines) == min(place for place, _ in new.values()):  # else tokens were added that it does not list
            changed[_VOCAB_TXT] = ("\n".join([*lines, *new]) + "\n").encode()
    return changed


def moved_ids(config: Mapping[str, Any], ids: Mapping[int, int]) -> dict[tuple[str, ...], Any]:
    """The entries of a config that name tokens which have other ids now, with their new values.

    Args:
        config: A config, or a generation config.
        ids: New ids by the old.
    """
    values: dict[tuple[str, ...], Any] = {}
    for place, value in _entries(config):
        if place[-1].endswith(_OF_TOKENS):
            moved = (
                [ids.get(i, i) for i in value] if _are_ids(value) else ids.get(value, value) if _is_id(value) else value
            )
            if moved != value:
                values[place] = moved
    return values


def moved_sizes(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[tuple[str, ...], int]:
    """The entries of a config that say how many rows its tables have, with their new values.

    Args:
        config: The config.
        sizes: New numbers of rows by the old.
    """
    stated = {place: value for place, value in _entries(config) if place[-1].startswith(_SIZE) and _is_id(value)}
    values = {place: sizes[value] for place, value in stated.items() if sizes.get(value, value) != value}
    if config and sizes and not any(place[-1] == _SIZE for place in stated):  # a family's default is left out
        values |= {(*list(text_parts(config))[-1], _SIZE): max(sizes.values())}
    return values


def _entries(config: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of a config and of the configs in it, by the keys that lead to it."""
    for key, value in config.items():
        if isinstance(value, dict) and len(place) < 3:
            yield from _entries(value, (*place, key))
        else:
            yield (*place, key), value


def _is_id(value: Any) -> bool:
    return type(value) is int


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _content(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def _read(file: bytes | Path) -> dict[str, Any]:
    content = json.loads(_content(file))
    return content if isinstance(content, dict) else {}


def written_json(content: Any) -> bytes:
    """A document as bytes, as other tools write it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
