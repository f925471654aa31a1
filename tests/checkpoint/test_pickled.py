"""Pickled checkpoints: the tensors of torch.load(weights_only=True), and no code run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.checkpoint.pickled import read_pickle
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.errors import CheckpointError, ReferenceNotFound
from tests.support.checkpoints import State, base_state, expert_state, family, pickled, read, same, write

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def assert_read_as_torch_does(file: Path, key: str | None = None) -> None:
    """Every tensor's kind, shape and bytes, whole and from the middle."""
    want = torch.load(file, weights_only=True)
    want = want[key] if key else want
    model = open_checkpoint(parse(str(file)))
    assert model.tensors.keys() == {name for name, value in want.items() if isinstance(value, torch.Tensor)}
    for name, info in model.tensors.items():
        assert info.shape == tuple(want[name].shape), name
        buffer = bytearray(info.nbytes)
        model.read_into(info, 0, memoryview(buffer))
        assert bytes(buffer) == as_bytes(want[name]), name
        item = want[name].element_size()
        for first, last in ((1, 2), (info.numel // 2, info.numel)):
            if last <= info.numel:
                part = bytearray((last - first) * item)
                model.read_into(info, first * item, memoryview(part))
                assert part == buffer[first * item : last * item], name
    model.close()


def odd_state() -> State:
    """Whatever lies in a state dict in real files: every dtype, views, shared and expanded storages, parameters."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 10, generator=generator)
    state = {f"of {dtype}": torch.randn(3, 5, generator=generator).mul(9).to(dtype) for dtype in DTYPES}
    state |= {
        "whole": whole,
        "the same": whole,
        "transposed": whole.T,
        "a column": whole[:, 3],
        "rows": whole[2:5],
        "a corner": whole[1:3, 2:7],
        "every other": whole[::2, ::3],
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "expanded": torch.arange(7)[None].expand(3, -1),
        "half transposed": torch.randn(5, 3, generator=generator).half().T,
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "no rows of a view": whole[:0].T,
        "long": torch.zeros(1, 1, 3, 1).transpose(0, 2),
    }
    return state


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_tensor_is_that_of_torch_load(zipped: bool, tmp_path: Path) -> None:
    state = odd_state()
    if not zipped:  # the old format cannot hold the dtypes that came after it
        state = {name: t for name, t in state.items() if t.dtype not in DTYPES[9:12] + DTYPES[14:]}
    torch.save(state, tmp_path / "odd.pt", _use_new_zipfile_serialization=zipped)
    assert_read_as_torch_does(tmp_path / "odd.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_modules_are_read_as_they_save_themselves(zipped: bool, tmp_path: Path) -> None:
    """With their metadata, buffers and ties."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4, bias=False))
    model.append(model[2])
    torch.save(model.state_dict(), tmp_path / "m.bin", _use_new_zipfile_serialization=zipped)
    assert_read_as_torch_does(tmp_path / "m.bin")
    tensors, _ = read_pickle(tmp_path / "m.bin")
    assert tensors["2.weight"].start == tensors["3.weight"].start


@pytest.mark.parametrize("name", ["model.pth", "archive.ckpt", "näme with blanks.bin"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    torch.save(base_state(), tmp_path / name)
    assert_read_as_torch_does(tmp_path / name)
    torch.save(base_state(), buffer := io.BytesIO())
    (tmp_path / name).write_bytes(buffer.getvalue())
    assert_read_as_torch_does(tmp_path / name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda s: {"model": OrderedDict(s), "optimizer": {"state": {"w": {"exp_avg": torch.ones(2, 2)}}}, "step": 1},
        lambda s: {"model": s, "rng_state": torch.get_rng_state(), "loss": torch.tensor(0.5)},
        lambda s: {"checkpoint": {"module": s, "lr_scheduler": {"base_lrs": torch.ones(3)}}},
    ],
    ids=["state_dict", "model", "model beside a loss", "deep"],
)
def test_nested_weights_are_found_and_it_is_said(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    state = base_state()
    torch.save(wrap(state), tmp_path / "step-100.pt")
    tensors, told = read_pickle(tmp_path / "step-100.pt")
    assert tensors.keys() == state.keys()
    assert told[0].startswith("the weights are those under '")


def test_what_is_no_tensor_beside_weights_is_said(tmp_path: Path) -> None:
    torch.save({**base_state(), "step": 7, "nothing": None, "dtype": torch.float32}, tmp_path / "m.pt")
    tensors, told = read_pickle(tmp_path / "m.pt")
    assert tensors.keys() == base_state().keys()
    assert told == ("'step', 'dtype' in m.pt are no tensor",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, "several state dicts: 'model', 'ema'"),
        ({"w": torch.ones(2), "model": {"v": torch.ones(2)}}, "several state dicts: the top level, 'model'"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "no state dict, no dict of names to tensors, but a dict of 'epoch'"),
        ([torch.ones(2)], "but something else"),
        (torch.ones(2), "but something else"),
        ({"optimizer": {"state": {"w": torch.ones(2)}}}, "no state dict"),
        ({"w": torch.ones(3).to_sparse()}, "tensor 'w' is sparse"),
        ({"w": torch.ones(3, device="meta")}, "tensor 'w' is on the meta device"),
        ({"w": torch.ones(3, dtype=torch.complex128)}, "tensor 'w' is ComplexDoubleStorage"),
        ({"w": torch.ones(3, dtype=torch.complex64).conj()}, "tensor 'w' is conjugated"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # torch's own, on saving these kinds
def test_what_is_no_state_dict_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        read_pickle(tmp_path / "m.pt")
    assert caught.value.message.startswith(f"{tmp_path / 'm.pt'}: ")
    assert says in caught.value.message
    assert caught.value.hint


# --- code ---


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((os.system, "touch {ran}"), f"'{os.system.__module__}.system'"),
        ((exec, "open({ran!r}, 'w')"), "builtins__.exec'"),
        ((eval, "open({ran!r}, 'w')"), "eval'"),
        ((getattr, "w", "upper"), "getattr'"),
        ((torch.nn.Linear, 2, 2), "'torch.nn.modules.linear.Linear'"),
        ((torch.load, "{ran}"), "'torch.serialization.load'"),
        ((Path, "w"), "'pathlib"),
    ],
    ids=["system", "exec", "eval", "getattr", "Linear", "load", "Path"],
)
def test_code_is_refused_by_name_and_never_run(call: tuple[Any, ...], named: str, zipped: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    words = [word.format(ran=str(ran)) if isinstance(word, str) else word for word in call]
    file = write(tmp_path / "m", base_state()) / "pytorch_model.bin"
    (file.parent / "model.safetensors").unlink()
    torch.save({**base_state(), "w": Evil(*words)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(parse(str(file.parent)))
    assert not ran.exists()
    assert caught.value.message.startswith(f"{file}: asks for '")
    assert named.replace("builtins__.", "builtin") in caught.value.message.replace("__builtin__.", "builtin").replace(
        "builtins.", "builtin"
    )
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def test_stand_ins_cannot_be_bent_to_run_code(tmp_path: Path) -> None:
    """A pickle that gives the stand-ins other attributes, or calls them with nonsense, comes no further."""
    head = b"\x80\x02"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    system = b"cposix\nsystem\n"
    tricks = [
        head + rebuild + b"(N}X\x05\x00\x00\x00_worksystemtb.",
        head + rebuild + b"(N}(X\x05\x00\x00\x00_work" + system + b"utb)R.",
        head + rebuild + b")R.",
        head + b"ccollections\nOrderedDict\n(N}(X\x07\x00\x00\x00__new__" + rebuild + b"utb.",
        head + b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        head + b"I1\nQ.",
        head + b"(lp4294967295\n.",
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ]
    for trick in tricks:
        file = archive(tmp_path / "m.pt", {"data.pkl": trick})
        with pytest.raises(CheckpointError):
            read_pickle(file)
    assert OrderedDict([(1, 2)]) == {1: 2}


# --- damaged files ---


def archive(file: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", kind) as made:
        for name, content in entries.items():
            made.writestr(f"archive/{name}", content)
    return file


def state_pickle(shape: object = (2,), strides: object = (1,), offset: object = 0, key: str = "0") -> bytes:
    """A pickle of {'w': a tensor} that says of the tensor whatever is asked."""

    storage = object()

    class Writer(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", 2) if thing is storage else None

    Writer(buffer := io.BytesIO(), 2).dump(
        {"w": Evil(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, None)}
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({}, None),
        ({"shape": (3,)}, "reaches to byte 12"),
        ({"offset": 1}, "reaches to byte 12"),
        ({"strides": (2,)}, "reaches to byte 12"),
        ({"shape": (2**62,), "strides": (0,)}, "shape"),
        ({"shape": (-1,)}, "shape (-1,)"),
        ({"strides": (-1,)}, "strides (-1,)"),
        ({"offset": -1}, "shape"),
        ({"offset": 0.5}, "shape"),
        ({"shape": (True,)}, "shape"),
        ({"shape": (2, 1)}, "strides"),
        ({"shape": None}, "shape None"),
        ({"shape": ("two",)}, "shape"),
        ({"key": "1"}, "a storage that the file lacks"),
    ],
)
def test_a_tensor_that_lies_about_its_place_is_refused(told: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    file = archive(tmp_path / "m.pt", {"data.pkl": state_pickle(**told), "data/0": struct.pack("<2f", 1, 2)})
    if says is None:
        assert read_pickle(file)[0]["w"].nbytes == 8
        return
    with pytest.raises(CheckpointError, match=r"m\.pt: tensor 'w' ") as caught:
        read_pickle(file)
    assert says in caught.value.message


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "not a PyTorch checkpoint"),
    "HTML": (lambda content: b"<!DOCTYPE html>404", "not a PyTorch checkpoint"),
    "git-lfs pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "not a PyTorch checkpoint"),
    "truncated": (cut, "truncated"),
    "one byte short": (lambda content: content[:-1], "truncated"),
    "start overwritten": (lambda content: b"PK\x03\x04" + bytes(len(content)), "truncated or damaged"),
    "any pickle": (lambda content: pickle.dumps({"w": 1}, 2), "a pickle that torch.save did not write"),
    "any legacy pickle": (
        lambda content: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "its pickle is damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(case: str, zipped: bool, tmp_path: Path) -> None:
    damage, says = DAMAGED[case]
    torch.save(base_state(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "m.pt").write_bytes(damage((tmp_path / "m.pt").read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        read_pickle(tmp_path / "m.pt")
    assert caught.value.message.startswith(f"{tmp_path / 'm.pt'}: ")
    assert says in caught.value.message


def test_every_truncation_of_a_legacy_file_is_noticed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "v": torch.ones(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "m.pt").read_bytes()
    for length in range(0, len(content), 3):
        (tmp_path / "m.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "m.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whatever_a_damaged_file_says_the_error_is_deliberate(zipped: bool, tmp_path: Path) -> None:
    """And where it is read for all that, nothing is read from outside the file."""
    state = {"a": torch.ones(4, 4), "b": torch.ones(3).half(), "t": torch.ones(4, 4).T}
    file = tmp_path / "m.pt"
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    good, chance = file.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(good)
        place = chance.randrange(len(damaged))
        damaged[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(1, 3))
        file.write_bytes(damaged)
        try:
            model = open_checkpoint(parse(str(file)))
        except (CheckpointError, ReferenceNotFound):
            refused += 1
            continue
        for info in model.tensors.values():
            if info.nbytes < 1000:
                model.read_into(info, 0, memoryview(bytearray(info.nbytes)))
        model.close()
    assert 100 < refused < 500


@pytest.mark.parametrize(
    ("entries", "kind", "says"),
    [
        ({"data.pkl": state_pickle(), "data/0": bytes(8)}, zipfile.ZIP_DEFLATED, "is compressed in it"),
        ({"data.pkl": state_pickle(), "data/0": bytes(8), "byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
        ({"data.pkl": state_pickle(), "data/0": bytes(8), "constants.pkl": b""}, zipfile.ZIP_STORED, "TorchScript"),
        ({"other": b""}, zipfile.ZIP_STORED, "no PyTorch checkpoint, though a zip"),
    ],
)
def test_other_archives_are_refused_by_name(entries: dict[str, bytes], kind: int, says: str, tmp_path: Path) -> None:
    file = archive(tmp_path / "m.pt", entries, kind)
    with pytest.raises((CheckpointError, ReferenceNotFound)) as caught:
        read_pickle(file)
    assert str(file) in caught.value.message
    assert says in caught.value.message


def test_gguf_under_the_name_of_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ggml-model.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ReferenceNotFound, match="GGUF"):
        read_pickle(tmp_path / "ggml-model.bin")


# --- directories and merges ---


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_of_pickled_models_has_the_bits_of_one_of_safetensors(
    shards: int, zipped: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, *experts = family(tmp_path, dtype=dtype)
    modelmerge.merge(base, experts, tmp_path / "want", method="ties")
    others = [pickled(tmp_path / "p" / m.name, read(m), shards=shards, zipped=zipped) for m in (base, *experts)]
    manifest = modelmerge.merge(others[0], [*others[1:-1], experts[-1]], tmp_path / "out", method="ties")
    assert same(read(tmp_path / "out"), read(tmp_path / "want"))
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    files = manifest["inputs"]["base"]["files"]
    assert len(files) == shards
    assert all(file.endswith(".bin") for file in files)
    replayed = modelmerge.replay(tmp_path / "out", tmp_path / "again")
    assert replayed["files"]["model.safetensors"] == manifest["files"]["model.safetensors"]


def test_transposed_weights_are_merged_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelmerge.engine.job.CPU_BLOCK", 100)
    base = base_state()
    turned = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in base.items()}
    expert = expert_state(base, 0)
    pickled(tmp_path / "turned", turned)
    pickled(tmp_path / "straight", base)
    pickled(tmp_path / "expert", {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in expert.items()})
    for name in ("turned", "straight"):
        modelmerge.merge(tmp_path / name, [tmp_path / "expert"], tmp_path / f"{name}-out", method="ties")
    assert same(read(tmp_path / "turned-out"), read(tmp_path / "straight-out"))


def test_lone_files_are_experts_and_nesting_is_in_plan_notes_and_card(tmp_path: Path) -> None:
    base = write(tmp_path / "base", base_state())
    torch.save({"state_dict": expert_state(base_state(), 0), "epoch": 1}, tmp_path / "math.pth")
    torch.save(expert_state(base_state(), 1), tmp_path / "code.bin")
    manifest = modelmerge.merge(
        base, [tmp_path / "math.pth", tmp_path / "code.bin"], tmp_path / "out", method="average"
    )
    note = "'math': the weights are those under 'state_dict' in math.pth."
    assert note in manifest["notes"]
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_every_mixture_of_dtypes_and_formats_is_widened_before_it_is_subtracted(tmp_path: Path) -> None:
    base = base_state()
    write(tmp_path / "base", base)
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    states = [
        {n: t.to(kind) if t.is_floating_point() else t for n, t in expert_state(base, i).items()}
        for i, kind in enumerate(kinds)
    ]
    for i, state in enumerate(states):
        pickled(tmp_path / f"e{i}", state, zipped=bool(i % 2))
    modelmerge.merge(tmp_path / "base", [tmp_path / f"e{i}" for i in range(4)], tmp_path / "out", method="average")
    for name, tensor in read(tmp_path / "out").items():
        if tensor.is_floating_point():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            assert tensor.dtype == torch.float32
            assert torch.allclose(tensor.double(), mean, atol=1e-7), name


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", base_state())
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    (directory / "training_args.bin").write_bytes(b"never read")
    assert open_checkpoint(parse(str(directory))).tensors.keys() == base_state().keys()


def test_a_pickled_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "m", base_state(), shards=3)
    (directory / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"missing 1 of 3 shards that pytorch_model\.bin\.index\.json names"):
        open_checkpoint(parse(str(directory)))


def test_nan_in_a_pickle_is_refused_with_file_and_tensor(tmp_path: Path) -> None:
    base, expert = write(tmp_path / "base", base_state()), expert_state(base_state(), 0)
    expert["model.layers.0.q_proj.weight"][3, 3] = torch.nan
    torch.save(expert, tmp_path / "e.pt")
    with pytest.raises(CheckpointError, match=r"e\.pt: tensor 'model\.layers\.0\.q_proj\.weight' of 'e' holds NaN"):
        modelmerge.merge(base, [tmp_path / "e.pt"], tmp_path / "out", method="average")


def nested(operations: bytes) -> bytes:
    """Operations, with forty-five pairs of pairs in the place of NEST: 2^45 items, in 270 bytes."""
    pairs = b"(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 45 + b"t"
    lists = b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 45))
    return b"\x80\x02" + operations.replace(b"NEST", pairs).replace(b"LISTS", lists) + b"."


def tensor_in(shape: bytes, key: bytes = b"U\x010") -> bytes:
    """The operations that make a dict of a tensor with that shape and that key of its storage."""
    storage = b"(U\x07storagectorch\nFloatStorage\n" + key + b"U\x03cpuK\x01tQ"
    rest = b"K\x00" + shape + b"K\x00\x85\x89ccollections\nOrderedDict\n)R"
    return b"}U\x01wctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tRs"


@pytest.mark.parametrize(
    "operations",
    [b"}NESTNs", b"}LISTSNs", tensor_in(b"NEST"), tensor_in(b"LISTS"), tensor_in(b"K\x01\x85", b"NEST"), b"NEST",
     b"LISTS", b"}U\x01wLISTSs", b"c__builtin__\nset\nNEST\x85R", b"ccollections\nOrderedDict\nNEST\x85R",
     b"\x85" * 500_000, b"N" + b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"c" + b"a" * 500_000,
     b"}(" + b"".join(b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") + b"N" for i in range(1, 20_000)) + b"u"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["archive", "legacy"])
def test_a_few_bytes_cost_no_more_than_themselves(kind: str, operations: bytes, tmp_path: Path) -> None:
    file, content, start = tmp_path / "m.pt", nested(operations), time.process_time()
    if kind == "archive":
        archive(file, {"data.pkl": content, "data/0": bytes(4)})
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_pickle(file)
    assert len(caught.value.message) < 3000
    assert time.process_time() - start < 5


def test_a_tensor_that_a_kilobyte_stands_for_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**9), "v": torch.zeros(8)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"its tensors repeat what it stores: 1,.* bytes stand for 4,000,000,032"):
        read_pickle(tmp_path / "m.pt")
    torch.save({"w": torch.arange(4.0)[:, None].expand(4, 1000)}, tmp_path / "m.pt")
    assert_read_as_torch_does(tmp_path / "m.pt")


def test_a_state_dict_under_two_names_is_one(tmp_path: Path) -> None:
    state = {"w": torch.zeros(8)}
    torch.save({"model": state, "again": state}, tmp_path / "m.pt")
    assert set(read_pickle(tmp_path / "m.pt")[0]) == {"w"}
