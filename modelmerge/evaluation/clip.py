"""Zero-shot image classification with CLIP, on the papers' eight data sets or any images of your own.

A class's text embedding is the mean of those of its prompts, each of length one, brought to length one itself (Radford
et al. 2021, https://arxiv.org/abs/2103.00020). All classes' embeddings are the text head. Experts that were fine-tuned
with a frozen text tower share the base's, and may be the vision tower alone: a head holds what else it takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.digest import sha256
from modelmerge.checkpoint.opening import as_references, open_model
from modelmerge.checkpoint.reference import Reference, parse_all
from modelmerge.engine.parallel import prepare_process
from modelmerge.errors import CheckpointError, UsageError, named
from modelmerge.evaluation import clip_models, image_data
from modelmerge.evaluation.bench import Bench, Models, Running, merge_inputs, normalise_by_published, require, run
from modelmerge.evaluation.clip_models import Classifier, Head, Parts, Tower
from modelmerge.evaluation.image_data import Items
from modelmerge.evaluation.image_tasks import Task, find_tasks, publication
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.report import Report
from modelmerge.evaluation.scores import Score, plain, read_score
from modelmerge.progress import SILENT, Reporter

_PACKAGES = ("transformers", "datasets", "pillow")
_THREADS = 8  # that decode and resize images


def require_extra(what: str = "eval clip") -> None:
    """Refuse to begin without the libraries for images, which `what` needs.

    Raises:
        ModelMergeError: One is not installed.
    """
    require(what, '"datasets>=4" "transformers>=5" pillow', "datasets", "PIL.Image", "transformers")


def evaluate(
    models: Models,
    running: Running,
    *,
    tasks: Sequence[str] = (),
    data: Models = (),
    classes: str | Path | Models = (),
    templates: Sequence[str] = (),
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    held_out: bool = False,
    heads: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> Report:
    """The accuracy of CLIP models as zero-shot classifiers of images.

    Each model's text head is made with its own text tower; a vision tower alone, or an adapter, is completed by the
    base. Classes are matched by their names, never by their places.

    Args:
        models: References of the models.
        running: What all suites share. The base is a whole CLIP model with tokenizer and image processor; where a model
            is not whole and neither it nor `heads` is named, a merge's own `modelmerge.json` names it. The seed (0)
            draws the images of `limit`.
        tasks: Published tasks, `NAME` or `NAME:SPLIT`, `clip8` for the papers' eight, `clip8-ood` for corrupted ones.
        data: Data of one's own, `[NAME=]DATA` each, or a mapping: a folder of images with a folder for each class,
            parquet files, or a data set on the Hub. One named as a published task has its classes and prompts.
        classes: Files of class names for `data`, `[NAME=]FILE` each, or a mapping; see
            `modelmerge.evaluation.image_tasks.read_classes`. One without a name is for all.
        templates: Prompts with `{}` for the class, for all tasks; their embeddings are averaged.
        config: Of data sets in `data` that have several.
        split: Of `data`; by default `test`, or the only one.
        image_column: Of `data`, where it is not clear.
        label_column: Of `data`, where it is not clear.
        held_out: Where no split is named, look at the validation split, or else the training split: to choose by.
        heads: A folder of text heads, `TASK.safetensors` each, used where they are there and written where not.
        limit: Look at so many images of each task, drawn with the seed.
        batch_size: Images at a time.

    Returns:
        The report, with `data`, what each task is. For each model that is a merge, `unseen`: the tasks that none of its
        experts is for. Where the experts' accuracies are published and were not measured, `published` and each model's
        `normalised_by_published`.

    Raises:
        ModelMergeError: A library is not installed; a model is no CLIP model; images, labels or class names do not go
            together; see `modelmerge.errors` for other kinds.
    """
    require_extra()
    prepare_process()
    if batch_size < 1:
        raise UsageError(f"must be at least 1, not {batch_size}", option="batch_size")
    columns = {"config": config, "split": split, "image": image_column, "label": label_column}
    files = map(str, as_references([classes] if isinstance(classes, str | Path) else classes))
    places = map(str, as_references(data))
    choice = find_tasks(
        tasks, [*places], [*files], templates, {k: v for k, v in columns.items() if v is not None}, held_out
    )
    seed, base = running.seed or 0, running.base
    items = {task.name: image_data.load(task, limit=limit, seed=seed) for task in choice}
    folder = Path(heads).expanduser() if heads is not None else None
    if base is None and folder is None:
        base = _base_of(parse_all(as_references(models), "model"))
    names = [expert.name for expert in parse_all(as_references(running.experts), "expert")]
    fitting = {task.name: [name for name in names if is_for(task, name)] for task in choice}

    def measure_at(ready: tuple[Model, Parts, str, Tower], task: str | None) -> dict[str, Score]:
        (model, parts, digest, tower), data = ready, items[str(task)]
        head = clip_models.find_head(data.task, data.classes, parts, folder, digest)
        network = clip_models.classifier(tower, head, model.device)
        return {str(task): measure(network, head, data, model.name, batch=batch_size, progress=running.progress)}

    bench = Bench(
        suite="clip",
        about={"data": {name: _data_entry(each) for name, each in items.items()}, "limit": limit,
               "heads": None if folder is None else str(folder)},
        tasks=tuple(items), depends=lambda task: _depends(items[str(task)], limit, folder),
        open=lambda model: (model, *clip_models.open_parts(model)), measure=measure_at, onto_base=base is not None,
        items=lambda task: len(items[str(task)].ids),
        experts={task: some[0] for task, some in fitting.items() if some},
        packages=_PACKAGES,
    )  # fmt: skip
    # A head that is asked for is made, though its scores be in the cache.
    complete = folder is None or all((folder / f"{task.head}.safetensors").exists() for task in choice)
    report = run(bench, models, replace(running, base=base, seed=seed, cache=running.cache and complete))
    report["notes"] = [*(note for each in items.values() for note in each.notes), *report["notes"]]
    _mark_unseen(report, choice)
    # All tasks must be without a measured expert; those with usual splits alone are published.
    if not any(row["scores"][t.name]["normalised"] is not None for row in report["models"] for t in choice):
        usual = [task for task in choice if task.is_published and task.split in (None, "test") and not task.held_out]
        normalise_by_published(
            report, publication()["published"], {task.name: task.head for task in usual}, what="accuracy"
        )
    return report


def _data_entry(items: Items) -> dict[str, Any]:
    """What the report says of a task's data."""
    task = items.task
    return {
        "data": task.data, "config": task.config, "split": task.split, "identity": items.identity,
        "classes": list(items.classes), "templates": list(task.templates), "images": items.total,
    }  # fmt: skip


