"""Tasks for images: where labelled images lie and how their classes are put into words; the papers' eight by name.

Names of classes, of a data set, of a file or of a publication, are matched by their words.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.documents import parse_json, read_bytes
from modelmerge.errors import ModelMergeError, UsageError, named, suggestion
from modelmerge.evaluation.scores import listing, plain

TEMPLATE = "a photo of a {}."
_ORDER = "lines of LABEL<tab>NAME say which is which"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where labelled images lie, and how their classes are put into words.

    Args:
        name: What it is called; with a split other than the usual one, `NAME:SPLIT`.
        data: A path, or a data set's name on the Hub, `org/name[@revision]`.
        config: Of a data set that has several.
        split: None is `test`, or the only one that a local data set has.
        templates: Sentences with `{}` for the class.
        classes: Names as they are prompted; None are the data set's own. A mapping has the data set's names as keys.
        also: Other names that data sets have for published classes.
        is_published: The classes are those of a publication: a data set may spell them otherwise.
        image: The column of images; None where it is clear.
        label: The column of labels; None where it is clear.
        held_out: Without a split: the validation split, or else the training split, never what is reported.
    """

    name: str
    data: str
    config: str | None = None
    split: str | None = None
    templates: tuple[str, ...] = (TEMPLATE,)
    classes: tuple[str, ...] | Mapping[str, str] | None = None
    also: Mapping[str, str] | None = None
    is_published: bool = False
    image: str | None = None
    label: str | None = None
    held_out: bool = False

    @property
    def head(self) -> str:
        """The name of its text head, which all splits share."""
        return self.name.partition(":")[0]


@cache
def publication() -> dict[str, Any]:
    """The papers' tasks, with the class names and prompts of CLIP's authors, and published accuracies.

    Names and prompts: https://github.com/openai/CLIP/blob/main/data/prompts.md; EuroSAT's are in its official order,
    SVHN's are MNIST's. Accuracies: FusionBench (https://arxiv.org/abs/2406.03280), its fine-tuned CLIP models.
    """
    return json.loads((Path(__file__).parent / "clip.json").read_bytes())


