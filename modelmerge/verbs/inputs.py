"""What the verbs share: opening models that belong together, and telling afterwards what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from modelmerge import method
from modelmerge.checkpoint import hub
from modelmerge.checkpoint.reader import Checkpoint, attach, open_checkpoint
from modelmerge.checkpoint.reference import Reference, parse, parse_experts
from modelmerge.checkpoint.wire import STREAM_BYTES
from modelmerge.checkpoint.writer import CARD, check_output, finished, is_companion
from modelmerge.engine import Source, default_workers, find_device
from modelmerge.errors import PlanError, ReferenceNotFound
from modelmerge.plan import Plan, TensorPlan
from modelmerge.recipe import FORMAT, versions
from modelmerge.report import Reporter

Beside = Literal["all", "cards", "nothing"]  # what of the files beside the weights a run needs


def as_references(experts: Sequence[str | Path] | Mapping[str, str | Path]) -> tuple[str, ...]:
    """`[NAME=]REF` of each expert, given so or as a mapping of name to reference."""
    if isinstance(experts, Mapping):
        return tuple(f"{name}={reference}" for name, reference in experts.items())
    return tuple(map(str, experts))


def open_models(base: str, experts: Sequence[str]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The base and the experts, every header read; task vectors and adapters among them must be of this base.

    Raises:
        ReferenceNotFound: A reference leads nowhere.
        HubError: The Hub refuses, or cannot be reached.
        CheckpointError: A file is malformed.
        PlanError: A task vector or an adapter is of another base, or stands where the base should.
    """
    return open_references(parse(base), parse_experts(experts))


def open_references(reference: Reference, others: Sequence[Reference]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """`open_models` for references that have been parsed."""
    origin = open_checkpoint(reference)
    if origin.adapter is not None:
        raise ReferenceNotFound(
            f"{reference.text} is a PEFT adapter, not a base",
            hint=f"its base was '{origin.adapter.base}'" if origin.adapter.base else "name the model it was trained on",
        )
    if origin.vector is not None:
        raise ReferenceNotFound(
            f"{reference.text} is a task vector, not a base", hint=f"its base was {origin.vector.base}"
        )
    opened = tuple(attach(open_checkpoint(other), origin) for other in others)
    vectors = [expert for expert in opened if expert.vector is not None and expert.vector.base_sha256 is not None]
    if vectors:
        ours = tuple(sorted(origin.digests().values()))
        for expert in vectors:
            assert expert.vector is not None
            if expert.vector.base_sha256 != ours:
                raise PlanError(
                    f"'{expert.name}' is a task vector of another base than {reference.text} (the sha256 differs)",
                    hint=f"its base was '{expert.vector.base}'",
                )
    return origin, opened


def source_of(plan: Plan, device: str) -> Source:
    """Where the plan's task vectors come from, on the device of that name.

    Raises:
        DeviceError: There is no such device.
    """
    found = find_device(device)
    return Source(plan, found, default_workers(found))


def disentangler(name: str, values: Mapping[str, Any]) -> tuple[method.Disentangler, Any]:
    """A disentangling method with its options.

    Raises:
        UsageError: There is no such method, or an option is wrong.
    """
    chosen = method.load(name, "disentangle")
    return chosen, method.make_options(chosen, name, values)


def fingerprint(plan: Plan, *told: Any) -> str:
    """Digest of everything that determines the weights' bytes, as far as it can be had without reading tensors."""
    files = [
        (m.reference.address(file), stat.st_size, stat.st_mtime_ns if m.reference.repository is None else 0)
        for m in plan.models
        for file, stat in m.files.items()
    ]
    names = [model.name for model in plan.models]
    return hashlib.sha256(
        json.dumps([told, names, files, versions()], sort_keys=True, default=str).encode()
    ).hexdigest()


def record(model: Checkpoint, digests: Mapping[Path, str]) -> dict[str, Any]:
    """What a manifest says of an input."""
    return {
        "name": model.name,
        "reference": model.reference.text,
        "path": model.reference.location,
        "files": {
            model.reference.address(file): {"sha256": digest, "bytes": model.files[file].st_size}
            for file, digest in digests.items()
        },
    }


def stamp(device: object) -> dict[str, Any]:
    """What every manifest says of its making: the format, where, when, with which versions."""
    return {
        "format": FORMAT,
        "device": str(device),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def listing(source: Source, tensors: Iterable[tuple[TensorPlan, str, str]]) -> dict[str, Any]:
    """What every plan says: the models, the device, and what each tensor is stored as and what happens to it."""
    made = source.plan
    return {
        "base": {"name": made.base.name, "reference": made.base.reference.text},
        "experts": [{"name": expert.name, "reference": expert.reference.text} for expert in made.experts],
        "device": str(source.device),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "stored_as": stored_as, "action": action,
             "reason": t.reason}
            for t, stored_as, action in tensors
        ],
        "expert_only": {name: list(experts) for name, experts in made.expert_only.items()},
        "remarks": remarks(made),
    }  # fmt: skip


