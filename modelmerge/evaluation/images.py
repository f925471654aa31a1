"""Images with labels to classify: the papers' eight tasks, a folder, parquet files, or a data set on the Hub.

A label means what its data set calls it. Class names are matched by their words, never by their place in a list; only
a label that is a bare number is taken for a place, in the list that the user gives or that its task is published with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.errors import HubError, ModelMergeError, UsageError
from modelmerge.evaluation.scores import plain

TEMPLATE = "a photo of a {}."
_ORDER = "lines of LABEL<tab>NAME say which is which"
_FEW = 6  # names that an error lists
# Splits that choices can be made on without spoiling what is reported, the best first.
_HELD_OUT = ("validation", "val", "valid", "dev", "train", "training")


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
        published: The classes are those of a publication: a data set may spell them otherwise.
        image: The column of images; None is found.
        label: The column of labels; None is found.
        held_out: Without a split: the validation split, or else the training split, never what is reported.
    """

    name: str
    data: str
    config: str | None = None
    split: str | None = None
    templates: tuple[str, ...] = (TEMPLATE,)
    classes: tuple[str, ...] | Mapping[str, str] | None = None
    also: Mapping[str, str] | None = None
    published: bool = False
    image: str | None = None
    label: str | None = None
    held_out: bool = False

    @property
    def head(self) -> str:
        """The name of its text head, which all splits share."""
        return self.name.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Items:
    """Images to classify; `labels` [N] are places in `classes`, which are as they are prompted."""

    task: Task
    images: Any  # a data set with one column, decoded when it is indexed
    labels: Tensor
    ids: tuple[str, ...]  # each item's place in the split
    classes: tuple[str, ...]
    total: int  # items in the split
    identity: str  # of the data, for a cache
    notes: tuple[str, ...]

    def image(self, place: int) -> Any:
        """An image, RGB.

        Raises:
            ModelMergeError: It cannot be decoded, or there is none.
        """
        try:
            return next(iter(self.images[place].values())).convert("RGB")
        except (OSError, ValueError, AttributeError, SyntaxError) as error:
            raise ModelMergeError(
                f"data set '{self.task.data}': item {self.ids[place]} is no image: {error}",
                hint="remove the item, or repair it",
            ) from error


@cache
def published() -> dict[str, Any]:
    """The papers' tasks, with the class names and prompts of CLIP's authors, and published accuracies.

    Names and prompts: https://github.com/openai/CLIP/blob/main/data/prompts.md; EuroSAT's are in its official order,
    SVHN's are MNIST's. Accuracies: FusionBench (https://arxiv.org/abs/2406.03280), its fine-tuned CLIP models.
    """
    return json.loads((Path(__file__).parent / "clip.json").read_bytes())


def groups() -> dict[str, tuple[str, ...]]:
    """Names that stand for several tasks."""
    told = published()["tasks"]
    corrupted = [f"{name}:{split}" for name, task in told.items() for split in task.get("corrupted", ())]
    return {"clip8": tuple(told), "clip8-ood": tuple(corrupted)}


def find_tasks(names: Sequence[str], *, held_out: bool = False) -> tuple[Task, ...]:
    """The published tasks of these names, each `NAME` or `NAME:SPLIT`, or a name that stands for several.

    With `held_out` those without a split are looked at on another than the one that is reported.

    Raises:
        UsageError: There is no such task, or one is named twice.
    """
    every = [part for name in names for part in groups().get(name, (name,))]
    twice = [name for name, count in Counter(every).items() if count > 1]
    if twice:
        raise UsageError(f"the task '{twice[0]}' is named twice")
    return tuple(_find_task(name, held_out=held_out) for name in every)


