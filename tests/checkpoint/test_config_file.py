"""Entries of a config.json that change, and nothing else of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modelmerge.checkpoint.config_file import Values, dtype_values, token_values, with_values

FILE = b'{\r\n\t"a": {"b" : 1e-05,"c":[1, {"d": "}"}]},\r\n\t"\\u0064type":"float32" ,\r\n\t"e": {}\r\n}\r\n\r\n'


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({("dtype",): "bfloat16"}, FILE.replace(b'"float32"', b'"bfloat16"')),
        ({("a", "b"): 7}, FILE.replace(b"1e-05", b"7")),
        ({("a", "b"): [1, 2], ("dtype",): None},
         FILE.replace(b"1e-05", b"[1, 2]").replace(b'"float32"', b"null")),
        ({("f",): "x"}, FILE.replace(b'"e": {}', b'"e": {},\r\n\t"f": "x"')),
        ({("f",): 1, ("g",): 2}, FILE.replace(b'"e": {}', b'"e": {},\r\n\t"f": 1,\r\n\t"g": 2')),
        ({("a", "f"): 1}, FILE.replace(b']}', b'], "f": 1}')),
        ({("e", "f"): 1}, FILE.replace(b'{}', b'{"f": 1}')),
        ({}, FILE),
    ],
)  # fmt: skip
def test_every_other_byte_stays(values: Values, want: bytes) -> None:
    got = with_values(FILE, values)
    assert got == want
    content = json.loads(got)
    for place, value in values.items():
        inner = content
        for key in place:
            inner = inner[key]
        assert inner == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_whatever_can_be_read_can_be_changed(encoding: str) -> None:
    text = '{"name": "Größe \\" {", "nan": NaN, "n": -Infinity, "t": true, "dtype": "x", "dtype": "float16"}'
    got = with_values(text.encode(encoding), {("dtype",): "float32"})
    assert got.decode(encoding) == text.replace('"float16"', '"float32"')


@pytest.mark.parametrize(
    ("config", "dtype", "want"),
    [
        ({"dtype": "float32"}, None, {}),
        ({"model_type": "x"}, None, {}),
        ({"dtype": "float32"}, "float32", {}),
        ({"torch_dtype": "torch.float32"}, "float32", {}),
        ({"torch_dtype": "float32"}, "float16", {("torch_dtype",): "float16"}),
        ({"dtype": None, "torch_dtype": "float16"}, "float16", {("dtype",): "float16"}),
        ({"model_type": "x"}, "float16", {("dtype",): "float16", ("torch_dtype",): "float16"}),
        ({"_class_name": "UNet2DConditionModel"}, "float16", {}),
        ({"model_type": "x", "text_config": {"dtype": "float32"}}, "float16",
         {("text_config", "dtype"): "float16", ("dtype",): "float16", ("torch_dtype",): "float16"}),
        ({"dtype": "float16", "text_config": {"dtype": "float32"}, "vision_config": {"dtype": "float16"}}, "float16",
         {("text_config", "dtype"): "float16"}),
        ({"dtype": "float16", "vocabulary_map": {"dtype": 7}, "quantization_config": {"dtype": "x"}}, "float16", {}),
    ],
)  # fmt: skip
def test_a_config_says_the_dtype_wherever_it_says_one(config: dict[str, Any], dtype: str | None, want: Values) -> None:
    assert dtype_values(config, dtype) == want


@pytest.mark.parametrize(
    ("config", "other", "want"),
    [
        ({"eos_token_id": 1}, {"eos_token_id": 2, "bos_token_id": 3}, {("eos_token_id",): 2, ("bos_token_id",): 3}),
        ({"eos_token_id": 1}, {"eos_token_id": [1, 2]}, {("eos_token_id",): [1, 2]}),
        ({"eos_token_id": 1, "pad_token_id": 0}, {"eos_token_id": 1}, {}),  # not said: stays
        ({"pad_token_id": 0}, {"pad_token_id": None}, {("pad_token_id",): None}),
        ({"text_config": {"eos_token_id": 1}}, {"eos_token_id": 2}, {("text_config", "eos_token_id"): 2}),
        ({"text_config": {}}, {"eos_token_id": 2}, {("text_config", "eos_token_id"): 2}),
        ({"eos_token_id": 1, "text_config": {"eos_token_id": 1}}, {"text_config": {"eos_token_id": 2}},
         {("eos_token_id",): 2, ("text_config", "eos_token_id"): 2}),
        ({"vision_config": {"eos_token_id": 1}}, {"vision_config": {"eos_token_id": 2}}, {}),
        ({"eos_token_id": 1}, {}, {}),
    ],
)  # fmt: skip
def test_ids_of_tokens_are_those_of_the_other_config(
    config: dict[str, Any], other: dict[str, Any], want: Values
) -> None:
    assert token_values(config, other) == want
