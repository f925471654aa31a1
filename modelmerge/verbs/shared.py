"""--cluster: one merge, or one set of task vectors, among processes that see the same files.

Each is started by the same command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.output import check_output, finished
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.scratch import check_room, reason, scratches
from modelmerge.checkpoint.staging import clear_remains
from modelmerge.checkpoint.work import Gone, WorkFolder, job_at, lease, remove_work, work_folder
from modelmerge.devices import local_card
from modelmerge.engine.cluster import Shared
from modelmerge.engine.job import Job
from modelmerge.engine.merge import run_shared
from modelmerge.engine.parallel import prepare_process, source_of
from modelmerge.engine.units import Unit, spread
from modelmerge.errors import OutputError, UsageError, named
from modelmerge.plan.downloads import fetch, input_paths
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import Reporter
from modelmerge.record.fingerprint import circumstances
from modelmerge.record.manifest import as_file
from modelmerge.verbs import coefficients
from modelmerge.verbs.output import beside_bytes, complete
from modelmerge.verbs.prepare import Prepared, digest_of, with_coefficients

if TYPE_CHECKING:
    from modelmerge.hub.upload import Uploader

FILES, RAY = "files", "ray"
Digests = list[dict[Path, str]]  # of the files of each model
Finish = Callable[[Publication, Digests], dict[str, Any]]  # writes what goes beside the weights; the manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Undertaking:
    """What processes do together.

    Args:
        job: The models, and where they are worked on.
        digest: Of all that determines the output.
        stream: As for `merge`.
        beside: What the output gets from the models beside their weights.
        nbytes: Bytes that the output takes, as far as it is known beforehand.
        do: Does all units with the others; the weight files of the output, and what finishes it.
    """

    job: Job
    digest: str
    stream: bool
    beside: Literal["all", "nothing"]
    nbytes: int
    do: Callable[[Shared], tuple[Layout, Finish]]


def is_ray(cluster: str) -> bool:
    """Whether the cluster is one of Ray's, `ray` or `ray=ADDRESS`."""
    kind, equals, address = cluster.partition("=")
    return kind == RAY and bool(address) == bool(equals)


def refuse_unshared(cluster: str | None, prepared: Prepared) -> None:
    """Refuse a cluster of an unknown kind, and a merge that cannot be shared out, on it or among devices.

    Raises:
        UsageError: It is one.
    """
    option = "device" if cluster is None else "cluster"
    if cluster not in (None, FILES):
        if not is_ray(cluster):
            raise UsageError(f"must be {FILES}, {RAY} or {RAY}=ADDRESS, not '{cluster}'", option=option)
        if prepared.device not in ("auto", "cpu"):
            raise UsageError(f"{RAY} hands out the cards that it has", option=option,
                             hint=f"leave out {named('device')}, or name cpu")  # fmt: skip
    refuse_undivided(prepared.recipe, option, in_turn=cluster == FILES and len(prepared.devices) == 1)


def refuse_undivided(recipe: Recipe, option: str, *, in_turn: bool = False) -> None:
    """Refuse a merge that cannot be shared out, as the option asks.

    Merges before it can be, where all processes do one after the other, `in_turn`.

    Raises:
        UsageError: It is one.
    """
    if recipe.stages and not in_turn:
        first = f"'{next(iter(recipe.stages))}'"
        why = f"{first} is merged first, and gone then"
        hint = f"{named('cluster')} {FILES} shares them out in turn; or merge what comes first by commands of their own"
        raise UsageError(f"cannot share out merges of merges: {why}", option=option, hint=hint)
    if recipe.as_lora is not None:
        why = "an adapter is one file, whose layout shows at the end"
        raise UsageError(f"cannot share out what {named('as_lora')} writes: {why}", option=option)


def plan_of_units(prepared: Prepared, cluster: str | None) -> dict[str, Any]:
    """What the plan of a merge says besides, where it is to be shared out: see `spread`.

    Raises:
        UsageError: It cannot be.
    """
    several = len(prepared.devices) if len(prepared.devices) > 1 else None
    if cluster is None and several is None:
        return {}
    refuse_unshared(cluster, prepared)
    return {"units": spread(prepared.job, several if cluster is None else None)}


