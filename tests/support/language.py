"""Small real language models and tasks for them: a T5 and a Llama of a few thousand weights, trained in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

TASKS = Path(__file__).parent.parent.parent / "modelmerge" / "evaluation" / "tasks"
GOOD, BAD = ("lovely", "superb", "warm", "bright"), ("dull", "awful", "cold", "grey")
FILLERS = ("film", "the", "was", "quite", "a", "plot", "and", "its", "end")
COLOURS = ("red", "green", "blue", "white", "black", "pink")
LEVELS = tuple(f"{level / 2:.1f}" for level in range(11))  # 0.0 to 5.0

Doc = dict[str, Any]


@dataclass(frozen=True)
class World:
    """Two trained models, a directory of tasks for them, and the held-out items of each task.

    `t5` can tell sst2 from words, and stsb; `llama` knows which colour came first; `prompts` are T5's, by task.
    """

    t5: Path
    llama: Path
    tasks: Path
    docs: dict[str, list[Doc]]


def sst2(count: int, draw: random.Random) -> list[Doc]:
    docs = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [*draw.choices(FILLERS, k=4), draw.choice((BAD, GOOD)[label])]
        draw.shuffle(words)
        docs.append({"sentence": " ".join(words), "label": label})
    return docs


def stsb(count: int, draw: random.Random, *, odd: float = 0.0) -> list[Doc]:
    """The first sentence tells the level, except that of a share of the labels that are drawn anyhow."""
    docs = []
    for _ in range(count):
        level = draw.randrange(len(LEVELS))
        label = draw.randrange(len(LEVELS)) if draw.random() < odd else level
        docs.append({"sentence1": f"level{level}", "sentence2": draw.choice(FILLERS), "label": label / 2})
    return docs


def colours(count: int, draw: random.Random) -> list[Doc]:
    docs = []
    for _ in range(count):
        shown = draw.sample(COLOURS, 3)
        docs.append({"text": " ".join(shown), "choices": draw.sample(shown, 3), "first": shown[0]})
    return [doc | {"gold": doc["choices"].index(doc["first"])} for doc in docs]


def prompt_sst2(doc: Doc) -> str:
    return f"Given the sentence '{doc['sentence']}', determine the sentiment. Is it positive or negative?"


def prompt_stsb(doc: Doc) -> str:
    return (
        f"Consider the sentences '{doc['sentence1']}' and '{doc['sentence2']}'. On a scale from 1 (completely "
        "different) to 5 (completely similar), rate the similarity."
    )


def build(root: Path) -> World:
    """Train both models and write the tasks."""
    draw = random.Random(0)
    train = {"sst2": sst2(300, draw), "stsb": stsb(300, draw), "colours": colours(400, draw)}
    docs = {"sst2": sst2(60, draw), "stsb": stsb(60, draw, odd=0.3), "colours": colours(60, draw)}
    tasks = root / "tasks"
    for name in ("sst2", "stsb"):
        local_task(tasks, f"flan_t5_glue_{name}", docs[name], include=f"flan_t5_glue_{name}.yaml", dataset_name=None)
    local_task(
        tasks, "first_colour", docs["colours"], output_type="multiple_choice", validation_split="validation",
        doc_to_text="{{text}} first", doc_to_choice="choices", doc_to_target="gold",
        metric_list=[{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return World(_t5(root / "t5", train), _llama(root / "llama", train["colours"]), tasks, docs)
    finally:
        torch.set_num_threads(threads)


def local_task(folder: Path, name: str, docs: Sequence[Doc], *, include: str | None = None, **told: Any) -> None:
    """Write a task, and its items as lines of JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    config = {
        **({"include": str(TASKS / include)} if include else {}), "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}}, **told,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def tokenizer(folder: Path, texts: Iterable[str], *, end: bool) -> Any:
    """A word for each word; with `end`, `</s>` behind every text, as T5 has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def _t5(folder: Path, train: dict[str, list[Doc]]) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    pairs = [(prompt_sst2(doc), ("negative", "positive")[doc["label"]]) for doc in train["sst2"]]
    pairs += [(prompt_stsb(doc), f"{doc['label']:.1f}") for doc in train["stsb"]]
    # Words at the edges of a quotation carry it along.
    edges = [f"'{word}' '{word} {word}' {word}'," for word in (*GOOD, *BAD, *FILLERS)]
    words = tokenizer(folder, [*(text for pair in pairs for text in pair), *edges], end=True)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(words) + 3, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    inputs = words([text for text, _ in pairs], padding=True, return_tensors="pt")
    labels = words([text for _, text in pairs], padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100

    def loss(rows: torch.Tensor) -> torch.Tensor:
        batch = {"input_ids": inputs.input_ids[rows], "attention_mask": inputs.attention_mask[rows]}
        return model(**batch, labels=labels[rows]).loss

    _fit(model, loss, len(pairs), steps=70, rate=4e-3)
    model.save_pretrained(folder)
    return folder


def _llama(folder: Path, train: list[Doc]) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [f"{doc['text']} first {doc['first']}" for doc in train]
    words = tokenizer(folder, texts, end=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    rows_of = words(texts, return_tensors="pt").input_ids

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits = model(rows_of[rows]).logits[:, -2]
        return nn.functional.cross_entropy(logits, rows_of[rows][:, -1])

    _fit(model, loss, len(texts), steps=8, rate=5e-3)
    model.save_pretrained(folder)
    return folder


def _fit(model: nn.Module, loss: Any, count: int, *, steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    draw = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss(torch.randint(count, (32,), generator=draw)).backward()
        optimiser.step()
    model.eval()
