"""The package as Python sees it."""

from __future__ import annotations

import modelmerge
from tests.support.commands import script

VERBS = {"merge", "search", "extract", "disentangle", "evaluate", "verify", "push", "render", "replay"}


def test_the_package_shows_its_verbs() -> None:
    assert set(modelmerge.__all__) == {"__version__", *VERBS}
    assert dir(modelmerge) == sorted(modelmerge.__all__)
    for verb in VERBS:
        function = getattr(modelmerge, verb)
        assert callable(function)
        assert function.__doc__


def test_the_package_is_imported_without_torch() -> None:
    done = script("import sys, modelmerge; dir(modelmerge); assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
