"""From a recipe to a job that is ready to run: headers read, plan made, nothing written."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelmerge.checkpoint.companions import giver_of, open_companions, remarks_on_files
from modelmerge.checkpoint.diffusion import networks
from modelmerge.checkpoint.layout import Shard
from modelmerge.checkpoint.opening import open_models, open_references
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.reference import NO_STAGES, Named
from modelmerge.checkpoint.reference import parse as parse_reference
from modelmerge.checkpoint.staging import fingerprints
from modelmerge.checkpoint.templates import AUTO as AUTO_TEMPLATE
from modelmerge.checkpoint.templates import template_of
from modelmerge.devices import find_devices
from modelmerge.engine.coefficients import Coefficients
from modelmerge.engine.estimate import seconds, seconds_on_cpu
from modelmerge.engine.job import Group, Job
from modelmerge.engine.memory import beyond_device, bytes_read, passes, peak_memory, refuse_beyond_memory, scratch_bytes
from modelmerge.engine.parallel import source_of, threads
from modelmerge.engine.transforms import Transform, transform_of
from modelmerge.errors import UsageError, named, spelled, suggestion
from modelmerge.evaluation.custom import Script
from modelmerge.methods import registry
from modelmerge.methods.contract import Method
from modelmerge.methods.options import make_options, option_types
from modelmerge.methods.words import as_typed, parse_transform
from modelmerge.plan.checks import check_choices, check_weights, refuse_beside_layers, refuse_many_experts, rest_of
from modelmerge.plan.downloads import with_downloads
from modelmerge.plan.layers import of_sources, stacked
from modelmerge.plan.linear import is_linear
from modelmerge.plan.overrides import Methods, Override, group_key, parse
from modelmerge.plan.recipe import STORED, Recipe, Tables, parse_size
from modelmerge.plan.tables import of_owners, refuse_parts
from modelmerge.plan.tensors import DTYPES, Plan, TensorPlan, make_plan
from modelmerge.plan.vocabulary import remarks_on_tokens
from modelmerge.record.command import flag
from modelmerge.record.fingerprint import fingerprint, threads_in
from modelmerge.record.manifest import groups_of, listing, remarks
from modelmerge.record.recorded import Recorded
from modelmerge.text import duration
from modelmerge.verbs import adapted, auto, coefficients
from modelmerge.verbs.auto import AUTO, CHOICES, kind_of
from modelmerge.verbs.balanced import balanced, overlap_of

if TYPE_CHECKING:
    from modelmerge.verbs.stages import Staged


@dataclass(frozen=True, slots=True)
class Prepared:
    """A merge that is ready to run: its headers read, its plan made, nothing written."""

    recipe: Recipe
    job: Job
    recorded: Recorded | None = None  # what a replay must find again
    remarks: Sequence[str] = ()  # what a reader of the result should know of its recipe
    stream: bool = False  # read weights on the Hub over ranges, without storing them
    device: str = "auto"  # as it was named: the job has the first of several
    data: coefficients.Data | None = None  # to find the experts' weights on, where that is to be done first
    adaptation: Mapping[str, Any] | None = None  # what there is to say of how they were found
    staged: Staged | None = None  # the merges before it, which are yet to be run
    before: tuple[str, ...] = ()  # their digests
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # their manifests, once they have been run

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the merge is for."""
        return find_devices(self.device)

    def close(self) -> None:
        """Let go of the inputs."""
        self.job.plan.close()
        if self.staged is not None:
            self.staged.close()

    def describe(self, shards: Sequence[Shard] | None = None) -> dict[str, Any]:
        """The plan as `--dry-run` tells it: tensors and why, bytes to read and write, peak memory, shards.

        Where not all of the weight files are to be written, `shards` are those that are.
        """
        plan = self.job.plan
        shards = plan.layout.shards if shards is None else shards
        todo = [plan.tensors[name] for shard in shards for name in shard.tensors]
        size = adapted.size_of(self.recipe)
        written, read = sum(shard.file_bytes for shard in shards), functools.partial(bytes_read, self.job, todo)
        if size is not None:
            written = adapted.most_bytes(self.job, self.recipe, size)
            read = functools.partial(adapted.bytes_read, self.job)
        streamed = read(streamed=True) if self.stream else None
        beyond = []
        if too_large := beyond_device(self.job):
            long = duration(seconds_on_cpu(self.job, too_large))
            some = f"{len(too_large)} weights do not" if len(too_large) > 1 else "1 weight does not"
            are = "are" if len(too_large) > 1 else "is"
            place = self.job.source.device
            beyond.append(f"{some} fit on {place} and {are} merged on the CPU, which takes about {long}")
        entry = {
            "method": self.recipe.method,
            "disentangle": list(self.recipe.disentangle),
            "weights": dict(zip(self.job.experts, self.job.weights, strict=True)),
            "groups": groups_of(self.job),
            **listing(self.job.source, ((t, t.out_dtype, t.action) for t in plan.tensors.values())),
            "at": list(self.recipe.at),
            "layers": list(self.recipe.layers),
            "vocab": self.recipe.vocab,
            "passes": passes(self.job),
            "bytes": {"read": read(), "write": written, "scratch": scratch_bytes(self.job, todo)},
            "peak_memory": peak_memory(self.job),
            "seconds": None if self.data is not None else seconds(self.job, todo),
            "shards": [shard.filename for shard in shards],
            "remarks": [*self.remarks, *remarks(plan), *beyond, *(self.data.remarks() if self.data else [])],
            **(adapted.describe(self.job, self.recipe, size) if size is not None else {}),
        }
        if self.data is not None:
            entry["unlabelled"] = dict(self.recipe.unlabelled)
        if self.staged is not None:
            entry["stages"] = self.staged.describe()
            entry["bytes"]["scratch"] += self.staged.bytes_kept(self.recipe)
            each = [one["seconds"] for one in (entry, *entry["stages"])]
            entry["seconds"] = None if None in each else sum(each)
            peaks = [each["peak_memory"] for each in (entry, *entry["stages"])]
            entry["peak_memory"] = {place: max(peak[place] for peak in peaks) for place in peaks[0]}
        return with_downloads(entry, plan, beside="all" if size is None else "cards", streamed=streamed)


