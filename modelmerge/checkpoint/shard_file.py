"""One weight file of an output while it grows."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from modelmerge.checkpoint.digest import WrittenDigest
from modelmerge.checkpoint.layout import Shard
from modelmerge.checkpoint.scratch import claim_space, write_all


class ShardFile:
    """A weight file that is written in pieces; `missing` are the bytes that are still to come."""

    def __init__(self, path: Path, shard: Shard) -> None:
        """Make the file, with its header."""
        self.shard = shard
        self.missing = shard.file_bytes - len(shard.header)
        self._mutex = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0o666 and not more: the umask decides, as for any file a user makes.
        self._file = WrittenDigest(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
        try:
            self._write(memoryview(shard.header), 0)
        except BaseException:
            self.close()
            raise

    def claim_space(self) -> None:
        """Claim the room for all that is to come: a full disk shows now."""
        claim_space(self._file.descriptor, self.shard.file_bytes)

    def write(self, tensor: str, offset: int, data: memoryview) -> bool:
        """Write a piece of a tensor, `offset` bytes from its start; whether it was the last that was missing.

        From any thread, in any order, each byte once.
        """
        self._write(data, self.shard.tensors[tensor] + offset)
        with self._mutex:
            self.missing -= len(data)
            return self.missing == 0

    def finish(self) -> str:
        """Have the bytes on the disk; their sha256."""
        os.fsync(self._file.descriptor)
        return self._file.finish()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _write(self, data: memoryview, start: int) -> None:
        write_all(self._file.descriptor, data, start)
        self._file.wrote(start, data)
