"""lm-evaluation-harness as a library: whether it is there, its seeds, its silence, its errors in a line."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator, Sequence

from modelmerge.errors import ModelMergeError
from modelmerge.progress import Reporter

SEEDS = (0, 1234, 1234, 1234)  # the harness's own defaults: Python's, numpy's, torch's, of the examples in a prompt
# What the harness says of things that are as they should be here.
_USUAL = (
    "`pretrained` model kwarg", "Passed an already-initialized model", "`max_length` in generation kwargs",
    "Overwriting default num_fewshot", "is defined, but aggregation is not", "is defined, but higher_is_better is not",
    "overrides existing task", "Custom kwargs can be passed", "num_fewshot > 0 but fewshot_split is None",
)  # fmt: skip


def check_installed() -> None:
    """Refuse to begin without the libraries of the extra.

    Raises:
        ModelMergeError: One is not installed.
    """
    try:
        with quiet(None):
            import accelerate  # noqa: F401
            import lm_eval  # noqa: F401
            import transformers  # noqa: F401
    except ImportError as error:
        raise ModelMergeError(
            f"eval lm needs lm-evaluation-harness with transformers, and there is no '{error.name}'",
            hint="pip install 'modelmerge[lm]'",
        ) from error


def seed(seeds: Sequence[int]) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import numpy
    import torch

    random.seed(seeds[0])
    numpy.random.seed(seeds[1] % 2**32)
    torch.manual_seed(seeds[2])


def without_items(name: str) -> ModelMergeError:
    """The error of a task that has no items."""
    return ModelMergeError(f"task '{name}' has no items", hint="is its data set empty, or does a filter leave nothing?")


@contextlib.contextmanager
def naming(task: str, model: str | None = None) -> Iterator[None]:
    """Turn what the harness raises into an error that names the task."""
    try:
        yield
    except ModelMergeError:
        raise
    except Exception as error:
        if isinstance(error, IndexError) and "out of bounds for size 0" in str(error):
            raise without_items(task) from error
        on = f" on '{model}'" if model is not None else " cannot be loaded"
        raise ModelMergeError(
            f"task '{task}'{on}: {type(error).__name__}: {first_line(error)}",
            hint="is its data set there, and does its YAML name the data set's columns and splits?",
        ) from error


@contextlib.contextmanager
def quiet(progress: Reporter | None, *, strict: bool = False) -> Iterator[None]:
    """Keep the harness and its libraries from the terminal; what a person should know becomes a note."""
    harness = logging.getLogger("lm_eval")
    listener = _Notes(progress)
    before = (harness.handlers[:], harness.propagate, harness.level)
    harness.handlers, harness.propagate = [listener], False
    harness.setLevel(logging.WARNING)
    others = [logging.getLogger(name) for name in ("transformers", "datasets", "accelerate", "peft")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        harness.handlers, harness.propagate = before[:2]
        harness.setLevel(before[2])
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


class _Notes(logging.Handler):
    """What the harness warns of, each thing once."""

    def __init__(self, progress: Reporter | None) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._notes: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if self._progress is None or any(usual in text for usual in _USUAL) or text in self._notes:
            return
        self._notes.add(text)
        self._progress.note(f"lm-evaluation-harness: {text[:300]}")


def first_line(error: object) -> str:
    """The first line of an error's text."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "without a word")[:300]
