"""Models at tasks, whatever the suite: each model opened, each task measured once, one report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.opening import as_references, open_references
from modelmerge.checkpoint.reader import MANIFEST, Checkpoint, open_checkpoint
from modelmerge.checkpoint.reference import Reference, parse, parse_all
from modelmerge.checkpoint.staging import CARD, companions, replace_file
from modelmerge.engine.parallel import find_device
from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.evaluation import cache as stored
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.scores import Score, check_gates, differences, mean, parse_gate, summarise
from modelmerge.plan.downloads import fetch_whole
from modelmerge.progress import Reporter
from modelmerge.record import card
from modelmerge.record.fingerprint import versions
from modelmerge.record.manifest import record, stamp


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a suite measures, and how.

    Args:
        suite: Its name.
        about: What the report says of the measuring.
        tasks: Their names; a None is measured in one go, and names its tasks itself.
        depends: What the score at a task depends on besides the model and the seed, as plain data; without it nothing
            is cached.
        measure: The scores of a model at a task, by task.
        onto_base: Models are seen by the base's names, and what they lack is the base's; there must be one.
        base_counts: Scores may depend on the base too, by what lies beside its weights.
        items: How many items a task has, where `measure` advances the progress by them itself.
        experts: By task, what the expert for it is called, where that is not the task's name.
        versions: Of packages that bear on the scores, besides modelmerge's own.
    """

    suite: str
    about: Mapping[str, Any]
    tasks: tuple[str | None, ...]
    depends: Callable[[str | None], Any] | None
    measure: Callable[[Model, str | None], dict[str, Score]]
    onto_base: bool = False
    base_counts: bool = False
    items: Callable[[str | None], int] | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def run(
    bench: Bench,
    models: Sequence[str | Path] | Mapping[str, str | Path],
    base: str | Path | None,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    seed: int | None,
    cache: bool,
    compare: str | Path | None,
    fail_under: Sequence[str],
    update_card: bool,
    device: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Measure the base, the experts and the models; the report.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    gates = [parse_gate(text) for text in fail_under]
    looked_at, others = parse_all(as_references(models), "model"), parse_all(as_references(experts), "expert")
    start = parse(str(base)) if base is not None else None
    if not looked_at:
        raise UsageError("no model is named", hint="give at least one MODEL")
    if any(gate.what == "normalized" for gate in gates) and not others:
        raise UsageError("--fail-under normalized needs the experts", hint="--expert TASK=REF for each task")
    if update_card:
        _refuse_cardless(looked_at)
    earlier = _read_report(Path(compare)) if compare is not None else None
    found = find_device(device)
    opened = _open_all(start, [*others, *looked_at])
    roles = [*(["base"] if start else []), *(["expert"] * len(others)), *(["model"] * len(looked_at))]
    try:
        fetch_whole(opened, reporter)
        each = len(bench.tasks) if bench.items is None else sum(map(bench.items, bench.tasks))
        reporter.stage("evaluating", len(opened) * each, "runs" if bench.items is None else "items")
        rows = []
        for role, model in zip(roles, opened, strict=True):
            entry = record(model, model.digests())
            with_base = model.vector is not None or bench.onto_base or (bench.base_counts and start is not None)
            digest = _digest(model, opened[0] if with_base else None)
            seen = Model(model, opened[0] if start else None, found, onto_base=bench.onto_base)
            scores, cached = _scores(bench, seen, digest, seed, cache, str(found), reporter)
            rows.append({**entry, "role": role, "digest": digest, "scores": scores, "cached": cached})
            _refuse_other_tasks(rows)
    finally:
        for model in opened:
            model.close()
    names = list(rows[0]["scores"])
    own = summarise(names, rows, bench.experts)
    stamped = stamp(found)
    report: dict[str, Any] = {
        "suite": bench.suite, **stamped, "versions": {**stamped["versions"], **bench.versions}, **bench.about,
        "seed": seed, "tasks": names, "models": rows, "notes": _notes(rows),
        **({"own_experts": own} if own else {}),
    }  # fmt: skip
    if earlier is not None:
        report["comparison"] = {"with": str(compare), "models": differences(report, earlier)}
    if gates:
        report["gate"] = check_gates(gates, names, rows, bench.experts)
    if update_card:
        for reference, row in zip(looked_at, rows[-len(looked_at) :], strict=True):
            _write_card(reference, row)
    return report


def merged_from(row: Mapping[str, Any]) -> dict[str, Any]:
    """A merge's base and experts: `base`, a path, and `experts`, their names, with their `paths`; empty for others."""
    try:
        inputs = json.loads((Path(row["path"]) / MANIFEST).read_bytes())["inputs"]
        return {
            "base": str(inputs["base"]["path"]),
            "experts": [str(each["name"]) for each in inputs["experts"]],
            "paths": [str(each["path"]) for each in inputs["experts"]],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def base_name(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The repository's name of the base that was evaluated too, or that a merge was made from; else empty."""
    bases = [each["path"] for each in report["models"] if each["role"] == "base"]
    return Path((bases[0] if bases else merged_from(row).get("base", "")).partition("@")[0]).name


def normalise_by_published(
    report: dict[str, Any],
    row: dict[str, Any],
    shares: Mapping[str, float | None],
    *,
    of: str,
    known: Mapping[str, Any],
) -> None:
    """Put a model's mean share of published scores beside its own, where no expert was measured; the note says so.

    `shares` are by task, `known` is what is published, `of` what the shares are of, and `model` in it the base's name.
    """
    report["published"] = known
    row["normalised_by_published"] = mean(list(shares.values()))
    if row["normalised_by_published"] is not None:
        report["notes"].append(
            f"'{row['name']}' has {row['normalised_by_published']:.1%} of the {of} of {known['model']} (FusionBench), "
            f"not measured here; over {', '.join(shares)}"
        )


def _open_all(base: Reference | None, others: Sequence[Reference]) -> list[Checkpoint]:
    """The base, if there is one, and the others.

    Raises:
        UsageError: One of them is a change to a base that is not named.
    """
    if base is not None:
        origin, opened = open_references(base, others)
        return [origin, *opened]
    alone = [open_checkpoint(reference) for reference in others]
    for model in alone:
        if model.adapter is not None or model.vector is not None:
            kind = "a PEFT adapter" if model.adapter is not None else "a task vector"
            raise UsageError(f"'{model.name}' is {kind}: its base must be named", hint="--base REF")
    return alone


def _digest(model: Checkpoint, base: Checkpoint | None) -> str:
    """Of everything about a model that a score can depend on: its weights, what lies beside them, and its base's."""
    beside = {place: sha256(file) for place, file in companions(model.directory).items()}
    told = [sorted(model.digests().values()), beside, _digest(base, None) if base is not None else None]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _scores(
    bench: Bench, model: Model, digest: str, seed: int | None, cache: bool, device: str, reporter: Reporter
) -> tuple[dict[str, Any], list[str]]:
    """A model's scores by task, and the tasks whose scores were known."""
    scores: dict[str, Any] = {}
    known: list[str] = []
    for task in bench.tasks:
        keeps = bench.depends is not None
        told = {"suite": bench.suite, "model": digest, "task": task, "seed": seed,
                "depends": bench.depends(task) if bench.depends is not None else None}  # fmt: skip
        name = stored.key({**told, "device": device, "versions": {**versions(), **bench.versions}})
        entry = stored.recall(name) if cache and keeps else None
        if entry is None:
            started = time.monotonic()
            measured = bench.measure(model, task)
            model.check()
            entry = {
                **told,
                "scores": {each: score.to_dict() for each, score in measured.items()},
                "seconds": round(time.monotonic() - started, 3),
            }
            if keeps:
                stored.remember(name, entry)
        else:
            known += entry["scores"]
            if bench.items is not None:
                reporter.advance(bench.items(task), "measured before")
        scores |= entry["scores"]
        if bench.items is None:
            reporter.advance(1, f"{model.name} {task or ''}".rstrip())
    return scores, known


def _refuse_other_tasks(rows: Sequence[Mapping[str, Any]]) -> None:
    first, last = rows[0], rows[-1]
    odd = sorted(first["scores"].keys() ^ last["scores"].keys())
    if odd:
        holder = first if odd[0] in first["scores"] else last
        lacking = last if holder is first else first
        raise ModelMergeError(
            f"'{holder['name']}' has a score for '{odd[0]}', and '{lacking['name']}' has none",
            hint="every model must be measured at the same tasks",
        )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    known, every = sum(len(row["cached"]) for row in rows), sum(len(row["scores"]) for row in rows)
    if not known:
        return []
    return [f"{known} of {every} scores were measured before, in the same way; --no-cache measures again."]  # fmt: skip


def _read_report(file: Path) -> dict[str, Any]:
    """An earlier report.

    Raises:
        ModelMergeError: It cannot be read, or is none with scores.
    """
    try:
        report = json.loads(file.expanduser().read_bytes())
        if not report["tasks"] or not all(model["scores"] for model in report["models"]):
            raise ValueError
    except OSError as error:
        raise ModelMergeError(f"--compare {file}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelMergeError(
            f"--compare {file}: no report of scores", hint="save one: modelmerge eval SUITE ... --json > report.json"
        ) from error
    return report


def _refuse_cardless(models: Sequence[Reference]) -> None:
    for model in models:
        if model.repository is not None or not model.path.is_dir():
            raise UsageError(
                f"--update-card: '{model.text}' is no directory here, whose card could be written",
                hint="evaluate the directory, then push it",
            )


def _write_card(reference: Reference, row: Mapping[str, Any]) -> None:
    """Put a model's scores into its card."""
    place = reference.path / CARD
    text = place.read_text(encoding="utf-8") if place.exists() else f"# {reference.name}\n"
    kind = card.front_matter(reference.path).get("pipeline_tag")
    results = []
    for task, score in row["scores"].items():
        if score["score"] is None:
            continue
        detail = [f"{score['count']:,} items" if score["count"] else ""]
        detail += [f"standard error {score['stderr']:.2g}" if score["stderr"] else ""]
        detail += [f"{score['normalised']:.1%} of the expert's" if score["normalised"] is not None else ""]
        results.append(
            card.Result(
                task=kind if isinstance(kind, str) else "other", dataset=task, metric=score["metric"],
                value=score["score"], detail=", ".join(part for part in detail if part),
            )
        )  # fmt: skip
    replace_file(reference.path, CARD, card.with_results(text, results, name=reference.name).encode())
