"""What `--dry-run` promises for models that nobody has to have: `python -m tests.benchmarks.promises`.

A dry run reads headers only, so files without data will do: they have the size of the models, and take no disk.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from math import prod
from pathlib import Path

from modelmerge.cli import main

# Llama 2: width, width of the MLP, layers, width of keys and values.
MODELS = {"7B": (4096, 11008, 32, 4096), "70B": (8192, 28672, 80, 1024)}
VOCABULARY = 32000
EXPERTS = 8
METHODS = (
    "average", "task-arithmetic", "dare", "ties", "iso-c", "tsv-m", "apgd", "kron", "wudi", "knots", "svc",
    "actmat", "ace",
)  # fmt: skip


def shapes(width: int, inner: int, layers: int, keys: int) -> dict[str, tuple[int, ...]]:
    layer = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    inside = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    tables = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width)}
    return {**tables, **inside, "model.norm.weight": (width,)}


def write(directory: Path, tensors: dict[str, tuple[int, ...]]) -> str:
    """A bfloat16 model whose data is a hole in the file; its path."""
    directory.mkdir(parents=True)
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return str(directory)


def plan(method: str, models: list[str], out: Path) -> dict[str, float]:
    """GB that a merge reads, writes and holds."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["merge", method, *models, "-o", str(out), "--device", "cpu", "--dry-run", "--json"])
    assert code == 0, printed.getvalue()
    plan = json.loads(printed.getvalue())["plan"]
    sizes = {"reads": plan["bytes"]["read"], "writes": plan["bytes"]["write"], "holds": plan["peak_memory"]["host"]}
    return {what: size / 1e9 for what, size in sizes.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"Base and {EXPERTS} bfloat16 experts, GB.\n")
        print("| | " + " | ".join(f"{model}: reads | writes | peak memory" for model in MODELS) + " |")
        print("|---" + "|---:" * 3 * len(MODELS) + "|")
        rows: dict[str, list[float]] = {method: [] for method in METHODS}
        for model, sizes in MODELS.items():
            tensors = shapes(*sizes)
            names = ["base", *(f"expert-{i}" for i in range(EXPERTS))]
            models = [write(Path(folder, model, name), tensors) for name in names]
            for method in METHODS:
                rows[method] += plan(method, models, Path(folder, "out")).values()
        for method, row in rows.items():
            print(f"| `{method}` | " + " | ".join(f"{size:.3g}" for size in row) + " |")
