"""Language models at tasks of lm-evaluation-harness, and Flan-T5 models at GLUE as the literature scores them.

The harness does the measuring: its tasks by name, or a directory of YAML files in its format. What it would only log,
or take in silence, is an error here: a task without items, hidden labels, weights that a model's class has no place
for or does not find, log-likelihoods that are not numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import CheckpointError, ModelMergeError, ReferenceNotFound, UsageError
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.scores import Score
from modelmerge.progress import Reporter

EXTRA = "pip install 'modelmerge[lm]'"
TASKS = Path(__file__).parent / "tasks"  # our own, in the harness's format
OURS = "flan_t5_glue_"  # in front of the names of our own
SEEDS = (0, 1234, 1234, 1234)  # the harness's own defaults: Python's, numpy's, torch's, of the examples in a prompt
_RESAMPLES = 200  # for the standard error of what is no mean
_SLOW = ("bleu", "chrf", "chrf++", "ter")  # whole-corpus metrics that take seconds each
_SHARE = 1e-9  # by which a mean may differ from the harness's own sum
# What the harness says of things that are as they should be here.
_KNOWN = (
    "`pretrained` model kwarg", "Passed an already-initialized model", "`max_length` in generation kwargs",
    "Overwriting default num_fewshot", "is defined, but aggregation is not", "is defined, but higher_is_better is not",
    "overrides existing task", "Custom kwargs can be passed", "num_fewshot > 0 but fewshot_split is None",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How tasks are to be run, by the harness's words.

    Args:
        include_path: A directory of tasks in YAML. What its files name as functions is Python code that will run.
        limit: So many items of each task, from the first on; below 1, this share of them.
        num_fewshot: Solved examples in front of each item. A task that says 0 itself keeps it.
        batch_size: A number, or `auto`.
        dtype: `auto`, as the weights are stored, or the name of a torch dtype.
        apply_chat_template: Put items as a conversation, in the model's own format.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.
        metrics: By task, or for all tasks under the empty name, the metric that is the score: `NAME` or `NAME,FILTER`.
        seed: In the place of `SEEDS`, all four.
        held_out: Look at the validation split of a task that reports its test split, and at the training split of one
            that reports its validation split.
    """

    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str = "8"
    dtype: str = "auto"
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    metrics: Mapping[str, str]
    seed: int | None = None
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A task, or a group of them that has a score of its own: its name, what it is, and a digest of its meaning.

    `loaded` is what the harness made of it; the digest covers prompts, data, and the code that scores.
    """

    name: str
    loaded: Any
    digest: str

    @property
    def parts(self) -> list[Any]:
        """The tasks that are run, as the harness has them."""
        return self.loaded.get_all_tasks() if hasattr(self.loaded, "get_all_tasks") else [self.loaded]


def parse_metrics(told: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """By task, or under the empty name for all, what `[TASK=]NAME` asks for.

    Raises:
        UsageError: One of them names nothing.
    """
    if isinstance(told, Mapping):
        return dict(told)
    parts = [text.rpartition("=") for text in told]
    for text, (_, _, name) in zip(told, parts, strict=True):
        if not name:
            raise UsageError(f"--metric '{text}' names no metric", hint="as in acc_norm, or gsm8k=exact_match")
    return {task: name for task, _, name in parts}


def check_settings(settings: Settings) -> None:
    """Refuse what cannot be meant, before anything is imported.

    Raises:
        UsageError: A setting is out of its range.
    """
    limit, size = settings.limit, settings.batch_size
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UsageError(f"--limit {limit:g} is no number of items", hint="a whole number, or a share below 1")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise UsageError(f"--num-fewshot {settings.num_fewshot} is negative")
    if size != "auto" and not (size.isascii() and size.isdigit() and int(size)):
        raise UsageError(f"--batch-size '{size}' is no batch size", hint="a whole number from 1 on, or auto")
    if settings.include_path is not None and not any(settings.include_path.glob("**/*.yaml")):
        there = "holds no *.yaml" if settings.include_path.is_dir() else "is no directory"
        raise UsageError(
            f"--include-path {settings.include_path} {there}", hint="name a directory of tasks in the harness's format"
        )


def check_installed() -> None:
    """See that what the suite needs is there.

    Raises:
        ModelMergeError: It is not.
    """
    try:
        with _quiet(None):
            import accelerate  # noqa: F401
            import lm_eval  # noqa: F401
            import transformers  # noqa: F401
    except ImportError as error:
        raise ModelMergeError(
            f"eval lm needs lm-evaluation-harness with transformers, and there is no '{error.name}'", hint=EXTRA
        ) from error


def load_tasks(names: Sequence[str], settings: Settings, reporter: Reporter) -> tuple[Task, ...]:
    """The tasks of these names, with their data; those of `include_path` where none is named.

    A group that has no score of its own, and a tag, stand for the tasks in them. Names may hold `*` and `?`.

    Raises:
        UsageError: There is no such task, or it runs code that was not confirmed.
        ModelMergeError: A task's files or data cannot be read, or it has no items.
    """
    check_settings(settings)
    check_installed()
    with _quiet(reporter):
        index = _Index(settings.include_path)
        found: dict[str, Any] = {}
        for name in index.resolve(names):
            if not settings.confirm_run_unsafe_code:
                _refuse_code(index, name)
            with _told_of(name):
                loaded = index.manager.load([name])
            for unit in _units(name, loaded):
                found.setdefault(_name(unit), unit)
        for name, unit in found.items():
            for task in Task(name, unit, "").parts:
                _prepare(task, settings, reporter)
        return tuple(Task(name, unit, _digest(unit, settings)) for name, unit in found.items())


class _Index:
    """The tasks there are: our own and those of a directory; the harness's, which take seconds, once they are asked."""

    def __init__(self, include_path: Path | None) -> None:
        from lm_eval.tasks import TaskManager

        self._make = TaskManager
        self._paths = [str(TASKS), *([str(include_path)] if include_path is not None else [])]
        self._include_path = include_path
        self._whole = False
        self.manager = TaskManager(include_path=self._paths, include_defaults=False)

    def resolve(self, names: Sequence[str]) -> list[str]:
        if not names:
            own = self._make(include_path=self._paths[1:], include_defaults=False) if self._paths[1:] else None
            if own is None:
                raise UsageError(
                    "no task is named", hint="--tasks NAME; flan_t5_glue, or any that `lm-eval ls tasks` lists"
                )
            if not own.all_subtasks:
                raise self._missing("*")
            return list(own.all_subtasks)
        return list(dict.fromkeys(match for name in names for match in self._matches(name)))

    def _matches(self, name: str) -> list[str]:
        matches = self.manager.match_tasks([name])
        if not matches and not self._whole:
            self.manager = self._make(include_path=self._paths, include_defaults=True)
            self._whole = True
            matches = self.manager.match_tasks([name])
        if not matches:
            raise self._missing(name)
        return [str(match) for match in matches]

    def _missing(self, name: str) -> ModelMergeError:
        broken = next(self._broken(), None)
        if broken is not None:
            return ModelMergeError(f"there is no task '{name}', and {broken}")
        near = get_close_matches(name, self.manager.all_tasks, n=3)
        listed = "`lm-eval ls tasks` lists those of the harness; --include-path names a directory of others"
        return UsageError(
            f"there is no task '{name}'", hint=f"did you mean {' or '.join(near)}? {listed}" if near else listed
        )

    def _broken(self) -> Iterator[str]:
        """What is wrong with files that the harness skips in silence."""
        import yaml

        class Loader(yaml.SafeLoader):  # type: ignore[misc]
            """With the harness's own tag."""

        Loader.add_constructor("!function", lambda loader, node: "")
        for file in sorted(self._include_path.glob("**/*.yaml")) if self._include_path is not None else ():
            try:
                told = yaml.load(file.read_bytes(), Loader)
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                yield f"{file} cannot be read: {' '.join(str(error).split())}"
                continue
            if not isinstance(told, dict) or not {"task", "group", "include"} & told.keys():
                yield f"{file} names no 'task' and no 'group'"

    def configs(self, name: str) -> Iterator[Mapping[str, Any]]:
        """The configuration of each task that a name leads to, no function of theirs imported."""
        entry = self.manager.task_index.get(name)
        if entry is None:
            return
        config = entry.cfg or {}
        kind = entry.kind.name
        inside = [*entry.tags] if kind == "TAG" else config.get("task") or [] if kind == "GROUP" else []
        if not inside:
            yield {"task": name, **config}
        for part in inside if isinstance(inside, list) else [inside]:
            if isinstance(part, dict):
                yield part
            inner = part.get("group") or part.get("task") if isinstance(part, dict) else part
            if isinstance(inner, str) and inner != name:
                yield from self.configs(inner)


