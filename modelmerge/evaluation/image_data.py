"""Images with labels to classify, out of a folder, parquet files, or a data set on the Hub.

A label means what its data set calls it. Class names are matched by their words, never by their place in a list; only
a label that is a bare number is taken for a place, in the list that the user gives or that its task is published with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.errors import HubError, ModelMergeError, UsageError, named
from modelmerge.evaluation.image_tasks import Task, name_classes
from modelmerge.evaluation.scores import listing

# Splits that choices can be made on without spoiling what is reported, the best first.
_HELD_OUT = ("validation", "val", "valid", "dev", "train", "training")
_FOLDER = "imagefolder"  # the library's name for folders of images
_LAYOUTS = (
    "a folder of images is read as CLASS/IMAGE or SPLIT/CLASS/IMAGE, or with a metadata.csv of file_name and label; a "
    "split can also be part of the images' names, a class cannot, and lists of files are not read"
)


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


def load(task: Task, *, limit: int | None = None, seed: int = 0, with_labels: bool = True) -> Items:
    """The task's images and labels; with `limit`, so many of them, drawn at random.

    Without `with_labels` every label is -1, and there need be none where the task has class names of its own.

    Raises:
        UsageError: The limit is no number of items.
        ModelMergeError: The data set cannot be read, is empty, or its labels and the class names do not go together.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"must be at least 1, not {limit}", option="limit")
    rows, split, identity = _open(task)
    notes = [_split_note(task, split)] if task.held_out else []
    notes += _named_splits(task, rows)
    task = replace(task, split=split) if task.held_out else task
    where = f"data set '{task.data}'"
    if not len(rows):
        raise ModelMergeError(f"{where}: it is empty", hint="name another data set, or another split")
    rows, image = _image_column(task, rows)
    if with_labels or task.classes is None:
        are_names, names, labels = _labels(where, rows, _label_column(task, rows), of_all=with_labels)
        classes, remarks = name_classes(task, names, are_names=are_names)
        notes += remarks
    else:
        classes = tuple(task.classes.values() if isinstance(task.classes, Mapping) else task.classes)
    if not with_labels:
        labels = torch.full((len(rows),), -1)
    absent = [] if not with_labels else [classes[i] for i in sorted(set(range(len(classes))) - set(labels.tolist()))]
    if absent:
        notes.append(f"{where}: no item of {len(absent)} of its {len(classes)} classes: {listing(absent)}")
    total = len(rows)
    places = list(range(total))
    if limit is not None and limit < total:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        places = sorted(order[:limit].tolist())
        rows = rows.select(places)
    return Items(
        task, rows.select_columns([image]), labels[places], tuple(map(str, places)), classes, total, identity,
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
    failures = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, EOFError)
    try:
        with _quiet(datasets):
            if not local:
                return _from_hub(datasets, task)
            if path.is_file():
                split = task.split or ("all" if task.held_out else "test")
                data = datasets.load_dataset("parquet", data_files={split: str(path)})
            elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                data = datasets.load_from_disk(str(path))
            else:
                data = datasets.load_dataset(str(path.resolve()), task.config)
    except ModelMergeError:
        raise
    except failures as error:
        if local and _is_empty(path):
            raise ModelMergeError(f"{where}: it is empty", hint="name another data set") from error
        raise ModelMergeError(
            f"{where}: it cannot be read: {_first_line(error.__cause__ or error)}",
            hint="it can be a folder of images with a folder for each class, a folder with parquet files, a parquet "
            "file, or org/name on the Hub",
        ) from error
    if isinstance(data, datasets.DatasetDict):
        split = _split(task, list(data))
        return data[split], split if len(data) > 1 else task.split, _identity(path)
    return data, task.split, _identity(path)


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
            hint = "check the connection, or name a local copy; HF_HUB_OFFLINE=1 takes what is cached"
            raise HubError(f"the Hub cannot be reached for data set '{name}': {error}", hint=hint) from error
    splits = datasets.get_dataset_split_names(name, task.config, revision=commit)
    split = _split(task, splits)
    data = datasets.load_dataset(name, task.config, split=split, revision=commit)
    return data, split if len(splits) > 1 else task.split, f"{name}@{commit}:{task.config}"


