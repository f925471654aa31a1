"""merge: experts of one base into one checkpoint."""

from __future__ import annotations

import dataclasses
import json
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from modelmerge import engine, mergekit, method, plan, rules, scaling
from modelmerge.checkpoint import card
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.writer import CARD, Staging, companions, scratches
from modelmerge.errors import RecipeError, UsageError
from modelmerge.recipe import Recipe, parse_size, read_recipe, versions
from modelmerge.report import SILENT, Reporter
from modelmerge.suites.custom import Script
from modelmerge.vary import Share, layer_of, parse, settle, surveyed
from modelmerge.verbs import adapted, coefficients
from modelmerge.verbs.auto import AUTO, choose
from modelmerge.verbs.inputs import (
    as_references,
    begin,
    disentangler,
    fetch,
    fingerprint,
    listing,
    open_models,
    record,
    remarks,
    source_of,
    stamp,
    with_downloads,
)

DTYPES = tuple(plan.DTYPES)
_LOSSY = 0.05  # a loss to rounding above which a merge is worth storing wider
TASK_LAMBDAS = typing.get_args(engine.TaskLambda)
RESTS = ("base", "average", "task-arithmetic")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is ready to run: its headers read, its plan made, nothing written."""

    recipe: Recipe
    job: engine.Job
    recorded: Mapping[str, str]  # sha256 by input file that a replay must find again; empty for a new merge
    remarks: Sequence[str] = ()  # what a reader of the result should know of its recipe
    stream: bool = False  # read weights on the Hub over ranges, without storing them
    data: coefficients.Data | None = None  # to find the experts' weights on, where that is to be done first
    found: Mapping[str, Any] | None = None  # what there is to say of how they were found

    def close(self) -> None:
        """Let go of the inputs."""
        self.job.plan.close()

    def describe(self) -> dict[str, Any]:
        """The plan as `--dry-run` tells it: tensors and why, bytes to read and write, peak memory, shards."""
        made = self.job.plan
        size = adapted.size_of(self.recipe)
        written = made.bytes_written if size is None else adapted.most_bytes(self.job, self.recipe, size)
        streamed = engine.bytes_read(self.job, streamed=True) if self.stream else None
        scratch = engine.scratch_bytes(self.job.source, self.job.front, self.job.disentangled())
        searched = (0.0, 0) if self.data is None else engine.finding_reads(self.job)
        left = engine.beyond_device(self.job)
        beyond = (
            [f"{len(left)} weights do not fit on {self.job.source.device} and are merged on the CPU"] if left else []
        )
        told = {
            "method": self.recipe.method,
            "disentangle": self.recipe.disentangle,
            "parts": _told_parts(self.job),
            **listing(self.job.source, ((t, t.out_dtype, t.action) for t in made.tensors.values())),
            "layer_scale": dict(self.job.scales) or self.recipe.layer_scale,
            "passes": engine.passes(self.job) + searched[0],
            "bytes": {"read": engine.bytes_read(self.job) + searched[1], "write": written, "scratch": scratch},
            "peak_memory": self._peak_memory(),
            "shards": [shard.filename for shard in made.layout.shards],
            "remarks": [*self.remarks, *remarks(made), *beyond, *(self.data.remarks() if self.data else [])],
            **(adapted.describe(self.job, self.recipe, size) if size is not None else {}),
        }
        if self.data is not None:
            told["unlabelled"] = dict(self.recipe.unlabelled)
        return with_downloads(told, made, beside="all" if size is None else "cards", streamed=streamed)

    def _peak_memory(self) -> dict[str, int]:
        """Of the merge, and of what is found before it."""
        merging = engine.peak_memory(self.job)
        if self.data is None:
            return merging
        return {place: max(merging[place], needed) for place, needed in engine.finding_memory(self.job).items()}


def merge(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    weights: Mapping[str, float] | None = None,
    disentangle: str | None = None,
    disentangle_options: Mapping[str, Any] | None = None,
    vary: Sequence[str] = (),
    rule: Sequence[str] = (),
    layer_scale: str | Path | Sequence[float] | Mapping[str, Any] | None = None,
    task_lambda: str | None = None,
    rest: str | None = None,
    dtype: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_mismatch: str = "error",
    max_shard_size: str = "5GB",
    seed: int = 0,
    as_lora: int | float | None = None,
    search: Mapping[str, Sequence[Any] | str] | None = None,
    on: Sequence[str] = (),
    metric: Callable[..., Any] | str | None = None,
    unlabelled: Mapping[str, Any] | None = None,
    device: str = "auto",
    stream: bool = False,
    force: bool = False,
    resume: bool = False,
    reporter: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Merge `experts` onto `base` into the directory `out`; the manifest that was written there.

    Args:
        base: Reference of the base.
        experts: References of the experts, `[NAME=]REF` each, or a mapping of name to reference.
        out: Where the merged checkpoint shall be.
        method: A merge method's name, or `auto`; `options` are the method's own, by their Python names.
        weights: Weight of each expert by name; 1 where none is given.
        disentangle: A method that disentangles the task vectors before they are merged, as `disentangle` does.
        disentangle_options: Its options.
        vary: Numbers that differ between experts, tensors or layers, `[EXPERT:]OPTION=V[,V...][@GLOB]` each.
        rule: Methods of their own for some tensors, `GLOB=METHOD [OPTION=V ...]` each; the first that takes a tensor
            counts, and `method` merges what no rule takes.
        layer_scale: Factors on the task vectors: over the layers, first to last, or by glob of tensor names, or both;
            or `V[,V...]`, JSON, or a JSON or YAML file of such; or larv, which finds them.
        task_lambda: Weights that make the experts' task vectors equally long on each tensor: relative, matched, paper.
        rest: What becomes of the tensors that a method for linear layers leaves: base, average or task-arithmetic;
            the method's own choice if None.
        dtype: float32, float16 or bfloat16 to store floating tensors in; the base's own if None.
        include: Globs of the tensors to merge; all if empty.
        exclude: Globs of the tensors to copy from the base.
        on_mismatch: What becomes of tensors whose shapes differ: error; copy: the base's; common-rows: of embeddings
            and heads, the rows that all have are merged and the base's others kept.
        max_shard_size: Largest output file, like 5GB.
        seed: Seed of methods that draw at random.
        as_lora: Write a PEFT adapter instead of a checkpoint, of this rank or, below 1, so large that each matrix keeps
            this share of its squared norm.
        search: By option of the method, values to choose from by measuring, `{"scale": [0.2, 0.3]}` or
            `{"scale": "0.1:1.0:0.1"}`; all combinations are merged, the best is kept, and the manifest has all results
            in `searched`.
        on: What `search` measures with: `custom:FILE:FUNCTION`, `clip:TASK`, `lm:TASK`, with settings behind commas.
        metric: A function that `search` measures with, or `FILE:FUNCTION`; see `evaluate`.
        unlabelled: The data of a method that finds the experts' weights on unlabelled data. For CLIP models what
            `evaluate` is told: `tasks`, `data`, `classes`, `templates`, `config`, `split`, `image_column`,
            `label_column`, `heads`, `limit`; each expert goes with the task of its name. For any other classifier
            `script`: a function, or `FILE:FUNCTION`, that is given an expert (`modelmerge.suites.custom.Model`: a
            mapping of tensor names to tensors, with `name`, `path`, `base_path` and `device`) and returns
            `(module, inputs)`. The module gives logits [N, C] or has them as `logits` in what it returns; the merged
            tensors are put into it where its state dict has their names, which may be behind one prefix, and the rest
            of it, such as a head of its own, stays. The inputs are a tensor [N, ...], a tuple or a mapping of such, or
            batches that can be iterated over again and again, as a list of them or a DataLoader gives them.
        device: cpu, cuda, cuda:N or auto.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        reporter: Is told the progress.
        **options: The method's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    data, script = coefficients.as_told(unlabelled or {})
    recipe = Recipe(
        method=method, base=str(base), experts=as_references(experts), options=options, weights=dict(weights or {}),
        disentangle=disentangle, disentangle_options=dict(disentangle_options or {}), vary=tuple(vary),
        rule=tuple(rule), layer_scale=scaling.typed(layer_scale), task_lambda=task_lambda, rest=rest, dtype=dtype,
        include=tuple(include), exclude=tuple(exclude), on_mismatch=on_mismatch, max_shard_size=max_shard_size,
        seed=seed, as_lora=as_lora, unlabelled=data,
    )  # fmt: skip
    if search is not None or on or metric is not None:
        from modelmerge.verbs.search import execute_search, prepare_search

        axes = search or {}
        if twice := sorted(options.keys() & axes.keys()):
            raise UsageError(f"'{twice[0]}' is given and searched: one of them")
        wanted = prepare_search(recipe, axes, on, metric, device=device, stream=stream)
        return execute_search(wanted, Path(out), force=force, resume=resume, reporter=reporter)
    prepared = prepare(recipe, device=device, stream=stream, script=script)
    return execute(prepared, Path(out), force=force, resume=resume, reporter=reporter)


def replay(
    file: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    stream: bool = False,
    force: bool = False,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Repeat the merge that a manifest records, or make the one that a mergekit YAML describes; the new manifest.

    Raises:
        RecipeError: The file cannot be read, asks for what there is not, or an input is no longer what it was.
        ModelMergeError: As for `merge`.
    """
    prepared = prepare_file(Path(file), device=device, stream=stream)
    return execute(prepared, Path(out), force=force, resume=resume, reporter=reporter)


