"""A crew of processes, on one machine or many, that share a folder: each does the units that nobody else is at."""

from __future__ import annotations

import contextlib
import io
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from modelmerge import interrupts
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.scratch import NamedScratch, reason
from modelmerge.checkpoint.shard_file import ShardFile
from modelmerge.checkpoint.work import WorkFolder, key
from modelmerge.engine.job import Job
from modelmerge.engine.units import Result, Unit, hash_units
from modelmerge.errors import OutputError
from modelmerge.progress import Reporter


class Shared:
    """The crew, as one of its processes sees it.

    Args:
        folder: The folder.
        job: The merge.
        progress: Shows the progress.
        hand_on: Hears of each weight file that this process has finished: its place in the output, and where it lies
            until then.
    """

    def __init__(
        self, folder: WorkFolder, job: Job, progress: Reporter, hand_on: Callable[[str, Path], object] | None = None
    ) -> None:
        self._folder, self._progress, self._hand_on = folder, progress, hand_on
        self._plan = job.plan
        self.lay_out(job.plan.layout)
        hashes = hash_units(job.plan)
        self._hashes = [unit for unit, _, _ in hashes]
        self._files = {unit.name: (model, file) for unit, model, file in hashes}
        self._who = {"worker": folder.identity, "host": socket.gethostname(), "device": str(job.source.device),
                     "threads": torch.get_num_threads()}  # fmt: skip
        self._rooms: dict[str, NamedScratch] = {}  # by unit, what this process is writing
        self._open: list[NamedScratch] = []
        self._about: dict[str, Any] = {}  # what the marker of the unit at hand says besides

    def lay_out(self, layout: Layout) -> None:
        """Write these weight files, and not those of the plan."""
        self._shards = {f"shard:{shard.filename}": shard for shard in layout.shards}

    def close(self) -> None:
        """Let go of the files."""
        for room in self._open:
            room.close()

    def share(self, units: Sequence[Unit], work: Callable[[Unit], Result]) -> Iterator[tuple[Unit, Result]]:
        """Do what nobody else does, dearest first, until all are done; others' results are read from the folder."""
        waiting = {key(unit.name): unit for unit in sorted(units, key=lambda unit: -unit.cost)}
        while waiting:
            interrupts.check()
            for name in self._folder.done() & waiting.keys():
                unit = waiting.pop(name)
                self._progress.advance(unit.cost, f"{unit.name} is done")
            taken = next((unit for unit in waiting.values() if self._do(unit, work)), None)
            if taken is not None:
                del waiting[key(taken.name)]
            elif waiting and not self._do_spare():
                self._folder.wait()
        for unit in units:
            yield unit, self._result(unit)

    def keep(self, unit: Unit, nbytes: int) -> NamedScratch:
        """A file of the folder."""
        self._rooms[unit.name] = NamedScratch(self._folder.growing(unit.name), new=True)
        return self._rooms[unit.name]

    def kept(self, unit: Unit) -> NamedScratch:
        """The file, to be read."""
        with self._folder.there():
            room = NamedScratch(self._folder.kept(unit.name), new=False)
        self._open.append(room)
        return room

    @contextlib.contextmanager
    def shard(self, unit: Unit) -> Iterator[ShardFile]:
        """The weight file of a unit, which is finished and in its place when the block ends."""
        shard, place = self._shards[unit.name], self._folder.growing(unit.name)
        file = ShardFile(place, shard)
        try:
            yield file
            assert not file.missing, f"bytes of {shard.filename} were not written"
            self._about["sha256"] = file.finish()
        except BaseException:
            place.unlink(missing_ok=True)
            raise
        finally:
            file.close()
        finished = self._folder.finished(shard.filename)
        place.rename(finished)
        if self._hand_on is not None:
            self._hand_on(shard.filename, finished)

    def digests(self) -> list[dict[Path, str]]:
        """The sha256 of every weight file, by model."""
        self._progress.stage("hashing", sum(unit.nbytes for unit in self._hashes))

        def hash_one(unit: Unit) -> str:
            self._progress.begin(unit.name)
            digest = self._hash(unit)
            self._progress.advance(unit.nbytes, unit.name)
            return digest

        found = {unit.name: digest for unit, digest in self.share(self._hashes, hash_one)}
        names = iter(self._hashes)
        return [{file: found[next(names).name] for file in model.files} for model in self._plan.models]

    def _hash(self, unit: Unit) -> str:
        model, file = self._files[unit.name]
        return model.digest(file)

    def _do_spare(self) -> bool:
        """Hash a file while there is nothing else to do; False if there is none."""
        done = self._folder.done()
        return any(key(unit.name) not in done and self._do(unit, self._hash) for unit in self._hashes)

    def _do(self, unit: Unit, work: Callable[[Unit], Any]) -> bool:
        """Do a unit; False if it is not to be had, or somebody else has taken it over meanwhile."""
        claim = self._folder.claim(unit.name)
        if claim is None:
            return False
        with claim:
            started, self._about = time.monotonic(), {}
            result = io.BytesIO()
            try:
                torch.save(work(unit), result)
            except OSError as error:
                where = f"cannot write in {self._folder.path}: {reason(error)}"
                raise OutputError(where, hint="make room: the work is taken up by the same command") from error
            finally:
                room = self._rooms.pop(unit.name, None)
                if room is not None:
                    room.finish()
            if room is not None:
                self._folder.growing(unit.name).rename(self._folder.kept(unit.name))
            about = {**self._who, **self._about, "unit": unit.name, "seconds": time.monotonic() - started}
            claim.finish(about, result.getvalue())
            return True
        return False

    def _result(self, unit: Unit) -> Any:
        with self._folder.there():
            return torch.load(self._folder.result(unit.name), weights_only=True)

    def workers(self) -> list[dict[str, Any]]:
        """Who did how many units, in how many seconds; the order is that of the processes' names."""
        totals: dict[str, dict[str, Any]] = {}
        for marker in self._folder.markers().values():
            one = {name: marker[name] for name in ("host", "device", "threads")} | {"units": 0, "seconds": 0.0}
            total = totals.setdefault(marker["worker"], one)
            total["units"] += 1
            total["seconds"] += marker["seconds"]
        return [{**totals[name], "seconds": round(totals[name]["seconds"], 3)} for name in sorted(totals)]

    def shards(self) -> dict[str, str]:
        """The sha256 of every weight file of the output."""
        markers = self._folder.markers()
        return {shard.filename: markers[key(name)]["sha256"] for name, shard in self._shards.items()}