def prepare(
    recipe: Recipe,
    *,
    device: str = "auto",
    recorded: Recorded | None = None,
    remarks: Sequence[str] = (),
    stream: bool = False,
    script: Script | str | None = None,
    look: bool = True,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]] | None = None,
    overrides: Callable[[Mapping[str, bool]], Sequence[str]] | None = None,
    stages: Mapping[str, Path] = NO_STAGES,
    within: float | None = None,
) -> Prepared:
    """Read the headers of all models and plan the merge; nothing is written, and no weights are downloaded.

    `script` is a function that gives unlabelled data, or FILE:FUNCTION, as whoever runs this has named it: one that
    only the recipe names is refused. No script is run. With `look`, `auto` and balanced weights may read a few
    megabytes of weights on the Hub. `opened` are the base and the experts, where they have been opened before.
    `overrides` gives overrides that follow the recipe's, where they follow from the names of the tensors (and from
    which are weights of linear layers). `stages` are the places of the merges before it. `within` so many minutes
    `auto` takes the best method that it knows.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read.
    """
    first_device = str(find_devices(device)[0])
    if recipe.method == AUTO:
        how = {"device": device, "recorded": recorded, "stream": stream, "script": script, "look": look,
               "overrides": overrides, "stages": stages}  # fmt: skip
        return _prepare_auto(recipe, opened, remarks, within, how)
    chosen = registry.load(recipe.method)
    make_options(chosen, recipe.method, recipe.options)  # refused before models are opened
    transforms = tuple(transform_of(*parse_transform(text)) for text in recipe.disentangle)
    check_choices(recipe)
    adapted.size_of(recipe)
    overrides_read = [parse(text) for text in recipe.at]
    _refuse_idle_data(recipe, chosen, overrides_read)
    refuse_many_experts(recipe, overrides_read)
    if opened is None and recipe.layers and not recipe.experts:  # layers of the base alone
        opened = open_references(parse_reference(recipe.base, stages), ())
    base, experts = opened or open_models(recipe.base, recipe.experts, recipe.exclude, stages)
    recipe, others = _with_tokenizer(recipe, stages)
    remarks = [*remarks, *(f"'{each.reference.text}' gives its tokenizer and is not merged." for each in others)]
    stack = None
    if recipe.layers:
        refuse_beside_layers(recipe)
        stack = stacked(base, experts, recipe.layers, recipe.exclude)
        base, experts, remarks = stack.base, stack.experts, [*remarks, *stack.remarks]
    names = [expert.name for expert in experts]
    check_weights(recipe, names)
    if overrides is not None:
        linear = {tensor.name: is_linear(tensor, recipe.include) for tensor in base.tensors.values()}
        overrides_read += [parse(text) for text in overrides(linear)]
    by = recipe.method, recipe.options, overrides_read, rest_of(recipe), names
    methods = Methods(*by, recipe.overlap)
    strict = len(recipe.at) if overrides is not None else None
    plan = make_plan(
        base, experts, methods=methods,
        dtype=DTYPES[recipe.dtype] if recipe.dtype else None,
        include=recipe.include, exclude=recipe.exclude, max_shard_size=parse_size(recipe.max_shard_size),
        on_mismatch=recipe.on_mismatch, vocab=recipe.vocab, files_from=recipe.files_from,
        tables=recipe.tables, others=others, strict=strict, stack=stack,
        whole_experts=recipe.whole_experts and recipe.as_lora is None,
    )  # fmt: skip
    if recipe.whole_experts and not any(tensor.members for tensor in plan.tensors.values()):
        recipe = dataclasses.replace(recipe, whole_experts=False)  # it makes no difference
    elif recipe.whole_experts:
        remarks = [*remarks, "The experts of a layer are merged as one tensor, as mergekit does."]
    if methods.asks_overlap and recipe.overlap is None and not (transforms or recipe.layers):
        overlap, notes = overlap_of(plan, look=look)
        methods, remarks = Methods(*by, overlap), [*remarks, *notes]
        recipe = dataclasses.replace(recipe, overlap=overlap)
    recipe = dataclasses.replace(recipe, at=methods.recorded())
    named_weights = recipe.weights
    if isinstance(named_weights, str):
        named_weights, why = balanced(plan, look=look)
        remarks = [*remarks, why]
    weights = tuple(float(named_weights.get(name, 1.0)) for name in names)
    foreign = (name != piece.diffusers.partition("/")[2] for network in networks(plan.base.tensors) if network.single
               for name, (piece, *_) in network.pieces.items())  # fmt: skip
    if recipe.as_lora is not None and any(foreign):
        raise UsageError(
            "writes an adapter by the names of diffusers' layout, and the base has those of the original program",
            option="as_lora", hint="name a folder of diffusers as the base, such as its unet/",
        )  # fmt: skip
    if recipe.as_lora is not None and (plan.base.sum is not None or plan.base.reference.is_stage):
        kind = "has one on it" if plan.base.sum is not None else "is merged for it and gone then"
        raise UsageError(
            f"writes an adapter of one model, and the base is {plan.base.reference.text}, which {kind}",
            option="as_lora", hint="merge that into a checkpoint first, and name the checkpoint as the base",
        )  # fmt: skip
    if recipe.as_lora is not None and len(plan.base.components) > 1:
        folders = ", ".join(f"{folder or '.'}/" for folder in plan.base.components)
        raise UsageError(
            f"writes an adapter of one model, and the base has several components: {folders}", option="as_lora",
            hint="name one of them as the base, by its folder",
        )  # fmt: skip
    if recipe.as_lora is not None or chosen.on_data or recipe.unlabelled or recipe.coefficients:
        refuse_parts(plan.vocabulary, plan.tensors.values(), "an adapter" if recipe.as_lora else "a search on data")
    if recipe.tables == STORED and (plan.vocabulary is None or not plan.vocabulary.others):
        recipe = dataclasses.replace(recipe, tables=None)  # it makes no difference
    if recipe.as_lora is None:
        giver = plan.vocabulary.giver if plan.vocabulary is not None else recipe.files_from
        plan = dataclasses.replace(plan, giver=giver_of(giver, plan.base, (*plan.experts, *others)))
        on_files = remarks_on_files(plan.base, plan.experts, plan.giver, template=recipe.chat_template is not None)
        about_files = (spelled(text, flag) for text in on_files)
        about_tokens = remarks_on_tokens(plan.vocabulary) if plan.vocabulary is not None else []
        if recipe.chat_template == AUTO_TEMPLATE and not template_of(recipe.chat_template, plan.base, plan.experts):
            about_tokens.append("None of the models has a chat template.")
        remarks = list(dict.fromkeys([*remarks, *about_files, *about_tokens]))  # a search's candidates: the first's
    job = job_of(recipe, plan, methods, transforms, weights, first_device)
    for transform in transforms:
        if len(experts) < 2:
            raise UsageError("there is nothing to disentangle: only one expert is named", hint="name two or more")
        if not job.taken(transform):
            raise UsageError(
                "no weight of a linear layer is left to disentangle",
                hint=f"check {named('include')} and {named('exclude')}",
            )
    data = None
    if recipe.coefficients:
        job = coefficients.with_coefficients(job, recipe.coefficients)
    elif chosen.on_data or recipe.unlabelled:
        data = coefficients.find_data(recipe, names, script)
        job = dataclasses.replace(job, transforms=(*transforms, Coefficients(data.options)))
        refuse_beyond_memory(job)
    complete = dataclasses.replace(
        recipe,
        base=_pinned(recipe.base, base),
        experts=tuple(_pinned(text, expert) for text, expert in zip(recipe.experts, experts, strict=True)),
        options=dataclasses.asdict(methods.main.options),
        disentangle=tuple(as_typed(transform.name, transform.options) for transform in transforms),
        weights=dict(zip(names, weights, strict=True)) if named_weights else {},
    )
    if recipe.as_lora is not None and not stream and not plan.base.reference.is_here:
        stream = adapted.of_adapters_alone(job)  # to store a base that nobody looks at could take hours
    return Prepared(complete, job, recorded, remarks, stream, device, data)


