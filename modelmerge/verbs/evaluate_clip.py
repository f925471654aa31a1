"""evaluate, suite clip: models as zero-shot classifiers of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import Reference, parse_all
from modelmerge.engine.parallel import prepare_process
from modelmerge.errors import UsageError
from modelmerge.evaluation import clip, images
from modelmerge.evaluation.bench import Bench, base_name, merged_from, normalise_by_published, run
from modelmerge.evaluation.images import Items, Task
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.scores import Score, plain
from modelmerge.progress import SILENT, Reporter

_PACKAGES = ("transformers", "datasets", "pillow")


def evaluate_clip(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    tasks: Sequence[str] = (),
    data: Sequence[str | Path] | Mapping[str, str | Path] = (),
    classes: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = (),
    templates: Sequence[str] = (),
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    held_out: bool = False,
    heads: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    base: str | Path | None = None,
    experts: Sequence[str | Path] | Mapping[str, str | Path] = (),
    seed: int = 0,
    cache: bool = True,
    compare: str | Path | None = None,
    fail_under: Sequence[str] = (),
    update_card: bool = False,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """The accuracy of CLIP models as zero-shot classifiers of images.

    Each model's text head is made with its own text tower; a vision tower alone, or an adapter, is completed by the
    base. Classes are matched by their names, never by their places.

    Args:
        models: References of the models to evaluate, `[NAME=]REF` each, or a mapping of name to reference.
        tasks: Published tasks, `NAME` or `NAME:SPLIT`, `clip8` for the papers' eight, `clip8-ood` for corrupted ones.
        data: Data of one's own, `[NAME=]DATA` each, or a mapping: a folder of images with a folder for each class,
            parquet files, or a data set on the Hub. One named as a published task has its classes and prompts.
        classes: Files of class names for `data`, `[NAME=]FILE` each, or a mapping; see
            `modelmerge.evaluation.images.read_classes`. One without a name is for all.
        templates: Prompts with `{}` for the class, for all tasks; their embeddings are averaged.
        config: Of data sets in `data` that have several.
        split: Of `data`; by default `test`, or the only one.
        image_column: Of `data`, where it is not clear.
        label_column: Of `data`, where it is not clear.
        held_out: Where no split is named, look at the validation split, or else the training split: to choose by.
        heads: A folder of text heads, `TASK.safetensors` each, used where they are there and written where not.
        limit: Look at so many images of each task, drawn with the seed.
        batch_size: Images at a time.
        base: A whole CLIP model with tokenizer and image processor, to be evaluated too. Where a model is not whole and
            it is not given, nor `heads`, a merge's own `modelmerge.json` names it.
        experts: The experts, to be evaluated too; a task's scores are normalised by the expert of its name.
        seed: Of the images that `limit` draws.
        cache: Do not measure again what was measured before.
        compare: An earlier report, as a file: differences to it, with their significance.
        fail_under: Least values, `avg=0.70`, `normalized=0.95` or `TASK=0.8`; whether they are met is in `gate`.
        update_card: Write the accuracies into each model's card; they must be directories here.
        device: Where the models run: cpu, cuda, cuda:N or auto.
        reporter: Is told the progress.

    Returns:
        As `evaluate_custom`, and: `data`, what each task is; for each model that is known to be a merge, `unseen`, the
        tasks that none of its experts is for; where the experts' published accuracies are known and the experts were
        not measured, `published` and each model's `normalised_by_published`.

    Raises:
        ModelMergeError: The extra is not installed; a model is no CLIP model; images, labels or class names do not go
            together; see `modelmerge.errors` for other kinds.
    """
    clip.require_extra()
    prepare_process()
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    own = {"config": config, "split": split, "image": image_column, "label": label_column}
    files = as_references([classes] if isinstance(classes, str | Path) else classes)
    told = {key: value for key, value in own.items() if value is not None}
    found = find_tasks(tasks, as_references(data), files, templates, told, held_out)
    loaded = {task.name: images.load(task, limit=limit, seed=seed) for task in found}
    folder = Path(heads).expanduser() if heads is not None else None
    base = base if base is not None or folder is not None else _base_of(parse_all(as_references(models), "model"))
    names = {task.name: _expert_of(task, as_references(experts)) for task in found}
    bench = Bench(
        suite="clip",
        about={"data": {name: _described(items) for name, items in loaded.items()}, "limit": limit,
               "heads": None if folder is None else str(folder)},
        tasks=tuple(loaded), depends=lambda task: _depends(loaded[str(task)], limit, folder),
        measure=_Measurer(loaded, folder, batch_size, reporter), onto_base=base is not None,
        items=lambda task: len(loaded[str(task)].ids),
        experts={task: expert for task, expert in names.items() if expert is not None},
        versions={package: _version(package) for package in _PACKAGES},
    )  # fmt: skip
    # A head that is asked for is made, though its scores be known.
    kept = folder is None or all((folder / f"{task.head}.safetensors").exists() for task in found)
    report = run(
        bench, models, base, experts, seed=seed, cache=cache and kept, compare=compare, fail_under=fail_under,
        update_card=update_card, device=device, reporter=reporter,
    )  # fmt: skip
    report["notes"] = [*(note for items in loaded.values() for note in items.notes), *report["notes"]]
    _mark_unseen(report, found)
    _normalise_by_published(report, found)
    return report


def find_tasks(
    names: Sequence[str],
    data: Sequence[str],
    files: Sequence[str],
    templates: Sequence[str],
    own: Mapping[str, Any],
    held_out: bool = False,
) -> tuple[Task, ...]:
    """The published tasks and those of one's own.

    Raises:
        UsageError: There is none, two have one name, or an option has no effect.
    """
    if not names and not data:
        raise UsageError(
            "no task is named",
            hint=f"--task NAME ({', '.join([*images.groups(), *images.published()['tasks']])}), or --data DIR",
        )
    if files and not data:
        raise UsageError("--classes has no effect without --data")
    if own and not data:
        flag = {"image": "image-column", "label": "label-column"}.get(next(iter(own)), next(iter(own)))
        raise UsageError(f"--{flag} has no effect without --data")
    known = images.find_tasks(names, held_out=held_out)
    found = [images.with_templates(task, templates) if templates else task for task in known]
    own = {**own, "templates": templates, "held_out": held_out}
    by_name = dict(map(_named_file, files))
    for text in data:
        task = images.own_task(text, **own)
        file = by_name.get(task.name, by_name.get(""))
        found.append(images.own_task(text, classes=file, **own) if file is not None else task)
    odd = next((name for name in by_name if name and name not in [task.name for task in found]), None)
    if odd is not None:
        raise UsageError(
            f"--classes names '{odd}', which is no data", hint=f"there are: {', '.join(task.name for task in found)}"
        )
    twice = next((task.name for i, task in enumerate(found) if task.name in [t.name for t in found[:i]]), None)
    if twice is not None:
        raise UsageError(f"two tasks are called '{twice}'", hint="name them apart: --data NAME=DATA")
    return tuple(found)


def _named_file(text: str) -> tuple[str, Path]:
    """`[NAME=]FILE` as a name, empty if there is none, and a path."""
    name, equals, file = text.partition("=")
    return (name, Path(file)) if equals and not Path(text).expanduser().exists() else ("", Path(text))


def _described(items: Items) -> dict[str, Any]:
    """What the report says of a task's data."""
    task = items.task
    return {
        "data": task.data, "config": task.config, "split": task.split, "identity": items.identity,
        "classes": list(items.classes), "templates": list(task.templates), "images": items.total,
    }  # fmt: skip


