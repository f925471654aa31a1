"""Rows of embeddings and heads are merged by token where tokenizers differ, and never otherwise by mistake."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import modelmerge
from modelmerge.errors import PlanError, UsageError
from modelmerge.methods import registry
from tests.support.checkpoints import State, read, write
from tests.support.hub_server import FakeHub
from tests.support.methods import takes

EMBED, HEAD, BIAS, LINEAR = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.0.up.weight"
_WIDTH = 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, tokens: int) -> State:
    """A model with so many rows: an embedding, a head with a bias, and a layer."""
    return {
        EMBED: draw(seed, tokens, _WIDTH), HEAD: draw(seed + 1, tokens, _WIDTH), BIAS: draw(seed + 2, tokens),
        LINEAR: draw(seed + 3, 6, 5), "model.norm.weight": draw(seed + 4, 6),
    }  # fmt: skip


def save(directory: Path, tensors: State, tokens: Sequence[str] | None, extra: dict[str, Any] | None = None) -> Path:
    """A checkpoint whose tokenizer has these tokens at these places."""
    write(directory, tensors, config=False)
    vocabulary = {token: i for i, token in enumerate(tokens or ()) if token}
    rows = len(tensors[EMBED])
    (directory / "config.json").write_text(json.dumps({"vocab_size": rows, **(extra or {})}))
    if tokens is not None:
        content = {"added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]}}
        (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def permuted(tensors: State, order: Sequence[int]) -> State:
    """The rows of all tables in another order."""
    return {n: t[list(order)].contiguous() if n in (EMBED, HEAD, BIAS) else t for n, t in tensors.items()}


_ORDER = [3, 0, 2, 5, 1, 4, 6]
_TOKENS = "abcdefg"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base, an expert, and the same expert with its tokens in another order."""
    expert = state(20, 7)
    return [
        save(tmp_path / "base", state(1, 7), _TOKENS), save(tmp_path / "a", state(10, 7), _TOKENS),
        save(tmp_path / "b", expert, _TOKENS),
        save(tmp_path / "moved" / "b", permuted(expert, _ORDER), [_TOKENS[i] for i in _ORDER]),
    ]  # fmt: skip


def test_other_tokens_are_refused_with_the_first_that_differ(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        modelmerge.merge(models[0], [models[1], models[3]], tmp_path / "out", method="average")
    assert "'b': 5 tokens of another id: 'a' (0 in the base, 1 in b), 'd' (3 in the base, 0" in caught.value.message
    for option in ("vocab", "exclude", "common-rows"):
        assert option in (caught.value.hint or "")
    modelmerge.merge(models[0], [models[3]], tmp_path / "out", method="average", exclude=[EMBED, "lm_head*"])
    with pytest.raises(PlanError, match="number their tokens differently"):
        modelmerge.extract(models[0], [models[3]], tmp_path / "vectors")


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "adamerging"])
def test_a_permuted_expert_merges_as_it_does_in_order(name: str, models: list[Path], tmp_path: Path) -> None:
    base, a, b, moved = models
    few = takes(name, 2) < 2
    modelmerge.merge(base, [b] if few else [a, b], tmp_path / "one", method=name)
    modelmerge.merge(base, [moved] if few else [a, moved], tmp_path / "two", method=name, vocab="base")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_vocabulary_of_equal_tokens_changes_nothing(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(*models[:1], models[1:3], tmp_path / "plain", method="ties")
    for vocab in ("base", "union", "a"):
        modelmerge.merge(*models[:1], models[1:3], tmp_path / f"of {vocab}", method="ties", vocab=vocab)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / f"of {vocab}" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_an_experts_vocabulary_is_the_merge_in_its_order(models: list[Path], tmp_path: Path) -> None:
    base, a, _, moved = models
    modelmerge.merge(base, [a, moved], tmp_path / "base_s", method="ties", vocab="base")
    manifest = modelmerge.merge(base, [a, moved], tmp_path / "bs", method="ties", vocab="b")
    ours, theirs = read(tmp_path / "base_s"), read(tmp_path / "bs")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in permuted(ours, _ORDER).items())
    assert (tmp_path / "bs" / "tokenizer.json").read_bytes() == (moved / "tokenizer.json").read_bytes()
    assert manifest["recipe"]["vocab"] == "b"
    assert "--vocab b" in manifest["command"]
    modelmerge.replay(tmp_path / "bs", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "bs/model.safetensors").read_bytes()


