"""What is changed and who reads it: a folder of small models, files of it to change, and a verb that reads them."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import modelmerge
from modelmerge.evaluation.scores import differences
from modelmerge.verbs.recipes import prepare_file
from tests.fuzz.mutations import Mutation, of_archive, of_bytes, of_card, of_json, of_pickle, of_safetensors, of_yaml
from tests.support.reports import scores

VOCABULARY = {"a": 0, "b": 1, "c": 2, "d": 3}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "hidden_size": 4,
    "num_attention_heads": 2, "vocab_size": 5, "eos_token_id": [1, 2], "bos_token_id": 0, "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "tie_word_embeddings": False, "hidden_act": "silu",
    "text_config": {"model_type": "llama", "num_attention_heads": 2, "eos_token_id": 1},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.*q_proj": 2},
    "alpha_pattern": {r".*\.q_proj": 8}, "auto_mapping": {"base_model_class": "X", "parent_library": "y"},
    "base_model_name_or_path": "org/base", "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM", "bias": "none",
    "use_dora": False, "use_rslora": True, "lora_bias": False, "fan_in_fan_out": False, "init_lora_weights": True,
    "target_parameters": None, "layers_pattern": None, "layers_to_transform": None, "ensure_weight_tying": False,
}  # fmt: skip
FRONT = {
    "license": "other", "license_name": "mine", "license_link": "LICENSE", "pipeline_tag": "text-generation",
    "tags": ["a", "b"], "base_model": ["org/x"], "date": "2024-01-01", "model-index": [{"name": "x", "results": []}],
}  # fmt: skip
MERGEKIT = {
    "merge_method": "ties", "base_model": "base", "dtype": "float32", "tokenizer_source": "base",
    "parameters": {"normalize": True, "density": 0.5},
    "models": [
        {"model": "one", "parameters": {"weight": [0.5, 1.0], "density": 0.5}},
        {"model": {"model": {"path": "two"}},
         "parameters": {"weight": [{"filter": "q_proj", "value": 0.5}, {"value": 1}]}},
    ],
}  # fmt: skip
LINEAR = {
    "merge_method": "linear",
    "slices": [{"sources": [{"model": "one", "layer_range": [0, 2], "parameters": {"weight": 1}},
                            {"model": "two", "layer_range": [0, 2], "parameters": {"weight": 0.5}}]}],
    "tokenizer": {"source": "base"},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Files to change, each by how, and what reads them; all models lie in the working directory."""

    files: Mapping[str, Mutation]
    read: Callable[[bool], Any]  # told whether a plan is enough


def _merge(*experts: str, base: str = "base", **more: Any) -> Callable[[bool], Any]:
    settings = {"method": "average", "force": True, **more}
    return lambda plan: modelmerge.merge(base, list(experts), "out", dry_run=plan, **settings)


def _replay(file: str) -> Callable[[bool], Any]:
    def read(plan: bool) -> None:
        if plan:
            with contextlib.closing(prepare_file(Path(file))) as prepared:
                prepared.describe()
        else:
            modelmerge.replay(file, "out", force=True)

    return read


