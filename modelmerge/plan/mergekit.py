"""mergekit's YAML configurations as recipes: what a key means there, and which option it is here.

`mergekit_methods` has the whole of the mapping: a method that both have is one row. A key that cannot be honoured is
never skipped: one error names all of them with their places in the file.

Checked against runs of mergekit 0.1.5 (`tests/support/mergekit_runs.py` makes them, `tests/plan/test_mergekit.py`
compares).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.documents import parse_yaml, read_bytes, shown
from modelmerge.errors import RecipeError, suggestion
from modelmerge.plan.format_1 import Variation, merged_overrides
from modelmerge.plan.mergekit_methods import KEYS, KNOWN, METHODS, Row
from modelmerge.plan.mergekit_parameters import Scopes, read_options, strays
from modelmerge.plan.overrides import layers
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import DTYPES, Plan, TensorPlan

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Translated:
    """A configuration as a recipe, what should be known of it, and how many layers its slices go over, if any.

    The recipe lacks its overrides: they follow from the `variations` and the tensors' names.
    """

    recipe: Recipe
    variations: tuple[Variation, ...]
    remarks: tuple[str, ...]
    layers: int | None

    def overrides(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The overrides of the recipe, for a base with tensors of these names."""
        return tuple(map(str, merged_overrides(list(tensors), self.variations)))

    def without(self, options: Collection[str]) -> Translated:
        """The same, less what it varies of these options (`scale`, or of one expert `NAME.weight`)."""
        kept = [v for v in self.variations if not {v.option, f"{v.expert}.{v.option}"} & set(options)]
        return replace(self, variations=tuple(kept))

    def refuse_part_of_the_layers(self, file: Path, tensors: Iterable[str]) -> None:
        """Refuse slices that leave layers out.

        Raises:
            RecipeError: The models have another number of layers.
        """
        have = max(layers(tensors).values(), default=0)
        if self.layers is not None and self.layers != have:
            raise RecipeError(
                f"{file}: slices[0] goes over {self.layers} layers of models that have {have}",
                hint="modelmerge merges whole models; models with layers taken out or repeated need mergekit",
            )

    def stored_as_mergekit_does(self, plan: Plan) -> Translated:
        """The same where the file says no dtype: mergekit then stores the widest that a tensor has in any model."""
        if self.recipe.dtype is not None:
            return self
        merged = plan.select("merge")
        widest = {_widest(tensor, plan) for tensor in merged}
        name = _DTYPE_NAMES.get(next(iter(widest))) if len(widest) == 1 else None
        if widest == {tensor.dtype for tensor in merged}:
            return self
        if name is None:
            said = "No dtype: tensors are stored as the base does; mergekit stores each in the widest dtype it has."
            return replace(self, remarks=(*self.remarks, said))
        said = f"No dtype: stored in {name}, the widest of the models', as mergekit does."
        return replace(self, recipe=replace(self.recipe, dtype=name), remarks=(*self.remarks, said))


def _widest(tensor: TensorPlan, plan: Plan) -> str:
    """The dtype that holds what all models store of a tensor."""
    dtypes = {model.tensors[tensor.name].dtype for model in plan.models if tensor.name in model.tensors}
    dtypes |= {"F32"} if {"F16", "BF16"} <= dtypes else set()
    return next(dtype for dtype in ("F64", "F32", "F16", "BF16") if dtype in dtypes)


