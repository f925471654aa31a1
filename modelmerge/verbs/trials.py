"""search --budget: which values to try next, by Optuna (extra `search`).

A Gaussian process is fitted to the trials before, and the next one is where it expects to gain most. The same trials
with the same seed lead to the same next one, so a search that is taken up asks for what it has tried already once more.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modelmerge.errors import named
from modelmerge.evaluation.bench import require
from modelmerge.methods.options import Range

if TYPE_CHECKING:
    from optuna import Trial

Axis = tuple[Any, ...] | Range  # what is tried of an option
_LEAST = 5  # trials at random before a model is fitted
_DRAWS = 1000  # of values that have not been tried yet
_DIGITS = ".4g"  # of a number between two others


def require_optuna() -> None:
    """Refuse a budget without the library.

    Raises:
        ModelMergeError: It is not installed.
    """
    require(named("budget"), '"optuna>=4.4" scipy', "optuna", "scipy")


def trials(
    axes: Mapping[str, Axis], defaults: Mapping[str, Any], count: int, seed: int
) -> Generator[dict[str, Any], float | None, None]:
    """The values of so many trials, no two alike; is sent how good each was, more is better, or None.

    Args:
        axes: What is tried of each option: numbers of a range, or one of several values.
        defaults: The options' defaults; the first trial has those that are among what is tried.
        count: How many trials.
        seed: Of what is drawn at random.
    """
    import optuna

    # The sampler takes places on an axis for near if they are neighbours.
    axes = {
        name: axis if isinstance(axis, Range) or not is_numbers(axis) else tuple(sorted(axis))
        for name, axis in axes.items()
    }
    with _quiet():
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=max(_LEAST, len(axes) + 1))
        study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({name: place for name, axis in axes.items()
                         if (place := _place(axis, defaults.get(name))) is not None})  # fmt: skip
    draw = random.Random(seed)
    scores: dict[tuple[Any, ...], float | None] = {}
    for _ in range(count):
        with _quiet():
            trial = study.ask()
            values = {name: _ask(trial, name, axis) for name, axis in axes.items()}
        for _ in range(_DRAWS):
            if tuple(values.values()) not in scores:
                break
            values = {name: _draw(draw, axis) for name, axis in axes.items()}
        else:
            return
        score = scores[tuple(values.values())] = yield values
        # Of what was tried, which can be drawn and has fewer digits: else the sampler asks for the same over and over.
        places = {name: _place(axis, values[name]) for name, axis in axes.items()}
        states = optuna.trial.TrialState
        study.tell(trial, state=states.FAIL)
        study.add_trial(optuna.trial.create_trial(
            state=states.FAIL if score is None else states.COMPLETE, params=places, distributions=trial.distributions,
            value=score,
        ))  # fmt: skip


def _ask(trial: Trial, name: str, axis: Axis) -> Any:
    if isinstance(axis, Range):
        if isinstance(axis.low, int):
            return trial.suggest_int(name, axis.low, int(axis.high), log=axis.log)
        value = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        return _short(value, axis)
    if is_numbers(axis):
        return axis[trial.suggest_int(name, 0, len(axis) - 1)]
    return axis[trial.suggest_categorical(name, range(len(axis)))]


def _place(axis: Axis, value: Any) -> Any:
    """Where a value lies on an axis, as the sampler has it; None where it does not."""
    if isinstance(axis, Range):
        return value if isinstance(value, int | float) and axis.low <= value <= axis.high else None
    return axis.index(value) if value in axis else None


def is_numbers(values: tuple[Any, ...]) -> bool:
    """Whether the values are numbers, which have an order."""
    return all(type(value) in (int, float) for value in values)


def _draw(draw: random.Random, axis: Axis) -> Any:
    if not isinstance(axis, Range):
        return draw.choice(axis)
    if isinstance(axis.low, int):
        return draw.randint(axis.low, int(axis.high))
    return _short(draw.uniform(axis.low, axis.high), axis)


def _short(value: float, axis: Range) -> float:
    """A number in so few digits that one can type it."""
    return min(max(float(f"{value:{_DIGITS}}"), axis.low), axis.high)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna says of itself."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
