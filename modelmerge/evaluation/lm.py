"""Language models at tasks of lm-evaluation-harness, and Flan-T5 models at GLUE as the literature scores them.

The harness does the measuring: its tasks by name, or a directory of YAML files in its format. What it would only log,
or take in silence, is an error here: a task without items, hidden labels, weights that a model's class has no place
for or does not find, log-likelihoods that are not numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge.devices import find_device
from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.evaluation.bench import Bench, Models, Running, merge_inputs, normalise_by_published, run
from modelmerge.evaluation.custom import seed_all
from modelmerge.evaluation.lm_models import SEEDS, Settings, naming, open_model, quiet
from modelmerge.evaluation.lm_tasks import Task, check_settings, load_tasks, parse_metrics, requests
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import ModelRow, Report
from modelmerge.evaluation.scores import Score
from modelmerge.progress import Reporter

_RESAMPLES = 200  # for the standard error of what is no mean
_SLOW = ("bleu", "chrf", "chrf++", "ter")  # whole-corpus metrics that take seconds each
_SHARE = 1e-9  # by which a mean may differ from the harness's own sum
OURS = "flan_t5_glue_"  # in front of the names of our own tasks


def evaluate(
    models: Models,
    running: Running,
    *,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    metrics: Sequence[str] | Mapping[str, str] = (),
    held_out: bool = False,
) -> Report:
    """The scores of language models at tasks of lm-evaluation-harness; the words are the harness's where it has them.

    Args:
        models: References of the models: directories with config and tokenizer, or PEFT adapters of the base.
        running: What all suites share. The expert of `flan_t5_glue_cola` is the one called `cola`, and so on. The seed
            takes the place of the harness's own.
        tasks: Names of tasks, groups or tags, with `*` and `?`, or several with commas between: the harness's, those of
            `include_path`, and `flan_t5_glue` with its eight tasks, as the literature scores merges of Flan-T5.
            Default: all of `include_path`.
        include_path: A directory of tasks as YAML files. What they name as functions is Python code that will run.
        limit: So many items of each task, from the first on; below 1, this share of them.
        num_fewshot: Solved examples in front of each item.
        batch_size: Items at a time, or `auto`: as many as the GPU holds.
        dtype: `auto`: as the weights are stored; or the name of a torch dtype.
        apply_chat_template: Put items as a conversation, in the model's own format.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.
        metrics: What the score is: `NAME` or `NAME,FILTER` for all tasks, `TASK=NAME` for one, or a mapping. Default:
            the first metric of the task where more is better.
        held_out: Look at the validation split of a task that is reported on its test split, and at the training split
            of one that is reported on its validation split: to choose by.

    Returns:
        The report. Each score has `figures`, those of all the task's metrics by the harness's names. Where scores at
        `flan_t5_glue` are published for the base's experts, and these were not measured, there are `published` and
        each model's `normalised_by_published`.

    Raises:
        ModelMergeError: lm-evaluation-harness is not installed; there is no such
            task, or it has no items; a model is no language model; see `modelmerge.errors` for other kinds.
    """
    settings = Settings(
        include_path=None if include_path is None else Path(include_path).expanduser().resolve(), limit=limit,
        num_fewshot=num_fewshot, batch_size=str(batch_size), dtype=dtype, apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=confirm_run_unsafe_code, metrics=parse_metrics(metrics), seed=running.seed,
        held_out=held_out,
    )  # fmt: skip
    check_settings(settings)
    progress = running.progress
    harness = Harness(load_tasks(tasks, settings, progress), settings, str(find_device(running.device)), progress)
    bench = Bench(
        suite="lm", about=harness.about(), tasks=tuple(harness.tasks),
        depends=lambda task: harness.depends(str(task)),
        open=harness.open, measure=lambda ready, task: {str(task): harness.measure(ready, str(task))},
        base_counts=True, items=lambda task: harness.items(str(task)), experts=harness.experts(),
        packages=("lm_eval", "transformers", "datasets", "peft"),
    )  # fmt: skip
    report = run(bench, models, running)
    if not held_out:
        normalise_by_published(report, publication(), harness.experts(), what="scores", kind=_kind)
    return report


class Harness:
    """Measures models at tasks; a model is loaded for its first task."""

    def __init__(self, tasks: Sequence[Task], settings: Settings, device: str, progress: Reporter) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._settings, self._device, self._progress = settings, device, progress

    def open(self, model: Model) -> tuple[str, Any]:
        """A model's name, and the model as the harness takes it.

        Raises:
            ModelMergeError: It cannot be loaded.
        """
        return model.name, open_model(model.checkpoint, model.base, self._settings, self._device, self._progress)

    def measure(self, ready: tuple[str, Any], name: str) -> Score:
        """A model's score at a task: its main metric, and all others beside it.

        Raises:
            ModelMergeError: The harness fails, labels are hidden, or the model cannot do such a task.
        """
        from lm_eval import evaluator

        (label, model), task, settings = ready, self.tasks[name], self._settings
        for part in task.parts:
            _refuse_unfit(model, label, part)
        seeds = SEEDS if settings.seed is None else (settings.seed,) * 4
        with quiet(self._progress), naming(name, label):
            seed_all(*seeds[:3])
            for part in task.parts:
                part.set_fewshot_seed(seed=seeds[3])
            groups = [task.unit, *task.unit.get_all_groups()] if hasattr(task.unit, "get_all_groups") else []
            model.set_cache_hook(_Hook(self._progress, f"{label} {name}"))
            outcome = evaluator.evaluate(
                lm=model,
                task_dict={
                    "tasks": {part.task_name: part for part in task.parts},
                    "groups": {group.name: group for group in groups},
                    "group_map": {group.name: group.child_names for group in groups},
                },
                limit=settings.limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=settings.apply_chat_template, fewshot_as_multiturn=settings.apply_chat_template,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            )  # fmt: skip
            return _score(task, outcome, settings)

    def items(self, task: str) -> int:
        """How many answers a task asks a model for."""
        return requests(self.tasks[task], self._settings)

    def depends(self, task: str) -> list[Any]:
        """What a score depends on besides the model and the seed: the task, its data, and how it is run."""
        settings = dataclasses.asdict(self._settings)
        for name in ("include_path", "confirm_run_unsafe_code", "seed", "held_out"):
            del settings[name]  # those of them that bear on a score are known by the digest, or apart
        return [self.tasks[task].digest, settings]

    def about(self) -> dict[str, Any]:
        """What a report says of the settings and of each task."""
        settings = dataclasses.asdict(self._settings)
        settings["include_path"] = None if self._settings.include_path is None else str(self._settings.include_path)
        tasks = {name: (task.digest, {part.task_name: _about(part) for part in task.parts})
                 for name, task in self.tasks.items()}  # fmt: skip
        harness = {name: {"sha256": digest, "tasks": parts} for name, (digest, parts) in tasks.items()}
        return {"settings": settings, "harness": harness}

    def experts(self) -> dict[str, str]:
        """By task, the expert's name where it is shorter: those of our own tasks."""
        return {name: name.removeprefix(OURS) for name in self.tasks if name.startswith(OURS)}


