"""Where a simple merge's CPU time goes, beside the same bytes and arithmetic through bare calls of torch, hashlib, os.

Children of `tests.benchmarks.plain` run `merged` and `bare`, which print a JSON object: CPU seconds of all threads by
phase, and the page faults after the imports.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import os
import resource
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHASES = ("import", "read", "widen", "arithmetic", "round", "hash", "write", "sync")
_BLOCK = 1 << 18  # elements, as modelmerge's
_spent: dict[str, float] = defaultdict(float)
_open = threading.local()  # the phases that this thread is in


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Counts this thread's CPU time inside the block, without that of phases within it."""
    before, _open.inner = getattr(_open, "inner", 0.0), 0.0
    began = time.thread_time()
    try:
        yield
    finally:
        took = time.thread_time() - began
        _spent[name] += took - _open.inner
        _open.inner = before + took


def _timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def timed(*args: Any, **options: Any) -> Any:
        with phase(name):
            return work(*args, **options)

    return timed


def _each_timed(name: str, work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    def timed(*args: Any) -> Iterator[Any]:
        items, over = work(*args), object()
        while True:
            with phase(name):
                item = next(items, over)
            if item is over:
                return
            yield item

    return timed


def _imported() -> int:
    """Import what a merge imports; the page faults until then."""
    gc.set_threshold(500_000)
    import modelmerge.cli
    import modelmerge.verbs.merge  # noqa: F401

    _spent["import"] = time.process_time()  # since the interpreter began
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _tell(faults: int) -> None:
    total = time.process_time()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(json.dumps({**_spent, "rest": total - sum(_spent.values()), "all": total, "faults": after}), flush=True)
    os._exit(0)


def merged() -> None:
    """In a child: a merge whose functions are timed. Arguments: METHOD OUT BASE EXPERT..."""
    faults = _imported()
    import modelmerge
    from modelmerge.checkpoint import digest, shard_file
    from modelmerge.engine import loader, merge
    from modelmerge.methods.contract import Look

    def look(self: Look, measure: Callable[..., Any], sampled: bool = False) -> None:
        made(self, _timed("arithmetic", measure), sampled)

    made, Look.__init__ = Look.__init__, look  # type: ignore[method-assign]
    for holder, attribute, name in (
        (digest.FileDigest, "read", "read"), (loader.Loader, "load", "widen"), (merge, "merged_vector", "arithmetic"),
        (merge, "rounded", "round"), (digest.WrittenDigest, "wrote", "hash"),
        (digest.WrittenDigest, "finish", "hash"), (shard_file, "write_all", "write"),
        (os, "posix_fallocate", "write"), (digest, "begin_sync", "sync"), (os, "fsync", "sync"),
    ):  # fmt: skip
        setattr(holder, attribute, _timed(name, getattr(holder, attribute)))
    merge._merged = _each_timed("arithmetic", merge._merged)  # type: ignore[assignment]
    method, out, base, *experts = sys.argv[1:]
    modelmerge.merge(base, experts, out, method=method, device="cpu")
    _tell(faults)


def bare() -> None:
    """In a child: the same on the files' bytes as they come, by bare calls. Arguments: METHOD OUT BASE EXPERT..."""
    faults = _imported()
    import torch

    from modelmerge.engine.parallel import prepare_process

    prepare_process()  # how glibc hands out memory is no part of the comparison
    torch.set_num_threads(1)
    method, out, *models = sys.argv[1:]
    files = [os.open(Path(model) / "model.safetensors", os.O_RDONLY) for model in models]
    begin = 8 + struct.unpack("<Q", os.pread(files[0], 8, 0))[0]
    size = os.fstat(files[0]).st_size
    raw = torch.empty(_BLOCK, dtype=torch.bfloat16)
    base, taus = torch.empty(_BLOCK), torch.empty(len(models) - 1, _BLOCK)
    target, digest = os.open(out, os.O_RDWR | os.O_CREAT), hashlib.sha256()
    with phase("write"):
        os.posix_fallocate(target, 0, size - begin)

    def blocks() -> Iterator[tuple[int, Any, Any]]:
        for start in range(begin, size, 2 * _BLOCK):
            count = min(2 * _BLOCK, size - start) // 2
            stored, theta, some = raw[:count], base[:count], taus[:, :count]
            for file, values in zip(files, (theta, *some), strict=True):
                with phase("read"):
                    os.preadv(file, [memoryview(stored.view(torch.uint8).numpy())], start)
                with phase("widen"):
                    values.copy_(stored)
                    if values is not theta:
                        values.sub_(theta)
            yield start - begin, theta, some

    if method in _MEASURES:
        for _, theta, some in blocks():
            with phase("arithmetic"):
                _MEASURES[method](torch, theta, some)
    for place, theta, some in blocks():
        with phase("arithmetic"):
            values = _FORMULAS[method](torch, theta, some)
        with phase("round"):
            stored = values.to(torch.bfloat16)
            error = stored.to(torch.float32).sub_(values)
            float(torch.dot(error, error))
        data = memoryview(stored.view(torch.uint8).numpy())
        with phase("write"):
            os.pwrite(target, data, place)
        with phase("hash"):
            digest.update(data)
    with phase("sync"):
        os.fsync(target)
    os.unlink(out)
    _tell(faults)


def _sum(taus: Any, factor: float = 1.0) -> Any:
    total = taus[0] * factor
    for tau in taus[1:]:
        total.add_(tau if factor == 1.0 else tau * factor)
    return total


# The passes over memory that each takes; the numbers are made up where they change no time. Where a single factor is
# on all task vectors, modelmerge multiplies after the sum, too.
_FORMULAS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "average": lambda torch, base, taus: base.add_(_sum(taus).div_(len(taus))),
    "task-arithmetic": lambda torch, base, taus: base.add_(_sum(taus).mul_(0.3)),
    "slerp": lambda torch, base, taus: base.add_((taus[0] * 0.5).add_(base * 0.01)),
    "model-stock": lambda torch, base, taus: base.add_(_sum(taus, 1 / len(taus)).mul_(0.3)),
}
_MEASURES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "slerp": lambda torch, base, taus: [torch.dot(*two) for two in ((base, base), (base, taus[0]), (taus[0], taus[0]))],
    "model-stock": lambda torch, base, taus: taus @ taus.T,
}
