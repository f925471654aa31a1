"""The manifest (`modelmerge.json`): what was merged, from what, how, and what was noticed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from modelmerge.checkpoint.companions import TEMPLATE, TOKENIZER, library_of, origins
from modelmerge.checkpoint.manifest_file import inputs_of
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.engine.job import Findings, Job, Source
from modelmerge.engine.rounding import stored_narrow
from modelmerge.errors import RecipeError
from modelmerge.methods import registry
from modelmerge.methods.contract import Method, TransformSpec
from modelmerge.methods.options import describe
from modelmerge.methods.words import parse_transform
from modelmerge.plan.recipe import FORMAT, Recipe
from modelmerge.plan.tensors import DTYPES, ONLY_IN_BASE, Plan, TensorPlan
from modelmerge.record import card
from modelmerge.record.command import command_of, flag, settings_of
from modelmerge.record.fingerprint import circumstances, versions
from modelmerge.record.loading import code_of, task_of
from modelmerge.record.redaction import part_name


def record(model: Checkpoint, digests: Mapping[Path, str]) -> dict[str, Any]:
    """What a manifest says of an input."""
    return {
        "name": model.name,
        "reference": model.reference.text,
        "path": model.reference.location,
        "files": {
            model.address(file): {"sha256": digest, "bytes": model.files[file].st_size}
            for file, digest in digests.items()
        },
        **({"parts": [part.location for part in model.reference.parts]} if model.reference.adapters else {}),
    }


def stamp(device: object) -> dict[str, Any]:
    """What every manifest says of its making: the format, when, where, with which versions."""
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **circumstances(device),
    }


def listing(source: Source, tensors: Iterable[tuple[TensorPlan, str, str]]) -> dict[str, Any]:
    """What every plan says: the models, the device, and what each tensor is stored as and what happens to it."""
    plan = source.plan
    return {
        "base": {"name": plan.base.name, "reference": plan.base.reference.text},
        "experts": [{"name": expert.name, "reference": expert.reference.text} for expert in plan.experts],
        "device": str(source.device),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "stored_as": stored_as, "action": action,
             "reason": t.reason}
            for t, stored_as, action in tensors
        ],
        "expert_only": {name: list(experts) for name, experts in plan.expert_only.items()},
        "remarks": remarks(plan),
    }  # fmt: skip


def remarks(plan: Plan) -> list[str]:
    """What a person should know of how the models were read, each with the model's name in front."""
    return [f"'{model.name}': {remark}." for model in plan.models for remark in model.remarks]


_ON_HUB = re.compile(r"hf://([^/@]+/[^/@]+)@")
_SHOWN = 5  # names of tensors in a note
_LOSSY = 0.05  # a loss to rounding above which a merge is worth storing wider


def as_file(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it lies on the disk."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def refuse_changed(
    recipe_digests: Mapping[str, str], models: Sequence[Checkpoint], digests: Sequence[Mapping[Path, str]]
) -> None:
    """Refuse inputs whose sha256 is not the recorded one.

    Raises:
        RecipeError: A file has changed since the recipe was made.
    """
    for model, files in zip(models, digests, strict=True):
        for file, digest in files.items():
            part = model.part_of(file).reference
            if part.is_stage:
                continue
            address, name = part.address(file), part_name(part.location) if model.reference.adapters else model.name
            # Where the recipe was published, by the model's name.
            expected = recipe_digests.get(address, recipe_digests.get(address.replace(part.location, name)))
            if recipe_digests and expected != digest:
                raise RecipeError(
                    f"{file}: not the file that the recipe was made with (its sha256 differs)",
                    hint="restore the file, or make the merge anew without the recipe",
                )


