"""Any model at any task, by a Python function of your own that is given the model and returns its scores."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch

from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.scores import Score, read_score

Metric = Callable[..., Any]  # (model) or (model, task) -> a score, or a mapping of tasks to scores


@dataclass(frozen=True, slots=True)
class Script:
    """A function out of a file: what errors call it, and the digest of the file and of what it imports beside it."""

    metric: Metric
    label: str
    digest: str


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
    dotted = all(part.isidentifier() for part in where.split(".")) and not where.endswith(".py")
    if path.is_file():
        module = _run(path)
    elif dotted:
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


def _run(file: Path) -> ModuleType:
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
        wanted = "(model, task)" if by_task else "(model)"
        raise UsageError(
            f"{label} cannot be called with {wanted}: {error}",
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
    seeded(seed)
    try:
        told = metric(model) if task is None else metric(model, task)
    except ModelMergeError:
        raise
    except (Exception, SystemExit) as error:
        at = f" at '{task}'" if task is not None else ""
        raise ModelMergeError(f"{label} failed on '{model.name}'{at}: {in_words(error)}") from error
    where = f"{label} on '{model.name}'"
    if task is not None:
        return {task: read_score(told, f"{where}, '{task}'")}
    if isinstance(told, Mapping) and not {"score", "items", "correct"} & told.keys():
        if not told or not all(isinstance(name, str) and name for name in told):
            raise ModelMergeError(f"{where} returned {'no scores' if not told else 'tasks that are no names'}")
        return {name: read_score(each, f"{where}, '{name}'") for name, each in told.items()}
    return {label.rpartition(":")[2]: read_score(told, where)}


def seeded(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def in_words(error: BaseException) -> str:
    """An exception in a line, with the last place in its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip() or 'without a word'}{place}"
