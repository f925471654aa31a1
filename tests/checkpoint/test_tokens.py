"""Which token has which id, by the files beside a model's weights: as the libraries that run them have it."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.checkpoint.tokens import Tokenizer, tokenizer_of
from modelmerge.errors import CheckpointError
from tests.support.checkpoints import write

_PIECE = {"rank": 0, "token_bytes": "YQ=="}
_TEXTS = ["the sun is over the sea", "a ship on the sea", "the ships are over there"] * 4


def beside(directory: Path, files: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a model that has these files beside its weights."""
    write(directory, {"w": torch.zeros(1)}, config=False)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(data)
    tokenizer = tokenizer_of(open_checkpoint(parse(str(directory))))
    assert tokenizer is not None
    return tokenizer


def piece(text: str) -> bytes:
    """An entry of a SentencePiece model: the piece, its score, its type."""
    data = text.encode()
    inner = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", -1.5) + b"\x18\x01"
    return b"\x0a" + bytes([len(inner)]) + inner


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "Unigram", "WordLevel"])
def test_tokenizer_json_has_the_ids_of_its_library(kind: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, kind)())
    tokenizer.pre_tokenizer = (
        tokenizers.pre_tokenizers.ByteLevel() if kind == "BPE" else tokenizers.pre_tokenizers.Whitespace()
    )
    trainer = getattr(tokenizers.trainers, f"{kind.replace('BPE', 'Bpe')}Trainer")(
        vocab_size=60, special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<|new|>", special=True, lstrip=True)])
    mine = beside(tmp_path / "m", {"tokenizer.json": tokenizer.to_str().encode()})
    assert mine.ids == tokenizer.get_vocab(with_added_tokens=True)
    assert mine.additions["<|new|>"][1] == {
        "single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    assert mine.following == tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<|next|>"])
    assert tokenizer.token_to_id("<|next|>") == mine.following


def test_other_kinds_of_files(tmp_path: Path) -> None:
    small = {"a": 0, "b": 1}
    files = {"vocab.json": small, "merges.txt": b"#version\n", "added_tokens.json": {"<x>": 2}}
    assert beside(tmp_path / "gpt", files).ids == {"a": 0, "b": 1, "<x>": 2}
    config = {"added_tokens_decoder": {"2": {"content": "<x>", "special": True}}}
    assert beside(tmp_path / "slow", {"vocab.json": small, "tokenizer_config.json": config}).ids == {**small, "<x>": 2}
    assert beside(tmp_path / "bert", {"vocab.txt": b"[PAD]\nthe\n##s\n"}).ids == {"[PAD]": 0, "the": 1, "##s": 2}
    pieces = b"".join(map(piece, ["<unk>", "\u2581the", "s"])) + b"\x12\x02\x08\x01"
    assert beside(tmp_path / "llama", {"tokenizer.model": pieces}).ids == {"<unk>": 0, "\u2581the": 1, "s": 2}
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate([b"a", b" the", b"\xff"]))
    ranked = {"a": 0, "\u0120the": 1, "\u00ff": 2}
    assert beside(tmp_path / "tiktoken", {"tokenizer.model": lines}).ids == ranked
    assert beside(tmp_path / "qwen", {"qwen.tiktoken": lines}).ids == ranked
    tekken = {
        "config": {"default_vocab_size": 5, "default_num_special_tokens": 2},
        "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}],
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate([b"a", b" b", b"c", b"d"])
        ],
    }
    got = beside(tmp_path / "tekken", {"tekken.json": tekken})
    assert got.ids == {"<unk>": 0, "<s>": 1, "a": 2, "\u0120b": 3, "c": 4}
    assert got.following is None
    assert beside(tmp_path / "other", {"sentencepiece.bpe.model": pieces}).ids is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"), ("tokenizer.json", []), ("tokenizer.json", {"model": {"vocab": {"a": "0"}}}),
        ("tokenizer.json", {"model": {"vocab": {"a": -1}}}), ("tokenizer.json", {"model": {"vocab": [0.5]}}),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}), ("vocab.json", ["a"]),
        ("tokenizer.model", b"\x0a\xff\xff"), ("tokenizer.model", b""), ("tokenizer.model", b"<html>not found</html>"),
        ("vocab.txt", b"\xff\xfe\x00"), ("tekken.json", {"vocab": []}),
        ("tokenizer.json", {"model": {"vocab": {"a": 2**31}}}),
        ("tokenizer.json", {"added_tokens": 5, "model": {"vocab": {}}}),
        ("tekken.json", {"config": {"default_vocab_size": 5, "default_num_special_tokens": -5}, "vocab": [_PIECE]}),
        ("tekken.json", {"config": {"default_vocab_size": 5, "default_num_special_tokens": 1}, "vocab": [_PIECE],
                         "special_tokens": [{"rank": 0, "token_str": None}]}),
    ],
)  # fmt: skip
def test_what_is_malformed_is_named(name: str, content: Any, tmp_path: Path) -> None:
    tokenizer = beside(tmp_path / "m", {name: content})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        assert tokenizer.ids is None


def test_equal_files_are_not_parsed(tmp_path: Path) -> None:
    vocabulary = {f"token{i}": i for i in range(100)}
    content = {"tokenizer.json": {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}}
    tokenizers = [beside(tmp_path / str(i), content) for i in range(9)]
    assert all(tokenizer.same_files(tokenizers[0]) for tokenizer in tokenizers[1:])
    assert "ids" not in tokenizers[1].__dict__
