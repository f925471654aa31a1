"""What a merge was told, and what became of it: the recipe and the manifest (`modelmerge.json`)."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmerge.errors import RecipeError, UsageError
from modelmerge.methods.options import written
from modelmerge.plan import format_1

FORMAT = 2  # of modelmerge.json; counts up when a reader of the old form would misread the new one
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that determines the merged weights, and nothing else.

    `experts` are `[NAME=]REF` in their order; `options` are the method's, and the method for the rest runs at its
    defaults. `at` are overrides, in the order in which they are asked: `modelmerge.plan.overrides`. `disentangle` are
    the transforms before the method, in order, `NAME [OPTION=V ...]` each. `rest` is the method for what a method for
    linear layers leaves, base, or None for the method's choice. `dtype` is float32, float16, bfloat16 or None for the
    base's own. `on_mismatch` is what becomes of tensors whose shapes differ. `as_lora` is the rank of the PEFT adapter
    to write instead of a checkpoint or, below 1, the share of the squared norm that it keeps. `unlabelled` tells the
    data of a method that finds the experts' weights on them, see `modelmerge.verbs.coefficients`; `coefficients` are
    what it found, by tensor and expert, and with them no data are needed.
    """

    method: str
    base: str
    experts: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    disentangle: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    rest: str | None = None
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_mismatch: str = "error"
    max_shard_size: str = "5GB"
    seed: int = 0
    as_lora: int | float | None = None
    unlabelled: Mapping[str, Any] = field(default_factory=dict)
    coefficients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def with_models(self, base: str, experts: Sequence[str]) -> Recipe:
        """The recipe for other models."""
        return dataclasses.replace(self, base=base, experts=tuple(experts))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def command(self, output: str) -> str:
        """The shell line that repeats the merge."""
        words = ["modelmerge", "merge", self.method, self.base, *self.experts]
        words += _typed("--", self.options)
        for text in self.disentangle:
            words += ["--disentangle", text]
        for name, weight in self.weights.items():
            words += ["--weight", f"{name}={written(weight)}"]
        for override in self.at:
            words += ["--at", override]
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for name in ("rest", "dtype", "on_mismatch", "max_shard_size", "seed", "as_lora"):
            value = getattr(self, name)
            words += [f"--{name.replace('_', '-')}", str(value)] if value != defaults[name] else []
        for name in ("include", "exclude"):
            for glob in getattr(self, name):
                words += [f"--{name}", glob]
        for name, told in self.unlabelled.items():
            for each in told if isinstance(told, list | tuple) else [told]:
                words += [data_flag(name), str(each)]
        return shlex.join([*words, "-o", output])


def _typed(prefix: str, options: Mapping[str, Any]) -> list[str]:
    """A method's options as they are typed; a switch that is off is not."""
    words: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"{prefix}{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def data_flag(name: str) -> str:
    """What tells of unlabelled data, as it is typed."""
    return "--" + {"tasks": "task", "templates": "template"}.get(name, name).replace("_", "-")


def read_recipe(file: Path) -> tuple[Recipe, dict[str, str], dict[str, Any] | None]:
    """The recipe in a manifest, the sha256 of each input file by path, and what format 1 stored, if it is of that.

    A recipe of format 1 lacks its overrides: they follow from the tensors' names (`format_1.overrides_of`).

    Raises:
        RecipeError: The file is no manifest that this version can read.
    """
    if file.is_dir():
        file = file / "modelmerge.json"
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] not in (1, FORMAT):
            raise RecipeError(
                f"{file}: written in format {manifest['format']}, and this version reads format {FORMAT}",
                hint=f"use modelmerge {manifest['versions']['modelmerge']}",
            )
        stored = dict(manifest["recipe"])
        old = dict(stored) if manifest["format"] == 1 else None
        if old is not None:
            stored = {key: value for key, value in stored.items() if key not in format_1.OLD}
            stored["disentangle"] = format_1.transforms_of(old)
        known = {spec.name for spec in dataclasses.fields(Recipe)}
        unknown = stored.keys() - known
        if unknown:
            raise RecipeError(f"{file}: the recipe has the unknown entry '{sorted(unknown)[0]}'")
        told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        recipe = Recipe(**told)
        inputs = [manifest["inputs"]["base"], *manifest["inputs"]["experts"]]
        digests = {name: entry["sha256"] for model in inputs for name, entry in model["files"].items()}
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{file}: not a manifest that merge wrote ({type(error).__name__}: {error})",
            hint="give the modelmerge.json of a merged checkpoint",
        ) from error
    return recipe, digests, old


def parse_size(text: str) -> int:
    """Bytes of a size like 5GB, 200MB or 1.5GiB; units of 1000 as the Hub's tools use, of 1024 with an i.

    Raises:
        UsageError: It is no size, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(f"--max-shard-size '{text}' is no size", hint="write it like 5GB, 200MB or 1GiB")
    return size


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Weights by expert's name, of `NAME=W` each.

    Raises:
        UsageError: One is not of that form, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not name or value != value or value in (float("inf"), float("-inf")):
            raise UsageError(f"--weight '{text}' is not NAME=W", hint="write it like --weight math=0.5")
        if name in weights:
            raise UsageError(f"--weight names '{name}' twice")
        weights[name] = value
    return weights
