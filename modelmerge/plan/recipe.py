"""The recipe: everything that a merge was asked for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, get_type_hints

from modelmerge.checkpoint import manifest_file
from modelmerge.checkpoint.companions import BASE
from modelmerge.checkpoint.documents import Malformed, check, read_json, shown
from modelmerge.checkpoint.reference import Named, is_stage_name
from modelmerge.checkpoint.templates import is_choice
from modelmerge.errors import RecipeError, UsageError
from modelmerge.plan import format_1

FORMAT = 2  # of modelmerge.json; counts up when a reader of the old form would misread the new one
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
          "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip

_GIVE = "give the modelmerge.json of a merged checkpoint"
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
OnMismatch = Literal["error", "copy", "common-rows"]
BALANCED: Literal["balanced"] = "balanced"  # weights that take back experts that went much farther than the others
Weights = Mapping[str, float] | Literal["balanced"]


class TokenRow(TypedDict, total=False):
    """Where the row of a token comes from in models that lack it, and with `force` in all.

    `model` is base or an expert's name: its row of the token, or that of another `token` or `id`. `zero`: nothing is in
    it. Without either it is as for any other token.
    """

    model: str
    token: str
    id: int
    zero: bool
    force: bool


class _Named(TypedDict):
    """A reference as JSON has it."""

    name: str
    reference: str


class _Rows(TypedDict):
    rows: Literal["filled", "stored"]


class Tables(_Rows, total=False):
    """How embeddings and heads are put together where a mergekit configuration asks for a merge.

    `rows`: they are `filled` before the merge: every model gets a row for every token of `vocab`, and for no other
    place. A row that a model lacks is that of the only model that has it, or as `lacking` says: the base's, where it
    has it, or the mean of those that do. `stored`: rows go by their number, whatever tokenizers say. `tokenizer` is the
    model that `vocab` names where it is none of those that are merged. `tokens` are put into the tokenizer where it
    lacks them; with `apart` the base's own stays without. The number of rows is the next multiple of `multiple`;
    further rows are the mean of a model's others.
    """

    lacking: Literal["base", "mean"]
    tokenizer: _Named
    apart: bool
    tokens: dict[str, TokenRow]
    multiple: int


STORED: Tables = {"rows": "stored"}  # tables that are merged as they are, whatever tokenizers say


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that determines the merged weights, and nothing else.

    `base` and `experts`, in their order, are `[NAME=]REF` each, or name and reference apart; `options` are the
    method's, and the method for the rest runs at its defaults. `weights` are by expert, 1 where none is named, or
    balanced until the experts have been measured (`modelmerge.engine.lengths`). `at` are overrides, in the order in
    which they are asked: `modelmerge.plan.overrides`. `layers` are the runs of layers that the output has, in order, or
    none for the base's own: `modelmerge.plan.layers`. `disentangle` are the transforms before the method, in order,
    `NAME [OPTION=V ...]` each. `rest` is the method for what a method for linear layers leaves, base, or None for the
    method's choice. `dtype` is float64, float32, float16, bfloat16 or None for the base's own. `on_mismatch` is what
    becomes of tensors whose shapes differ. `vocab` is whose tokens embeddings and heads have: base, union, an expert's
    name, or None for rows that go by their number. `files_from` is whose tokenizer, chat template and generation config
    the output gets: base, or an expert's name. `tables` is how mergekit puts embeddings and heads together, where it is
    asked for, and `chat_template` a Jinja template in place of the tokenizer's, the name of one, or auto for the most
    common among the models (`modelmerge.checkpoint.templates`). `max_shard_size` is the size of the largest file, or
    None for what is usual: 5GB, and one file for a base that is one. `as_lora` is the rank of the PEFT adapter to write
    instead of a checkpoint or, below 1, the share of the squared norm that it keeps. `unlabelled` tells the data of a
    method that finds the experts' weights on them, see `modelmerge.verbs.coefficients`; `coefficients` are what it
    found, by tensor and expert, and with them no data are needed. `stages` are merged before, in their order, by the
    names that `stage:NAME` refers to. `overlap` is the scale of sums that leave it to how much the experts overlap,
    once that has been measured. `whole_experts`: the experts of a layer are one tensor, as in mergekit.
    """

    method: str
    base: str | Named
    experts: tuple[str | Named, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights = field(default_factory=dict)
    disentangle: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    rest: str | None = None
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_mismatch: str = "error"
    vocab: str | None = None
    files_from: str = BASE
    tables: Tables | None = None
    chat_template: str | None = None
    max_shard_size: str | None = None
    seed: int = 0
    as_lora: int | float | None = None
    unlabelled: Mapping[str, Any] = field(default_factory=dict)
    coefficients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stages: Mapping[str, Recipe] = field(default_factory=dict)
    overlap: float | None = None
    whole_experts: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON has it."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        fields["stages"] = {name: stage.to_dict() for name, stage in self.stages.items()}
        return fields | {"base": _as_json(self.base), "experts": [*map(_as_json, self.experts)]}


def _as_json(model: str | Named) -> Any:
    return model._asdict() if isinstance(model, Named) else model


def _from_json(model: Any) -> Any:
    """A reference: format 1, and format 2 at first, had name and reference in one text."""
    return Named(model["name"], model["reference"]) if isinstance(model, dict) else model


def read_recipe(file: Path) -> tuple[Recipe, dict[str, str], dict[str, Any] | None]:
    """The recipe in a manifest, the sha256 of each input file by path, and what format 1 stored, if it is of that.

    A recipe of format 1 lacks its overrides: they follow from the tensors' names (`format_1.overrides_of`).

    Raises:
        RecipeError: The file is no manifest that this version can read.
    """
    if file.is_dir():
        file = file / "modelmerge.json"
    whole = read_json(file, dict[str, Any], error=RecipeError, hint=_GIVE)
    if (form := whole.get("format", FORMAT)) not in (1, FORMAT):
        versions = whole.get("versions")
        made = shown(versions.get("modelmerge")) if isinstance(versions, dict) else "of another version"
        raise RecipeError(
            f"{file}: written in format {shown(form)}, and this version reads format {FORMAT}",
            hint=f"use modelmerge {made}",
        )
    manifest = read_json(file, manifest_file.Merge, error=RecipeError, hint=_GIVE)
    try:
        stored = dict(manifest["recipe"])
        old = check(dict(stored), format_1.Entries, "recipe") if form == 1 else None
        if old is not None:
            stored = {key: value for key, value in stored.items() if key not in format_1.OLD}
            stored["disentangle"] = format_1.transforms_of(old)
            stored["options"] = format_1.options_of(stored.get("method", ""), stored.get("options", {}))
        recipe = _recipe_of(stored, "recipe")
    except ValueError as error:
        raise RecipeError(f"{file}: malformed: {error}", hint=_GIVE) from error
    models = manifest_file.inputs_of(manifest)
    digests = {name: entry["sha256"] for model in models for name, entry in model["files"].items()}
    return recipe, digests, old


def _recipe_of(stored: Mapping[str, Any], place: str) -> Recipe:
    """The recipe that JSON has at a place of a manifest."""
    if unknown := stored.keys() - {spec.name for spec in dataclasses.fields(Recipe)}:
        raise Malformed(f"{place} has the unknown entry '{sorted(unknown)[0]}'")
    hints = get_type_hints(Recipe) | {"base": str | _Named, "experts": list[str | _Named], "stages": dict[str, Any]}
    needed = {spec.name for spec in dataclasses.fields(Recipe) if spec.default is spec.default_factory}
    for key in sorted(needed | stored.keys()):
        if key not in stored:
            raise Malformed(f"{place}.{key} is missing")
        check(stored[key], hints[key], f"{place}.{key}")
    stages = {}
    for name, stage in stored.get("stages", {}).items():
        if place != "recipe" or not is_stage_name(name):
            raise Malformed(f"{place}.stages has {shown(name)}, which cannot be the name of a merge before this one")
        stages[name] = _recipe_of(check(stage, dict[str, Any], f"{place}.stages.{name}"), f"{place}.stages.{name}")
    models = {"base": _from_json(stored["base"]), "experts": [*map(_from_json, stored["experts"])]}
    entries = {**stored, **models, "stages": stages}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
    recipe = Recipe(**fields)
    if recipe.tables is not None and recipe.tables.get("multiple", 1) < 1:
        raise Malformed(f"{place}.tables.multiple must be above 0")
    if recipe.chat_template is not None and not is_choice(recipe.chat_template):
        raise Malformed(f"{place}.chat_template is no template, and no name of one: {shown(recipe.chat_template)}")
    return recipe


def parse_size(text: str | None) -> int | None:
    """Bytes of a size like 5GB, 200MB or 1.5GiB; units of 1000 as the Hub's tools use, of 1024 with an i.

    None where none is named.

    Raises:
        UsageError: It is no size, or nothing.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(f"'{text}' is no size", option="max_shard_size", hint="write it like 5GB, 200MB or 1GiB")
    return size


def parse_weights(texts: Sequence[str]) -> Weights:
    """Weights by expert's name, of `NAME=W` each; or balanced, which goes alone.

    Raises:
        UsageError: One is not of that form, or a name comes twice.
    """
    if list(texts) == [BALANCED]:
        return BALANCED
    if BALANCED in texts:
        raise UsageError(f"{BALANCED} sets the weights of all experts", option="weights", hint="leave the others out")
    weights: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not name or value != value or value in (float("inf"), float("-inf")):
            hint = f"write it like math=0.5, or {BALANCED}"
            raise UsageError(f"'{text}' is not NAME=W", option="weights", hint=hint)
        if name in weights:
            raise UsageError(f"names '{name}' twice", option="weights")
        weights[name] = value
    return weights
