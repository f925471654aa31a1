"""The guide that comes first, line by line, in the order in which a newcomer types them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from modelmerge import guides
from modelmerge.cli import main
from modelmerge.evaluation import digits
from modelmerge.verbs import demo as verb
from tests.support.checkpoints import read, same_bits
from tests.support.guides import GUIDES, blocks, commands
from tests.support.hub_server import OWNER, FakeHub

# A library of the Hub's client is behind its times.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TEXT = GUIDES["start"].read_text()


def test_the_list_of_guides_begins_with_it() -> None:
    assert guides.names()[0] == "start"
    assert all(f"modelmerge guide {name}" in TEXT for name in ("models", "images", "mergekit", "ci", "scale"))


def test_every_line_works_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: FakeHub
) -> None:
    """The demo with three of its tasks and less training; all else as it is written."""
    views = {name: digits._VIEWS[name] for name in ("striped", "rotated", "swapped")}
    monkeypatch.setattr(digits, "_VIEWS", views)
    monkeypatch.setattr(digits, "TASKS", tuple(views))
    monkeypatch.setattr(digits, "_BASE_STEPS", 50)
    monkeypatch.setattr(digits, "_EXPERT_STEPS", 40)
    monkeypatch.setattr(verb, "suited", lambda experts: ["average"])
    monkeypatch.setattr(verb, "SCALES", (0.3,))
    monkeypatch.setenv("HF_TOKEN", OWNER)
    monkeypatch.chdir(tmp_path)
    said = {}
    for line in commands(TEXT):
        words = shlex.split(line.replace("me/", "alice/"), comments=True)[1:]
        assert main(words) == 0, (line, capsys.readouterr().err)
        said[line] = capsys.readouterr()
    outputs = {place.parent.name for place in tmp_path.glob("*/modelmerge.json")}
    assert outputs == {"merged", "again", "swapped-lora", "best"}
    assert (tmp_path / "swapped-lora" / "adapter_config.json").is_file()
    assert same_bits(read(Path("merged")), read(Path("again")))
    manifest = json.loads(Path("merged/modelmerge.json").read_text())
    assert [expert["name"] for expert in manifest["inputs"]["experts"]] == ["striped", "rotated", "swapped"]
    assert "<html" in Path("merged.html").read_text()
    assert "model.safetensors" in hub.files("alice/digits-merged")
    # The block of Python, and that the merge has learnt from its experts.
    tensors: dict[str, torch.Tensor] = {}
    (code,) = blocks(TEXT, "python")
    exec(code, tensors)
    assert tensors["tensors"].keys() == read(Path("demo/base")).keys()
    scores = next(each.out for line, each in said.items() if "eval custom" in line and "--report" not in line)
    rows = {row.split()[0]: float(row.split()[-2]) for row in scores.splitlines() if row.count("±") > 3}
    assert rows["merged"] > rows["base"]
