"""CLIP models by their parts: text heads, vision towers, and classifiers of images made of both.

Shapes: N items, C classes, H the vision tower's width, D the width that images and texts share.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from modelmerge.checkpoint.digest import cache_directory
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.output import replace_file
from modelmerge.errors import CheckpointError, ModelMergeError, OutputError, UsageError, named
from modelmerge.evaluation.image_tasks import Task, match
from modelmerge.evaluation.model import Model, refuse_kernels

_VISION, _TEXT = "vision_model.", "text_model."
_PROJECTION, TEXT_PROJECTION, _SCALE = "visual_projection.weight", "text_projection.weight", "logit_scale"
# The settings of the image processor: newer versions of transformers keep them with those of the whole processor.
_PROCESSOR, _WHOLE_PROCESSOR = "preprocessor_config.json", "processor_config.json"
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_BUFFER = "position_ids"  # older files hold it, newer code counts itself
_PROMPTS = 256  # embedded at once
_FORMAT = 1  # of text heads on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model, or what there is of it: tensors by name, each read when it is asked for, and what lies beside them.

    `config` and `directory` are the base's where the model has none of its own, as an adapter.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    directory: Path | None

    @property
    def has_text(self) -> bool:
        """Whether it has a text tower, so that a head can be made with it."""
        return self.holds(TEXT_PROJECTION) and any(name.startswith(_TEXT) for name in self.tensors)

    def holds(self, tensor: str) -> bool:
        """Whether there is such a tensor; it is not read."""
        return any(name == tensor for name in self.tensors)


def parts_of(model: Model) -> Parts:
    """A model, and what lies beside it; beside the base, where it is seen by the base's names."""
    place = model.path if model.base_path is None else model.base_path
    file = place / "config.json"
    config = read_json(file, dict[str, Any]) if file.exists() else {}
    return Parts(name=model.name, tensors=model, config=config, directory=place if place.is_dir() else None)