def grown(root: Path, *, rows: int = 0) -> list[Path]:
    """A base of five tokens, and experts with one token of each alone and one of both, or as many rows as all."""
    tokens = [list("abcde"), [*"abcde", "<a>", "<both>"], [*"abcde", "<both>", "<b>"]]
    names = ["base", "a", "b"]
    return [
        save(root / name, state(10 * i, max(rows, len(each))), each, {"eos_token_id": 1})
        for i, (name, each) in enumerate(zip(names, tokens, strict=True))
    ]


@pytest.mark.parametrize("rows", [0, 7, 12])
def test_union_has_every_token(rows: int, tmp_path: Path) -> None:
    paths = grown(tmp_path, rows=rows)
    base, a, b = map(read, paths)
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", vocab="union")
    out = read(tmp_path / "out")
    for name in (EMBED, HEAD, BIAS):
        assert len(out[name]) == max(rows, 8)  # a b c d e <a> <both> <b>
        assert torch.equal(out[name][5], a[name][5])
        torch.testing.assert_close(out[name][6], (a[name][6] + b[name][5]) / 2, rtol=0, atol=1e-6)
        assert torch.equal(out[name][7], b[name][6])
        torch.testing.assert_close(out[name][:5], (a[name][:5] + b[name][:5]) / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(out[name][8:], (a[name][8:] + b[name][8:]) / 2, rtol=0, atol=1e-6)
    del base
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"vocab_size": max(rows, 8), "eos_token_id": 1}
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [(entry["id"], entry["content"]) for entry in added] == [(5, "<a>"), (6, "<both>"), (7, "<b>")]
    assert manifest["recipe"]["vocab"] == "union"
    with pytest.raises(PlanError):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "no", method="average")


@pytest.mark.parametrize("name", ["ties", "task-arithmetic", "dare", "kron", "slerp", "model-stock", "karcher"])
def test_only_those_that_have_a_token_make_its_row(name: str, tmp_path: Path) -> None:
    options = {"density": 1.0} if name in ("ties", "dare") else {}
    paths = [
        save(tmp_path / "base", state(0, 4), "abcd"), save(tmp_path / "a", state(10, 3), "abc"),
        save(tmp_path / "b", state(20, 3), "abd"),
    ]  # fmt: skip
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method=name, vocab="base", **options)
    out, base, b = read(tmp_path / "out"), read(paths[0]), read(paths[2])
    assert out[EMBED].shape == (4, _WIDTH)
    assert bool(out[EMBED].isfinite().all())
    assert not torch.equal(out[EMBED][3], base[EMBED][3])
    if name in ("slerp", "kron"):  # alone it is averaged
        torch.testing.assert_close(out[EMBED][3], b[EMBED][2], rtol=0, atol=1e-6)


def test_tokens_that_the_base_alone_has_are_copied(tmp_path: Path) -> None:
    paths = [save(tmp_path / "base", state(0, 4), "abcd"), save(tmp_path / "a", state(10, 3), "abd")]
    plan = modelmerge.merge(paths[0], paths[1:], method="average", vocab="base", dry_run=True)
    actions = {t["name"]: t["action"] for t in plan["tensors"]}
    assert actions[f"{EMBED}[2:3]"] == "copy"
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", vocab="base")
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "as a", method="average", vocab="a")
    assert "1 token of 'base' is left out." in manifest["notes"]
    out, base, a = read(tmp_path / "out"), read(paths[0]), read(paths[1])
    for name in (EMBED, HEAD, BIAS):
        assert torch.equal(out[name][2], base[name][2])
        torch.testing.assert_close(out[name][3], a[name][2], rtol=0, atol=1e-6)


