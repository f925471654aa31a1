"""The model card: front matter that the Hub takes, and a text that says what was done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import modelmerge
from modelmerge.methods import registry
from modelmerge.record import card, loading


def model(name: str, weight: float | None = 1.0, commit: str | None = None, **front: Any) -> card.Model:
    repository = f"org/{name}" if commit else None
    return card.Model(
        name=name, reference=f"./{name}", weight=weight, repository=repository, commit=commit, front=front
    )  # fmt: skip


def rendered(base: card.Model, *experts: card.Model, **other: Any) -> str:
    options = {"--density": 0.2, "--rank": None}
    source = card.Source(name="ties", summary="Does it.", paper="https://p", bibtex="@misc{x}", options=options)
    told: dict[str, Any] = {
        "title": "out", "methods": [source], "settings": {}, "command": "modelmerge merge", "notes": [],
        "library": "transformers", "versions": {"modelmerge": "1"}, "device": "cpu", **other,
    }  # fmt: skip
    return card.render(base=base, experts=experts, **told)


def front(text: str) -> dict[str, Any]:
    """The front matter, as yaml reads it; it must be what the Hub's own client makes of it too."""
    found = yaml.safe_load(text.split("---\n")[1])
    client = ModelCard(text).data
    assert isinstance(client, ModelCardData)
    assert yaml.safe_load(client.to_yaml()) == found
    return found


def test_base_model_names_what_is_on_the_hub_and_nothing_else() -> None:
    data = front(rendered(model("base", None, "a" * 40), model("x", commit="b" * 40), model("y")))
    assert data["base_model"] == ["org/base", "org/x"]
    assert data["base_model_relation"] == "merge"
    assert data["tags"] == ["merge", "modelmerge", "ties"]
    assert data["library_name"] == "transformers"
    local = front(rendered(model("base", None), model("x"), library=None))
    assert not {"base_model", "base_model_relation", "library_name"} & set(local)


def test_an_adapter_says_that_it_is_one() -> None:
    text = rendered(model("base", None, "a" * 40), model("x", commit="b" * 40), adapter=True)
    data = front(text)
    assert data["base_model"] == ["org/base"]
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert "lora" in data["tags"]
    assert "PeftModel.from_pretrained" in text


def test_models_with_commits_and_weights() -> None:
    text = rendered(model("base", None, "a" * 40), model("x", 0.5, "b" * 40), model("y|z"))
    assert "|  | model | commit | weight |\n" in text
    assert (
        "| base | [org/base](https://huggingface.co/org/base) | [`aaaaaaaaaaaa`](https://huggingface.co/org/base/tree/"
        in text
    )
    link = f"[`bbbbbbbbbbbb`](https://huggingface.co/org/x/tree/{'b' * 40})"
    assert f"| `x` | [org/x](https://huggingface.co/org/x) | {link} | 0.5 |\n" in text
    assert "| `y\\|z` | `./y\\|z` |  | 1 |\n" in text
    plain = rendered(model("base", None), model("x"))
    assert "|  | model |\n" in plain
    assert "| `--density` | 0.2 |\n| `--rank` | automatic |\n" in plain


LLAMA = {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("fronts", "inherited", "says"),
    [
        ([{"license": "mit"}] * 3, {"license": "mit"}, "License: mit, which is that of the base and of every expert."),
        ([LLAMA] * 2, LLAMA, "License: llama3.1, which is that of the base and of every expert."),
        ([{"license": "mit"}, {"license": "apache-2.0"}, {"license": "mit"}], {},
         "License: mit for the base; apache-2.0 for `m1`; mit for `m2`. It is for you to choose"),
        ([LLAMA, {**LLAMA, "license_name": "gemma"}], {},
         "License: llama3.1 for the base; gemma for every expert. It is for you"),
        ([{"license": "mit"}, {}], {}, "License: mit for the base; not stated for every expert. It is"),
        ([{}, {"license": "mit"}], {}, "License: not stated for the base; mit for every expert. It is"),
        ([{}, {}], {}, "License: none of the models states one here. It is for you to choose"),
    ],
)  # fmt: skip
def test_a_license_is_inherited_where_all_agree(
    fronts: list[dict[str, Any]], inherited: dict[str, str], says: str
) -> None:
    text = rendered(*(model(f"m{i}", 1.0, **each) for i, each in enumerate(fronts)))
    assert {key: value for key, value in front(text).items() if key.startswith("license")} == inherited
    assert says in text


