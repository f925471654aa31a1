"""Reading checkpoints: references, headers, indices, tensors and digests."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shlex
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

import modelmerge
from modelmerge.checkpoint import digest
from modelmerge.checkpoint.components import INDEX
from modelmerge.checkpoint.digest import FileDigest, WrittenDigest
from modelmerge.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, read_header
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reader import Checkpoint, open_checkpoint
from modelmerge.checkpoint.reference import Reference, parse, parse_experts
from modelmerge.cli import main
from modelmerge.errors import CheckpointError, ReferenceNotFound, UsageError
from tests.support.checkpoints import base_state, expert_state, read, same, write

# --- malformed weight files ---


def raw(header: object, data: bytes = b"") -> bytes:
    """The bytes of a weight file with that header, JSON or text, true or not."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: tuple[Any, ...] = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# id -> the file's bytes, and what the message must hold beside the file's name
MALFORMED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("only 0 bytes",)),
    "shorter than 8 bytes": (b"\x10\0\0", ("only 3 bytes",)),
    "header reaches beyond the file": (raw({"w": entry(0, 8)})[:30], ("truncated inside its header",)),
    "header of the largest length": (b"\xff" * 8 + b"{}", ("18446744073709551615",)),
    "header above the format's limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", (str(MAX_HEADER_BYTES + 1),)),
    "HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", ("not a safetensors file",)),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
        ("not a safetensors file",),
    ),
    "invalid JSON": (raw('{"w": '), ("not valid JSON",)),
    "header is no text": (raw("x")[:8] + b"\xff", ("not valid JSON",)),
    "header nested without end": (raw(nested(100_000)), ("not valid JSON",)),
    "header with a number of 5000 digits": (raw('{"w": ' + "9" * 5000 + "}"), ()),
    "header is a list": (raw([]), ("not a JSON object",)),
    "tensor is no object": (raw({"w": 3}), ("'w'", "lacks")),
    "tensor without offsets": (raw({"w": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), ("'w'", "data_offsets")),
    "duplicate tensor": (
        raw(f'{{"w": {json.dumps(entry(0, 8))}, "w": {json.dumps(entry(8, 16))}}}', b"\0" * 16),
        ("'w'", "twice"),
    ),
    "unknown dtype": (raw({"w": entry(0, 8, dtype="F33")}, b"\0" * 8), ("'w'", "unknown dtype 'F33'")),
    "dtype is no text": (raw({"w": entry(0, 8, dtype=["F32"])}, b"\0" * 8), ("'w'", "unknown dtype")),
    "negative shape": (raw({"w": entry(0, 8, (-1, -2))}, b"\0" * 8), ("'w'", "[-1, -2]")),
    "shape of booleans": (raw({"w": entry(0, 4, (True,))}, b"\0" * 4), ("'w'", "[True]")),
    "shape of fractions": (raw({"w": entry(0, 8, (2.0,))}, b"\0" * 8), ("'w'", "[2.0]")),
    "negative offset": (raw({"w": entry(-8, 0)}, b"\0" * 8), ("'w'", "[-8, 0]")),
    "three offsets": (
        raw({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, b"\0" * 8),
        ("'w'", "[0, 4, 8]"),
    ),
    "too few bytes for the shape": (raw({"w": entry(0, 4)}, b"\0" * 4), ("'w'", "4 bytes", "needs 8")),
    "too many bytes for the shape": (raw({"w": entry(0, 12)}, b"\0" * 12), ("'w'", "12 bytes", "needs 8")),
    "shape whose bytes overflow 64 bits": (raw({"w": entry(0, 8, (2**62, 2**62))}, b"\0" * 8), ("'w'", "the shape")),
    "shape whose bytes have 5000 digits": (raw({"w": entry(0, 8, (10**18,) * 300)}, b"\0" * 8), ("'w'",)),
    "half a byte of a packed dtype": (raw({"w": entry(0, 2, (3,), "F4")}, b"\0" * 2), ("'w'",)),
    "overlap": (raw({"v": entry(0, 8), "w": entry(4, 12)}, b"\0" * 12), ("'w'", "overlaps")),
    "hole": (raw({"v": entry(0, 8), "w": entry(12, 20)}, b"\0" * 20), ("'w'", "hole")),
    "hole at the start": (raw({"w": entry(4, 12)}, b"\0" * 12), ("'w'", "hole")),
    "empty tensor beyond the data": (raw({"v": entry(0, 8), "w": entry(9999, 9999, (0,))}, b"\0" * 8), ("'w'",)),
    "trailing bytes": (raw({"w": entry(0, 8)}, b"\0" * 11), ("3 bytes after the last tensor",)),
    "truncated data": (raw({"w": entry(0, 8)}, b"\0" * 7), ("truncated",)),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, told = MALFORMED[case]
    file = write(tmp_path / "broken", {}) / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(parse(str(file.parent)))
    assert caught.value.message.startswith(f"{file}: ")
    for words in told:
        assert words in caught.value.message


def test_a_tensor_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    file.write_bytes(raw('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: "):
        open_checkpoint(parse(str(file)))


# --- malformed directories ---


def edit_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / INDEX
    index = json.loads(file.read_bytes())
    changed = change(index)
    file.write_text(json.dumps(index if changed is None else changed))


def place(directory: Path, tensor: str, file: Any) -> None:
    edit_index(directory, lambda index: index["weight_map"].__setitem__(tensor, file))


def move_first_shard_outside(directory: Path, as_written: str) -> None:
    """A shard that is really there, outside, so that only the check of the path can refuse it."""
    shard = directory / "model-00001-of-00003.safetensors"
    outside = directory.parent / "outside.safetensors"
    shard.rename(outside)
    written = as_written.format(outside=outside)
    edit_index(
        directory,
        lambda index: index["weight_map"].update(
            {name: written for name, file in index["weight_map"].items() if file == shard.name}
        ),
    )


def lose_two_shards(directory: Path) -> None:
    for number in (1, 3):
        (directory / f"model-0000{number}-of-00003.safetensors").unlink()


def add_tensor(directory: Path, name: str = "stray", value: Any = None) -> None:
    shard = directory / "model-00002-of-00003.safetensors"
    state = dict(list(base_state().items())[1::3])
    shard.write_bytes(save({**state, name: torch.zeros(2) if value is None else value}))


MALFORMED_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "index is no JSON": (lambda d: (d / INDEX).write_text("<html>"), INDEX, ("malformed",)),
    "index is a list": (lambda d: edit_index(d, lambda index: []), INDEX, ("weight_map",)),
    "index without weight_map": (lambda d: edit_index(d, lambda index: {"metadata": {}}), INDEX, ("weight_map",)),
    "weight_map is a list": (lambda d: edit_index(d, lambda index: {"weight_map": ["a"]}), INDEX, ("weight_map",)),
    "weight_map is empty": (lambda d: edit_index(d, lambda index: {"weight_map": {}}), INDEX, ("weight_map",)),
    "weight_map of numbers": (lambda d: place(d, "logit_scale", 1), INDEX, ("weight_map",)),
    "index nested without end": (lambda d: (d / INDEX).write_text(nested(100_000)), INDEX, ("malformed",)),
    "shard in the parent": (lambda d: move_first_shard_outside(d, "../outside.safetensors"), INDEX, ("outside",)),
    "shard reached by way of a child": (
        lambda d: move_first_shard_outside(d, "a/../../outside.safetensors"), INDEX, ("outside",),
    ),
    "absolute shard": (lambda d: move_first_shard_outside(d, "{outside}"), INDEX, ("outside the directory",)),
    "shard with backslashes": (lambda d: place(d, "logit_scale", "..\\x.safetensors"), INDEX, ("'logit_scale'",)),
    "shard without a name": (lambda d: place(d, "logit_scale", ""), INDEX, ("'logit_scale'",)),
    "shard is a directory": (lambda d: place(d, "logit_scale", "."), "model", ("missing 1 of",)),
    "two shards missing": (
        lose_two_shards, "model",
        ("missing 2 of 3", "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"),
    ),
    "two shards hold a tensor": (
        lambda d: add_tensor(d, "model.embed_tokens.weight", base_state()["model.embed_tokens.weight"]),
        "model-00002-of-00003.safetensors",
        ("'model.embed_tokens.weight'", "so does model-00001-of-00003.safetensors"),
    ),
    "both a single file and an index": (
        lambda d: save_file({"w": torch.zeros(2)}, d / "model.safetensors"), "model",
        ("both model.safetensors and model.safetensors.index.json",),
    ),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json", ("not valid JSON",)),
    "config nested without end": (lambda d: (d / "config.json").write_text(nested(100_000)), "config.json", ()),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED_DIRECTORIES)
def test_a_malformed_directory_is_refused_by_name(case: str, tmp_path: Path) -> None:
    damage, culprit, told = MALFORMED_DIRECTORIES[case]
    directory = write(tmp_path / "model", base_state(), shards=3)
    open_checkpoint(parse(str(directory)))
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(parse(str(directory)))
    where = directory if culprit == "model" else directory / culprit
    assert str(where) in caught.value.message
    for words in told:
        assert words in caught.value.message


@pytest.mark.parametrize("case", ["not listed", "listed elsewhere", "listed and absent"])
def test_of_an_index_that_is_wrong_the_shards_decide_as_in_loaders(case: str, tmp_path: Path) -> None:
    """transformers reads every tensor of every shard that the index names, wherever it places them."""
    directory = write(tmp_path / "model", base_state(), shards=3)
    name = "model.embed_tokens.weight"
    if case == "not listed":
        edit_index(directory, lambda index: index["weight_map"].pop(name) and None)
    elif case == "listed elsewhere":
        place(directory, name, "model-00002-of-00003.safetensors")
    else:
        place(directory, name := "ghost.weight", "model-00002-of-00003.safetensors")
    model = open_checkpoint(parse(str(directory)))
    assert model.tensors.keys() == base_state().keys()
    (remark,) = model.remarks
    assert remark.startswith(f"{INDEX} ")
    assert f"'{name}'" in remark
    assert model.absent == ({name} if case == "listed and absent" else set())


def test_a_truncated_shard_is_named_before_any_tensor_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", base_state(), shards=3)
    shard = directory / "model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: truncated"):
        open_checkpoint(parse(str(directory)))


def test_shards_may_be_symlinks_out_of_the_directory(tmp_path: Path) -> None:
    """As in the Hub's cache."""
    directory = write(tmp_path / "model", base_state(), shards=3)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, shard in enumerate(sorted(directory.glob("*.safetensors"))):
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))
    assert open_checkpoint(parse(str(directory))).tensors.keys() == base_state().keys()


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", base_state())
    weight_map = dict.fromkeys(base_state(), "model.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(parse(str(directory))).tensors.keys() == base_state().keys()


# --- references ---


def test_a_reference_is_named_after_its_directory(tmp_path: Path) -> None:
    write(tmp_path / "math", base_state())
    assert parse(str(tmp_path / "math")).name == "math"
    assert parse(str(tmp_path / "math") + "/").name == "math"


def test_a_reference_to_the_weights_of_a_directory_is_named_after_it(tmp_path: Path) -> None:
    write(tmp_path / "math", base_state())
    assert parse(str(tmp_path / "math" / "model.safetensors")).name == "math"


def test_a_reference_to_a_file_is_named_after_its_stem(tmp_path: Path) -> None:
    save_file(base_state(), tmp_path / "step-100.safetensors")
    assert parse(str(tmp_path / "step-100.safetensors")).name == "step-100"


def test_the_directory_here_is_named_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "math", base_state()))
    assert parse(".").name == "math"
    assert parse("..").name == tmp_path.name


