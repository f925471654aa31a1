"""Entries of a config.json that a merge changes; every other byte of the file stays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from modelmerge.checkpoint.configs import Config, Place, parts, text_parts

Values = Mapping[Place, Any]  # new values, by the keys that lead to them

_DTYPES = ("dtype", "torch_dtype")  # as transformers 5 writes it, and as it did before; 5 reads both
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def with_values(content: bytes, values: Values) -> bytes:
    """A JSON file, which holds an object, with other values; what it lacks is added at the end of its object."""
    encoding = json.detect_encoding(content)
    text = content.decode(encoding)
    for place, value in values.items():
        spans: dict[Place, tuple[int, int]] = {}
        start = _space(text, 0)
        spans[()] = start, _scan(text, start, (), spans)
        new = json.dumps(value)
        if place in spans:
            start, end = spans[place]
        else:
            start, _ = spans[place[:-1]]
            lead = text[start + 1 : _space(text, start + 1)]
            beside = [span[1] for other, span in spans.items() if other and other[:-1] == place[:-1]]
            start = end = max(beside, default=start + 1)
            new = f"{',' + (lead or ' ') if beside else ''}{json.dumps(place[-1])}: {new}"
        text = text[:start] + new + text[end:]
    return text.encode(encoding)


def _scan(text: str, start: int, place: Place, spans: dict[Place, tuple[int, int]]) -> int:
    """Note where each value in the object lies that begins at `start`; where the object ends."""
    at = _space(text, start + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        first = _space(text, _space(text, at) + 1)
        inner = (*place, key)
        at = _scan(text, first, inner, spans) if text[first] == "{" else _DECODER.raw_decode(text, first)[1]
        spans[inner] = first, at
        at = _space(text, at)
        at = _space(text, at + 1) if text[at] == "," else at
    return at + 1


def _space(text: str, at: int) -> int:
    """Where something stands, from `at` on."""
    match = _SPACE.match(text, at)
    assert match is not None, "no space is space, too"
    return match.end()


def dtype_values(config: Config, dtype: str | None) -> dict[Place, str]:
    """What a config must say of weights that are stored as `dtype` (None: as before), for loaders go by it."""
    if dtype is None:
        return {}
    entries = {(*place, key): part[key] for place, part in parts(config).items() for key in _DTYPES if key in part}
    if "model_type" in config and not any(key in config for key in _DTYPES):
        entries |= {(key,): None for key in _DTYPES}  # readers of either
    return {place: dtype for place, value in entries.items() if str(value).removeprefix("torch.") != dtype}


def token_values(config: Config, other: Config) -> dict[Place, Any]:
    """The ids of special tokens that a config must say where the tokenizer is that of another model.

    `other` is that model's config or generation config; what it does not say stays.
    """
    ours, theirs = (text_parts(each) for each in (config, other))
    values: dict[Place, Any] = {}
    for key in _TOKENS:
        for place in [place for place in ours if key in ours[place]] or list(ours)[-1:]:
            before = ours[place].get(key)
            sources = (theirs.get(place, {}), *theirs.values())
            value = next((source[key] for source in sources if key in source), before)
            values |= {(*place, key): value} if value != before else {}
    return values
