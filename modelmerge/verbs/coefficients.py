"""What a merge does before it merges, where its method finds the experts' weights on unlabelled data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.staging import Scratch
from modelmerge.engine.coefficients import Problem, find_weights
from modelmerge.engine.job import Job
from modelmerge.engine.memory import refuse_finding_beyond_memory
from modelmerge.errors import RecipeError, UsageError
from modelmerge.evaluation import cache, clip, images, unlabelled
from modelmerge.evaluation.custom import Script, load_script
from modelmerge.evaluation.images import Items, Task
from modelmerge.evaluation.model import Model
from modelmerge.plan.recipe import Recipe, data_flag
from modelmerge.progress import Reporter
from modelmerge.verbs.evaluate_clip import find_tasks, is_for, parts_of

# What images are told by, as in `evaluate_clip`.
IMAGES = (
    "tasks", "data", "classes", "templates", "config", "split", "image_column", "label_column", "heads", "limit",
)  # fmt: skip
SCRIPT = "script"
_OWN = {"config": "config", "split": "split", "image_column": "image", "label_column": "label"}
_ANEW = "run the merge anew without --recipe: they are found for these models and settings"
_TENTH = 10  # share of the steps whose mean is a figure: one step's is that of a few inputs


@dataclass(frozen=True, slots=True)
class Data:
    """Unlabelled data of every expert's task: images for CLIP models, or what a function of the user's gives.

    `tasks` are by the experts' names.
    """

    tasks: Mapping[str, Task]
    script: Script | None
    heads: Path | None
    limit: int | None

    def remarks(self) -> list[str]:
        """What a plan says of the data, and what it does not count."""
        told = self.script.label if self.script is not None else ", ".join(task.name for task in self.tasks.values())
        return [
            f"weights are found on unlabelled data first: {told}; what the model makes of a batch of them takes memory "
            "besides"
        ]

    def read(self, seed: int) -> Read:
        """Open the data.

        Raises:
            ModelMergeError: A data set cannot be read, or is empty.
        """
        loaded = {
            name: images.load(task, limit=self.limit, seed=seed, labelled=False) for name, task in self.tasks.items()
        }
        return Read(self, loaded)


@dataclass(frozen=True, slots=True)
class Read:
    """Data that have been opened; `items` are by the experts' names."""

    data: Data
    items: Mapping[str, Items]

    def identity(self) -> list[Any]:
        """What the data are known by: when it changes, so may the weights."""
        script = self.data.script.digest if self.data.script is not None else None
        kept = [self.data.heads / f"{task.head}.safetensors" for task in self.data.tasks.values() if self.data.heads]
        heads = [sha256(file) if file.exists() else None for file in kept]
        told = [(name, i.identity, len(i.ids), i.classes, i.task.templates) for name, i in self.items.items()]
        return [script, heads, told]

    def notes(self) -> list[str]:
        """What a reader of the result should know of the data."""
        return [note for items in self.items.values() for note in items.notes]

    def describe(self, expert: str) -> dict[str, Any]:
        """What a manifest says of an expert's data."""
        if self.data.script is not None:
            return {"script": self.data.script.label, "sha256": self.data.script.digest or None}
        items = self.items[expert]
        return {"data": items.task.data, "split": items.task.split, "images": len(items.ids),
                "classes": len(items.classes), "templates": list(items.task.templates)}  # fmt: skip

    def problems(self, job: Job) -> Iterator[Problem]:
        """A classifier and its data for each expert, in the experts' order, each made when it is asked for.

        Raises:
            ModelMergeError: One cannot be made.
        """
        if self.data.script is not None:
            for expert in job.plan.experts:
                yield self._of_script(self.data.script, expert, job)
            return
        parts = parts_of(Model(job.plan.base, None, job.source.device))
        tower, digest = clip.read_tower(parts), clip.text_digest(parts) if parts.has_text else ""
        for expert in job.plan.experts:
            yield self._of_images(expert.name, parts, tower, digest, job)

    def _of_script(self, script: Script, expert: Checkpoint, job: Job) -> Problem:
        options = job.parts[0].options
        told = Model(expert, job.plan.base, job.source.device)
        module, batches = unlabelled.classifier_of(script, told, options.batch_size, job.seed)
        where = f"{script.label} for '{expert.name}'"
        merged = [tensor.name for tensor in job.merged()]
        names = unlabelled.names_in(list(module.state_dict()), merged, where)
        predict = unlabelled.predictor(where, module, batches, job.source.device)
        return Problem(expert.name, module, names, predict)

    def _of_images(self, name: str, parts: clip.Parts, tower: clip.Tower, digest: str, job: Job) -> Problem:
        options, items = job.parts[0].options, self.items[name]
        try:
            head = clip.find_head(items.task, items.classes, parts, self.data.heads, digest)
        except UsageError as error:
            raise UsageError(
                error.message, hint="a whole CLIP model as BASE has one; or a folder that has the head: --heads DIR"
            ) from error
        made = clip.classifier(tower, head, job.source.device)
        order = unlabelled.draws(len(items.ids), options.batch_size, job.seed, name)
        pixels = (batch for batch, _ in clip.batches(items, head, options.batch_size, order))
        return Problem(
            name, made, clip.names_in(made, parts),
            unlabelled.predictor(f"the data of '{name}'", made, pixels, job.source.device),
        )  # fmt: skip