def test_two_experts_with_other_tokens_at_one_place_are_refused(tmp_path: Path) -> None:
    paths = [
        save(tmp_path / name, state(i, 8), [*"abc", *more]) for i, (name, more) in enumerate(
            (("base", ()), ("a", ("<x>",)), ("b", ("<y>",)))
        )
    ]  # fmt: skip
    with pytest.raises(PlanError) as caught:
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average")
    assert "'<x>' (no token in the base, 3 in a)" in caught.value.message
    assert "'<y>' (no token in the base, 3 in b)" in caught.value.message
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", vocab="union")
    out, a, b = read(tmp_path / "out")[EMBED], read(paths[1])[EMBED], read(paths[2])[EMBED]
    assert torch.equal(out[3], a[3])
    assert torch.equal(out[4], b[3])
    assert len(out) == 8


def test_common_rows_are_those_of_common_tokens(models: list[Path], tmp_path: Path) -> None:
    base, a, _, moved = models
    b = save(tmp_path / "fewer" / "b", {n: t[:5] if n in (EMBED, HEAD, BIAS) else t for n, t in read(moved).items()},
             [_TOKENS[i] for i in _ORDER[:5]])  # fmt: skip
    manifest = modelmerge.merge(base, [a, b], tmp_path / "out", method="average", on_mismatch="common-rows")
    said = "'base': 5 of its 7 rows of tokens, which all models have, are merged by token; the others stay."
    assert said in manifest["notes"]
    out, origin, one, other = read(tmp_path / "out"), read(base), read(a), read(b)
    for name in (EMBED, HEAD, BIAS):
        for row, token in enumerate(_TOKENS):
            place = [_TOKENS[i] for i in _ORDER[:5]].index(token) if _ORDER.index(row) < 5 else None
            want = origin[name][row] if place is None else (one[name][row] + other[name][place]) / 2
            torch.testing.assert_close(out[name][row], want, rtol=0, atol=1e-6)


def test_without_tokenizers_rows_go_by_number_and_that_is_said(tmp_path: Path) -> None:
    paths = [save(tmp_path / "base", state(0, 5), "abcde"), save(tmp_path / "a", state(9, 4), None)]
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="average", on_mismatch="common-rows")
    said = [note for note in manifest["notes"] if "cannot be compared" in note]
    assert said == [
        "'a': its tokenizer cannot be compared with the base's: there are no tokenizer files beside its weights."
    ]
    with pytest.raises(PlanError, match="the tokens of 'a' cannot be told"):
        modelmerge.merge(paths[0], paths[1:], tmp_path / "out2", method="average", vocab="base")
    manifest = modelmerge.merge(paths[0], paths[1:], tmp_path / "out3", method="average", exclude=[EMBED, "lm_head*"])
    assert not any("tokenizer" in note for note in manifest["notes"])


@pytest.mark.parametrize("transposed", [True, False])
def test_an_adapters_rows_go_by_token(transposed: bool, tmp_path: Path) -> None:
    paths = grown(tmp_path)[:2]
    left, right = draw(5, 5, 2), draw(6, 2, _WIDTH)
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    keys = ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B") if transposed else (
        "lm_head.lora_B.weight", "lm_head.lora_A.weight")  # fmt: skip
    factors = (left.T, right.T) if transposed else (left, right)
    save_file({f"base_model.model.{k}": f.contiguous() for k, f in zip(keys, factors, strict=True)},
              folder / "adapter_model.safetensors")  # fmt: skip
    modelmerge.merge(paths[0], [paths[1], folder], tmp_path / "out", method="task-arithmetic", scale=1.0, vocab="a")
    name = EMBED if transposed else HEAD
    out, base, a = (read(path)[name] for path in (tmp_path / "out", *paths))
    torch.testing.assert_close(out[:5], base + (a[:5] - base + left @ right), rtol=0, atol=1e-5)
    assert torch.equal(out[5:], a[5:])


def test_tables_of_other_shapes(tmp_path: Path) -> None:
    """A head that is tied and left out, and a bias that is stored as one row."""
    tokens = ["abc", "abcx"]
    for i, name in enumerate(("base", "a")):
        n = len(tokens[i])
        table = draw(i, n, _WIDTH)
        tensors = {"model.shared.weight": table, "lm_head.weight": table.clone(), EMBED: table.clone(),
                   "final_logits_bias": draw(i + 5, 1, n), LINEAR: draw(i, 6, 5)}  # fmt: skip
        save(tmp_path / name, tensors, tokens[i])
    modelmerge.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="ties", vocab="union")
    out, a = read(tmp_path / "out"), read(tmp_path / "a")
    assert out["final_logits_bias"].shape == (1, 4)
    assert torch.equal(out["final_logits_bias"][0, 3], a["final_logits_bias"][0, 3])
    assert torch.equal(out["lm_head.weight"], out["model.shared.weight"])
    assert torch.equal(out[EMBED], out["model.shared.weight"])