def notes_of(job: Job, findings: Findings, digests: Sequence[Mapping[Path, str]]) -> list[str]:
    """What a reader of the result should know: one sentence each. `digests` are those of each model's files."""
    read = [*remarks(job.plan), *_copies(job.plan.models, digests)]
    for model in job.plan.models:
        if fault := card.front_matter(model.directory)[1]:
            read.append(f"'{model.name}': the front matter of its card cannot be read and is left out: {fault}.")
    notes = []
    for name, experts in job.plan.expert_only.items():
        notes.append(f"'{name}' is not in the base and was left out; it is in {', '.join(experts)}.")
    if len(notes) > _SHOWN:
        notes = [f"{len(notes)} tensors that the base lacks were left out; modelmerge.json names them."]
    lone = [tensor.name for tensor in job.plan.tensors.values() if tensor.reason == ONLY_IN_BASE]
    if lone:
        some = ", ".join(f"'{name}'" for name in lone[:_SHOWN]) + (" and others" if len(lone) > _SHOWN else "")
        notes.append(
            f"No expert has {len(lone)} tensor{'s' * (len(lone) > 1)} of the base, which stay as they are: {some}."
        )
    notes = read + [f"'{t.name}': {t.reason}." for t in job.plan.tensors.values() if t.mismatched] + notes
    alike: dict[tuple[str, int], list[str]] = {}
    for (expert, reason), count in sorted(Counter((expert, why) for _, expert, why in findings.left_out).items()):
        alike.setdefault((reason, count), []).append(f"'{expert}'")
    for (reason, count), names in alike.items():
        who = names[0] if len(names) == 1 else f"Each of {', '.join(names[:-1])} and {names[-1]}"
        notes.append(f"{who} was left out of {count} tensor{'s' * (count > 1)}: {reason}.")
    loss = findings.rounding.relative_error() if findings.rounding else None
    if loss is not None and loss > _LOSSY:
        notes.append(
            f"Storing in {_stored_as(job)} changes the merged task vector by {loss:.1%}: the dtype float32 keeps it."
        )
    return notes


def _copies(models: Sequence[Checkpoint], digests: Sequence[Mapping[Path, str]]) -> list[str]:
    """Remarks on experts whose weights are another model's, from a place of their own."""
    contents = [tuple(sorted(files.values())) for files in digests]
    firsts = [contents.index(content) for content in contents]
    return [
        f"'{model.name}': its weights are the same files as "
        + ("the base's: its task vector is zero." if first == 0 else f"those of '{models[first].name}'.")
        for model, first in zip(models, firsts, strict=True)
        if model is not models[first] and model.reference.location != models[first].reference.location
    ]


def _stored_as(job: Job) -> str:
    """The 16-bit dtypes of the output's merged tensors."""
    narrow = stored_narrow(job.plan)
    return " and ".join(name for name, code in DTYPES.items() if code in narrow)


def _rounding(job: Job, findings: Findings) -> dict[str, Any] | None:
    """What storing lost of the merged task vector, where anything is stored in 16 bits."""
    if findings.rounding is None:
        return None
    return {
        "stored_as": _stored_as(job),
        "relative_error": findings.rounding.relative_error(),
        "tensors_measured": findings.merged,
    }


def groups_of(job: Job) -> list[dict[str, Any]]:
    """Which method merges what, with all its settings."""
    return [
        {
            "method": group.name,
            "settings": describe(group.options),
            "tensors": [tensor.name for tensor in group.tensors],
        }
        for group in job.groups
    ]


def write_card(
    recipe: Recipe, job: Job, out: Path, notes: Sequence[str], files: Path, results: Mapping[str, Mapping[str, Any]]
) -> bytes:
    """The model card of a merge, as it lies on the disk.

    `files` is where the other files of the output lie now, and `results` are the manifests of the merges before it.
    """
    transforms = [
        _applied(name, "transform", spec, dataclasses.asdict(options))
        for name, spec, options in map(parse_transform, recipe.disentangle)
    ]
    methods = [_applied(recipe.method, "merge", registry.load(recipe.method), recipe.options)]
    for group in job.groups:  # an override is said with its options among the settings
        for name in (group.name, group.method.behind(group.options)):
            if name is not None and name not in [source.name for source in methods]:
                methods.append(_applied(name, "merge", registry.load(name), {}))
    if recipe.coefficients:
        note = f"The coefficients of {len(recipe.coefficients)} tensors were found on unlabelled data"
        notes = [*notes, f"{note}; modelmerge.json has them."]
        if not registry.load(recipe.method).on_data:
            transforms.append(_applied("adamerging", "merge", registry.load("adamerging"), {}))
    names = ("at", "layers", "rest", "dtype", "include", "exclude", "vocab", "files_from", "seed", "as_lora")
    settings = settings_of(recipe, *names)
    title, adapter = out.resolve().name, recipe.as_lora is not None
    return card.render(
        title=title, base=_as_told(job.plan.base, None),
        experts=[_as_told(expert, weight) for expert, weight in zip(job.plan.experts, job.weights, strict=True)],
        methods=methods, transforms=transforms,
        settings={flag(name): value for name, value in settings.items()},
        command=command_of(recipe, str(out)), notes=notes, library=library_of(job.plan.base),
        versions=versions(), device=str(job.source.device), adapter=adapter, stacked=bool(recipe.layers),
        task=task_of(files), code_lines=code_of(files, title, job.plan.base.config),
        beside="" if adapter else _beside(job.plan), stages=[_stage(name, result) for name, result in results.items()],
    ).encode()  # fmt: skip