def as_told(unlabelled: Mapping[str, Any]) -> tuple[dict[str, Any], Script | None]:
    """Unlabelled data as a recipe has them, and the function among them, where there is one.

    Lists and mappings of references are taken as elsewhere.
    """
    told: dict[str, Any] = {}
    for name, value in unlabelled.items():
        if name in ("tasks", "data", "classes", "templates"):
            value = list(as_references([value] if isinstance(value, str | Path) else value))
        told[name] = str(value) if isinstance(value, Path) else value
    function = told.get(SCRIPT)
    if not callable(function):
        return told, None
    script = Script(function, getattr(function, "__name__", SCRIPT), "")
    return told | {SCRIPT: script.label}, script


def find_data(recipe: Recipe, experts: Sequence[str], script: Script | None = None) -> Data:
    """The data that a recipe names, paired with the experts; nothing is read but a script.

    Args:
        recipe: What was asked for.
        experts: The experts' names.
        script: The function, where it does not come out of a file.

    Raises:
        UsageError: An expert has no data, or data have no expert; an option is wrong.
        ModelMergeError: The extra for images is not installed; a script cannot be run.
    """
    told = {name: value for name, value in recipe.unlabelled.items() if value not in (None, (), [], {})}
    for name in told:
        if name not in (*IMAGES, SCRIPT):
            near = get_close_matches(name, (*IMAGES, SCRIPT), n=1)
            raise UsageError(
                f"unlabelled data are not told by '{name}'", hint=f"did you mean '{near[0]}'?" if near else None
            )
    if not told:
        raise UsageError(
            f"'{recipe.method}' needs unlabelled data of each expert's task: {', '.join(experts)}",
            hint="for CLIP models --task NAME or --data NAME=DIR; for other classifiers --script FILE:FUNCTION",
        )
    if SCRIPT in told:
        if len(told) > 1:
            other = next(name for name in told if name != SCRIPT)
            raise UsageError(f"--script brings its own data: {data_flag(other)} has no effect with it")
        return Data({}, script or load_script(str(told[SCRIPT])), None, None)
    clip.require_extra(recipe.method)
    if told.get("limit", 1) < 1:
        raise UsageError(f"--limit {told['limit']}: at least one image must be looked at")
    own = {_OWN[name]: value for name, value in told.items() if name in _OWN}
    tasks, data, classes, templates = (tuple(told.get(name, ())) for name in ("tasks", "data", "classes", "templates"))
    found = find_tasks(tasks, data, classes, templates, own)
    heads = Path(told["heads"]).expanduser() if "heads" in told else None
    return Data(_paired(found, experts), None, heads, told.get("limit"))


