"""Where models disagree, in one error that stays readable when thousands of tensors do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile

from modelmerge.errors import PlanError, named

SHAPE = "shape "  # begins whatever is said of shapes that differ
_COMPLAINT = re.compile(r"'([^']+)': (in .+, but missing in .+)")
_MANY = 8  # tensors of which the same is said that are named one by one
_PART = re.compile(r"[^./]*[./]")  # of a name


def disagreement(complaints: Sequence[str], *, tables: bool) -> PlanError:
    """The error that names all of them.

    Args:
        complaints: `'TENSOR': WHAT` each.
        tables: Whether there are embeddings of different sizes that could be aligned.
    """
    some = f"{len(complaints):,} tensor{'s' * (len(complaints) > 1)}"
    kinds: dict[str, list[str]] = {}
    for complaint in complaints:
        same = _COMPLAINT.fullmatch(complaint)
        kinds.setdefault(same[2] if same else complaint, []).append(same[1] if same else complaint)
    lines, globs = [], []
    for what, names in kinds.items():
        if len(names) <= _MANY:
            lines += [f"'{name}': {what}" for name in names] if what != names[0] else [what]
            continue
        for glob, count in _globs(names):
            globs.append(glob)
            lines.append(f"'{glob}': {count:,} tensor{'s' * (count > 1)} {what}")
    hint, option = f"{named('exclude')} GLOB copies a tensor from the base", named("on_mismatch")
    if globs:
        words = " ".join(f"{named('exclude')} '{glob}'" for glob in globs)
        hint = f"{words} copies them from the base"
    if any(f": {SHAPE}" in complaint for complaint in complaints):
        hint += f"; so does {option} copy where shapes differ, and {option} common-rows merges what all have"
        if tables:
            hint += f"; {named('vocab')} union, base or NAME aligns embeddings and heads by token"
    return PlanError(f"the models disagree on {some}:\n  " + "\n  ".join(lines), hint=hint)


def _globs(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """A glob for the names that begin with the same parts, as many parts as they share, and how many they are."""
    begins: dict[str, list[str]] = {}
    for name in names:
        part = _PART.match(name)
        begins.setdefault(part[0] if part else name, []).append(name)
    for first, same in begins.items():
        # The first and the last in order share what all share.
        common = "".join(takewhile(bool, map(lambda a, b: a if a == b else "", min(same), max(same))))
        cut = max(common.rfind("."), common.rfind("/")) + 1
        yield (same[0] if len(same) == 1 else f"{common[:cut] or first}*"), len(same)