def _depends(items: Items, limit: int | None, folder: Path | None) -> dict[str, Any]:
    """What a model's score depends on besides the model and the seed."""
    head = folder / f"{items.task.head}.safetensors" if folder is not None else None
    entry = {key: value for key, value in _data_entry(items).items() if key != "data"}  # which `identity` stands for
    return entry | {
        "limit": limit, "columns": [items.task.image, items.task.label],
        "head": sha256(head) if head is not None and head.exists() else None,
    }  # fmt: skip


def _base_of(models: Sequence[Reference]) -> str | None:
    """The base that the models' manifests name, where one of the models is not a whole CLIP; None if none does.

    Raises:
        UsageError: They name several.
    """
    if all(open_model(model).tensors.keys() >= {clip_models.TEXT_PROJECTION} for model in models):
        return None
    bases = {inputs["base"] for model in models if (inputs := merge_inputs(model.path))}
    if len(bases) > 1:
        raise UsageError("the models are merges of different bases", hint=f"name the CLIP model: {named('base')} REF")
    return next(iter(bases), None)


def is_for(task: Task, expert: str) -> bool:
    """Whether an expert is for a task: of its name, or with that at the end, as `clip-vit-base-patch32_sun397`."""
    return f" {plain(expert)}".endswith(f" {plain(task.head)}")


def _mark_unseen(report: Report, tasks: Sequence[Task]) -> None:
    """Add to each merge the tasks that none of its experts is for, and say how it does there."""
    for row in report["models"]:
        experts = merge_inputs(row["path"]).get("experts")
        if row["role"] != "model" or not experts:
            continue
        new = [task.name for task in tasks if not any(is_for(task, name) for name in experts)]
        old = [task.name for task in tasks if task.name not in new]
        row["unseen"] = new
        if new and old:
            at_old, at_new = (sum(row["scores"][t]["score"] or 0.0 for t in some) / len(some) for some in (old, new))
            row["average_seen"], row["average_unseen"] = at_old, at_new
            report["notes"].append(
                f"'{row['name']}' has {at_old:.1%} on the tasks of its experts, and {at_new:.1%} on those it has "
                f"not seen: {', '.join(new)}"
            )


def measure(
    model: Classifier, head: Head, items: Items, name: str, *, batch: int, progress: Reporter = SILENT
) -> Score:
    """The accuracy of a classifier: 1 or 0 for each item.

    Raises:
        ModelMergeError: An image cannot be decoded, or the model gives NaN or Inf for it.
    """
    device = model.weight.device
    hits: list[float] = []
    for pixels, labels in batches(items, head, batch):
        with torch.inference_mode():
            logits = model(pixels.to(device)).cpu()
        if not bool(logits.isfinite().all()):
            raise CheckpointError(f"'{name}' gives NaN or Inf on '{items.task.name}'", hint="are its weights damaged?")
        hits += (logits.argmax(dim=-1) == labels).float().tolist()
        progress.advance(len(labels), f"{name} {items.task.name}")
    return read_score({"items": hits, "ids": items.ids, "metric": "accuracy"}, f"'{name}' on '{items.task.name}'")


def batches(
    items: Items, head: Head, size: int, order: Iterable[Sequence[int]] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels [N, 3, height, width] and labels [N], so many items at a time; the next being made meanwhile.

    With an `order`, which may have no end, the items of each batch are those at its places.

    Raises:
        ModelMergeError: An image cannot be decoded.
    """
    import transformers

    # Pillow's resampling, which CLIP was trained with, wherever torchvision is installed or not.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind.from_dict(dict(head.processor))

    def prepare(place: int) -> Tensor:
        return processor(items.image(place), return_tensors="pt")["pixel_values"][0]

    count = len(items.ids)
    in_turn = (range(start, min(start + size, count)) for start in range(0, count, size))
    turns = iter(in_turn if order is None else order)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "images") as pool:

        def submit() -> tuple[list[int], list[Future[Tensor]]]:
            places = list(next(turns, ()))
            return places, [pool.submit(prepare, place) for place in places]

        ahead = submit()
        try:
            while ahead[0]:
                (places, ready), ahead = ahead, submit()
                yield torch.stack([future.result() for future in ready]), items.labels[places]
        finally:
            for future in ahead[1]:
                future.cancel()