def _with_tokenizer(recipe: Recipe, stages: Mapping[str, Path]) -> tuple[Recipe, tuple[Checkpoint, ...]]:
    """The recipe, and the model that it takes only the tokenizer of, where there is one, as that leads here."""
    if recipe.tables is None or "tokenizer" not in recipe.tables:
        return recipe, ()
    named = Named(**recipe.tables["tokenizer"])
    model = open_companions(dataclasses.replace(parse_reference(named, stages).parts[0], name=named.name))
    tables: Tables = {**recipe.tables, "tokenizer": {"name": named.name, "reference": model.reference.location}}
    return dataclasses.replace(recipe, tables=tables), (model,)


def _prepare_auto(
    recipe: Recipe,
    opened: tuple[Checkpoint, tuple[Checkpoint, ...]] | None,
    remarks: Sequence[str],
    within: float | None,
    how: Mapping[str, Any],
) -> Prepared:
    """The merge by the best method for what the models are, of those that take no longer than `within` minutes."""
    if recipe.options:
        raise UsageError(f"'{AUTO}' has no options of a method", hint="name the method to set its options")
    check_choices(recipe)
    base, experts = opened = opened or open_models(recipe.base, recipe.experts, recipe.exclude, how["stages"])
    shared = make_plan(
        *opened, include=recipe.include, exclude=recipe.exclude, on_mismatch=recipe.on_mismatch,
        vocab=recipe.vocab, files_from=recipe.files_from, tables=recipe.tables,
    )  # fmt: skip
    kind, why = kind_of(shared, look=how["look"])
    remarks = [*remarks, *([why] if why else []), *(auto.about_language(base.config) if len(experts) > 1 else [])]
    if len(experts) > 1 and not (recipe.weights or recipe.layers or any(m.reference.is_stage for m in shared.models)):
        weights, why = balanced(shared, look=how["look"])
        if set(weights.values()) != {1.0}:
            recipe, remarks = dataclasses.replace(recipe, weights=weights), [*remarks, why]
    times: list[float | None] = []
    for choice in CHOICES[kind]:
        one = dataclasses.replace(recipe, method=choice.method, options=choice.options)
        prepared = prepare(one, opened=opened, remarks=remarks, **how)
        times.append(seconds(prepared.job, prepared.job.plan.in_order()))
        if within is None or times[-1] is None or times[-1] <= within * 60:
            break
    reason = auto.sentence(CHOICES[kind][: len(times)], times, within, str(prepared.job.source.device))
    return dataclasses.replace(prepared, remarks=[reason, *prepared.remarks])


