"""search: merge with each value of some options, measure, and keep the best.

Each candidate is written whole into a folder beside the output, measured there, and removed once a better one is known.
Where the method is linear in an option, one pass over the models serves all of its values. Of equal ones the first is
taken, in the order in which the values are named. With a budget, trials are merged one by one, each where those before
let expect most. A run that is taken up finds the scores of before, and merges the best anew if it has to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.companions import BASE
from modelmerge.checkpoint.digest import vouch
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.output import CARD
from modelmerge.checkpoint.staging import Staging
from modelmerge.engine.merge import run, run_scaled
from modelmerge.errors import ModelMergeError, OutputError, UsageError
from modelmerge.evaluation.custom import Metric
from modelmerge.methods import registry
from modelmerge.methods.options import Range
from modelmerge.plan.downloads import fetch
from modelmerge.plan.recipe import Dtype, OnMismatch, Recipe, Weights
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.manifest import as_file, write_card
from modelmerge.record.redaction import placeless
from modelmerge.verbs import adapted, measure
from modelmerge.verbs.candidates import Candidate, Search, Values, label_of, prepare_search
from modelmerge.verbs.output import beside_bytes, complete, output_of
from modelmerge.verbs.prepare import digest_of, refuse_unknown, threads_of_leftovers
from modelmerge.verbs.trials import is_numbers

_FREE = 0.95  # share of a disk's free bytes that candidates may take
_NEAR = 0.01  # of a range: what is so near to an end lies at it
_PLAIN = re.compile(r"[\w.+-]{1,100}")


def search(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    tries: Mapping[str, Values],
    on: Sequence[str] = (),
    metric: Metric | str | None = None,
    budget: int | None = None,
    weights: Weights | None = None,
    at: Sequence[str] = (),
    rest: str | None = None,
    disentangle: str | Sequence[str] = (),
    dtype: Dtype | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_mismatch: OnMismatch = "error",
    vocab: str | None = None,
    files_from: str = BASE,
    max_shard_size: str | None = None,
    seed: int = 0,
    as_lora: int | float | None = None,
    device: str = "auto",
    stream: bool = False,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Merge with each combination of values, measure, and write the best to `out`; its manifest.

    All results are in the manifest's `searched`.

    Args:
        base: As for `merge`, and so is all that is not named here.
        experts: As for `merge`.
        out: Where the best merge shall be.
        method: A merge method's name, or `auto`; `options` are the method's own.
        tries: By option of the method, `TRANSFORM.OPTION` of a transform in front, or `EXPERT.weight`, `*.weight` for
            each expert's, the values to choose from: `{"scale": [0.2, 0.3]}`, `{"scale": "0.1:1.0:0.1"}`,
            `{"awd.alpha": "0.1,0.2"}`; with a budget also all numbers between two, `{"scale": "0.1..1.5"}`, evenly
            over powers of ten: `{"awd.alpha": "0.01..10:log"}`.
        on: What to measure with: `custom:FILE:FUNCTION`, `clip:TASK`, `lm:TASK`, with settings behind commas.
        metric: A function to measure with, or `FILE:FUNCTION`; see `evaluate`.
        budget: Merge so many candidates, each chosen by the scores of those before (extra `search`).
        weights: As for `merge`.
        at: As for `merge`.
        rest: As for `merge`.
        disentangle: As for `merge`.
        dtype: As for `merge`.
        include: As for `merge`.
        exclude: As for `merge`.
        on_mismatch: As for `merge`.
        vocab: As for `merge`.
        files_from: As for `merge`.
        max_shard_size: As for `merge`.
        seed: As for `merge`.
        as_lora: As for `merge`.
        device: As for `merge`; the candidates are measured there too.
        stream: As for `merge`.
        force: Replace what is at `out`.
        resume: Keep scores when interrupted, and take up those of an interrupted run. Of a metric that is a file's.
        dry_run: Write nothing and measure nothing, and give the plan instead.
        progress: Hears of the progress.
        **options: The method's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    refuse_unknown(search, method, options)
    if twice := sorted(options.keys() & tries.keys()):
        raise UsageError(f"'{twice[0]}' is given, and tried", hint="leave one of them out")
    recipe = Recipe(
        method=method, base=str(base), experts=as_references(experts), options=options, weights=weights or {},
        at=tuple(at), disentangle=(disentangle,) if isinstance(disentangle, str) else tuple(disentangle),
        rest=rest, dtype=dtype, include=tuple(include), exclude=tuple(exclude), on_mismatch=on_mismatch,
        vocab=vocab, files_from=files_from, max_shard_size=max_shard_size, seed=seed, as_lora=as_lora,
    )  # fmt: skip
    prepared = prepare_search(
        recipe, tries, on, metric, budget=budget, device=device, stream=stream, look=not dry_run
    )  # fmt: skip
    if dry_run:
        with contextlib.closing(prepared):
            return {"plan": prepared.describe()}
    return execute_search(prepared, Path(out), force=force, resume=resume, progress=progress)


def execute_search(
    search: Search,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    ready: Callable[[], object] | None = None,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Merge and measure all candidates and put the best at `out`; its manifest, with all results in `searched`.

    The base is measured first, so that what cannot be measured is known before the work. `ready` is called once it is
    known that the work can begin. The inputs are closed afterwards.

    Raises:
        ModelMergeError: As for `merge` and `evaluate`.
    """
    try:
        with contextlib.ExitStack() as stack:
            identity = json.dumps([search.options(), measure.identity(search.measures, kept=resume)])
            if resume:
                stack.enter_context(threads_of_leftovers(out, digest_of(search.first, None, identity)))
            digest = digest_of(search.first, None, identity)
            whole = digest_of(search.first, None, identity, str(search.count))
            output = stack.enter_context(output_of(
                search.first.job.plan, out, whole, force=force, resume=resume, ready=ready, progress=progress
            ))  # fmt: skip
            if output.complete is not None:
                return output.complete
            for remark in search.remarks():
                progress.note(remark)
            staging = output.stage(digest=digest)
            with staging.folder() as folder:
                room = _room(search, folder)
                base = _measure_base(search, progress)
                about = _work_through(search, folder, out, room, staging, progress)
                best = _best(search.candidates)
                if best.place is None:  # it was merged by the run before
                    _merge_group(search, [best], folder, out, progress)
                assert best.place is not None, "it has just been given one"
                files = best.manifest["files"]
                staging.adopt(best.place, {name: files[name]["sha256"] for name in files if name != CARD})
            notes = [*best.manifest["notes"], _note(search, best), *_at_an_end(search, best)]
            for note in notes:
                progress.note(note)
            staging.write_file(
                CARD, write_card(best.prepared.recipe, best.prepared.job, out, notes, staging.place_of(""), {})
            )
            searched = {**_results(search, best, base), "on": about, "fingerprint": whole}
            return output.publish({**best.manifest, "notes": notes, "searched": searched})
    finally:
        search.close()


