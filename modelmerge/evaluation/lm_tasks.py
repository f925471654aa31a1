"""Tasks of lm-evaluation-harness: how they are to be run, found by name, loaded with their data, and digested."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modelmerge.errors import ModelMergeError, UsageError, named
from modelmerge.evaluation.lm_models import Settings, check_installed, naming, quiet, without_items
from modelmerge.progress import Reporter

TASKS = Path(__file__).parent / "tasks"  # our own, in the harness's format


@dataclass(frozen=True, slots=True)
class Task:
    """A task, or a group of them that has a score of its own: its name, what it is, and a digest of its meaning.

    `unit` is the harness's own object; the digest covers prompts, data, and the code that scores.
    """

    name: str
    unit: Any
    digest: str

    @property
    def parts(self) -> list[Any]:
        """The tasks that are run, as the harness has them."""
        return self.unit.get_all_tasks() if hasattr(self.unit, "get_all_tasks") else [self.unit]


def parse_metrics(texts: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """By task, or under the empty name for all, what `[TASK=]NAME` asks for.

    Raises:
        UsageError: One of them names nothing.
    """
    if isinstance(texts, Mapping):
        return dict(texts)
    parts = [text.rpartition("=") for text in texts]
    for text, (_, _, name) in zip(texts, parts, strict=True):
        if not name:
            raise UsageError(f"'{text}' names no metric", option="metrics", hint="as in acc_norm, or gsm8k=exact_match")
    return {task: name for task, _, name in parts}


def check_settings(settings: Settings) -> None:
    """Refuse what cannot be meant, before anything is imported.

    Raises:
        UsageError: A setting is out of its range.
    """
    limit, size = settings.limit, settings.batch_size
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise UsageError(f"{limit:g} is no number of items", option="limit", hint="a whole number, or a share below 1")
    if settings.num_fewshot is not None and settings.num_fewshot < 0:
        raise UsageError(f"must be at least 0, not {settings.num_fewshot}", option="num_fewshot")
    if size != "auto" and not (size.isascii() and size.isdigit() and int(size)):
        raise UsageError(f"'{size}' is no batch size", option="batch_size", hint="a whole number from 1 on, or auto")
    if settings.include_path is not None and not any(settings.include_path.glob("**/*.yaml")):
        there = "holds no *.yaml" if settings.include_path.is_dir() else "is no directory"
        hint = "name a directory of tasks in the harness's format"
        raise UsageError(f"{settings.include_path} {there}", option="include_path", hint=hint)


def load_tasks(names: Sequence[str], settings: Settings, progress: Reporter) -> tuple[Task, ...]:
    """The tasks of these names, with their data; those of `include_path` where none is named.

    A group that has no score of its own, and a tag, stand for the tasks in them. Names may hold `*` and `?`.

    Raises:
        UsageError: There is no such task, or it runs code that was not confirmed.
        ModelMergeError: A task's files or data cannot be read, or it has no items.
    """
    check_settings(settings)
    check_installed()
    with quiet(progress):
        index = _Index(settings.include_path)
        units: dict[str, Any] = {}
        for name in index.resolve(names):
            if not settings.confirm_run_unsafe_code:
                _refuse_code(index, name)
            with naming(name):
                group = index.manager.load([name])
            for unit in _units(name, group):
                units.setdefault(_name(unit), unit)
        for name, unit in units.items():
            for task in Task(name, unit, "").parts:
                _prepare(task, settings, progress)
        return tuple(Task(name, unit, _digest(unit, settings)) for name, unit in units.items())


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
            ours = self._make(include_path=self._paths[1:], include_defaults=False) if self._paths[1:] else None
            if ours is None:
                raise UsageError("no task is named", hint="flan_t5_glue, or any that `lm-eval ls tasks` lists")
            if not ours.all_subtasks:
                raise self._missing("*")
            return list(ours.all_subtasks)
        each = [name for text in names for name in text.split(",") if name]
        return list(dict.fromkeys(match for name in each for match in self._matches(name)))

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
        fault = next(self._faults(), None)
        if fault is not None:
            return ModelMergeError(f"there is no task '{name}', and {fault}")
        near = get_close_matches(name, self.manager.all_tasks, n=3)
        others = f"`lm-eval ls tasks` lists those of the harness; {named('include_path')} names a directory of others"
        return UsageError(
            f"there is no task '{name}'", hint=f"did you mean {' or '.join(near)}? {others}" if near else others
        )

    def _faults(self) -> Iterator[str]:
        """What is wrong with files that the harness skips in silence."""
        import yaml

        class Loader(yaml.SafeLoader):  # type: ignore[misc]
            """With the harness's own tag."""

        Loader.add_constructor("!function", lambda loader, node: "")
        for file in sorted(self._include_path.glob("**/*.yaml")) if self._include_path is not None else ():
            try:
                content = yaml.load(file.read_bytes(), Loader)
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                yield f"{file} cannot be read: {' '.join(str(error).split())}"
                continue
            if not isinstance(content, dict) or not {"task", "group", "include"} & content.keys():
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
                hint=f"if you have somewhere safe to do that: {named('confirm_run_unsafe_code')}",
            )