def prepare_file(file: Path, *, device: str = "auto", stream: bool = False) -> Prepared:
    """Plan the merge that a manifest records or a mergekit YAML describes; nothing is written.

    Raises:
        ModelMergeError: As for `replay`.
    """
    if file.suffix not in (".yaml", ".yml"):
        recipe, recorded = read_recipe(file)
        return prepare(recipe, device=device, recorded=recorded, stream=stream)
    translated = mergekit.read(file)
    prepared = prepare(translated.recipe, device=device, remarks=translated.remarks, stream=stream)
    translated.refuse_part_of_the_layers(file, prepared.job.plan.base.tensors)
    again = translated.stored_as_mergekit_does(prepared.job.plan)
    if again is translated:
        return prepared
    prepared.close()
    return prepare(again.recipe, device=device, remarks=again.remarks, stream=stream)


def prepare(
    recipe: Recipe,
    *,
    device: str = "auto",
    recorded: Mapping[str, str] | None = None,
    remarks: Sequence[str] = (),
    stream: bool = False,
    script: Script | None = None,
    look: bool = True,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]] | None = None,
) -> Prepared:
    """Read the headers of all models and plan the merge; nothing is written, and no weights are downloaded.

    `script` is a function that gives unlabelled data, where it comes out of no file. With `look`, `auto` may read a few
    megabytes of weights on the Hub to see of what kind they are. `opened` are the base and the experts, where they have
    been opened before.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read.
    """
    if recipe.method == AUTO:
        if recipe.options:
            raise UsageError(f"'{AUTO}' has no options of a method", hint="name the method to set its options")
        _check_choices(recipe)
        opened = opened or open_models(recipe.base, recipe.experts)
        shared = plan.make_plan(
            *opened, matrices=False, include=recipe.include, exclude=recipe.exclude, on_mismatch=recipe.on_mismatch
        )
        choice = choose(shared, look=look)
        recipe = dataclasses.replace(recipe, method=choice.method, options=choice.options)
        told = "".join(f" --{name} {value}" for name, value in choice.options.items())
        remarks = [*remarks, f"The method is {choice.method}{told}: {choice.reason}."]
    chosen = method.load(recipe.method)
    options = method.make_options(chosen, recipe.method, recipe.options)
    front = disentangler(recipe.disentangle, recipe.disentangle_options) if recipe.disentangle else None
    _check_choices(recipe)
    adapted.size_of(recipe)
    given = [rules.parse(told) for told in recipe.rule]
    scale = None if recipe.layer_scale is None else scaling.canonical(recipe.layer_scale)
    recipe = dataclasses.replace(recipe, rule=tuple(map(str, given)), layer_scale=scale)
    _refuse_data_of_others(recipe, chosen, given)
    _refuse_many_experts({recipe.method: chosen, **{rule.name: rule.method for rule in given}}, len(recipe.experts))
    if recipe.rest is None and chosen.matrices:
        recipe = dataclasses.replace(recipe, rest=chosen.rest(options))
    base, experts = opened or open_models(recipe.base, recipe.experts)
    names = [expert.name for expert in experts]
    weights = _weights(recipe, names)
    made = plan.make_plan(
        base, experts, matrices=chosen.matrices, rest=recipe.rest or "base", rules=given,
        dtype=plan.dtype_of(recipe.dtype) if recipe.dtype else None,
        include=recipe.include, exclude=recipe.exclude, max_shard_size=parse_size(recipe.max_shard_size),
        on_mismatch=recipe.on_mismatch,
    )  # fmt: skip
    job = _job(recipe, made, engine.Part(recipe.method, chosen, options, ()), given, front, weights, device)
    if front is not None:
        if len(experts) < 2:
            raise UsageError("there is nothing to disentangle: only one expert is named", hint="name two or more")
        if not job.disentangled():
            raise UsageError("no weight of a linear layer is left to disentangle", hint="check --include and --exclude")
        engine.refuse_too_large(job.source, front, job.disentangled())
    data = None
    if recipe.coefficients:
        job = coefficients.with_coefficients(job, recipe.coefficients)
    elif chosen.finder is not None:
        data = coefficients.find_data(recipe, names, script)
        engine.refuse_finding_beyond_memory(job)
    complete = dataclasses.replace(
        recipe,
        base=_pinned(recipe.base, base),
        experts=tuple(_pinned(text, expert) for text, expert in zip(recipe.experts, experts, strict=True)),
        options=dataclasses.asdict(options),
        disentangle_options=dataclasses.asdict(front[1]) if front else {},
        weights={e.name: w for e, w in zip(experts, weights, strict=True)} if recipe.weights else {},
    )
    return Prepared(complete, job, dict(recorded or {}), remarks, stream, data)