def _find_task(name: str, *, held_out: bool = False) -> Task:
    told = published()["tasks"]
    word, _, split = name.partition(":")
    known = {plain(key): key for key in told} | {plain(str(task["data"])): key for key, task in told.items()}
    found = known.get(plain(word))
    if found is None:
        listed = [*groups(), *told]
        near = get_close_matches(word.lower(), listed, n=1)
        raise UsageError(
            f"there is no task '{word}'",
            hint=(f"did you mean '{near[0]}'? " if near else "")
            + f"there are: {', '.join(listed)}; or your own: --data",
        )
    task = told[found]
    return Task(
        name=f"{found}:{split}" if split else found, data=task["data"], config=task.get("config"),
        split=split or (None if held_out else "test"), templates=tuple(task["templates"]),
        classes=tuple(task["classes"]), also=task.get("also"), published=True, held_out=held_out and not split,
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
        image: The column of images.
        label: The column of labels.
        held_out: Without a split: another than `test`, if there is one.

    Raises:
        UsageError: A template has no place for the class.
        ModelMergeError: The file of class names cannot be read.
    """
    left, equals, right = data.partition("=")
    held_out = held_out and split is None
    task = Task(name=left, data=right, config=config, split=split, image=image, label=label, held_out=held_out)
    if not equals or not re.fullmatch(r"[\w.\-]+", left) or os.path.lexists(Path(data).expanduser()):
        path = Path(data.partition("@")[0]).expanduser()
        task = replace(task, name=(path.resolve().stem if path.exists() else path.name) or "data", data=data)
    elif classes is None and plain(left) in map(plain, published()["tasks"]):
        known = _find_task(left)
        task = replace(
            task, name=known.name, templates=known.templates, classes=known.classes, also=known.also, published=True
        )  # fmt: skip
    if classes is not None:
        task = replace(task, classes=read_classes(Path(classes)))
    return with_templates(task, templates) if templates else task


def with_templates(task: Task, templates: Sequence[str]) -> Task:
    """The task, prompted in other words.

    Raises:
        UsageError: A template has no place for the class.
    """
    odd = next((text for text in templates if text.count("{}") != 1), None)
    if odd is not None:
        raise UsageError(f"--template '{odd}' must hold {{}} once, for the class", hint=f"as in '{TEMPLATE}'")
    return replace(task, templates=tuple(templates))


def read_classes(file: Path) -> tuple[str, ...] | dict[str, str]:
    """Class names out of a file: one in each line, or LABEL<tab>NAME; or a JSON list; or an object of labels to names.

    Raises:
        ModelMergeError: It cannot be read, or holds something else.
    """
    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelMergeError(f"--classes {file}: cannot be read: {getattr(error, 'strerror', error)}") from error
    told: Any = [line.strip() for line in text.splitlines() if line.strip()]
    if any("\t" in line for line in told):
        pairs = [line.partition("\t") for line in told]
        told = {label.strip(): (name or label).strip() for label, _, name in pairs}
        if len(told) < len(pairs):
            raise ModelMergeError(f"--classes {file}: a label is named twice")
    if text.lstrip().startswith(("[", "{")):
        try:
            told = json.loads(text)
        except ValueError as error:
            raise ModelMergeError(f"--classes {file}: not valid JSON: {error}") from error
    names = list(told.values()) if isinstance(told, dict) else told
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ModelMergeError(f"--classes {file}: no list of names", hint=f"one name in each line, or {_ORDER}")
    return told if isinstance(told, dict) else tuple(told)


def load(task: Task, *, limit: int | None = None, seed: int = 0, labelled: bool = True) -> Items:
    """The task's images and labels; with `limit`, so many of them, drawn at random.

    Without `labelled` every label is -1, and there need be none where the task has class names of its own.

    Raises:
        UsageError: The limit is no number of items.
        ModelMergeError: The data set cannot be read, is empty, or its labels and the class names do not go together.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: at least one item must be looked at")
    found, split, identity = _open(task)
    notes = [_told_of_split(task, split)] if task.held_out else []
    task = replace(task, split=split) if task.held_out else task
    where = f"data set '{task.data}'"
    if not len(found):
        raise ModelMergeError(f"{where}: it is empty", hint="name another data set, or another split: --split")
    if labelled or task.classes is None:
        found, image, label = _columns(task, found)
        named, own, labels = _labels(where, found, label, all_known=labelled)
        classes, told = name_classes(task, own, named=named)
        notes += told
    else:
        found, image = _image_column(task, found)
        classes = tuple(task.classes.values() if isinstance(task.classes, Mapping) else task.classes)
    if not labelled:
        labels = torch.full((len(found),), -1)
    absent = [] if not labelled else [classes[i] for i in sorted(set(range(len(classes))) - set(labels.tolist()))]
    if absent:
        notes.append(f"{where}: no item of {len(absent)} of its {len(classes)} classes: {_listed(absent)}")
    total = len(found)
    chosen = list(range(total))
    if limit is not None and limit < total:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
        chosen = sorted(drawn.tolist())
        found = found.select(chosen)
    return Items(
        task, found.select_columns([image]), labels[chosen], tuple(map(str, chosen)), classes, total, identity,
        tuple(notes),
    )  # fmt: skip


def _open(task: Task) -> tuple[Any, str | None, str]:
    """The split of the data set, its name where there are others, and what a cache knows it by."""
    import datasets

    path = Path(task.data).expanduser()
    local = path.exists() or task.data.startswith(("./", "../", "/", "~"))
    where = f"data set '{task.data}'"
    if local and not path.exists():
        raise ModelMergeError(f"{where}: no such file or directory")
    known = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, EOFError)
    try:
        with _quiet(datasets):
            if not local:
                return _from_hub(datasets, task)
            if path.is_file():
                found = datasets.load_dataset(
                    "parquet", data_files={task.split or ("all" if task.held_out else "test"): str(path)}
                )
            elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path.resolve()), task.config)
    except ModelMergeError:
        raise
    except known as error:
        if local and _is_empty(path):
            raise ModelMergeError(f"{where}: it is empty", hint="name another data set") from error
        raise ModelMergeError(
            f"{where}: it cannot be read: {_first_line(error.__cause__ or error)}",
            hint="it can be a folder of images with a folder for each class, a folder with parquet files, a parquet "
            "file, or org/name on the Hub",
        ) from error
    split = task.split
    if isinstance(found, datasets.DatasetDict):
        splits = list(found)
        split = _split(task, splits)
        return found[split], split if len(splits) > 1 else task.split, _identity(path)
    return found, split, _identity(path)