def refuse_unknown(verb: Callable[..., Any], method: str, options: Mapping[str, Any]) -> None:
    """Refuse a keyword that is no option of the method and looks like a parameter of the verb.

    Raises:
        UsageError: With the parameter or option that was probably meant.
    """
    have = [] if method == AUTO else list(option_types(registry.load(method).options))
    parameters = [name for name in inspect.signature(verb).parameters if name != "options"]
    for name in options.keys() - set(have):
        if hint := suggestion(name, [*parameters, *have]):
            raise UsageError(f"there is no option '{name}'", hint=hint)


def _refuse_idle_data(recipe: Recipe, chosen: Method, overrides: Sequence[Override]) -> None:
    on_data = bool(chosen.on_data or recipe.unlabelled or recipe.coefficients)
    if on_data and any(override.method not in (None, recipe.method) for override in overrides):
        # Coefficients are found for a model that is merged in one way.
        raise UsageError(
            f"'{recipe.method}' finds weights for all tensors on data, and no other method can merge some of them",
            hint=f"{named('include')} and {named('exclude')} say which tensors it merges",
        )


def job_of(
    recipe: Recipe,
    plan: Plan,
    methods: Methods,
    transforms: tuple[Transform, ...],
    weights: tuple[float, ...],
    device: str,
) -> Job:
    """The plan as a job: every tensor's setting, and the groups of tensors that are merged alike.

    Raises:
        UsageError: An override goes over layers that are not there, or weights of an average add up to zero.
        DeviceError: There is no such device.
    """
    tensors = plan.select("merge")
    places = {tensor.name: (tensor.override, tensor.linear, tensor.sources) for tensor in tensors if not tensor.new}
    chosen = methods.settings(places, weights)
    settings = {}
    for tensor in tensors:
        setting = of_owners(tensor, chosen.get(tensor.name), len(weights))
        settings[tensor.name] = of_sources(setting, tensor.method, tensor.sources)
    members: dict[Any, list[TensorPlan]] = {}
    for tensor in tensors:
        setting = settings[tensor.name]
        key = group_key(registry.load(setting.method), setting), tensor.sources
        members.setdefault(key, []).append(tensor)
    groups = []
    for taken in members.values():
        first = settings[taken[0].name]
        groups.append(Group(first.method, registry.load(first.method), first.options, tuple(taken), first.each))
    return Job(source_of(plan, device), tuple(groups), weights, transforms, recipe.seed, settings)


