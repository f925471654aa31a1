"""Random changes of files: of their bytes, and of what JSON, YAML, pickles and safetensors headers say."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

# Values where others were expected. `Raw` ones are put into the text as they stand.
_NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**40, 0.5, -0.0, 1e-320, 1e308, float("inf"),
    float("nan"), "", "x", "\x00", "\n", "a" * 5000, "\ud800", "\udcff", "../x", "/dev/zero", "/", "~", "hf://a/b",
    "a/b@c", "**", "[", "(((", "(.*)*x", "%s", "{}", "9" * 30, "nan", "none", "base", "union", "average", "ties",
    "1GB", "$(x)", "`", "\u202e", "<script>", [], [[]], {}, {"": {}}, [None], ["x"], [1, 2], {"x": 1}, [[[[[[]]]]]],
    {"a": {"b": {"c": {}}}}, [0] * 300, ["x"] * 300,
]  # fmt: skip
_RAW = [
    b"9" * 400, b"9" * 5000, b"-" + b"9" * 400, b"1e999", b"[" * 20000, b'{"a":' * 5000, b"[" * 200 + b"]" * 200,
    b'"\\ud800"', b"\xff", b"", b"nul", b"0x10", b"1_000",
]  # fmt: skip
_YAML = [
    b"!!bool x", b"0b_", b"2024-13-45", b"!!python/name:os.system", b"*a", b"&a [*a]", b"!!binary x", b"!!float x",
    b"{? [a] : b}", b"<<: x", b"9" * 5000, b"1:1:1:1:1", b"!!set {a}", b"!!timestamp x", b"---\n...", b"%YAML 9.9",
    b"!!int x", b"\t", b"~",
    b"[" * 3000, b"- " * 3000, b".inf", b"0o9", b"!!omap x", b"'", b"|", b"? ", b": ",
]  # fmt: skip
_OPS = [code for code in map(vars(pickle).get, vars(pickle)) if isinstance(code, bytes) and len(code) == 1]
_PIECES = (b"\x8a\xff" + b"\x01" * 255, b"h\x01h\x02\x86", b"}h\x00s", b"K\x00", b"N", b"}", b")", b"]")
_MARK = "\x01raw%d\x01"


def of_bytes(content: bytes, rng: Random) -> bytes:
    """Bytes turned over, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 30, 200))
        match rng.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                data[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
            case 5:
                del data[at:]
            case _:
                data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(data))))
    return bytes(data)


def of_json(content: bytes, rng: Random) -> bytes:
    """JSON whose entries are taken out, renamed, exchanged, nested, or have other values."""
    if rng.random() < 0.15:
        return of_bytes(content, rng)
    value = json.loads(content)
    raw: dict[str, bytes] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        value = _changed(value, rng, raw)
    text = json.dumps(value).encode()
    if rng.random() < 0.05:
        text = text.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    for mark, each in raw.items():
        text = text.replace(json.dumps(mark).encode(), each)
    if rng.random() < 0.05 and text.startswith(b"{") and b":" in text:
        text = b"{" + text[1:-1] + b"," + text[1:]  # every key twice
    return text


def _changed(value: Any, rng: Random, raw: dict[str, bytes]) -> Any:
    places = list(_places(value, ()))
    place = rng.choice(places)
    old = _at(value, place)
    kind = rng.randrange(9)
    if kind == 0 and place:
        parent = _at(value, place[:-1])
        del parent[place[-1]]
        return value
    if kind == 1 and place and isinstance(place[-1], str):
        parent = _at(value, place[:-1])
        parent[rng.choice((place[-1] + "x", "", "x" * 3000, "__class__", place[-1].upper()))] = parent.pop(place[-1])
        return value
    if kind == 2:
        new = json.loads(json.dumps(_at(value, rng.choice(places))))
    elif kind == 3:
        new = rng.choice(([old], {"x": old}, [old, old], [[[old]]]))
    elif kind == 4 and isinstance(old, int | float):
        new = rng.choice((-old, old + 1, old * 2, float(old), str(old)))
    elif kind == 5 and isinstance(old, str):
        new = rng.choice((old + old, old[: len(old) // 2], old.upper(), old + "\x00", "/" + old, old * 500, [old]))
    elif kind == 6:
        new = _MARK % len(raw)
        raw[new] = rng.choice(_RAW)
    else:
        new = rng.choice(_NASTY)
    new = copy.deepcopy(new)
    if not place:
        return new
    _at(value, place[:-1])[place[-1]] = new
    return value


def _places(value: Any, place: tuple[Any, ...]) -> Any:
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from _places(each, (*place, key))


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def of_yaml(content: bytes, rng: Random) -> bytes:
    """YAML, which is given as JSON, changed as that is, or with words that its readers stumble over."""
    if rng.random() < 0.6:
        return of_json(content, rng)
    text = content
    for _ in range(rng.choice((1, 2))):
        starts = [i + 1 for i, byte in enumerate(text) if byte in b":[,"] or [0]
        at = rng.choice(starts)
        ends = [i for i in range(at, len(text)) if text[i] in b",}]"] or [len(text)]
        text = text[:at] + b" " + rng.choice(_YAML) + b" " + text[ends[0] :]
    return text


def of_card(content: bytes, rng: Random) -> bytes:
    """A card whose front matter is changed; it is given as JSON between two lines."""
    _, front, text = content.split(b"---\n", 2)
    if rng.random() < 0.2:
        return of_bytes(content, rng)
    return b"---\n" + of_yaml(front.strip(), rng) + b"\n---\n" + text


def of_safetensors(content: bytes, rng: Random) -> bytes:
    """A safetensors file whose header is changed, or its bytes."""
    if rng.random() < 0.2:
        return of_bytes(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    header = of_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def of_pickle(content: bytes, rng: Random) -> bytes:
    """A pickle with other operations in it."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = rng.choice(_OPS)
            case 1:
                data[at:at] = rng.choice(_OPS)
            case 2:
                data[at:at] = b"(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * rng.choice((3, 45)) + b"t"
            case 3:
                data[at:at] = rng.choice(
                    (b"\x8a\xff" + b"\x01" * 255, b"h\x01h\x02\x86", b"}h\x00s", b"K\x00", b"N", b"}", b")", b"]")
                )
            case _:
                return of_bytes(bytes(data), rng)
    return bytes(data)


def of_archive(content: bytes, rng: Random) -> bytes:
    """A zip archive of torch's whose pickle is changed, or its bytes."""
    if rng.random() < 0.3:
        return of_bytes(content, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            data = of_pickle(data, rng) if entry.filename.endswith("data.pkl") else data
            data = of_bytes(data, rng) if rng.random() < 0.05 else data
            new.writestr(entry.filename, data)
    return stream.getvalue()
