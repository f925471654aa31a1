"""The folder beside DIR, `.DIR.modelmerge-work`, in which several processes share out a merge.

    job.json            what is merged, and who began
    workers/ID          one for each process, touched while it lives
    units/NAME.claim-1  who does a unit, touched while it is done; -2 and -3 are those who took it over
    units/NAME.json     the unit is done: by whom, and what is to be said of it; NAME.result is what it gave
    units/NAME.failed-1 the error that ended the attempt
    files/              the output's files as they are finished; growing/ and kept/ are what they are made from

All that is asked of the file system is that a file can be made by one process alone (O_EXCL) and that a rename is one
step: network file systems have that, and no locks on directories. How old a claim is the file server's clock says, by
the time of a file that has just been touched. Every unit gives the same bytes whoever does it, so a claim that was
taken from somebody who sleeps and wakes costs work, and does no damage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from modelmerge import interrupts
from modelmerge.checkpoint.scratch import hidden_beside
from modelmerge.errors import ModelMergeError, OutputError, UsageError, from_dict

LEASE = "MODELMERGE_LEASE"  # the variable: seconds
FORMAT = 1  # of the folder
_ATTEMPTS = 3  # what has ended so many processes will end the next one
_TRIES = 100  # of a folder that comes and goes
_LONGEST = 150  # letters of a unit's name in a file's


class Gone(Exception):
    """The work folder is no longer there: the merge is complete, or somebody has removed it."""


def work_folder(output: Path) -> Path:
    """Where the processes that merge into `output` share their work out."""
    return hidden_beside(output.resolve(), "modelmerge-work")


def job_at(output: Path) -> dict[str, Any] | None:
    """The job of the work folder, if there is one."""
    try:
        job: dict[str, Any] = json.loads((work_folder(output) / "job.json").read_bytes())
        return job if job["format"] == FORMAT and float(job["lease"]) > 0.0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_workers(output: Path) -> bool:
    """Whether there are processes that take part and have not left; they may be dead."""
    try:
        return bool(os.listdir(work_folder(output) / "workers"))
    except FileNotFoundError:
        return False


def remove_work(output: Path, identity: str) -> None:
    """Remove the work folder, and what dead processes have left of others; nobody finds half of it."""
    path, old = work_folder(output), hidden_beside(output.resolve(), f"modelmerge-work-{identity}-old")
    with contextlib.suppress(OSError):
        path.rename(old)
    for rest in (old, *path.parent.glob(f"{escape(path.name)}-*")):
        shutil.rmtree(rest, ignore_errors=True)


def lease() -> float:
    """Seconds without a sign of life after which a process counts as dead.

    Raises:
        UsageError: The environment has no number for it.
    """
    text = os.environ.get(LEASE, "30")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise UsageError(f"the variable {LEASE} must be a number of seconds, not '{text}'", hint=f"{LEASE}=30")
    return seconds


class WorkFolder:
    """The folder, as a process that takes part sees it.

    Use as a context manager: inside, this process counts as alive.

    Args:
        output: Where the result will be.
        job: What is merged, as JSON; it is written down by the first process that comes.
    """

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        """Make the folder, or find it."""
        self._target = output.resolve()
        self.path = work_folder(output)
        self.identity = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.is_new = False
        self._touched: set[int] = set()  # descriptors of what shows that this process lives
        self._mutex, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        for _ in range(_TRIES):
            interrupts.check()
            with contextlib.suppress(FileNotFoundError):  # it has just been removed
                self.is_new = self._make(job)
                self._me = os.open(self.path / "workers" / self.identity, os.O_RDWR | os.O_CREAT, 0o666)
                there = job_at(output)
                if there is not None:
                    break
                os.close(self._me)
            time.sleep(0.02)
        else:
            what = f"{self.path} is no folder of a merge that this version shares out"
            raise OutputError(what, hint="move it away, or remove it")
        self.job: dict[str, Any] = there
        self._lease = float(there["lease"])
        self._touched.add(self._me)

    def _make(self, job: Mapping[str, Any]) -> bool:
        """Make the folder, whole, in one step; False if there is one."""
        if self.path.exists():
            return False
        new = self._beside("new")
        for name in ("units", "workers", "files", "growing", "kept"):
            (new / name).mkdir(parents=True, exist_ok=True)
        (new / "workers" / self.identity).touch()
        (new / "job.json").write_text(json.dumps({"format": FORMAT, **job}))
        try:
            new.rename(self.path)
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise
            return False
        return True

    def __enter__(self) -> WorkFolder:
        self._thread = threading.Thread(target=self._show_life, name="lease", daemon=True)
        self._thread.start()
        # Others may have finished and removed it since it was found; whoever asks it for something next is told.
        with contextlib.suppress(Gone), self.there():
            if not self.is_new and not self.has_others():
                self._forget_attempts()
        return self

    def __exit__(self, *error: object) -> None:
        with interrupts.held():
            self.leave()

    def leave(self) -> None:
        """Take part no more. The folder goes with the last one who leaves it with nothing done."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(FileNotFoundError, Gone):
            (self.path / "workers" / self.identity).unlink()
            if not self.has_others() and not self.done():
                self.remove()
        os.close(self._me)

    def remove(self) -> None:
        """Remove the folder, and what dead processes have left of others; nobody finds half of it."""
        remove_work(self._target, self.identity)

    def _beside(self, ending: str) -> Path:
        return hidden_beside(self._target, f"modelmerge-work-{self.identity}-{ending}")

    @property
    def seconds(self) -> float:
        """How long ago the merge was begun."""
        with self.there():
            os.utime(self._me)
            return os.fstat(self._me).st_mtime - (self.path / "job.json").stat().st_mtime

    def has_others(self) -> bool:
        """Whether other processes that take part are alive."""
        with self.there():
            names = [name for name in os.listdir(self.path / "workers") if name != self.identity]
            return any(self._is_alive(self.path / "workers" / name) for name in names)

    def wait(self) -> None:
        """Let others get on with their work, and see afterwards what they have done."""
        time.sleep(min(max(self._lease / 60, 0.02), 1.0))
        interrupts.check()
        with self.there():
            # Clients of a network file system remember a directory for a while, unless they change it themselves.
            fresh = self.path / "units" / f".{self.identity}"
            fresh.touch()
            fresh.unlink()

    # Units.

    def done(self) -> set[str]:
        """The units that are done, by their names as `key` makes them."""
        with self.there():
            names = os.listdir(self.path / "units")
            return {name[:-5] for name in names if name.endswith(".json") and not name.startswith(".")}

    def markers(self) -> dict[str, dict[str, Any]]:
        """What is to be said of each unit that is done, by its name as `key` makes it."""
        with self.there():
            return {n: json.loads((self.path / "units" / f"{n}.json").read_bytes()) for n in sorted(self.done())}

    def result(self, name: str) -> Path:
        """The file of what a unit gave."""
        return self._unit(name, "result")

    def claim(self, name: str) -> Claim | None:
        """Take a unit; None if it is done or somebody alive is at it.

        Raises:
            ModelMergeError: So many processes have failed at it that no other tries.
        """
        with self.there():
            for attempt in range(1, _ATTEMPTS + 1):
                path, failure = self._unit(name, f"claim-{attempt}"), self._unit(name, f"failed-{attempt}")
                try:
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                except FileExistsError:
                    if not failure.exists() and self._is_alive(path):
                        return None
                    continue
                os.write(descriptor, self.identity.encode())
                claim = Claim(self, name, attempt, path, descriptor)
                if not self._unit(name, "json").exists():
                    return claim
                claim.release()
                return None
            if self._unit(name, "json").exists():
                return None
            raise self._failure(name)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of this folder, whole, in one step."""
        new = path.with_name(f".{self.identity}.{path.name}")
        with new.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        new.rename(path)

    def growing(self, name: str) -> Path:
        """Where this process makes what a unit leaves; nobody else has this place."""
        return self.path / "growing" / f"{key(name)}.{self.identity}"

    def kept(self, name: str) -> Path:
        """What a unit keeps for others to read."""
        return self.path / "kept" / key(name)

    def finished(self, filename: str) -> Path:
        """The place of a finished file of the output. Whoever wakes when all is over must not make the folder again."""
        place = self.path / "files"
        for part in Path(filename).parent.parts:
            place /= part
            place.mkdir(exist_ok=True)
        return self.path / "files" / filename

    def take_files(self) -> Path:
        """The folder of the finished files, under a name that nobody else has: whoever had it before has it no more."""
        with self.there():
            mine = self.path / f"files.{uuid.uuid4().hex[:8]}"
            (at,) = self.path.glob("files*")
            at.rename(mine)
            return mine

    def _unit(self, name: str, ending: str) -> Path:
        return self.path / "units" / f"{key(name)}.{ending}"

    def _failure(self, name: str) -> ModelMergeError:
        """The error that the last attempt ended with, or that it did not end."""
        hint = f"finished work is kept in {self.path}: repeat the command, or remove that folder"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self._unit(name, f"failed-{_ATTEMPTS}").read_bytes())
            return from_dict(content, host=content["host"], hint=hint)
        what = f"'{name}' has ended {_ATTEMPTS} processes that were at it, the last without a word"
        return OutputError(what, hint=f"they may have lacked memory; {hint}")

    # Signs of life.

    def touch(self, descriptor: int, *, over: bool = False) -> None:
        """Keep a file young from now on, or no longer."""
        with self._mutex:
            (self._touched.discard if over else self._touched.add)(descriptor)

    def _show_life(self) -> None:
        while not self._over.wait(self._lease / 6):
            with self._mutex:
                for descriptor in self._touched:
                    with contextlib.suppress(OSError):  # whoever took it over, or all, have gone on
                        os.utime(descriptor)

    def _is_alive(self, file: Path) -> bool:
        """Whether the file is younger than the lease; by the server's clock."""
        try:
            descriptor = os.open(file, os.O_RDONLY)  # to open it is to ask the server
        except FileNotFoundError:
            return False
        try:
            os.utime(self._me)
            return os.fstat(self._me).st_mtime - os.fstat(descriptor).st_mtime <= self._lease
        finally:
            os.close(descriptor)

    def _forget_attempts(self) -> None:
        """Nobody else is alive: what they failed at is tried again."""
        for file in (self.path / "units").iterdir():
            if ".failed-" in file.name or (".claim-" in file.name and not self._is_alive(file)):
                file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Tell a folder that is gone from a file that cannot be read.

        Raises:
            Gone: It is.
        """
        try:
            yield
        except OSError as error:
            if not self.path.exists():
                raise Gone from error
            raise


class Claim:
    """A unit that this process does. An error inside the block is recorded; who is interrupted gives the unit back."""

    def __init__(self, folder: WorkFolder, name: str, attempt: int, path: Path, descriptor: int) -> None:
        self._folder, self._name, self._attempt = folder, name, attempt
        self._path, self._descriptor = path, descriptor
        folder.touch(descriptor)

    def finish(self, marker: Mapping[str, Any], result: bytes) -> None:
        """The unit is done."""
        with interrupts.held():
            self._folder.write(self._folder.result(self._name), result)
            self._folder.write(self._folder._unit(self._name, "json"), json.dumps(marker).encode())

    @property
    def is_lost(self) -> bool:
        """Whether somebody else has taken the unit over, and may be done with it, or the folder is gone."""
        others = [self._folder._unit(self._name, ending) for ending in (f"claim-{self._attempt + 1}", "json")]
        return any(file.exists() for file in others) or not self._path.exists()

    def release(self) -> None:
        """Give the unit back."""
        self._let_go()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _let_go(self) -> None:
        self._folder.touch(self._descriptor, over=True)
        os.close(self._descriptor)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            self.release()
            return False
        if self.is_lost:
            self._let_go()
            return True
        failure = error if isinstance(error, ModelMergeError) else OutputError(f"{type(error).__name__}: {error}")
        content = {**failure.to_dict(), "host": socket.gethostname()}
        with contextlib.suppress(OSError):
            place = self._folder._unit(self._name, f"failed-{self._attempt}")
            self._folder.write(place, json.dumps(content).encode())
        self._let_go()
        return False


def key(name: str) -> str:
    """A unit's name as a file's."""
    quoted = quote(name, safe="")
    if len(quoted) > _LONGEST:
        quoted = f"{quoted[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return quoted
