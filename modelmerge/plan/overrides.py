"""Numbers that differ between experts, tensors or layers: `[EXPERT:]OPTION=V[,V...][@GLOB]`.

`scale=0.2@*mlp*` is another scale for tensors of such names, `math:weight=0.5` another weight for one expert, and
`math:weight=0,0.5,1` one that rises over the layers: the values are spread evenly from the first layer to the last,
with straight lines between them. Where several apply to a tensor, the last one named counts.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from modelmerge.errors import UsageError
from modelmerge.methods.contract import Method
from modelmerge.methods.options import check_option, written

WEIGHT = "weight"
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Variation:
    """Another value of a number: for one expert or all, for tensors of such names or all, over the layers or not."""

    option: str
    values: tuple[float, ...]
    expert: str | None = None
    tensors: str | None = None

    def __str__(self) -> str:
        """As it is typed."""
        expert = f"{self.expert}:" if self.expert else ""
        tensors = f"@{self.tensors}" if self.tensors else ""
        return f"{expert}{self.option.replace('_', '-')}={','.join(map(written, self.values))}{tensors}"

    @property
    def everywhere(self) -> bool:
        """Whether it is the same in all tensors."""
        return self.tensors is None and len(self.values) == 1

    def matches(self, tensor: str) -> bool:
        """Whether it is for the tensor of that name."""
        return self.tensors is None or fnmatch.fnmatchcase(tensor, self.tensors)

    def at(self, depth: float) -> float:
        """The value at a depth from 0, the first layer, to 1, the last."""
        place = depth * (len(self.values) - 1)
        before = int(place)
        after = min(before + 1, len(self.values) - 1)
        return (1 - (place - before)) * self.values[before] + (place - before) * self.values[after]


@dataclass(frozen=True, slots=True)
class Share:
    """The tensors that one method merges, by name; of the `rest`'s method only the weights vary."""

    name: str
    method: Method
    options: Any
    tensors: tuple[str, ...]
    rest: bool = False

    @property
    def varying(self) -> dict[str, str]:
        """The options that can vary, and between what: `tensor` or `expert`."""
        specs = () if self.rest else dataclasses.fields(self.method.options)
        return {spec.name: spec.metadata["varies"] for spec in specs if spec.metadata["varies"]}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method is told for one tensor.

    `each` has the values of the options that differ between the experts, in their order.
    """

    options: Any
    weights: tuple[float, ...]
    each: Mapping[str, tuple[float, ...]]


def parse(text: str) -> Variation:
    """The variation that `[EXPERT:]OPTION=V[,V...][@GLOB]` says.

    Raises:
        UsageError: It is not of that form.
    """
    told, at, tensors = text.partition("@")
    left, _, numbers = told.partition("=")
    expert, colon, option = left.rpartition(":")
    try:
        values = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        values = ()
    if not option or not values or bool(colon) != bool(expert) or bool(at) != bool(tensors):
        raise UsageError(
            f"--vary '{text}' is not [EXPERT:]OPTION=V[,V...][@GLOB]",
            hint="write it like --vary 'scale=0.2@*mlp*' or --vary math:weight=0,0.5,1",
        )
    return Variation(option.replace("-", "_"), values, expert or None, tensors or None)


def layers(names: Iterable[str]) -> dict[str, int]:
    """How many numbered layers there are below each prefix, such as `model.layers`."""
    found: Counter[str] = Counter()
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            prefix, number = layer
            found[prefix] = max(found[prefix], number + 1)
    return dict(found)


def layer_of(name: str) -> tuple[str, int] | None:
    """The prefix and the number of the layer that a tensor lies in, if it does: `model.layers`, 3."""
    match = _LAYER.search(name)
    return (name[: match.start()], int(match[1])) if match else None


def depths(names: Sequence[str]) -> dict[str, float]:
    """How deep each tensor lies: 0 in the first layer, 1 in the last (and in an only one), 0 outside all layers."""
    count, found = layers(names), {}
    for name in names:
        layer = layer_of(name)
        if layer is None:
            found[name] = 0.0
        else:
            prefix, number = layer
            found[name] = number / (count[prefix] - 1) if count[prefix] > 1 else 1.0
    return found


def settle(
    variations: Sequence[Variation],
    shares: Sequence[Share],
    weights: tuple[float, ...],
    experts: Sequence[str],
) -> dict[str, Setting]:
    """What a method is told for each tensor that it is told something else for.

    Args:
        variations: In the order in which they were named.
        shares: The methods with the tensors they merge. A variation is for the methods that have its option.
        weights: The experts' weights where nothing else is said.
        experts: Their names.

    Raises:
        UsageError: There is no such option, expert or tensor, the option cannot vary, or a value is out of bounds.
    """
    tensors = [tensor for share in shares for tensor in share.tensors]
    for variation in variations:
        _check(variation, shares, experts, tensors)
    depth, found = depths(tensors), {}
    for share in shares:
        mine = [v for v in variations if v.option == WEIGHT or v.option in share.varying]
        for tensor in share.tensors:
            told = [v for v in mine if v.matches(tensor)]
            if told:
                found[tensor] = _setting(told, share.options, weights, experts, depth[tensor])
    return found


def _setting(
    told: Sequence[Variation], options: Any, weights: tuple[float, ...], experts: Sequence[str], depth: float
) -> Setting:
    """What variations that all apply to a tensor come to."""
    plain: dict[str, float] = {}
    each = {WEIGHT: list(weights)}
    for variation in told:
        value = variation.at(depth)
        if variation.option != WEIGHT and variation.expert is None:
            plain[variation.option] = value
            each.pop(variation.option, None)
            continue
        values = each.setdefault(
            variation.option,
            [plain.get(variation.option, getattr(options, variation.option, 0.0))] * len(experts),
        )
        for i, expert in enumerate(experts):
            if variation.expert in (None, expert):
                values[i] = value
    here = tuple(each.pop(WEIGHT))
    return Setting(dataclasses.replace(options, **plain), here, {name: tuple(values) for name, values in each.items()})


def surveyed(variations: Sequence[Variation], share: Share, experts: Sequence[str]) -> Any:
    """The options as a survey is told them: a tuple, one value for each expert, where the experts differ."""
    varied: dict[str, Any] = {}
    for variation in variations:
        if variation.option not in share.varying or not variation.everywhere:
            continue
        value = variation.values[0]
        before = varied.get(variation.option, getattr(share.options, variation.option))
        values = before if isinstance(before, tuple) else (before,) * len(experts)
        each = tuple(value if variation.expert in (None, e) else v for e, v in zip(experts, values, strict=True))
        varied[variation.option] = each if variation.expert is not None else value
    return dataclasses.replace(share.options, **varied)


def _check(variation: Variation, shares: Sequence[Share], experts: Sequence[str], tensors: Sequence[str]) -> None:
    told = f"--vary '{variation}'"
    if variation.expert is not None and variation.expert not in experts:
        near = get_close_matches(variation.expert, experts, n=1)
        raise UsageError(
            f"{told} names '{variation.expert}', which is no expert",
            hint=f"did you mean '{near[0]}'?" if near else f"the experts are: {', '.join(experts)}",
        )
    if variation.tensors is not None and not any(variation.matches(tensor) for tensor in tensors):
        raise UsageError(
            f"{told}: '{variation.tensors}' matches no tensor that is merged",
            hint=f"their names are like: {', '.join(tensors[:3])}",
        )
    if len(variation.values) > 1 and not layers(tensors):
        raise UsageError(f"{told} goes over layers, and no tensor that is merged has a numbered layer in its name")
    if variation.option == WEIGHT:
        if not all(abs(value) < float("inf") for value in variation.values):
            raise UsageError(f"{told}: a weight must be finite")
        return
    concerned = [share for share in shares if any(variation.matches(tensor) for tensor in share.tensors)]
    having = [share for share in concerned if variation.option in share.varying]
    if not having:
        names = " or ".join(f"'{name}'" for name in dict.fromkeys(share.name for share in concerned))
        may = list(dict.fromkeys([WEIGHT, *(option for share in concerned for option in share.varying)]))
        near = get_close_matches(variation.option, may, n=1)
        raise UsageError(
            f"{told}: {variation.option.replace('_', '-')} is nothing of {names} that can vary",
            hint=f"did you mean '{near[0]}'?" if near else f"what can: {', '.join(may)}",
        )
    for share in having:
        _check_share(variation, share, told)


def _check_share(variation: Variation, share: Share, told: str) -> None:
    """Refuse what a method that has the option cannot be told."""
    by_expert, surveys = share.varying[variation.option] == "expert", share.method.survey(share.options, {}) is not None
    if by_expert and surveys and not variation.everywhere:
        raise UsageError(
            f"{told}: with these options of '{share.name}', {variation.option} is a share of the whole task vector, "
            "and can differ between experts only",
            hint="--trim-scope tensor counts it in each tensor",
        )
    if variation.expert is not None and not by_expert:
        raise UsageError(
            f"{told}: {variation.option} is one number for all experts", hint="leave the expert's name out"
        )
    for value in variation.values:
        check_option(share.method, variation.option, value)
