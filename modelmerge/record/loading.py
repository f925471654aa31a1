"""How a model is loaded again, and for what it is used, by what lies in its directory: for cards, and after a merge.

The class is the one that the model's own config names, which its library has by that name, whatever the family.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.adapter_config import CONFIG as ADAPTER
from modelmerge.checkpoint.components import CLASS, MODEL_CONFIG, MODULES, PIPELINE
from modelmerge.checkpoint.documents import read_entries

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
# What the Hub calls the task of a model whose architecture ends so (https://huggingface.co/tasks); transformers has an
# `AutoModelFor...` of each that begins with For.
_TASKS = {
    "ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask", "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification", "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification", "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation", "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification", "LMHeadModel": "text-generation",
    "CLIPModel": "zero-shot-image-classification", "SiglipModel": "zero-shot-image-classification",
    "VisionModel": "image-feature-extraction",
}  # fmt: skip
# peft's class for each task of an adapter.
_OF_ADAPTERS = {
    "CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}  # fmt: skip


def code_of(
    directory: Path, place: str, base: Mapping[str, Any] | None = None, *, beside: bool = True, hub: bool = False
) -> list[str]:
    """Lines of Python that load what lies in a directory; empty where no library is known to.

    Args:
        directory: A model, or an adapter.
        place: What the reader calls it.
        base: The config of an adapter's base; that of the directory that the adapter names if None.
        beside: Load its tokenizer or processor, too.
        hub: The place is a repository on the Hub.
    """
    config, where = read_entries(directory / MODEL_CONFIG), repr(place)
    if (directory / ADAPTER).exists():
        return _of_adapter(directory, where, base)
    if (directory / MODULES).exists():
        return ["from sentence_transformers import SentenceTransformer", f"model = SentenceTransformer({where})"]
    if (directory / PIPELINE).exists():
        return ["from diffusers import DiffusionPipeline", f"pipeline = DiffusionPipeline.from_pretrained({where})"]
    if name := _word(config.get(CLASS)):
        return [f"from diffusers import {name}", f"model = {name}.from_pretrained({where})"]
    if name := _class_of(config):
        trust = ", trust_remote_code=True" if "auto_map" in config else ""
        lines, names = [f"model = {name}.from_pretrained({where}{trust})"], [name]
        for kind, files in (("AutoProcessor", _PROCESSORS), ("AutoTokenizer", _TOKENIZERS)) if beside else ():
            if len(names) == 1 and any((directory / file).exists() for file in files):
                names.append(kind)
                lines.append(f"{kind[4:].lower()} = {kind}.from_pretrained({where}{trust})")
        return [f"from transformers import {', '.join(sorted(names))}", *lines]
    weights = [file.name for file in directory.glob("*.safetensors")]
    if len(weights) != 1:
        return []
    file = f"hf_hub_download({where}, {weights[0]!r})" if hub else repr(f"{place}/{weights[0]}")
    imports = ["from huggingface_hub import hf_hub_download"] if hub else []
    return [*imports, "from safetensors.torch import load_file", f"tensors = load_file({file})"]


def _of_adapter(directory: Path, where: str, base: Mapping[str, Any] | None) -> list[str]:
    adapter = read_entries(directory / ADAPTER)
    if end := _OF_ADAPTERS.get(str(adapter.get("task_type"))):
        return [f"from peft import AutoPeftModel{end}", f"model = AutoPeftModel{end}.from_pretrained({where})"]
    root = str(adapter.get("base_model_name_or_path"))
    name = _class_of(base if base is not None else read_entries(Path(root) / MODEL_CONFIG))
    loaded = f"PeftModel.from_pretrained({name}.from_pretrained({root!r}), {where})"
    return ["from peft import PeftModel", f"from transformers import {name}", f"model = {loaded}"] if name else []


def task_of(directory: Path) -> str | None:
    """What the Hub calls the task of a model, by its architecture; None where that does not say it."""
    if (directory / MODULES).exists():
        return "sentence-similarity"
    adapter, config = read_entries(directory / ADAPTER), read_entries(directory / MODEL_CONFIG)
    name = _OF_ADAPTERS.get(str(adapter.get("task_type"))) or _architecture(config)
    if name.endswith("ForConditionalGeneration"):
        return (
            "image-text-to-text" if "vision_config" in config
            else "automatic-speech-recognition" if "num_mel_bins" in config else "text-generation"
        )  # fmt: skip
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _class_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model of that config; empty where it names none."""
    name, own = _architecture(config), config.get("auto_map")
    if isinstance(own, dict):  # code of its own: the class of transformers that stands for it
        autos = {key: str(value).rpartition(".")[2] for key, value in own.items() if key.startswith("AutoModel")}
        return _word(next((key for key, value in autos.items() if value == name), next(iter(autos), "")))
    end = next((end for end in _TASKS if end.startswith("For") and name.endswith(end)), None)
    return f"AutoModel{end}" if end else name


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return _word(names[0]) if isinstance(names, list) and names else ""


def _word(name: Any) -> str:
    """A stranger's word, where it can be the name of a class."""
    return name if isinstance(name, str) and name.isidentifier() and name.isascii() else ""