def _about(task: Any) -> dict[str, Any]:
    return {
        "version": task.VERSION, "num_fewshot": task.get_config("num_fewshot"),
        "data": task.get_config("dataset_path"), "subset": task.get_config("dataset_name"),
        "split": task.get_config("test_split") or task.get_config("validation_split"), "there": len(task.eval_docs),
    }  # fmt: skip


def publication() -> dict[str, dict[str, dict[str, float]]]:
    """By base, the scores published for it and its experts at our own tasks, by the experts' names."""
    return json.loads(Path(__file__).with_suffix(".json").read_bytes())["published"]


def _kind(row: ModelRow, figures: Mapping[str, Any]) -> str:
    """Of which experts a model is a merge: adapters, by their paths, or whole models."""
    adapters = any("lora" in path.lower() for path in merge_inputs(row["path"]).get("paths", ()))
    return "lora-experts" if adapters or "experts" not in figures else "experts"


def _refuse_unfit(model: Any, name: str, task: Any) -> None:
    """The length of a whole text is that of the answer only where the question is not part of it."""
    generation = task.get_config("generation_kwargs") or {}
    if model.backend == "causal" and "max_length" in generation:
        raise UsageError(
            f"task '{task.task_name}' is for encoder-decoder models such as Flan-T5, and '{name}' has no encoder",
            hint="the harness has a task for it: `lm-eval ls tasks`",
        )


class _Hook:
    """In the place of the harness's cache of answers: each answer moves the progress on."""

    def __init__(self, progress: Reporter, item: str) -> None:
        self._progress, self._item = progress, item

    def add_partial(self, *words: Any) -> None:
        self._progress.advance(1, self._item)