def _depends(items: Items, limit: int | None, folder: Path | None) -> dict[str, Any]:
    """What a model's score depends on besides the model and the seed."""
    kept = folder / f"{items.task.head}.safetensors" if folder is not None else None
    label = [items.task.image, items.task.label]
    told = {key: value for key, value in _described(items).items() if key != "data"}  # which `identity` stands for
    return told | {
        "limit": limit, "columns": label, "head": sha256(kept) if kept is not None and kept.exists() else None,
    }  # fmt: skip


def _base_of(models: Sequence[Reference]) -> str | None:
    """The base that the models' manifests name, where one of the models is not a whole CLIP; None if none does.

    Raises:
        UsageError: They name several.
    """
    if all(open_checkpoint(model).tensors.keys() >= {clip.TEXT_PROJECTION} for model in models):
        return None
    named = {merged_from({"path": model.path})["base"] for model in models if merged_from({"path": model.path})}
    if len(named) > 1:
        raise UsageError("the models are merges of different bases", hint="name the CLIP model: --base REF")
    return next(iter(named), None)


class _Measurer:
    """Measures a model at a task; what a model's tasks share is read once, for one model at a time."""

    def __init__(self, loaded: Mapping[str, Items], folder: Path | None, batch: int, reporter: Reporter) -> None:
        self._loaded, self._folder, self._batch, self._reporter = loaded, folder, batch, reporter
        self._model: Model | None = None
        self._read: tuple[clip.Parts, str, clip.Tower] | None = None

    def __call__(self, model: Model, task: str | None) -> dict[str, Score]:
        if self._model is not model or self._read is None:
            parts = parts_of(model)
            self._read = parts, clip.text_digest(parts) if parts.has_text else "", clip.read_tower(parts)
            self._model = model
        items, (parts, digest, tower) = self._loaded[str(task)], self._read
        head = clip.find_head(items.task, items.classes, parts, self._folder, digest)
        made = clip.classifier(tower, head, model.device)
        return {str(task): clip.measure(made, head, items, model.name, batch=self._batch, reporter=self._reporter)}