def test_a_name_goes_before_an_equals_sign(tmp_path: Path) -> None:
    directory = write(tmp_path / "checkpoint-7", base_state())
    found = parse(f"math={directory}")
    assert (found.name, found.text, found.path) == ("math", str(directory), directory)


def test_a_path_may_hold_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "lr=1e-5" / "final", base_state())
    assert parse(str(directory)).path == directory
    assert parse(f"math={directory}").name == "math"
    assert parse(f"math={directory}").path == directory
    monkeypatch.chdir(tmp_path)
    assert parse("lr=1e-5/final") == Reference("final", "lr=1e-5/final", directory)
    assert parse("math=lr=1e-5/final").path == directory


NAMES = (
    "\u6570\u5b66", "\u043c\u043e\u0434\u0435\u043b\u044c", "e\u0301cole", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600", "my expert", "run (1)", "epoch=3-step=100", "_x", ".hidden", "a,b", "a: b", "x@y", "a[1]", "[bold]",
    "a.b", "it's", "`x`|<b>",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_whatever_a_directory_can_be_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_state()
    write(tmp_path / "base", base)
    one, two = expert_state(base, 0), expert_state(base, 1)
    write(tmp_path / name, one)
    write(tmp_path / "two", two)
    monkeypatch.chdir(tmp_path)
    assert parse(f"./{name}").name == name
    assert (parse(f"{name}=./two").name, parse(f"{name}=./two").text) == (name, "./two")
    at = f"*q_proj*: {shlex.quote(f'{name}.weight=0')}"
    words = ["merge", "task-arithmetic", "./base", f"./{name}", "./two", "--scale", "1"]
    assert main([*words, "--weight", f"{name}=0.5", "--at", at, "-o", "out"]) == 0
    assert main(["merge", "--recipe", "out/modelmerge.json", "--weight", f"{name}=2", "-o", "again"]) == 0
    assert json.loads(Path("again/modelmerge.json").read_bytes())["recipe"]["weights"] == {name: 2.0, "two": 1.0}
    assert main(["merge", "--recipe", "out/modelmerge.json", "-o", "same"]) == 0
    assert (Path("same/model.safetensors").read_bytes()) == Path("out/model.safetensors").read_bytes()
    assert main(["extract", "./base", f"./{name}", f"{name}2=./two", "-o", "vectors"]) == 0
    assert main(["verify", "again"]) == 0
    up = "model.layers.0.mlp.up_proj.weight"
    got, q = read(Path("out")), "model.layers.0.q_proj.weight"
    assert torch.allclose(got[up], base[up] + 0.5 * (one[up] - base[up]) + two[up] - base[up], atol=1e-6)
    assert torch.allclose(got[q], two[q], atol=1e-6)


def test_a_name_may_be_no_unicode(tmp_path: Path) -> None:
    base, name = base_state(), os.fsdecode(b"\xff\xfe")
    experts = [write(tmp_path / each, expert_state(base, 0)) for each in (name, "two")]
    modelmerge.merge(write(tmp_path / "base", base), experts, tmp_path / "out", method="dare", weights={name: 0.5})
    modelmerge.replay(tmp_path / "out", tmp_path / "again")
    assert same(read(tmp_path / "again"), read(tmp_path / "out"))


def test_of_several_equals_signs_the_first_that_leaves_a_reference_ends_the_name(tmp_path: Path) -> None:
    directory = write(tmp_path / "a=b", base_state())
    assert parse(f"c=d={directory}").name == "c=d"
    for text in ("c=d=./nothing", "c=d=/nothing/a=b"):
        with pytest.raises(ReferenceNotFound, match=r"'[./]+nothing"):
            parse(text)
    for text in (f"..={directory}", f"a/b={directory}", f"={directory}"):
        with pytest.raises(ReferenceNotFound, match="no such file"):
            parse(text)


def test_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = write(tmp_path / "math", base_state())
    assert parse("~/math").path == directory
    assert parse("sums=~/math").path == directory


def test_experts_keep_their_order(tmp_path: Path) -> None:
    for name in ("z", "a", "m"):
        write(tmp_path / name, base_state())
    assert [e.name for e in parse_experts([str(tmp_path / name) for name in ("z", "a", "m")])] == ["z", "a", "m"]


def test_a_mapping_names_the_experts(tmp_path: Path) -> None:
    directory = write(tmp_path / "final", base_state())
    experts = parse_experts(as_references({"math": str(directory), "code": str(directory)}))
    assert [(e.name, e.path) for e in experts] == [("math", directory), ("code", directory)]


def test_two_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "final", base_state()), write(tmp_path / "b" / "final", base_state())
    with pytest.raises(UsageError) as caught:
        parse_experts([str(first), str(second)])
    assert "'final'" in caught.value.message
    assert str(first) in caught.value.message
    assert str(second) in caught.value.message


