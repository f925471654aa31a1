"""Files of strangers cost no more than their size, and what is wrong with them is said."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

import modelmerge
from modelmerge.checkpoint.documents import Malformed, check, open_plain, parse_json, parse_yaml, read_json, top_entries
from modelmerge.checkpoint.header import read_header
from modelmerge.checkpoint.patterns import Patterns
from modelmerge.checkpoint.reader import open_checkpoint
from modelmerge.checkpoint.reference import parse
from modelmerge.errors import CheckpointError, ModelMergeError, suggestion
from tests.support.checkpoints import family


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """Whatever it is, it takes seconds at most."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 5


class Inner(TypedDict, total=False):
    numbers: list[float]


class Outer(TypedDict):
    name: str
    inner: dict[str, Inner | None]


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        (5, str, "it must be text, not 5"),
        (True, int, "it must be a whole number, not True"),
        (2**63, int, "a whole number"),
        (float("nan"), float, "it must be a number, not nan"),
        ("x", Literal["a", "b"], "it must be a or b, not 'x'"),
        ([1, "x"], tuple[int, ...], "[1] must be a whole number, not 'x'"),
        ({"a": 1}, list[int], "it must be a list, not {'a': 1}"),
        (3, str | None, "it must be text or null, not 3"),
        ([], Outer, "it must be an object with inner, name, not []"),
        ({"name": "x"}, Outer, "inner is missing"),
        ({"name": "x", "inner": {"a": {"numbers": [1, None]}}}, Outer, "inner.a.numbers[1] must be a number, not None"),
        ("y" * 10_000, int, "'yyy"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(value: Any, kind: Any, says: str) -> None:
    with pytest.raises(Malformed) as caught:
        check(value, kind)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_of_the_kind_is_returned() -> None:
    value = {"name": "x", "inner": {"a": {"numbers": [1, 2.5]}, "b": None}, "more": object}
    assert check(value, Outer) is value
    assert check([1, 2], tuple[int, ...] | None) == [1, 2]


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"[" * 101 + b"]" * 101, b"9" * 5000, b"[" + b"9" * 400 + b"]",
     b'["\\ud800"]', b'["\xed\xa0\x80"]', b""],
)  # fmt: skip
def test_json_that_costs_more_than_it_says_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)


def test_json_may_have_what_models_have() -> None:
    text = (
        b'\xef\xbb\xbf{"model_max_length": 1000000000000000019884624838656, "x": Infinity, "\\ud83d\\ude00": "\\udcff"}'
    )
    assert parse_json(text)["model_max_length"] == int(1e30)


BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 40))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1},*a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [BOMB, MERGED, "a: &a [*a]", "[" * 300_000, "- " * 300_000, "a: " + "1:" * 400_000, "a: [" + "1," * 400_000 + "]",
     "date: 2024-13-45", "a: 0b_", "a: !!bool x", "a: " + "9" * 5000, "a: 1\na: 2", "? [a]\n: b",
     "\0", "a: !!python/name:x y"],
)  # fmt: skip
def test_yaml_that_costs_more_than_it_says_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_yaml(text)


def test_yaml_may_have_aliases_and_keys_that_look_like_numbers() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc:\n  <<: *a\n  2: yes") == {
        "a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "2": True},
    }  # fmt: skip
    assert top_entries("license: mit\nname: 1.0\ntags: [license, x]\nempty:\nlast: &a z") == {
        "license": "mit", "name": "1.0", "last": "z",
    }  # fmt: skip


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(CheckpointError, match="plain file"):
            read_json(file)
        with pytest.raises(OSError, match="plain file"):
            open_plain(file)