def _units(name: str, tasks: Mapping[str, Any]) -> Iterator[Any]:
    """What gets a score of its own: tasks, and groups that say how theirs adds up."""
    group = tasks.get("groups", {}).get(name)
    if group is None:
        yield from tasks["tasks"].values()
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


def _prepare(task: Any, settings: Settings, progress: Reporter) -> None:
    usual = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and usual == 0 and settings.num_fewshot:
        progress.note(f"task '{task.task_name}' is made for 0 examples in the prompt, and keeps to that")
    elif settings.num_fewshot is not None or usual is None:
        task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
    if settings.held_out:
        _hold_out(task, progress)
    if not len(task.eval_docs):
        raise without_items(task.task_name)


def _hold_out(task: Any, progress: Reporter) -> None:
    """Turn a task to items that are not those it is reported on.

    Raises:
        ModelMergeError: It has none.
    """
    test, validation, training = (task.get_config(f"{kind}_split") for kind in ("test", "validation", "training"))
    main, there = test or validation, list(task.dataset)
    other = next((s for s in (validation, training, "train") if s not in (None, main) and s in there), None)
    if other is None:
        raise ModelMergeError(
            f"task '{task.task_name}' has no items but those it is reported on, its split '{main}'",
            hint="choices are made on others: a task of your own, with a validation_split or a training_split",
        )
    examples = task.fewshot_cfg.split or training or validation or test
    task.set_config(key="test_split", value=other)
    if examples == other:  # the harness then keeps an item out of its own examples
        task.fewshot_cfg.split = other
    caution = ", on which experts may have been trained" if other in (training, "train") else ""
    progress.note(f"task '{task.task_name}': its split '{other}' is looked at{caution}")


def _digest(unit: Any, settings: Settings) -> str:
    """Digest of the tasks' configurations, items and prompt examples, and of the Python files beside their YAML."""
    digest = hashlib.sha256()
    parts = Task("", unit, "").parts
    content = [unit.to_dict()] if hasattr(unit, "get_all_tasks") else []
    for task in parts:
        config = task.dump_config()
        source = Path(str((config.get("metadata") or {}).get("config_source", "")))
        code = sorted(source.parent.glob("**/*.py")) if source.is_file() else []
        content += [config, [hashlib.sha256(file.read_bytes()).hexdigest() for file in code]]
        docs = task.eval_docs
        stop = count(len(docs), settings.limit)
        for i in range(stop):
            digest.update(json.dumps(docs[i], sort_keys=True, default=str).encode())
        if task.get_config("num_fewshot"):
            for doc in task.fewshot_docs() or ():
                digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def count(there: int, limit: float | None) -> int:
    """How many of the items are looked at."""
    return there if limit is None else min(there, math.ceil(there * limit) if limit < 1 else int(limit))


def requests(task: Task, settings: Settings) -> int:
    """Answers that a model is asked for, as far as can be said beforehand."""
    total = 0
    for part in task.parts:
        docs = part.eval_docs
        choices = len(part.doc_to_choice(docs[0])) if part.get_config("output_type") == "multiple_choice" else 1
        total += choices * count(len(docs), settings.limit)
    return total
