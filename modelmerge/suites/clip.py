"""Zero-shot image classification with CLIP's text tower as the classifier, on folders of images.

A class's row of the classifier is the mean of the text embeddings of its prompts, each of unit length (Radford et al.,
arXiv 2103.00020). transformers does the tokenizing, the preprocessing and the towers; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.digest import sha256
from modelmerge.errors import CheckpointError, ModelMergeError, UsageError
from modelmerge.suites._model import Model
from modelmerge.suites._scores import Score, plain, read_score

TEMPLATE = "a photo of a {}."
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = ("test", "validation", "val")  # where a data set has splits, the first of these that is there
_TEXTS = 256  # prompts at a time


@dataclass(frozen=True)
class Images:
    """A data set: the classes by their folders, and the images to look at.

    Args:
        name: What the task is called.
        root: The folder that holds a folder for each class.
        classes: Each class's folder (None for one that has no images) and its name in the prompts.
        images: Each image's place below `root`, and its class.
    """

    name: str
    root: Path
    classes: tuple[tuple[str | None, str], ...]
    images: tuple[tuple[str, int], ...]

    @cached_property
    def digest(self) -> str:
        """Of the classes and of every image."""
        told = [self.classes, [(place, sha256(self.root / place)) for place, _ in self.images]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def find_images(name: str, folder: Path, classes: Path | None, limit: int | None, seed: int) -> Images:
    """The data set in a folder that holds a folder of images for each class, or such folders for each split.

    Args:
        name: What the task is called.
        folder: Where it lies.
        classes: A text file with the name of a class in each line: the folder's, or `FOLDER<tab>NAME`. Without it
            the folders' names count, underscores read as spaces.
        limit: Look at so many images, drawn with the seed; all if None.
        seed: Of that draw.

    Raises:
        UsageError: The folder holds no such folders.
        ModelMergeError: A class has no images, or is not among the classes.
    """
    if not folder.is_dir():
        raise ModelMergeError(f"--data {folder}: no such directory", hint="a folder that holds a folder for each class")
    root = next((folder / split for split in _SPLITS if (folder / split).is_dir()), folder)
    found = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not found:
        raise UsageError(f"--data {folder}: it holds no folders", hint="each class's images lie in a folder of its own")
    named = _read_classes(classes, found) if classes is not None else [(own, own.replace("_", " ")) for own in found]
    images = []
    for i, (own, _) in enumerate(named):
        inside = sorted((root / own).rglob("*")) if own is not None else []
        places = [file for file in inside if file.suffix.lower() in _IMAGES and not file.name.startswith(".")]
        if own is not None and not places:
            raise ModelMergeError(f"{root / own}: no image is in it", hint=f"kinds that are read: {', '.join(_IMAGES)}")
        images += [(file.relative_to(root).as_posix(), i) for file in places]
    if limit is not None and limit < len(images):
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
        images = [images[i] for i in sorted(drawn.tolist())]
    return Images(name, root, tuple(named), tuple(images))


def _read_classes(file: Path, folders: Sequence[str]) -> list[tuple[str | None, str]]:
    """Each class of a file and its folder, matched by name and never by place."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelMergeError(f"--classes {file}: cannot be read: {error}") from error
    by_name = {plain(folder): folder for folder in folders}
    if len(by_name) < len(folders):
        raise ModelMergeError(f"--classes {file}: two folders have names that differ in nothing but case or spaces")
    classes: list[tuple[str | None, str]] = []
    for line in lines:
        own, tab, name = line.partition("\t")
        classes.append((by_name.pop(plain(own), None), name.strip() if tab else own))
    if len({plain(name) for _, name in classes}) < len(classes):
        raise ModelMergeError(f"--classes {file}: a class is named twice")
    if by_name:
        raise ModelMergeError(
            f"--classes {file}: no class is called '{next(iter(by_name.values()))}', as a folder of images is",
            hint="a line FOLDER<tab>NAME gives a folder its class's name",
        )
    return classes


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The templates; the usual one if there are none.

    Raises:
        UsageError: One has no place for the class's name.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(f"--template '{template}' needs one {{}}, where the class's name goes")
    return tuple(templates) or (TEMPLATE,)


