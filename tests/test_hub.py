"""Models on the Hub: the real client against a server on the loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelmerge
from modelmerge.cli import main
from tests.checkpoints import family
from tests.hub_server import FakeHub


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    """The same models on disk as on the Hub: [base, expert_0, expert_1]."""
    return family(tmp_path / "local", experts=2)


@pytest.fixture
def names(hub: FakeHub, local: list[Path]) -> list[str]:
    """A base and two experts on the Hub."""
    for directory in local:
        hub.add(f"org/{directory.name}", directory)
    return [f"org/{directory.name}" for directory in local]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def same(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_models_on_the_hub_merge_to_the_same_bits_as_on_disk(
    hub: FakeHub, names: list[str], local: list[Path], tmp_path: Path
) -> None:
    modelmerge.merge(local[0], local[1:], tmp_path / "here", method="ties")
    manifest = modelmerge.merge(names[0], names[1:], tmp_path / "there", method="ties")
    assert same(tmp_path / "here", tmp_path / "there")
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "there" / file).read_bytes() == (local[0] / file).read_bytes()
    # Of the experts, only what is merged: no tokenizers.
    assert not hub.asked("expert_.*tokenizer")
    commits = [hub.repos[name].refs["main"] for name in names]
    assert manifest["recipe"]["base"] == f"{names[0]}@{commits[0]}"
    assert manifest["recipe"]["experts"] == [
        f"expert_{i}={name}@{commit}" for i, name, commit in zip(range(2), names[1:], commits[1:], strict=True)
    ]
