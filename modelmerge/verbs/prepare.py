"""From a recipe to a job that is ready to run: headers read, plan made, nothing written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.opening import open_models
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.staging import check_output, finished
from modelmerge.engine.job import Job, Part
from modelmerge.engine.memory import (
    beyond_device,
    bytes_read,
    finding_memory,
    finding_reads,
    passes,
    peak_memory,
    refuse_finding_beyond_memory,
    refuse_too_large,
    scratch_bytes,
)
from modelmerge.engine.parallel import source_of
from modelmerge.errors import UsageError
from modelmerge.evaluation.custom import Script
from modelmerge.methods import registry
from modelmerge.methods.contract import Disentangler, Method
from modelmerge.methods.options import make_options
from modelmerge.plan import mergekit, overrides, rules, scaling
from modelmerge.plan.downloads import input_paths, with_downloads
from modelmerge.plan.overrides import Share, settle, surveyed
from modelmerge.plan.recipe import Recipe, parse_size, read_recipe
from modelmerge.plan.tensors import DTYPES, ON_MISMATCH, Plan, dtype_of, make_plan
from modelmerge.progress import Reporter
from modelmerge.record.fingerprint import fingerprint
from modelmerge.record.manifest import listing, parts_of, remarks
from modelmerge.verbs import adapted, coefficients
from modelmerge.verbs.auto import AUTO, choose


def disentangler(name: str, values: Mapping[str, Any]) -> tuple[Disentangler, Any]:
    """A disentangling method with its options.

    Raises:
        UsageError: There is no such method, or an option is wrong.
    """
    chosen = registry.load(name, "transform")
    return chosen, make_options(chosen, name, values)


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


RESTS = ("base", "average", "task-arithmetic")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is ready to run: its headers read, its plan made, nothing written."""

    recipe: Recipe
    job: Job
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
        streamed = bytes_read(self.job, streamed=True) if self.stream else None
        scratch = scratch_bytes(self.job.source, self.job.front, self.job.disentangled())
        searched = (0.0, 0) if self.data is None else finding_reads(self.job)
        left = beyond_device(self.job)
        beyond = (
            [f"{len(left)} weights do not fit on {self.job.source.device} and are merged on the CPU"] if left else []
        )
        told = {
            "method": self.recipe.method,
            "disentangle": self.recipe.disentangle,
            "parts": parts_of(self.job),
            **listing(self.job.source, ((t, t.out_dtype, t.action) for t in made.tensors.values())),
            "layer_scale": dict(self.job.scales) or self.recipe.layer_scale,
            "passes": passes(self.job) + searched[0],
            "bytes": {"read": bytes_read(self.job) + searched[1], "write": written, "scratch": scratch},
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
        merging = peak_memory(self.job)
        if self.data is None:
            return merging
        return {place: max(merging[place], needed) for place, needed in finding_memory(self.job).items()}


def prepare_file(
    file: Path,
    *,
    device: str = "auto",
    stream: bool = False,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> Prepared:
    """Plan the merge that a manifest records or a mergekit YAML describes, `change`d; nothing is written.

    Raises:
        ModelMergeError: As for `replay`.
    """
    if file.suffix not in (".yaml", ".yml"):
        recipe, recorded = read_recipe(file)
        return prepare(change(recipe), device=device, recorded=recorded, stream=stream)
    translated = mergekit.read(file)
    prepared = prepare(change(translated.recipe), device=device, remarks=translated.remarks, stream=stream)
    translated.refuse_part_of_the_layers(file, prepared.job.plan.base.tensors)
    again = translated.stored_as_mergekit_does(prepared.job.plan)
    if again is translated:
        return prepared
    prepared.close()
    return prepare(change(again.recipe), device=device, remarks=again.remarks, stream=stream)


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
        shared = make_plan(
            *opened, matrices=False, include=recipe.include, exclude=recipe.exclude, on_mismatch=recipe.on_mismatch
        )
        choice = choose(shared, look=look)
        recipe = dataclasses.replace(recipe, method=choice.method, options=choice.options)
        options = ", ".join(f"{name}={value}" for name, value in choice.options.items())
        method = f"{choice.method} with {options}" if options else choice.method
        remarks = [*remarks, f"The method is {method}: {choice.reason}."]
    chosen = registry.load(recipe.method)
    options = make_options(chosen, recipe.method, recipe.options)
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
    made = make_plan(
        base, experts, matrices=chosen.matrices, rest=recipe.rest or "base", rules=given,
        dtype=dtype_of(recipe.dtype) if recipe.dtype else None,
        include=recipe.include, exclude=recipe.exclude, max_shard_size=parse_size(recipe.max_shard_size),
        on_mismatch=recipe.on_mismatch,
    )  # fmt: skip
    job = _job(recipe, made, Part(recipe.method, chosen, options, ()), given, front, weights, device)
    if front is not None:
        if len(experts) < 2:
            raise UsageError("there is nothing to disentangle: only one expert is named", hint="name two or more")
        if not job.disentangled():
            raise UsageError("no weight of a linear layer is left to disentangle", hint="check --include and --exclude")
        refuse_too_large(job.source, front, job.disentangled())
    data = None
    if recipe.coefficients:
        job = coefficients.with_coefficients(job, recipe.coefficients)
    elif chosen.finder is not None:
        data = coefficients.find_data(recipe, names, script)
        refuse_finding_beyond_memory(job)
    complete = dataclasses.replace(
        recipe,
        base=_pinned(recipe.base, base),
        experts=tuple(_pinned(text, expert) for text, expert in zip(recipe.experts, experts, strict=True)),
        options=dataclasses.asdict(options),
        disentangle_options=dataclasses.asdict(front[1]) if front else {},
        weights={e.name: w for e, w in zip(experts, weights, strict=True)} if recipe.weights else {},
    )
    return Prepared(complete, job, dict(recorded or {}), remarks, stream, data)


def _refuse_data_of_others(recipe: Recipe, chosen: Method, given: Sequence[rules.Rule]) -> None:
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
    made: Plan,
    own: Part,
    given: Sequence[rules.Rule],
    front: tuple[Disentangler, Any] | None,
    weights: tuple[float, ...],
    device: str,
) -> Job:
    """The plan's merge by the methods, with every number that differs between experts, tensors and layers.

    `own` is the merge's own method, still without tensors.

    Raises:
        UsageError: Something differs that cannot, or where it cannot.
        DeviceError: There is no such device.
    """
    names, variations = [expert.name for expert in made.experts], [overrides.parse(told) for told in recipe.vary]
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
    scales = {}
    if recipe.layer_scale is not None:
        scales = scaling.parse(recipe.layer_scale).factors([name for share in shares for name in share.tensors])
    job = Job(
        source_of(made, device), tuple(parts), weights, front, recipe.seed, settings,
        scales=scales,
    )  # fmt: skip
    return job


def _refuse_many_experts(methods: Mapping[str, Method], experts: int) -> None:
    for name, chosen in methods.items():
        if chosen.most_experts is not None and experts > chosen.most_experts:
            many = "one expert" if chosen.most_experts == 1 else f"{chosen.most_experts} experts at most"
            raise UsageError(
                f"'{name}' takes {many}, and {experts} are named",
                hint="`modelmerge merge` lists the methods that take any number",
            )


def _parts(made: Plan, own: Part, given: Sequence[rules.Rule], left: str) -> list[Part]:
    """The methods with the tensors they merge: the merge's own, those of the rules, and the one for what is left."""
    merged = made.select("merge")
    found = [dataclasses.replace(own, tensors=tuple(t for t in merged if t.rule is None))]
    for place, rule in enumerate(given):
        taken = tuple(tensor for tensor in merged if tensor.rule == place)
        found.append(Part(rule.name, rule.method, rule.options, taken, rule.tensors))
    if left != "base":
        other = registry.load(left)
        found.append(Part(left, other, other.options(), tuple(made.select("rest"))))
    return [part for part in found if part.tensors]


def _pinned(text: str, model: Checkpoint) -> str:
    """A reference as the card tells it: as it was written, with the commit where the model is on the Hub."""
    return text if model.reference.repository is None else f"{model.name}={model.reference.text}"


def digest_of(prepared: Prepared, read: coefficients.Read | None = None) -> str:
    """The digest of all that determines the weights, as far as it can be had without reading tensors."""
    job = prepared.job
    told = (dataclasses.asdict(prepared.recipe), str(job.source.device), read and read.identity())
    return fingerprint(job.plan, *told)


def _check_choices(recipe: Recipe) -> None:
    for flag, value, choices in (
        ("--rest", recipe.rest or RESTS[0], RESTS),
        ("--dtype", recipe.dtype or "float32", tuple(DTYPES)),
        ("--on-mismatch", recipe.on_mismatch, ON_MISMATCH),
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
    return any(registry.load(name).normalises for name in names if name != "base")
