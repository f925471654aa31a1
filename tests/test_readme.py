"""What the README says is what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from modelmerge.cli import main
from modelmerge.methods import registry
from tests.readme import README, renewed

TEXT = README.read_text()
COMMANDS = re.findall(r"^modelmerge .*$", TEXT, flags=re.MULTILINE)


def test_the_generated_blocks_are_current() -> None:
    assert renewed(TEXT) == TEXT, "run python -m tests.readme"


def test_every_command_is_shown() -> None:
    assert len(COMMANDS) > 8
    shown = {line.split()[2] for line in COMMANDS if line.startswith("modelmerge merge ")}
    assert len(shown & set(registry.names())) >= 4
    for word in ("demo", "extract", "disentangle awd"):
        assert any(line.startswith(f"modelmerge {word}") for line in COMMANDS), word


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("modelmerge demo")])
def test_every_command_in_the_readme_is_right_usage(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "first.yaml").write_text("task: first\n")
    code = main(shlex.split(line, comments=True)[1:])
    # The models it names are not there: 1. Words that are not the command's own would be 2.
    err = capsys.readouterr().err
    # Models, data sets and extras that are not there.
    absent = (
        "no such file", "nor a repository on the Hub", "data set '", "which is not installed", "there is no 'lm_eval'",
        "cannot be loaded",
    )  # fmt: skip
    assert code == 0 or (code == 1 and any(words in err.lower() for words in map(str.lower, absent)))


def test_the_methods_that_users_begin_with_have_a_figure() -> None:
    table = TEXT.partition("## Figures")[2]
    for name in ("average", "task-arithmetic", "ties", "apgd"):
        assert f"| {name} |" in table