def _room(search: Search, folder: Path) -> int:
    """How many candidates fit on the disk at once.

    Raises:
        OutputError: Not even two, of which one can be the best so far.
    """
    plan, adapter = search.first.job.plan, search.first.recipe.as_lora is not None
    each, free = search.candidate_bytes() + beside_bytes(plan, companions=not adapter), shutil.disk_usage(folder).free
    room = int(_FREE * free) // max(each, 1)
    least = min(2, search.count)
    if room < least:
        raise OutputError(
            f"the search needs {least} candidates of {each:,} bytes at once, and {folder.parents[1]} has {free:,} free",
            hint="free some space, or name another output",
        )
    return min(room, search.count)


def _work_through(
    search: Search, folder: Path, out: Path, room: int, staging: Staging, progress: Reporter
) -> list[dict[str, Any]]:
    """Merge and measure all candidates, as many at a time as there is room for; what they were measured on."""
    scores = {json.dumps(entry["options"]): entry for entry in staging.noted}
    if scores:
        progress.note(f"an earlier run has measured {len(scores)} candidates")
    about: list[dict[str, Any]] = staging.noted[0]["on"] if staging.noted else []
    waiting: list[Candidate] = []
    kept = 0  # the best so far, once there is one

    def settle() -> None:
        nonlocal kept, about
        about = _measure(search, waiting, progress)
        for candidate in waiting:
            staging.note_down({"options": candidate.values, "scores": candidate.scores, "on": about})
        measured = [candidate for candidate in search.candidates if candidate.scores]
        place = measure.best([candidate.scores for candidate in measured])
        best = measured[place or 0]
        for candidate in measured:
            if candidate is not best and candidate.place is not None:
                shutil.rmtree(candidate.place)
                candidate.place = None
        if search.trials is not None:
            _tell(search, best, progress)
        waiting.clear()
        kept = 1

    for every in search.groups():
        group = []
        for candidate in every:
            before = scores.get(json.dumps(candidate.values))
            if before is None:
                group.append(candidate)
            else:
                candidate.scores = before["scores"]
        if waiting and kept + len(waiting) + len(group) > room:
            settle()
        while group:
            part = group[: room - kept - len(waiting)]
            _merge_group(search, part, folder, out, progress)
            waiting += part
            group = group[len(part) :]
            if group or search.trials is not None:
                settle()
    if waiting:
        settle()
    return about


def _tell(search: Search, best: Candidate, progress: Reporter) -> None:
    """Say how the trial that was measured last has done."""
    last, mean = search.candidates[-1], measure.average(search.candidates[-1].scores)["average"]
    score = "no score" if mean is None else f"{mean:.4g}"
    top = "the best so far" if best is last else f"the best: {measure.average(best.scores)['average']:.4g}"
    progress.note(f"trial {len(search.candidates)} of {search.trials}: {last.label}: {score}, {top}")


