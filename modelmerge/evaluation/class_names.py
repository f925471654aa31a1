"""Names of classes: those of a data set, of a file and of a publication, matched by their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from modelmerge.errors import ModelMergeError
from modelmerge.evaluation.image_tasks import ORDER, Task
from modelmerge.evaluation.scores import plain

_FEW = 6  # names that an error lists


def name_classes(task: Task, labels: Sequence[str], *, are_names: bool) -> tuple[tuple[str, ...], list[str]]:
    """How the classes are prompted, by label, and notes for the reader; `labels` are the data set's names or numbers.

    Raises:
        ModelMergeError: The class names that are given, or published, are not those of the data set.
    """
    where = f"data set '{task.data}'"
    if task.classes is None:
        if not are_names:
            raise ModelMergeError(f"{where}: its labels are numbers without names", hint="name them: --classes FILE")
        return tuple(map(_with_spaces, labels)), []
    both = f"{where} and the file of --classes"
    if isinstance(task.classes, Mapping):
        keys = list(task.classes)
        order = match(labels, keys, both, ("the data set", "the file"), hint=ORDER)
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
                hint=ORDER,
            )
        note = f"{where}: its labels are numbers, which are taken for places in the list of class names"
        return tuple(names[place] for place in places), [note]
    if task.is_published:
        return _published_names(task, labels)
    order = match(labels, names, both, ("the data set", "the file"), hint=ORDER)
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
            hint="name it as one of your own: --data, with --classes",
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


def listing(names: Sequence[str]) -> str:
    """The first few of the names, in quotes."""
    text = ", ".join(f"'{name}'" for name in names[:_FEW])
    return f"{text} and {len(names) - _FEW} more" if len(names) > _FEW else text