def _stage(name: str, manifest: Mapping[str, Any]) -> card.Stage:
    """A merge before this one, as the card tells it."""
    models = list(inputs_of(manifest))
    base, *experts = (model["reference"] for model in models)
    on_hub = (_ON_HUB.match(file) for model in models for file in model["files"])
    repositories = [match[1] for match in on_hub if match]
    return card.Stage(
        name=name, method=manifest["recipe"]["method"], base=base, experts=experts, repositories=repositories
    )


def _beside(plan: Plan) -> str:
    """A sentence on where tokenizer and chat template of the output come from; empty for a model without."""
    sources = origins(plan.base, plan.giver)
    if sources[TOKENIZER] is None:
        return ""
    names = {kind: "the base" if model is plan.base else f"'{model.name}'" for kind, model in sources.items() if model}
    tokens = f"The tokenizer is that of {names[TOKENIZER]}"
    if plan.vocabulary is not None and plan.vocabulary.new:
        tokens += f", with {len(plan.vocabulary.new):,} tokens of other models added"
    template = f"the chat template that of {names[TEMPLATE]}" if TEMPLATE in names else "and there is no chat template"
    return f"{tokens}, {template}."


def _applied(
    name: str, kind: Literal["merge", "transform"], spec: Method | TransformSpec, options: Mapping[str, Any]
) -> card.Source:
    """A method as the card shows it: its options as they are typed, and what follows from them."""
    settings = describe(spec.options(**options)) if options else {}
    values = {}
    for key, value in settings.items():
        word = key.replace("_", " ") if key not in options else flag(key) if kind == "merge" else key.replace("_", "-")
        values[word if kind == "merge" else f"{name} {word}"] = value
    bibtex, summary = spec.citation.bibtex(spec.paper) if spec.citation else "", registry.summary(name, kind)
    return card.Source(name=name, summary=summary, paper=spec.paper, bibtex=bibtex, options=values)


def _as_told(model: Checkpoint, weight: float | None) -> card.Model:
    """A model as the card tells it."""
    remotes = [part.repository for part in model.reference.parts]
    remote = remotes[0] if not model.reference.adapters else None
    return card.Model(
        name=model.name, reference=model.reference.text, weight=weight, front=card.front_matter(model.directory)[0],
        repository=remote.name if remote else None, commit=remote.commit if remote else None,
        parts=tuple(each.name for each in remotes if each is not None) if remote is None else (),
    )  # fmt: skip


def record_of_stages(manifest: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of a manifest that tell of the merges before it, given their own: recipes, and what came of them."""
    recipes = {name: {**result["recipe"], "stages": {}} for name, result in results.items()}
    entries = ("inputs", "tensors", "rounding", "notes", "seconds", "files")
    return {
        "recipe": {**manifest["recipe"], "stages": recipes},
        "stages": {name: {entry: result[entry] for entry in entries} for name, result in results.items()},
    }


def manifest_of(
    recipe: Recipe, job: Job, coefficients: Mapping[str, Any] | None, out: Path, digests: Sequence[Mapping[Path, str]],
    findings: Findings, notes: Sequence[str], staging: Publication, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a merge; `coefficients` is what there is to say of coefficients that were found on data."""
    tensors = job.plan.tensors.values()
    # Absolute paths and commits, so that the recipe can be replayed from anywhere.
    base, *experts = (model.reference.named for model in job.plan.models)
    replayable = dataclasses.replace(recipe, base=base, experts=tuple(experts))
    return {
        **stamp(job.source.device),
        "recipe": replayable.to_dict(),
        "command": command_of(recipe, str(out)),
        "inputs": {
            "base": record(job.plan.base, digests[0]),
            "experts": [record(e, files) for e, files in zip(job.plan.experts, digests[1:], strict=True)],
        },
        "tensors": {
            "merged": sum(t.action == "merge" for t in tensors),
            "groups": groups_of(job),
            "copied": {t.name: t.reason for t in tensors if t.action == "copy"},
            "expert_only": {name: list(experts) for name, experts in job.plan.expert_only.items()},
            "left_out": [{"tensor": t, "expert": e, "reason": r} for t, e, r in sorted(findings.left_out)],
            "common_rows": {t.name: t.rows for t in tensors if t.rows is not None},
            "tied": {t.name: t.twin for t in tensors if t.twin is not None},
            "figures": dict(sorted(findings.figures.items())),
            "dtypes": {t.name: t.out_dtype for t in tensors},
        },
        "rounding": _rounding(job, findings),
        **({"adaptation": dict(coefficients)} if coefficients is not None else {}),
        "notes": list(notes),
        "seconds": round(seconds, 3),
        "files": staging.listing(),
    }