def test_excluded_tables_keep_the_bases_rows_and_get_the_new(tmp_path: Path) -> None:
    paths = grown(tmp_path)
    modelmerge.merge(paths[0], paths[1:], tmp_path / "out", method="ties", vocab="union", exclude=[EMBED])
    out, base, a = (read(path)[EMBED] for path in (tmp_path / "out", *paths[:2]))
    assert torch.equal(out[:5], base)
    assert torch.equal(out[5], a[5])


def test_what_cannot_be_meant_is_refused(models: list[Path], tmp_path: Path) -> None:
    base, a, b, moved = models
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="must be base, union or an expert, not 'c'"):
        modelmerge.merge(base, [a, b], out, method="average", vocab="c")
    paths = grown(tmp_path / "grown")
    with pytest.raises(UsageError, match="token by token"):
        modelmerge.merge(paths[0], paths[1:], out, method="average", vocab="union", as_lora=2)
    modelmerge.merge(base, [a, moved], out, method="average", vocab="base", as_lora=2)
    out = tmp_path / "whole"
    odd = save(tmp_path / "odd", {**state(0, 7), "model.counts": draw(1, 7)}, _TOKENS)
    other = save(tmp_path / "more", {**state(1, 8), "model.counts": draw(1, 7)}, [*_TOKENS, "h"])
    with pytest.raises(PlanError, match=r"'model.counts' \[7\] may have a row for each token"):
        modelmerge.merge(odd, [other], out, method="average", vocab="union")
    modelmerge.merge(odd, [other], out, method="average", vocab="union", exclude=["model.counts"])
    assert len(read(out)[EMBED]) == 8


def adapter(folder: Path, tensors: State, tokens: str | Sequence[str] | None, **config: Any) -> Path:
    """A PEFT adapter, with a tokenizer of its own if `tokens` are given."""
    folder.mkdir()
    entries = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    if tokens is not None:
        content = {"model": {"vocab": {token: i for i, token in enumerate(tokens)}}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


_UP = {"model.layers.0.up.lora_A.weight": draw(1, 2, 5), "model.layers.0.up.lora_B.weight": draw(2, 6, 2)}


def test_an_adapter_that_grew_its_vocabulary_brings_its_tokens(tmp_path: Path) -> None:
    paths = grown(tmp_path)
    tables = {EMBED: draw(3, 6, _WIDTH), HEAD: draw(4, 6, _WIDTH), BIAS: draw(5, 6)}
    lora = adapter(tmp_path / "lora", {**_UP, **tables}, [*"abcde", "<l>"], modules_to_save=["embed_tokens", "lm_head"])
    modelmerge.merge(paths[0], [paths[1], lora], tmp_path / "out", method="average", vocab="union")
    out, a = read(tmp_path / "out"), read(paths[1])
    for name, table in tables.items():
        assert torch.equal(out[name][7], table[5])
        torch.testing.assert_close(out[name][:5], (a[name][:5] + table[:5]) / 2, rtol=0, atol=1e-6)


def test_an_adapters_tokens_in_padding_are_the_bases_rows(tmp_path: Path) -> None:
    base = save(tmp_path / "base", state(0, 8), "abcde")
    lora = adapter(tmp_path / "lora", _UP, [*"abcde", "<l>"])
    modelmerge.merge(base, [lora], tmp_path / "plain", method="average")
    modelmerge.merge(base, [lora], tmp_path / "out", method="average", vocab="union")
    out, plain = read(tmp_path / "out"), read(tmp_path / "plain")
    assert all(torch.equal(out[name], plain[name]) for name in plain)
    assert "<l>" in (tmp_path / "out" / "tokenizer.json").read_text()


def test_a_rescaled_change_of_a_table_is_not_cut(tmp_path: Path) -> None:
    paths = grown(tmp_path)[:2]
    dora = {"lm_head.lora_A.weight": draw(1, 2, _WIDTH), "lm_head.lora_B.weight": draw(2, 5, 2),
            "lm_head.lora_magnitude_vector": draw(3, 5)}  # fmt: skip
    lora = adapter(tmp_path / "dora", dora, None, use_dora=True)
    modelmerge.merge(paths[0], [lora], tmp_path / "one", method="average", vocab="union")
    fewer = save(tmp_path / "c", state(30, 3), "abd")
    with pytest.raises(PlanError, match=r"its change to 'lm_head\.weight' cannot be put into another order"):
        modelmerge.merge(paths[0], [lora, fewer], tmp_path / "two", method="average", vocab="base")


def test_union_from_an_experts_tokenizer_moves_the_bases_ids(tmp_path: Path) -> None:
    base = save(tmp_path / "base", state(0, 5), "abcde", {"eos_token_id": 1, "image_token_id": 2, "text": [1, 2]})
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 4], "top_k": 1}')
    a = save(tmp_path / "a", state(10, 4), "bcax")
    manifest = modelmerge.merge(base, [a], tmp_path / "out", method="average", vocab="union", files_from="a")
    out, rows, other = (read(path)[EMBED] for path in (tmp_path / "out", base, a))
    assert len(out) == 6  # b c a x d e
    torch.testing.assert_close(out[:3], other[:3], rtol=0, atol=1e-6)
    assert torch.equal(out[3], other[3])
    assert torch.equal(out[4:], rows[3:])
    config, generation = (json.loads((tmp_path / "out" / f"{n}config.json").read_text()) for n in ("", "generation_"))
    assert config == {"vocab_size": 6, "eos_token_id": 0, "image_token_id": 1, "text": [1, 2]}
    assert generation == {"eos_token_id": [0, 5], "top_k": 1}
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [(entry["id"], entry["content"], entry["single_word"]) for entry in added] == [
        (4, "d", True),
        (5, "e", True),
    ]
    assert any("Of these 2 are ordinary pieces" in note for note in manifest["notes"])
    with pytest.raises(UsageError, match="files_from"):
        modelmerge.merge(base, [a], tmp_path / "no", method="average", vocab="base", files_from="a")


