"""merge with a search: candidates of a merge are measured, and the best of them is written.

The candidates are every combination of the values that are searched. Each is written whole into a folder beside the
output, measured there, and removed once a better one is known. Where the method is linear in an option, one pass over
the models serves all of its values. What is chosen by is the mean over all tasks, each counted once, as they are: not
normalised by experts. Of equal ones the first is taken, in the order in which the values are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from modelmerge.checkpoint.digest import vouch
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.opening import open_models
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.staging import CARD, Staging
from modelmerge.engine.memory import bytes_read
from modelmerge.engine.merge import run, run_scaled
from modelmerge.engine.parallel import prepare_process
from modelmerge.errors import ModelMergeError, OutputError, UsageError
from modelmerge.evaluation.custom import Metric
from modelmerge.evaluation.scores import summarise
from modelmerge.methods import registry
from modelmerge.methods.contract import Disentangler, Method
from modelmerge.methods.options import MOST, check_option, is_linear, option_types, read_values, written
from modelmerge.plan.downloads import fetch
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.manifest import as_file, write_card
from modelmerge.record.redaction import placeless
from modelmerge.verbs import adapted
from modelmerge.verbs.auto import AUTO
from modelmerge.verbs.evaluate import evaluate
from modelmerge.verbs.measure import Measure, _measures
from modelmerge.verbs.merge import complete
from modelmerge.verbs.prepare import Prepared, begin, digest_of, prepare

_FREE = 0.95  # share of a disk's free bytes that candidates may take
_LEFT_OUT = ("items", "ids", "normalised")  # of a score


@dataclass(slots=True)
class Candidate:
    """A merge with values of its own: by option, as `asdict` of the method's options has them."""

    values: Mapping[str, Any]
    prepared: Prepared
    place: Path | None = None  # where it lies, as long as it does
    manifest: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its values in words: `scale=0.3 density=0.2`."""
        return " ".join(f"{name.replace('_', '-')}={_word(value)}" for name, value in self.values.items())


@dataclass(frozen=True, slots=True)
class Search:
    """A search that is ready to run: every candidate planned, nothing written and nothing measured."""

    candidates: tuple[Candidate, ...]
    axes: Mapping[str, tuple[Any, ...]]
    measures: tuple[Measure, ...]
    linear: str | None  # the option of which one pass serves all values
    device: str

    @property
    def first(self) -> Prepared:
        """The first candidate, whose inputs are those of all."""
        return self.candidates[0].prepared

    def groups(self) -> list[list[Candidate]]:
        """The candidates, those together that one pass over the models serves."""
        if self.linear is None:
            return [[candidate] for candidate in self.candidates]
        found: dict[tuple[Any, ...], list[Candidate]] = {}
        for candidate in self.candidates:
            key = tuple(value for name, value in candidate.values.items() if name != self.linear)
            found.setdefault(key, []).append(candidate)
        return list(found.values())

    def candidate_bytes(self) -> int:
        """The most bytes of weights that a candidate has."""
        size = adapted.size_of(self.first.recipe)
        if size is None:
            return max(each.prepared.job.plan.bytes_written for each in self.candidates)
        return max(adapted.most_bytes(each.prepared.job, each.prepared.recipe, size) for each in self.candidates)

    def describe(self) -> dict[str, Any]:
        """The plan as `--dry-run` tells it: that of one merge, and what the search adds; bytes are those of all."""
        told, groups, each = self.first.describe(), self.groups(), self.candidate_bytes()
        told["bytes"]["read"] = sum(bytes_read(group[0].prepared.job) for group in groups)
        told["bytes"]["write"] = each * len(self.candidates)
        told["search"] = {
            "options": {name: list(values) for name, values in self.axes.items()},
            "on": [text for measure in self.measures for text in measure.texts],
            "candidates": len(self.candidates),
            "merges": len(groups),
            "disk": {"all": each * len(self.candidates), "least": each * min(2, len(self.candidates))},
        }
        return told

    def close(self) -> None:
        """Let go of the inputs."""
        for candidate in self.candidates:
            candidate.prepared.close()


def prepare_search(
    recipe: Recipe,
    axes: Mapping[str, Sequence[Any] | str],
    on: Sequence[str] = (),
    metric: Metric | str | None = None,
    *,
    device: str = "auto",
    stream: bool = False,
    look: bool = True,
) -> Search:
    """Plan every candidate; nothing is written, and nothing is measured.

    Args:
        recipe: The merge; what it says of the options that are searched does not count.
        axes: By option, the values: in a sequence, or as they are typed, `0.1:1.0:0.1` or `0.2,0.5`.
        on: What to measure with, `SUITE:WHAT[,SETTING=VALUE...]` each.
        metric: A function to measure with, or `FILE:FUNCTION`; as for `evaluate_custom`.
        device: As for `merge`; the candidates are measured there too.
        stream: As for `merge`.
        look: As for `prepare`.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read.
    """
    measures = _measures(on, metric)
    if not axes:
        raise UsageError("--on has no effect without --search", hint="as in --search scale=0.1:1.0:0.1")
    if recipe.method != AUTO and registry.load(recipe.method).finder is not None:
        raise UsageError(
            f"'{recipe.method}' finds its coefficients on unlabelled data, and takes no --search besides",
            hint="search another method, or run it alone",
        )
    opened = open_models(recipe.base, recipe.experts)
    first = prepare(recipe, device=device, stream=stream, opened=opened, look=look)
    resolved = dataclasses.replace(
        recipe, method=first.recipe.method, base=first.recipe.base, experts=first.recipe.experts,
        options=first.recipe.options if recipe.method == AUTO else recipe.options,
    )  # fmt: skip
    values = {name.replace("-", "_"): told for name, told in axes.items()}
    read = {name: _axis(resolved, name, told) for name, told in values.items()}
    count = 1
    for each in read.values():
        count *= len(each)
    if count > MOST:
        raise UsageError(f"--search: {count:,} candidates are more than {MOST:,}")
    candidates = tuple(
        _candidate(resolved, dict(zip(read, combined, strict=True)), first, opened, device, stream)
        for combined in itertools.product(*read.values())
    )
    for name in read:
        _refuse_idle(name, candidates)
    for measure in measures:
        where = str(measure.told.get("metric", "")).rpartition(":")[0]
        if where.endswith(".py") and not Path(where).expanduser().is_file():
            raise ModelMergeError(f"--on {measure.texts[0]}: no such file: {where}")
    chosen = registry.load(resolved.method)
    linear = next((name for name in read if is_linear(chosen, name)), None)
    return Search(candidates, read, measures, linear if recipe.as_lora is None else None, device)


def _candidate(
    recipe: Recipe,
    values: Mapping[str, Any],
    first: Prepared,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]],
    device: str,
    stream: bool,
) -> Candidate:
    front = f"{recipe.disentangle}_"
    own = {name: value for name, value in values.items() if _is_of_method(recipe, name)}
    others = {name.removeprefix(front): value for name, value in values.items() if name not in own}
    made = dataclasses.replace(
        recipe, options={**recipe.options, **own}, disentangle_options={**recipe.disentangle_options, **others}
    )
    try:
        prepared = prepare(made, device=device, remarks=first.remarks, stream=stream, opened=opened)
    except UsageError as error:
        label = Candidate(values, first).label
        raise UsageError(f"--search, {label}: {error.message}", hint=error.hint) from error
    return Candidate(values, prepared)


def _is_of_method(recipe: Recipe, name: str) -> bool:
    return name in option_types(registry.load(recipe.method).options)


def _refuse_idle(name: str, candidates: Sequence[Candidate]) -> None:
    """Refuse to search an option that overrides set for every tensor."""
    found: dict[str, set[Any]] = {}
    for candidate in candidates:
        if not _is_of_method(candidate.prepared.recipe, name):
            return
        job = candidate.prepared.job
        for tensor, setting in job.settings.items():
            found.setdefault(tensor, set()).add(getattr(setting.options, name, None))
    told = {candidate.values[name] for candidate in candidates}
    if len(told) > 1 and not any(len(values) > 1 for values in found.values()):
        raise UsageError(
            f"--search {name.replace('_', '-')} has no effect: --at says what it is for every tensor",
            hint="leave one of them out",
        )


def _axis(recipe: Recipe, name: str, told: Sequence[Any] | str) -> tuple[Any, ...]:
    """The values of an option, each one that it can have.

    Raises:
        UsageError: There is no such option, or a value is none it can have, or comes twice.
    """
    chosen: Method | Disentangler = registry.load(recipe.method)
    words = list(option_types(chosen.options))
    option = name
    if recipe.disentangle and name not in words:
        front = registry.load(recipe.disentangle, "transform")
        words += [f"{recipe.disentangle}_{word}" for word in option_types(front.options)]
        if name in words:
            chosen, option = front, name.removeprefix(f"{recipe.disentangle}_")
    flag = name.replace("_", "-")
    if name not in words:
        near = get_close_matches(name, words, n=1)
        have = ", ".join(word.replace("_", "-") for word in words)
        hint = f"did you mean '{near[0].replace('_', '-')}'?" if near else f"it has: {have}" if have else None
        raise UsageError(f"--search: '{recipe.method}' has no option '{flag}'", hint=hint)
    kind = option_types(chosen.options)[option]
    values = read_values(flag, told, kind) if isinstance(told, str) else tuple(told)
    if not values:
        raise UsageError(f"--search {flag}: there is no value")
    try:
        checked = tuple(check_option(chosen, option, value) for value in values)
    except UsageError as error:
        raise UsageError(f"--search {flag}: {error.message}", hint=error.hint) from error
    if len(set(checked)) < len(checked):
        twice = next(value for i, value in enumerate(checked) if value in checked[:i])
        raise UsageError(f"--search {flag}: {_word(twice)} comes twice")
    return checked


def parse_axes(texts: Sequence[str]) -> dict[str, str]:
    """By option, what `OPTION=START:STOP:STEP` or `OPTION=V,V...` says of its values.

    Raises:
        UsageError: One is not of that form, or an option comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name or not values:
            raise UsageError(f"--search '{text}' is not OPTION=VALUES", hint="scale=0.1:1.0:0.1, or scale=0.2,0.5")
        if name in found:
            raise UsageError(f"--search names '{name.replace('_', '-')}' twice", hint="with commas between its values")
        found[name] = values
    return found