def read(file: Path) -> Translated:
    """The recipe that a mergekit configuration describes.

    Raises:
        RecipeError: It is none, or asks for what modelmerge does not do: all of that, in one error.
    """
    try:
        config = parse_yaml(read_bytes(file).decode())
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such file") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(config, dict) or "merge_method" not in config:
        raise RecipeError(
            f"{file}: no mergekit configuration: it has no 'merge_method'",
            hint="a YAML recipe is mergekit's; modelmerge's own is the modelmerge.json of a merged checkpoint",
        )
    return _Translation(file).translate(config)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the configuration: the reference, a name of its own, and its settings from near to far."""

    reference: str
    name: str
    scopes: Scopes


class _Translation:
    """One configuration on its way; collects what cannot be honoured."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.complaints: list[str] = []
        self.remarks: list[str] = []
        self.variations: list[Variation] = []
        self.layers: int | None = None
        self.row: Row | None = None

    def complain(self, path: str, why: str) -> None:
        self.complaints.append(f"{path}: {why}")

    def translate(self, config: Mapping[str, Any]) -> Translated:
        for key in config:
            if key not in KEYS:
                self.complain(str(key), "mergekit has no such key" + _near(str(key), KEYS))
        row = self.row = self._row(config.get("merge_method"))
        base = self._reference(config["base_model"], "base_model") if config.get("base_model") is not None else None
        shared, models = self._models(config, base)
        dtype = self._dtype(config)
        self._tokenizer(config, base)
        recipe = self._recipe(row, base, shared, models, dtype) if row else None
        if self.complaints or recipe is None:
            count = len(self.complaints)
            raise RecipeError(
                f"{self.file}: {count} {'thing' if count == 1 else 'things'} that cannot be honoured:\n  "
                + "\n  ".join(self.complaints),
                hint="change or remove these keys; the README says which ones modelmerge reads",
            )
        return Translated(recipe, tuple(self.variations), tuple(self.remarks), self.layers)

    def _row(self, name: Any) -> Row | None:
        if isinstance(name, str) and name in METHODS:
            return METHODS[name]
        near = (isinstance(name, str) and _near(name, METHODS)) or f"; there are: {', '.join(METHODS)}"
        self.complain("merge_method", f"modelmerge has no counterpart of {shown(name)}{near}")
        return None

    # ---- models

    def _models(self, config: Mapping[str, Any], base: str | None) -> tuple[Scopes, list[_Model]]:
        """The settings for all models, from near to far, and the models."""
        shared: Scopes = [("parameters", self._parameters(config.get("parameters"), "parameters"))]
        kinds = [key for key in ("models", "slices", "modules") if config.get(key)]
        entries, path = config.get("models"), "models"
        if kinds == ["slices"]:
            shared, entries, path = self._only_slice(config["slices"], shared)
        elif kinds == ["modules"]:
            self.complain("modules", "parts of a model with settings of their own cannot be honoured")
            return shared, []
        elif kinds != ["models"]:
            self.complain(" and ".join(kinds) or "models", "mergekit takes exactly one of models, slices, modules")
            return shared, []
        if not isinstance(entries, list):
            self.complain(path, "is no list")
            return shared, []
        models: list[_Model] = []
        seen: Counter[str] = Counter()
        keys = {"model", "parameters"} | ({"layer_range"} if path != "models" else set())
        for i, entry in enumerate(entries):
            here = f"{path}[{i}]"
            if not isinstance(entry, dict) or "model" not in entry:
                self.complain(here, "has no 'model'")
                continue
            for key in entry:
                if key not in keys:
                    self.complain(f"{here}.{key}", "mergekit has no such key" + _near(str(key), keys))
            reference = self._reference(entry["model"], f"{here}.model", base)
            mine = self._parameters(entry.get("parameters"), f"{here}.parameters")
            if reference in (model.reference for model in models):
                self.complain(f"{here}.model", f"'{reference}' is listed twice")
            name = _name(reference)
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name}-{seen[name]}"
            models.append(_Model(reference, name, ((f"{here}.parameters", mine), *shared)))
        return shared, models

    def _only_slice(self, slices: Any, shared: Scopes) -> tuple[Scopes, Any, str]:
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            self.complain("slices", "several slices stack layers anew, and modelmerge merges whole models")
            return shared, [], "slices"
        for key in slices[0]:
            if key not in ("sources", "parameters"):
                self.complain(f"slices[0].{key}", "cannot be honoured")
        mine = self._parameters(slices[0].get("parameters"), "slices[0].parameters")
        sources = slices[0].get("sources")
        sources = sources if isinstance(sources, list) else []
        ranges = [source.get("layer_range") for source in sources or () if isinstance(source, dict)]
        span = ranges[0] if ranges and all(each == ranges[0] for each in ranges) else None
        if isinstance(span, list) and len(span) == 2 and span[0] == 0 and isinstance(span[1], int):
            self.layers = span[1]
        else:
            self.complain("slices[0].sources", "each needs the layer_range [0, N] with all N layers of the models")
        return [("slices[0].parameters", mine), *shared], sources, "slices[0].sources"

    def _parameters(self, entry: Any, path: str) -> Mapping[str, Any]:
        if entry is not None and not isinstance(entry, dict):
            self.complain(path, "is no mapping")
            return {}
        for key in entry or ():
            if key not in KNOWN:
                self.complain(f"{path}.{key}", "no method of mergekit has such a parameter" + _near(str(key), KNOWN))
        return entry or {}

    def _reference(self, entry: Any, path: str, base: str | None = None) -> str:
        """The reference; an adapter on the base (`base+adapter`) is the adapter."""
        if isinstance(entry, dict) and set(entry) == {"model"}:
            entry = entry["model"]
        if isinstance(entry, dict) and set(entry) == {"model", "lora"}:
            entry = f"{entry['model']}+{entry['lora']}"
        if isinstance(entry, dict) and "path" in entry and set(entry) <= {"path", "revision"}:
            entry = f"{entry['path']}@{entry['revision']}" if entry.get("revision") else entry["path"]
        if not isinstance(entry, str) or not entry:
            self.complain(path, f"only a path or a name on the Hub can be honoured, not {shown(entry)}")
            return ""
        model, plus, adapter = entry.partition("+")
        if not plus:
            return entry
        if base is None or model != base or not adapter:
            self.complain(path, "an adapter can be honoured on the base_model only: BASE+ADAPTER")
        return adapter

    # ---- what is said once

    def _dtype(self, config: Mapping[str, Any]) -> str | None:
        names: dict[str, str | None] = {}
        for key in ("dtype", "out_dtype"):
            value = config.get(key)
            names[key] = value.removeprefix("torch.") if isinstance(value, str) else None
            if value is not None and names[key] not in DTYPES:
                self.complain(key, f"{shown(value)}: only {', '.join(DTYPES)} can be honoured")
        if names["dtype"] == "float64":
            self.remarks.append("dtype float64: mergekit computes in it; here the arithmetic is float32.")
        if names["dtype"] in _HALVES:
            self.remarks.append(
                f"dtype {names['dtype']}: mergekit rounds every model to it before it subtracts and computes in it; "
                "here the arithmetic is float32 on the models as they are stored, and the result is rounded once."
            )
        return names["out_dtype"] or names["dtype"]

    def _tokenizer(self, config: Mapping[str, Any], base: str | None) -> None:
        honoured = ["base", base]
        why = "only the base's own tokenizer can be honoured: vocabularies are not merged"
        if config.get("tokenizer_source") is not None and config["tokenizer_source"] not in honoured:
            self.complain("tokenizer_source", f"{shown(config['tokenizer_source'])}: {why}")
        tokenizer = config.get("tokenizer")
        if isinstance(tokenizer, dict):
            for key, value in tokenizer.items():
                if key != "source" or value not in honoured:
                    self.complain(f"tokenizer.{key}", why)
            if "source" not in tokenizer:
                self.complain("tokenizer", f"its source is 'union' where none is given; {why}")
        elif tokenizer is not None:
            self.complain("tokenizer", why)
        if config.get("chat_template") is not None:
            self.complain("chat_template", "the base's files are copied as they are; change the template afterwards")

    # ---- parameters

    def _recipe(
        self, row: Row, base: str | None, shared: Scopes, models: list[_Model], dtype: str | None
    ) -> Recipe | None:
        if row.inputs == "deltas" and base is None:
            self.complain("base_model", "is missing: mergekit's method needs it")
        if row.inputs == "deltas" or (row.inputs == "either" and base is not None):
            models = [model for model in models if not self._is_base(model, base)]
        elif base is not None and base not in (model.reference for model in models):
            # As mergekit does: a base that is named but not listed is one more model, with the settings for all.
            models = [*models, _Model(base, _name(base), shared)]
        fewest, most = row.experts
        if not fewest <= len(models) <= (most or len(models)):
            takes = f"{fewest}" if most == fewest else f"at least {fewest}"
            self.complain("models", f"this method takes {takes} besides the base, and there are {len(models)}")
        if not models:
            return None
        nearest = [model.scopes[0] for model in models if model.scopes[0] not in shared]
        self.remarks += strays(row, shared, nearest, self.complain)
        experts = {model.name: model.scopes for model in models}
        options, weights, self.variations = read_options(row, shared, experts, self.complain)
        if row.remark:
            self.remarks.append(row.remark)
        return Recipe(
            method=row.method, base=base if base is not None else models[0].reference,
            experts=tuple(f"{model.name}={model.reference}" for model in models),
            options={**row.fixed, **(row.alone if base is None else {}), **options}, weights=weights, dtype=dtype,
        )  # fmt: skip

    def _is_base(self, model: _Model, base: str | None) -> bool:
        if model.reference != base:
            return False
        path, mine = model.scopes[0]
        if mine:
            self.remarks.append(f"{path}: parameters of the base itself have no effect in mergekit, nor here.")
        return True


def _name(reference: str) -> str:
    """A name for a model: the last part of its path or repository, in the letters that a name may have."""
    last = reference.removeprefix("hf://").partition("@")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.\-]", "-", last.removesuffix(".safetensors")).lstrip("_.-") or "model"


def _near(word: str, words: Iterable[str]) -> str:
    hint = suggestion(word, sorted(words))
    return f"; {hint}" if hint else ""
