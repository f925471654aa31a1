"""Runs in processes of their own, with real signals, which stop themselves at the moment that a test wants to see.

Importing torch takes seconds: one process does it, `python -m tests.support.processes`, and every run is a fork of it
that goes on as `python -m modelmerge` does. The Hub's client keeps the settings that it was imported with: for models
on the Hub there is another such process, which has imported nothing but torch.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import io
import itertools
import json
import math
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PATIENCE = 120.0  # seconds until a run counts as hanging; nothing is measured by it
# `python -c PROGRAM WORDS...` is `python -m modelmerge WORDS...` that can be interrupted wherever it is started: a
# shell starts background jobs with SIGINT ignored, and children inherit that.
PROGRAM = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('modelmerge', run_name='__main__')"
)


class Run:
    """A run of `modelmerge WORDS...`.

    Args:
        words: The command line, after the program's name.
        stop: A function of the package, `module:Class.function`: before it is called, the run stops itself.
        call: Which of the calls is meant, from 1.
        limits: Resource limits by their names in `resource`.
        terminal: The terminal that stderr is, where it is one.
        environment: Variables beside those of this process.
        hub: Whether the run has to do with the Hub.
        beside: The number of a run among those that run at the same time.
        host: The name of the machine that the run takes itself to be on, with a network of its own that leads nowhere.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        stop: str | None = None,
        call: int = 1,
        limits: Mapping[str, int] | None = None,
        terminal: str | None = None,
        environment: Mapping[str, str] | None = None,
        hub: bool = False,
        beside: int = 0,
        host: str | None = None,
    ) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as out, tempfile.NamedTemporaryFile(delete=False) as err:
            self._out, self._err = Path(out.name), Path(err.name)
        self.code: int | None = None
        self._parent = _parent(hub, beside)
        request = {
            "words": list(words), "stop": stop, "call": call, "limits": dict(limits or {}), "out": out.name,
            "err": terminal or err.name, "directory": os.getcwd(), "environment": {**os.environ, **(environment or {})},
            "host": host,
        }  # fmt: skip
        self._pid = self._parent.ask(request)["pid"]

    def until_stopped(self) -> None:
        """Return when the run has stopped itself; fail if it ends before."""
        told = self._parent.hear()
        if "code" in told:
            self.code = told["code"]
            raise AssertionError(f"the run ended too early, with {self.code}: {self.err()}")

    def until(self, happens: Callable[[], bool]) -> None:
        """Return when that is so; fail if it takes too long."""
        until = time.monotonic() + PATIENCE
        while not happens():
            assert time.monotonic() < until, f"it does not happen: {self.err()}"
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a run that has stopped goes on with it."""
        os.kill(self._pid, number)
        if number not in (signal.SIGKILL, signal.SIGCONT):
            os.kill(self._pid, signal.SIGCONT)

    def processor_seconds(self) -> float:
        """The processor's time that it has taken so far."""
        words = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def allow(self, seconds: float) -> None:
        """Have the system kill it once it has taken that much of the processor's time, in all."""
        resource.prlimit(self._pid, resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))

    def network(self) -> str:
        """Which network namespace it is in."""
        return os.readlink(f"/proc/{self._pid}/ns/net")

    def end(self) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        while self.code is None:
            self.code = self._parent.hear().get("code")
        return self.code

    def out(self) -> str:
        """What it has written to stdout."""
        return self._out.read_text()

    def err(self) -> str:
        """What it has written to stderr."""
        return self._err.read_text()

    def close(self) -> None:
        """Leave nothing behind."""
        if self.code is None:
            os.kill(self._pid, signal.SIGKILL)
            self.end()
        self._out.unlink()
        self._err.unlink()


@contextlib.contextmanager
def running(words: Sequence[str], **how: Any) -> Iterator[Run]:
    """A run, see `Run`, that is over when the block is."""
    run = Run(words, **how)
    try:
        yield run
    finally:
        run.close()


@contextlib.contextmanager
def started(words: Sequence[str], count: int, first: int = 0) -> Iterator[list[Run]]:
    """So many runs of the same at the same time, over when the block is; `first` is the number of the first."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(running(words, beside=first + i)) for i in range(count)]


def finish(runs: Sequence[Run]) -> None:
    """Wait for the end of all; fail unless it is a good one."""
    assert [run.end() for run in runs] == [0] * len(runs), [run.err() for run in runs]


class _Parent:
    """The process that is forked, and what it tells of its child: a line for each thing that happens."""

    def __init__(self, hub: bool) -> None:
        words = ["hub"] if hub else []
        # From where `tests` is found, wherever the test itself has gone.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._rest = b""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            assert select.select([self._process.stdout], [], [], PATIENCE)[0], "the run hangs"
            part = self._process.stdout.read(1 << 16)
            assert part, "the process that makes runs has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()


@functools.cache
def _parent(hub: bool, beside: int) -> _Parent:
    made = _Parent(hub)
    atexit.register(made.close)
    return made


def _serve() -> None:
    """Fork for every line on stdin, and tell on stdout how the child fares."""
    if sys.argv[1:] == ["hub"]:
        import torch  # noqa: F401
    else:
        import modelmerge.verbs.merge  # noqa: F401 - torch comes with it
        from modelmerge.cli import main

        with contextlib.redirect_stdout(io.StringIO()):
            main(["merge", "ties", "--help"])
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)  # ends by SystemExit, as the program does
        _tell(pid=child)
        while True:
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            _tell(stopped=True)
        _tell(code=os.waitstatus_to_exitcode(status))


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _become(request: dict[str, Any]) -> None:
    for descriptor, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["environment"])
    _set_threads()
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in request["limits"].items():
        import resource

        resource.setrlimit(getattr(resource, name), (value, value))
    if request["host"]:
        _move_to(request["host"])
    if request["stop"]:
        _stop_before(request["stop"], request["call"])
    sys.argv = ["modelmerge", *request["words"]]
    runpy.run_module("modelmerge", run_name="__main__")


def _move_to(host: str) -> None:
    """Namespaces of its own: no interface is up in that of the network."""
    new_uts, new_net = 0x04000000, 0x40000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_uts | new_net):
        raise OSError(ctypes.get_errno(), "no namespaces")
    socket.sethostname(host)


def _set_threads() -> None:
    """Heed the variable: torch was imported before this process had it."""
    count = os.environ.get("OMP_NUM_THREADS")
    if count is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(count))


def _stop_before(place: str, call: int) -> None:
    module, _, names = place.partition(":")
    *outer, name = names.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    plain, calls = getattr(owner, name), itertools.count(1)

    def stopping(*words: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGSTOP)
        return plain(*words, **named)

    setattr(owner, name, stopping)


if __name__ == "__main__":
    _serve()
