"""What looks like one and the same layer under two names, which nothing has matched: an error, never the base's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from modelmerge.checkpoint.components import folder_of
from modelmerge.checkpoint.header import MERGEABLE_DTYPES, TensorInfo, is_buffer
from modelmerge.checkpoint.names import layer_type
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.errors import PlanError, named

_MANY = 4  # tensors of layers: heads have fewer
_EXPERT = re.compile(r"\bexperts\.\d+\.")


def refuse_lookalikes(base: Checkpoint, expert: Checkpoint, merges: Callable[[str], bool]) -> None:
    """Refuse an expert that keeps tensors of no match which look like some of the base's that have none either.

    Heads and towers that one side alone has look like nothing on the other.

    Args:
        base: The base.
        expert: An expert, its tensors by the base's names where they are matched.
        merges: Whether a tensor of that name is to be merged.

    Raises:
        PlanError: There are such tensors.
    """
    if expert.vector is not None or not expert.tensors.keys() & base.tensors.keys():
        return  # who has nothing in common is a stranger, which is said elsewhere
    ours = [i for name, i in base.tensors.items() if name not in expert.tensors and is_weight(i) and merges(name)]
    theirs = [info for name, info in expert.tensors.items() if name not in base.tensors and is_weight(info)]
    if not ours or not theirs:
        return
    pairs: list[tuple[TensorInfo, TensorInfo]] = []
    for folder in base.components:
        sides = ([info for info in side if folder_of(info.name, base.components) == folder] for side in (ours, theirs))
        pairs += _lookalikes(*sides)
    if pairs:
        raise refusal(expert.name, pairs)


def refusal(expert: str, pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> PlanError:
    """The error for an expert's tensors that look like the base's, each with the base's in front."""
    one, other = pairs[0]
    return PlanError(
        f"'{expert}' and the base have {len(pairs)} tensor{'s' * (len(pairs) > 1)} that look like one another "
        f"under other names: the base's '{one.name}' {list(one.shape)}, its '{other.name}' {list(other.shape)}",
        hint=f"save the expert under the base's names; or copy them from the base: {named('exclude')} "
        f"'{layer_type(one.name)}'",
    )


def is_weight(info: TensorInfo) -> bool:
    """Whether it is a weight, of which something would be lost."""
    return info.dtype in MERGEABLE_DTYPES and bool(info.numel) and not is_buffer(info)


def _lookalikes(ours: list[TensorInfo], theirs: list[TensorInfo]) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Pairs of one shape whose names end alike, and experts one by one beside a stack."""
    ends = {(_end(info.name), info.shape): info for info in reversed(theirs)}
    pairs = [(info, ends[_end(info.name), info.shape]) for info in ours if (_end(info.name), info.shape) in ends]
    yield from pairs or _by_shapes(ours, theirs)
    for stacked in (True, False):
        mine, others = _of_experts(ours, stacked=stacked), _of_experts(theirs, stacked=not stacked)
        if others:
            yield from ((info, others[0]) for info in mine)


def _by_shapes(ours: list[TensorInfo], theirs: list[TensorInfo]) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Tensors of layers, where most of one side's have a shape of the other's: of one model by names nobody knows."""
    left, right = ([info for info in side if _in_layer(info.name)] for side in (ours, theirs))
    shapes = [Counter(info.shape for info in side) for side in (left, right)]
    common = (shapes[0] & shapes[1]).total()
    if common >= _MANY and 2 * common > min(len(left), len(right)):
        others = {info.shape: info for info in reversed(right)}
        yield from ((info, others[info.shape]) for info in left if info.shape in others)


def _in_layer(name: str) -> bool:
    return any(word.isdigit() for word in name.split("."))


def _of_experts(tensors: list[TensorInfo], *, stacked: bool) -> list[TensorInfo]:
    if stacked:
        return [info for info in tensors if len(info.shape) == 3 and ".experts." in f".{info.name}."]
    return [info for info in tensors if _EXPERT.search(info.name)]


def _end(name: str) -> str:
    """What names of one layer share, whatever stands in front: from its number on, or else the last three words."""
    words = name.split(".")
    return ".".join(words[next((i for i, word in enumerate(words) if word.isdigit()), -3) :])
