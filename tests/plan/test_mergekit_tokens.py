"""What a mergekit YAML says of tokenizers and chat templates: replays, adapters, files; the numbers are elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

import modelmerge
from modelmerge.checkpoint.templates import NAMES, template_of
from modelmerge.cli import main
from modelmerge.errors import ModelMergeError, OutputError, PlanError
from modelmerge.record.redaction import published
from tests.support.checkpoints import read
from tests.support.hub_server import FakeHub
from tests.support.mergekit_runs import CONFIGS, ORACLE, PIECES, TABLES, write_tokenizer

EMBED, HEAD = TABLES
UNION = """
merge_method: task_arithmetic
base_model: BASE
models:
  - {model: MATH, parameters: {weight: 0.5}}
  - {model: CODE, parameters: {weight: 0.7}}
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: auto
"""
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "turn": [{"role": "user", "content": " Hi there. "}],
    "turns": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello!\n"},
        {"role": "user", "content": "Add 1\nand 2."},
    ],
    "closed": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    "system": [
        {"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"},
    ],
    "input": [{"role": "user", "content": "Sum up."}, {"role": "user_context", "content": "A text."}],
    "later": [
        {"role": "user", "content": "Hi"}, {"role": "system", "content": "Now in French."},
        {"role": "user", "content": "Bye"},
    ],
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the models of the configurations."""
    shutil.copytree(ORACLE / "models" / "tokens", tmp_path / "models" / "tokens")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models" / "tokens"


def run(text: str, out: str = "out") -> dict[str, Any]:
    """The manifest of what a configuration gives, of models by their names in capitals."""
    for name in ("BASE", "MATH", "CODE", "BARE"):
        text = text.replace(name, f"models/tokens/{name.lower()}")
    Path("c.yml").write_text(text)
    return modelmerge.replay("c.yml", out, force=True)


def test_a_manifest_repeats_what_options_cannot_say(models: Path) -> None:
    first = modelmerge.replay(CONFIGS / "tokens-each.yml", "one")
    assert first["recipe"]["vocab"] == "base"
    assert first["recipe"]["tables"]["multiple"] == 8
    assert first["recipe"]["tables"]["tokens"]["ab"] == {"model": "math", "force": True}
    assert first["command"] == "modelmerge merge --recipe modelmerge.json -o one"
    modelmerge.replay("one", "two")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()
    modelmerge.verify("two")


