"""Any model at any task, by a Python function of your own that is given the model and returns its scores."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.evaluation.bench import Bench, Models, Running, run
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import ScoreReport
from modelmerge.evaluation.scores import Score, read_score

Metric = Callable[..., Any]  # (model) or (model, task) -> a score, or a mapping of tasks to scores


@dataclass(frozen=True, slots=True)
class Script:
    """A function out of a file, its label in errors, and the digest of the file and of what it imports beside it."""

    metric: Metric
    label: str
    digest: str


def evaluate(
    models: Models, running: Running, *, metric: Metric | str, tasks: Sequence[str] = (), key: str | None = None
) -> ScoreReport:
    """The scores of models at tasks, by a function that is given each model.

    Args:
        models: References of the models.
        running: What all suites share. Python's, numpy's and torch's generators are seeded (0) before each call.
        metric: A function, or `FILE:FUNCTION`. It is given a model (`Model` here: a mapping of tensor names to tensors
            that are read when asked for, with `path`, `name` and `device`), and returns a score, or a mapping of tasks
            to scores. A score is a number, more is better, or a mapping: `score` with `count` and `stderr`; `correct`
            and `count`; or `items`, the score of each item, with `ids` if there are.
        tasks: Call the function for each of these, as `metric(model, task)`; each is kept as soon as it is done.
        key: With a function that is no `FILE:FUNCTION`: its name in the cache; without it, nothing is cached.

    Returns:
        The report.

    Raises:
        ModelMergeError: The function raises, or returns what is no score; see `modelmerge.errors` for other kinds.
    """
    script = metric if callable(metric) else load_script(metric)
    if not isinstance(script, Script):
        script = Script(script, getattr(script, "__name__", "metric"), key or "")
    check_metric(script.metric, script.label, by_task=bool(tasks))
    seed = running.seed or 0
    bench = Bench(
        suite="custom", about={"metric": {"function": script.label, "sha256": script.digest or None}},
        tasks=tuple(tasks) or (None,), depends=(lambda task: script.digest) if script.digest else None,
        measure=lambda model, task: measure(script.metric, script.label, model, task, seed),
    )  # fmt: skip
    return run(bench, models, replace(running, seed=seed))


def load_script(text: str) -> Script:
    """The function that `FILE.py:FUNCTION` or `package.module:FUNCTION` names. The file is run, the module imported.

    Raises:
        UsageError: It is not of that form, or there is no such function.
        ModelMergeError: There is no such file or module, or running it fails.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise UsageError(f"--script '{text}' is not FILE:FUNCTION", hint="as in --script metric.py:accuracy")
    path = Path(where).expanduser().resolve()
    is_module = all(part.isidentifier() for part in where.split(".")) and not where.endswith(".py")
    if path.is_file():
        module = _run_file(path)
    elif is_module:
        module = _import(where)
    else:
        raise ModelMergeError(f"--script {where}: no such file")
    metric = getattr(module, name, None)
    if not callable(metric):
        have = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        near = get_close_matches(name, have, n=1)
        raise UsageError(
            f"{where} has no function '{name}'",
            hint=f"did you mean '{near[0]}'?" if near else f"it has: {', '.join(have) or 'none'}",
        )
    file = Path(str(module.__file__))
    return Script(metric, f"{file.name}:{name}", _digest(file, name))


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ModelMergeError(
            f"--script {name} cannot be imported: {in_words(error)}", hint=f"a file is named whole: {name}.py:FUNCTION"
        ) from error
    if not str(getattr(module, "__file__", None)).endswith(".py"):
        raise UsageError(f"--script {name} is no module in Python", hint="name a file: metric.py:accuracy")
    return module


def _run_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"modelmerge_script_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--script {file}: not a Python file", hint="its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(file.parent))  # as if it were run: what lies beside it can be imported, now and later
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelMergeError(f"{file} cannot be run: {in_words(error)}") from error
    return module


def _digest(file: Path, name: str) -> str:
    """Of the function's name, its file, and every module beside the file that has been imported by now."""
    places = {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    beside = {place for place in places if Path(place).parent == file.parent and place.endswith(".py")}
    digest = hashlib.sha256(name.encode())
    for place in sorted(beside | {str(file)}):
        digest.update(hashlib.sha256(Path(place).read_bytes()).digest())
    return digest.hexdigest()


def check_metric(metric: Metric, label: str, *, by_task: bool) -> None:
    """Refuse a function that does not take what it will be given, before anything is read.

    Raises:
        UsageError: It does not.
    """
    try:
        inspect.signature(metric).bind(*([None, "task"] if by_task else [None]))
    except TypeError as error:
        form = "(model, task)" if by_task else "(model)"
        raise UsageError(
            f"{label} cannot be called with {form}: {error}",
            hint="with tasks named it is called for each, else once for a model",
        ) from error
    except ValueError:  # some callables have no signature to look at
        pass


def measure(metric: Metric, label: str, model: Model, task: str | None, seed: int) -> dict[str, Score]:
    """The scores that the function gives a model, by task; `label` where it names none.

    Python's, numpy's and torch's generators are seeded first.

    Raises:
        ModelMergeError: It raises, or returns what is no score.
    """
    seed_all(seed)
    try:
        result = metric(model) if task is None else metric(model, task)
    except ModelMergeError:
        raise
    except (Exception, SystemExit) as error:
        at = f" at '{task}'" if task is not None else ""
        raise ModelMergeError(f"{label} failed on '{model.name}'{at}: {in_words(error)}") from error
    where = f"{label} on '{model.name}'"
    if task is not None:
        return {task: read_score(result, f"{where}, '{task}'")}
    if isinstance(result, Mapping) and not {"score", "items", "correct"} & result.keys():
        if not result or not all(isinstance(name, str) and name for name in result):
            raise ModelMergeError(f"{where} returned {'no scores' if not result else 'tasks that are no names'}")
        return {name: read_score(each, f"{where}, '{name}'") for name, each in result.items()}
    return {label.rpartition(":")[2]: read_score(result, where)}


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def in_words(error: BaseException) -> str:
    """An exception in a line, with the last place in its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip() or 'without a word'}{place}"
