"""Merges by token load in transformers, with a tokenizer that has each token at the row that was merged for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.errors import PlanError
from tests.support.checkpoints import read

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

_TEXTS = ["the sun is over the sea", "a ship on the sea", "the ships are over there"] * 4
_NEW = {"base": [], "a": ["<|a|>", "<|both|>"], "b": ["<|both|>", "<|b|>"]}
_SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of the family, trained on a few lines."""
    if kind == "bert":
        inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=70, special_tokens=special)
    elif kind == "t5":
        inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=70, special_tokens=["<s>", "</s>"])
    inner.train_from_iterator(_TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=None)


def model_of(kind: str, rows: int, seed: int) -> Any:
    torch.manual_seed(seed)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=rows, **_SMALL))
    if kind == "t5":
        small = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=rows, **small))
    if kind == "gpt2":
        ends = {"bos_token_id": 0, "eos_token_id": 1}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, **ends)
        )
    tied = kind == "tied llama"
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, **_SMALL)
    )


def family(kind: str, root: Path, *, padding: int = 0) -> list[Path]:
    """A base and two experts that added tokens and rows to it."""
    paths = []
    for seed, (name, new) in enumerate(_NEW.items()):
        tokenizer = tokenizer_of(kind)
        tokenizer.add_tokens([transformers.AddedToken(token, special=True) for token in new])
        model = model_of(kind, max(len(tokenizer), padding), seed)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        paths.append(root / name)
    return paths


@pytest.mark.parametrize("padding", [0, 128])
@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2", "bert", "t5"])
def test_a_union_loads_with_every_token_at_its_row(kind: str, padding: int, tmp_path: Path) -> None:
    paths = family(kind, tmp_path, padding=padding)
    with pytest.raises(PlanError):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="task-arithmetic")
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="task-arithmetic", vocab="union")
    assert any("follow as added tokens: '<|a|>', '<|both|>', '<|b|>'" in note for note in manifest["notes"])
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    base, a, b = (transformers.AutoTokenizer.from_pretrained(path) for path in paths)
    assert base.get_vocab().items() <= merged.get_vocab().items()
    assert merged.get_vocab().keys() == base.get_vocab().keys() | a.get_vocab().keys() | b.get_vocab().keys()
    assert (
        "<|b|>" in merged.all_special_tokens
        or merged.added_tokens_decoder[merged.convert_tokens_to_ids("<|b|>")].special
    )
    loader = type(model_of(kind, 80, 0))
    model, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    experts = [loader.from_pretrained(path) for path in paths[1:]]
    rows, *theirs = (m.get_input_embeddings().weight.detach() for m in (model, *experts))
    assert len(rows) == model.config.vocab_size == max(padding, len(merged))
    for token, owners in (("<|a|>", [0]), ("<|b|>", [1]), ("<|both|>", [0, 1])):
        row = rows[merged.convert_tokens_to_ids(token)]
        each = [theirs[i][(a, b)[i].convert_tokens_to_ids(token)] for i in owners]
        if len(each) == 1:
            assert torch.equal(row, each[0])
        torch.testing.assert_close(row, torch.stack(each).mean(0), rtol=0, atol=1e-6)
    ids = merged("the sea <|a|> <|b|>")["input_ids"]
    assert merged.convert_tokens_to_ids("<|a|>") in ids
    assert ids[:2] == base("the sea")["input_ids"][:2]


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2"])
def test_a_mergekit_yamls_union_loads_with_its_template(kind: str, tmp_path: Path) -> None:
    paths = family(kind, tmp_path, padding=128)
    models = [f"{{model: {path}, parameters: {{weight: 0.5, density: 0.5}}}}" for path in paths[1:]]
    (tmp_path / "c.yml").write_text(
        f"merge_method: ties\nbase_model: {paths[0]}\nmodels: [{', '.join(models)}]\nchat_template: chatml\n"
        "tokenizer: {pad_to_multiple_of: 16, tokens: {<|new|>: {source: {kind: zero}}}}\n"
    )
    modelmerge.replay(tmp_path / "c.yml", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {"<|a|>", "<|both|>", "<|b|>", "<|new|>"} <= tokenizer.get_vocab().keys()
    model, info = type(model_of(kind, 80, 0)).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    rows = model.get_input_embeddings().weight
    assert len(tokenizer) <= len(rows) == model.config.vocab_size == -(-len(tokenizer) // 16) * 16
    torch.testing.assert_close(rows[-1], rows[: len(tokenizer)].mean(0), rtol=0, atol=0.02)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the sea <|a|>"}], tokenize=False)
    assert text == "<|im_start|>user\nthe sea <|a|><|im_end|>\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.convert_tokens_to_ids("<|a|>") in ids
    assert model(ids).logits.shape == (*ids.shape, len(rows))


def test_an_experts_vocabulary_comes_with_its_tokenizer_and_ids(tmp_path: Path) -> None:
    base, a, _ = family("llama", tmp_path)
    shuffled = tmp_path / "moved"
    tokenizer = tokenizer_of("llama")
    size = len(tokenizer)
    order = [1, 0, *range(size - 1, 1, -1)]  # </s> and <s> as well
    inner = tokenizer.backend_tokenizer.to_str()
    content = json.loads(inner)
    content["model"]["vocab"] = {t: order.index(i) for t, i in content["model"]["vocab"].items()}
    for entry in content["added_tokens"]:
        entry["id"] = order.index(entry["id"])
    moved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)))
    model = model_of("llama", size, 7)
    model.config.eos_token_id, model.config.bos_token_id = 0, 1
    model.generation_config.eos_token_id, model.generation_config.bos_token_id = 0, 1
    model.save_pretrained(shuffled)
    moved.save_pretrained(shuffled)
    modelmerge.merge(base, [a, shuffled], tmp_path / "out", method="average", vocab="moved")
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.get_vocab() == moved.get_vocab()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (0, 0)
    rows, one, other = (read(path)["model.embed_tokens.weight"] for path in (tmp_path / "out", a, shuffled))
    for token, at in moved.get_vocab().items():
        want = (one[tokenizer.get_vocab()[token]] + other[at]) / 2
        torch.testing.assert_close(rows[at], want, rtol=0, atol=1e-6)
    with pytest.raises(PlanError, match="files_from moved: its tokenizer numbers"):
        modelmerge.merge(base, [a, shuffled], tmp_path / "no", method="average", files_from="moved",
                         exclude=["*embed*", "lm_head*"])  # fmt: skip


def test_files_without_tokenizer_json_get_the_tokens_too(tmp_path: Path) -> None:
    paths = family("gpt2", tmp_path)
    for path in paths:
        inner = json.loads((path / "tokenizer.json").read_text())
        (path / "tokenizer.json").unlink()
        (path / "tokenizer_config.json").unlink()
        (path / "vocab.json").write_text(json.dumps(inner["model"]["vocab"]))
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in inner["model"]["merges"]]
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        added = {
            entry["content"]: entry["id"]
            for entry in inner["added_tokens"]
            if entry["id"] >= len(inner["model"]["vocab"])
        }
        if added:
            (path / "added_tokens.json").write_text(json.dumps(added))
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", vocab="union")
    merged = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "out")
    size = len(json.loads((tmp_path / "out" / "vocab.json").read_text()))
    assert [merged.convert_tokens_to_ids(token) for token in ("<|a|>", "<|both|>", "<|b|>")] == [
        size,
        size + 1,
        size + 2,
    ]