@dataclass
class Classifier:
    """CLIP as a classifier: the towers of one model after the other, on one base's config and tokenizer.

    Args:
        templates: Prompts with `{}` for the class's name.
        batch_size: Images at a time.
    """

    templates: tuple[str, ...]
    batch_size: int
    _heads: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # by text tower and data set
    _loaded: tuple[Model, Any, str] | None = None
    _tools: tuple[Any, Any] | None = None  # tokenizer and image processor

    def measure(self, model: Model, data: Images) -> dict[str, Score]:
        """The model's accuracy on a data set, image by image.

        Raises:
            ModelMergeError: It is no CLIP model, an image cannot be read, or its answers are not finite.
        """
        clip, text = self._load(model)
        key = text, data.digest
        if key not in self._heads:
            self._heads[key] = self._head(clip, [name for _, name in data.classes], model)
        head, right = self._heads[key].to(model.device), []
        for start in range(0, len(data.images), self.batch_size):
            part = data.images[start : start + self.batch_size]
            pixels = self._pixels([data.root / place for place, _ in part]).to(model.device)
            with torch.no_grad():
                embedded = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
                answers = torch.nn.functional.normalize(embedded, dim=1) @ head.T
            if not bool(answers.isfinite().all()):
                raise ModelMergeError(f"'{model.name}' gives answers that are not finite on {data.root / part[0][0]}")
            right += [int(a == own) for a, (_, own) in zip(answers.argmax(1).tolist(), part, strict=True)]
        told = {"items": right, "ids": [place for place, _ in data.images], "metric": "accuracy"}
        return {data.name: read_score(told, f"'{model.name}' on '{data.name}'")}

    def _load(self, model: Model) -> tuple[Any, str]:
        """The model in transformers, and a digest of its text tower."""
        if self._loaded is not None and self._loaded[0] is model:
            return self._loaded[1:]
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

        assert model.base_path is not None, "the suite runs onto a base"
        self._loaded = None  # one model at a time in memory
        try:
            config = CLIPConfig.from_pretrained(model.base_path)
            if self._tools is None:
                self._tools = (
                    AutoTokenizer.from_pretrained(model.base_path),
                    AutoImageProcessor.from_pretrained(model.base_path),
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelMergeError(
                f"{model.base_path}: its config, tokenizer or image processor cannot be loaded: "
                f"{str(error).strip().splitlines()[0]}",
                hint="they lie beside the weights of a CLIP model: config.json, tokenizer.json, "
                "preprocessor_config.json; --base names such a model",
            ) from error
        if config.model_type != "clip":
            raise ModelMergeError(f"{model.base_path} is a '{config.model_type}' model, not 'clip'")
        clip = CLIPModel(config)
        state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in model.items()}
        wrong = [
            name
            for name, tensor in clip.state_dict().items()
            if getattr(state.get(name), "shape", None) != tensor.shape
        ]
        wrong += [name for name in state.keys() - clip.state_dict().keys() if not name.endswith("position_ids")]
        if wrong:
            raise CheckpointError(
                f"{model.base_path}: not the CLIP model that its config.json tells: '{wrong[0]}' differs",
                hint="--base names a whole CLIP model, text tower and all",
            )
        clip.load_state_dict(state, strict=False)
        digest = hashlib.sha256()
        for name in sorted(state):
            if name.startswith("text_"):
                digest.update(state[name].contiguous().numpy().tobytes())
        self._loaded = (model, clip.eval().to(model.device), digest.hexdigest())
        return self._loaded[1:]

    def _head(self, clip: Any, names: Sequence[str], model: Model) -> Tensor:
        """A row of unit length for each class, float32 [classes, dim]."""
        assert self._tools is not None
        prompts = [template.format(name) for name in names for template in self.templates]
        rows = []
        for start in range(0, len(prompts), _TEXTS):
            longest = clip.config.text_config.max_position_embeddings
            tokens = self._tools[0](
                prompts[start : start + _TEXTS], padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            inputs = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                rows.append(clip.text_projection(clip.text_model(**inputs).pooler_output))
        embedded = torch.nn.functional.normalize(torch.cat(rows), dim=1).view(len(names), len(self.templates), -1)
        return torch.nn.functional.normalize(embedded.mean(1), dim=1).cpu()

    def _pixels(self, files: Sequence[Path]) -> Tensor:
        from PIL import Image

        assert self._tools is not None
        images = []
        for file in files:
            try:
                with Image.open(file) as image:
                    images.append(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise ModelMergeError(f"{file}: not an image that can be read: {error}") from error
        return self._tools[1](images=images, return_tensors="pt")["pixel_values"]
