"""Runs of mergekit itself, to compare with: `python -m tests.support.mergekit_runs [DIR [PYTHON]]`.

Installs mergekit into an environment of its own in a temporary directory, makes the small models, runs every
configuration of `tests/oracle/mergekit/configs`, and writes models and results below DIR (tests/oracle/mergekit).
Models are Llamas of four layers; `up` and `down` are the base plus and minus the same steps, exactly; of the sparse
ones, a part has changed. Those below `tokens` have a layer, tokenizers that differ, and tables with other rows. Those
below `modules` have several lists of layers: Mistral 3 and Qwen2.5-VL see, BART and T5 have an encoder and a decoder.
Those below `experts` are mixtures of experts: Mixtral's one by one, as on the Hub, and Qwen3-MoE's in stacks.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

VERSION = "0.1.5"
ORACLE = Path(__file__).parent.parent / "oracle" / "mergekit"
CONFIGS = ORACLE / "configs"
HIDDEN, INNER, LAYERS, VOCABULARY = 8, 12, 4, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
ROUNDS = 60  # of configurations with random draws, of which means are kept
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
RANK = 2
ADAPTED = ("self_attn.q_proj", "mlp.down_proj")
RUN = """
import json, logging, pathlib, shutil, sys, yaml
from safetensors.torch import load_file, save_file
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions
from mergekit.scripts.multimerge import main
def run(file, out, seed):
    if "\\n---\\n" in file.read_text():
        places = ["--out-path", out, "--intermediate-dir", f"stages/{file.stem}", "--lora-merge-cache", "loras"]
        usual = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", "--random-seed", str(seed)]
        main([str(file), *places, *usual], standalone_mode=False)
        return load_file(f"{out}/model.safetensors")
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed, lora_merge_cache="loras"
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(file.read_text())), out, options=options)
    return load_file(f"{out}/model.safetensors")
logging.disable(logging.WARNING)
specs = {method.spec.name: {each.name: {"per_model": each.scope.value != "shared", "required": each.required,
    "default": None if each.required else each.default} for each in method.spec.parameters}
    for method in registered_methods()}
pathlib.Path("parameters.json").write_text(json.dumps(specs, indent=1, sort_keys=True))
base = load_file("models/base/model.safetensors")
for file in map(pathlib.Path, sys.argv[2:]):
    out, rounds = f"out/{file.stem}", int(sys.argv[1])
    if file.parent.name != "drawn":
        run(file, out, 0)
        continue
    total = {name: 0.0 for name in base}
    kept = dict(total)
    for seed in range(rounds):
        merged = run(file, out, seed)
        for name, tensor in merged.items():
            total[name] = total[name] + tensor.double() / rounds
            kept[name] = kept[name] + (tensor != base[name]).double().mean() / rounds
        shutil.rmtree(out)
    pathlib.Path(out).mkdir()
    means = {f"mean.{name}": mean.float() for name, mean in total.items()}
    save_file(means | {f"kept.{name}": share.float() for name, share in kept.items()}, f"{out}/model.safetensors")
"""


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{k}_proj.weight": (HIDDEN, HIDDEN) for k in "qkvo"}
        found |= {f"{prefix}mlp.{k}_proj.weight": (INNER, HIDDEN) for k in ("gate", "up")}
        found |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, INNER)}
        found |= {f"{prefix}{k}_layernorm.weight": (HIDDEN,) for k in ("input", "post_attention")}
    return found


def write_models(root: Path) -> None:
    """base, math, code, chat; fine, whose task vector is small; up and down; kin_1 and kin_2, which agree; and so on.

    near and opposite lie in one line with the base, almost; the task vector of slight is small, too; of partial, a part
    is zero and a part as in the base.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float, step: float | None = None) -> dict[str, torch.Tensor]:
        state = {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes().items()}
        return {name: (t / step).round() * step for name, t in state.items()} if step else state

    base, steps = drawn(0.1, 2**-12), drawn(0.02, 2**-12)
    models = {"base": base}
    for name, scale in (("math", 0.02), ("code", 0.02), ("chat", 0.03), ("fine", 2e-4)):
        models[name] = {key: base[key] + noise for key, noise in drawn(scale).items()}
    models["base16"] = {key: tensor.bfloat16() for key, tensor in base.items()}
    models["up"] = {key: base[key] + steps[key] for key in base}
    models["down"] = {key: base[key] - steps[key] for key in base}
    shared = drawn(0.03)
    for name in ("kin_1", "kin_2"):
        models[name] = {key: base[key] + shared[key] + noise for key, noise in drawn(0.008).items()}
    for name in ("sparse_1", "sparse_2", "sparse_3"):
        noise = drawn(0.03)
        kept = {key: torch.rand(t.shape, generator=generator) < 0.4 for key, t in noise.items()}
        models[name] = {key: base[key] + noise[key] * kept[key] for key in base}
    for name, sign, scale in (("near", 1.02, 0.0028), ("opposite", -0.9, 0.001), ("slight", 1.0, 4e-4)):
        models[name] = {key: base[key] * sign + noise for key, noise in drawn(scale).items()}
    models["partial"] = {key: base[key] + noise for key, noise in drawn(0.02).items()}
    for key, tensor in models["partial"].items():
        if "layers.1." in key:
            tensor.copy_(base[key])
        elif "layernorm" in key:
            tensor.zero_()
        elif tensor.ndim == 2:
            tensor[0], tensor[1], tensor[:, 2] = base[key][0], 0, base[key][:, 2]
    for name, state in models.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})
        os.chmod(root / name / "model.safetensors", 0o644)
        (root / name / "config.json").write_text(json.dumps(CONFIG) + "\n")