def _score(task: Task, outcome: Mapping[str, Any], settings: Settings) -> Score:
    results, is_group = outcome["results"][task.name], hasattr(task.unit, "get_all_tasks")
    figures = {
        key: _finite(value) for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }  # fmt: skip
    if not figures:
        raise ModelMergeError(f"task '{task.name}' came to no figure", hint="does its YAML name a metric?")
    better = {
        metric: bool(value)
        for part in task.parts
        for metric, value in (outcome["higher_is_better"].get(part.task_name) or {}).items()
    }
    key = _main(task, figures, better, settings)
    metric, _, rule = key.partition(",")
    count = sum(outcome["n-samples"][part.task_name]["effective"] for part in task.parts)
    raw = {
        part.task_name: [s for s in outcome["samples"][part.task_name] if s["filter"] == rule] for part in task.parts
    }
    for part in task.parts:
        _refuse_hidden(part, raw[part.task_name])
    samples = [sample for part in task.parts for sample in raw[part.task_name]]
    value = figures[key]
    items = _items([sample.get(metric) for sample in samples], value)
    if items is not None:
        stderr = statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None
    elif is_group or metric in _SLOW or value is None:
        stderr = None
    else:
        stderr = _bootstrap_error([sample[metric] for sample in samples], task.unit.aggregation()[metric])
    return Score(
        value=value, count=count, stderr=stderr, items=items,
        ids=None if items is None else tuple(str(sample["doc_hash"])[:12] for sample in samples),
        metric=metric if rule == "none" else key, figures=figures, lower=not better.get(metric, True),
    )  # fmt: skip


def _main(task: Task, figures: Mapping[str, Any], better: Mapping[str, bool], settings: Settings) -> str:
    """The metric that is the score: the one that was asked for, or the first that the task lists where more is better.

    Raises:
        UsageError: The one that was asked for is not there.
    """
    request = settings.metrics.get(task.name) or settings.metrics.get("")
    if request is not None:
        keys = [key for key in figures if request in (key, key.partition(",")[0])]
        if not keys:
            there = ", ".join(key.removesuffix(",none") for key in figures)
            raise UsageError(f"task '{task.name}' has no '{request}'", option="metrics", hint=f"it has: {there}")
        return keys[0]
    if hasattr(task.unit, "get_all_tasks"):
        order = [each.metric for each in task.unit.aggregate_metric_list]
    else:
        order = [each["metric"] for each in task.unit.get_config("metric_list") or ()]
    names = [getattr(each, "__name__", each) for each in order]
    ranking = sorted(figures, key=lambda key: names.index(m) if (m := key.partition(",")[0]) in names else len(names))
    return next((key for key in ranking if better.get(key.partition(",")[0], True)), ranking[0])


def _refuse_hidden(task: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Of a choice between answers, the label must be one of them; the harness counts such items as wrong."""
    if task.get_config("output_type") != "multiple_choice":
        return
    for sample in samples:
        targets = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
        choices = len(sample["arguments"])
        if any(isinstance(target, int) and not 0 <= target < choices for target in targets):
            raise ModelMergeError(
                f"task '{task.task_name}': the label of item {sample['doc_id']} is {sample['target']}, of "
                f"{choices} choices",
                hint="the labels of many test splits are hidden: name the validation split",
            )


def _items(values: Sequence[Any], mean: float | None) -> tuple[float, ...] | None:
    """The score of each item, where their mean is the score."""
    if mean is None or not values or not all(_finite(value) is not None for value in values):
        return None
    items = tuple(float(value) for value in values)
    return items if math.isclose(statistics.fmean(items), mean, rel_tol=_SHARE, abs_tol=_SHARE) else None


def _bootstrap_error(values: Sequence[Any], aggregate: Any) -> float | None:
    """The standard deviation of a metric over items drawn again, with replacement, from a seed of its own."""
    if len(values) < 2:
        return None
    draw = random.Random(0)
    draws = (aggregate(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    results = [value for value in map(_finite, draws) if value is not None]
    # Where most draws have no value, the spread of the others says nothing.
    return statistics.stdev(results) if len(results) > _RESAMPLES // 2 else None


def _finite(value: Any) -> float | None:
    """A number as a float; None where it is none, or not finite."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
