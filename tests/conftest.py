from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_server import FakeHub

# The client reads its settings when it is imported: before that, it is pointed at a Hub of our own and away from the
# user's token and cache. Xet, the Hub's protocol for large files, is off: the server here speaks HTTP and LFS.
_HUB = FakeHub()
_HOME = tempfile.mkdtemp(prefix="modelmerge-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ |= {"HF_ENDPOINT": _HUB.endpoint, "HF_HOME": _HOME, "HF_HUB_DISABLE_XET": "1"}
# OpenMP reads its settings when torch is imported. Two threads, so that everything that is shared out is so on every
# machine; threads that wait sleep, since spinning they would take the processors from the tests beside.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Files whose tests need libraries that take seconds to import: one process imports them for all.
_HEAVY = (
    "checkpoint/test_adapter", "checkpoint/test_as_lora", "checkpoint/test_companions", "checkpoint/test_configs",
    "evaluation/test_clip", "evaluation/test_lm", "verbs/test_adamerging", "verbs/test_architectures",
    "verbs/test_demo", "verbs/test_families", "verbs/test_pipelines", "verbs/test_search",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with the heavy files as one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "heavy" if file.removesuffix(".py").endswith(_HEAVY) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep remembered digests out of the user's cache."""
    monkeypatch.setenv("MODELMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A float32 base and three experts: [base, expert_0, expert_1, expert_2]."""
    from tests.support.checkpoints import family  # torch with it: pytest's own process does without

    return family(tmp_path / "models")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty Hub that the real client talks to, here and in processes started from here, with an empty cache."""
    from huggingface_hub import constants

    assert _HUB.endpoint == constants.ENDPOINT, "the client was imported before it was pointed here"
    _HUB.clear()
    cache = tmp_path / "hf-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    yield _HUB
    _HUB.clear()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch's, for modules whose models are too small to share out: `pytestmark` names it."""
    from modelmerge.engine.parallel import threads  # here: torch reads the settings above when it is imported

    with threads(1):
        yield
