"""The command line: words in; exit code, stdout and stderr out."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path

import pytest

import modelmerge
from modelmerge.cli import main
from modelmerge.cli import options as opt
from modelmerge.methods import registry
from modelmerge.methods.options import option_types
from tests.support.checkpoints import read
from tests.support.commands import import_no_torch, run
from tests.support.processes import running
from tests.support.terminal import seen


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--version"], 0, modelmerge.__version__),
        (["--help"], 0, "Examples"),
        ([], 0, "Examples"),
        (["merge"], 0, "task-arithmetic"),
        (["merge", "--help"], 0, "Examples"),
        (["demo", "--help"], 0, "Examples"),
        (["mrege"], 2, "Did you mean"),
        (["merge", "tise"], 2, "ties"),
        (["merge", "ties"], 2, "Missing argument"),
        (["merge", "ties", "BASE", "E0"], 2, "--output"),
        (["merge", "ties", "BASE", "-o", "out"], 2, "Missing argument"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--desnity", "0.5"], 2, "--density"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--density", "20"], 2, "--density must be above 0 and at most 1"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--density", "much"], 2, "--density"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--reduce", "max"], 2, "--reduce"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--weight", "E0"], 2, "--weight"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--on-mismatch", "skip"], 2, "--on-mismatch"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--weight", "expert_7=1"], 2, "did you mean 'expert_0'"),
        (["merge", "ties", "BASE", "E0", "E0", "-o", "out"], 2, "two experts are called"),
        (["merge", "nearswap", "BASE", "E0", "X=E0", "-o", "out"], 2, "'nearswap' takes one expert, and 2 are named"),
        (["merge", "slerp", "BASE", "E0", "E0", "E0", "-o", "out"], 2, "'slerp' takes 2 experts at most, and 3 are"),
        (["merge", "karcher", "BASE", "E0", "-o", "out", "--weight", "expert_0=0"], 2, "add up to zero"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--device", "cuda:99"], 1, "no such CUDA device"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--json", "-q"], 2, "different formats"),
        (["merge", "ties", "BASE", "./nothing", "-o", "out"], 1, "no such file or directory"),
        (["merge", "ties", "BASE", "org/name@v1", "-o", "out"], 1, "neither a path here nor a repository on the Hub"),
        (["merge", "--recipe", "nothing.json", "-o", "out"], 1, "no such file"),
        (["merge", "--recipe", "nothing.json"], 2, "needs an output"),
        (["merge", "--recipe", "recipe.yaml", "-o", "out"], 1, "no such file"),
        (["merge", "ties", "--preset", "clip-b32", "-o", "out"], 2, "did you mean 'clip-b32-8'? there are: clip"),
        (["merge", "ties", "BASE", "E0", "--preset", "clip-b32-8", "-o", "out"], 2, "unexpected extra argument"),
        (["merge", "--preset", "nothing"], 2, "there is no preset 'nothing'"),
        (["merge", "--preset", "clip-b32-8", "ties", "-o", "out"], 2, "--preset stands before the method"),
        (["merge", "--preset", "clip-b32-8", "-o", "out"], 2, "no method is named"),
        (["merge", "--preset", "clip-b32-8", "--recipe", "x", "-o", "out"], 2, "exclude each other"),
        (["merge", "--preset", "clip-b32-8"], 0, "tanganke/clip-vit-base-patch32_svhn"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--vary", "scale=1"], 2, "No such option: --vary"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--at", "*: sclae=1"], 2, "did you mean 'scale'"),
        (["merge", "--json", "ties", "BASE", "E0", "-o", "out"], 2, "--json stands before the method"),
        (["merge", "ties.yml", "-o", "out"], 2, "--recipe ties.yml"),
        (["merge", "ties", "BASE", "E0", "-o", "out", "--private"], 2, "--private has no effect without --push"),
        (["search", "ties", "BASE", "E0", "-o", "out", "--try", "scale=1"], 2, "Missing option '--on'"),
        (["verify", "BASE"], 1, "holds no finished output"),
        (["guide", "modles"], 2, "did you mean 'models'"),
        (["merge", "-o", "out"], 2, "no method is named"),
        (["merge", "ties", "BASE", "E0", "-o", "BASE"], 1, "is the input"),
        (["merge", "ties", "BASE", "", "E0", "-o", "out"], 2, "'' names no model"),
        (["merge", "ties", "BASE", "math=", "E0", "-o", "out"], 2, "'math=' names no model"),
    ],
)
def test_words_and_exit_codes(
    words: list[str], code: int, says: str, models: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"BASE": models[0], "E0": models[1]}
    got, out, err = run(capsys, *(places.get(word, word) for word in words))
    assert got == code
    assert says in (out if code == 0 else err)
    assert "Traceback" not in err
    assert code != 1 or err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize("name", registry.names())
def test_help_of_a_method_shows_each_option_with_its_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "merge", name, "--help")
    assert code == 0
    assert "Examples" in out
    for option in option_types(registry.load(name).options):
        assert "--" + option.replace("_", "-") in out
    assert "--dry-run" in out


def test_help_imports_no_torch() -> None:
    import_no_torch(
        ["--help"], ["merge", "--help"], ["merge"], ["merge", "apgd", "--help"], ["demo", "--help"], ["--version"],
        ["merge", "tise"], ["merge", "ties", "-o"],
    )  # fmt: skip


def test_merge_prints_what_it_did(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "merge", "ties", *models, "-o", tmp_path / "out", "--weight", "expert_1=2")
    assert code == 0
    assert out.startswith("merged 3 experts with ties: 8 tensors merged, 1 copied from the base\n")
    assert str(tmp_path / "out") in out
    assert err == ""


def test_a_merge_ends_with_what_was_written_and_what_is_next(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in models:
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
        (model / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "merge", "ties", *models[:2], "-o", "my out", "--include", "*embed*")
    lines = out.splitlines()
    assert code == 0
    assert re.match(r"merged 1 expert with ties: 1 tensor merged, \d copied from the base$", lines[0])
    assert " of weights in 1 file, " in lines[1]
    assert lines[1].endswith("beside them README.md, config.json, tokenizer.json and modelmerge.json")
    first, second, python = (line.removeprefix("next").strip() for line in lines[-3:])
    for command in (first, second):
        words = shlex.split(command)
        assert words[0] == "modelmerge"
        assert run(capsys, *words[1:])[0] == 0
    assert (
        python == "from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained('my out')"
    )
    assert run(capsys, "merge", "ties", *models, "-o", "quiet", "-q")[1] == "quiet\n"
    words = ["--layers", "base:0-2", "--layers", "base:1-2"]
    _, out, _ = run(capsys, "merge", "passthrough", models[0], *words, "-o", "high")
    assert out.startswith("merged layers of the base with passthrough: ")
    assert "eval weights" not in out, "a stack has no experts to be set beside"


def test_json_is_all_of_stdout(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "merge", "average", *models, "-o", tmp_path / "out", "--json")
    outcome = json.loads(out)
    assert code == 0
    assert outcome["output"] == str(tmp_path / "out")
    assert outcome["manifest"] == json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "ties", "BASE", "E0", "-o", "new"],
        ["merge", "auto", "BASE", "E0", "-o", "new"],
        ["search", "ties", "BASE", "E0", "-o", "new", "--try", "scale=1,2", "--on", "custom:json:dumps"],
        ["extract", "BASE", "E0", "-o", "new"],
        ["disentangle", "awd", "BASE", "E0", "E1", "-o", "new"],
    ],
)
def test_every_plan_is_one_object(
    words: list[str], models: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"BASE": models[0], "E0": models[1], "E1": models[2]}
    code, out, err = run(capsys, *(places.get(word, word) for word in words), "-n", "--json")
    assert code == 0, err
    outcome = json.loads(out)
    assert outcome.keys() == {"plan"}
    assert {"tensors", "bytes", "peak_memory"} <= outcome["plan"].keys()
    assert outcome["plan"]["peak_memory"].keys() == {"host", "device"}
    assert not Path("new").exists()


@pytest.mark.parametrize("verb", [["extract"], ["disentangle", "awd"]])
def test_verbs_that_write_give_output_and_manifest(
    verb: list[str], models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *verb, *models, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "modelmerge.json").read_bytes())
    assert json.loads(out) == {"output": str(tmp_path / "out"), "manifest": manifest}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["mrege"], 2),
        (["merge", "tise", "base", "math", "-o", "out"], 2),
        (["merge", "ties"], 2),
        (["merge", "ties", "base", "math"], 2),
        (["merge", "ties", "base", "math", "-o", "out", "--dnsity", "1"], 2),
        (["merge", "ties", "base", "math", "-o", "out", "--density", "much"], 2),
        (["merge", "ties", "./base", "./math", "-o", "out"], 1),
        (["merge", "--recipe", "nothing.json", "-o", "out"], 1),
        (["search", "ties", "base", "math", "-o", "out"], 2),
        (["extract"], 2),
        (["eval", "weights"], 2),
        (["eval", "custom", "merged", "--script", "none.py:f"], 1),
        (["verify", "nothing"], 1),
        (["push", "nothing", "org/name"], 1),
        (["guide", "nothing"], 2),
    ],
)
def test_every_failure_is_one_object(
    words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *words, "--json")
    assert got == code
    outcome = json.loads(out)
    assert outcome.keys() == {"error"}
    assert outcome["error"].keys() == {"message", "hint", "exit_code"}
    assert outcome["error"]["exit_code"] == code
    assert err.startswith(f"error: {outcome['error']['message']}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_run_that_is_stopped_says_so(stop: str, code: int, models: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text("import os, signal\ndef f(model):\n    os.kill(os.getpid(), signal.SIGSTOP)\n")
    words = ["eval", "custom", str(models[0]), "--script", f"{script}:f", "--json"]
    with running(words) as process:
        process.until_stopped()
        process.send(signal.Signals[stop])
        assert process.end() == code, process.err()
        out = process.out()
    assert json.loads(out)["error"]["exit_code"] == code


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["merge"], 60), (["merge", "ties"], 70), (["merge", "apgd"], 90), (["search", "ties"], 90), (["extract"], 60),
        (["disentangle", "awd"], 70), (["eval", "weights"], 70), (["verify"], 30), (["push"], 40), (["guide"], 30),
    ],
)  # fmt: skip
def test_help_fits_a_page(
    words: list[str], most: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(capsys, *words, "--help")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 100
    examples = [i for i, line in enumerate(lines) if line.strip().startswith("$ modelmerge")]
    assert len(examples) == 2
    assert examples[-1] < min(i for i, line in enumerate(lines) if "--" in line and i not in examples)


def test_help_of_a_method_begins_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "merge", "ties", "--help")
    assert out.index("Usage") < out.index("$ modelmerge") < out.index("--density") < out.index("--output")


def test_the_shared_options_of_merge_are_those_of_the_contract() -> None:
    shared = {parameter.name for parameter in (*opt.shared(opt.merged), *opt.shared(opt.written))}
    assert shared == {
        "weight", "at", "layers", "rest", "disentangle", "include", "exclude", "on_mismatch", "vocab", "files_from",
        "dtype", "as_lora",
        "max_shard_size", "seed", "device", "stream", "dry_run", "force", "resume", "push", "private",
    }  # fmt: skip


def test_quiet_is_the_path_alone(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "merge", "average", *models, "-o", tmp_path / "out", "-q") == (0, f"{tmp_path / 'out'}\n", "")


def test_an_error_with_json_is_one_object_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "merge", "average", "./no", "./nil", "-o", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out)["error"]["exit_code"] == 1
    assert err.startswith("error: './no'")
    assert "hint: " in err


def test_dry_run_tells_the_plan_and_writes_nothing(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "merge", "apgd", *models, "-o", tmp_path / "out", "--published", "--dry-run", "--json")
    plan = json.loads(out)["plan"]
    assert code == 0
    assert not (tmp_path / "out").exists()
    actions = {t["name"]: (t["action"], t["reason"]) for t in plan["tensors"]}
    assert actions["model.layers.0.q_proj.weight"] == ("merge", "the weight of a linear layer")
    assert actions["model.embed_tokens.weight"] == ("copy", "not the weight of a linear layer")
    assert actions["position_ids"] == ("copy", "I64, not floating")
    stored = sum(f.stat().st_size for m in models for f in m.glob("*.safetensors"))
    assert stored < plan["bytes"]["read"] < 3 * stored
    assert plan["bytes"]["download"] == 0
    assert plan["peak_memory"]["host"] > 0
    code, out, _ = run(capsys, "merge", "apgd", *models, "-o", tmp_path / "out", "-n", "-v")
    assert "peak memory" in out
    assert "model.layers.0.q_proj.weight" in out


def test_recipe_on_the_command_line(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "merge", "ties", *models, "-o", tmp_path / "one", "--density", "0.6")
    code, out, _ = run(capsys, "merge", "--recipe", tmp_path / "one" / "modelmerge.json", "-o", tmp_path / "two", "-q")
    assert (code, out) == (0, f"{tmp_path / 'two'}\n")
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("one", "two"))
    assert one == two


def test_options_override_those_of_a_recipe(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, plain = (tmp_path / name for name in ("one", "two", "plain"))
    run(capsys, "merge", "ties", *models, "-o", one, "--density", "0.6", "--weight", "expert_0=0.5")
    more = (
        "--scale",
        "0.7",
        "--reduce",
        "mean",
        "--weight",
        "expert_1=2",
        "--exclude",
        "*norm*",
        "--dtype",
        "bfloat16",
    )
    code, _, err = run(capsys, "merge", "--recipe", one / "modelmerge.json", "-o", two, *more)
    assert code == 0, err
    words = ("--density", "0.6", "--weight", "expert_0=0.5", *more)
    assert run(capsys, "merge", "ties", *models, "-o", plain, *words)[0] == 0
    recipes = [json.loads((place / "modelmerge.json").read_bytes())["recipe"] for place in (two, plain)]
    assert recipes[0]["options"] == recipes[1]["options"]
    assert (two / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    code, out, _ = run(capsys, "merge", "--recipe", one / "modelmerge.json", "-o", two, "-n", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["method"] == "ties"
    code, _, err = run(capsys, "merge", "--recipe", one / "modelmerge.json", "-o", two, "--power", "2")
    assert (code, "No such option: --power" in err) == (2, True)
    code, out, _ = run(capsys, "merge", "--recipe", one / "modelmerge.json", "--help")
    assert (code, "--density" in out, "--weight" in out) == (0, True, True)


FILES_AND_OPTIONS = {
    "a scale": (["ties"], ["--scale", "0.5"]),
    "another's option": (["ties", "--scale", "0.5"], ["--density", "0.5"]),
    "beside an override": (["task-arithmetic", "--at", "*q_proj*: scale=0.2"], ["--scale", "0.5"]),
    "beside an override's method": (["kron", "--at", "*up_proj*: ties density=0.5"], ["--scale", "0.5"]),
    "beside an expert's override": (["dare", "--at", "*: expert_0.density=0.5"], ["--density", "0.25", "--seed", "3"]),
    "a weight": (["average", "--weight", "expert_0=2"], ["--weight", "expert_1=0.5"]),
    "behind a transform": (["apgd", "--disentangle", "awd alpha=0.2"], ["--scale", "0.5"]),
    "a transform": (["tsv-m"], ["--disentangle", "awd alpha=0.2"]),
}


@pytest.mark.parametrize("case", FILES_AND_OPTIONS)
def test_a_recipe_with_options_is_the_merge_with_both(
    case: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (method, *first), more = FILES_AND_OPTIONS[case]
    for words in (
        (method, *models, *first, "-o", tmp_path / "file"),
        ("--recipe", tmp_path / "file" / "modelmerge.json", *more, "-o", tmp_path / "again"),
        (method, *models, *first, *more, "-o", tmp_path / "both"),
    ):
        code, _, err = run(capsys, "merge", *words)
        assert code == 0, err
    again, both, file = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("again", "both", "file"))
    assert again == both != file


YAMLS = {  # the parameters of the file, of its first and second model, typed options, and the same without the file
    "a scale": ("lambda: 0.5", "weight: 1", ["--scale", "0.3"], ["--scale", "0.3"]),
    "an override": (
        "lambda: 0.5", "weight: 1", ["--at", "*q_proj*: scale=0.1"], ["--scale", "0.5", "--at", "*q_proj*: scale=0.1"],
    ),
    "an override before the file's gradient": (
        "lambda: 0.5", "weight: [0.1, 0.9]", ["--at", "*q_proj*: base"],
        ["--scale", "0.5", "--at", "*q_proj*: base", "--at", "*: expert_0.weight=0.1,0.9"],
    ),
    "a weight for a gradient": (
        "lambda: 0.5", "weight: [0.1, 0.9]", ["--weight", "expert_0=0.3"],
        ["--scale", "0.5", "--weight", "expert_0=0.3"],
    ),
    "another's weight": (
        "lambda: 0.5", "weight: [0.1, 0.9]", ["--weight", "expert_1=0.3"],
        ["--scale", "0.5", "--weight", "expert_1=0.3", "--at", "*: expert_0.weight=0.1,0.9"],
    ),
    "a scale for a filter": (
        "lambda: [{filter: q_proj, value: 0.2}, {value: 0.5}]", "weight: 1", ["--scale", "0.7"], ["--scale", "0.7"],
    ),
    "a transform": (
        "lambda: 0.5", "weight: 1", ["--disentangle", "awd alpha=0.2"],
        ["--scale", "0.5", "--disentangle", "awd alpha=0.2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", YAMLS)
def test_options_count_for_more_than_what_a_yaml_says_of_them(
    case: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, own, typed, same_as = YAMLS[case]
    base, *experts = models[:3]
    listed = (
        f"  - model: {experts[0]}\n    parameters: {{{own}}}\n  - model: {experts[1]}\n    parameters: {{weight: 1}}\n"
    )
    file = tmp_path / "mergekit.yml"
    file.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: float32\n"
        f"parameters: {{{shared}}}\nmodels:\n{listed}"
    )
    code, _, err = run(capsys, "merge", "--recipe", file, "-o", tmp_path / "one", *typed)
    assert code == 0, err
    words = ("task-arithmetic", base, *experts, "--dtype", "float32", *same_as)
    assert run(capsys, "merge", *words, "-o", tmp_path / "two")[0] == 0
    one, two = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("one", "two"))
    assert one == two
    code, _, err = run(capsys, "merge", "--recipe", file, "-o", tmp_path / "no", "--at", "*nothing*: base")
    assert (code, "'*nothing*: base' matches no tensor of the base" in err) == (2, True)


def test_options_override_those_of_mergekit_s_yaml(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mergekit.yml"
    file.write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\ndtype: float32\n"
        f"models:\n  - model: {models[1]}\n    parameters: {{weight: 0.5}}\n"
    )
    code, out, err = run(capsys, "merge", "--recipe", file, "-o", tmp_path / "out", "--seed", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["manifest"]["recipe"]["seed"] == 3


def test_the_card_s_command_repeats_the_merge(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    out = tmp_path / "out"
    words = ["--published", "--steps", "2", "--weight", "expert_0=0.5", "--rest", "average"]
    run(capsys, "merge", "apgd", *models, "-o", out, *words)
    block = (out / "README.md").read_text().partition("```sh\n")[2].partition("```")[0]
    assert len(block.splitlines()) > 5  # nobody reads a line that has to be scrolled
    line = block.replace("\\\n", "")
    before = (out / "model.safetensors").read_bytes()
    assert main([*shlex.split(line)[1:], "--force"]) == 0
    assert (out / "model.safetensors").read_bytes() == before


def test_the_device_can_come_from_the_environment(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELMERGE_DEVICE", "cuda:99")
    code, _, err = run(capsys, "merge", "average", *models, "-o", tmp_path / "out")
    assert code == 1
    assert "cuda:99" in err


def test_an_unexpected_exception_keeps_its_traceback_and_is_called_a_bug(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelmerge.verbs import prepare as verb

    def broken(*words: object, **named: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(verb, "prepare", broken)
    code, _, err = run(capsys, "merge", "average", *models, "-o", tmp_path / "out")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err
    assert "bug in modelmerge" in err


def test_a_terminal_sees_bytes_and_tensor_names(models: list[Path], tmp_path: Path) -> None:
    text, out, code = seen(["merge", "ties", *map(str, models), "-o", str(tmp_path / "out")])
    assert code == 0
    assert "merged 3 experts" in out
    assert "measuring" in text
    assert "merging" in text
    assert "kB" in text
    assert any(name[-8:] in text for name in read(models[0]))  # the terminal is narrow: a name's end is what tells


def test_no_color_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, err = run(capsys, "merge", "average", "./no", "./nil", "-o", tmp_path / "out")
    assert "\x1b" not in out + err


@pytest.mark.parametrize(("words", "reason"), [
    (["disentangle", "awd", "base", "a", "b", "-o", "out"], "each vector that it writes takes all experts"),
    (["eval", "weights", "a"], "eval is one process"),
    (["search", "ties", "base", "a", "-o", "out", "--try", "scale=1", "--on", "custom:f"], "a search is one process"),
])  # fmt: skip
def test_what_cannot_be_shared_out_says_why(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words, "--cluster", "files")
    assert code == 2
    assert "No such option: --cluster" in err
    assert f"hint: {reason}" in err