def remarks(plan: Plan) -> list[str]:
    """What a person should know of how the models were read, each with the model's name in front."""
    return [f"'{model.name}': {remark}." for model in plan.models for remark in model.remarks]


def input_paths(plan: Plan) -> list[Path]:
    """Every path that an output must keep away from."""
    local = [model for model in plan.models if model.reference.repository is None]
    paths = [path for model in local for path in (model.reference.path, *model.files)]
    return paths if len(local) == len(plan.models) else [*paths, hub.cache_directory()]


def begin(
    plan: Plan,
    out: Path,
    determined_by: str,
    *,
    force: bool,
    resume: bool,
    ready: Callable[[], object] | None,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """The last checks before the work; with `resume`, the manifest of an output that is complete already.

    `ready` is called once all else is known to be well.

    Raises:
        OutputError: The output would damage something.
    """
    done = finished(out, determined_by) if resume else None
    check_output(out, input_paths(plan), force=force or done is not None)
    if ready is not None:
        ready()
    if done is not None:
        reporter.note(f"{out} is complete already")
    return done


def wanted(plan: Plan, *, beside: Beside, stream: bool = False) -> list[tuple[hub.Repository, list[str]]]:
    """What a run needs of the repositories on the Hub: weight files, but for a stream, and what lies beside them.

    Args:
        plan: The plan.
        beside: Of what lies beside the weights: the models' cards, and with `all` the base's companions too.
        stream: Weight files are to be read over ranges, where that can be.
    """
    needed = []
    for model in plan.models:
        remote = model.reference.repository
        if remote is not None:
            whole = beside == "all" and model is plan.base
            needed.append((remote, _places(model, remote, cards=beside != "nothing", companions=whole, stream=stream)))
    return needed


def _places(
    model: Checkpoint, remote: hub.Repository, *, cards: bool, companions: bool, stream: bool = False
) -> list[str]:
    """The files of a model's repository that are needed, by their place there."""
    # A tensor whose elements lie in another order would be read over and over again.
    infos = model.tensors.values()
    parts = [*infos, *(part for info in infos if info.change for part in info.change.parts)]
    gathered = {part.file for part in parts if part.strides is not None}
    places = [remote.place(file) for file in model.files if not stream or file in gathered]
    if model.directory is not None:
        folder = f"{remote.inside}/" if remote.inside else ""
        lies = {place.removeprefix(folder): place for place in remote.files if place.startswith(folder)}
        places += [
            place for name, place in lies.items() if (cards and name == CARD) or (companions and is_companion(name))
        ]
    return places


def with_downloads(told: dict[str, Any], plan: Plan, *, beside: Beside, streamed: int | None) -> dict[str, Any]:
    """A plan as it is told, with the bytes to download, the shared cache they go to, and a stream's memory.

    `streamed` are the bytes to be read over ranges, where weight files are not stored.
    """
    needed = wanted(plan, beside=beside, stream=streamed is not None)
    stored = sum(hub.download_bytes(remote, places) for remote, places in needed)
    told["bytes"] = {"download": stored + (streamed or 0), **told["bytes"]}
    cache = {"directory": str(hub.cache_directory()), "free": hub.free_bytes(), "enough": stored <= hub.free_bytes()}
    told["cache"] = cache if needed and streamed is None else None
    if streamed:
        told["peak_memory"]["host"] += STREAM_BYTES * sum(model.streamed for model in plan.models)
    return told


def fetch(plan: Plan, reporter: Reporter, *, beside: Beside, stream: bool) -> None:
    """Have what a run needs of repositories on the Hub in the shared cache; nothing to do for local models.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    hub.fetch(wanted(plan, beside=beside, stream=stream), reporter)
    for model in plan.models:
        if model.reference.repository is not None:
            model.look_again()


def fetch_whole(models: Iterable[Checkpoint], reporter: Reporter) -> None:
    """Have whole models from the Hub in the shared cache, with what lies beside their weights.

    Raises:
        HubError: The disk is too small, the Hub refuses, or cannot be reached.
    """
    remote = [(model, model.reference.repository) for model in models if model.reference.repository is not None]
    hub.fetch([(there, _places(model, there, cards=False, companions=True)) for model, there in remote], reporter)
    for model, _ in remote:
        model.look_again()