def _paired(tasks: Sequence[Task], experts: Sequence[str]) -> dict[str, Task]:
    """Each expert's task, by the expert's name: the one of its name, or that its name ends in."""
    found: dict[str, Task] = {}
    named = ", ".join(task.name for task in tasks)
    for expert in experts:
        # Of several that the name ends in, as of b and a-b, the longest is meant.
        fitting = sorted((task for task in tasks if is_for(task, expert)), key=lambda task: -len(task.head))
        if not fitting:
            raise UsageError(
                f"the expert '{expert}' has no unlabelled data: there are those of {named}",
                hint=f"name it by its task, TASK=REF, or name its data: --task, or --data {expert}=DIR",
            )
        if len(fitting) > 1 and len(fitting[0].head) == len(fitting[1].head):
            raise UsageError(f"two sets of data are for the expert '{expert}': {fitting[0].name}, {fitting[1].name}")
        found[expert] = fitting[0]
    idle = [task.name for task in tasks if task.name not in [used.name for used in found.values()]]
    if idle:
        raise UsageError(
            f"no expert is for the data of '{idle[0]}'",
            hint=f"the experts are: {', '.join(experts)}; TASK=REF names one",
        )
    return found


def with_coefficients(job: Job, coefficients: Mapping[str, Mapping[str, float]]) -> Job:
    """The job with its experts' weights times the coefficients, by tensor and expert; a tensor without did not change.

    Raises:
        RecipeError: They are of other tensors or experts.
    """
    settings = dict(job.settings)
    experts, tensors = [expert.name for expert in job.plan.experts], [tensor.name for tensor in job.merged()]
    odd = next((tensor for tensor in coefficients if tensor not in tensors), None)
    if odd is not None:
        raise RecipeError(f"the recipe has coefficients of '{odd}', which is no tensor that is merged", hint=_ANEW)
    for tensor in tensors:
        told = coefficients.get(tensor, dict.fromkeys(experts, 0.0))
        if told.keys() != set(experts):
            raise RecipeError(f"the recipe has coefficients of {', '.join(told)} for '{tensor}'", hint=_ANEW)
        known = settings[tensor]
        weights = tuple(weight * told[name] for weight, name in zip(known.weights, experts, strict=True))
        settings[tensor] = dataclasses.replace(known, weights=weights)
    return dataclasses.replace(job, settings=settings)


def find(
    job: Job,
    data: Read,
    key: str,
    scratch: Callable[[int], Scratch],
    *,
    resume: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """The coefficients by tensor and expert, and what there is to say of the search, as plain data.

    Args:
        job: The merge.
        data: Its data.
        key: Digest of everything that determines the coefficients.
        scratch: Gives room of so many bytes on the disk.
        resume: Take those that an earlier run found.
        reporter: Is told the progress.

    Raises:
        ModelMergeError: See `modelmerge.engine.find_weights`.
    """
    name = cache.key({"coefficients": key})
    known = cache.recall(name, "coefficients") if resume else None
    if known is not None:
        reporter.note("the coefficients were found by an earlier run")
        return known
    refuse_finding_beyond_memory(job)
    experts = [expert.name for expert in job.plan.experts]
    found = find_weights(job, lambda: data.problems(job), scratch, reporter)
    steps = torch.tensor(found.losses, dtype=torch.float64)
    some = max(len(steps) // _TENTH, 1)
    before, after = steps[:some].mean(0).tolist(), steps[-some:].mean(0).tolist()
    entry = {
        "coefficients": {t: dict(zip(experts, each, strict=True)) for t, each in found.weights.items()},
        "tasks": {
            expert: {**data.describe(expert), "entropy_before": before[i], "entropy_after": after[i]}
            for i, expert in enumerate(experts)
        },
        "averaged_steps": some,
        "entropy": [round(value, 6) for value in steps.mean(1).tolist()],
    }
    cache.remember(name, entry)
    return entry
