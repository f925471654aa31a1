"""An output as it stands at DIR: whether it may be written there, whether it is whole, and one file of it replaced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from modelmerge import interrupts
from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.manifest_file import FileEntry
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.scratch import hidden_beside
from modelmerge.errors import OutputError, named

CARD = "README.md"


def check_output(output: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse an output that would damage something, before any work is done.

    Raises:
        OutputError: It is, holds or lies in an input; is no directory; is not empty and `force` is off; or is a place
            that cannot be replaced as a whole.
    """
    target = output.resolve()
    for path in inputs:
        source = path.resolve()
        relation = "is" if target == source else "holds" if target in source.parents else None
        if source in target.parents:
            relation = "lies in"
        if relation:
            raise OutputError(f"the output {output} {relation} the input {path}", hint="name another directory")
    if target.is_dir():
        here = Path.cwd()
        if target in (here, *here.parents, Path(os.path.expanduser("~"))) or os.path.ismount(target):
            raise OutputError(
                f"the output {output} cannot be replaced as a whole: it is a mount point, your home, or where you are",
                hint=f"name a directory inside it: {output / 'merged'}",
            )
        refuse_content(target, force=force)
    elif target.exists():
        raise OutputError(f"the output {output} is a file, not a directory", hint="name a directory")


def refuse_content(target: Path, *, force: bool) -> None:
    """Refuse a directory that is not empty.

    Raises:
        OutputError: It is not, and `force` is off.
    """
    if not force and target.is_dir() and any(target.iterdir()):
        hint = f"name another directory, or replace it: {named('force')}"
        raise OutputError(f"the output {target} is not empty", hint=hint)


class _Listing(TypedDict, total=False):
    files: dict[str, FileEntry]


def replace_file(output: Path, name: str, content: bytes) -> None:
    """Put another file in the place of one in a finished output, and its digest into the manifest, if there is one.

    Raises:
        OutputError: It cannot be written.
    """
    manifest = output / MANIFEST
    try:
        with interrupts.held():
            record = read_json(manifest, _Listing, error=OutputError) if manifest.is_file() else {}
            entry = record.get("files", {}).get(name)
            if entry is not None:  # a kill between the two must not make the output look damaged: either is right
                after = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
                record["files"][name] = {**entry, "instead": after}
                _replace(manifest, _as_json(record))
            _replace(output / name, content)
            if entry is not None:
                record["files"][name] = after
                _replace(manifest, _as_json(record))
    except OSError as error:
        raise OutputError(f"{output / name} cannot be written: {error}") from error


def is_recorded(file: Path, entry: Mapping[str, Any]) -> bool:
    """Whether the file's bytes, read now, are those of its entry in a manifest.

    Raises:
        OSError: There is no such file, or it cannot be read.
    """
    if not file.is_file():  # a pipe or a device has no end
        raise FileNotFoundError(errno.ENOENT, "no such file", str(file))
    size, entries = file.stat().st_size, (entry, entry.get("instead", entry))
    digests = [each["sha256"] for each in entries if each["bytes"] == size]
    return bool(digests) and sha256(file) in digests


def _as_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _replace(file: Path, content: bytes) -> None:
    # What a killed run has left under that name goes too; a run that lives keeps it to itself by a lock.
    temporary = hidden_beside(file, "new")
    with _opened_alone(temporary) as stream:
        stream.truncate(0)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        os.replace(temporary, file)


@contextlib.contextmanager
def _opened_alone(file: Path) -> Iterator[BinaryIO]:
    """A file that only this process writes to; it is removed where the block fails."""
    while True:
        with file.open("ab") as stream:
            with contextlib.suppress(OSError):  # there are file systems without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            same = False
            with contextlib.suppress(FileNotFoundError):
                same = os.path.samestat(os.fstat(stream.fileno()), file.stat())
            if same:  # else who held it has put it in its place while we waited
                try:
                    yield stream
                except BaseException:
                    file.unlink(missing_ok=True)
                    raise
                return


def finished(output: Path, fingerprint: str, *, hashed: bool = True) -> dict[str, Any] | None:
    """The manifest of an output that is complete, undamaged and of the job with that fingerprint; None otherwise.

    The job may be the search that the output was chosen in. Unless it is to be `hashed`, the size of each file is
    looked at alone.
    """
    try:
        manifest: dict[str, Any] = json.loads((output / MANIFEST).read_bytes())
        if fingerprint not in (manifest["fingerprint"], manifest.get("searched", {}).get("fingerprint")):
            return None
        entries = [(output / name, entry) for name, entry in manifest["files"].items()]
        whole = all(is_recorded(*each) if hashed else each[0].stat().st_size == each[1]["bytes"] for each in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None