def _merge_group(search: Search, group: Sequence[Candidate], folder: Path, out: Path, progress: Reporter) -> None:
    """Merge candidates in one pass over the models, each into a folder of its own."""
    started = time.monotonic()
    first = group[0].prepared
    size = adapted.size_of(first.recipe)
    fetch(first.job.plan, progress, beside="all" if size is None else "cards", stream=first.stream)
    # One set of open files for all.
    prepared = [
        dataclasses.replace(each.prepared, job=dataclasses.replace(each.prepared.job, source=first.job.source))
        for each in group
    ]
    with contextlib.ExitStack() as stack:
        stagings = []
        for each in group:
            name = each.label.replace("=", "-").replace(" ", "_")
            plain = _PLAIN.fullmatch(name) is not None
            each.place = folder / (name if plain else f"candidate-{search.candidates.index(each) + 1}")
            layout = first.job.plan.layout if size is None else Layout((), {}, {})
            stagings.append(stack.enter_context(Staging(each.place, layout)))
        small = None
        if size is not None:
            assert len(group) == 1, "adapters are merged one by one"
            small = adapted.run(first.job, first.recipe, size, stagings[0], progress)
            findings = [small.findings]
        elif len(group) == 1:
            findings = [run(first.job, stagings[0], progress)]
        else:
            assert search.linear is not None, "others are merged one by one"
            findings = run_scaled([each.job for each in prepared], search.linear, stagings, progress)
        for each, ready, staging, noticed in zip(group, prepared, stagings, findings, strict=True):
            digests = [model.digests() for model in ready.job.plan.models]
            seconds = time.monotonic() - started
            each.manifest = complete(ready, out, staging, noticed, small, seconds, digest_of(ready), digests)
            staging.publish(as_file(each.manifest))
            assert each.place is not None, "it has just been given one"
            for name, entry in each.manifest["files"].items():
                vouch(each.place / name, str(entry["sha256"]))


def _measure_base(search: Search, progress: Reporter) -> Candidate | None:
    """The base's scores; None where its weights are read over the network only."""
    if search.first.stream:
        return None
    base = Candidate({}, search.first)
    for each in search.measures:
        (scores,), _ = each.scores([search.first.job.plan.base.reference.location], search.device, progress)
        base.scores = measure.join(base.scores, scores, each)
    measure.sign_of(base.scores)
    return base


def _measure(search: Search, candidates: Sequence[Candidate], progress: Reporter) -> list[dict[str, Any]]:
    """Measure candidates that were merged; what they were measured on."""
    about = []
    adapter = search.first.recipe.as_lora is not None
    more = {"base": search.first.job.plan.base.reference.location} if adapter else {}
    for each in search.measures:
        rows, report = each.scores([str(candidate.place) for candidate in candidates], search.device, progress, **more)
        for candidate, scores in zip(candidates, rows, strict=True):
            candidate.scores = measure.join(candidate.scores, scores, each)
        about.append({"on": list(each.texts), **measure.describe(report)})
    measure.sign_of(candidates[0].scores)
    return about


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the best mean; the first of equal ones.

    Raises:
        ModelMergeError: None has a mean.
    """
    place = measure.best([candidate.scores for candidate in candidates])
    if place is None:
        raise ModelMergeError(
            "no candidate has a score at all tasks: there is nothing to choose by", hint="measure on more items"
        )
    return candidates[place]


def _results(search: Search, best: Candidate, base: Candidate | None) -> dict[str, Any]:
    """What the manifest says of the search."""
    top = measure.average(best.scores)["average"]
    results = [
        {"options": dict(each.values), **measure.average(each.scores), "scores": each.scores}
        for each in search.candidates
    ]
    return {
        "options": search.options(),
        "budget": search.budget,
        "chosen": dict(best.values),
        "equal": [row["options"] for row, each in zip(results, search.candidates, strict=True)
                  if each is not best and row["average"] == top],
        "by": "the mean of the scores, not normalised; the first of equal ones",
        "less_is_better": measure.sign_of(best.scores) < 0,
        "merges": search.merges,
        "base": None if base is None else {**measure.average(base.scores), "scores": base.scores},
        "results": results,
    }  # fmt: skip


def _note(search: Search, best: Candidate) -> str:
    """What a reader of the result should know of how its values came about."""
    on = ", ".join(placeless([text for each in search.measures for text in each.texts]))
    return (
        f"{best.label} was chosen from {len(search.candidates)} candidates, by "
        f"{measure.average(best.scores)['average']:.4g} on {on}: a score on the items that were chosen by says less "
        "than one on others."
    )


def _at_an_end(search: Search, best: Candidate) -> list[str]:
    """Of numbers that were chosen at an end of their values: that a better one may lie beyond."""
    method, notes = registry.load(search.first.recipe.method), []
    limits = {
        spec.name: {spec.metadata[k] for k in ("minimum", "maximum")} for spec in dataclasses.fields(method.options)
    }
    scores = {measure.average(candidate.scores)["average"] for candidate in search.candidates}
    for name, axis in search.axes.items() if len(scores) > 1 else ():
        value, values = best.values[name], (axis.low, axis.high) if isinstance(axis, Range) else axis
        if len(values) < 2 or not is_numbers(values) or value in limits.get(name, ()):
            continue
        near = _NEAR * (max(values) - min(values)) if isinstance(axis, Range) else 0
        end = "smallest" if value - min(values) <= near else "largest" if max(values) - value <= near else None
        if end is not None:
            notes.append(f"{label_of({name: value})} is the {end} that was tried: a better one may lie beyond.")
    return notes
