"""Language models at tasks of lm-evaluation-harness, and Flan-T5 models at GLUE as the literature scores them.

The harness does the measuring: its tasks by name, or a directory of YAML files in its format. What it would only log,
or take in silence, is an error here: a task without items, hidden labels, weights that a model's class has no place
for or does not find, log-likelihoods that are not numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge.engine.parallel import find_device
from modelmerge.evaluation.bench import Bench, base_name, merge_inputs, normalise_by_published, run
from modelmerge.evaluation.lm_harness import versions
from modelmerge.evaluation.lm_models import open_model
from modelmerge.evaluation.lm_scores import measure
from modelmerge.evaluation.lm_tasks import Settings, Task, check_settings, load_tasks, parse_metrics, requests
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import ScoreReport
from modelmerge.evaluation.running import Models, Running
from modelmerge.evaluation.scores import Score
from modelmerge.progress import Reporter

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
) -> ScoreReport:
    """The scores of language models at tasks of lm-evaluation-harness; the words are the harness's where it has them.

    Args:
        models: References of the models: directories with config and tokenizer, or PEFT adapters of the base.
        running: What all suites share. The expert of `flan_t5_glue_cola` is the one called `cola`, and so on. The seed
            takes the place of the harness's own.
        tasks: Names of tasks, groups or tags, with `*` and `?`: the harness's, those of `include_path`, and
            `flan_t5_glue` with its eight tasks, as the literature scores merges of Flan-T5. Default: all of
            `include_path`.
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
        ModelMergeError: lm-evaluation-harness is not installed (`pip install 'modelmerge[lm]'`); there is no such
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
        measure=lambda model, task: {str(task): harness.measure(model, str(task))},
        base_counts=True, items=lambda task: harness.items(str(task)), experts=harness.experts(),
        versions=versions(),
    )  # fmt: skip
    report = run(bench, models, running)
    if not held_out:
        _add_published(report, harness.experts())
    return report


class Harness:
    """Measures models at tasks; a model is loaded for its first task, and let go for the next model."""

    def __init__(self, tasks: Sequence[Task], settings: Settings, device: str, progress: Reporter) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._settings, self._device, self._progress = settings, device, progress
        self._model: Model | None = None
        self._network: Any = None

    def measure(self, model: Model, task: str) -> Score:
        """A model's score at a task.

        Raises:
            ModelMergeError: It cannot be loaded, or not be measured.
        """
        if self._model is not model:
            self._model = self._network = None
            self._network = open_model(model.checkpoint, model.base, self._settings, self._device, self._progress)
            self._model = model
        return measure(self._network, model.name, self.tasks[task], self._settings, self._progress)

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
        return {
            "settings": settings,
            "harness": {
                name: {
                    "sha256": task.digest,
                    "tasks": {
                        part.task_name: {
                            "version": part.VERSION, "num_fewshot": part.get_config("num_fewshot"),
                            "data": part.get_config("dataset_path"), "subset": part.get_config("dataset_name"),
                            "split": part.get_config("test_split") or part.get_config("validation_split"),
                            "there": len(part.eval_docs),
                        }
                        for part in task.parts
                    },
                }
                for name, task in self.tasks.items()
            },
        }  # fmt: skip

    def experts(self) -> dict[str, str]:
        """By task, the expert's name where it is shorter: those of our own tasks."""
        return {name: name.removeprefix(OURS) for name in self.tasks if name.startswith(OURS)}


def publication() -> dict[str, dict[str, dict[str, float]]]:
    """By base, the scores published for it and its experts at our own tasks, by the experts' names."""
    return json.loads(Path(__file__).with_suffix(".json").read_bytes())["published"]


def _add_published(report: ScoreReport, experts: Mapping[str, str]) -> None:
    """Where no expert was measured: scores at our own tasks by those published for the experts of the same base.

    Of a merge of adapters, by its experts' names, those of adapters.
    """
    bases = publication() if experts else {}
    for row in (row for row in report["models"] if row["role"] == "model"):
        base = base_name(report, row)
        scores = {task: row["scores"][task] for task in experts}
        if base not in bases or any(score["normalised"] is not None for score in scores.values()):
            continue
        paths = merge_inputs(row["path"]).get("paths", ())
        adapters = any("lora" in path.lower() for path in paths) or "experts" not in bases[base]
        kind = "lora-experts" if adapters else "experts"
        shares = {
            task: score["score"] / bases[base][kind][experts[task]] if score["score"] is not None else None
            for task, score in scores.items()
        }
        normalise_by_published(
            report, row, shares, of=f"scores published for the {kind}", figures={"model": base, **bases[base]}
        )