def test_a_pattern_is_matched_in_the_time_of_its_length() -> None:
    name = "block." * 200 + "w"
    for pattern in ("(.*.*)*(.*.*)*x$", "(([a-z._0-9])*)*z", "(a|a)" * 30 + "z", ".*" * 40 + "x"):
        assert Patterns({pattern: 2.0}).value_of(name) is None
    assert Patterns({"x": 1.0, r"block\.w|y": 2.0, ".*": 3.0}).value_of(name) == 2.0
    assert Patterns({r"layers\.\d+\.(q|k)_proj": 4.0}).value_of("model.layers.12.k_proj") == 4.0


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\2", "[", "a{99999999999}", "(" * 3000, "a{3,2}", "(?i)a"])
def test_a_pattern_that_cannot_be_matched_is_said(pattern: str) -> None:
    with pytest.raises(ValueError, match="the pattern"):
        Patterns({pattern: 2.0}).value_of("model.q_proj")


@pytest.mark.parametrize("patterns", [[f".*{i}" * 500 for i in range(100)], [f".*{i}.*{i}.*q" for i in range(300)]])
def test_patterns_without_end_are_given_up(patterns: list[str]) -> None:
    found = Patterns(dict.fromkeys(patterns, 2.0))
    with pytest.raises(ValueError, match="too long"):
        any(map(found.value_of, ("1" * 40 for _ in range(1000))))


def test_a_pattern_matches_what_it_matches_in_python() -> None:
    import random
    import re

    draw = random.Random(0)
    parts = [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        "[ab]",
        "[^a]",
        "(a|b)",
        "a*",
        "b+",
        "a?",
        ".*",
        "(ab|)",
        "a{2,3}",
        "(a*)*",
        "^",
        "$",
    ]
    for _ in range(1000):
        pattern = "".join(draw.choices(parts, k=draw.randint(1, 5))) + draw.choice(("", "|a"))
        name = "".join(draw.choices("aab.1\n", k=draw.randint(0, 8)))
        expected = 1.0 if re.match(rf"(.*\.)?({pattern})$", name) else None
        assert Patterns({pattern: 1.0}).value_of(name) == expected, (pattern, name)


def test_a_document_may_not_be_large(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with file.open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(CheckpointError, match="more than such a file has"):
        read_json(file)
    file.write_text(json.dumps([1]))
    assert read_json(file, list[int]) == [1]


def test_headers_and_indices_are_read_in_the_time_of_their_length(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    shape = ",".join(["9"] * 200_000)
    for header, says in (
        ("{" + ",".join(f'"k{i}":{entry}' for i in (*range(20_000), 19_999)) + "}", "'k19999' stands in it twice"),
        (f'{{"{"a." * 200_000}":{entry}}}', "has 400,000 letters"),
        (f'{{"w":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,0]}}}}', "has the shape"),
    ):
        text = header.encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CheckpointError, match=says) as caught:
            read_header(tmp_path / "model.safetensors")
        assert len(caught.value.message) < 300
    (tmp_path / "model.safetensors").unlink()
    shards = ",".join(f'"k{i}":"{"s" * 300}{i}"' for i in range(3000))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{shards}}}}}')
    with pytest.raises(CheckpointError, match="missing 3000 of 3000 shards") as caught:
        open_checkpoint(parse(str(tmp_path)))
    assert len(caught.value.message) < 10_000


def test_a_pipe_in_the_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="plain file"):
        open_checkpoint(parse(str(tmp_path / "pipe.safetensors")))


def test_a_card_that_cannot_be_read_fails_no_merge(tmp_path: Path) -> None:
    base, one, two = family(tmp_path, experts=2)
    (one / "README.md").write_text("---\ndate: 2024-13-45\na: 0b_\nlicense: mit\n---\n")
    (two / "README.md").write_text("---\n" + "[" * 20_000 + "\n---\n")
    manifest = modelmerge.merge(base, [one, two], tmp_path / "out", method="average")
    notes = [note for note in manifest["notes"] if "card" in note]
    assert len(notes) == 1
    assert notes[0].startswith(f"'{two.name}': the front matter of its card cannot be read and is left out: ")
    assert "mit for " in (tmp_path / "out" / "README.md").read_text()


def test_a_message_is_short_and_soon_made() -> None:
    error = ModelMergeError(f"'{'x' * 10**6}' is none", hint=suggestion("y" * 10**5, ["ties", "average"]))
    assert len(error.message) < 21_000
    assert error.hint is None
