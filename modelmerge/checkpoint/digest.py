"""sha256 of files: of inputs while they are read, of outputs while they are written, of anything at rest.

A digest follows the reads or writes: what the merge has just read or written is in the processor's or the page cache,
so hashing it costs no second trip to the disk, however large the model, and no pass of its own at the end. An input's
digest once taken is remembered by path, inode, size and modification time, as build tools do, so that merging the same
experts again hashes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

from modelmerge.checkpoint.scratch import begin_sync
from modelmerge.errors import CheckpointError

_SYNCED = 1 << 25  # bytes that go to the disk at a time
_CHUNK = 1 << 18  # bytes: fits the cache beside the merge's own buffers
_OURS: dict[str, dict[str, object]] = {}  # by path: files that this process has written, as they were then
_SETTLED = 2.0  # seconds: a file younger than this may change again within one tick of its timestamp


class _Follower:
    """The sha256 of an open file, as far as it has come."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.descriptor = descriptor
        self._file = file
        self._hash = hashlib.sha256()
        self._position = 0
        self._lock = threading.Lock()
        self._sha256: str | None = None  # of the whole

    def follow(self, start: int, data: memoryview) -> None:
        """Hash on as far as these bytes of the file, unless another thread is at it: then a later call catches up."""
        stop = start + len(data)
        if self._sha256 is None and stop > self._position and self._lock.acquire(blocking=False):
            try:
                if start == self._position:
                    self._hash.update(data)
                    self._position = stop
                self._advance(stop)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _advance(self, position: int) -> None:
        buffer = memoryview(bytearray(min(_CHUNK, max(position - self._position, 1))))
        while self._position < position:
            count = os.preadv(self.descriptor, [buffer[: position - self._position]], self._position)
            if not count:
                raise CheckpointError(f"{self._file}: ended before its {position} bytes were read")
            self._hash.update(buffer[:count])
            self._position += count


class WrittenDigest(_Follower):
    """A file that is open for writing, and its sha256 as far as it is there without a gap."""

    def __init__(self, file: Path, descriptor: int) -> None:
        """Of an open file, which is closed with it."""
        super().__init__(file, descriptor)
        self._there = 0  # bytes from the start without a gap
        self._beyond: dict[int, int] = {}  # what lies after a gap, from a byte to a byte
        self._mutex = threading.Lock()

    def wrote(self, start: int, data: memoryview) -> None:
        """Hash on and begin to sync, now that these bytes are there; from any thread, in any order, each byte once."""
        if not data:
            return
        with self._mutex:
            before = self._there // _SYNCED * _SYNCED
            self._beyond[start] = start + len(data)
            while self._there in self._beyond:
                self._there = self._beyond.pop(self._there)
            whole, after = start < self._there, self._there // _SYNCED * _SYNCED
        if after > before:
            begin_sync(self.descriptor, before, after)
        if whole:
            self.follow(start, data)

    def finish(self) -> str:
        """The sha256 of the file, in hex, now that it has no gap."""
        with self._lock:
            self._advance(self._there)
        return self._hash.hexdigest()


class FileDigest(_Follower):
    """A file that is open for reading, and its sha256 as far as reads have come."""

    def __init__(self, file: Path, planned: os.stat_result | None = None) -> None:
        """Open it; `planned` is what it was when its header was read.

        Raises:
            CheckpointError: It cannot be read, or is no longer what was planned with.
        """
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        super().__init__(file, descriptor)
        self._stat = os.fstat(descriptor)
        if planned is not None and _identity(file, planned) != _identity(file, self._stat):
            self.close()
            raise CheckpointError(f"{file}: changed since its header was read", hint="run the command again")
        self._sha256 = _recall(file, self._stat)

    def read(self, buffer: memoryview, position: int, *, follow: bool) -> int:
        """Read into `buffer` from `position` on; the bytes read. With `follow`, hash as far as that."""
        count = os.preadv(self.descriptor, [buffer], position)
        if follow:
            self.follow(position, buffer[:count])
        return count

    def finish(self) -> str:
        """The sha256 of the whole file, in hex.

        Raises:
            CheckpointError: The file changed while it was read.
        """
        try:
            now = _identity(self._file, os.stat(self._file))
        except OSError:
            now = {}
        if now != _identity(self._file, self._stat):
            raise CheckpointError(f"{self._file}: changed while it was read", hint="run the command again")
        with self._lock:
            if self._sha256 is None:
                self._advance(self._stat.st_size)
                self._sha256 = self._hash.hexdigest()
                _remember(self._file, self._stat, self._sha256)
            return self._sha256


def sha256(file: Path) -> str:
    """The sha256 of a file at rest, in hex, never from memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def vouch(file: Path, digest: str) -> None:
    """Say that this process has just written the file, with that sha256: it need not be read again to be known."""
    stat = file.stat()
    _OURS[str(file.resolve())] = {**_identity(file, stat), "sha256": digest}


def cache_directory() -> Path:
    """Where digests are remembered: `$MODELMERGE_CACHE`, else `modelmerge` under `$XDG_CACHE_HOME` or `~/.cache`."""
    if place := os.environ.get("MODELMERGE_CACHE"):
        return Path(place)
    home = os.path.expanduser("~")
    general = f"{home}/.cache" if home != "~" else os.devnull  # nowhere: in containers users may have no home
    return Path(os.environ.get("XDG_CACHE_HOME") or general) / "modelmerge"


def _entry(file: Path) -> Path:
    key = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    return cache_directory() / "sha256" / f"{key}.json"


def _identity(file: Path, stat: os.stat_result) -> dict[str, object]:
    return {
        "path": str(file.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }  # fmt: skip


def _recall(file: Path, stat: os.stat_result) -> str | None:
    ours = _OURS.get(str(file.resolve()))
    try:
        entry = dict(ours) if ours is not None else json.loads(_entry(file).read_bytes())
        digest = str(entry.pop("sha256"))
        return digest if entry == _identity(file, stat) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(file: Path, stat: os.stat_result, digest: str) -> None:
    if time.time() - max(stat.st_mtime, stat.st_ctime) < _SETTLED:
        return
    entry = _entry(file)
    # A cache that cannot be written costs time, never a result.
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**_identity(file, stat), "sha256": digest}))
        os.replace(temporary, entry)
