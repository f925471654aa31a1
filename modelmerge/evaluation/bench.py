"""What suites share: how they run, and models at tasks: each model opened, each task measured once, one report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from modelmerge.checkpoint.companions import companions
from modelmerge.checkpoint.digest import cache_directory, sha256
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.manifest_file import Made
from modelmerge.checkpoint.opening import as_references, open_model, open_references
from modelmerge.checkpoint.output import replace_file
from modelmerge.checkpoint.reader import MANIFEST, Checkpoint
from modelmerge.checkpoint.reference import STAGE, Reference, parse, parse_all
from modelmerge.devices import find_device
from modelmerge.errors import CheckpointError, ModelMergeError, OutputError, UsageError, named
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import ModelRow, Report, ScoreEntry
from modelmerge.evaluation.scores import Score, check_gates, differences, mean, parse_gate, summarise
from modelmerge.plan.downloads import fetch_whole
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.fingerprint import versions
from modelmerge.record.manifest import record, stamp

_ENTRIES = 1  # format of the cache's: older ones are not read
SAVE = f"save one: modelmerge eval SUITE ... {named('json')} > report.json"
Models = Sequence[str | Path] | Mapping[str, str | Path]  # `[NAME=]REF` each, or a mapping of name to reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What every suite takes besides the models and its own options; `weights` uses four of them.

    Args:
        base: The base. Suites of scores evaluate it too; adapters and task vectors need it.
        experts: The experts. Suites of scores evaluate them too, and normalise a task's scores by the expert of its
            name.
        seed: Seed of all random numbers; None is the suite's default.
        cache: Reuse scores that were measured before in the same way.
        compare: File of an earlier report; the report has the differences to it, with their significance.
        fail_under: Least values, `avg=70%`, `normalized=0.95` or `TASK=0.8`. `gate` in the report says whether every
            model reaches them.
        device: Where models run: cpu, cuda, cuda:N or auto.
        progress: Receives progress and notes.
    """

    base: str | Path | None = None
    experts: Models = ()
    seed: int | None = None
    cache: bool = True
    compare: str | Path | None = None
    fail_under: Sequence[str] = ()
    device: str = "auto"
    progress: Reporter = SILENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a suite measures, and how.

    Args:
        suite: Its name.
        about: The suite's own entries in the report.
        tasks: Their names. A None is measured in one go, and names its tasks itself.
        depends: What the score at a task depends on besides the model and the seed, as plain data. Without it nothing
            is cached.
        measure: The scores at a task, by task, of what `open` gives for a model.
        open: A model, made ready once for all tasks; let go before the next one.
        onto_base: Models are seen by the base's names, and what they lack is the base's; there must be one.
        base_counts: Scores may depend on the base too, by what lies beside its weights.
        items: How many items a task has, where `measure` advances the progress by them itself.
        experts: By task, the name of its expert, where that is not the task's name.
        packages: Others that bear on the scores, besides modelmerge's own.
    """

    suite: str
    about: Mapping[str, Any]
    tasks: tuple[str | None, ...]
    depends: Callable[[str | None], Any] | None
    measure: Callable[[Any, str | None], dict[str, Score]]
    open: Callable[[Model], Any] = lambda model: model
    onto_base: bool = False
    base_counts: bool = False
    items: Callable[[str | None], int] | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()

    def versions(self) -> dict[str, str]:
        """Versions of all packages that bear on the scores."""
        return {**versions(), **{name: _version(name) for name in self.packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require(what: str, install: str, *modules: str) -> None:
    """Refuse to begin without libraries that `what` needs and `pip install` brings by the words `install`.

    Raises:
        ModelMergeError: One is not installed.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            lacking = f"{what} needs {error.name or error}, which is not installed"
            raise ModelMergeError(lacking, hint=f"pip install {install}") from error


