"""What the README and the guides say is what the code does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelmerge.cli import main
from modelmerge.methods import registry
from tests.support.checkpoints import expert_state, write
from tests.support.guides import BLOCKS, GUIDES, README, ROOT, blocks, commands, renewed

TEXTS = {"README": README.read_text(), **{topic: file.read_text() for topic, file in GUIDES.items()}}
# Programs whose options are not ours.
OTHERS = ("pip", "python", "pytest", "hf", "ruff", "mypy")
METRIC = """
def accuracy(model, task=None):
    return float(model["lm_head.weight"].abs().mean())


validation = accuracy
"""
LAYERS = 8
SHAPES = {
    "model.embed_tokens.weight": (24, 16),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj.weight": (16, 16),
            "mlp.up_proj.weight": (40, 16),
            "mlp.up_proj.bias": (40,),
            "norm.weight": (16,),
        }.items()
    },
    "lm_head.weight": (24, 16),
}


COMMANDS = {line: topic for topic, text in TEXTS.items() for line in commands(text)}


def base_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul(0.1) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that most examples name; the others are not there."""
    directory = tmp_path_factory.mktemp("shelf")
    base = base_state()
    write(directory / "base", base)
    config = json.dumps({"model_type": "tiny", "num_hidden_layers": LAYERS})
    (directory / "base" / "config.json").write_text(config)
    for seed, names in enumerate((("math", "7"), ("code", "9"))):
        for name in names:
            write(directory / name, expert_state(base, seed))
            (directory / name / "config.json").write_text(config)
    return directory


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the examples presume it."""
    for name in ("base", "math", "code", "runs/7", "runs/9"):
        link = tmp_path / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(shelf / link.name)
    (tmp_path / "metric.py").write_text(METRIC)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "first.yaml").write_text("task: first\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("topic", BLOCKS)
def test_the_generated_blocks_are_current(topic: str) -> None:
    assert renewed(topic, TEXTS[topic]) == TEXTS[topic], "run python -m tests.support.guides"


def test_the_readme_is_short_and_names_every_guide() -> None:
    assert len(TEXTS["README"].splitlines()) <= 180
    linked = re.findall(r"\]\((modelmerge/guides/\w+\.md)\)", TEXTS["README"])
    assert {ROOT / link for link in linked} == set(GUIDES.values())


def test_the_readme_begins_with_the_demo_and_the_tests() -> None:
    first, second = blocks(TEXTS["README"], "sh")[0].splitlines()
    assert re.match(r'pip install "\.\[demo\]" && modelmerge demo\b', first)
    assert re.match(r'pip install "\.\[test\]" && pytest\b', second)  # .ci/run finds it by its first words


@pytest.mark.parametrize("topic", GUIDES)
def test_a_guide_is_short_and_begins_with_a_paragraph_and_a_command(topic: str) -> None:
    text = TEXTS[topic]
    assert len(text.splitlines()) <= 200
    title, paragraph, command, *_ = text.split("\n\n")
    assert title.startswith("# ")
    assert re.match(r"[\w`]", paragraph)
    assert not paragraph.startswith("```")
    assert command.startswith("```sh\nmodelmerge ")


def test_every_verb_is_shown() -> None:
    words = [shlex.split(line, comments=True) for line in COMMANDS]
    verbs = {"demo", "merge", "search", "extract", "disentangle", "eval", "verify", "push"}
    assert verbs <= {line[1] for line in words}
    assert len({line[2] for line in words if line[1:2] == ["merge"] and len(line) > 2} & set(registry.names())) >= 4


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=f"{COMMANDS[line]}: {line}") for line in COMMANDS if line.split()[1] != "demo"]
)
def test_every_command_is_right_usage(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(shlex.split(line, comments=True)[1:])
    # Some models it names are not there: 1. Words that are not the command's own would be 2.
    err = capsys.readouterr().err
    # Models, outputs, data sets and extras that are not there.
    absent = (
        "no such file", "no such directory", "nor a repository on the Hub", "holds no finished output", "data set '",
        "which is not installed", "there is no 'lm_eval'", "cannot be loaded",
    )  # fmt: skip
    assert code == 0 or (code == 1 and any(words in err.lower() for words in map(str.lower, absent))), err


@pytest.mark.parametrize("topic", ["", *GUIDES])
def test_the_terminal_shows_the_guides(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide", *topic.split()]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in GUIDES) if not topic else TEXTS[topic].split("\n")[0].strip("# ") in shown


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command, by the help pages."""
    pages = [["merge", name] for name in [*registry.names("merge"), "auto"]]
    pages += [["search", "ties"]]  # the options of the methods are those of merge
    pages += [["disentangle", name] for name in registry.names("transform")]
    pages += [["eval", suite] for suite in ("weights", "clip", "custom", "lm", "report")]
    pages += [["merge"], ["extract"], ["verify"], ["push"], ["guide"], ["demo"], []]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        return {option for page in pages for option in re.findall(r"--[a-z][a-z-]*", help_of(page))}


def help_of(words: list[str]) -> str:
    import contextlib
    import io

    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        main([*words, "--help"])
    return page.getvalue()


@pytest.mark.parametrize("topic", TEXTS)
def test_every_option_that_a_page_names_exists(topic: str, options: set[str]) -> None:
    text = TEXTS[topic]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    ours = [span for span in spans if not span.startswith(OTHERS)]
    named = {option for span in [*ours, *commands(text)] for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert named <= options


@pytest.mark.parametrize("topic", TEXTS)
def test_every_file_of_the_repository_that_a_page_names_exists(topic: str) -> None:
    named = re.findall(r"(?<![\w/.])(?:tests|modelmerge)/[\w./-]*\w", TEXTS[topic])
    modules = re.findall(r"python -m (tests\.[\w.]*\w)", TEXTS[topic])
    assert [name for name in named if not (ROOT / name).exists()] == []
    for place in (ROOT / module.replace(".", "/") for module in modules):
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), place


@pytest.mark.parametrize("topic", TEXTS)
def test_nobody_is_sent_to_the_other_modelmerge_on_pypi(topic: str) -> None:
    for requirements in re.findall(r"pip3? install ([^&;|`\n]*)", TEXTS[topic]):
        assert not re.search(r"(?<![\w$./-])modelmerge(?![\w-])", requirements), requirements


def test_the_python_of_the_readme_runs(place: Path) -> None:
    base = base_state()
    names = {"base": base, "math": expert_state(base, 0), "code": expert_state(base, 1)}
    for block in blocks(TEXTS["README"], "python"):
        exec(compile(block, "<README>", "exec"), names)  # the README is ours
    assert (place / "today.html").exists()
    assert set(names["merged"]) == set(base)


def test_the_methods_that_users_begin_with_have_a_figure() -> None:
    for name in ("average", "task-arithmetic", "ties", "apgd"):
        assert f"| {name} |" in TEXTS["README"]