def _refuse_data_of_others(recipe: Recipe, chosen: method.Method, given: Sequence[rules.Rule]) -> None:
    if chosen.finder is None and (recipe.unlabelled or recipe.coefficients):
        raise UsageError(f"'{recipe.method}' looks at no data", hint="`merge adamerging` does")
    # What is found on data is found for a model that is merged in one way.
    alone = next((rule.name for rule in given if rule.method.finder is not None), None)
    if given and (alone or chosen.finder is not None):
        raise UsageError(
            f"'{alone or recipe.method}' finds weights for all tensors on data, and takes no --rule beside it",
            hint="--include and --exclude say which tensors it merges",
        )


def _job(
    recipe: Recipe,
    made: plan.Plan,
    own: engine.Part,
    given: Sequence[rules.Rule],
    front: tuple[method.Disentangler, Any] | None,
    weights: tuple[float, ...],
    device: str,
) -> engine.Job:
    """The plan's merge by the methods, with every number that differs between experts, tensors and layers.

    `own` is the merge's own method, still without tensors.

    Raises:
        UsageError: Something differs that cannot, or where it cannot.
        DeviceError: There is no such device.
    """
    names, variations = [expert.name for expert in made.experts], [parse(told) for told in recipe.vary]
    parts = _parts(made, own, given, recipe.rest or "base")
    shares = [Share(p.name, p.method, p.options, tuple(t.name for t in p.tensors), rest=p.rest) for p in parts]
    settings = settle(variations, shares, weights, names)
    for part, share in zip(parts, shares, strict=True):
        for tensor in (name for name in share.tensors if part.method.normalises and name in settings):
            if abs(sum(settings[tensor].weights)) < 1e-8:
                raise UsageError(f"in '{tensor}' the weights add up to zero: their average does not exist")
    if variations:
        told_apart = (surveyed(variations, share, names) for share in shares)
        parts = [dataclasses.replace(part, for_survey=told) for part, told in zip(parts, told_apart, strict=True)]
    larv, scales = recipe.layer_scale == scaling.LARV, {}
    if recipe.layer_scale is not None and not larv:
        scales = scaling.parse(recipe.layer_scale).factors([name for share in shares for name in share.tensors])
    job = engine.Job(
        source_of(made, device), tuple(parts), weights, front, recipe.seed, settings,
        scales=scales, larv=larv, task_lambda=_task_lambda(recipe, parts),
    )  # fmt: skip
    if larv and not job.looked_at():
        raise UsageError("--layer-scale larv: no weight of a linear layer that is merged lies in a numbered layer")
    return job