def parts_of(model: Model) -> clip.Parts:
    """A model, and what lies beside it; beside the base, where it is seen by the base's names."""
    place = model.path if model.base_path is None else model.base_path
    directory = place if place.is_dir() else None
    config = directory / "config.json" if directory is not None else None
    told = json.loads(config.read_bytes()) if config is not None and config.exists() else {}
    return clip.Parts(name=model.name, tensors=model, config=told, directory=directory)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _expert_of(task: Task, experts: Sequence[str]) -> str | None:
    """The expert for a task: of its name, or with its name at the end, as in `clip-vit-base-patch32_sun397`."""
    names = [_name_of(text) for text in experts]
    return next((name for name in names if is_for(task, name)), None)


def is_for(task: Task, expert: str) -> bool:
    """Whether an expert is for a task: of its name, or with its name at the end."""
    return f" {plain(expert)}".endswith(f" {plain(task.head)}")


def _name_of(text: str) -> str:
    name, equals, _ = text.partition("=")
    return name if equals else Path(text.partition("@")[0]).name


def _mark_unseen(report: dict[str, Any], tasks: Sequence[Task]) -> None:
    """Add to each merge the tasks that none of its experts is for, and say how it does there."""
    for row in report["models"]:
        names = merged_from(row).get("experts")
        if row["role"] != "model" or not names:
            continue
        row["unseen"] = [task.name for task in tasks if not any(is_for(task, name) for name in names)]
        seen = [task.name for task in tasks if task.name not in row["unseen"]]
        if row["unseen"] and seen:
            means = [sum(row["scores"][t]["score"] for t in some) / len(some) for some in (seen, row["unseen"])]
            row["average_seen"], row["average_unseen"] = means
            report["notes"].append(
                f"'{row['name']}' has {means[0]:.1%} on the tasks of its experts, and {means[1]:.1%} on those it has "
                f"not seen: {', '.join(row['unseen'])}"
            )


def _normalise_by_published(report: dict[str, Any], tasks: Sequence[Task]) -> None:
    """Where no expert was measured: accuracies by those published for the experts of the same base."""
    known = images.published()["published"]
    usual = [task for task in tasks if task.published and task.split in (None, "test") and not task.held_out]
    for row in (row for row in report["models"] if row["role"] == "model"):
        base = base_name(report, row)
        if base not in known or any(row["scores"][t.name]["normalised"] is not None for t in tasks) or not usual:
            continue
        shares = {t.name: row["scores"][t.name]["score"] / known[base]["experts"][t.head] for t in usual}
        normalise_by_published(
            report, row, shares, of="accuracy published for the experts", known={"model": base, **known[base]}
        )
