"""Putting an output in place: its files lie in one directory beside DIR, which takes DIR's place in one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from modelmerge import interrupts
from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.output import refuse_content
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.scratch import FULL, UNSUPPORTED, hidden_beside, reason
from modelmerge.errors import ModelMergeError, OutputError, named


class Publication:
    """An output's files, in a directory beside its place.

    Args:
        output: Where the result will be.
        directory: Where the files are until then.
        layout: The weight files.
        force: Replace what is at `output`, even what appears there during the run.
    """

    def __init__(self, output: Path, directory: Path, layout: Layout, *, force: bool) -> None:
        self._target = output.resolve()
        self._directory = directory
        self._retired = hidden_beside(self._target, "modelmerge-old")
        self._layout = layout
        self._force = force
        self.digests: dict[str, str] = {}  # file name -> sha256, of finished files

    def write_indices(self) -> None:
        """Write the index of every checkpoint that has more than one shard."""
        for name, content in self._layout.indices.items():
            self.write_file(name, content)

    def write_file(self, name: str, content: bytes | Path) -> None:
        """Write a small file, given its content or a file to copy byte for byte."""
        path = self._directory / name
        with self._explained(f"write {name}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            data = content.read_bytes() if isinstance(content, Path) else content
            with path.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            self.digests[name] = sha256(path)

    def place_of(self, name: str) -> Path:
        """Where a file lies until the output is published."""
        return self._directory / name

    def listing(self) -> dict[str, dict[str, str | int]]:
        """The sha256 and the size in bytes of every file written so far."""
        return {
            name: {"sha256": digest, "bytes": (self._directory / name).stat().st_size}
            for name, digest in sorted(self.digests.items())
        }

    def publish(self, manifest: bytes) -> None:
        """Write the manifest, the last file, and put the whole in place of the output in one rename."""
        self.write_file(MANIFEST, manifest)
        interrupts.check()
        with self._explained("put the output in place"), interrupts.held():
            refuse_content(self._target, force=self._force)
            self._tidy()
            _sync_directory(self._directory)
            self._swap()
            _sync_directory(self._target.parent)

    def _tidy(self) -> None:
        """Remove what is no part of the output."""

    def _swap(self) -> None:
        if not self._target.exists():
            self._directory.rename(self._target)
        elif _exchange(self._directory, self._target):
            # Under its own name the old content could be taken for a dead run's; nobody takes up a retired one.
            self._directory.rename(self._retired)
            shutil.rmtree(self._retired, ignore_errors=True)
        else:
            # No atomic exchange here: between the two renames a killed run leaves the old content under another
            # name, and `recover` puts it back.
            self._target.rename(self._retired)
            try:
                self._directory.rename(self._target)
            except BaseException:
                self._bring_back()
                raise
            shutil.rmtree(self._retired, ignore_errors=True)

    def _bring_back(self) -> None:
        try:
            self._retired.rename(self._target)
        except OSError as error:
            where = f"the old content of {self._target} is in {self._retired}"
            raise OutputError(
                f"{where} and cannot be moved back: {reason(error)}", hint="move it back, or let the next run do it"
            ) from error

    def recover(self) -> None:
        """Put back the content of DIR that a run which was killed has moved away, or remove it if it is replaced."""
        if self._retired.exists():
            if self._target.exists():
                shutil.rmtree(self._retired)
            else:
                self._retired.rename(self._target)

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except ModelMergeError:
            raise
        except OSError as error:
            hint = "nothing was left at the output; name another place or make room" if error.errno in FULL else None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                hint = f"have fewer and larger shards ({named('max_shard_size')}), or allow more files: ulimit -n"
            raise OutputError(f"cannot {doing} in {self._target.parent}: {reason(error)}", hint=hint) from error


def _sync_directory(directory: Path) -> None:
    """Have a directory's entries on the disk, where the file system can: the files in it are there already."""
    # WSL has EIO for directories, and a parent may be one to write into and not to read.
    harmless = {*UNSUPPORTED, errno.EIO, errno.EACCES}
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in harmless:
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step (Linux renameat2 with RENAME_EXCHANGE); False where that cannot be had.

    Raises:
        FileNotFoundError: One is gone. To move the other away for it could hide what somebody has just put there.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    at_cwd, rename_exchange = -100, 2
    status: int = renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), rename_exchange)
    if status and ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(first))
    return status == 0
