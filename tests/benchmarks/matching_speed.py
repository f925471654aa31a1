"""What matching names costs: 1,200 tensors, eight experts, by names of several kinds.

`python -m tests.benchmarks.matching_speed` writes RESULTS-matching.md beside this file. Nothing is read but headers,
which lie in memory here. The floor is the same plan for experts by the base's own names.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from modelmerge.checkpoint.header import TensorInfo
from modelmerge.checkpoint.matching import match
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.checkpoint.tokens import tokenizer_of
from modelmerge.plan.vocabulary import Tokenizers, compare

LAYERS, EXPERTS, REPEATS = 85, 8, 5
PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm", "a", "b", "c", "d", "e",
)  # fmt: skip
TOKENS = 150_000
RESULTS = Path(__file__).with_name("RESULTS-matching.md")


def model(front: str, name: str, folder: Path) -> Checkpoint:
    """A model of many layers, of which there are headers alone."""
    tensors = {
        f"{front}.{i}.{part}.weight": TensorInfo(f"{front}.{i}.{part}.weight", "BF16", (64, 64), folder, 0, 8192)
        for i in range(LAYERS)
        for part in PARTS
    }
    return Checkpoint(parse(f"{name}={folder}"), tensors, {}, folder, {"model_type": "llama"})


def stacks(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The experts of as many layers, stacked."""
    made = {}
    for i in range(LAYERS):
        for word, shape in (("gate_up_proj", (6, 128, 64)), ("down_proj", (6, 64, 64))):
            name = f"model.layers.{i}.mlp.experts.{word}"
            made[name] = TensorInfo(name, "BF16", shape, next(iter(tensors.values())).file, 0, 8192)
    return made


def singles(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same experts one by one: six in each layer."""
    file = next(iter(tensors.values())).file
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{word}.weight"
        for i in range(LAYERS) for e in range(6) for word in ("gate_proj", "up_proj", "down_proj")
    ]  # fmt: skip
    return {name: TensorInfo(name, "BF16", (64, 64), file, 0, 8192) for name in names}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the median run."""
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def run() -> list[tuple[str, float]]:
    """What each kind costs."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = model("model.layers", "base", folder)
        for front in ("model.layers", "module.model.layers", "model.language_model.layers"):
            experts = [model(front, f"e{i}", folder) for i in range(EXPERTS)]
            rows.append((f"`{front}`", seconds(lambda e=experts: [match(base, each, lambda name: True) for each in e])))
        base.tensors = stacks(base.tensors)
        for each in experts:
            each.tensors = singles(each.tensors)
        rows.append(
            ("1,530 matrices of experts, onto stacks",
             seconds(lambda: [match(base, each, lambda name: True) for each in experts]))
        )  # fmt: skip
        files = []
        for i in range(EXPERTS + 1):
            (folder / str(i)).mkdir()
            vocabulary = {f"token{k}": k for k in range(TOKENS + (i > 1))}
            content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
            (folder / str(i) / "tokenizer.json").write_text(json.dumps(content))
            files.append(Checkpoint(parse(f"e{i}={folder / str(i)}"), {}, {}, folder / str(i), {}))
        for what, models in (("equal files", files[:2] * 4), ("one more token in seven", files)):
            assert tokenizer_of(models[0]) is not None
            rows.append((
                f"{TOKENS:,} tokens, {what}",
                seconds(lambda m=models: compare(Tokenizers(m[0], m[1:]), list(range(1, len(m))), TOKENS)),
            ))  # fmt: skip
    return rows


def main() -> None:
    """Measure, print and write."""
    rows = run()
    floor = rows[0][1]
    lines = [
        "# Matching names and tokens", "",
        f"`python -m tests.benchmarks.matching_speed`: a base of {LAYERS * len(PARTS):,} tensors, {EXPERTS} experts; "
        f"median of {REPEATS}, CPU seconds.", "",
        "| the experts' names | seconds | to the base's own |", "|---|---:|---:|",
        *(f"| {what} | {time_:.3f} | {time_ / floor:.1f} |" for what, time_ in rows), "",
    ]  # fmt: skip
    RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