def _refuse_code(index: _Index, name: str) -> None:
    for config in index.configs(name):
        if config.get("unsafe_code"):
            raise UsageError(
                f"task '{config.get('task', name)}' runs code that the model writes, on this machine, as you",
                hint="if you have somewhere safe to do that: --confirm-run-unsafe-code",
            )


def _units(name: str, loaded: Mapping[str, Any]) -> Iterator[Any]:
    """What is to have a score of its own: tasks, and groups that say how theirs adds up."""
    group = loaded.get("groups", {}).get(name)
    if group is None:
        yield from loaded["tasks"].values()
        return
    waiting = [group]
    while waiting:
        unit = waiting.pop(0)
        if not hasattr(unit, "get_all_tasks") or unit.has_aggregation:
            yield unit
        else:
            waiting = [*unit, *waiting]


def _name(unit: Any) -> str:
    return str(unit.name if hasattr(unit, "get_all_tasks") else unit.task_name)


def _prepare(task: Any, settings: Settings, reporter: Reporter) -> None:
    own = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and own == 0 and settings.num_fewshot:
        reporter.note(f"task '{task.task_name}' is made for 0 examples in the prompt, and --num-fewshot leaves it so")
    elif settings.num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    if settings.held_out:
        _hold_out(task, reporter)
    if not len(task.eval_docs):
        raise _empty(task.task_name)