def _split(task: Task, splits: Sequence[str]) -> str:
    """The split to take: the one asked for, else `test` or one that is held out, else the only one."""
    if task.split is None and len(splits) == 1 and not (task.held_out and splits[0] == "test"):
        return splits[0]
    if task.held_out:
        split = next((name for name in _HELD_OUT if name in splits), None)
        if split is None:
            raise ModelMergeError(
                f"data set '{task.data}' has no split to make choices on: it has {', '.join(splits)}, and none is for "
                "validation or training",
                hint="name a split, or other data",
            )
        return split
    split = task.split or "test"
    if split not in splits:
        raise ModelMergeError(f"data set '{task.data}' has no split '{split}'", hint=f"it has: {', '.join(splits)}")
    return split


def _split_note(task: Task, split: str | None) -> str:
    """The note on which split is looked at, where it is not the one that is reported."""
    where = f"data set '{task.data}'"
    if split is None:
        return f"{where}: all of it is looked at, as `eval` does; report on other items"
    caution = ", on which experts may have been trained" if split in ("train", "training") else ""
    return f"{where}: its split '{split}' is looked at{caution}"


def _named_splits(task: Task, rows: Any) -> list[str]:
    """The note on a folder of images whose splits follow from the names of files, not of folders."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    path = Path(task.data).expanduser()
    if not path.is_dir() or rows.info.builder_name != _FOLDER:
        return []
    words = {word for folder in path.rglob("*") if folder.is_dir() for word in re.split("[^a-z]+", folder.name.lower())}
    total = sum(file.suffix.lower() in ImageFolder.EXTENSIONS for file in path.rglob("*"))
    if len(rows) == total or words & {*_HELD_OUT, "test", "testing", "eval", "evaluation"}:
        return []
    return [
        f"data set '{task.data}': split by the names of its files: {len(rows)} of its {total} images are '{rows.split}'"
    ]


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the bars of the library, which would stand between ours, and what it logs of errors that it raises."""
    bars, verbosity = not datasets.utils.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.utils.enable_progress_bars()


def _identity(path: Path) -> str:
    """Of local files: their names, sizes and times."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _label_column(task: Task, rows: Any) -> str:
    """The data set's column of labels.

    Raises:
        ModelMergeError: There is none, or it is not clear which.
    """
    import datasets

    features = rows.features
    with_names = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    simple = [
        name for name, kind in features.items()
        if isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "string", "large_string"))
    ]  # fmt: skip
    return _column(task, "label", task.label, with_names or simple, ("label", "labels"), rows)


def _image_column(task: Task, rows: Any) -> tuple[Any, str]:
    """The data set, and its column of images, decoded.

    Raises:
        ModelMergeError: There is none, or it is not clear which.
    """
    import datasets

    features = rows.features
    # Parquet files that another tool wrote do not say what their columns are.
    pictures = [
        name for name, kind in features.items()
        if isinstance(kind, datasets.Image) or (isinstance(kind, dict) and kind.keys() == {"bytes", "path"})
    ]  # fmt: skip
    image = _column(task, "image", task.image, pictures, ("image", "img"), rows)
    if not isinstance(features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image())
    return rows, image


def _column(task: Task, kind: str, request: str | None, fitting: Sequence[str], usual: Sequence[str], rows: Any) -> str:
    every = list(rows.features)
    names = [request] if request else [name for name in usual if name in fitting] or list(fitting)
    if (request and request not in every) or len(names) != 1:
        what = f"no column '{request}'" if request else f"{'no' if not names else 'more than one'} column of {kind}s"
        hint = f"its columns: {', '.join(every)}; name it: {named(f'{kind}_column')}"
        if not fitting and rows.info.builder_name in (_FOLDER, "text") and Path(task.data).expanduser().is_dir():
            hint = _LAYOUTS
        raise ModelMergeError(f"data set '{task.data}': {what}", hint=hint)
    return names[0]


def _labels(where: str, rows: Any, column: str, *, of_all: bool = True) -> tuple[bool, list[str], Tensor]:
    """Whether labels have names, the names (or numbers), and each item's place among them [N].

    Unless they must be there `of_all`, a column that names its labels may lack those of items.
    """
    kind = rows.features[column]
    if not of_all and hasattr(kind, "names"):
        return True, [str(name) for name in kind.names], torch.full((len(rows),), -1)
    values = list(rows[column])
    if any(value is None or value == -1 for value in values):
        place = next(i for i, value in enumerate(values) if value is None or value == -1)
        raise ModelMergeError(f"{where}: item {place} has no label", hint="take a split that is labelled")
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