def _pinned(text: str | Named, model: Checkpoint) -> str | Named:
    """A reference as the card tells it: as it was written, with the commit where the model is on the Hub."""
    return text if model.reference.is_here else f"{model.name}={model.reference.text}"


def digest_of(prepared: Prepared, read: coefficients.Read | None = None, *more: str) -> str:
    """The digest of all that determines the weights, as far as it can be had without reading tensors; and of `more`."""
    job = prepared.job
    return fingerprint(
        job.plan,
        job.source.device,
        dataclasses.asdict(prepared.recipe),
        read and read.identity(),
        *prepared.before,
        *more,
    )


def with_coefficients(prepared: Prepared, data: coefficients.Read, search: Mapping[str, Any]) -> Prepared:
    """The merge with the coefficients that a search has found on its data."""
    recipe = dataclasses.replace(prepared.recipe, coefficients=search["coefficients"])
    about = {name: value for name, value in search.items() if name != "coefficients"}
    return dataclasses.replace(
        prepared, recipe=recipe, job=coefficients.with_coefficients(prepared.job, recipe.coefficients),
        remarks=[*prepared.remarks, *data.notes()], adaptation=about,
    )  # fmt: skip


def threads_of_leftovers(out: Path, digest: str) -> AbstractContextManager[None]:
    """Give torch the threads that an interrupted run had, if it left something that this one can take up.

    The bits of large matrices depend on their number.
    """
    same = [text for text in fingerprints(out) if text.split()[:1] == digest.split()[:1]]
    return threads(next((threads_in(text) for text in same), None) or torch.get_num_threads())
