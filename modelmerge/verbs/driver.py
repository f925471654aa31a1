"""A merge by processes that this one starts: a child for each of several devices, or workers that Ray hands out.

They share it out over the work folder, as processes do that are started by hand: `modelmerge.verbs.shared`. The driver
does no unit. It shows how far they are, and ends with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch

from modelmerge import interrupts
from modelmerge.checkpoint.work import job_at, work_folder
from modelmerge.errors import OutputError, UsageError, from_dict
from modelmerge.plan.downloads import fetch
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import Reporter
from modelmerge.record.recorded import Recorded
from modelmerge.verbs.prepare import Prepared
from modelmerge.verbs.shared import is_ray

if TYPE_CHECKING:
    from modelmerge.hub.upload import Target, Uploader

_SOON = 0.2  # seconds
_AFTERWARDS = 30.0  # seconds for the others to see that all is done
_GRACE = 10.0  # seconds for a worker to give its unit back

# The driver's own path: a file beside the user that is named like a library must not be taken for it.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from modelmerge.verbs.worker import main; main()"


Message = dict[str, Any]  # `stage` or `advance` as a `Reporter` hears it; at the end `manifest`, `error` or `ended`


@dataclass(frozen=True, slots=True)
class Work:
    """A merge, as a worker is given it.

    Args:
        recipe: As `prepare` has completed it.
        recorded: What a replay must find again.
        remarks: As for `prepare`.
        stream: As for `prepare`.
        script: As for `prepare`; in a file.
        out: Where the output goes; absolute.
        force: Whether it replaces what is there.
        push: Where its weight files are uploaded to, if anywhere; the driver commits them.
    """

    recipe: Recipe
    recorded: Recorded | None
    remarks: tuple[str, ...]
    stream: bool
    script: str | None
    out: Path
    force: bool
    push: Target | None


class Workers(Protocol):
    """Processes that take part in a merge inside the block; where it ends with an error, they are ended."""

    def __enter__(self) -> Sequence[str]:
        """Start them; their names."""

    def __exit__(self, *error: object) -> None:
        """See that they end."""

    def hear(self) -> Iterator[tuple[int, Message]]:
        """What they have said since, each with the worker's number; `ended` says how one has ended without a result."""


def drive(
    prepared: Prepared,
    cluster: str | None,
    out: Path,
    *,
    force: bool,
    ready: Callable[[], object] | None,
    uploader: Uploader | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Have a merge done by a worker on each of its devices, or by those of a Ray `cluster`; its manifest.

    `force` and `ready` are as for `execute`. The workers upload to where the `uploader` does.

    Raises:
        ModelMergeError: As for `merge`; or all workers have ended.
    """
    script = prepared.data.script if prepared.data is not None else None
    if script is not None and not isinstance(script, str):
        raise UsageError("must be FILE:FUNCTION where other processes are to run it", option="script")
    work = Work(
        prepared.recipe, prepared.recorded, tuple(prepared.remarks), prepared.stream, script, out.absolute(), force,
        None if uploader is None else uploader.target,
    )  # fmt: skip
    if ready is not None:
        ready()
    workers: Workers
    if cluster is not None and is_ray(cluster):
        from modelmerge.verbs.on_ray import OnRay

        workers = OnRay(work, cluster, on_cards=prepared.device == "auto")
    else:
        fetch(prepared.job.plan, progress, beside="all", stream=prepared.stream)
        workers = Children(work, prepared.devices)
    try:
        return _result(workers, out, progress)
    except BaseException:
        if job_at(out) is not None:
            progress.note(f"what is finished is kept in {work_folder(out)}: the same command takes it up")
        raise


def _result(workers: Workers, out: Path, progress: Reporter) -> dict[str, Any]:
    with workers as names:
        alive, lead = set(range(len(names))), None
        while True:
            interrupts.check()
            for number, message in workers.hear():
                if "manifest" in message:
                    for note in message["manifest"]["notes"]:
                        progress.note(note)
                    return message["manifest"]
                if "error" in message:
                    raise from_dict(message["error"], host=message.get("host"))
                if "ended" in message:
                    alive.discard(number)
                    what = f"{names[number]} {message['ended']}"
                    if not alive:
                        hint = f"it may have lacked memory; what is finished is kept in {work_folder(out)}"
                        raise OutputError(f"{what}, and there is no other", hint=hint)
                    progress.note(f"{what}; the others take its work over")
                    continue
                lead = lead if lead in alive else number
                if number == lead:  # each knows of what all do
                    _show(message, progress)


def _show(message: Message, progress: Reporter) -> None:
    if "stage" in message:
        progress.stage(*message["stage"])
    else:
        progress.advance(*message["advance"])


class Children:
    """A child of this process for each device."""

    def __init__(self, work: Work, devices: Sequence[torch.device]) -> None:
        self._work, self._devices = work, [str(device) for device in devices]
        self._children: list[subprocess.Popen[bytes]] = []
        self._rests = [b""] * len(devices)  # of messages that are not whole yet
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Sequence[str]:
        """Start them."""
        program = [sys.executable, "-c", _PROGRAM.format(path=sys.path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_each(len(self._devices)))}
        with interrupts.held():
            for number in range(len(self._devices)):
                child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
                self._children.append(child)
                self._selector.register(_pipe(child.stdout), selectors.EVENT_READ, number)
            for child, device in zip(self._children, self._devices, strict=True):
                with contextlib.suppress(BrokenPipeError):  # how it has ended is heard
                    pickle.dump((self._work, device), _pipe(child.stdin))
                    _pipe(child.stdin).flush()
        return [f"the process on {device}" for device in self._devices]

    def __exit__(self, *error: object) -> None:
        """Wait for them; where the block failed, terminate them first. Who does not heed that is killed."""
        with interrupts.held():
            if error[0] is not None or not self._have_ended(_AFTERWARDS):
                self._send(signal.SIGTERM)
                if not self._have_ended(_GRACE):
                    self._send(signal.SIGKILL)
            for child in self._children:
                child.wait()
                _pipe(child.stdout).close()
                with contextlib.suppress(BrokenPipeError):
                    _pipe(child.stdin).close()
            self._selector.close()

    def _send(self, number: signal.Signals) -> None:
        for child in self._children:
            child.send_signal(number)

    def _have_ended(self, seconds: float) -> bool:
        """Whether all have ended in so many seconds; nobody hears what they still say."""
        until = time.monotonic() + seconds
        while self._selector.get_map() and time.monotonic() < until:
            for _ in self.hear():
                pass
        return not self._selector.get_map()

    def hear(self) -> Iterator[tuple[int, Message]]:
        """What they have said."""
        for key, _ in self._selector.select(_SOON):
            number = key.data
            part = os.read(key.fd, 1 << 16)
            *lines, self._rests[number] = (self._rests[number] + part).split(b"\n")
            for line in lines:
                yield number, json.loads(line)
            if not part:
                self._selector.unregister(key.fileobj)
                yield number, {"ended": _end(self._children[number].wait())}


def threads_each(count: int) -> int:
    """Threads for each of so many processes on this machine: what the variable says, or a share of the processors.

    All have the same number, for the bits of large matrices depend on it.
    """
    available = torch.get_num_threads()
    return available if "OMP_NUM_THREADS" in os.environ else max(available // count, 1)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