def _hold_out(task: Any, reporter: Reporter) -> None:
    """Turn a task to items that are not those it is reported on.

    Raises:
        ModelMergeError: It has none.
    """
    test, validation, training = (task.get_config(f"{kind}_split") for kind in ("test", "validation", "training"))
    reported, there = test or validation, list(task.dataset)
    found = next((s for s in (validation, training, "train") if s not in (None, reported) and s in there), None)
    if found is None:
        raise ModelMergeError(
            f"task '{task.task_name}' has no items but those it is reported on, its split '{reported}'",
            hint="choices are made on others: a task of your own, with a validation_split or a training_split",
        )
    examples = task.fewshot_cfg.split or training or validation or test
    task.set_config(key="test_split", value=found)
    if examples == found:  # the harness then keeps an item out of its own examples
        task.fewshot_cfg.split = found
    trained = ", on which experts may have been trained" if found in (training, "train") else ""
    reporter.note(f"task '{task.task_name}': its split '{found}' is looked at{trained}")


def _empty(name: str) -> ModelMergeError:
    return ModelMergeError(f"task '{name}' has no items", hint="is its data set empty, or does a filter leave nothing?")


def _digest(unit: Any, settings: Settings) -> str:
    """Of the tasks' configurations, items, examples for prompts, and of the Python files beside their YAML files."""
    digest = hashlib.sha256()
    parts = Task("", unit, "").parts
    told = [unit.to_dict()] if hasattr(unit, "get_all_tasks") else []
    for task in parts:
        config = task.dump_config()
        source = Path(str((config.get("metadata") or {}).get("config_source", "")))
        code = sorted(source.parent.glob("**/*.py")) if source.is_file() else []
        told += [config, [hashlib.sha256(file.read_bytes()).hexdigest() for file in code]]
        docs = task.eval_docs
        stop = _count(len(docs), settings.limit)
        for i in range(stop):
            digest.update(json.dumps(docs[i], sort_keys=True, default=str).encode())
        if task.get_config("num_fewshot"):
            for doc in task.fewshot_docs() or ():
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _count(there: int, limit: float | None) -> int:
    """So many of the items are looked at."""
    return there if limit is None else min(there, math.ceil(there * limit) if limit < 1 else int(limit))


