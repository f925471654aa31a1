"""Unlabelled data of a merge, and the coefficients that are found on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.documents import Malformed, check
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.scratch import Room
from modelmerge.engine.coefficients import Coefficients, CoefficientTable, Problem
from modelmerge.engine.job import Job
from modelmerge.engine.memory import refuse_beyond_memory
from modelmerge.engine.transforms import Transform, fit_chain
from modelmerge.engine.units import Alone
from modelmerge.errors import RecipeError, UsageError, named, suggestion
from modelmerge.evaluation import clip, clip_models, custom, image_data
from modelmerge.evaluation.bench import entry_name, recall, remember
from modelmerge.evaluation.clip_models import Parts, Tower
from modelmerge.evaluation.custom import Script, find_script, label_of, load_script
from modelmerge.evaluation.image_data import Items
from modelmerge.evaluation.image_tasks import Task, find_tasks
from modelmerge.evaluation.model import Model
from modelmerge.methods import registry
from modelmerge.methods.coefficients import Options
from modelmerge.methods.options import make_options, option_types
from modelmerge.plan.recipe import Recipe
from modelmerge.progress import Reporter


class Entries(TypedDict, total=False):
    """What unlabelled data may say, as recipes have it; besides, the options of the search."""

    tasks: list[str]
    data: list[str]
    classes: list[str]
    templates: list[str]
    config: str
    split: str
    image_column: str
    label_column: str
    heads: str
    limit: int
    script: str


# What names images, as in suite `clip`.
IMAGES = (
    "tasks", "data", "classes", "templates", "config", "split", "image_column", "label_column", "heads", "limit",
)  # fmt: skip
SCRIPT = "script"
SEARCH = "adamerging"  # the method whose options are those of the search
_COLUMNS = {"config": "config", "split": "split", "image_column": "image", "label_column": "label"}
_ANEW = f"run the merge anew without {named('recipe')}: they are found for these models and settings"
_TENTH = 10  # share of the steps whose mean is a figure: one step's is that of a few inputs


@dataclass(frozen=True, slots=True)
class Data:
    """Unlabelled data of every expert's task: images for CLIP models, or what a function of the user's gives.

    `tasks` are by the experts' names; `script` is a function, or names one in a file; `options` are those of the search
    for coefficients.
    """

    tasks: Mapping[str, Task]
    script: Script | str | None
    heads: Path | None
    limit: int | None
    options: Options

    def remarks(self) -> list[str]:
        """What a plan says of the data, and what it does not count."""
        label = ", ".join(task.name for task in self.tasks.values())
        if self.script is not None:
            label = self.script.label if isinstance(self.script, Script) else label_of(self.script)
        about = [f"weights are found on unlabelled data first, {label}; batches of them take memory besides"]
        unseen = (
            f"{label} is not run for a plan: what it gives is not looked at, nor is a change in it since the recipe"
        )
        return [*about, unseen] if isinstance(self.script, str) else about

    def read(self, seed: int, expected: Mapping[str, str]) -> Read:
        """Open the data; a script is run for the first time now, if its files have the sha256 that is `expected`.

        Raises:
            RecipeError: They have not.
            ModelMergeError: A data set cannot be read, or is empty; a script cannot be run.
        """
        options: dict[str, Any] = {"limit": self.limit, "seed": seed, "with_labels": False}
        items = {name: image_data.load(task, **options) for name, task in self.tasks.items()}
        return Read(self, items, load_script(self.script, expected) if isinstance(self.script, str) else self.script)


@dataclass(frozen=True, slots=True)
class Read:
    """Data that have been opened; `items` are by the experts' names."""

    data: Data
    items: Mapping[str, Items]
    script: Script | None

    def identity(self) -> list[Any]:
        """What the data are known by: when it changes, so may the weights."""
        script = self.script.digest if self.script is not None else None
        kept = [self.data.heads / f"{task.head}.safetensors" for task in self.data.tasks.values() if self.data.heads]
        heads = [sha256(file) if file.exists() else None for file in kept]
        items = [(name, i.identity, len(i.ids), i.classes, i.task.templates) for name, i in self.items.items()]
        return [script, heads, items]

    def notes(self) -> list[str]:
        """What a reader of the result should know of the data."""
        return [note for items in self.items.values() for note in items.notes]

    def describe(self, expert: str) -> dict[str, Any]:
        """What a manifest says of an expert's data."""
        if self.script is not None:
            return {"script": self.script.label, "sha256": self.script.digest or None}
        items = self.items[expert]
        return {"data": items.task.data, "split": items.task.split, "images": len(items.ids),
                "classes": len(items.classes), "templates": list(items.task.templates)}  # fmt: skip

    def problems(self, job: Job) -> Iterator[Problem]:
        """A classifier and its data for each expert, in the experts' order, each made when it is asked for.

        Raises:
            ModelMergeError: One cannot be made.
        """
        if self.script is not None:
            for expert in job.plan.experts:
                yield self._of_script(self.script, expert, job)
            return
        parts, digest, tower = clip_models.open_parts(Model(job.plan.base, None, job.source.device))
        for expert in job.plan.experts:
            yield self._of_images(expert.name, parts, tower, digest, job)

    def _of_script(self, script: Script, expert: Checkpoint, job: Job) -> Problem:
        model = Model(expert, job.plan.base, job.source.device)
        module, batches = custom.classifier_of(script, model, self.data.options.batch_size, job.seed)
        where, merged = f"{script.label} for '{expert.name}'", [tensor.name for tensor in job.merged()]
        names = custom.names_in(list(module.state_dict()), merged, where)
        predict = custom.predictor(where, module, batches, job.source.device)
        return Problem(expert.name, module, names, predict)

    def _of_images(self, name: str, parts: Parts, tower: Tower, digest: str, job: Job) -> Problem:
        batch_size, items = self.data.options.batch_size, self.items[name]
        try:
            head = clip_models.find_head(items.task, items.classes, parts, self.data.heads, digest)
        except UsageError as error:
            hint = f"a whole CLIP model as BASE has one; or a folder that has the head: {named('heads')} DIR"
            raise UsageError(error.template, hint=hint) from error
        module = clip_models.classifier(tower, head, job.source.device)
        order = custom.draws(len(items.ids), batch_size, job.seed, name)
        pixels = (batch for batch, _ in clip.batches(items, head, batch_size, order))
        predict = custom.predictor(f"the data of '{name}'", module, pixels, job.source.device)
        return Problem(name, module, clip_models.names_in(module, parts), predict)