def open_parts(model: Model) -> tuple[Parts, str, Tower]:
    """A model, the digest of its text tower, if it has one, and its vision tower."""
    parts = parts_of(model)
    return parts, text_digest(parts) if parts.has_text else "", read_tower(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A text head, and what else of CLIP a vision tower needs to classify with it.

    Args:
        classes: As they are prompted, in the order of the rows.
        templates: The prompts.
        weight: [C, D], rows of length one.
        projection: [D, H], from the vision tower's output.
        scale: What cosines are multiplied by to be logits.
        processor: The settings of the image processor.
        source: The model it was made with.
        digest: `text_digest` of that.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    weight: Tensor
    projection: Tensor
    scale: float
    processor: Mapping[str, Any]
    source: str
    digest: str = ""


class Classifier(torch.nn.Module):
    """A vision tower with a text head: pixels [N, 3, height, width] to logits [N, C], float32."""

    projection: Tensor
    weight: Tensor

    def __init__(self, tower: torch.nn.Module, projection: Tensor, head: Head) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("projection", projection)
        self.register_buffer("weight", head.weight)
        self.scale = head.scale

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits [N, C]."""
        features = self.tower(pixel_values=pixels).pooler_output @ self.projection.T
        return self.scale * functional.normalize(features, dim=-1) @ self.weight.T


def text_digest(source: Parts) -> str:
    """Of all that a head's rows depend on: the text tower, and what lies beside the weights."""
    digest = hashlib.sha256(json.dumps([_FORMAT, source.config.get("text_config")], sort_keys=True).encode())
    for name in sorted(source.tensors):
        if (name.startswith(_TEXT) and not name.endswith(_BUFFER)) or name == TEXT_PROJECTION:
            tensor = source.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for file in (*_TOKENIZER, _PROCESSOR, _WHOLE_PROCESSOR):
        if source.directory is not None and (source.directory / file).exists():
            digest.update(file.encode() + (source.directory / file).read_bytes())
    return digest.hexdigest()


def find_head(task: Task, classes: Sequence[str], source: Parts | None, folder: Path | None, digest: str = "") -> Head:
    """The text head for these classes, in their order: as it was kept, or made now and kept.

    Args:
        task: What it is for.
        classes: As they are prompted.
        source: The model with the text tower; None where there is none at hand.
        folder: Where heads are kept by the names of tasks; None is the cache.
        digest: `text_digest` of the source, for the cache.

    Raises:
        UsageError: There is no head yet, and no text tower to make it with.
        ModelMergeError: The head that was kept is of other classes or prompts.
    """
    if folder is None:
        key = [digest, list(classes), list(task.templates)]
        file = cache_directory() / "heads" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.safetensors"
    else:
        file = folder.expanduser() / f"{task.head}.safetensors"
    if file.exists():
        head = read_head(file)
        if folder is not None and digest and head.digest != digest and source is not None:
            raise ModelMergeError(
                f"{file}: made with the text tower of '{head.source}', which is not that of '{source.name}'",
                hint=f"without {named('heads')} each model has the head of its own text tower",
            )
        return _in_order(head, task, classes, file)
    if source is None or not source.has_text:
        lacking = f"'{source.name}' has no text tower" if source else f"{file} is not there, and there is no text tower"
        raise UsageError(
            f"{lacking} to make the text head of '{task.name}' with",
            hint=f"name the CLIP model the experts come from: {named('base')} REF; or a folder that has the head: "
            f"{named('heads')} DIR",
        )
    head = replace(make_head(source, classes, task.templates), digest=digest)
    with contextlib.suppress(OSError, OutputError) if folder is None else contextlib.nullcontext():
        write_head(head, file)
    return head


def _in_order(head: Head, task: Task, classes: Sequence[str], file: Path) -> Head:
    where = f"{file} and the task '{task.name}'"
    order = match(classes, head.classes, where, ("the task", "the head"), hint="remove the head, to have it made again")
    if head.templates != tuple(task.templates):
        raise ModelMergeError(
            f"{file}: made with other prompts than those of '{task.name}': {', '.join(head.templates[:2])} ...",
            hint=f"remove it, to have it made again, or give its prompts: {named('templates')}",
        )
    return replace(head, weight=head.weight[order], classes=tuple(classes))


@torch.no_grad()
def make_head(source: Parts, classes: Sequence[str], templates: Sequence[str]) -> Head:
    """A text head by a model's text tower.

    Raises:
        CheckpointError: A tensor is missing, of another shape than the config says, or not finite.
        ModelMergeError: The model is not CLIP, or lacks its tokenizer or the settings of its image processor.
    """
    import transformers

    config = _config(source)
    text = transformers.CLIPTextConfig.from_dict(
        {**config["text_config"], "projection_dim": config.get("projection_dim", 512)}
    )
    tower = _with_weights(transformers.CLIPTextModelWithProjection(text), source, "")
    tokenizer = _beside(
        source,
        ("tokenizer.json", "vocab.json"),
        functools.partial(transformers.AutoTokenizer.from_pretrained, trust_remote_code=False),
    )
    processor = _beside(source, (_PROCESSOR, _WHOLE_PROCESSOR), _read_processor)
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    ids = tokenizer(prompts)["input_ids"]
    long = next((i for i, tokens in enumerate(ids) if len(tokens) > text.max_position_embeddings), None)
    if long is not None:
        raise ModelMergeError(
            f"the prompt '{prompts[long]}' has {len(ids[long])} tokens, and '{source.name}' reads "
            f"{text.max_position_embeddings}",
            hint="shorten the class name, or the template",
        )
    embeddings = []
    for start in range(0, len(prompts), _PROMPTS):
        batch = tokenizer(prompts[start : start + _PROMPTS], padding=True, return_tensors="pt")
        outputs = tower(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        embeddings.append(functional.normalize(outputs.text_embeds, dim=-1))
    weight = functional.normalize(torch.cat(embeddings).view(len(classes), len(templates), -1).mean(1), dim=-1)
    if not bool(weight.isfinite().all()):
        raise CheckpointError(f"'{source.name}': its text tower gives NaN or Inf", hint="are its weights damaged?")
    scale = source.tensors[_SCALE].float().exp().item() if source.holds(_SCALE) else 100.0
    return Head(
        classes=tuple(classes), templates=tuple(templates), weight=weight, projection=_projection(source), scale=scale,
        processor=processor, source=source.name,
    )  # fmt: skip


def _read_processor(place: str) -> dict[str, Any]:
    """The settings of a folder's image processor, out of the file that transformers would take them from."""
    whole, alone = Path(place, _WHOLE_PROCESSOR), Path(place, _PROCESSOR)
    settings = read_json(whole, dict[str, Any]) if whole.exists() else {}
    if "image_processor" not in settings and not alone.exists():
        raise ValueError(f"{_WHOLE_PROCESSOR} has no image processor")
    return dict(settings["image_processor"] if "image_processor" in settings else read_json(alone, dict[str, Any]))


def write_head(head: Head, file: Path) -> None:
    """Write a head as safetensors, whole or not at all."""
    from safetensors.torch import save

    metadata = {
        "format": "pt", "classes": json.dumps(head.classes), "templates": json.dumps(head.templates),
        "processor": json.dumps(head.processor), "source": head.source, "digest": head.digest,
        "scale": repr(head.scale),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file.parent, file.name, save({"weight": head.weight, "projection": head.projection}, metadata))


def read_head(file: Path) -> Head:
    """A head that `write_head` wrote.

    Raises:
        CheckpointError: It is none, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            words = tensors.metadata() or {}
            weight, projection = tensors.get_tensor("weight"), tensors.get_tensor("projection")
        head = Head(
            classes=tuple(json.loads(words["classes"])), templates=tuple(json.loads(words["templates"])), weight=weight,
            projection=projection, scale=float(words["scale"]), processor=json.loads(words["processor"]),
            source=words["source"], digest=words["digest"],
        )  # fmt: skip
        if weight.shape != (len(head.classes), projection.shape[0]) or not bool(weight.isfinite().all()):
            raise ValueError("its weights do not go with its classes")
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: no text head: {error}", hint="remove it, to have it made again") from error
    return head


@dataclass(frozen=True, slots=True)
class Tower:
    """A model's vision tower, float32, and its own projection [D, H] where it has one."""

    name: str
    module: torch.nn.Module
    width: int
    side: int  # of the square images it takes, in pixels
    projection: Tensor | None


def read_tower(model: Parts) -> Tower:
    """The vision tower of a model.

    Raises:
        CheckpointError: A tensor is missing or of another shape than the config says.
        ModelMergeError: The model is not CLIP.
    """
    import transformers

    kind = transformers.CLIPVisionConfig.from_dict(dict(_config(model)["vision_config"]))
    tower = transformers.CLIPVisionModel(kind)
    module = _with_weights(getattr(tower, "vision_model", tower), model, _front(model))
    projection = _projection(model) if model.holds(_PROJECTION) else None
    return Tower(model.name, module, kind.hidden_size, kind.image_size, projection)


def _front(model: Parts) -> str:
    """What the names of the vision tower's tensors begin with."""
    return _VISION if any(name.startswith(_VISION) for name in model.tensors) else ""


def names_in(network: Classifier, model: Parts) -> dict[str, str]:
    """By the names of a model's tensors, those in the state dict of a classifier with its vision tower."""
    front = _front(model)
    places = {front + name.removeprefix("tower."): name for name in network.state_dict() if name.startswith("tower.")}
    return {name: place for name, place in (places | {_PROJECTION: "projection"}).items() if model.holds(name)}


def classifier(tower: Tower, head: Head, device: torch.device) -> Classifier:
    """A vision tower with a head, on the device.

    Raises:
        ModelMergeError: The tower is not of the kind that the head is for.
    """
    projection = head.projection if tower.projection is None else tower.projection
    hint = "is it fine-tuned from that base?"
    if projection.shape != (head.weight.shape[1], tower.width):
        raise ModelMergeError(
            f"'{tower.name}' is {tower.width} wide and the head, made with '{head.source}', is for a tower of "
            f"{projection.shape[1]} in a space of {head.weight.shape[1]}",
            hint=hint,
        )
    side = _side(head.processor)
    if side is not None and side != tower.side:
        raise ModelMergeError(
            f"'{tower.name}' takes images of {tower.side} pixels, and the image processor of '{head.source}' makes "
            f"them {side}",
            hint=hint,
        )
    return Classifier(tower.module, projection, head).to(device).eval()


def _config(model: Parts) -> Mapping[str, Any]:
    """A model's config as a whole CLIP's."""
    refuse_kernels(model.config, f"'{model.name}'")
    kind = model.config.get("model_type")
    if kind == "clip" and isinstance(model.config.get("vision_config"), dict):
        return model.config
    if kind == "clip_vision_model":
        return {"vision_config": model.config, "projection_dim": model.config.get("projection_dim", 512)}
    what = f"a {kind} model" if kind else "a model without a config.json that says what it is"
    hint = "images are for CLIP models and their vision towers; others go with eval custom, or eval lm"
    raise ModelMergeError(f"'{model.name}' is {what}, not CLIP", hint=hint)


def _side(processor: Mapping[str, Any]) -> int | None:
    """The side of the square images that a processor makes; None where it does not say."""
    size = processor.get("crop_size") if processor.get("do_center_crop", True) else processor.get("size")
    return size.get("height") if isinstance(size, Mapping) else size


def _projection(model: Parts) -> Tensor:
    if not model.holds(_PROJECTION):
        hint = f"{named('base')} must be a whole CLIP model"
        raise CheckpointError(f"'{model.name}' has no {_PROJECTION}", hint=hint)
    return model.tensors[_PROJECTION].float()


def _with_weights(module: torch.nn.Module, model: Parts, front: str) -> torch.nn.Module:
    """The module with the model's weights in it, every one of them, float32; `front` is where their names begin."""
    state, names = {}, set(model.tensors)
    for name, parameter in module.state_dict().items():
        if name.endswith(_BUFFER):
            continue
        if front + name not in names:
            raise CheckpointError(
                f"'{model.name}' lacks the tensor '{front}{name}', which its config says it has",
                hint="is it a CLIP model, saved whole?",
            )
        tensor = model.tensors[front + name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"'{model.name}': '{front}{name}' is {list(tensor.shape)}, and its config says {list(parameter.shape)}"
            )
        state[name] = tensor.float()
    module.load_state_dict(state, strict=not any(name.endswith(_BUFFER) for name in module.state_dict()))
    return module.float().eval()


def _beside(source: Parts, files: Sequence[str], read: Any) -> Any:
    """What lies beside a model's weights.

    Raises:
        ModelMergeError: It is not there, or cannot be read.
    """
    place = source.directory
    if place is None or not any((place / file).exists() for file in files):
        hint = "copy it there from its base"
        raise ModelMergeError(f"'{source.name}' has no {' or '.join(files)} beside its weights", hint=hint)
    try:
        return read(str(place))
    except (OSError, ValueError, KeyError) as error:
        raise ModelMergeError(f"{place}: its {files[0]} cannot be read: {error}") from error