def test_a_vocabulary_on_the_command_line_has_its_own_meaning(models: Path) -> None:
    run(UNION, "mergekit")
    assert main(["merge", "--recipe", "c.yml", "-o", "ours", "--vocab", "union", "-q"]) == 0
    modelmerge.merge(
        models / "base", [models / "math", models / "code"], "plain", method="task-arithmetic", vocab="union",
        weights={"math": 0.5, "code": 0.7}, scale=1.0,
    )  # fmt: skip
    ours, plain, theirs = (read(Path(name)) for name in ("ours", "plain", "mergekit"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert not torch.equal(ours[HEAD], theirs[HEAD])


def test_rows_go_by_number_where_the_file_names_no_tokenizer(models: Path) -> None:
    """As in mergekit; a recipe says so only where it makes a difference."""
    text = UNION.partition("tokenizer:")[0].replace("MATH", "models/tokens/other").replace("CODE", "BARE")
    manifest = run(text)
    assert manifest["recipe"]["tables"] == {"rows": "stored"}
    assert any(
        "go by their number, as in mergekit, though tokens differ: 'other'" in note for note in manifest["notes"]
    )
    assert run(text.replace("models/tokens/other", "BARE").replace("BARE", "BASE", 1))["recipe"]["tables"] is None


def test_a_head_of_another_model_comes_by_number_too(models: Path) -> None:
    text = "merge_method: passthrough\nslices:\n"
    for name in ("base", "other"):
        text += f"  - sources: [{{model: models/tokens/{name}, layer_range: [0, 1]}}]\n"
    manifest = run(text)
    assert any(
        "go by their number, as in mergekit, though tokens differ: 'other'" in note for note in manifest["notes"]
    )
    assert torch.equal(read(Path("out"))[HEAD], read(models / "other")[HEAD])
    manifest = run(text + "tokenizer_source: base\n")
    assert not any("go by their number" in note for note in manifest["notes"])
    place = json.loads((models / "other" / "tokenizer.json").read_text())["model"]["vocab"]["a"]
    assert torch.equal(read(Path("out"))[HEAD][0], read(models / "other")[HEAD][place])


def test_a_model_without_a_tokenizer_has_the_bases(models: Path) -> None:
    manifest = modelmerge.replay(CONFIGS / "tokens-bare.yml", "out")
    said = "'bare': it has no tokenizer that can be read, and is taken to have the base's."
    assert said in manifest["notes"]


@pytest.mark.parametrize("multiple", [1, 8])
def test_an_adapter_is_the_model_that_it_makes(multiple: int, models: Path) -> None:
    """Its changes to tables, in rows and in columns, are cut and padded as those tables are."""
    base = load_file(models / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    up, down, left, right = (torch.randn(shape, generator=generator) for shape in ((16, 2), (2, 8), (2, 16), (8, 2)))
    factors = {"lm_head.lora_B.weight": up, "lm_head.lora_A.weight": down}
    factors |= {"model.embed_tokens.lora_embedding_A": left, "model.embed_tokens.lora_embedding_B": right}
    Path("models/lora").mkdir()
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in factors.items()}, "models/lora/adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "embed_tokens"]}
    Path("models/lora/adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(models / "base", models / "whole")
    whole = {**base, HEAD: base[HEAD] + up @ down, EMBED: base[EMBED] + (right @ left).T}
    save_file(whole, models / "whole" / "model.safetensors", metadata={"format": "pt"})
    text = UNION.replace("of: 8", f"of: {multiple}")
    run(text.replace("CODE", "models/tokens/whole"), "one")
    run(text.replace("CODE", "BASE+models/lora"), "two")
    one, two = read(Path("one")), read(Path("two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    forced = "\ntokenizer: {source: base, tokens: {a: {source: BASE+models/lora, force: true}}}\n"
    with pytest.raises(PlanError, match="a token's row is to be its own"):
        run(UNION.replace("CODE", "BASE+models/lora").partition("tokenizer:")[0] + forced)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ("{<|code|>: {source: MATH}}", r"the row of '<\|code\|>' is to be that of '<\|code\|>' of 'math', which has"),
        ("{ab: {force: true, source: {kind: model_token, model: CODE, token_id: 20}}}", "that of 20 of 'code'"),
        ("{zz: {source: {kind: model_token, model: BASE, token: yy}}}", "that of 'yy' of 'base'"),
    ],
)
def test_a_row_that_there_is_not_is_refused(tokens: str, says: str, models: Path) -> None:
    with pytest.raises(PlanError, match=says):
        run(UNION.replace("source: union", f"source: union, tokens: {tokens}"))
    assert not Path("out").exists()


def test_models_of_several_dtypes_lend_rows_to_one_another(models: Path) -> None:
    """Rows in float32 lose nothing in a model of bfloat16, where the file says no dtype."""
    text = UNION.replace("BASE", "models/tokens/half").replace("8}", "16}")
    run(text, "one")
    wide = {name: tensor.float() for name, tensor in read(models / "half").items()}
    save_file(wide, models / "half" / "model.safetensors", metadata={"format": "pt"})
    run(text, "two")
    one, two = read(Path("one")), read(Path("two"))
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-6)


def test_models_on_the_hub_are_filled_too(models: Path, hub: FakeHub) -> None:
    (models / "math" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    run(UNION, "here")
    for name in ("base", "math", "code"):
        hub.add(f"org/{name}", models / name)
    text = Path("c.yml").read_text().replace("models/tokens/", "org/")
    Path("c.yml").write_text(text)
    for stream in (True, False):
        modelmerge.replay("c.yml", "there", stream=stream, force=True)
        for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
            assert (Path("there") / name).read_bytes() == (Path("here") / name).read_bytes()


def test_a_tokenizer_of_a_model_that_is_not_merged(models: Path, hub: FakeHub) -> None:
    """From here or the Hub, where its weights are not asked for; a manifest repeats it, and shows others no path."""
    text = UNION.replace("source: union", "source: models/tokens/other")
    manifest = run(text, "here")
    assert "'models/tokens/other' gives its tokenizer and is not merged." in manifest["notes"]
    assert manifest["recipe"]["tables"]["tokenizer"] == {
        "name": "other",
        "reference": str((models / "other").resolve()),
    }
    modelmerge.replay("here", "again")
    hub.add("org/other", models / "other")
    there = run(text.replace("models/tokens/other", "org/other"), "there")
    assert there["recipe"]["tables"]["tokenizer"]["reference"].startswith("org/other@")
    assert not [request.path for request in hub.requests if "safetensors" in request.path]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (Path("here") / name).read_bytes() == (Path("again") / name).read_bytes()
        assert (Path("here") / name).read_bytes() == (Path("there") / name).read_bytes()
    shown = published(json.loads(Path("here/modelmerge.json").read_text()))
    assert shown["recipe"]["tables"]["tokenizer"] == {"name": "other", "reference": "other"}
    assert str(models.resolve()) not in json.dumps(shown)
    Path("c.yml").write_text(Path("c.yml").read_text().replace("org/other", "models/tokens/other"))
    with pytest.raises(OutputError):  # its files are an input
        modelmerge.replay("c.yml", models / "other", force=True)
    with pytest.raises(PlanError, match="the tokens of 'bare' cannot be told: there are no tokenizer files"):
        run(text.replace("models/tokens/other", "BARE"))
    rows = "source: base, tokens: {cd: {source: models/tokens/other}}"
    with pytest.raises(PlanError, match="the row of 'cd' is to be that of 'other', which is not merged there"):
        run(UNION.replace("source: union", rows).replace("CODE", "models/tokens/half"))


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("tables", {"rows": "both"}, "recipe.tables.rows must be"), ("tables", {}, "rows is missing"),
        ("tables", {"rows": "filled", "multiple": 0}, "multiple must be above 0"),
        ("tables", {"rows": "filled", "tokens": {"ab": {"model": "who", "force": True}}}, "which is not merged there"),
        ("chat_template", "../chatml", "is no template, and no name of one: '../chatml'"),
    ],
)  # fmt: skip
def test_a_manifest_that_asks_for_what_there_is_not_is_refused(entry: str, value: Any, says: str, models: Path) -> None:
    run(UNION, "one")
    manifest = json.loads(Path("one/modelmerge.json").read_text())
    manifest["recipe"][entry] = value
    Path("one/modelmerge.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelMergeError, match=says):
        modelmerge.replay("one", "two", allow_different_bits=True)


def test_a_token_that_was_added_anywhere_is_an_added_token(models: Path) -> None:
    """With the flags it has there, also where another model has it for a piece; pieces come first."""
    for name, pieces, added in (("math", ["<|x|>"], ["<|y|>"]), ("code", ["cd"], ["<|x|>"])):
        for old in (models / name).glob("tokenizer*"):
            old.unlink()
        write_tokenizer(models / name, [*PIECES, *pieces], ["<s>", "</s>", *added])
    run(UNION)
    more = {t["content"]: t for t in json.loads(Path("out/tokenizer.json").read_text())["added_tokens"]}
    assert [(t, more[t]["id"], more[t]["special"]) for t in list(more)[2:]] == [
        ("cd", 11, False), ("<|x|>", 12, True), ("<|y|>", 13, True)
    ]  # fmt: skip


# --- chat templates ---


def rendered(template: str, conversation: list[dict[str, str]], *, more: bool) -> str | None:
    """A conversation as transformers renders it; None where the template raises an error."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=conversation, add_generation_prompt=more, bos_token="<s>", eos_token="</s>"
        )
    except TemplateError:
        return None


@pytest.mark.parametrize("name", NAMES)
def test_a_template_of_mergekits_renders_as_there(name: str, models: Path) -> None:
    expected = json.loads((ORACLE / "chat_templates.json").read_text())[name]
    run(UNION.replace("auto", name))
    template = Path("out/chat_template.jinja").read_text()
    for turns, conversation in CONVERSATIONS.items():
        for more in (False, True):
            assert rendered(template, conversation, more=more) == expected[f"{turns}{'+' * more}"], turns


def test_auto_is_the_most_common_template(models: Path) -> None:
    """A file, an entry, and the default one of several; an adapter has its base's."""
    assert "None of the models has a chat template." in run(UNION)["notes"]
    assert not Path("out/chat_template.jinja").exists()
    (models / "math" / "chat_template.jinja").write_text("{{ messages[0].content }}\n")
    run(UNION)
    assert Path("out/chat_template.jinja").read_text() == "{{ messages[0].content }}"
    other = [{"name": "tools", "template": "{{ tools }}"}, {"name": "default", "template": "{{ bos_token }}"}]
    for name, template in (("code", other), ("base", "{{ bos_token }}")):
        (models / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    run(UNION)
    assert Path("out/chat_template.jinja").read_text() == "{{ bos_token }}"
    assert json.loads(Path("out/tokenizer_config.json").read_text())["chat_template"] == "{{ bos_token }}"


def test_a_template_stands_where_the_tokenizer_had_it(models: Path) -> None:
    template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    (models / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ old }}", "a": 1}))
    (models / "base" / "chat_template.json").write_text(json.dumps({"chat_template": "{{ old }}"}))
    manifest = run(UNION.replace("auto", json.dumps(template)))
    assert json.loads(Path("out/tokenizer_config.json").read_text()) == {"chat_template": template, "a": 1}
    assert Path("out/chat_template.jinja").read_text() == template
    assert not Path("out/chat_template.json").exists()
    assert manifest["recipe"]["chat_template"] == template == template_of(template, None, ())  # type: ignore[arg-type]
