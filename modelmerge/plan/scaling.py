"""Factors on the task vectors that differ from layer to layer.

`0.5,1.2` rises from the first numbered layer to the last: the values are spread evenly, with straight lines between
them, as those of `--vary` are; a linear one is the layer scaling of LiNeS (Wang et al., ICLR 2025, arXiv 2410.17146)
with slope and intercept told. A mapping has a number, or such a list, for each glob of tensor names, and the first
glob that matches a tensor counts. Tensors that nothing is said of, and those outside all layers where a list is, keep
their task vectors as they are.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from modelmerge.errors import UsageError
from modelmerge.methods.options import written
from modelmerge.plan.overrides import Variation, depths, layer_of

_HINT = "write it like 0.5,1.2, or name a JSON or YAML file of {GLOB: FACTOR} or of a list over the layers"


@dataclass(frozen=True, slots=True)
class LayerScale:
    """Factors by glob of tensor names, in their order: one, or several over the layers."""

    entries: tuple[tuple[str, tuple[float, ...]], ...]

    def __str__(self) -> str:
        """As it can be typed."""
        if len(self.entries) == 1 and self.entries[0][0] == "*":
            return ",".join(map(written, self.entries[0][1]))
        return json.dumps({glob: values[0] if len(values) == 1 else list(values) for glob, values in self.entries})

    def factors(self, tensors: Sequence[str]) -> dict[str, float]:
        """The factor on the task vectors of each tensor, of the names of all that are merged.

        Raises:
            UsageError: A glob is for no tensor, or a list is for none that lies in a layer.
        """
        depth, found = depths(tensors), dict.fromkeys(tensors, 1.0)
        left = list(tensors)
        for glob, values in self.entries:
            mine = [tensor for tensor in left if fnmatchcase(tensor, glob)]
            inside = [tensor for tensor in mine if len(values) == 1 or layer_of(tensor)]
            if not mine:
                raise UsageError(
                    f"--layer-scale: '{glob}' matches no tensor that is merged and that no glob before it matches",
                    hint=f"their names are like: {', '.join(tensors[:3])}",
                )
            if not inside:
                raise UsageError(f"--layer-scale: '{self}' goes over layers, and no tensor of '{glob}' lies in one")
            curve = Variation("layer-scale", values)
            found |= {tensor: curve.at(depth[tensor]) for tensor in inside}
            left = [tensor for tensor in left if tensor not in mine]
        return found


def typed(told: str | Path | Sequence[float] | Mapping[str, Any] | None) -> str | None:
    """A layer scale as text: as it is, a path, or a list over the layers or a mapping as JSON."""
    return str(told) if isinstance(told, (str, Path)) else None if told is None else json.dumps(told)


def canonical(text: str) -> str:
    """A layer scale without the file that it may stand in.

    Raises:
        UsageError: As for `parse`.
    """
    return str(parse(text))


def parse(text: str) -> LayerScale:
    """The layer scale that `V[,V...]`, JSON or the file of that name says.

    Raises:
        UsageError: It is none of these, or does not say numbers.
    """
    try:
        return LayerScale((("*", tuple(_number(word) for word in text.split(","))),))
    except ValueError:
        pass
    here = "--layer-scale"
    if not text.lstrip().startswith(("{", "[")):
        file = Path(text).expanduser()
        here = f"{here} {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = "no such file, and no numbers" if isinstance(error, FileNotFoundError) else "cannot be read"
            raise UsageError(f"{here}: {why}", hint=_HINT) from error
    told = _read(text, here)
    if isinstance(told, list):
        told = {"*": told}
    if not isinstance(told, dict) or not told:
        raise UsageError(f"{here}: neither a mapping of globs to factors nor a list over the layers", hint=_HINT)
    return LayerScale(tuple((str(glob), _values(values, f"{here}: '{glob}'")) for glob, values in told.items()))


def _read(text: str, here: str) -> Any:
    """What JSON or YAML says; a key that comes twice is an error."""
    try:
        if text.lstrip().startswith(("{", "[")):
            return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, here))
        node = yaml.compose(text, yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _unique([(key.value, None) for key, _ in node.value], here)
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{here}: no JSON or YAML: {' '.join(str(error).split())}", hint=_HINT) from error


def _unique(pairs: Sequence[tuple[str, Any]], here: str) -> Mapping[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise UsageError(f"{here}: '{twice[0]}' comes twice", hint="the first glob that matches a tensor counts")
    return dict(pairs)


def _values(told: Any, here: str) -> tuple[float, ...]:
    try:
        values = tuple(_number(value) for value in (told if isinstance(told, list) else [told]))
    except ValueError:
        values = ()
    if not values:
        raise UsageError(f"{here}: {told!r} is no finite number and no list of them", hint=_HINT)
    return values


def _number(value: Any) -> float:
    """A finite number; YAML reads 1e-3 as a word.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)