class Harness:
    """Measures models at tasks; a model is loaded for its first task, and let go for the next model."""

    def __init__(self, tasks: Sequence[Task], settings: Settings, device: str, reporter: Reporter) -> None:
        self.tasks = {task.name: task for task in tasks}
        self._settings, self._device, self._reporter = settings, device, reporter
        self._model: Model | None = None
        self._loaded: Any = None

    def measure(self, model: Model, task: str) -> Score:
        """A model's score at a task.

        Raises:
            ModelMergeError: It cannot be loaded, or not be measured.
        """
        if self._model is not model:
            self._model = self._loaded = None
            self._loaded = open_model(model.opened, model.base, self._settings, self._device, self._reporter)
            self._model = model
        return measure(self._loaded, model.name, self.tasks[task], self._settings, self._reporter)

    def items(self, task: str) -> int:
        """Answers that a task asks a model for."""
        return requests(self.tasks[task], self._settings)

    def depends(self, task: str) -> list[Any]:
        """What a score depends on besides the model and the seed: the task, its data, and how it is run."""
        told = dataclasses.asdict(self._settings)
        for name in ("include_path", "confirm_run_unsafe_code", "seed", "held_out"):
            del told[name]  # those of them that bear on a score are known by the digest, or apart
        return [self.tasks[task].digest, told]

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


def published() -> dict[str, dict[str, dict[str, float]]]:
    """By base, the scores published for it and its experts at our own tasks, by the experts' names."""
    return json.loads(Path(__file__).with_suffix(".json").read_bytes())["published"]


def versions() -> dict[str, str]:
    """Of the packages that bear on scores."""
    return {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "datasets", "peft")}


def open_model(model: Checkpoint, base: Checkpoint | None, settings: Settings, device: str, reporter: Reporter) -> Any:
    """A model as the harness takes it: a checkpoint directory, or a PEFT adapter on its base.

    Args:
        model: The model, its weights and what lies beside them on this machine.
        base: Its base, for an adapter; its tokenizer serves a model that has none.
        settings: The batch size and the dtype count.
        device: As torch calls it.
        reporter: Is told what the harness warns of.

    Raises:
        ReferenceNotFound: It is no language model, or lacks its config or tokenizer.
        CheckpointError: Its weights are not those that its config asks for.
    """
    check_installed()
    whole = base if model.adapter is not None else model
    if whole is None or whole.vector is not None or whole.directory is None:
        raise ReferenceNotFound(
            f"'{model.reference.text}' is no directory with a config and weights, which eval lm needs",
            hint="a task vector becomes a model by: modelmerge merge task-arithmetic BASE VECTOR --scale 1",
        )
    with _quiet(reporter):
        from lm_eval.models.huggingface import HFLM

        loaded = _load(whole, _automodel(whole), settings.dtype)
        tokenizer = _tokenizer(whole, base)
        rows = loaded.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise CheckpointError(
                f"{whole.directory}: its tokenizer has {len(tokenizer):,} words, and its embedding {rows:,} rows",
                hint="is it another model's tokenizer?",
            )
        if model.adapter is not None:
            loaded = _adapted(loaded, model)
        loaded = loaded.to(device).eval()
        loaded.register_forward_hook(_refuse_nan(model.name), with_kwargs=False)
        size = settings.batch_size
        return HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=size if size == "auto" else int(size))