TARGETS: dict[str, Target] = {
    "header": Target({"one/model.safetensors": of_safetensors}, _merge("one", "two")),
    "base-header": Target({"base/model.safetensors": of_safetensors}, _merge("one", "two", method="ties")),
    "index": Target({"shards/model.safetensors.index.json": of_json}, _merge("shards", "two")),
    "archive": Target({"zip/pytorch_model.bin": of_archive}, _merge("zip", "two")),
    "legacy": Target({"legacy.pt": of_pickle}, _merge("legacy.pt", "two")),
    "adapter": Target({"lora/adapter_config.json": of_json}, _merge("lora", "two")),
    "adapter-weights": Target({"lora/adapter_model.safetensors": of_safetensors}, _merge("lora", "two")),
    "lora-file": Target(
        {"kohya.safetensors": of_safetensors},
        _merge("kohya.safetensors", "kin.safetensors", base="image.safetensors"),
    ),
    "recipe": Target({"made/modelmerge.json": of_json}, _replay("made")),
    "recipe-1": Target({"old.json": of_json}, _replay("old.json")),
    "mergekit": Target({"ties.yml": of_yaml}, _replay("ties.yml")),
    "mergekit-slices": Target({"linear.yml": of_yaml}, _replay("linear.yml")),
    "config": Target({"one/config.json": of_json}, _merge("one", "two")),
    "base-config": Target(
        {"base/config.json": of_json, "base/generation_config.json": of_json},
        _merge("one", "spoken", dtype="bfloat16", vocab="union"),
    ),
    "tokenizer": Target(
        {f"spoken/{name}.json": of_json for name in ("tokenizer", "tokenizer_config", "added_tokens")},
        _merge("one", "spoken", vocab="union"),
    ),
    "other-tokenizers": Target(
        {"pieces/tokenizer.model": of_bytes, "lines/vocab.txt": of_bytes, "tekken/tekken.json": of_json},
        _merge("one", "pieces", "lines", "tekken", vocab="union", files_from="one"),
    ),
    "files-from": Target(
        {f"spoken/{name}config.json": of_json for name in ("", "generation_", "tokenizer_")},
        _merge("one", "spoken", vocab="spoken"),
    ),
    "card": Target({"one/README.md": of_card, "base/README.md": of_card}, _merge("one", "two")),
    "vector": Target({"vectors/one/modelmerge.json": of_json}, _merge("vectors/one", "two")),
    "report": Target({"report.json": of_json}, lambda plan: modelmerge.render("report.json", page="page.html")),
    "scores": Target({"scores.json": of_json}, lambda plan: modelmerge.render("scores.json", page="page.html")),
    "part": Target({"part/modelmerge.json": of_json}, _merge("one", "two", finish=["part"])),
    "part-weights": Target(
        {"part/model.safetensors.part": of_safetensors}, _merge("one", "two", finish=["part"])
    ),
    "verify": Target({"made/modelmerge.json": of_json}, lambda plan: modelmerge.verify("made")),
    "weights": Target({"made/modelmerge.json": of_json}, lambda plan: modelmerge.evaluate(["made"], suite="weights")),
    "folders": Target(
        {"pipe/model_index.json": of_json, "pipe/modules.json": of_json, "pipe/1_Pooling/config.json": of_json,
         "pipe/preprocessor_config.json": of_json},
        _merge("pipe", base="pipe"),
    ),
}  # fmt: skip