def groups() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks."""
    tasks = publication()["tasks"]
    splits = [f"{name}:{split}" for name, task in tasks.items() for split in task.get("corrupted", ())]
    return {"clip8": tuple(tasks), "clip8-ood": tuple(splits)}


def published_tasks(names: Sequence[str], *, held_out: bool = False) -> tuple[Task, ...]:
    """The published tasks of these names, each `NAME` or `NAME:SPLIT`, or a name that stands for several.

    With `held_out` those without a split are looked at on another than the one that is reported.

    Raises:
        UsageError: There is no such task, or one is named twice.
    """
    every = [part for name in names for part in groups().get(name, (name,))]
    twice = [name for name, count in Counter(every).items() if count > 1]
    if twice:
        raise UsageError(f"the task '{twice[0]}' is named twice")
    return tuple(_published_task(name, held_out=held_out) for name in every)


def _published_task(name: str, *, held_out: bool = False) -> Task:
    tasks = publication()["tasks"]
    word, _, split = name.partition(":")
    keys = {plain(key): key for key in tasks} | {plain(str(task["data"])): key for key, task in tasks.items()}
    key = keys.get(plain(word))
    if key is None:
        names = [*groups(), *tasks]
        hint = suggestion(word.lower(), names, also=f"there are: {', '.join(names)}; or your own: {named('data')}")
        raise UsageError(f"there is no task '{word}'", hint=hint)
    task = tasks[key]
    return Task(
        name=f"{key}:{split}" if split else key, data=task["data"], config=task.get("config"),
        split=split or (None if held_out else "test"), templates=tuple(task["templates"]),
        classes=tuple(task["classes"]), also=task.get("also"), is_published=True, held_out=held_out and not split,
    )  # fmt: skip


def own_task(
    data: str,
    *,
    classes: str | Path | None = None,
    templates: Sequence[str] = (),
    config: str | None = None,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    held_out: bool = False,
) -> Task:
    """A task of one's own, called by the name of its data: `[NAME=]DATA`.

    With the name of a published task, and no file of classes, it is a copy of that: with its classes and prompts.

    Args:
        data: A folder of images with a folder for each class, parquet files, or a data set on the Hub.
        classes: A file of class names, see `read_classes`.
        templates: Sentences with `{}` for the class; none is "a photo of a {}.".
        config: Of a data set that has several.
        split: None is `test`, or the only one.
        image: The column of
        label: The column of labels.
        held_out: Without a split: another than `test`, if there is one.

    Raises:
        UsageError: A template has no place for the class.
        ModelMergeError: The file of class names cannot be read.
    """
    name, equals, place = data.partition("=")
    held_out = held_out and split is None
    task = Task(name=name, data=place, config=config, split=split, image=image, label=label, held_out=held_out)
    if not equals or not re.fullmatch(r"[\w.\-]+", name) or os.path.lexists(Path(data).expanduser()):
        path = Path(data.partition("@")[0]).expanduser()
        task = replace(task, name=(path.resolve().stem if path.exists() else path.name) or "data", data=data)
    elif classes is None and plain(name) in map(plain, publication()["tasks"]):
        about = {"config": config, "split": split, "image": image, "label": label, "held_out": held_out}
        task = replace(_published_task(name), data=place, **about)  # type: ignore[arg-type]
    if classes is not None:
        task = replace(task, classes=read_classes(Path(classes)))
    return with_templates(task, templates)


def with_templates(task: Task, templates: Sequence[str]) -> Task:
    """The task, prompted in other words where there are any.

    Raises:
        UsageError: A template has no place for the class.
    """
    odd = next((text for text in templates if text.count("{}") != 1), None)
    if odd is not None:
        raise UsageError(f"'{odd}' must hold {{}} once, for the class", option="templates", hint=f"as in '{TEMPLATE}'")
    return replace(task, templates=tuple(templates) or task.templates)


def read_classes(file: Path) -> tuple[str, ...] | dict[str, str]:
    """Class names out of a file: one in each line, or LABEL<tab>NAME; or a JSON list; or an object of labels to names.

    Raises:
        ModelMergeError: It cannot be read, or holds something else.
    """
    try:
        text = read_bytes(file.expanduser()).decode()
    except (OSError, ValueError) as error:
        raise ModelMergeError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from error
    classes: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if any("\t" in line for line in classes):
        pairs = [line.partition("\t") for line in classes]
        classes = {label.strip(): (name or label).strip() for label, _, name in pairs}
        if len(classes) < len(pairs):
            raise ModelMergeError(f"{file}: a label is named twice")
    if text.lstrip().startswith(("[", "{")):
        try:
            classes = parse_json(text.encode())
        except ValueError as error:
            raise ModelMergeError(f"{file}: not valid JSON: {error}") from error
    names = list(classes.values()) if isinstance(classes, dict) else classes
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ModelMergeError(f"{file}: no list of names", hint=f"one name in each line, or {_ORDER}")
    return classes if isinstance(classes, dict) else tuple(classes)


def find_tasks(
    names: Sequence[str],
    data: Sequence[str],
    files: Sequence[str],
    templates: Sequence[str],
    columns: Mapping[str, Any],
    held_out: bool = False,
) -> tuple[Task, ...]:
    """The published tasks and those of one's own; `columns` are `config`, `split`, `image` and `label` of the latter.

    Raises:
        UsageError: There is none, two have one name, or an option has no effect.
    """
    if not names and not data:
        every = ", ".join([*groups(), *publication()["tasks"]])
        raise UsageError("no task is named", hint=f"{named('tasks')} NAME ({every}), or {named('data')} DIR")
    if (files or columns) and not data:
        name = "classes" if files else next(iter(columns))
        option = f"{name}_column" if name in ("image", "label") else name
        raise UsageError(f"has no effect without {named('data')}", option=option)
    tasks = [with_templates(task, templates) for task in published_tasks(names, held_out=held_out)]
    settings = {**columns, "templates": templates, "held_out": held_out}
    by_name = dict(map(_named_file, files))
    for text in data:
        task = own_task(text, **settings)
        file = by_name.get(task.name, by_name.get(""))
        tasks.append(own_task(text, classes=file, **settings) if file is not None else task)
    odd = next((name for name in by_name if name and name not in [task.name for task in tasks]), None)
    if odd is not None:
        hint = f"there are: {', '.join(task.name for task in tasks)}"
        raise UsageError(f"names '{odd}', which is no data", option="classes", hint=hint)
    twice = next((task.name for i, task in enumerate(tasks) if task.name in [t.name for t in tasks[:i]]), None)
    if twice is not None:
        raise UsageError(f"two tasks are called '{twice}'", hint=f"name them apart: {named('data')} NAME=DATA")
    return tuple(tasks)


def _named_file(text: str) -> tuple[str, Path]:
    """`[NAME=]FILE` as a name, empty if there is none, and a path."""
    name, equals, file = text.partition("=")
    return (name, Path(file)) if equals and not Path(text).expanduser().exists() else ("", Path(text))


def name_classes(task: Task, labels: Sequence[str], *, are_names: bool) -> tuple[tuple[str, ...], list[str]]:
    """How the classes are prompted, by label, and notes for the reader; `labels` are the data set's names or numbers.

    Raises:
        ModelMergeError: The class names that are given, or published, are not those of the data set.
    """
    where = f"data set '{task.data}'"
    if task.classes is None:
        if not are_names:
            hint = f"name them: {named('classes')}"
            raise ModelMergeError(f"{where}: its labels are numbers without names", hint=hint)
        return tuple(map(_with_spaces, labels)), []
    both = f"{where} and the file of class names"
    if isinstance(task.classes, Mapping):
        keys = list(task.classes)
        order = match(labels, keys, both, ("the data set", "the file"), hint=_ORDER)
        return tuple(task.classes[keys[i]] for i in order), []
    names = task.classes
    if not are_names and len(labels) < len(names):  # the highest numbers may be absent
        labels = [str(i) for i in range(len(names))]
    if all(label.isdigit() for label in labels) and not _all_in(labels, names):
        places = [int(label) for label in labels]
        if sorted(places) != list(range(len(names))):
            raise ModelMergeError(
                f"{where}: its labels are {len(labels)} numbers from {min(places)} to {max(places)}, and there are "
                f"{len(names)} class names",
                hint=_ORDER,
            )
        note = f"{where}: its labels are numbers, which are taken for places in the list of class names"
        return tuple(names[place] for place in places), [note]
    if task.is_published:
        return _published_names(task, labels)
    order = match(labels, names, both, ("the data set", "the file"), hint=_ORDER)
    return tuple(names[i] for i in order), []


def _with_spaces(name: str) -> str:
    return name.replace("_", " ").strip()


def _all_in(names: Sequence[str], others: Sequence[str]) -> bool:
    return {plain(name) for name in names} <= {plain(name) for name in others}


def _published_names(task: Task, labels: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The published spelling of a data set's names; where it has one of its own, that, and a note."""
    assert isinstance(task.classes, tuple)
    where = f"data set '{task.data}'"
    if len(labels) != len(task.classes):
        raise ModelMergeError(
            f"{where}: it has {len(labels)} classes, and the task '{task.head}' has {len(task.classes)}",
            hint=f"name it as one of your own: {named('data')}, with {named('classes')}",
        )
    spelling = {plain(name): name for name in task.classes}
    spelling |= {plain(other): name for other, name in (task.also or {}).items()}
    names = [spelling.get(plain(label), _with_spaces(label)) for label in labels]
    odd = [label for label in labels if plain(label) not in spelling]
    if len(set(names)) != len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ModelMergeError(f"{where}: two of its classes are called '{twice}'")
    notes = [f"{where}: prompted by its own names, which are not the published ones: {listing(odd)}"] if odd else []
    return tuple(names), notes


def match(
    names: Sequence[str], others: Sequence[str], where: str, sides: tuple[str, str], *, hint: str | None = None
) -> list[int]:
    """For each of the names its place among the others, by their words.

    Raises:
        ModelMergeError: One has a name that the other lacks, or two names of one are the same.
    """
    # Letters that differ only in case are different classes, where there are such.
    apart = all(len({plain(name) for name in side}) == len(side) for side in (names, others))
    ours, theirs = ([plain(n) if apart else n.strip() for n in side] for side in (names, others))
    for side, keys in zip(sides, (ours, theirs), strict=True):
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise ModelMergeError(f"{where}: two classes of {side} are called '{twice[0]}'")
    lacking = [name for name, key in zip(names, ours, strict=True) if key not in set(theirs)]
    beyond = [name for name, key in zip(others, theirs, strict=True) if key not in set(ours)]
    if lacking or beyond:
        parts = [f"only {side} has {listing(odd)}" for side, odd in zip(sides, (lacking, beyond), strict=True) if odd]
        raise ModelMergeError(f"{where} have different classes: {'; '.join(parts)}", hint=hint)
    places = {key: i for i, key in enumerate(theirs)}
    return [places[key] for key in ours]