@pytest.mark.parametrize("files", [["vocab.txt"], ["tokenizer.model"], ["qwen.tiktoken"]])
def test_other_tokenizer_files_get_the_new_tokens_or_say_that_they_cannot(files: list[str], tmp_path: Path) -> None:
    paths = grown(tmp_path)[:2]
    for path in paths:
        vocabulary = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
        (path / "tokenizer.json").unlink()
        pieces = b"".join(b"\x0a%c\x0a%c%s" % (len(t) + 2, len(t), t.encode()) for t in vocabulary)
        ranks = b"".join(b"%s %d\n" % (base64.b64encode(t.encode()), i) for i, t in enumerate(vocabulary))
        lines = "".join(f"{token}\n" for token in vocabulary).encode()
        (path / files[0]).write_bytes({"vocab.txt": lines, "tokenizer.model": pieces}.get(files[0], ranks))
    out = tmp_path / "out"
    if files == ["qwen.tiktoken"]:
        with pytest.raises(PlanError, match=r"2 tokens cannot be added to the tokenizer of 'base', qwen\.tiktoken"):
            modelmerge.merge(paths[0], paths[1:], out, method="average", vocab="union")
        return
    modelmerge.merge(paths[0], paths[1:], out, method="average", vocab="union")
    assert json.loads((out / "added_tokens.json").read_text()) == {"<a>": 5, "<both>": 6}
    if files == ["vocab.txt"]:
        assert (out / "vocab.txt").read_text().split() == [*"abcde", "<a>", "<both>"]


def test_streamed_models_are_aligned_too(hub: FakeHub, tmp_path: Path) -> None:
    paths = grown(tmp_path)
    modelmerge.merge(paths[0], paths[1:], tmp_path / "here", method="ties", vocab="union")
    for path in paths:
        hub.add(f"org/{path.name}", path)
    names = [f"org/{path.name}" for path in paths]
    for stream in (True, False):
        modelmerge.merge(names[0], names[1:], tmp_path / f"there{stream}", method="ties", vocab="union", stream=stream)
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (tmp_path / f"there{stream}" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