def _state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (5, 4), "lm_head.weight": (5, 4), "model.norm.weight": (4,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (4, 4),
            f"model.layers.{layer}.mlp.up_proj.weight": (6, 4),
        }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _write(file: str, content: Any) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def build() -> None:
    """Make all models and files in the working directory."""
    states = {"base": _state(0), "one": _state(1), "two": _state(2), "spoken": _state(3), "pipe": _state(4)}
    states |= {name: _state(5) for name in ("pieces", "lines", "tekken")}
    for name, state in states.items():
        Path(name).mkdir()
        save_file(state, f"{name}/model.safetensors")
        _write(f"{name}/config.json", CONFIG)
    for name, words in (
        ("base", VOCABULARY),
        ("one", VOCABULARY),
        ("spoken", dict(zip("bace", range(4), strict=True))),
    ):
        model = {"type": "BPE", "vocab": words, "merges": []}
        added = [{"id": 3, "content": list(words)[3], "special": True}]
        _write(f"{name}/tokenizer.json", {"version": "1.0", "added_tokens": added, "model": model})
        _write(f"{name}/tokenizer_config.json", {"added_tokens_decoder": {"3": added[0]}, "chat_template": "{{ x }}"})
        _write(f"{name}/added_tokens.json", {list(words)[3]: 3})
        _write(f"{name}/generation_config.json", {"eos_token_id": [1, 2], "suppress_tokens": [3], "temperature": 0.5})
        _write(f"{name}/README.md", b"---\n" + json.dumps(FRONT).encode() + b"\n---\n# A model\n")
    pieces = (
        b"\x0a" + bytes([len(p)]) + p
        for p in (b"\x0a\x01" + letter + b"\x15\x00\x00\x00\x00" for letter in (b"a", b"b", b"e", b"f"))
    )
    _write("pieces/tokenizer.model", b"".join(pieces))
    _write("lines/vocab.txt", b"a\nb\ng\nh\n")
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(letter).decode(), "token_str": None}
        for i, letter in enumerate((b"a", b"b"))
    ]
    special = [{"rank": i, "token_str": word, "is_control": True} for i, word in enumerate(("<s>", "</s>"))]
    tekken = {
        "config": {"default_vocab_size": 4, "default_num_special_tokens": 2},
        "vocab": vocabulary,
        "special_tokens": special,
    }
    _write("tekken/tekken.json", tekken)
    _write("pipe/model_index.json", {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]})
    _write("pipe/modules.json", [{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"},
                                 {"idx": 1, "name": "1", "path": "1_Pooling", "type": "x"}])  # fmt: skip
    _write("pipe/1_Pooling/config.json", {"word_embedding_dimension": 4})
    _write("pipe/preprocessor_config.json", {"size": {"height": 4}})
    _build_others()


def _build_others() -> None:
    state = _state(1)
    names, weight_map = list(state), {}
    for i, part in enumerate((names[:3], names[3:]), start=1):
        Path("shards").mkdir(exist_ok=True)
        save_file({name: state[name] for name in part}, f"shards/model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    _write("shards/model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    Path("zip").mkdir()
    torch.save({**state, "view": state[names[0]].T}, "zip/pytorch_model.bin")
    torch.save({"state_dict": state, "epoch": 3}, "legacy.pt", _use_new_zipfile_serialization=False)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{q}.lora_A.weight": torch.randn(2, 4), f"{q}.lora_B.weight": torch.randn(4, 2)}
    Path("lora").mkdir()
    save_file({**lora, "base_model.model.lm_head.weight": torch.randn(5, 4)}, "lora/adapter_model.safetensors")
    _write("lora/adapter_config.json", ADAPTER)
    _build_images()
    _write("ties.yml", MERGEKIT)
    _write("linear.yml", LINEAR)
    modelmerge.merge(
        "base", ["one", "two"], "made", method="ties", weights={"one": 0.5},
        at=["*mlp*: scale=0.2", "*: one.weight=0,1"], exclude=["*norm*"], rest="average",
    )  # fmt: skip
    modelmerge.extract("base", ["one", "two"], "vectors")
    manifest = json.loads(Path("made/modelmerge.json").read_bytes())
    recipe = {
        "method": "ties", "base": manifest["recipe"]["base"], "experts": manifest["recipe"]["experts"],
        "options": {"density": 0.2, "scale": 0.3}, "vary": ["one:weight=0,1", "scale=0.5@*mlp*"],
        "rule": ["*attn*=average"], "rest": "average", "layer_scale": None, "task_lambda": None,
        "disentangle": "awd", "disentangle_options": {"alpha": 0.2}, "seed": 1,
    }  # fmt: skip
    _write("old.json", {**manifest, "format": 1, "recipe": recipe})
    modelmerge.merge("base", ["one", "two"], "part", method="average", part="1/1")
    _write("report.json", modelmerge.evaluate(["made"], suite="weights"))
    report: Any = scores(("a", "one"), ("made", "other"))
    comparison = {"with": "earlier.json", "models": differences(report, report)}
    _write(
        "scores.json",
        {
            **report,
            "comparison": comparison,
            "gate": {
                "gates": ["a=0.5"],
                "passed": False,
                "failures": [{"model": "made", "value": 0.4, "gate": "a=0.5"}],
            },
        },
    )


def _build_images() -> None:
    """A model of images in a single file, a relative, and a LoRA file of three kinds."""
    block = "input_blocks.1.1.transformer_blocks.0"
    shapes = {
        "input_blocks.1.0.in_layers.2": (4, 4, 3, 3),
        f"{block}.attn1.to_q": (4, 4),
        f"{block}.ff.net.0.proj": (8, 4),
    }
    shapes |= {"input_blocks.0.0": (4, 4, 3, 3), "time_embed.0": (8, 4), f"{block}.attn1.to_out.0": (4, 4)}
    for name in ("image", "kin"):
        state = {f"model.diffusion_model.{key}.weight": torch.randn(shape) for key, shape in shapes.items()}
        save_file(state, f"{name}.safetensors")
    conv, query, feed = (f"lora_unet_{name.replace('.', '_')}" for name in list(shapes)[:3])
    factors = {
        f"{query}.lora_up.weight": (4, 2), f"{query}.lora_down.weight": (2, 4), f"{query}.alpha": (),
        f"{conv}.lora_up.weight": (4, 2, 1, 1), f"{conv}.lora_down.weight": (2, 4, 1, 1),
        f"{conv}.lora_mid.weight": (2, 2, 3, 3),
        f"{feed}.hada_w1_a": (8, 2), f"{feed}.hada_w1_b": (2, 4),
        f"{feed}.hada_w2_a": (8, 2), f"{feed}.hada_w2_b": (2, 4),
    }  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": ADAPTER[key] for key in ("r", "lora_alpha")})}
    save_file({key: torch.ones(shape) for key, shape in factors.items()}, "kohya.safetensors", metadata)
