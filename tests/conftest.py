from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import family


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep remembered digests out of the user's cache."""
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A float32 base and three experts: [base, expert_0, expert_1, expert_2]."""
    return family(tmp_path / "models")