def _task_lambda(recipe: Recipe, parts: Sequence[engine.Part]) -> engine.TaskLambda | None:
    """How weights are made task-aware, if they are.

    Raises:
        UsageError: A method does that itself.
    """
    if recipe.task_lambda is None:
        return None
    for part in parts:
        if part.method.own_lambda:
            raise UsageError(
                f"--task-lambda: '{part.name}' makes its lambdas task-aware itself", hint="use its own --lambda-mode"
            )
    return typing.cast(engine.TaskLambda, recipe.task_lambda)


def _refuse_many_experts(methods: Mapping[str, method.Method], experts: int) -> None:
    for name, chosen in methods.items():
        if chosen.most_experts is not None and experts > chosen.most_experts:
            many = "one expert" if chosen.most_experts == 1 else f"{chosen.most_experts} experts at most"
            raise UsageError(
                f"'{name}' takes {many}, and {experts} are named",
                hint="`modelmerge merge` lists the methods that take any number",
            )


def _parts(made: plan.Plan, own: engine.Part, given: Sequence[rules.Rule], left: str) -> list[engine.Part]:
    """The methods with the tensors they merge: the merge's own, those of the rules, and the one for what is left."""
    merged = made.select("merge")
    found = [dataclasses.replace(own, tensors=tuple(t for t in merged if t.rule is None))]
    for place, rule in enumerate(given):
        taken = tuple(tensor for tensor in merged if tensor.rule == place)
        found.append(engine.Part(rule.name, rule.method, rule.options, taken, rule.tensors))
    if left != "base":
        other = method.load(left)
        found.append(engine.Part(left, other, other.options(), tuple(made.select("rest"))))
    return [part for part in found if part.tensors]


