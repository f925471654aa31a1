"""Open the base and its experts together: task vectors and adapters must be of that base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from modelmerge.checkpoint.adapter import Translation, translate
from modelmerge.checkpoint.adapter_stacks import in_memory, on_stacks
from modelmerge.checkpoint.lora_files import translate_file
from modelmerge.checkpoint.pairing import component_of
from modelmerge.checkpoint.portable import model_name
from modelmerge.checkpoint.reader import Checkpoint, VectorOf, open_checkpoint, with_prefix
from modelmerge.checkpoint.reference import NO_STAGES, Named, Reference, Stages, parse, parse_experts
from modelmerge.errors import PlanError, ReferenceNotFound


def as_references(experts: Sequence[str | Path | Named] | Mapping[str, str | Path]) -> tuple[str | Named, ...]:
    """`[NAME=]REF` of each expert, given so or as a mapping of name to reference."""
    if isinstance(experts, Mapping):
        return tuple(Named(name, str(reference)) for name, reference in experts.items())
    return tuple(each if isinstance(each, Named) else str(each) for each in experts)


def open_models(
    base: str | Named, experts: Sequence[str | Named], exclude: Sequence[str] = (), stages: Stages = NO_STAGES
) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The base and the experts, every header read; task vectors and adapters among them must be of this base.

    Of adapters, keys that globs of `exclude` match need no place in the base. `stages` are the places of what a recipe
    merges before.

    Raises:
        ReferenceNotFound: A reference leads nowhere.
        HubError: The Hub refuses, or cannot be reached.
        CheckpointError: A file is malformed.
        PlanError: A task vector or an adapter is of another base, or stands where the base should.
    """
    return open_references(parse(base, stages), parse_experts(experts, stages), exclude)


def open_references(
    reference: Reference, others: Sequence[Reference], exclude: Sequence[str] = ()
) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """`open_models` for references that have been parsed."""
    origin = open_model(reference, exclude)
    if origin.adapter is not None:
        hint = f"its base was '{origin.adapter.base}'" if origin.adapter.base else "name the model it was trained on"
        if origin.adapter.lone:
            hint = "name the model first, then the LoRA files as its experts; what they add to it is merged"
        raise ReferenceNotFound(f"{reference.text} is {origin.adapter.kind}, not a base", hint=hint)
    if origin.vector is not None:
        raise ReferenceNotFound(
            f"{reference.text} is a task vector, not a base", hint=f"its base was {origin.vector.base}"
        )
    experts = tuple(attach(open_model(_on(reference, other), exclude), origin, exclude) for other in others)
    for expert in experts:
        vector = expert.vector
        digests = None if vector is None else vector.base_sha256
        if vector is not None and digests is not None and digests != tuple(sorted(origin.digests().values())):
            raise PlanError(
                f"'{expert.name}' is a task vector of another base than {reference.text} (the sha256 differs)",
                hint=f"its base was '{vector.base}'",
            )
    return origin, experts


def open_model(reference: Reference, exclude: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint behind a reference, with the adapters on it that the reference names.

    Raises:
        ReferenceNotFound: As for `open_checkpoint`; or what follows a `+` is no adapter, or what stands before it one.
        CheckpointError: A file is malformed.
        PlanError: An adapter does not fit the model.
    """
    model = open_checkpoint(reference.parts[0])
    for adapter in reference.adapters:
        from modelmerge.checkpoint.sums import with_adapter  # it takes torch

        change = open_checkpoint(adapter)
        for each, wrong in ((model, model.adapter or model.vector), (change, change.adapter is None)):
            if wrong:
                what = "MODEL" if each is model else "ADAPTER"
                kind = "no model" if each is model else "no adapter"
                message = f"{reference.text}: {each.reference.text} is {kind}, and stands where {what} should"
                raise ReferenceNotFound(message, hint="write it as MODEL+ADAPTER")
        model = with_adapter(model, attach(change, model, exclude), reference)
    return model


def _on(base: Reference, other: Reference) -> Reference:
    """An expert's reference; of the base with an adapter on it, the adapter's."""
    *model, last = other.parts
    same = [part.location for part in model] == [part.location for part in base.parts]
    return replace(last, name=other.name) if same else other


def attach(expert: Checkpoint, base: Checkpoint, exclude: Sequence[str] = ()) -> Checkpoint:
    """An adapter as a task vector of this base; any other checkpoint as it is.

    Raises:
        CheckpointError: The adapter's keys and its config disagree.
        PlanError: The adapter does not fit the base.
    """
    if expert.adapter is None:
        return expert
    translate_all = translate_file if expert.adapter.lone else _onto_component
    translation = translate_all(expert, base, exclude)
    vector = VectorOf(expert.adapter.base, None, frozenset(base.tensors.keys() - translation.changes.keys()))
    remarks = (*expert.remarks, *translation.remarks)
    ours = {base.name, Path(base.reference.title).name, Path(str(base.config.get("_name_or_path"))).name}
    if expert.adapter.base and Path(expert.adapter.base).name not in ours:
        remarks += (f"it says it was trained on '{model_name(expert.adapter.base)}', and the base is '{base.name}'",)
    return replace(expert, tensors=translation.changes, vector=vector, remarks=remarks, excluded=translation.excluded)


def _onto_component(expert: Checkpoint, base: Checkpoint, exclude: Sequence[str]) -> Translation:
    """The adapter as changes to the one component of the base that it fits."""
    if base.components.keys() == {""}:
        return _translated(expert, base, exclude)
    fitting: dict[str, Translation] = {}
    failures: list[PlanError] = []
    for folder in base.components:
        part = component_of(base, folder, base.components)
        try:
            translation = _translated(expert, part, exclude)
        except PlanError as failure:
            failures.append(failure)
            continue
        if translation.changes.keys() & part.tensors.keys():
            fitting[folder] = translation
    if len(fitting) > 1:
        raise PlanError(
            f"'{expert.name}' could be an adapter of the base's {' or '.join(f'{folder}/' for folder in fitting)}; "
            "which is meant cannot be told",
            hint=f"name the component as the base: {base.reference.text}/{next(iter(fitting))}",
        )
    for folder, translation in fitting.items():
        remark = (f"it changes the base's '{folder}/'",) if folder else ()
        changes = with_prefix(base.components[folder].prefix, translation.changes)
        return replace(translation, changes=changes, remarks=(*translation.remarks, *remark))
    if failures:
        raise failures[0]
    raise PlanError(f"'{expert.name}' is an adapter that changes none of the base's components")


def _translated(expert: Checkpoint, base: Checkpoint, exclude: Sequence[str]) -> Translation:
    """The adapter as changes to the base, whether it speaks of the base's names or of those in memory."""
    assert expert.adapter is not None, "the expert is an adapter"
    direct, error = None, None
    if not expert.adapter.config.get("target_parameters"):
        try:
            direct = translate(expert, base, exclude)
        except PlanError as failure:
            error = failure
        if direct is not None and direct.changes.keys() <= base.tensors.keys():
            return direct
    view = in_memory(base)
    # Of what the base lacks, heads stay as they are, and stacks of experts have a place in memory.
    if direct is not None and not (direct.changes.keys() - base.tensors.keys()) & view.base.tensors.keys():
        return direct
    try:
        changes, rest = on_stacks(expert, view.base)
        translation = translate(rest, view.base, exclude) if rest.tensors else Translation({}, frozenset(), ())
    except PlanError as failure:  # the names in memory do not fit either
        if direct is None:
            raise error or failure from None
        return direct
    return replace(translation, changes=view.back({**changes, **translation.changes}))