def _is_empty(path: Path) -> bool:
    """Whether a folder has no file in it, or a parquet file no row."""
    import pyarrow
    import pyarrow.parquet

    if path.is_dir():
        return not any(file.is_file() for file in path.rglob("*"))
    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except (OSError, pyarrow.ArrowInvalid):
        return False


def _from_hub(datasets: Any, task: Task) -> tuple[Any, str | None, str]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    name, _, revision = task.data.partition("@")
    commit = revision or None
    if not constants.is_offline_mode():
        try:
            commit = HfApi().dataset_info(name, revision=commit).sha
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            raise HubError(
                f"the Hub cannot be reached for data set '{name}': {error}",
                hint="check the connection, or name a local copy with --data; HF_HUB_OFFLINE=1 takes what is cached",
            ) from error
    splits = datasets.get_dataset_split_names(name, task.config, revision=commit)
    split = _split(task, splits)
    found = datasets.load_dataset(name, task.config, split=split, revision=commit)
    return found, split if len(splits) > 1 else task.split, f"{name}@{commit}:{task.config}"


def _split(task: Task, splits: Sequence[str]) -> str:
    """The split to take: the one asked for, else `test` or one that is held out, else the only one."""
    if task.split is None and len(splits) == 1 and not (task.held_out and splits[0] == "test"):
        return splits[0]
    if task.held_out:
        found = next((split for split in _HELD_OUT if split in splits), None)
        if found is None:
            raise ModelMergeError(
                f"data set '{task.data}' has no split to make choices on: it has {', '.join(splits)}, and none is for "
                "validation or training",
                hint="name a split, or other data",
            )
        return found
    wanted = task.split or "test"
    if wanted not in splits:
        raise ModelMergeError(
            f"data set '{task.data}' has no split '{wanted}'", hint=f"it has: {', '.join(splits)} (--split)"
        )
    return wanted


def _told_of_split(task: Task, split: str | None) -> str:
    """What to note of the split that was taken where another than the reported one was asked for."""
    where = f"data set '{task.data}'"
    if split is None:
        return f"{where}: all of it is looked at, as `eval` does; report on other items"
    trained = ", on which experts may have been trained" if split in ("train", "training") else ""
    return f"{where}: its split '{split}' is looked at{trained}"


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the bars of the library, which would stand between ours, and what it logs of errors that it raises."""
    shown, verbosity = not datasets.utils.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.utils.enable_progress_bars()


def _identity(path: Path) -> str:
    """Of local files: their names, sizes and times."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _columns(task: Task, found: Any) -> tuple[Any, str, str]:
    """The data set, its column of images, decoded, and its column of labels.

    Raises:
        ModelMergeError: There is none, or it is not clear which.
    """
    import datasets

    features = found.features
    named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    simple = [
        name for name, kind in features.items()
        if isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "string", "large_string"))
    ]  # fmt: skip
    where = f"data set '{task.data}'"
    label = _column(where, "label", task.label, named or simple, ("label", "labels"), list(features))
    return *_image_column(task, found), label


def _image_column(task: Task, found: Any) -> tuple[Any, str]:
    """The data set, and its column of images, decoded.

    Raises:
        ModelMergeError: There is none, or it is not clear which.
    """
    import datasets

    features = found.features
    where = f"data set '{task.data}'"
    # Parquet files that another tool wrote do not say what their columns are.
    pictures = [
        name for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})
    ]  # fmt: skip
    image = _column(where, "image", task.image, pictures, ("image", "img"), list(features))
    if not isinstance(features[image], datasets.Image):
        found = found.cast_column(image, datasets.Image())
    return found, image


def _column(
    where: str, kind: str, asked: str | None, fitting: Sequence[str], usual: Sequence[str], every: Sequence[str]
) -> str:
    wanted = [asked] if asked else [name for name in usual if name in fitting] or list(fitting)
    if (asked and asked not in every) or len(wanted) != 1:
        what = f"no column '{asked}'" if asked else f"{'no' if not wanted else 'more than one'} column of {kind}s"
        raise ModelMergeError(f"{where}: {what}", hint=f"its columns: {', '.join(every)}; name it: --{kind}-column")
    return wanted[0]


