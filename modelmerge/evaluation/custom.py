"""Any model at any task, by a Python function of your own that is given the model and returns its scores."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from modelmerge.checkpoint.digest import sha256
from modelmerge.errors import ModelMergeError, PlanError, RecipeError, UsageError, suggestion
from modelmerge.evaluation.bench import Bench, Models, Running, run
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import Report
from modelmerge.evaluation.scores import Score, read_score

Metric = Callable[..., Any]  # (model) or (model, task) -> a score, or a mapping of tasks to scores


@dataclass(frozen=True, slots=True)
class Script:
    """A function out of a file, its label in errors, and the digest of the file and of what it imports beside it.

    `files` has the sha256 of each of these files by its name.
    """

    metric: Metric
    label: str
    digest: str
    files: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    models: Models, running: Running, *, metric: Metric | str, tasks: Sequence[str] = (), key: str | None = None
) -> Report:
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


def find_script(text: str) -> tuple[str, str, Path | None]:
    """What `FILE.py:FUNCTION` or `package.module:FUNCTION` names: both sides, and the file, if it is one. None is run.

    Raises:
        UsageError: It is not of that form.
        ModelMergeError: There is no such file.
    """
    where, colon, name = text.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise UsageError(f"'{text}' is not FILE:FUNCTION", hint="as in metric.py:accuracy")
    path = Path(where).expanduser().resolve()
    if path.is_file():
        return where, name, path
    if where.endswith(".py") or not all(part.isidentifier() for part in where.split(".")):
        raise ModelMergeError(f"{where}: no such file")
    return where, name, None


def label_of(text: str) -> str:
    """What a script is called wherever it lies: its file's own name, and the function's."""
    where, _, name = text.rpartition(":")
    file = Path(where).name
    return f"{file if file.endswith('.py') else file.rpartition('.')[2] + '.py'}:{name}"


def load_script(text: str, expected: Mapping[str, str] | None = None) -> Script:
    """The function that `FILE.py:FUNCTION` or `package.module:FUNCTION` names. The file is run, the module imported.

    `expected` has the sha256 that the file, and others beside it, by their names, must have: else nothing is run.

    Raises:
        UsageError: It is not of that form, or there is no such function.
        RecipeError: A file has another sha256.
        ModelMergeError: There is no such file or module, or running it fails.
    """
    where, name, path = find_script(text)
    place = path or _place_of(where)
    if expected and place is None:
        raise RecipeError(f"{where}: the module's file cannot be found", hint="name the file: FILE.py:FUNCTION")
    for beside, digest in (expected or {}).items():
        assert place is not None, "it has been found"
        file = place.parent / beside
        if not file.is_file() or sha256(file) != digest:
            raise RecipeError(
                f"{file}: not the script that the recipe was made with (its sha256 differs)",
                hint="restore the file, or make the merge anew without the recipe",
            )
    module = _run_file(path) if path is not None else _import(where)
    metric = getattr(module, name, None)
    if not callable(metric):
        have = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        hint = suggestion(name, have, f"it has: {', '.join(have) or 'none'}")
        raise UsageError(f"{where} has no function '{name}'", hint=hint)
    files = _files(Path(str(module.__file__)))
    digest = hashlib.sha256(name.encode() + b"".join(bytes.fromhex(each) for each in files.values())).hexdigest()
    return Script(metric, f"{Path(str(module.__file__)).name}:{name}", digest, files)


def _place_of(name: str) -> Path | None:
    """The file of a module, found without running it or its packages."""
    package = name.rpartition(".")[0]
    path = None
    if package:
        known = getattr(sys.modules.get(package), "__path__", None)
        folder = _place_of(package) if known is None else None
        path = list(known) if known is not None else [str(folder.parent)] if folder is not None else []
    spec = PathFinder.find_spec(name, path)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        hint = f"a file is named whole: {name}.py:FUNCTION"
        raise ModelMergeError(f"{name} cannot be imported: {in_words(error)}", hint=hint) from error
    if not str(getattr(module, "__file__", None)).endswith(".py"):
        raise UsageError(f"{name} is no module in Python", hint="name a file: metric.py:accuracy")
    return module


def _run_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"modelmerge_script_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: not a Python file", hint="its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(file.parent))  # as if it were run: what lies beside it can be imported, now and later
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelMergeError(f"{file} cannot be run: {in_words(error)}") from error
    return module


def _files(file: Path) -> dict[str, str]:
    """The sha256 of a file, and of every module beside it that has been imported by now, by their names."""
    places = {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    beside = {place for place in places if Path(place).parent == file.parent and place.endswith(".py")}
    return {Path(place).name: sha256(Path(place)) for place in sorted(beside | {str(file)})}


def check_metric(metric: Metric, label: str, *, by_task: bool) -> None:
    """Refuse a function that does not take what it will be given, before anything is read.

    Raises:
        UsageError: It does not.
    """
    try:
        inspect.signature(metric).bind(*([None, "task"] if by_task else [None]))
    except TypeError as error:
        form = "(model, task)" if by_task else "(model)"
        hint = "with tasks named it is called for each, else once for a model"
        raise UsageError(f"{label} cannot be called with {form}: {error}", hint=hint) from error
    except ValueError:  # some callables have no signature to look at
        pass


def measure(metric: Metric, label: str, model: Model, task: str | None, seed: int) -> dict[str, Score]:
    """The scores that the function gives a model, by task; `label` where it names none.

    Raises:
        ModelMergeError: It raises, or returns what is no score.
    """
    result = call(metric, label, model, task, seed)
    where = f"{label} on '{model.name}'"
    if task is not None:
        return {task: read_score(result, f"{where}, '{task}'")}
    if isinstance(result, Mapping) and not {"score", "items", "correct"} & result.keys():
        if not result or not all(isinstance(name, str) and name for name in result):
            raise ModelMergeError(f"{where} returned {'no scores' if not result else 'tasks that are no names'}")
        return {name: read_score(each, f"{where}, '{name}'") for name, each in result.items()}
    return {label.rpartition(":")[2]: read_score(result, where)}


def call(metric: Metric, label: str, model: Model, task: str | None, seed: int) -> Any:
    """What the function returns, all generators seeded first.

    Raises:
        ModelMergeError: It raises.
    """
    seed_all(seed, seed, seed)
    try:
        return metric(model) if task is None else metric(model, task)
    except ModelMergeError:
        raise
    except (Exception, SystemExit) as error:
        at = f" at '{task}'" if task is not None else ""
        raise ModelMergeError(f"{label} failed on '{model.name}'{at}: {in_words(error)}") from error


def seed_all(python: int, numpys: int, torchs: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(python)
    numpy.random.seed(numpys % 2**32)
    torch.manual_seed(torchs)


def in_words(error: BaseException) -> str:
    """An exception in a line, with the last place in its trace."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip() or 'without a word'}{place}"


