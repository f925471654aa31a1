from __future__ import annotations

from collections.abc import Iterator

import pytest

from modelmerge.engine.parallel import threads


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread of torch's: these tests are about numbers, of matrices too small to share out."""
    with threads(1):
        yield
