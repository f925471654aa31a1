"""Sparse copies of weight files: as large as the file, holding what a reader looks at before it reads tensors.

Of a safetensors file that is the header. Of PyTorch's zip archives it is the table at the end, the small entries (the
pickle is one of them), and the header in front of each storage.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modelmerge.hub.ranges import Ranges

_FIRST = 100_000  # bytes to ask for at once: most headers, and most tables of archives, are shorter
_LONGEST = 100_000_000  # bytes of the longest header or pickle that is fetched
_NEAR = 1 << 14  # bytes: parts closer than this are fetched as one
_ENTRY = 30 + 1024  # bytes of an archive's entry before its content, with room for its name and padding
_REQUESTS = 8  # at a time


def draw(file: Path, source: Ranges, size: int) -> bool:
    """Write the sparse copy of a weight file; False for a kind of which there is none.

    Raises:
        HubError: The Hub refuses, or cannot be reached.
    """
    start = source.slice(0, min(_FIRST, size))
    with file.open("wb") as stream:
        stream.truncate(size)
        stream.write(start)
        if file.suffix == ".safetensors":
            length = 8 + int.from_bytes(start[:8], "little")
            if len(start) < length <= min(size, _LONGEST):
                stream.write(source.slice(len(start), length))
            return True
        return start.startswith(b"PK\x03\x04") and _draw_archive(stream.fileno(), file, source, size)


def blank(file: Path, size: int) -> None:
    """Write a sparse copy that holds nothing: for files that are only to be seen."""
    with file.open("wb") as stream:
        stream.truncate(size)


def _draw_archive(descriptor: int, file: Path, source: Ranges, size: int) -> bool:
    start = max(size - _FIRST, 0)
    tail = source.slice(start, size)
    table = _table(tail)
    if table is None or size - table > _LONGEST:
        return False
    if table < start:
        tail, start = source.slice(table, start) + tail, table
    os.pwrite(descriptor, tail, start)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, struct.error):
        return True  # damaged: the reader says so
    parts = []
    for entry in entries:
        content = 0 if "/data/" in entry.filename else min(entry.compress_size, _LONGEST)
        parts.append((entry.header_offset, min(entry.header_offset + _ENTRY + content, size)))

    def fetch(part: tuple[int, int]) -> None:
        os.pwrite(descriptor, source.slice(*part), part[0])

    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(fetch, _joined(sorted(parts))))
    return True


def _table(tail: bytes) -> int | None:
    """Where an archive's table begins, read from its end; None where that is not to be found."""
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 20:
        return None
    (offset,) = struct.unpack("<I", tail[end + 16 : end + 20])
    if offset != 0xFFFFFFFF:
        return int(offset)
    large = tail.rfind(b"PK\x06\x06")  # the record that archives over 4 GiB have besides
    return int.from_bytes(tail[large + 48 : large + 56], "little") if large >= 0 else None


def _joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts, in order, with those that lie near one another as one."""
    ranges: list[tuple[int, int]] = []
    for start, stop in parts:
        if ranges and start <= ranges[-1][1] + _NEAR:
            ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
        else:
            ranges.append((start, stop))
    return ranges
