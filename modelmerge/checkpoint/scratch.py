"""Room on the disk, claimed before the work: a full disk shows then, not after hours."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from modelmerge.errors import OutputError

FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is used up",
         errno.EFBIG: "the file is larger than this system allows"}  # fmt: skip
_LONGEST = 255  # bytes of a name in most file systems
_sync_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
_BEGIN = 2  # of its flags: begin to write, and wait for nothing
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of calls that a file system lacks


def hidden_beside(target: Path, ending: str) -> Path:
    """A hidden place beside a file or directory, `.NAME.ending`; of a name as long as names can be, without its end."""
    start = os.fsencode(target.name)
    if len(start) + len(ending) + 2 > _LONGEST:
        digest = hashlib.sha256(start).hexdigest()[:16]
        start = start[: _LONGEST - len(ending) - 20] + b"-" + digest.encode()
    return target.with_name(f".{os.fsdecode(start)}.{ending}")


def reason(error: OSError) -> str:
    """Why something could not be written."""
    return FULL.get(error.errno or 0) or error.strerror or str(error)


def claim_space(descriptor: int, nbytes: int) -> None:
    """Make a file so many bytes long and, where the file system can, claim its space: a full disk shows now."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    os.ftruncate(descriptor, nbytes)


def begin_sync(descriptor: int, start: int, stop: int) -> None:
    """Have these bytes of a file on their way to the disk, where the system can: the end then waits for less."""
    if _sync_range is not None:
        _sync_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(stop - start), _BEGIN)


def check_room(directory: Path, nbytes: int) -> None:
    """Refuse a place on a disk that has not so many bytes free.

    Raises:
        OutputError: It has not.
    """
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise OutputError(
            f"the output needs {nbytes:,} bytes and {directory} has {free:,} free",
            hint="free some space or name another place",
        )


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write data at a position, in bytes from the start."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


class Scratch:
    """A nameless file of so many bytes, written and read in any order from any thread; gone with its process."""

    def __init__(self, directory: Path, nbytes: int) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by its owner
        try:
            if nbytes:
                claim_space(self._file.fileno(), nbytes)
        except OSError:
            self._file.close()
            raise

    def write(self, place: int, data: memoryview) -> None:
        """Write at a place, in bytes from the start."""
        write_all(self._file.fileno(), data, place)

    def read_into(self, place: int, data: memoryview) -> None:
        """Fill `data` with what was written at a place."""
        done = 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], place + done)

    def close(self) -> None:
        """Let go of the file, which frees its bytes."""
        self._file.close()


class NamedScratch(Scratch):
    """A scratch file that others find by its name; it takes its bytes as they come."""

    def __init__(self, path: Path, *, new: bool) -> None:
        self._file = path.open("w+b" if new else "rb")  # type: ignore[assignment]

    def finish(self) -> None:
        """Have what was written on the disk, and let go of the file."""
        os.fsync(self._file.fileno())
        self.close()


Room = Callable[[int], Scratch]  # gives room of so many bytes on the disk


@contextlib.contextmanager
def scratches(output: Path) -> Iterator[Room]:
    """Gives room beside an output that is not being written yet, for as long as the block lasts.

    Raises:
        OutputError: There is not so much.
    """
    folder = next(parent for parent in output.resolve().parents if parent.is_dir())
    with contextlib.ExitStack() as stack:

        def make(nbytes: int) -> Scratch:
            try:
                scratch = Scratch(folder, nbytes)
            except OSError as error:
                what = f"cannot keep {nbytes:,} bytes in {folder}: {reason(error)}"
                raise OutputError(what, hint="name another place or make room") from error
            stack.callback(scratch.close)
            return scratch

        yield make