def _pinned(text: str, model: Checkpoint) -> str:
    """A reference as the card tells it: as it was written, with the commit where the model is on the Hub."""
    return text if model.reference.repository is None else f"{model.name}={model.reference.text}"


def digest_of(prepared: Prepared, read: coefficients.Read | None = None) -> str:
    """The digest of all that determines the weights, as far as it can be had without reading tensors."""
    job = prepared.job
    told = (dataclasses.asdict(prepared.recipe), str(job.source.device), read and read.identity())
    return fingerprint(job.plan, *told)


def execute(
    prepared: Prepared,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    ready: Callable[[], object] | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Run a prepared merge into `out`; the manifest. The inputs are closed afterwards.

    `ready` is called once it is known that the work can begin.

    Raises:
        ModelMergeError: As for `merge`.
    """
    started = time.monotonic()
    job = prepared.job
    try:
        size = adapted.size_of(prepared.recipe)
        layout = job.plan.layout if size is None else Layout((), {}, {})
        opened = prepared.data.read(prepared.recipe.seed) if prepared.data is not None else None
        determined_by = same = digest_of(prepared, opened)
        done = begin(job.plan, out, determined_by, force=force, resume=resume, ready=ready, reporter=reporter)
        if done is not None:
            return done
        if opened is not None:
            fetch(job.plan, reporter, beside="all" if size is None else "cards", stream=prepared.stream)
            prepared = _searched(prepared, opened, determined_by, out, resume=resume, reporter=reporter)
            job = prepared.job
            # Shards of other coefficients are not taken up.
            same = digest_of(prepared, opened)
        with Staging(out, layout, force=force, resume=resume and size is None, fingerprint=same) as staging:
            fetch(job.plan, reporter, beside="all" if size is None else "cards", stream=prepared.stream)
            small = None if size is None else adapted.run(job, prepared.recipe, size, staging, reporter)
            findings = engine.run(job, staging, reporter) if small is None else small.findings
            manifest = complete(prepared, out, staging, findings, small, time.monotonic() - started, determined_by)
            for note in manifest["notes"]:
                reporter.note(note)
            staging.publish(as_file(manifest))
        return manifest
    finally:
        prepared.close()


def complete(
    prepared: Prepared,
    out: Path,
    staging: Staging,
    findings: engine.Findings,
    small: engine.Adapted | None,
    seconds: float,
    determined_by: str,
) -> dict[str, Any]:
    """Write what goes beside the weights that a merge has written, but for the manifest, which is returned.

    `determined_by` is the digest of all that determines them.

    Raises:
        RecipeError: An input is not what the recipe was made with.
        CheckpointError: An input has changed since it was opened.
        OutputError: A file cannot be written.
    """
    job = prepared.job
    digests = [model.digests() for model in job.plan.models]  # base first, then the experts in order
    _refuse_changed(prepared.recorded, job.plan.models, digests)
    for name, file in companions(job.plan.base.directory if small is None else None).items():
        staging.write_file(name, file)
    notes = [*prepared.remarks, *_notes(job, findings), *([adapted.note(small)] if small else [])]
    staging.write_file(CARD, write_card(prepared, out, notes))
    staging.write_indices()
    manifest = _manifest(prepared, out, digests, findings, notes, staging, seconds)
    manifest["fingerprint"] = determined_by
    if small is not None:
        manifest["adapter"] = adapted.report(small)
    return manifest


def as_file(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as it lies on the disk."""
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _searched(
    prepared: Prepared, data: coefficients.Read, key: str, out: Path, *, resume: bool, reporter: Reporter
) -> Prepared:
    """The merge with the coefficients that are found on its data; `key` is the digest of all they depend on."""
    with scratches(out) as scratch:
        found = coefficients.find(prepared.job, data, key, scratch, resume=resume, reporter=reporter)
    recipe = dataclasses.replace(prepared.recipe, coefficients=found["coefficients"])
    about = {name: told for name, told in found.items() if name != "coefficients"}
    return dataclasses.replace(
        prepared, recipe=recipe, job=coefficients.with_coefficients(prepared.job, recipe.coefficients),
        remarks=[*prepared.remarks, *data.notes()], found=about,
    )  # fmt: skip


def _check_choices(recipe: Recipe) -> None:
    for flag, value, choices in (
        ("--rest", recipe.rest or RESTS[0], RESTS),
        ("--dtype", recipe.dtype or DTYPES[0], DTYPES),
        ("--on-mismatch", recipe.on_mismatch, plan.ON_MISMATCH),
        ("--task-lambda", recipe.task_lambda or TASK_LAMBDAS[0], TASK_LAMBDAS),
    ):
        if value not in choices:
            near = get_close_matches(value, choices, n=1)
            raise UsageError(
                f"{flag} must be one of {', '.join(choices)}, not '{value}'",
                hint=f"did you mean '{near[0]}'?" if near else None,
            )


def _weights(recipe: Recipe, names: Sequence[str]) -> tuple[float, ...]:
    for name in recipe.weights:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise UsageError(
                f"--weight names '{name}', which is no expert",
                hint=f"did you mean '{near[0]}'?" if near else f"the experts are: {', '.join(names)}",
            )
    weights = tuple(float(recipe.weights.get(name, 1.0)) for name in names)
    if sum(weights) == 0.0 and _normalises(recipe):
        raise UsageError("the weights add up to zero: their average does not exist", hint="check --weight")
    return weights


def _normalises(recipe: Recipe) -> bool:
    """Whether a method of the recipe divides by the sum of the weights."""
    names = (recipe.method, *(rules.parse(told).name for told in recipe.rule), recipe.rest or "base")
    return any(method.load(name).normalises for name in names if name != "base")


def _refuse_changed(
    recorded: Mapping[str, str], models: Sequence[Checkpoint], digests: Sequence[Mapping[Path, str]]
) -> None:
    for model, files in zip(models, digests, strict=True):
        for file, digest in files.items():
            address, lies = model.reference.address(file), model.reference.location
            # Where the recipe was published, by the model's name.
            known = recorded.get(address, recorded.get(address.replace(lies, model.name)))
            if recorded and known != digest:
                raise RecipeError(
                    f"{file}: not the file that the recipe was made with (its sha256 differs)",
                    hint="restore the file, or run the merge anew without --recipe",
                )


def _notes(job: engine.Job, findings: engine.Findings) -> list[str]:
    read = remarks(job.plan)
    notes = []
    for name, experts in job.plan.expert_only.items():
        notes.append(f"'{name}' is not in the base and was left out; it is in {', '.join(experts)}.")
    if len(notes) > 5:
        notes = [f"{len(notes)} tensors that the base lacks were left out; `modelmerge.json` names them."]
    notes = read + [f"'{t.name}': {t.reason}." for t in job.plan.tensors.values() if t.mismatched] + notes
    reasons: dict[tuple[str, str], int] = {}
    for _, expert, reason in findings.left_out:
        reasons[expert, reason] = reasons.get((expert, reason), 0) + 1
    for (expert, reason), count in sorted(reasons.items()):
        notes.append(f"'{expert}' was left out of {count} tensor{'s' * (count > 1)}: {reason}.")
    if job.larv and findings.scales:
        notes.append(_what_larv_found(findings.scales))
    lost = findings.rounding.relative_error() if findings.rounding else None
    if lost is not None and lost > _LOSSY:
        notes.append(
            f"Storing in {_stored_as(job)} changes the merged task vector by {lost:.1%}: --dtype float32 keeps it."
        )
    return notes


def _what_larv_found(scales: Mapping[str, float]) -> str:
    layers: dict[float, set[tuple[str, int]]] = {}
    for tensor, scale in scales.items():
        layer = layer_of(tensor)
        assert layer is not None, "only layers are scaled"
        layers.setdefault(scale, set()).add(layer)
    told = (
        f"{scale:g} in {', '.join(f'{p}.{n}' for p, n in sorted(which))}" for scale, which in sorted(layers.items())
    )
    return f"LARV: the task vectors are multiplied by {'; by '.join(told)}."


def _stored_as(job: engine.Job) -> str:
    """The 16-bit dtypes of the output's merged tensors."""
    narrow = engine.stored_narrow(job.plan)
    return " and ".join(name for name, code in plan.DTYPES.items() if code in narrow)


def _rounding(job: engine.Job, findings: engine.Findings) -> dict[str, Any] | None:
    """What storing lost of the merged task vector, where anything is stored in 16 bits."""
    if findings.rounding is None:
        return None
    return {
        "stored_as": _stored_as(job),
        "relative_error": findings.rounding.relative_error(),
        "tensors_measured": findings.merged,
    }


def _told_parts(job: engine.Job) -> list[dict[str, Any]]:
    """Which method merges what."""
    return [
        {"method": part.name, "rule": part.glob, "tensors": [tensor.name for tensor in part.tensors]}
        for part in job.parts
    ]


def write_card(prepared: Prepared, out: Path, notes: Sequence[str]) -> bytes:
    """The model card of a merge, as it lies on the disk."""
    job, recipe = prepared.job, prepared.recipe
    front = None
    if job.front is not None:
        assert recipe.disentangle is not None, "the job's front comes from the recipe"
        front = _applied(recipe.disentangle, "disentangle", job.front[0], recipe.disentangle_options)
    methods = [_applied(recipe.method, "merge", method.load(recipe.method), recipe.options)]
    for part in job.parts:  # a rule is told with its options among the settings
        if part.glob is not None and part.name not in [source.name for source in methods]:
            methods.append(_applied(part.name, "merge", part.method, {}))
    if recipe.coefficients:
        told = f"The coefficients of {len(recipe.coefficients)} tensors were found on unlabelled data"
        notes = [*notes, f"{told}; `modelmerge.json` has them."]
    defaults = Recipe(method="", base="", experts=())
    words = ("vary", "rule", "layer_scale", "task_lambda", "rest", "dtype", "include", "exclude", "seed", "as_lora")
    settings = {name: getattr(recipe, name) for name in words}
    return card.render(
        title=out.resolve().name, base=_as_told(job.plan.base, None),
        experts=[_as_told(expert, weight) for expert, weight in zip(job.plan.experts, job.weights, strict=True)],
        methods=methods, front=front,
        settings={
            f"--{name.replace('_', '-')}": value for name, value in settings.items() if value != getattr(defaults, name)
        },
        command=recipe.command(str(out)), notes=notes, has_config=bool(job.plan.base.config),
        versions=versions(), device=str(job.source.device), adapter=recipe.as_lora is not None,
    ).encode()  # fmt: skip


def _applied(
    name: str,
    kind: Literal["merge", "disentangle"],
    chosen: method.Method | method.Disentangler,
    options: Mapping[str, Any],
) -> card.Source:
    """A method as the card tells it, its options as they are typed."""
    prefix = f"{name}-" if kind == "disentangle" else ""
    told = {f"--{prefix}{key.replace('_', '-')}": value for key, value in options.items()}
    bibtex = chosen.citation.bibtex(chosen.paper) if chosen.citation else ""
    return card.Source(name=name, summary=method.summary(name, kind), paper=chosen.paper, bibtex=bibtex, options=told)


def _as_told(model: Checkpoint, weight: float | None) -> card.Model:
    """A model as the card tells it."""
    remote = model.reference.repository
    return card.Model(
        name=model.name, reference=model.reference.text, weight=weight, front=card.front_matter(model.directory),
        repository=remote.name if remote else None, commit=remote.commit if remote else None,
    )  # fmt: skip


def _manifest(
    prepared: Prepared,
    out: Path,
    digests: Sequence[Mapping[Path, str]],
    findings: engine.Findings,
    notes: Sequence[str],
    staging: Staging,
    seconds: float,
) -> dict[str, Any]:
    job, recipe = prepared.job, prepared.recipe
    tensors = job.plan.tensors.values()
    # Absolute paths and commits, so that the recipe can be replayed from anywhere.
    located = dataclasses.replace(
        recipe,
        base=job.plan.base.reference.location,
        experts=tuple(f"{e.name}={e.reference.location}" for e in job.plan.experts),
    )
    return {
        **stamp(job.source.device),
        "recipe": located.to_dict(),
        "command": recipe.command(str(out)),
        "inputs": {
            "base": record(job.plan.base, digests[0]),
            "experts": [record(e, files) for e, files in zip(job.plan.experts, digests[1:], strict=True)],
        },
        "tensors": {
            "merged": sum(t.action == "merge" for t in tensors),
            "rest": sum(t.action == "rest" for t in tensors),
            "parts": _told_parts(job),
            "copied": {t.name: t.reason for t in tensors if t.action == "copy"},
            "expert_only": {name: list(experts) for name, experts in job.plan.expert_only.items()},
            "left_out": [{"tensor": t, "expert": e, "reason": r} for t, e, r in sorted(findings.left_out)],
            "layer_scale": dict(findings.scales),
            "task_lambda": {tensor: list(lambdas) for tensor, lambdas in findings.lambdas.items()},
            "common_rows": {t.name: t.rows for t in tensors if t.rows is not None},
            "tied": {t.name: t.twin for t in tensors if t.twin is not None},
            "figures": dict(sorted(findings.figures.items())),
            "dtypes": {t.name: t.out_dtype for t in tensors},
        },
        "rounding": _rounding(job, findings),
        **({"adaptation": dict(prepared.found)} if prepared.found is not None else {}),
        "notes": list(notes),
        "seconds": round(seconds, 3),
        "files": staging.listing(),
    }
