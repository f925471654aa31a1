"""Completion: one command installs it, and a shell that a person types into offers what there is, in no time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from modelmerge.methods import registry
from modelmerge.plan import presets
from tests.support.commands import program, script
from tests.support.terminal import Shell

LINES = [
    ("modelmerge merge karch", "modelmerge merge karcher"),
    ("modelmerge merge ties base --dens", "modelmerge merge ties base --density"),
    ("modelmerge merge kron base --rest brea", "modelmerge merge kron base --rest breadcrumbs"),
    ("modelmerge merge ties --preset clip-l14-2", "modelmerge merge ties --preset clip-l14-20"),
    ("modelmerge merge apgd base --solver ex", "modelmerge merge apgd base --solver exact"),
    ("modelmerge merge ties some-ba", "modelmerge merge ties some-base"),
    ("modelmerge merge ties some-base -o some-ou", "modelmerge merge ties some-base -o some-output"),
]


@pytest.fixture(params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """The shell of somebody who has installed completion, in a folder with two others."""
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    for name in ("some-base", "some-output"):
        (tmp_path / name).mkdir()
    environment = {**program(tmp_path / "bin"), "HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "200"}
    install = [request.param, "-c", "modelmerge --install-completion; exit $?"]
    subprocess.run(install, cwd=tmp_path, env=environment, check=True, capture_output=True)
    return Shell(request.param, tmp_path, environment)


def test_a_shell_completes_methods_options_their_values_and_paths(shell: Shell) -> None:
    with shell:
        if shell.name == "zsh":  # the first tab of a session only reads the file
            shell.completed("modelmerge ")
        for line, whole in LINES:
            assert [word.rstrip("/") for word in shell.completed(line)] == whole.split()


def test_zsh_shows_the_help_line_of_each_method(shell: Shell) -> None:
    if shell.name != "zsh":
        pytest.skip("bash shows words alone")
    with shell:
        shell.completed("modelmerge ")
        shown = shell.shown("modelmerge merge t", until="tsv-m .*\\.")
        for name in ("task-arithmetic", "ties", "tsv-m"):
            line = registry.summary(name).replace("'", "")  # Typer has no quotes in zsh
            assert re.search(f"{name} +-- {re.escape(line)}", shown)


def offered(line: str) -> list[str]:
    """What bash is offered for the last word of a line, in a process where nothing has imported torch."""
    words = line.split(" ")
    environment = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_MODELMERGE_COMPLETE": "complete_bash"}
    done = script(
        "import os, sys\n"
        f"os.environ |= {environment}\n"
        "from modelmerge.cli import main\n"
        "main([])\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_all_there_is_is_offered_without_torch() -> None:
    transforms = list(registry.names("transform"))
    for line, words in (
        ("modelmerge merge ", [*registry.names(), "auto"]),
        ("modelmerge disentangle ", transforms),
        ("modelmerge search ties --disentangle ", transforms),
        ("modelmerge merge kron --rest ", ["base", *registry.names()]),
        ("modelmerge merge ties --preset ", list(presets.names())),
        ("modelmerge merge ties --trim-scope ", ["model", "tensor"]),
        ("modelmerge merge ties ", []),  # paths are the shell's
    ):
        assert offered(line) == words, line
