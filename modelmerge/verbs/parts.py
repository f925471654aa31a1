"""merge --part and --finish: one merge among machines that share nothing, each of which writes some of the files.

A part is a directory with its weight files, under names that no program takes for a model's, and a manifest that says
of what merge they are. Parts are put together by copying: nothing is merged then, and they stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from modelmerge.checkpoint import manifest_file
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.layout import Layout, Shard
from modelmerge.checkpoint.output import check_output
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.scratch import reason
from modelmerge.checkpoint.staging import Staging
from modelmerge.engine.job import Findings, Job
from modelmerge.engine.merge import nothing_found, run
from modelmerge.engine.parallel import MOST_THREADS, threads
from modelmerge.engine.units import deal, shard_units
from modelmerge.errors import OutputError, UsageError, named
from modelmerge.plan.downloads import fetch, with_downloads
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import Reporter
from modelmerge.record.fingerprint import versions
from modelmerge.record.manifest import record, refuse_changed, stamp
from modelmerge.verbs.output import complete, output_of
from modelmerge.verbs.prepare import Prepared, digest_of, threads_of_leftovers
from modelmerge.verbs.shared import differences, refuse_undivided

_ENDING = ".part"  # of a weight file
_MOST = 999_999  # parts
_SHOWN = 8  # parts that are missing
_BLOCK = 1 << 22  # bytes that are copied at a time


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of how many."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True, slots=True)
class _Part:
    """A part as it was found: where, and what its manifest says."""

    place: Path
    manifest: Mapping[str, Any]

    @property
    def share(self) -> Share:
        return Share(self.manifest["part"]["number"], self.manifest["part"]["of"])

    def __str__(self) -> str:
        return f"part {self.share} in {self.place}"


def share_of(text: str, prepared: Prepared) -> Share:
    """The part that is asked for.

    Raises:
        UsageError: There is no such part, or the merge has none.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)  # as far as _MOST
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"must be I/N, a part's number and how many there are, like 3/8, not '{text}'", option="part")
    _refuse_undivided(prepared, "part")
    share, count = Share(int(match[1]), int(match[2])), len(prepared.job.plan.layout.shards)
    if share.of > count:
        files = f"{count} weight files" if count > 1 else "one weight file"
        hint = f"have fewer parts, or smaller files: {named('max_shard_size')}"
        raise UsageError(f"{text}: the output has {files}, too few for {share.of} parts", option="part", hint=hint)
    return share


def _refuse_undivided(prepared: Prepared, option: str) -> None:
    refuse_undivided(prepared.recipe, option)
    if prepared.data is not None:
        raise UsageError(
            f"cannot share out '{prepared.recipe.method}': its coefficients are found on data, in one process",
            option=option, hint="let one process merge, and share out its modelmerge.json: it has the coefficients",
        )  # fmt: skip


def _dealt(job: Job, share: Share) -> tuple[tuple[Shard, ...], float]:
    """The weight files of a part, the same on every machine, and its share of the work of merging."""
    units = shard_units(job, [tensor for tensor in job.plan.in_order() if tensor.numel])
    mine = deal(units, share.of)[share.number - 1]
    names, whole = {unit.name for unit in mine}, sum(unit.cost for unit in units)
    shards = tuple(shard for shard in job.plan.layout.shards if f"shard:{shard.filename}" in names)
    return shards, sum(unit.cost for unit in mine) / whole if whole else 0.0


def as_measured(recipe: Recipe, finish: Sequence[str | Path]) -> Recipe:
    """The recipe with what the parts to be put together have measured, so that no model is read for it again.

    Raises:
        OutputError: The first of them is another version's, or broken.
    """
    place = Path(finish[0]).expanduser() if finish else None
    if place is None or not (place / MANIFEST).is_file():  # which is said where all are looked for
        return recipe
    overlap = _read(place).manifest["job"].get("overlap")
    return dataclasses.replace(recipe, overlap=overlap) if isinstance(overlap, float) else recipe


