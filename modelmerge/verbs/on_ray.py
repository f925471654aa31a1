"""merge --cluster ray: Ray hands out the workers, one for each card of its cluster or for each group of processors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modelmerge import interrupts
from modelmerge.checkpoint.scratch import reason
from modelmerge.checkpoint.work import LEASE, has_workers
from modelmerge.errors import OutputError, UsageError, named
from modelmerge.evaluation.bench import require
from modelmerge.verbs.driver import Message, Work
from modelmerge.verbs.shared import RAY

_SOON = 0.5  # seconds
_AFTERWARDS = 5.0  # seconds for a worker to see that all is done, or to give its unit back
_RETRIES = 3  # of a worker whose process or node has died


class OnRay:
    """Workers of a Ray cluster.

    Args:
        work: What they do.
        cluster: `ray` or `ray=ADDRESS`: without an address that of RAY_ADDRESS, or a cluster of this machine alone,
            which ends with the block.
        on_cards: Whether they take cards, where the cluster has some.
    """

    def __init__(self, work: Work, cluster: str, *, on_cards: bool) -> None:
        require(f"{named('cluster')} {RAY}", '"ray>=2.50"', "ray")
        self._work, self._address = work, cluster.partition("=")[2] or os.environ.get("RAY_ADDRESS") or "local"
        self._on_cards = on_cards
        self._tasks: dict[Any, int] = {}  # their numbers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Sequence[str]:
        """Join the cluster, or start one, and ask it for workers."""
        import ray

        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                self._join(stack)
            count, asked, threads = self._groups()
            with interrupts.held():
                # Whoever does not see this folder is on a machine that does not see the output's place.
                try:
                    place = tempfile.TemporaryDirectory(prefix=".modelmerge-ray-", dir=self._work.out.parent)
                except OSError as error:
                    what = f"cannot prepare the output in {self._work.out.parent}: {reason(error)}"
                    raise OutputError(what) from error
                seen = Path(stack.enter_context(place))
                environment = {n: os.environ[n] for n in (LEASE,) if n in os.environ}
                environment["OMP_NUM_THREADS"] = str(threads)
                self._post = ray.remote(num_cpus=0)(_Post).remote()
                task = ray.remote(max_retries=_RETRIES, **asked)(_take_part)
                device = "cuda" if "num_gpus" in asked else "cpu"
                for number in range(count):
                    started = task.remote(self._work, device, os.getcwd(), seen, environment, number, self._post)
                    self._tasks[started] = number
                self._stack = stack.pop_all()
        return [f"worker {number}" for number in range(count)]

    def _join(self, stack: contextlib.ExitStack) -> None:
        """Connect to the cluster until the stack is closed."""
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own: dict[str, Any] = {"include_dashboard": False} if self._address == "local" else {}
        stack.callback(ray.shutdown)
        try:
            _refuse_unreachable(self._address)
            with _own_signals():
                ray.init(self._address, logging_level=logging.ERROR, log_to_driver=False, **own)
        except (OSError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            hint = "see that the address and, where the cluster asks for one, the token of Ray are right"
            raise UsageError(f"{RAY} at '{self._address}': {lines[0]}", option="cluster", hint=hint) from error

    def _groups(self) -> tuple[int, Mapping[str, Any], int]:
        """How many workers, what each asks for, and its threads: as many on every node."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cards = [(int(node["GPU"]), int(node.get("CPU", 1))) for node in nodes if node.get("GPU", 0) >= 1]
        fixed = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None
        if self._on_cards and cards:
            threads = fixed or max(min(processors // count for count, processors in cards), 1)
            return sum(count for count, _ in cards), {"num_gpus": 1, "num_cpus": 0}, threads
        processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        if not processors:
            raise UsageError(f"{RAY} at '{self._address}' has no processor and no card to give", option="cluster")
        threads = fixed or min(processors)
        asked = min([threads, *processors])
        return sum(count // asked for count in processors), {"num_cpus": asked}, threads

    def __exit__(self, *error: object) -> None:
        """Wait for the workers a little; where the block failed, have them give their units back first."""
        import ray

        with interrupts.held(), self._stack:
            tasks = list(self._tasks)
            if error[0] is None and tasks:
                _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=_AFTERWARDS)
            for task in tasks:  # once: Ray ends the process that asks for it again, and by force
                ray.cancel(task)
            # A task that is cancelled counts as over at once, while its process is still about to leave.
            until = time.monotonic() + _AFTERWARDS
            while tasks and has_workers(self._work.out) and time.monotonic() < until:
                time.sleep(0.05)

    def hear(self) -> Iterator[tuple[int, Message]]:
        """What they have said."""
        import ray

        ready, _ = ray.wait(list(self._tasks), timeout=_SOON)
        with contextlib.suppress(ray.exceptions.RayError):  # its node has died: they work on in silence
            yield from ray.get(self._post.take.remote(), timeout=_AFTERWARDS)
        for task in ready:
            number = self._tasks.pop(task)
            try:
                yield number, ray.get(task)
            except ray.exceptions.RayError as error:
                yield number, {"ended": f"has ended: {str(error).strip().splitlines()[-1]}"}


class _Post:
    """What workers have said, until the driver asks for it."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, Message]] = []

    def put(self, number: int, message: Message) -> None:
        self._messages.append((number, message))

    def take(self) -> list[tuple[int, Message]]:
        messages, self._messages = self._messages, []
        return messages


def _take_part(
    work: Work, device: str, directory: str, seen: Path, environment: Mapping[str, str], number: int, post: Any
) -> Message:
    """A worker, in a process of Ray's."""
    from modelmerge.verbs.worker import take_part

    host = socket.gethostname()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    for place in (seen, Path(directory)):
        if not place.is_dir():
            unseen = OutputError(f"there is no {place}", hint="all nodes must see the same files by the same paths")
            return {"error": unseen.to_dict(), "host": host}
    os.chdir(directory)
    return {**take_part(work, device, lambda message: post.put.remote(number, message)), "host": host}


def _refuse_unreachable(address: str) -> None:
    """Refuse an address where nobody listens: Ray would go on trying for many minutes.

    Raises:
        OSError: It is one.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_AFTERWARDS).close()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers in the block: Ray has its own for SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in interrupts.MEANINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