def run(bench: Bench, models: Models, running: Running) -> Report:
    """Measure the base, the experts and the models; the report.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    gates = [parse_gate(text) for text in running.fail_under]
    ours, experts = parse_all(as_references(models), "model"), parse_all(as_references(running.experts), "expert")
    base = parse(str(running.base)) if running.base is not None else None
    if not ours:
        raise UsageError("no model is named", hint="give at least one MODEL")
    if any(gate.what == "normalized" for gate in gates) and not experts:
        hint = f"{named('experts')} TASK=REF for each task"
        raise UsageError("normalized needs the experts", option="fail_under", hint=hint)
    earlier = _read_report(Path(running.compare)) if running.compare is not None else None
    device = find_device(running.device)
    checkpoints = _open_all(base, [*experts, *ours])
    roles = [*(["base"] if base else []), *(["expert"] * len(experts)), *(["model"] * len(ours))]
    try:
        fetch_whole(checkpoints, running.progress)
        each = len(bench.tasks) if bench.items is None else sum(map(bench.items, bench.tasks))
        running.progress.stage("evaluating", len(checkpoints) * each, "runs" if bench.items is None else "items")
        rows: list[ModelRow] = []
        for role, checkpoint in zip(roles, checkpoints, strict=True):
            entry = record(checkpoint, checkpoint.digests())
            with_base = checkpoint.vector is not None or bench.onto_base or (bench.base_counts and base is not None)
            digest = _digest(checkpoint, checkpoints[0] if with_base else None)
            model = Model(checkpoint, checkpoints[0] if base else None, device, onto_base=bench.onto_base)
            scores, repeats = _scores(bench, model, digest, running)
            rows.append(cast(ModelRow, {**entry, "role": role, "digest": digest, "scores": scores, "cached": repeats}))
            _refuse_other_tasks(rows)
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()
    tasks = list(rows[0]["scores"])
    recalled, every = sum(len(row["cached"]) for row in rows), sum(len(row["scores"]) for row in rows)
    owners = summarise(tasks, rows, bench.experts)
    header = stamp(device)
    report = cast(Report, {
        "suite": bench.suite, **header, "versions": bench.versions(), **bench.about,
        "seed": running.seed, "tasks": tasks, "models": rows,
        "notes": [f"{recalled} of {every} scores were measured before, in the same way: from the cache"][:recalled],
        **({"own_experts": owners} if owners else {}),
    })  # fmt: skip
    if earlier is not None:
        report["comparison"] = {"with": str(running.compare), "models": differences(report, earlier)}
    if gates:
        report["gate"] = check_gates(gates, tasks, rows, bench.experts)
    return report


def merge_inputs(directory: str | Path) -> dict[str, Any]:
    """A merge's `base`, its `experts` by name, and their `paths`, as its manifest has them; empty for what is none."""
    try:
        inputs = read_json(Path(directory) / MANIFEST, Made)["inputs"]
    except CheckpointError:
        return {}
    names, paths = ([str(each[key]) for each in inputs["experts"]] for key in ("name", "path"))
    if any(path.startswith(STAGE) for path in (str(inputs["base"]["path"]), *paths)):
        return {}  # some of them were merged for it, and are gone
    return {"base": str(inputs["base"]["path"]), "experts": names, "paths": paths}


def normalise_by_published(
    report: Report,
    bases: Mapping[str, Any],
    experts: Mapping[str, str],
    *,
    what: str,
    kind: Callable[[ModelRow, Mapping[str, Any]], str] = lambda row, figures: "experts",
) -> None:
    """Where no expert was measured: put a model's mean share of published scores beside its own, and say so in a note.

    Args:
        report: The report; it is changed.
        bases: By the name of a base's repository, what is published.
        experts: By task, the published name of its expert.
        what: The word for the scores.
        kind: Which experts of what is published a model is a merge of.
    """
    paths = [each["path"] for each in report["models"] if each["role"] == "base"]
    for row in (row for row in report["models"] if row["role"] == "model"):
        base = Path((paths[0] if paths else merge_inputs(row["path"]).get("base", "")).partition("@")[0]).name
        scores = row["scores"]
        if base not in bases or not experts or any(scores[task]["normalised"] is not None for task in experts):
            continue
        key = kind(row, bases[base])
        shares = {
            task: None if (score := scores[task]["score"]) is None else score / bases[base][key][name]
            for task, name in experts.items()
        }
        report["published"] = {"model": base, **bases[base]}
        row["normalised_by_published"] = share = mean(list(shares.values()))
        if share is not None:
            report["notes"].append(
                f"'{row['name']}' has {share:.1%} of the {what} published for the {key} of {base} (FusionBench), "
                f"not measured here; over {', '.join(shares)}"
            )