def _word(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return written(value) if isinstance(value, float) else str(value)


def execute_search(
    search: Search,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    ready: Callable[[], object] | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Merge and measure all candidates and put the best at `out`; its manifest, with all results in `searched`.

    The base is measured first, so that what cannot be measured is known before the work. `ready` is called once it is
    known that the work can begin. The inputs are closed afterwards.

    Raises:
        ModelMergeError: As for `merge` and `evaluate`.
    """
    started = time.monotonic()
    if resume:
        raise UsageError(
            "--resume has no effect with --search", hint="run it again: scores that were measured are remembered"
        )
    job = search.first.job
    try:
        begin(job.plan, out, digest_of(search.first), force=force, resume=False, ready=ready, reporter=reporter)
        prepare_process()
        with Staging(out, Layout((), {}, {}), force=force) as staging:
            with staging.folder() as folder:
                room = _room(search, folder)
                base = _measure_base(search, reporter)
                reports = _work_through(search, folder, out, room, reporter)
                best = _best(search.candidates)
                assert best.place is not None, "the best is kept"
                files = best.manifest["files"]
                staging.adopt(best.place, {name: files[name]["sha256"] for name in files if name != CARD})
            notes = [*best.manifest["notes"], _note(search, best), *_at_an_end(search, best)]
            for note in notes:
                reporter.note(note)
            staging.write_file(CARD, write_card(best.prepared.recipe, best.prepared.job, out, notes))
            manifest = {
                **best.manifest, "notes": notes, "searched": _told(search, best, base, reports),
                "seconds": round(time.monotonic() - started, 3), "files": staging.listing(),
            }  # fmt: skip
            staging.publish(as_file(manifest))
        return manifest
    finally:
        search.close()


def _room(search: Search, folder: Path) -> int:
    """How many candidates fit on the disk at once.

    Raises:
        OutputError: Not even two, of which one can be the best so far.
    """
    each, free = search.candidate_bytes(), shutil.disk_usage(folder).free
    room = int(_FREE * free) // max(each, 1)
    least = min(2, len(search.candidates))
    if room < least:
        raise OutputError(
            f"the search needs {least} candidates of {each:,} bytes at once, and {folder.parents[1]} has {free:,} free",
            hint="free some space or name another place with -o",
        )
    return min(room, len(search.candidates))


def _work_through(search: Search, folder: Path, out: Path, room: int, reporter: Reporter) -> list[list[dict[str, Any]]]:
    """Merge and measure all candidates, as many at a time as there is room for; the reports, by batch and measure."""
    reports: list[list[dict[str, Any]]] = []
    waiting: list[Candidate] = []
    kept = 0  # the best so far, once there is one

    def measured() -> None:
        nonlocal kept
        reports.append(_measure(search, waiting, reporter))
        known = [candidate for candidate in search.candidates if candidate.scores]
        best = _best(known, sure=False)
        for candidate in known:
            if candidate is not best and candidate.place is not None:
                shutil.rmtree(candidate.place)
                candidate.place = None
        waiting.clear()
        kept = 1

    for group in search.groups():
        if waiting and kept + len(waiting) + len(group) > room:
            measured()
        while group:
            part = group[: room - kept - len(waiting)]
            _merge_group(search, part, folder, out, reporter)
            waiting += part
            group = group[len(part) :]
            if group:
                measured()
    if waiting:
        measured()
    return reports


def _merge_group(search: Search, group: Sequence[Candidate], folder: Path, out: Path, reporter: Reporter) -> None:
    """Merge candidates in one pass over the models, each into a folder of its own."""
    started = time.monotonic()
    first = group[0].prepared
    size = adapted.size_of(first.recipe)
    fetch(first.job.plan, reporter, beside="all" if size is None else "cards", stream=first.stream)
    # One set of open files for all.
    prepared = [
        dataclasses.replace(each.prepared, job=dataclasses.replace(each.prepared.job, source=first.job.source))
        for each in group
    ]
    with contextlib.ExitStack() as stack:
        stagings = []
        for each in group:
            each.place = folder / each.label.replace("=", "-").replace(" ", "_")
            layout = first.job.plan.layout if size is None else Layout((), {}, {})
            stagings.append(stack.enter_context(Staging(each.place, layout)))
        small = None
        if size is not None:
            assert len(group) == 1, "adapters are merged one by one"
            small = adapted.run(first.job, first.recipe, size, stagings[0], reporter)
            findings = [small.findings]
        elif len(group) == 1:
            findings = [run(first.job, stagings[0], reporter)]
        else:
            assert search.linear is not None, "others are merged one by one"
            findings = run_scaled([each.job for each in prepared], search.linear, stagings, reporter)
        for each, ready, staging, noticed in zip(group, prepared, stagings, findings, strict=True):
            each.manifest = complete(ready, out, staging, noticed, small, time.monotonic() - started, digest_of(ready))
            staging.publish(as_file(each.manifest))
            assert each.place is not None, "it has just been given one"
            for name, told in each.manifest["files"].items():
                vouch(each.place / name, str(told["sha256"]))


def _measure_base(search: Search, reporter: Reporter) -> Candidate | None:
    """The base's scores; None where its weights are read over the network only."""
    if search.first.stream:
        return None
    base = Candidate({}, search.first)
    for measure in search.measures:
        report = evaluate(
            [search.first.job.plan.base.reference.location], suite=measure.suite, device=search.device,
            reporter=reporter, **measure.told,
        )  # fmt: skip
        _take(base, report["models"][-1]["scores"], measure)
    _order([base])
    return base


def _measure(search: Search, candidates: Sequence[Candidate], reporter: Reporter) -> list[dict[str, Any]]:
    """Measure candidates that were merged; the reports."""
    reports = []
    for measure in search.measures:
        told = dict(measure.told)
        if search.first.recipe.as_lora is not None:
            told.setdefault("base", search.first.job.plan.base.reference.location)
        report = evaluate(
            [str(candidate.place) for candidate in candidates], suite=measure.suite, device=search.device,
            reporter=reporter, **told,
        )  # fmt: skip
        rows = [row for row in report["models"] if row["role"] == "model"]
        for candidate, row in zip(candidates, rows, strict=True):
            _take(candidate, row["scores"], measure)
        reports.append(report)
    _order(candidates)
    return reports


def _take(candidate: Candidate, scores: Mapping[str, Mapping[str, Any]], measure: Measure) -> None:
    for task, told in scores.items():
        if task in candidate.scores:
            raise UsageError(
                f"--on {measure.texts[0]}: another --on has a task called '{task}' too", hint="leave one of them out"
            )
        candidate.scores[task] = {key: value for key, value in told.items() if key not in _LEFT_OUT}


def _order(candidates: Sequence[Candidate]) -> Literal[1, -1]:
    """Whether more is better, 1, or less, -1.

    Raises:
        UsageError: It is so at some tasks, and otherwise at others.
    """
    scores = candidates[0].scores
    lower = [task for task, told in scores.items() if told.get("lower")]
    if lower and len(lower) < len(scores):
        other = next(task for task in scores if task not in lower)
        raise UsageError(
            f"at '{lower[0]}' less is better, and at '{other}' more is: there is no mean of both to choose by",
            hint="leave one of them out of --on, or choose another metric for it, as in --on lm:TASK,metric=acc",
        )
    return -1 if lower else 1


def _average(candidate: Candidate) -> dict[str, Any]:
    """The mean over the tasks and its standard error, as a report has them."""
    # Where less is better at all of them the mean is one as well.
    scores = {t: {key: v for key, v in told.items() if key != "lower"} for t, told in candidate.scores.items()}
    row: dict[str, Any] = {"name": "", "role": "model", "scores": scores}
    summarise(list(scores), [row])
    return {"average": row["average"], "average_stderr": row["average_stderr"]}


def _best(candidates: Sequence[Candidate], *, sure: bool = True) -> Candidate:
    """The candidate with the best mean; the first of equal ones.

    Raises:
        ModelMergeError: With `sure`, none has a mean.
    """
    sign = _order(candidates)
    known = [(candidate, _average(candidate)["average"]) for candidate in candidates]
    found = [(candidate, sign * average) for candidate, average in known if average is not None]
    if sure and not found:
        raise ModelMergeError(
            "no candidate has a score at all tasks: there is nothing to choose by", hint="measure on more items"
        )
    return max(found, key=lambda pair: pair[1])[0] if found else candidates[0]


def _told(
    search: Search, best: Candidate, base: Candidate | None, reports: Sequence[Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What the manifest says of the search."""
    least = _average(best)["average"]
    results = [{"options": dict(each.values), **_average(each), "scores": each.scores} for each in search.candidates]
    return {
        "options": {name: list(values) for name, values in search.axes.items()},
        "chosen": dict(best.values),
        "equal": [told["options"] for told, each in zip(results, search.candidates, strict=True)
                  if each is not best and told["average"] == least],
        "by": "the mean of the scores, not normalised; the first of equal ones",
        "less_is_better": _order([best]) < 0,
        "on": [
            {"on": list(measure.texts), **_about(report)}
            for measure, report in zip(search.measures, reports[-1], strict=True)
        ],
        "merges": len(search.groups()),
        "base": None if base is None else {**_average(base), "scores": base.scores},
        "results": results,
    }  # fmt: skip


def _about(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of what was looked at."""
    left = ("format", "created", "device", "models", "notes")
    told = {key: value for key, value in report.items() if key not in left}
    if "data" in told:
        told["data"] = {
            name: {key: value for key, value in each.items() if key not in ("classes", "templates")}
            for name, each in told["data"].items()
        }
    told["notes"] = [note for note in report["notes"] if "were measured before" not in note]
    if report["suite"] == "custom":
        told["notes"].append("what the function looks at is its own: report on other items than these")
    return told


def _note(search: Search, best: Candidate) -> str:
    """What a reader of the result should know of how its values came about."""
    told, on = _average(best), ", ".join(placeless([text for each in search.measures for text in each.texts]))
    return (
        f"{best.label} was chosen from {len(search.candidates)} candidates, by {told['average']:.4g} on "
        f"{on}: a score on the items that were chosen by says less than one on others."
    )


def _at_an_end(search: Search, best: Candidate) -> list[str]:
    """Of numbers that were chosen at an end of their values: that a better one may lie beyond."""
    chosen, found = registry.load(search.first.recipe.method), []
    limits = {
        spec.name: {spec.metadata[k] for k in ("minimum", "maximum")} for spec in dataclasses.fields(chosen.options)
    }
    for name, values in search.axes.items():
        value = best.values[name]
        if len(values) < 2 or not all(type(each) in (int, float) for each in values) or value in limits.get(name, ()):
            continue
        end = {min(values): "smallest", max(values): "largest"}.get(value)
        if end is not None:
            found.append(
                f"{name.replace('_', '-')}={_word(value)} is the {end} that was searched: a better one may lie beyond."
            )
    return found