def _automodel(model: Checkpoint) -> Any:
    """The transformers class that loads it: with an encoder, or without.

    Raises:
        ReferenceNotFound: It is no language model.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kinds = {
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    kind, written = model.config.get("model_type"), model.config.get("architectures") or []
    for name, classes in kinds.items():
        if kind in classes:
            known = classes[kind] if isinstance(classes[kind], tuple | list) else (classes[kind],)
            if not written or set(written) & set(known):
                return getattr(transformers, name)
    told = f"{'/'.join(map(str, written)) or 'of no architecture'}, model_type '{kind}'"
    raise ReferenceNotFound(
        f"'{model.reference.text}' is no language model that transformers knows: its config.json says {told}",
        hint="eval lm takes causal and encoder-decoder language models",
    )


def _load(model: Checkpoint, automodel: Any, dtype: str) -> Any:
    assert model.directory is not None
    try:
        loaded, told = automodel.from_pretrained(
            str(model.directory), dtype=dtype, output_loading_info=True, trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are told below
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise CheckpointError(f"{model.directory}: transformers cannot load it: {_first_line(error)}") from error
    for what, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in told.get(what) or ())
        if names:
            raise CheckpointError(
                f"{model.directory}: {type(loaded).__name__} would run on random weights: the checkpoint {verb} "
                f"{_some(names)}",
                hint="does its config.json belong to these weights?",
            )
    extra = sorted(map(str, told.get("unexpected_keys") or ()))
    if extra:
        raise CheckpointError(
            f"{model.directory}: {type(loaded).__name__} has no place for {_some(extra)}",
            hint="does its config.json belong to these weights?",
        )
    return loaded


def _tokenizer(model: Checkpoint, base: Checkpoint | None) -> Any:
    from transformers import AutoTokenizer

    failed: Exception | None = None
    for place in (model.directory, base.directory if base is not None else None):
        if place is not None:
            try:
                return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
            except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
                failed = failed or error
    raise ReferenceNotFound(
        f"{model.directory} holds no tokenizer that transformers can read: {_first_line(failed)}",
        hint="copy the base's tokenizer files beside it, or name the base: --base REF",
    )


def _adapted(loaded: Any, model: Checkpoint) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(loaded, str(model.directory))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.directory}: peft cannot load it: {_first_line(error)}") from error
    for warning in said:
        if "missing adapter keys" in str(warning.message):
            raise CheckpointError(f"{model.directory}: {_first_line(warning.message)}", hint="copy the adapter again")
    return adapted


def _refuse_nan(name: str) -> Any:
    """A hook that stops a model whose predictions are not numbers; the harness would take the first choice."""

    def check(module: Any, words: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        # Whatever went wrong before it, the last position has seen it.
        if logits is not None and bool(logits[:, -1].isnan().any()):
            raise CheckpointError(
                f"'{name}' gives NaN for an item: no score can be made of that",
                hint="float16 overflows where float32 and bfloat16 do not: --dtype float32",
            )

    return check


def measure(model: Any, name: str, task: Task, settings: Settings, reporter: Reporter) -> Score:
    """A model's score at a task: its main metric, and all others beside it.

    Args:
        model: From `open_model`.
        name: What errors call the model.
        task: From `load_tasks`.
        settings: The same as there.
        reporter: Is told the progress, in items.

    Raises:
        ModelMergeError: The harness fails, labels are hidden, or the model cannot do such a task.
    """
    from lm_eval import evaluator

    for part in task.parts:
        _refuse_unfit(model, name, part)
    seeds = SEEDS if settings.seed is None else (settings.seed,) * 4
    with _quiet(reporter, strict=True), _told_of(task.name, name):
        _seed(seeds)
        for part in task.parts:
            part.set_fewshot_seed(seed=seeds[3])
        groups = [task.loaded, *task.loaded.get_all_groups()] if hasattr(task.loaded, "get_all_groups") else []
        model.set_cache_hook(_Progress(reporter, f"{name} {task.name}"))
        told = evaluator.evaluate(
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
        return _score(task, told, settings)


def _refuse_unfit(model: Any, name: str, task: Any) -> None:
    """The length of a whole text is that of the answer only where the question is not part of it."""
    generation = task.get_config("generation_kwargs") or {}
    if model.backend == "causal" and "max_length" in generation:
        raise UsageError(
            f"task '{task.task_name}' is for encoder-decoder models such as Flan-T5, and '{name}' has no encoder",
            hint="the harness has a task for it: `lm-eval ls tasks`",
        )


class _Progress:
    """What the harness tells each answer to, so as to keep it; here it moves the bar."""

    def __init__(self, reporter: Reporter, item: str) -> None:
        self._reporter, self._item = reporter, item

    def add_partial(self, *words: Any) -> None:
        self._reporter.advance(1, self._item)


def requests(task: Task, settings: Settings) -> int:
    """Answers that a model is asked for, as far as can be said beforehand."""
    count = 0
    for part in task.parts:
        docs = part.eval_docs
        choices = len(part.doc_to_choice(docs[0])) if part.get_config("output_type") == "multiple_choice" else 1
        count += choices * _count(len(docs), settings.limit)
    return count


def _score(task: Task, told: Mapping[str, Any], settings: Settings) -> Score:
    results, is_group = told["results"][task.name], hasattr(task.loaded, "get_all_tasks")
    figures = {
        key: _finite(value) for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }  # fmt: skip
    if not figures:
        raise ModelMergeError(f"task '{task.name}' came to no figure", hint="does its YAML name a metric?")
    better = {
        metric: bool(value)
        for part in task.parts
        for metric, value in (told["higher_is_better"].get(part.task_name) or {}).items()
    }
    key = _main(task, figures, better, settings)
    metric, _, chosen = key.partition(",")
    count = sum(told["n-samples"][part.task_name]["effective"] for part in task.parts)
    raw = {part.task_name: [s for s in told["samples"][part.task_name] if s["filter"] == chosen] for part in task.parts}
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
        stderr = _bootstrapped([sample[metric] for sample in samples], task.loaded.aggregation()[metric])
    return Score(
        value=value, count=count, stderr=stderr, items=items,
        ids=None if items is None else tuple(str(sample["doc_hash"])[:12] for sample in samples),
        metric=metric if chosen == "none" else key, figures=figures, lower=not better.get(metric, True),
    )  # fmt: skip


def _main(task: Task, figures: Mapping[str, Any], better: Mapping[str, bool], settings: Settings) -> str:
    """The metric that is the score: the one that was asked for, or the first that the task lists where more is better.

    Raises:
        UsageError: The one that was asked for is not there.
    """
    asked = settings.metrics.get(task.name) or settings.metrics.get("")
    if asked is not None:
        found = [key for key in figures if asked in (key, key.partition(",")[0])]
        if not found:
            there = ", ".join(key.removesuffix(",none") for key in figures)
            raise UsageError(f"--metric: task '{task.name}' has no '{asked}'", hint=f"it has: {there}")
        return found[0]
    if hasattr(task.loaded, "get_all_tasks"):
        order = [each.metric for each in task.loaded.aggregate_metric_list]
    else:
        order = [each["metric"] for each in task.loaded.get_config("metric_list") or ()]
    names = [getattr(each, "__name__", each) for each in order]
    ranked = sorted(figures, key=lambda key: names.index(m) if (m := key.partition(",")[0]) in names else len(names))
    return next((key for key in ranked if better.get(key.partition(",")[0], True)), ranked[0])


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


def _bootstrapped(values: Sequence[Any], aggregate: Any) -> float | None:
    """The standard deviation of a metric over items drawn again, with replacement, from a seed of its own."""
    if len(values) < 2:
        return None
    draw = random.Random(0)
    told = (aggregate(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    found = [value for value in map(_finite, told) if value is not None]
    # Where most draws have no value, the spread of the others says nothing.
    return statistics.stdev(found) if len(found) > _RESAMPLES // 2 else None


def _finite(value: Any) -> float | None:
    """A number as a float; None where it is none, or not finite."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _seed(seeds: Sequence[int]) -> None:
    import numpy
    import torch

    random.seed(seeds[0])
    numpy.random.seed(seeds[1] % 2**32)
    torch.manual_seed(seeds[2])