def to_recipe(unlabelled: Mapping[str, Any]) -> tuple[dict[str, Any], Script | str | None]:
    """Unlabelled data as a recipe has them, and the function among them, or what names it, where there is one.

    Lists and mappings of references are taken as elsewhere.
    """
    data: dict[str, Any] = {}
    for name, value in unlabelled.items():
        if name in ("tasks", "data", "classes", "templates"):
            value = [*map(str, as_references([value] if isinstance(value, str | Path) else value))]
        data[name] = str(value) if isinstance(value, Path) else value
    function = data.get(SCRIPT)
    if not callable(function):
        return data, function
    script = Script(function, getattr(function, "__name__", SCRIPT), "")
    return data | {SCRIPT: script.label}, script


def find_data(recipe: Recipe, experts: Sequence[str], script: Script | str | None = None) -> Data:
    """The data that a recipe names, paired with the experts; nothing is read, and no script is run.

    Args:
        recipe: What was asked for.
        experts: The experts' names.
        script: The function, or what names it, as whoever runs this has given it: what a recipe names is not run.

    Raises:
        UsageError: An expert has no data, or data have no expert; an option is wrong.
        RecipeError: The recipe names a script, and nobody else does.
        ModelMergeError: The extra for images is not installed; there is no such script.
    """
    values = {name: value for name, value in recipe.unlabelled.items() if value not in (None, (), [], {})}
    try:
        check(values, Entries, "unlabelled")
    except Malformed as error:
        raise UsageError(str(error)) from error
    search = registry.load(SEARCH)
    if registry.load(recipe.method).on_data:
        options = make_options(search, recipe.method, recipe.options)
    else:
        names = [name for name in option_types(search.options) if name in values]
        options = make_options(search, SEARCH, {name: values.pop(name) for name in names})
    for name in values:
        if name not in (*IMAGES, SCRIPT):
            raise UsageError(f"unlabelled data have no setting '{name}'", hint=suggestion(name, (*IMAGES, SCRIPT)))
    if not values:
        raise UsageError(
            f"'{recipe.method}' needs unlabelled data of each expert's task: {', '.join(experts)}",
            hint=f"for CLIP models {named('tasks')} NAME or {named('data')} NAME=DIR; for other classifiers "
            f"{named('script')} FILE:FUNCTION",
        )
    if SCRIPT in values:
        if len(values) > 1:
            other = next(name for name in values if name != SCRIPT)
            raise UsageError(f"brings its own data: {named(other)} has no effect with it", option=SCRIPT)
        if script is None:
            raise RecipeError(
                f"the recipe names a script, '{values[SCRIPT]}', and what a file names is not run",
                hint=f"look into it; where you trust it, name it yourself: {named('script')} {values[SCRIPT]}",
            )
        if isinstance(script, str):
            find_script(script)
        return Data({}, script, None, None, options)
    clip.require_extra(recipe.method)
    if values.get("limit", 1) < 1:
        raise UsageError(f"must be at least 1, not {values['limit']}", option="limit")
    settings = {_COLUMNS[name]: value for name, value in values.items() if name in _COLUMNS}
    tasks, data, classes, templates = (tuple(values.get(n, ())) for n in ("tasks", "data", "classes", "templates"))
    sets = find_tasks(tasks, data, classes, templates, settings)
    heads = Path(values["heads"]).expanduser() if "heads" in values else None
    return Data(_paired(sets, experts), None, heads, values.get("limit"), options)