def _open_all(base: Reference | None, others: Sequence[Reference]) -> list[Checkpoint]:
    """The base, if there is one, and the others.

    Raises:
        UsageError: One of them is a change to a base that is not named.
    """
    if base is not None:
        origin, checkpoints = open_references(base, others)
        return [origin, *checkpoints]
    alone = [open_model(reference) for reference in others]
    for model in alone:
        if model.adapter is not None or model.vector is not None:
            kind = model.adapter.kind if model.adapter is not None else "a task vector"
            raise UsageError(f"'{model.name}' is {kind}: its base must be named", hint=f"{named('base')} REF")
    return alone


def _digest(model: Checkpoint, base: Checkpoint | None) -> str:
    """Digest of everything about a model that a score can depend on: its weights, its other files, and its base's."""
    beside = {place: sha256(file) for place, file in companions(model).items()}
    content = [sorted(model.digests().values()), beside, _digest(base, None) if base is not None else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _scores(bench: Bench, model: Model, digest: str, running: Running) -> tuple[dict[str, ScoreEntry], list[str]]:
    """A model's scores by task, and the tasks whose scores came from the cache."""
    scores: dict[str, ScoreEntry] = {}
    repeats: list[str] = []
    ready: Any = None
    for task in bench.tasks:
        keeps, item = bench.depends is not None, f"{model.name} {task or ''}".rstrip()
        request = {"suite": bench.suite, "model": digest, "task": task, "seed": running.seed,
                   "depends": bench.depends(task) if bench.depends is not None else None}  # fmt: skip
        name = entry_name({**request, "device": str(model.device), "versions": bench.versions()})
        entry = recall(name) if running.cache and keeps else None
        if entry is None:
            if bench.items is None:
                running.progress.begin(item)
            start = time.monotonic()
            ready = bench.open(model) if ready is None else ready
            results = bench.measure(ready, task)
            model.check()
            entries = {each: score.to_dict() for each, score in results.items()}
            entry = {**request, "scores": entries, "seconds": round(time.monotonic() - start, 3)}
            if keeps:
                remember(name, entry)
        else:
            repeats += entry["scores"]
            if bench.items is not None:
                running.progress.advance(bench.items(task), "measured before")
        scores |= entry["scores"]
        if bench.items is None:
            running.progress.advance(1, item)
    return scores, repeats


def _refuse_other_tasks(rows: Sequence[ModelRow]) -> None:
    odd = sorted(rows[0]["scores"].keys() ^ rows[-1]["scores"].keys())
    if odd:
        holder, lacking = sorted((rows[0], rows[-1]), key=lambda row: odd[0] not in row["scores"])
        raise ModelMergeError(
            f"'{holder['name']}' has a score for '{odd[0]}', and '{lacking['name']}' has none",
            hint="every model must be measured at the same tasks",
        )


def _read_report(file: Path) -> Report:
    """An earlier report.

    Raises:
        ModelMergeError: It cannot be read, or is none with scores.
    """
    report: Report = read_json(file.expanduser(), Report, error=ModelMergeError, hint=SAVE)
    if not report.get("tasks") or not all(model.get("scores") for model in report.get("models", [])):
        raise ModelMergeError(f"{file}: no report of scores", hint=SAVE)
    return report


def entry_name(content: Mapping[str, Any]) -> str:
    """The name of an entry: a digest of what it depends on."""
    return hashlib.sha256(json.dumps([_ENTRIES, content], sort_keys=True).encode()).hexdigest()


def recall(name: str, part: str = "scores") -> dict[str, Any] | None:
    """The entry of that name, which has that part; None where there is none that can be read."""
    try:
        entry = json.loads(_file(name).read_bytes())
        return entry if isinstance(entry[part], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(name: str, entry: Mapping[str, Any]) -> None:
    """Keep an entry, whole or not at all. A cache that cannot be written costs time, never a result."""
    file = _file(name)
    with contextlib.suppress(OSError, OutputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file.parent, file.name, json.dumps(entry).encode())


def _file(name: str) -> Path:
    return cache_directory() / "eval" / f"{name}.json"