@contextlib.contextmanager
def _told_of(task: str, model: str | None = None) -> Iterator[None]:
    """What the harness raises, in a line that names the task."""
    try:
        yield
    except ModelMergeError:
        raise
    except Exception as error:
        if isinstance(error, IndexError) and "out of bounds for size 0" in str(error):
            raise _empty(task) from error
        on = f" on '{model}'" if model is not None else " cannot be loaded"
        raise ModelMergeError(
            f"task '{task}'{on}: {type(error).__name__}: {_first_line(error)}",
            hint="is its data set there, and does its YAML name the data set's columns and splits?",
        ) from error


@contextlib.contextmanager
def _quiet(reporter: Reporter | None, *, strict: bool = False) -> Iterator[None]:
    """Keep the harness and its libraries from the terminal; what a person should know becomes a note."""
    harness = logging.getLogger("lm_eval")
    listener = _Notes(reporter)
    before = (harness.handlers[:], harness.propagate, harness.level)
    harness.handlers, harness.propagate = [listener], False
    harness.setLevel(logging.WARNING)
    others = [logging.getLogger(name) for name in ("transformers", "datasets", "accelerate", "peft")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        harness.handlers, harness.propagate = before[:2]
        harness.setLevel(before[2])
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


class _Notes(logging.Handler):
    """What the harness warns of, each thing once."""

    def __init__(self, reporter: Reporter | None) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if self._reporter is None or any(known in text for known in _KNOWN) or text in self._said:
            return
        self._said.add(text)
        self._reporter.note(f"lm-evaluation-harness: {text[:300]}")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "without a word")[:300]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