def draws(count: int, size: int, seed: int, name: str) -> Iterator[list[int]]:
    """Places of `size` of `count` items at a time, without end: each once in an order drawn by the seed, then again."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def classifier_of(script: Script, expert: Model, size: int, seed: int) -> tuple[torch.nn.Module, Iterator[Any]]:
    """The module and the endless batches that a user's function gives for an expert.

    Raises:
        ModelMergeError: The function raises, or returns something else.
    """
    where = f"{script.label} for '{expert.name}'"
    result = call(script.metric, script.label, expert, None, seed)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], torch.nn.Module):
        hint = "return (module, inputs): a torch.nn.Module that gives logits, and its unlabelled inputs"
        raise ModelMergeError(f"{where} returned {type(result).__name__}, which is not what was asked for", hint=hint)
    return result[0], batches(result[1], size, seed, expert.name, where)


def batches(inputs: Any, size: int, seed: int, name: str, where: str) -> Iterator[Any]:
    """Batches without end.

    Args:
        inputs: A tensor [N, ...], or a tuple or a mapping of such, which `size` rows are drawn from at a time. Or
            something that gives batches each time it is iterated over, such as a list of them or a DataLoader.
        size: Rows of a batch.
        seed: Of what is drawn.
        name: Of the task, which has an order of its own.
        where: What errors call it.

    Raises:
        ModelMergeError: There are none, or no more.
    """
    tensors = (
        list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs) if isinstance(inputs, tuple) else []
    )
    tensors = [inputs] if isinstance(inputs, Tensor) else tensors
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        return _again_and_again(inputs, where)
    counts = sorted({len(tensor) for tensor in tensors})
    if len(counts) > 1 or not counts[0]:
        hint = "as many rows in each tensor, and some"
        raise ModelMergeError(f"{where}: its inputs are {' and '.join(map(str, counts))} rows", hint=hint)
    return (_rows(inputs, places) for places in draws(counts[0], size, seed, name))


def _rows(inputs: Any, places: Sequence[int]) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[places]
    if isinstance(inputs, tuple):
        return tuple(tensor[places] for tensor in inputs)
    return {name: tensor[places] for name, tensor in inputs.items()}


def _again_and_again(inputs: Any, where: str) -> Iterator[Any]:
    times = 0
    while True:
        try:
            batch = None
            for batch in inputs:
                yield batch
        except ModelMergeError:
            raise
        except Exception as error:
            raise ModelMergeError(f"{where}: its inputs cannot be read: {in_words(error)}") from error
        if batch is None:
            what = "there are no inputs" if not times else "its inputs could be iterated over once only"
            raise ModelMergeError(f"{where}: {what}", hint="return tensors, a list of batches, or a DataLoader")
        times += 1


def predictor(
    where: str, module: torch.nn.Module, batches: Iterator[Any], device: torch.device
) -> Callable[[], Tensor]:
    """A function that gives the module's logits of the next batch, computed on the device.

    A tensor is the module's argument, a tuple or list are its arguments, a mapping its named ones. Logits are what it
    returns, or have that name in it.

    Raises:
        ModelMergeError: When called: the module raises, or returns no logits.
    """

    def predict() -> Tensor:
        batch = _on_device(next(batches), device)
        try:
            if isinstance(batch, Mapping):
                output = module(**batch)
            else:
                output = module(*batch) if isinstance(batch, tuple | list) else module(batch)
        except Exception as error:
            raise ModelMergeError(f"{where}: its module fails on its inputs: {in_words(error)}") from error
        in_mapping = isinstance(output, Mapping) and "logits" in output
        logits = output["logits"] if in_mapping else getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise ModelMergeError(f"{where}: its module returns {type(output).__name__}", hint="it must return logits")
        return logits

    return predict


def _on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _on_device(each, device) for name, each in batch.items()}
    return type(batch)(_on_device(each, device) for each in batch) if type(batch) in (tuple, list) else batch


def names_in(keys: Collection[str], tensors: Collection[str], where: str) -> dict[str, str]:
    """By the names of a checkpoint's tensors, those of a module's state dict: the same, or all behind one prefix.

    Raises:
        PlanError: Two prefixes would do.
    """
    by_prefix = {"": {name: name for name in tensors if name in keys}}
    for name in tensors:
        for key in keys:
            if key.endswith(f".{name}"):
                by_prefix.setdefault(key.removesuffix(name), {})[name] = key
    most = max(map(len, by_prefix.values()))
    best = [prefix for prefix, names in by_prefix.items() if len(names) == most]
    if most and len(best) > 1:
        raise PlanError(
            f"{where}: its module has the checkpoint's tensors twice: behind '{best[0]}' and '{best[1]}'",
            hint="return a module that holds the model once",
        )
    return by_prefix[best[0]]
