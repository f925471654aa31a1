"""What the verbs share: opening models that belong together, and telling afterwards what they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from modelmerge import method
from modelmerge.checkpoint.reader import Checkpoint, attach, open_checkpoint
from modelmerge.checkpoint.reference import parse, parse_experts
from modelmerge.engine import Source, default_workers, find_device
from modelmerge.errors import PlanError, ReferenceNotFound
from modelmerge.plan import Plan, TensorPlan
from modelmerge.recipe import FORMAT, versions


def as_references(experts: Sequence[str | Path] | Mapping[str, str | Path]) -> tuple[str, ...]:
    """`[NAME=]REF` of each expert, given so or as a mapping of name to reference."""
    if isinstance(experts, Mapping):
        return tuple(f"{name}={reference}" for name, reference in experts.items())
    return tuple(map(str, experts))


def open_models(base: str, experts: Sequence[str]) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The base and the experts, every header read; task vectors and adapters among them must be of this base.

    Raises:
        ReferenceNotFound: A reference leads nowhere.
        CheckpointError: A file is malformed.
        PlanError: A task vector or an adapter is of another base, or stands where the base should.
    """
    reference, others = parse(base), parse_experts(experts)
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
    files = [(str(file), stat.st_size, stat.st_mtime_ns) for model in plan.models for file, stat in model.files.items()]
    return hashlib.sha256(json.dumps([told, files, versions()], sort_keys=True, default=str).encode()).hexdigest()


def record(model: Checkpoint, digests: Mapping[Path, str]) -> dict[str, Any]:
    """What a manifest says of an input."""
    return {
        "name": model.name,
        "reference": model.reference.text,
        "path": str(model.reference.path),
        "files": {
            str(file): {"sha256": digest, "bytes": model.files[file].st_size} for file, digest in digests.items()
        },
    }


def stamp(source: Source) -> dict[str, Any]:
    """What every manifest says of its making: the format, where, when, with which versions."""
    return {
        "format": FORMAT,
        "device": str(source.device),
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
    return [path for model in plan.models for path in (model.reference.path, *model.files)]