# By model: the pieces of its vocabulary in their order, what was added, and the rows of its tables.
PIECES = [*"abcdefgh", "ab"]
TOKENIZERS: dict[str, tuple[list[str], list[str], int]] = {
    "base": (PIECES, ["<s>", "</s>"], 16),
    "math": (PIECES, ["<s>", "</s>", "<|math|>", "<|both|>"], 13),
    "code": ([*reversed(PIECES), "cd"], ["</s>", "<s>", "<|both|>", "<|code|>"], 20),
    "bare": ([], [], 16),
    "tied": (PIECES, ["<s>", "</s>"], 12),
    "tied_math": (PIECES, ["<s>", "</s>", "<|math|>"], 12),
    "half": (PIECES, ["<s>", "</s>", "<|half|>"], 12),
    "other": ([*reversed(PIECES)], ["</s>", "<s>"], 16),
}


def write_tokenizer(folder: Path, pieces: list[str], added: list[str]) -> None:
    """A tokenizer of letters, and of two together where there is such a piece."""
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = [tuple(piece) for piece in pieces if len(piece) == 2]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def write_token_models(root: Path) -> None:
    """The models of TOKENIZERS; of `tied` ones the embedding is the head, `half` is stored in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    for name, (pieces, added, rows) in TOKENIZERS.items():
        folder, ids = root / name, {token: place for place, token in enumerate([*pieces, *added])}
        folder.mkdir(parents=True, exist_ok=True)
        tied = name.startswith("tied")
        state = {
            key: torch.randn((rows, *shape[1:]) if key in TABLES else shape, generator=generator) * 0.1
            for key, shape in shapes(layers=1).items() if not (tied and key == "lm_head.weight")
        }  # fmt: skip
        state = {key: tensor.bfloat16() for key, tensor in state.items()} if name == "half" else state
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        os.chmod(folder / "model.safetensors", 0o644)
        special = {"bos_token_id": ids.get("<s>", 9), "eos_token_id": ids.get("</s>", 10)}
        config = {**CONFIG, "num_hidden_layers": 1, "vocab_size": rows, "tie_word_embeddings": tied, **special}
        (folder / "config.json").write_text(json.dumps(config) + "\n")
        if pieces:
            write_tokenizer(folder, pieces, added)


# By model with modules: its config, and by what stands before a number or a name the number of layers (0 for none) and
# the weights, of which those with `norm` or `bias` in their names are vectors.
_ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
_MLP = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_LLAMA = (*(f"self_attn.{w}" for w in _ATTENTION), *(f"mlp.{w}" for w in _MLP), "input_layernorm.weight",
          "post_attention_layernorm.weight")  # fmt: skip
_BLOCK = (*(f"attn.{w}.{e}" for w in ("qkv", "proj") for e in ("weight", "bias")),
          *(f"mlp.{w[:-7]}.{e}" for w in _MLP for e in ("weight", "bias")), "norm1.weight", "norm2.weight")  # fmt: skip
_BART = ("self_attn.k_proj.weight", "fc1.weight", "fc1.bias", "fc2.weight", "final_layer_norm.weight")
_T5_ATTENTION = tuple(f"{w}.weight" for w in "qkvo")
_T5_MLP = ("layer_norm.weight", *(f"DenseReluDense.{w}.weight" for w in ("wi_0", "wi_1", "wo")))
_T5 = ("layer.0.layer_norm.weight", *(f"layer.0.SelfAttention.{w}" for w in _T5_ATTENTION))
_ONCE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2, "num_key_value_heads": 2}
_TEXT = {**_SIZES, "num_hidden_layers": 4, "vocab_size": HIDDEN}
MODULES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, tuple[str, ...]]]]] = {
    "mistral3": (
        {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
         "text_config": {**_TEXT, "model_type": "mistral"},
         "vision_config": {**_SIZES, "model_type": "pixtral", "num_hidden_layers": 2}},
        {"language_model.model.layers": (4, _LLAMA),
         "language_model": (0, ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")),
         "vision_tower.transformer.layers": (
             2, (*(f"attention.{w}" for w in _ATTENTION), *(f"feed_forward.{w}" for w in _MLP),
                 "attention_norm.weight", "ffn_norm.weight")),
         "vision_tower": (0, ("patch_conv.weight", "ln_pre.weight")),
         "multi_modal_projector": (
             0, ("linear_1.weight", "linear_2.weight", "norm.weight", "patch_merger.merging_layer.weight"))},
    ),
    "qwen2_5_vl": (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
         "text_config": {**_TEXT, "model_type": "qwen2_5_vl_text"},
         "vision_config": {"depth": 2, "hidden_size": HIDDEN, "num_heads": 2, "model_type": "qwen2_5_vl"}},
        {"model.layers": (4, (*_LLAMA, *(f"self_attn.{w}_proj.bias" for w in "qkv"))),
         "model": (0, ("embed_tokens.weight", "norm.weight")), "lm_head": (0, ("weight",)),
         "visual.blocks": (2, _BLOCK),
         "visual": (0, ("patch_embed.proj.weight", "merger.ln_q.weight", "merger.mlp.0.weight", "merger.mlp.0.bias",
                        "merger.mlp.2.weight", "merger.mlp.2.bias"))},
    ),
    "bart": (
        {"architectures": ["BartForConditionalGeneration"], "model_type": "bart", "d_model": HIDDEN,
         "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
         "encoder_ffn_dim": HIDDEN, "decoder_ffn_dim": HIDDEN, "vocab_size": HIDDEN},
        {"model.encoder.layers": (3, _BART), "model.decoder.layers": (2, _BART),
         "model": (0, ("shared.weight", "encoder.layernorm_embedding.weight", "decoder.layernorm_embedding.weight"))},
    ),
    "t5": (
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": HIDDEN, "d_kv": HIDDEN // 2,
         "d_ff": HIDDEN, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2, "vocab_size": HIDDEN,
         "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True},
        {"encoder.block": (3, (*_T5, *(f"layer.1.{w}" for w in _T5_MLP))),
         "decoder.block": (2, (*_T5, "layer.1.layer_norm.weight", *(f"layer.2.{w}" for w in _T5_MLP),
                               *(f"layer.1.EncDecAttention.{w}" for w in _T5_ATTENTION))),
         "encoder": (0, ("final_layer_norm.weight", _ONCE)), "decoder": (0, ("final_layer_norm.weight", _ONCE)),
         "shared": (0, ("weight",))},
    ),
}  # fmt: skip


def write_module_models(root: Path) -> None:
    """base, one and two of each of MODULES."""
    generator = torch.Generator().manual_seed(2)
    for family, (config, parts) in MODULES.items():
        base = {}
        for front, (count, weights) in parts.items():
            for name in [f"{front}.{n}.{weight}" for n in range(count) for weight in weights] or weights:
                shape = (HIDDEN,) if any(word in name for word in ("norm", "bias", "ln_")) else (HIDDEN, HIDDEN)
                base[name if count else f"{front}.{name}"] = torch.randn(shape, generator=generator) * 0.1
        for model in ("base", "one", "two"):
            step = 0.0 if model == "base" else 0.02
            state = {name: t + torch.randn(t.shape, generator=generator) * step for name, t in base.items()}
            (root / family / model).mkdir(parents=True, exist_ok=True)
            save_file(state, root / family / model / "model.safetensors", metadata={"format": "pt"})
            os.chmod(root / family / model / "model.safetensors", 0o644)
            (root / family / model / "config.json").write_text(json.dumps(config) + "\n")


EXPERTS = 3
_PLACES = {"mixtral": ("block_sparse_moe", "MixtralForCausalLM"), "qwen3_moe": ("mlp", "Qwen3MoeForCausalLM")}


def write_expert_models(root: Path) -> None:
    """base, one and two of Mixtral, whose files have experts one by one, and of Qwen3-MoE, whose files have stacks."""
    generator = torch.Generator().manual_seed(3)
    for family, (place, kind) in _PLACES.items():
        sizes = {name: shape for name, shape in shapes(layers=2).items() if ".mlp." not in name}
        for layer in range(2):
            front = f"model.layers.{layer}.{place}"
            sizes[f"{front}.gate.weight"] = (EXPERTS, HIDDEN)
            if family == "mixtral":
                for expert, word in itertools.product(range(EXPERTS), ("w1", "w2", "w3")):
                    size = (HIDDEN, INNER) if word == "w2" else (INNER, HIDDEN)
                    sizes[f"{front}.experts.{expert}.{word}.weight"] = size
            else:
                sizes |= {f"model.layers.{layer}.self_attn.{k}_norm.weight": (HIDDEN // 2,) for k in "qk"}
                sizes[f"{front}.experts.gate_up_proj"] = (EXPERTS, 2 * INNER, HIDDEN)
                sizes[f"{front}.experts.down_proj"] = (EXPERTS, HIDDEN, INNER)
        base = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in sizes.items()}
        numbers = {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 2}
        config = {**CONFIG, **numbers, "architectures": [kind], "model_type": family, "num_hidden_layers": 2,
                  "moe_intermediate_size": INNER, "head_dim": HIDDEN // 2}  # fmt: skip
        for model in ("base", "one", "two"):
            step = 0.0 if model == "base" else 0.02
            # Experts of a layer go far to different degrees: apart they have other thresholds and angles.
            state = {name: t + torch.randn(t.shape, generator=generator) * step * (1 + 2 * ("experts.1." in name))
                     for name, t in base.items()}  # fmt: skip
            for name, tensor in state.items():
                if tensor.ndim == 3:
                    tensor[1] += 2 * (tensor[1] - base[name][1])
            (root / family / model).mkdir(parents=True, exist_ok=True)
            save_file(state, root / family / model / "model.safetensors", metadata={"format": "pt"})
            os.chmod(root / family / model / "model.safetensors", 0o644)
            (root / family / model / "config.json").write_text(json.dumps(config) + "\n")


def write_adapters(root: Path) -> None:
    """lora_1 and lora_2, as peft writes adapters of the base."""
    generator = torch.Generator().manual_seed(1)
    for name in ("lora_1", "lora_2"):
        factors = {}
        for module in ADAPTED:
            for layer in range(LAYERS):
                place = f"model.layers.{layer}.{module}"
                m, n = shapes()[f"{place}.weight"]
                for part, shape in (("A", (RANK, n)), ("B", (m, RANK))):
                    factor = torch.randn(shape, generator=generator) * 0.2
                    factors[f"base_model.model.{place}.lora_{part}.weight"] = factor
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
            "target_modules": [module.rpartition(".")[2] for module in ADAPTED],
            "base_model_name_or_path": "models/base", "bias": "none", "lora_dropout": 0.0, "inference_mode": True,
        }  # fmt: skip
        (root / name).mkdir(parents=True, exist_ok=True)
        save_file(factors, root / name / "adapter_model.safetensors", metadata={"format": "pt"})
        os.chmod(root / name / "adapter_model.safetensors", 0o644)
        (root / name / "adapter_config.json").write_text(json.dumps(config) + "\n")


def make(target: Path, python: str | None = None) -> None:
    """Everything anew, below `target`: models/NAME and merged/CONFIG.safetensors; `python` is one that has mergekit.

    Of a configuration in `drawn`, the mean over many seeds and the share of entries that are not the base's. All
    parameters of all methods are in parameters.json.
    """
    write_models(target / "models")
    write_token_models(target / "models" / "tokens")
    write_module_models(target / "models" / "modules")
    write_expert_models(target / "models" / "experts")
    write_adapters(target / "models")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        python = python or installed(place / "venv")
        (place / "models").symlink_to((target / "models").resolve())
        configs = sorted(CONFIGS.glob("**/*.yml"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [python, "-c", RUN, str(ROUNDS), *map(str, configs)]
        subprocess.run(command, check=True, cwd=place, env=environment)
        (target / "parameters.json").write_bytes((place / "parameters.json").read_bytes())
        for config in configs:
            folder, kept = place / "out" / config.stem, target / "merged" / config.relative_to(CONFIGS)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.with_suffix(".safetensors").write_bytes((folder / "model.safetensors").read_bytes())
            if (folder / "tokenizer.json").exists():
                tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                ids = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
                said = json.loads((folder / "config.json").read_text())
                content = {"vocab_size": said["vocab_size"], "ids": ids}
                kept.with_suffix(".json").write_text(json.dumps(content) + "\n")


def installed(environment: Path) -> str:
    """A new environment with mergekit in it; its Python."""
    python = new_environment(environment)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"mergekit=={VERSION}"], check=True)
    return python


def new_environment(environment: Path) -> str:
    """A new environment whose packages come before those of this one, which serve it as well; its Python."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (next(environment.glob("lib/python*/site-packages")) / "outer.pth").write_text("\n".join(paths))
    return str(environment / "bin" / "python")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else ORACLE, *sys.argv[2:3])