def test_the_front_matter_of_the_models_is_read_from_their_cards(models: list[Path], tmp_path: Path) -> None:
    for path in models:
        (path / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\n---\nHello.\n")
    modelmerge.merge(models[0], models[1:], tmp_path / "out", method="ties", density=0.5, seed=3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert front(text)["license"] == "mit"
    assert front(text)["pipeline_tag"] == "text-generation"
    for option in (
        "`--density` | 0.5",
        "`--scale` | 0.577",
        "`--reduce` | sum",
        "`--trim-scope` | model",
        "`--seed` | 3",
    ):
        assert f"| {option} |" in text
    assert "--rest" not in text
    assert "TIES-Merging: Resolving Interference When Merging Models" in text
    assert f"modelmerge {modelmerge.__version__}" in text


@pytest.mark.parametrize("text", [b"no front matter", b"", b"---\nlicense: [mit]\n? [a]\n: b\n---\n"])
def test_a_card_without_words_says_nothing(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text)
    assert card.front_matter(tmp_path) == ({}, None)
    assert card.front_matter(None) == card.front_matter(tmp_path / "nowhere") == ({}, None)


@pytest.mark.parametrize(
    "text", [b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe---\n", b"---\n" + b"[" * 20_000 + b"\n---\n"]
)
def test_why_a_card_cannot_be_read_is_said(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text)
    front, fault = card.front_matter(tmp_path)
    assert front == {}
    assert fault


def test_what_a_card_says_besides_is_passed_over(tmp_path: Path) -> None:
    front = (
        "date: 2024-13-45\na: 0b_\nb: !!bool x\nlicense: mit\nn: " + "9" * 5000 + "\nt: &t [x]\nu: *t\nlicense_name:\n"
    )
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    assert card.front_matter(tmp_path)[0]["license"] == "mit"
    assert "license_name" not in card.front_matter(tmp_path)[0]


def test_notes_and_disentangling_are_told(models: list[Path], tmp_path: Path) -> None:
    modelmerge.merge(
        models[0], models[1:], tmp_path / "out", method="average", disentangle="awd", at=["*q_proj*: weight=2"]
    )  # fmt: skip
    text = (tmp_path / "out" / "README.md").read_text()
    assert "made by `average` after `awd`" in text
    assert "| `awd alpha` | 0.1 |" in text
    assert "| `--at` | `*q_proj*: weight=2` |" in text
    assert front(text)["tags"] == ["merge", "modelmerge", "average", "awd"]
    assert text.count("@misc{") == 2


RESULTS = [
    card.Result(task="image-classification", dataset="SVHN", metric="accuracy", value=0.78125, split="test",
                dataset_id="ufldl-stanford/svhn", detail="26,032 images"),
    card.Result(task="text-generation", dataset="GSM8K", metric="exact_match", value=0.5),
]  # fmt: skip


def test_results_become_a_model_index_and_a_table() -> None:
    plain = rendered(model("base", None, "a" * 40, license="mit"), model("x", license="mit"), notes=["A note."])
    text = card.with_results(plain, RESULTS, name="merged")
    data = front(text)
    (index,) = data["model-index"]
    assert index["name"] == "merged"
    assert index["results"][0] == {
        "task": {"type": "image-classification"},
        "dataset": {"name": "SVHN", "type": "ufldl-stanford/svhn", "split": "test"},
        "metrics": [{"type": "accuracy", "value": 0.78125}],
    }
    assert {key: value for key, value in data.items() if key != "model-index"} == front(plain)
    assert text.index("## Method") < text.index("## Evaluation") < text.index("## Repeat it")
    assert "| SVHN | test | accuracy | 0.7812 | 26,032 images |" in text
    assert ModelCard(text).data.eval_results[1].metric_value == 0.5  # type: ignore[attr-defined]


def test_results_replace_those_of_an_earlier_evaluation() -> None:
    plain = rendered(model("base", None), model("x"))
    once = card.with_results(plain, RESULTS, name="merged")
    assert card.with_results(once, RESULTS, name="merged") == once
    again = card.with_results(once, RESULTS[:1], name="merged")
    assert "GSM8K" not in again
    assert again.count("## Evaluation") == 1
    assert "This merge has not been evaluated on test data." in plain
    assert "not been evaluated" not in once + again


def test_results_go_into_a_card_of_another_make() -> None:
    text = card.with_results("---\nlicense: mit\nodd_key: [1]\n---\n# Mine\n\nText.\n", RESULTS, name="mine")
    assert front(text)["odd_key"] == [1]
    assert text.index("Text.") < text.index("## Evaluation")


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in ("merge", "transform") for n in registry.names(k)])
def test_a_citation_is_bibtex(kind: Any, name: str) -> None:
    chosen = registry.load(name, kind)
    if chosen.citation is not None:
        entry = chosen.citation.bibtex(chosen.paper)
        assert re.fullmatch(r"@misc\{[a-z]+(19|20)\d\d,\n(  [a-z]+ = \{.+\},\n){4}  url = \{https://.+\}\n\}", entry)
        assert entry.count("{") == entry.count("}")


BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("files", "lines", "task"),
    [
        ({"config.json": BASE, "tokenizer.json": {}},
         ["from transformers import AutoModelForCausalLM, AutoTokenizer",
          "model = AutoModelForCausalLM.from_pretrained('m')", "tokenizer = AutoTokenizer.from_pretrained('m')"],
         "text-generation"),
        ({"config.json": {"architectures": ["CLIPModel"]}, "tokenizer.json": {}, "preprocessor_config.json": {}},
         ["from transformers import AutoProcessor, CLIPModel", "model = CLIPModel.from_pretrained('m')",
          "processor = AutoProcessor.from_pretrained('m')"], "zero-shot-image-classification"),
        ({"config.json": {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}},
         ["from transformers import LlavaForConditionalGeneration",
          "model = LlavaForConditionalGeneration.from_pretrained('m')"], "image-text-to-text"),
        ({"config.json": {"architectures": ["T5ForConditionalGeneration"]}},
         ["from transformers import T5ForConditionalGeneration",
          "model = T5ForConditionalGeneration.from_pretrained('m')"], "text-generation"),
        ({"config.json": {"model_type": "of nobody's"}}, [], None),
        ({"config.json": {"architectures": ["Own"], "auto_map": {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.O"}}},
         ["from transformers import AutoModelForCausalLM",
          "model = AutoModelForCausalLM.from_pretrained('m', trust_remote_code=True)"], None),
        ({"config.json": {"architectures": ["x; import os"]}, "model.safetensors": {}},
         ["from safetensors.torch import load_file", "tensors = load_file('m/model.safetensors')"], None),
        ({"modules.json": {}}, ["from sentence_transformers import SentenceTransformer",
                                "model = SentenceTransformer('m')"], "sentence-similarity"),
        ({"model_index.json": {}}, ["from diffusers import DiffusionPipeline",
                                    "pipeline = DiffusionPipeline.from_pretrained('m')"], None),
        ({"config.json": {"_class_name": "UNet2DConditionModel"}},
         ["from diffusers import UNet2DConditionModel", "model = UNet2DConditionModel.from_pretrained('m')"], None),
        ({"adapter_config.json": {"task_type": "CAUSAL_LM"}},
         ["from peft import AutoPeftModelForCausalLM", "model = AutoPeftModelForCausalLM.from_pretrained('m')"],
         "text-generation"),
        ({"adapter_config.json": {"base_model_name_or_path": "BASE"}, "BASE/config.json": BASE},
         ["from peft import PeftModel", "from transformers import AutoModelForCausalLM",
          "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('BASE'), 'm')"], None),
        ({}, [], None),
    ],
)  # fmt: skip
def test_a_model_is_loaded_by_the_class_that_its_config_names(
    files: dict[str, Any], lines: list[str], task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert loading.code_of(tmp_path, "m") == lines
    assert loading.task_of(tmp_path) == task


def test_where_tokenizer_and_template_come_from_is_said(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    modelmerge.merge(models[0], models[1:], tmp_path / "own", method="ties")
    text = (tmp_path / "own" / "README.md").read_text()
    assert "The tokenizer is that of the base, the chat template that of the base." in text
    (models[1] / "tokenizer_config.json").write_text("{}")
    modelmerge.merge(models[0], models[1:], tmp_path / "theirs", method="ties", files_from="expert_0")
    text = (tmp_path / "theirs" / "README.md").read_text()
    assert "The tokenizer is that of 'expert_0', and there is no chat template." in text
    (models[0] / "tokenizer_config.json").unlink()
    (models[0] / "tokenizer.json").unlink(missing_ok=True)
    modelmerge.merge(models[0], models[2:], tmp_path / "none", method="ties")
    assert "tokenizer is" not in (tmp_path / "none" / "README.md").read_text()