def describe(prepared: Prepared, part: str | None, finish: Sequence[Path]) -> dict[str, Any]:
    """The plan of a part, or of putting parts together.

    Raises:
        ModelMergeError: As for `make` and `put_together`, as far as it shows before the work.
    """
    if part is not None:
        share = share_of(part, prepared)
        shards, work = _dealt(prepared.job, share)
        about = {"number": share.number, "of": share.of, "work": work}
        return {**prepared.describe(shards), "part": about}
    parts = _found(prepared, finish)
    entry, plan = prepared.describe(), prepared.job.plan
    del entry["passes"], entry["seconds"]
    entry["bytes"] = {"read": plan.bytes_written, "write": plan.bytes_written, "scratch": 0}
    entry["parts"] = [str(part.place) for part in parts]
    return with_downloads(entry, plan, beside="all", streamed=0)


def make(
    prepared: Prepared,
    share: Share,
    out: Path,
    *,
    force: bool,
    resume: bool,
    ready: Callable[[], object] | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Merge the weight files of a part into `out`; its manifest.

    Raises:
        ModelMergeError: As for `merge`.
    """
    job, plan, recorded = prepared.job, prepared.job.plan, prepared.recorded
    shards, _ = _dealt(job, share)
    layout = tuple(dataclasses.replace(shard, filename=f"{shard.filename}{_ENDING}") for shard in shards)
    with contextlib.ExitStack() as stack:
        if resume and (recorded is None or recorded.threads is None):
            stack.enter_context(threads_of_leftovers(out, digest_of(prepared, None, str(share))))
        digest = digest_of(prepared, None, str(share))
        output = stack.enter_context(
            output_of(plan, out, digest, force=force, resume=resume, ready=ready, progress=progress)
        )
        if output.complete is not None:
            return output.complete
        staging = output.stage(Layout(layout, {}, {key: shard for shard in layout for key in shard.tensors}))
        fetch(plan, progress, beside="nothing", stream=prepared.stream)
        findings = run(job, staging, progress)
        digests = [model.digests() for model in plan.models]
        if recorded is not None:
            refuse_changed(recorded.inputs, plan.models, digests)
        base, *experts = map(record, plan.models, digests)
        return output.publish({
            **stamp(job.source.device),
            "part": {"number": share.number, "of": share.of, "host": socket.gethostname()},
            "job": _identity(prepared),
            "inputs": {"base": base, "experts": experts},
            "findings": findings.to_dict(),
            "fingerprint": digest,
        })  # fmt: skip


def _identity(prepared: Prepared) -> dict[str, Any]:
    """What every machine must agree on beside the inputs' bytes, without paths and times, which are each one's own."""
    recipe, plan = prepared.recipe.to_dict(), prepared.job.plan
    for name in ("base", "experts", "unlabelled", "stages"):
        del recipe[name]
    recipe["coefficients"] = _sha256(recipe["coefficients"])
    tokens = None if plan.vocabulary is None else _sha256([plan.vocabulary.rows, [*plan.vocabulary.moved.items()]])
    headers = [(shard.filename, hashlib.sha256(shard.header).hexdigest()) for shard in plan.layout.shards]
    names = [model.name for model in plan.models]
    identity = {**recipe, "names of the models": names, "headers": _sha256(headers), "tokens": tokens}
    return dict(json.loads(json.dumps(identity)))


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def put_together(
    prepared: Prepared,
    places: Sequence[Path],
    out: Path,
    *,
    force: bool,
    resume: bool,
    ready: Callable[[], object] | None,
    progress: Reporter,
) -> dict[str, Any]:
    """Copy the weight files of all parts into one output, with all that goes beside them; its manifest.

    Raises:
        OutputError: A part is missing, damaged, or of another merge, or the output cannot be written.
        ModelMergeError: As for `merge`.
    """
    plan, parts = prepared.job.plan, _found(prepared, places)
    check_output(out, places, force=True)
    prepared = dataclasses.replace(prepared, remarks=[*prepared.remarks, *_remarks(parts)])
    with threads(parts[0].manifest["threads"]), contextlib.ExitStack() as stack:
        digest = digest_of(prepared)
        output = stack.enter_context(
            output_of(plan, out, digest, force=force, resume=resume, ready=ready, progress=progress)
        )
        if output.complete is not None:
            return output.complete
        fetch(plan, progress, beside="all", stream=True)
        digests = _hashed(prepared, parts, progress)
        staging = output.stage(plan.layout, companions=1)
        _copy(plan.layout, parts, staging, progress)
        findings = _findings_of(parts, prepared.job)
        manifest = complete(prepared, out, staging, findings, None, output.seconds, digest, digests)
        for note in manifest["notes"]:
            progress.note(note)
        workers = [_worker(part) for part in parts]
        return output.publish({**manifest, "machine": parts[0].manifest["machine"], "workers": workers})


def _findings_of(parts: Sequence[_Part], job: Job) -> Findings:
    findings = nothing_found(job)
    for part in parts:
        try:
            each = part.manifest["findings"]
            findings.add({**each, "left_out": [(tensor, expert, why) for tensor, expert, why in each["left_out"]]})
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{part.place / MANIFEST}: malformed: its findings", hint="make the part again"
            ) from error
    return findings


def _worker(part: _Part) -> dict[str, Any]:
    """Who made a part, as the manifests of merges that are shared out tell it."""
    about = {name: part.manifest[name] for name in ("device", "threads", "seconds")}
    return {"host": part.manifest["part"]["host"], **about, "units": len(part.manifest["files"])}


def _found(prepared: Prepared, places: Sequence[Path]) -> list[_Part]:
    """All parts of the merge, by their numbers.

    Raises:
        UsageError: The merge has none.
        OutputError: One is missing, or of another merge.
    """
    _refuse_undivided(prepared, "finish")
    parts: dict[int, _Part] = {}
    for place in places:
        part = _read(place)
        other = parts.setdefault(part.share.number, part)
        first = next(iter(parts.values()))
        if part.share.of != first.share.of:
            raise OutputError(f"{first} and {part} are of different numbers of parts", hint="cut the merge in one way")
        if other.manifest["files"] != part.manifest["files"]:
            raise OutputError(f"{other} has other bytes than the same in {part.place}", hint="name one of them")
    of = first.share.of
    missing = [str(Share(number, of)) for number in range(1, of + 1) if number not in parts]
    if missing:
        some = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else "")
        what = f"parts {some} are missing" if missing[1:] else f"part {some} is missing"
        hint = f"make it with {named('part')} {missing[0]}, and name its directory too: {named('finish')} DIR"
        raise OutputError(what, hint=hint)
    found = [parts[number] for number in sorted(parts)]
    for part in found:
        _refuse_unlike(prepared, part, found[0])
    return found


def _read(place: Path) -> _Part:
    hint = f"name what {named('part')} wrote"
    if not (place / MANIFEST).is_file():
        raise OutputError(f"{place} holds no part of a merge: {MANIFEST} is missing", hint=hint)
    manifest = read_json(place / MANIFEST, manifest_file.Part, error=OutputError, hint=hint)
    share, count = manifest["part"], manifest["threads"]
    if not (1 <= share["number"] <= share["of"] <= _MOST and 1 <= count <= MOST_THREADS):
        raise OutputError(f"{place / MANIFEST}: no part has such a number, or so many threads", hint=hint)
    return _Part(place, manifest)


def _refuse_unlike(prepared: Prepared, part: _Part, first: _Part) -> None:
    """Refuse a part that was made in another way than the first one, or than all is planned here."""
    count, device = first.manifest["threads"], prepared.job.source.device.type
    if part.manifest["threads"] != count:
        raise OutputError(
            f"{part} was made with {part.manifest['threads']} threads, and part {first.share} with {count}",
            hint=f"make part {part.share} again with OMP_NUM_THREADS={count}",
        )
    for name, theirs, mine in differences(part.manifest["versions"], versions()):
        hint = f"install what made the parts, or make part {part.share} again with what is here"
        raise OutputError(f"{part} was made with {name} {theirs}, and here it is {mine}", hint=hint)
    if part.manifest["device"].partition(":")[0] != device:
        hint = f"give {named('device')} as for the parts, or make part {part.share} again"
        raise OutputError(f"{part} was made on {part.manifest['device']}, and here it is {device}", hint=hint)
    for name, theirs, mine in differences(part.manifest["job"], _identity(prepared)):
        if name in ("headers", "tokens", "coefficients"):
            raise OutputError(f"{part} is of another merge: its {name} differ", hint="name its models and its recipe")
        hint = f"repeat the options of the parts, or make part {part.share} again"
        raise OutputError(f"{part} is of another merge: {name} is {theirs}, and here it is {mine}", hint=hint)


def _remarks(parts: Sequence[_Part]) -> list[str]:
    """What a reader should know of the machines."""
    kinds = [
        ", ".join(f"{value}" for name, value in part.manifest["machine"].items() if value and name != "OMP_NUM_THREADS")
        for part in parts
    ]
    if len(set(kinds)) == 1:
        return []
    several = "; ".join(dict.fromkeys(kinds))
    return [f"The parts were made on several kinds of machines ({several}): last bits can differ from those of one."]


def _hashed(prepared: Prepared, parts: Sequence[_Part], progress: Reporter) -> list[dict[Path, str]]:
    """The sha256 of the inputs' files, by model.

    Raises:
        OutputError: A part was made of others.
    """
    models = prepared.job.plan.models
    progress.stage("hashing", sum(stat.st_size for model in models for stat in model.files.values()))
    digests: list[dict[Path, str]] = []
    for model in models:
        digests.append({})
        for file, stat in model.files.items():
            digests[-1][file] = model.digest(file)
            progress.advance(stat.st_size, model.address(file))
    mine = [_contents(record(*each)["files"]) for each in zip(models, digests, strict=True)]
    for part in parts:
        inputs = part.manifest["inputs"]
        theirs = [_contents(each["files"]) for each in (inputs["base"], *inputs["experts"])]
        if theirs != mine:
            pairs = zip_longest(models, theirs, mine)
            others = ", ".join(model.name for model, there, here in pairs if model and there != here)
            what = f"{part} was made of other files than those here of {others or 'all models'}"
            raise OutputError(what, hint="name the models that the parts were made of, or make the parts again")
    return digests


def _contents(files: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The files of a model, wherever it lies: names and sha256."""
    return sorted((address.rpartition("/")[2], entry["sha256"]) for address, entry in files.items())


def _copy(layout: Layout, parts: Sequence[_Part], staging: Staging, progress: Reporter) -> None:
    """Copy the weight files out of the parts.

    Raises:
        OutputError: One is missing or damaged.
    """
    progress.stage("putting together", sum(shard.file_bytes for shard in layout.shards))
    listed = {name: (part, entry) for part in parts for name, entry in part.manifest["files"].items()}
    for shard in layout.shards:
        part, entry = listed.get(f"{shard.filename}{_ENDING}", (parts[0], None))
        if entry is None:
            raise OutputError(f"no part lists {shard.filename}", hint="make the parts again")
        is_old = shard.filename in staging.digests
        if not is_old:
            _copy_shard(shard, part, staging, progress)
        if staging.digests.get(shard.filename) != entry["sha256"]:
            if is_old:
                what = f"what an interrupted run has left of {shard.filename} is not what {part} has"
                raise OutputError(what, hint=f"begin anew, without {named('resume')}")
            raise _damaged(shard, part)


def _copy_shard(shard: Shard, part: _Part, staging: Staging, progress: Reporter) -> None:
    file = part.place / f"{shard.filename}{_ENDING}"
    stops = [*shard.tensors.values(), shard.file_bytes][1:]
    buffer = memoryview(bytearray(min(_BLOCK, shard.file_bytes)))
    try:
        with file.open("rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != shard.file_bytes or stream.read(len(shard.header)) != shard.header:
                raise _damaged(shard, part)
            for (name, start), stop in zip(shard.tensors.items(), stops, strict=True):
                position = start
                while position < stop:
                    count = stream.readinto(buffer[: stop - position])
                    if not count:
                        raise _damaged(shard, part)
                    staging.write(name, position - start, buffer[:count])
                    progress.advance(count, shard.filename)
                    position += count
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {reason(error)}", hint=f"make part {part.share} again") from error


def _damaged(shard: Shard, part: _Part) -> OutputError:
    what = f"{part.place / shard.filename}{_ENDING} is damaged: it is not what its part recorded"
    return OutputError(what, hint=f"copy part {part.share} again, or make it again")