def on_local_card(job: Job, device: str, progress: Reporter) -> Job:
    """The job on the card that is this process's own, where a launcher starts several on this machine.

    A card that is named as the `device` stays.
    """
    chosen = local_card() if device in ("auto", "cuda") else None
    if chosen is None or job.source.device.type != "cuda":
        return job
    card, variable = chosen
    progress.note(f"this process takes {card}, by {variable}={os.environ[variable]}")
    return dataclasses.replace(job, source=source_of(job.plan, str(card)))


def share_out(
    prepared: Prepared,
    data: coefficients.Read | None,
    out: Path,
    *,
    force: bool,
    ready: Callable[[], object] | None,
    uploader: Uploader | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Take part in a merge until its output is complete; the manifest.

    Raises:
        ModelMergeError: As for `merge`; or the processes are not alike.
    """
    job, digest = prepared.job, digest_of(prepared, data)

    def do(crew: Shared) -> tuple[Layout, Finish]:
        merge = prepared if data is None else _with_coefficients(prepared, data, digest, out, crew, progress)
        findings = run_shared(merge.job, crew, crew.shard, progress)

        def finish(publication: Publication, digests: Digests) -> dict[str, Any]:
            manifest = complete(merge, out, publication, findings, None, 0.0, digest, digests)
            for note in manifest["notes"]:
                progress.note(note)
            return manifest

        return job.plan.layout, finish

    undertaking = Undertaking(
        job=job, digest=digest, stream=prepared.stream, beside="all", nbytes=job.plan.bytes_written, do=do
    )
    return undertake(undertaking, out, force=force, ready=ready, uploader=uploader, progress=progress)


def undertake(
    work: Undertaking,
    out: Path,
    *,
    force: bool,
    ready: Callable[[], object] | None,
    uploader: Uploader | None = None,
    progress: Reporter,
) -> dict[str, Any]:
    """Take part in work until its output is complete; the manifest.

    What is uploaded is committed by the process that has put the output in place, or finds it there.

    Raises:
        ModelMergeError: As for the verb; or the processes are not alike.
    """
    plan, digest, source = work.job.plan, work.digest, work.job.source
    manifest = _complete(out, digest)
    if manifest is not None:
        progress.note(f"{out} is complete already")
        return manifest
    begun = job_at(out) or {}
    mine = begun.get("digest") != digest  # else `force` is for whoever began to say
    try:
        check_output(out, input_paths(plan), force=force if mine else bool(begun["force"]))
    except OutputError:
        manifest = _complete(out, digest)  # since it was looked for
        if manifest is None:
            raise
        return manifest
    if ready is not None:
        ready()
    fetch(plan, progress, beside=work.beside, stream=work.stream)
    about = {
        "digest": digest, "force": force, "lease": lease(), "host": socket.gethostname(), "process": os.getpid(),
        # Cards of one kind have the same bits, whatever their numbers.
        "circumstances": circumstances(source.device) | {"device": source.device.type},
        "inputs": {f"{model.name}: {model.address(file)}": [stat.st_size, stat.st_mtime_ns]
                   for model in plan.models for file, stat in model.files.items()},
    }  # fmt: skip
    try:
        with _joined(out, about, progress) as folder, _explained(folder, out, digest):
            manifest = _complete(out, digest)  # while the folder was looked for
            if manifest is not None:
                return manifest
            if folder.is_new:
                check_room(folder.path.parent, work.nbytes + beside_bytes(plan, work.beside == "all"))
            return _take_part(work, out, folder, uploader, progress)
    except BaseException:
        if (job_at(out) or {}).get("digest") == digest:
            progress.note(f"what is finished is kept in {work_folder(out)}: the same command takes it up")
        raise
    manifest = _complete(out, digest)
    assert manifest is not None, "an error that was explained away had a manifest"
    return manifest


def _complete(out: Path, digest: str) -> dict[str, Any] | None:
    """The manifest of the output if it is this merge's; what is left of the work on it goes."""
    manifest, job = finished(out, digest, hashed=False), job_at(out)
    # Who was killed while he removed the folder has left it under another name.
    if manifest is not None and (job is None or job.get("digest") == digest):
        remove_work(out, uuid.uuid4().hex)
    return manifest


@contextlib.contextmanager
def _joined(out: Path, about: Mapping[str, Any], progress: Reporter) -> Iterator[WorkFolder]:
    """The work folder of the merge. What dead processes have left of another is removed."""
    try:
        while True:
            folder = WorkFolder(out, about)
            if folder.job["digest"] == about["digest"]:
                break
            try:
                with contextlib.suppress(Gone):  # that merge has become complete
                    if folder.has_others():
                        raise _refusal(folder, about, out)
                    progress.note(f"what another merge has left in {folder.path} is removed")
                    folder.remove()
            finally:
                folder.leave()
    except OSError as error:
        raise OutputError(f"cannot prepare the output in {out.resolve().parent}: {reason(error)}") from error
    if not folder.is_new:
        progress.note(f"takes part in the merge that {folder.job['host']} began")
    with folder:
        yield folder


def _refusal(folder: WorkFolder, about: Mapping[str, Any], out: Path) -> OutputError:
    """Why a process cannot take part: the first thing in which it differs."""
    host = folder.job["host"]
    for name, theirs, mine in differences(folder.job["circumstances"], about["circumstances"]):
        hint = f"OMP_NUM_THREADS={theirs}" if name == "threads" else "all processes must be alike"
        words = f"{name} {theirs}, and here it is {mine}"
        return OutputError(f"the merge that {host} began into {out} has {words}", hint=hint)
    for name, _, _ in differences(folder.job["inputs"], about["inputs"]):
        return OutputError(
            f"the merge that {host} began into {out} has another input: {name}",
            hint="all processes must see the same files, of the same time",
        )
    return OutputError(f"{host} is making another merge into {out}", hint="wait for it, or name another directory")


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two records, by name, there and here; None for what one lacks."""
    there, here = dict(_flat(theirs)), dict(_flat(mine))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            yield name, there.get(name), here.get(name)


def _flat(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What bears on the bits, by name; the variable of the threads shows in their number."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif name != "OMP_NUM_THREADS":
            yield name, value


@contextlib.contextmanager
def _explained(folder: WorkFolder, out: Path, digest: str) -> Iterator[None]:
    """Let an error pass that comes of the output's being complete: somebody has finished it meanwhile."""
    try:
        yield
    except Exception as error:
        if finished(out, digest, hashed=False) is not None:
            return
        if isinstance(error, Gone):
            raise OutputError(f"{folder.path} has been removed: the merge into {out} is off") from error
        raise


def _take_part(
    work: Undertaking, out: Path, folder: WorkFolder, uploader: Uploader | None, progress: Reporter
) -> dict[str, Any]:
    plan = work.job.plan
    prepare_process(sum(len(model.files) for model in plan.models))
    for part in (part for model in plan.models for part in model.parts):
        part.hashes_along = False
    hand_on = None
    if uploader is not None:
        hand_on, uploader.commits = uploader.add, False
    with contextlib.closing(Shared(folder, work.job, progress, hand_on)) as crew:
        layout, finish = work.do(crew)
        digests = crew.digests()
        if uploader is not None:
            uploader.close()
        while (manifest := finished(out, work.digest, hashed=False)) is None:
            claim = folder.claim("publish")
            if claim is None:
                folder.wait()
                continue
            with claim:
                mine = _publish(work, layout, lambda publication: finish(publication, digests), out, folder, crew)
            if uploader is not None:
                uploader.commits = mine
        folder.remove()
        clear_remains(out)  # of a run of one process before
        return manifest


def _with_coefficients(
    prepared: Prepared, data: coefficients.Read, digest: str, out: Path, crew: Shared, progress: Reporter
) -> Prepared:
    """The merge with the coefficients that one of the processes finds."""

    def find(unit: Unit) -> dict[str, Any]:
        with scratches(out) as scratch:
            return coefficients.find(prepared.job, data, digest, scratch, resume=False, progress=progress)

    ((_, search),) = crew.share([Unit("fit:coefficients")], find)
    return with_coefficients(prepared, data, search)


def _publish(
    work: Undertaking, layout: Layout, finish: Callable[[Publication], dict[str, Any]], out: Path, folder: WorkFolder,
    crew: Shared,
) -> bool:  # fmt: skip
    """Put the output in place; False where somebody has done it."""
    publication = Publication(out, folder.take_files(), layout, force=bool(folder.job["force"]))
    if finished(out, work.digest, hashed=False) is not None:  # by somebody who has no hold of the files any more
        return False
    publication.recover()
    publication.digests |= crew.shards()
    manifest = finish(publication)
    seconds = round(folder.seconds, 3)
    whole = {**manifest, "workers": crew.workers(), "seconds": seconds, "files": publication.listing()}
    publication.publish(as_file(whole))
    return True
