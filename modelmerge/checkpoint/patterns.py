"""The regular expressions of an adapter's config, matched in a time that their length bounds.

peft matches `rank_pattern` and `alpha_pattern` with `re`, which can take for ever over a pattern of twenty letters.
What is a regular language is matched here by a set of states, a letter at a time; what is none is refused.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_PLAIN = re.compile(r"[\w.\-]+")
_STATES = 5000  # of a pattern
_STEPS = 2_000_000  # of all patterns of an adapter over all its modules: some seconds
_OF_LETTER = 20  # steps that it takes to read a letter of a pattern
_ENDLESS = 2**32 - 1  # more than this counts as often as wanted
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": lambda letter: letter.isalnum() or letter == "_",
}  # fmt: skip


class Patterns:
    """Values by patterns, of which the first that matches the end of a module's name counts, as in peft.

    Args:
        values: The values.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)
        self._steps = _STEPS - _OF_LETTER * sum(len(key) for key in values if not _PLAIN.fullmatch(key))

    def value_of(self, module: str) -> float | None:
        """The module's value; None where no pattern matches.

        Raises:
            ValueError: A pattern is none, or they take too long.
        """
        for pattern, value in self._values.items():
            states = _states(pattern)
            matches, steps = _matches(states, module) if isinstance(states, tuple) else (states.match(module), 1)
            self._steps -= steps
            if self._steps < 0:
                raise ValueError("its patterns take too long to match with the names of its modules")
            if matches:
                return value
        return None


State = tuple[Callable[[str], bool] | str | None, tuple[int, ...]]  # a letter's test or a place's name; what follows


@functools.lru_cache(maxsize=4096)
def _states(pattern: str) -> tuple[State, ...] | re.Pattern[str]:
    """A pattern as states, of which the last is the end; of plain names as Python has it, which is quick.

    Raises:
        ValueError: It is no regular expression, or one that is more than a regular language.
    """
    whole = rf"(.*\.)?({pattern})$"
    if _PLAIN.fullmatch(pattern):
        return re.compile(whole)
    try:
        with warnings.catch_warnings():  # of flags in the middle, before Python 3.11
            warnings.simplefilter("ignore", DeprecationWarning)
            parsed = _parser.parse(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"the pattern '{pattern[:200]}' is no regular expression: {error}") from error
    if parsed.state.flags & ~re.UNICODE:
        raise _foreign(pattern)
    states: list[State] = []
    try:
        _add(parsed, states)
    except (LookupError, RecursionError, TypeError) as error:
        raise _foreign(pattern) from error
    return (*states, (None, ()))


def _foreign(pattern: str) -> ValueError:
    return ValueError(f"the pattern '{pattern[:200]}' is one that cannot be matched here")


def _add(parsed: Any, states: list[State]) -> None:
    """Append the states of a part; the one after the last of them is where it leads."""
    for operator, argument in parsed:
        name = str(operator)
        if len(states) > _STATES:
            raise LookupError
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            states.append((_test(name, argument), (len(states) + 1,)))
        elif name == "AT":
            states.append(({"AT_BEGINNING": "start", "AT_END": "end"}[str(argument)], (len(states) + 1,)))
        elif name == "SUBPATTERN":
            _, more, fewer, inner = argument
            if more or fewer:
                raise LookupError
            _add(inner, states)
        elif name == "BRANCH":
            _add_branches(argument[1], states)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = argument
            for _ in range(least):
                _add(inner, states)
            endless = int(most) >= _ENDLESS
            for _ in range(1 if endless else int(most) - least):
                fork = len(states)
                states.append((None, ()))
                _add(inner, states)
                if endless:
                    states.append((None, (fork,)))
                states[fork] = (None, (fork + 1, len(states)))
        else:
            raise LookupError


def _add_branches(branches: list[Any], states: list[State]) -> None:
    fork, starts, ends = len(states), [], []
    states.append((None, ()))
    for branch in branches:
        starts.append(len(states))
        _add(branch, states)
        ends.append(len(states))
        states.append((None, ()))
    states[fork] = (None, tuple(starts))
    for end in ends:
        states[end] = (None, (len(states),))


def _test(name: str, argument: Any) -> Callable[[str], bool]:
    """Whether a letter is one of those that a single place of a pattern allows."""
    if name == "ANY":
        return lambda letter: letter != "\n"
    if name in ("LITERAL", "NOT_LITERAL"):
        return lambda letter: (ord(letter) == argument) == (name == "LITERAL")
    negated, *parts = argument if str(argument[0][0]) == "NEGATE" else (None, *argument)
    tests = [_one_of(str(operator), value) for operator, value in parts]
    return lambda letter: any(test(letter) for test in tests) != (negated is not None)


def _one_of(name: str, value: Any) -> Callable[[str], bool]:
    if name == "LITERAL":
        return lambda letter: ord(letter) == value
    if name == "RANGE":
        return lambda letter: value[0] <= ord(letter) <= value[1]
    category, other = str(value).removeprefix("CATEGORY_"), str(value).startswith("CATEGORY_NOT_")
    test = _CATEGORIES[category.removeprefix("NOT_")]
    return lambda letter: test(letter) != other


def _matches(states: tuple[State, ...], text: str) -> tuple[bool, int]:
    """Whether they match the beginning of a text, and how many states were looked at."""
    starts, steps = [0], 0
    for place, letter in enumerate(f"{text}\0"):
        here = list(_reached(states, starts, text, place))
        steps += len(here)
        if len(states) - 1 in here:
            return True, steps
        starts = [state + 1 for state in here if callable(test := states[state][0]) and test(letter)]
        if not starts:
            break
    return False, steps


def _reached(states: tuple[State, ...], starts: list[int], text: str, place: int) -> Iterator[int]:
    """The states that can be reached from others without a letter."""
    waiting, seen = list(starts), set(starts)
    while waiting:
        state = waiting.pop()
        test, following = states[state]
        yield state
        ends = place == len(text) or (place == len(text) - 1 and text[place] == "\n")
        if test is None or (test == "start" and place == 0) or (test == "end" and ends):
            new = set(following) - seen
            seen |= new
            waiting += new