def _labels(where: str, found: Any, column: str, *, all_known: bool = True) -> tuple[bool, list[str], Tensor]:
    """Whether labels have names, the names (or numbers), and each item's place among them [N].

    Unless they must be `all_known`, a column that names its labels may lack those of items.
    """
    kind = found.features[column]
    if not all_known and hasattr(kind, "names"):
        return True, [str(name) for name in kind.names], torch.full((len(found),), -1)
    values = list(found[column])
    if any(value is None or value == -1 for value in values):
        place = next(i for i, value in enumerate(values) if value is None or value == -1)
        raise ModelMergeError(f"{where}: item {place} has no label", hint="take a split that is labelled: --split")
    if hasattr(kind, "names"):
        names = [str(name) for name in kind.names]
        return True, names, torch.tensor(values)
    if isinstance(values[0], str):
        names = sorted(set(values))
        places = {name: i for i, name in enumerate(names)}
        return True, names, torch.tensor([places[value] for value in values])
    if not isinstance(values[0], int) or min(values) < 0:
        raise ModelMergeError(f"{where}: column '{column}' holds {values[0]!r}, which is no label")
    return False, [str(i) for i in range(max(values) + 1)], torch.tensor(values)


def name_classes(task: Task, own: Sequence[str], *, named: bool) -> tuple[tuple[str, ...], list[str]]:
    """How the classes are prompted, by label; `own` are the data set's names for them, or numbers. And what to note.

    Raises:
        ModelMergeError: The class names that are given, or published, are not those of the data set.
    """
    where = f"data set '{task.data}'"
    if task.classes is None:
        if not named:
            raise ModelMergeError(f"{where}: its labels are numbers without names", hint="name them: --classes FILE")
        return tuple(map(_spaced, own)), []
    both = f"{where} and the file of --classes"
    if isinstance(task.classes, Mapping):
        keys = list(task.classes)
        order = match(own, keys, both, ("the data set", "the file"), hint=_ORDER)
        return tuple(task.classes[keys[i]] for i in order), []
    given = task.classes
    if not named and len(own) < len(given):  # the highest numbers may be absent
        own = [str(i) for i in range(len(given))]
    if all(name.isdigit() for name in own) and not _all_in(own, given):
        places = [int(name) for name in own]
        if sorted(places) != list(range(len(given))):
            raise ModelMergeError(
                f"{where}: its labels are {len(own)} numbers from {min(places)} to {max(places)}, and there are "
                f"{len(given)} class names",
                hint=_ORDER,
            )
        note = f"{where}: its labels are numbers, which are taken for places in the list of class names"
        return tuple(given[place] for place in places), [note]
    if task.published:
        return _published_names(task, own)
    order = match(own, given, both, ("the data set", "the file"), hint=_ORDER)
    return tuple(given[i] for i in order), []


def _spaced(name: str) -> str:
    return name.replace("_", " ").strip()


def _all_in(names: Sequence[str], others: Sequence[str]) -> bool:
    return {plain(name) for name in names} <= {plain(name) for name in others}


def _published_names(task: Task, own: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The published spelling of a data set's names; where it has one of its own, that, and a note."""
    assert isinstance(task.classes, tuple)
    where = f"data set '{task.data}'"
    if len(own) != len(task.classes):
        raise ModelMergeError(
            f"{where}: it has {len(own)} classes, and the task '{task.head}' has {len(task.classes)}",
            hint="name it as one of your own: --data, with --classes",
        )
    known = {plain(name): name for name in task.classes}
    known |= {plain(other): name for other, name in (task.also or {}).items()}
    found = [known.get(plain(name), _spaced(name)) for name in own]
    odd = [name for name in own if plain(name) not in known]
    if len(set(found)) != len(found):
        twice = Counter(found).most_common(1)[0][0]
        raise ModelMergeError(f"{where}: two of its classes are called '{twice}'")
    notes = [f"{where}: prompted by its own names, which are not the published ones: {_listed(odd)}"] if odd else []
    return tuple(found), notes


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
        told = [f"only {side} has {_listed(odd)}" for side, odd in zip(sides, (lacking, beyond), strict=True) if odd]
        raise ModelMergeError(f"{where} have different classes: {'; '.join(told)}", hint=hint)
    places = {key: i for i, key in enumerate(theirs)}
    return [places[key] for key in ours]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_FEW])
    return f"{shown} and {len(names) - _FEW} more" if len(names) > _FEW else shown


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
