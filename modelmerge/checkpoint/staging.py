"""Writing a checkpoint so that nothing at DIR ever looks complete and is not.

Everything is written into a staging directory beside DIR, `.DIR.modelmerge`, which takes DIR's place in one rename at
the very end. The staging directory is locked while a run lives; a directory that can be locked belongs to a dead run
and is cleared, or taken up again on request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from modelmerge import interrupts
from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.output import refuse_content
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.scratch import Scratch, check_room, hidden_beside, reason
from modelmerge.checkpoint.shard_file import ShardFile
from modelmerge.checkpoint.work import job_at, work_folder
from modelmerge.errors import OutputError, named

_JOURNAL = ".journal.json"


def clear_remains(output: Path) -> None:
    """Remove what a run that was killed after it had replaced the output has left beside it."""
    staging = Staging(output, Layout((), {}, {}))
    if staging.has_remains:
        with contextlib.suppress(OSError, OutputError), interrupts.held():  # another run's, or out of reach
            staging.clear_remains()


def fingerprints(output: Path) -> Iterator[str]:
    """The fingerprints of what a resumed run may take up.

    Shards, of a merge that was shared out too, scores of a search, or the whole.
    """
    target = output.resolve()
    if (job := job_at(output)) is not None:
        yield str(job.get("digest"))
    for file in (hidden_beside(target, "modelmerge") / _JOURNAL, target / MANIFEST):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(file.read_bytes())
            yield str(content["fingerprint"])
            yield str(content["searched"]["fingerprint"])


class Staging(Publication):
    """The directory in which an output grows, and what has been written there.

    Use as a context manager: on an error nothing is left behind (or, with `resume`, finished shards are).

    Args:
        output: Where the result will be.
        layout: Its weight files.
        force: Replace what is at `output`, even what appears there during the run.
        resume: Keep finished shards and what was noted down when interrupted, and take up that of a run with the same
            `fingerprint`.
        fingerprint: Digest of everything that determines the weights' bytes.
        beside: Bytes of the files beside the weights; they are kept free from the start.
        hand_on: Hears of each weight file that is finished: its place in the output, and where it lies until then.
    """

    def __init__(
        self, output: Path, layout: Layout, *, force: bool = False, resume: bool = False, fingerprint: str = "",
        beside: int = 0, hand_on: Callable[[str, Path], object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(output, hidden_beside(output.resolve(), "modelmerge"), layout, force=force)
        self._resume = resume
        self._fingerprint = fingerprint
        self._beside = beside
        self._hand_on = hand_on
        self.noted: list[Any] = []  # what a resumed run finds again beside shards; plain data
        self._files: dict[str, ShardFile] = {}  # by name, those that this run writes
        self._scratches: list[Scratch] = []
        self._reserve: Scratch | None = None  # room for the files beside the weights, until they are written
        self._mutex = threading.Lock()
        self._lock = -1

    def __enter__(self) -> Staging:
        # A signal meanwhile is heeded between two shards, where it is known what has to go.
        with self._explained("prepare the output"), interrupts.held():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if (shared := work_folder(self._target)).exists():
                hint = f"finish it with {named('cluster')} files, or remove that folder"
                raise OutputError(f"{shared} has the work of a merge that is shared out", hint=hint)
            self._lock = _claim(self._directory, self._target)
            try:
                self.recover()
                refuse_content(self._target, force=self._force)
                self._clear()
                self._check_space(self._beside)
                self._keep_free()
                self._make_shards()
            except BaseException:
                self._close(abandon=True)
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with interrupts.held():
            self._close(abandon=error is not None)

    def _close(self, *, abandon: bool) -> None:
        for file in self._files.values():
            file.close()
        for scratch in (*self._scratches, self._reserve):
            if scratch is not None:
                scratch.close()
        if abandon:
            self._abandon()
        os.close(self._lock)

    @property
    def kept(self) -> int:
        """How many finished weight files an error leaves for the next run."""
        return sum(shard.filename in self.digests for shard in self._layout.shards) if self._resume else 0

    @property
    def has_remains(self) -> bool:
        """Whether something lies beside the output that a run of another process has left or works on."""
        return self._directory.exists() or self._retired.exists()

    def clear_remains(self) -> None:
        """Remove that, where no run works on it and the output is there.

        Raises:
            OutputError: One does.
        """
        self._lock = _claim(self._directory, self._target)
        self.recover()
        self._resume = False
        self._close(abandon=True)

    def spool(self) -> BinaryIO:
        """A nameless file beside the output, for what cannot be laid out before all of it is known."""
        with self._explained("write beside the output"):
            return tempfile.TemporaryFile(dir=self._directory)

    def note_down(self, entry: Any) -> None:
        """Keep plain data for a run that takes this one up."""
        with self._mutex, self._explained("note down what is done"):
            self.noted.append(entry)
            self._write_journal()

    def scratch(self, nbytes: int) -> Scratch:
        """Room of so many bytes beside the output, for as long as the staging directory is there.

        Raises:
            OutputError: There is not so much, which shows before the work, not after.
        """
        with self._explained(f"keep {nbytes:,} bytes beside the output"):
            scratch = Scratch(self._directory, nbytes)
        self._scratches.append(scratch)
        return scratch

    def lay_out(self, layout: Layout) -> None:
        """Make the weight files of a layout that was not known when the output was prepared."""
        with self._explained("prepare the output"):
            self._layout = layout
            self._check_space(0)
            self._make_shards()

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for what is no part of the output; it goes with the block, or with what a dead run has left."""
        folder = self._directory / ".scratch"
        with self._explained("write beside the output"):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, directory: Path, digests: Mapping[str, str]) -> None:
        """Move files of these sha256 here, by their places in a directory on the same disk."""
        with self._explained("put files in place"):
            for name, digest in digests.items():
                (self._directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(directory / name, self._directory / name)
                self.digests[name] = digest

    def is_finished(self, tensor: str) -> bool:
        """Whether nothing is to be done for a tensor: its shard is there already, or no shard here has it."""
        shard = self._layout.shard_of.get(tensor)
        return shard is None or shard.filename in self.digests

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write a piece of a tensor, `offset` bytes from its start. From any thread, in any order, each byte once.

        What an interrupted run has finished is left as it is.
        """
        file = self._files.get(self._layout.shard_of[tensor].filename)
        if file is None:
            return
        interrupts.check()
        with self._explained(f"write tensor '{tensor}'"):
            if file.write(tensor, offset, data):
                self._finish(file)

    def write_if_wanted(self, tensor: str, offset: int, data: memoryview) -> None:
        """`write`, where the layout has a place for the tensor."""
        if tensor in self._layout.shard_of:
            self.write(tensor, offset, data)

    def write_file(self, name: str, content: bytes | Path) -> None:
        """As a publication does, in the room that was kept for it."""
        if self._reserve is not None:
            self._reserve.close()
        super().write_file(name, content)

    def publish(self, manifest: bytes) -> None:
        """As a publication does."""
        unfinished = [name for name, file in self._files.items() if file.missing]
        assert not unfinished, f"published with unwritten bytes in {unfinished}"
        super().publish(manifest)

    def _tidy(self) -> None:
        (self._directory / _JOURNAL).unlink(missing_ok=True)

    def _clear(self) -> None:
        """Take up the finished shards of the same job, where that is wanted; remove all else."""
        if self._resume:
            try:
                journal = json.loads((self._directory / _JOURNAL).read_bytes())
            except (OSError, ValueError):
                journal = {}
            if journal.get("fingerprint") == self._fingerprint:
                self.noted = journal.get("noted", [])
                for name, digest in journal["finished"].items():
                    if (self._directory / name).is_file() and sha256(self._directory / name) == digest:
                        self.digests[name] = digest
        for folder, _, names in os.walk(self._directory, topdown=False):
            for name in names:
                path = Path(folder, name)
                if str(path.relative_to(self._directory)) not in self.digests:
                    path.unlink()
            if not os.listdir(folder) and Path(folder) != self._directory:
                os.rmdir(folder)
        self._write_journal()

    def _check_space(self, beside: int) -> None:
        weights = sum(shard.file_bytes for shard in self._layout.shards if shard.filename not in self.digests)
        check_room(self._target.parent, weights + beside)

    def _keep_free(self) -> None:
        try:
            self._reserve = Scratch(self._directory, self._beside)
        except OSError as error:
            if error.errno != errno.EFBIG:  # no single file may be so large, and none of them is
                raise

    def _make_shards(self) -> None:
        for shard in self._layout.shards:
            interrupts.check()
            if shard.filename in self.digests:
                continue
            file = self._files[shard.filename] = ShardFile(self._directory / shard.filename, shard)
            file.claim_space()
            if not file.missing:
                self._finish(file)

    def _finish(self, file: ShardFile) -> None:
        digest = file.finish()
        with self._mutex:
            self.digests[file.shard.filename] = digest
            self._write_journal()
        if self._hand_on is not None:
            self._hand_on(file.shard.filename, self._directory / file.shard.filename)

    def _write_journal(self) -> None:
        if self._resume:
            journal = {"fingerprint": self._fingerprint, "finished": self.digests, "noted": self.noted}
            temporary = self._directory / f"{_JOURNAL}.new"
            temporary.write_text(json.dumps(journal))
            os.replace(temporary, self._directory / _JOURNAL)

    def _abandon(self) -> None:
        if not (self._resume and (self.digests or self.noted)):
            shutil.rmtree(self._directory, ignore_errors=True)


def _claim(directory: Path, target: Path) -> int:
    """Make and lock the staging directory; its open descriptor.

    The lock lies on the directory itself, so that it goes with it and leaves no file behind.
    """
    while True:
        directory.mkdir(exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(
                f"another run is writing {target}", hint="wait for it, or name another directory"
            ) from None
        except OSError as error:
            os.close(descriptor)
            with contextlib.suppress(OSError):  # what a dead run left there stays
                directory.rmdir()
            raise OutputError(
                f"cannot lock {directory}: {reason(error)}", hint="name a place on a file system that has locks"
            ) from error
        # The run that held it may have renamed it into place while we waited for the lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), directory.stat()):
                return descriptor
        os.close(descriptor)