def _paired(tasks: Sequence[Task], experts: Sequence[str]) -> dict[str, Task]:
    """Each expert's task, by the expert's name: the one of its name, or that its name ends in."""
    pairs: dict[str, Task] = {}
    names = ", ".join(task.name for task in tasks)
    for expert in experts:
        # Of several that the name ends in, as of b and a-b, the longest is meant.
        fitting = sorted((task for task in tasks if clip.is_for(task, expert)), key=lambda task: -len(task.head))
        if not fitting:
            hint = f"name it by its task, TASK=REF, or its data: {named('tasks')}, or {named('data')} {expert}=DIR"
            raise UsageError(f"the expert '{expert}' has no unlabelled data: there are those of {names}", hint=hint)
        if len(fitting) > 1 and len(fitting[0].head) == len(fitting[1].head):
            raise UsageError(f"two sets of data are for the expert '{expert}': {fitting[0].name}, {fitting[1].name}")
        pairs[expert] = fitting[0]
    idle = [task.name for task in tasks if task.name not in [used.name for used in pairs.values()]]
    if idle:
        hint = f"the experts are: {', '.join(experts)}; TASK=REF names one"
        raise UsageError(f"no expert is for the data of '{idle[0]}'", hint=hint)
    return pairs


def with_coefficients(job: Job, coefficients: Mapping[str, Mapping[str, float]]) -> Job:
    """The job with coefficients by tensor and expert, in the place of a search for them.

    Raises:
        RecipeError: They are of other tensors or experts.
    """
    experts, tensors = [expert.name for expert in job.plan.experts], {tensor.name for tensor in job.merged()}
    for tensor, factors in coefficients.items():
        if tensor not in tensors:
            raise RecipeError(f"the recipe has coefficients of '{tensor}', which is not merged", hint=_ANEW)
        if factors.keys() != set(experts):
            raise RecipeError(f"the recipe has coefficients of {', '.join(factors)} for '{tensor}'", hint=_ANEW)
    table = {tensor: tuple(factors[name] for name in experts) for tensor, factors in coefficients.items()}
    return dataclasses.replace(job, transforms=(*_before(job), Coefficients(table=CoefficientTable(table))))


def _before(job: Job) -> tuple[Transform, ...]:
    """The transforms before the coefficients."""
    return tuple(transform for transform in job.transforms if transform.name != Coefficients.name)


def find(job: Job, data: Read, key: str, scratch: Room, *, resume: bool, progress: Reporter) -> dict[str, Any]:
    """The coefficients by tensor and expert, and what there is to say of the search, as plain data.

    Args:
        job: The merge.
        data: Its data.
        key: Digest of everything that determines the coefficients.
        scratch: Gives room of so many bytes on the disk.
        resume: Take those that an earlier run found.
        progress: Shows the progress.

    Raises:
        ModelMergeError: See `modelmerge.engine.coefficients`.
    """
    name = entry_name({"coefficients": key})
    entry = recall(name, "coefficients") if resume else None
    if entry is not None:
        progress.note("the coefficients were found by an earlier run")
        return entry
    refuse_beyond_memory(job)
    experts = [expert.name for expert in job.plan.experts]
    search = Coefficients(data.data.options, lambda: data.problems(job))
    alone = Alone(scratch)
    before = fit_chain(dataclasses.replace(job, transforms=_before(job)), None, alone, progress)
    table = search.fit(job, job.taken(search), before, alone, progress)
    steps = torch.tensor(table.losses, dtype=torch.float64)
    some = max(len(steps) // _TENTH, 1)
    first, last = steps[:some].mean(0).tolist(), steps[-some:].mean(0).tolist()
    ends = zip(experts, first, last, strict=True)
    tasks = {name: {**data.describe(name), "entropy_before": a, "entropy_after": b} for name, a, b in ends}
    entry = {
        "coefficients": {t: dict(zip(experts, each, strict=True)) for t, each in table.factors.items()},
        "tasks": tasks,
        **({"script": dict(data.script.files)} if data.script is not None and data.script.files else {}),
        "averaged_steps": some,
        "entropy": [round(value, 6) for value in steps.mean(1).tolist()],
    }
    remember(name, entry)
    return entry