def test_no_expert_is_refused() -> None:
    with pytest.raises(UsageError, match="no expert"):
        parse_experts([])


@pytest.mark.parametrize("ref", ["./org/name", "/org/name", "~/name", "~/org/name", "../org/name", "./name"])
def test_a_missing_path_never_speaks_of_the_hub(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in (ref, f"math={ref}"):
        with pytest.raises(ReferenceNotFound) as caught:
            parse(text)
        assert f"'{ref}': no such file or directory" in caught.value.message
        assert "Hub" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("ref", ["org/name", "org/name@rev", "org/name@refs/pr/3", "hf://org/name", "hf://org/name@v1"])
@pytest.mark.usefixtures("hub")
def test_a_hub_reference_is_told_apart_from_a_path(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (ref, f"math={ref}"):
        with pytest.raises(ReferenceNotFound) as caught:
            parse(text)
        assert caught.value.message == "'org/name' is neither a path here nor a repository on the Hub that you may see"


def test_a_missing_path_is_told_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("ada", "again", "code", "cars", "dogs", "eyes", "feet", "girl", "math"):
        write(tmp_path / name, base_state())
    with pytest.raises(ReferenceNotFound) as caught:
        parse(str(tmp_path / "maths"))
    assert caught.value.hint == f"did you mean '{tmp_path / 'math'}'?"
    with pytest.raises(ReferenceNotFound) as caught:
        parse(str(tmp_path / "zebra"))
    assert caught.value.hint == f"{tmp_path} holds: ada, again, cars, code, dogs, eyes, feet, girl, ..."


@pytest.mark.parametrize("ref", ["~nobody-of-that-name/model", "x" * 300, "a\0b"], ids=["user", "long", "nul"])
def test_a_path_that_cannot_be_is_not_found(ref: str) -> None:
    with pytest.raises(ReferenceNotFound):
        parse(ref)


def holding(directory: Path, *names: str) -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_bytes(b"x")
    return directory


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickles without index": (lambda t: holding(t / "m", "consolidated.00.pth", "training_args.bin"), "neither"),
    ".gguf": (lambda t: holding(t / "m", "q4.gguf") / "q4.gguf", "GGUF"),
    "directory with .gguf": (lambda t: holding(t / "m", "q4.gguf"), "q4.gguf"),
    ".onnx": (lambda t: holding(t / "m", "m.onnx") / "m.onnx", "ONNX"),
    "empty directory": (lambda t: holding(t / "m"), "holds no checkpoint"),
    "directory without weights": (lambda t: holding(t / "m", "config.json"), "holds no checkpoint"),
    "shards without index": (lambda t: holding(t / "m", "model-00001-of-00002.safetensors"), "neither"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named(case: str, tmp_path: Path) -> None:
    make, kind = UNREADABLE[case]
    path = make(tmp_path)
    with pytest.raises(ReferenceNotFound) as caught:
        open_checkpoint(parse(str(path)))
    assert str(path) in caught.value.message
    assert kind in caught.value.message
    assert caught.value.hint


# --- tensors ---


def stored(model: Checkpoint, name: str, offset: int = 0, length: int | None = None) -> bytes:
    info = model.tensors[name]
    buffer = bytearray(info.nbytes - offset if length is None else length)
    model.read_into(info, offset, memoryview(buffer))
    return bytes(buffer)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


@pytest.mark.parametrize("shards", [1, 4])
def test_every_byte_of_every_tensor_is_read(shards: int, tmp_path: Path) -> None:
    state = base_state(torch.bfloat16)
    model = open_checkpoint(parse(str(write(tmp_path / "m", state, shards=shards))))
    assert model.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert model.tensors[name].shape == tuple(tensor.shape)
        assert stored(model, name) == as_bytes(tensor)
    embedding = as_bytes(state["model.embed_tokens.weight"])
    assert stored(model, "model.embed_tokens.weight", 6, 10) == embedding[6:16]
    model.close()


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    state = {"scalar": torch.tensor(2.5), "none": torch.zeros(0), "rows": torch.zeros(3, 0), "w": torch.ones(2)}
    save_file(state, tmp_path / "m.safetensors")
    model = open_checkpoint(parse(str(tmp_path / "m.safetensors")))
    assert {name: info.shape for name, info in model.tensors.items()} == {
        "scalar": (), "none": (0,), "rows": (3, 0), "w": (2,),
    }  # fmt: skip
    assert [model.tensors[name].numel for name in ("scalar", "none", "rows")] == [1, 0, 0]
    assert stored(model, "scalar") == struct.pack("<f", 2.5)
    assert stored(model, "none") == b""
    model.close()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_is_read(dtype: str, tmp_path: Path) -> None:
    nbytes = 8 * DTYPE_BITS[dtype] // 8
    data = random.Random(0).randbytes(nbytes)
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw({"w": entry(0, nbytes, (2, 4), dtype)}, data))
    model = open_checkpoint(parse(str(file)))
    assert (model.tensors["w"].dtype, model.tensors["w"].nbytes) == (dtype, nbytes)
    assert stored(model, "w") == data
    model.close()


def test_the_header_is_read_as_other_writers_write_it(tmp_path: Path) -> None:
    """Padded with blanks, with metadata, not in the order of the bytes."""
    file = tmp_path / "m.safetensors"
    header = {"w": entry(8, 16), "__metadata__": {"format": "pt", "note": "w"}, "v": entry(0, 8)}
    file.write_bytes(raw(json.dumps(header) + " " * 13, bytes(range(16))))
    assert [(t.name, t.nbytes) for t in read_header(file).values()] == [("v", 8), ("w", 8)]
    model = open_checkpoint(parse(str(file)))
    assert stored(model, "w") == bytes(range(8, 16))
    model.close()


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    model = open_checkpoint(parse(str(tmp_path / "m.safetensors")))
    assert model.tensors == {}
    assert len(model.digests()) == 1
    model.close()


def test_a_file_that_ends_early_names_the_tensor(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", base_state())
    model = open_checkpoint(parse(str(directory)))
    first, *_, last = model.tensors
    stored(model, first)
    model.read_into(model.tensors[last], 0, memoryview(bytearray(1)))  # opens the file
    os.truncate(directory / "model.safetensors", model.tensors[last].start + 1)
    with pytest.raises(CheckpointError, match=f"model.safetensors: ended while tensor '{last}' was read"):
        stored(model, last)
    model.close()


def test_a_file_that_is_gone_when_it_is_opened_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", base_state())
    model = open_checkpoint(parse(str(directory)))
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        stored(model, "logit_scale")


# --- digests ---


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of several of the digest's chunks, and a piece."""
    file = tmp_path / "big"
    file.write_bytes(random.Random(1).randbytes(1_000_003))
    return file


def true_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


READS = {
    "none": [],
    "nothing": [(0, 0)],
    "a few bytes": [(0, 1), (1, 2), (2, 3)],
    "all at once": [(0, 1_000_003)],
    "out of order": [(500_000, 700_000), (0, 5), (700_000, 700_001), (5, 262_144)],
    "backwards": [(999_000, 999_999), (0, 0), (0, 1_000_003)],
}


@pytest.mark.parametrize("reads", READS.values(), ids=READS.keys())
def test_a_digest_follows_reads_in_any_order(reads: list[tuple[int, int]], big: Path) -> None:
    found = FileDigest(big)
    for start, stop in reads:
        assert found.read(memoryview(bytearray(stop - start)), start, follow=True) == stop - start
    assert found.finish() == true_digest(big)
    assert found.finish() == true_digest(big)
    found.close()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_a_digest_follows_writes_in_any_order(order: tuple[int, ...], big: Path, tmp_path: Path) -> None:
    file, content, cuts = tmp_path / "copy", memoryview(big.read_bytes()), (0, 7, 300_000, 300_000, 1_000_003)
    written = WrittenDigest(file, os.open(file, os.O_RDWR | os.O_CREAT))
    for i in order:
        os.pwrite(written.descriptor, content[cuts[i] : cuts[i + 1]], cuts[i])
        written.wrote(cuts[i], content[cuts[i] : cuts[i + 1]])
    assert written.finish() == true_digest(big)
    written.close()


def test_a_digest_follows_writes_of_several_threads(big: Path, tmp_path: Path) -> None:
    file, content, size = tmp_path / "copy", memoryview(big.read_bytes()), 10_007
    written = WrittenDigest(file, os.open(file, os.O_RDWR | os.O_CREAT))

    def write_one(start: int) -> None:
        os.pwrite(written.descriptor, content[start : start + size], start)
        written.wrote(start, content[start : start + size])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_one, range(0, len(content), size)))
    assert written.finish() == true_digest(big)
    written.close()


def test_the_digests_of_a_checkpoint_are_those_of_its_files(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", base_state(), shards=3)
    model = open_checkpoint(parse(str(directory)))
    names = list(model.tensors)
    random.Random(2).shuffle(names)
    for name in names[:5]:
        stored(model, name)
    assert model.digests() == {file: true_digest(file) for file in sorted(directory.glob("*.safetensors"))}
    model.close()


def test_the_digest_at_rest_is_that_of_hashlib(big: Path) -> None:
    assert digest.sha256(big) == true_digest(big)


def grow(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def rewrite(file: Path) -> None:
    """In place, to the same size, at another time."""
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=(0, 1))


def replace(file: Path) -> None:
    """By another file of the same size and time."""
    stat = file.stat()
    other = file.with_suffix(".new")
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(file)


def shrink(file: Path) -> None:
    os.truncate(file, 10)


@pytest.mark.parametrize("change", [grow, rewrite, replace, shrink, Path.unlink])
@pytest.mark.parametrize("read", [0, 500_000, 1_000_003], ids=["unread", "half read", "read"])
def test_a_file_that_changes_while_it_is_open_is_refused(change: Callable[[Path], None], read: int, big: Path) -> None:
    found = FileDigest(big)
    found.read(memoryview(bytearray(read)), 0, follow=True)
    change(big)
    with pytest.raises(CheckpointError, match="big: "):
        found.finish()
    found.close()


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the digests of files however young they are."""
    monkeypatch.setattr(digest, "_SETTLED", -1e9)


def digest_once(file: Path) -> str:
    found = FileDigest(file)
    told = found.finish()
    found.close()
    return told


def forget_how_to_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileDigest, "_advance", lambda *args: pytest.fail("hashed again"))


@pytest.mark.usefixtures("remembering")
def test_a_digest_is_remembered(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digest_once(big)
    forget_how_to_hash(monkeypatch)
    assert digest_once(big) == first == true_digest(big)


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("change", [grow, rewrite, replace, shrink])
def test_a_remembered_digest_is_not_used_after_the_file_changed(change: Callable[[Path], None], big: Path) -> None:
    before = digest_once(big)
    change(big)
    assert digest_once(big) == true_digest(big) != before


@pytest.mark.usefixtures("remembering")
def test_a_remembered_digest_is_not_used_after_a_change_that_restores_the_time(big: Path) -> None:
    before, stat = digest_once(big), big.stat()
    big.write_bytes(bytes(stat.st_size))
    os.utime(big, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest_once(big) == true_digest(big) != before


def test_the_digest_of_a_file_just_written_is_not_remembered(big: Path) -> None:
    digest_once(big)
    assert not digest._entry(big).exists()


@pytest.mark.usefixtures("remembering")
@pytest.mark.parametrize("content", [b"", b"[]", b'{"sha256": "0"}', b"\xff"])
def test_a_damaged_memory_is_ignored(content: bytes, big: Path) -> None:
    digest_once(big)
    digest._entry(big).write_bytes(content)
    assert digest_once(big) == true_digest(big)


@pytest.mark.usefixtures("remembering")
def test_a_memory_that_cannot_be_written_is_done_without(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path / "file" / "cache"))
    assert digest_once(big) == true_digest(big)
