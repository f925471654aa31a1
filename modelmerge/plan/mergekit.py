"""mergekit's YAML configurations as recipes: what a key means there, and which option it is here.

`mergekit_methods` has the whole of the mapping: a method that both have is one row. A key of mergekit that cannot be
honoured is never skipped: one error names all of them with their places in the file. A key that mergekit ignores is
remarked, or an error if it looks like a misspelt one.

Checked against runs of mergekit 0.1.5 (`tests/support/mergekit_runs.py` makes them, `tests/plan/test_mergekit.py`
compares).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.documents import shown
from modelmerge.checkpoint.reference import Named
from modelmerge.errors import RecipeError
from modelmerge.methods.options import as_text
from modelmerge.plan.format_1 import Variation, merged_overrides
from modelmerge.plan.layers import PASSTHROUGH
from modelmerge.plan.mergekit_documents import Document, References, read_documents
from modelmerge.plan.mergekit_methods import KEYS, METHODS, NOTHING, Row
from modelmerge.plan.mergekit_models import (
    InSlice,
    Read,
    Reader,
    Slice,
    Source,
    check_keys,
    keeps_nothing,
    names_of,
    near,
    runs_of,
    spread,
    together,
    with_ends,
)
from modelmerge.plan.mergekit_parameters import Scopes, read_options, strays
from modelmerge.plan.mergekit_tokens import Tokens, read_tokens
from modelmerge.plan.modules import holds
from modelmerge.plan.overrides import BASE, WEIGHT, Override
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import DTYPES, Plan, TensorPlan

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Translated:
    """A configuration as a recipe, what should be known of it, and the number of layers of its slices.

    The recipe lacks its overrides: they follow from the `variations` and the tensors' names.
    """

    recipe: Recipe
    variations: tuple[Variation | InSlice, ...]
    remarks: tuple[str, ...]
    modules: tuple[str, ...] = ()  # that it merges, where it names some: the base's others stay
    stages: Mapping[str, Translated] = field(default_factory=dict)  # what is merged before it, by name, in order

    def overrides(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The overrides of the recipe, for a base with tensors of these names."""
        names = list(tensors)
        inside = {tensor for module in self.modules for tensor in filter(holds(module, names), names)}
        variations = spread(self.variations, names)
        if self.recipe.options.get("consensus") == "linear" and any(map(keeps_nothing, variations)):
            variations = [replace(each, steps=True) for each in variations]  # a scale follows from the weights
        overrides = merged_overrides(
            names, variations,
            lambda tensor: BASE if self.modules and tensor not in inside else None,
        )  # fmt: skip
        return tuple(str(self._as_here(each)) for each in overrides)

    def _as_here(self, override: Override) -> Override:
        """An override that says what mergekit means."""
        options, values = self.recipe.options, override.values
        if "factor" in values and self.recipe.method != PASSTHROUGH:
            return Override(override.tensors, PASSTHROUGH,
                            {"factor": "1" if values.get("reduce") == "mean" else values["factor"]})  # fmt: skip
        none = {e for (e, option), text in override.experts.items() if (option, text) == ("density", as_text(NOTHING))}
        if none and options.get("consensus") == "linear" and values.get("reduce", options.get("reduce")) == "mean":
            # What keeps nothing counts in the mean nevertheless.
            assert isinstance(self.recipe.weights, Mapping), "a file says numbers"
            said = {e: float(text) for (e, option), text in override.experts.items() if option == WEIGHT}
            total = sum({**self.recipe.weights, **said}.values())
            scale = float({**options, **values}["scale"]) / (total if abs(total) >= 1e-8 else 1.0)
            values = {**values, "reduce": "sum", "scale": as_text(scale)}
        experts = {key: text for key, text in override.experts.items() if key[0] not in none}
        if "reduce" in values and "scale" in options:
            # The scale would follow from the number of experts; mergekit's stays.
            values = {"scale": as_text(options["scale"]), **values}
        return replace(override, values=values, experts=experts | {(name, WEIGHT): "0" for name in none})

    def without(self, options: Collection[str]) -> Translated:
        """The same, less what it varies of these options (`scale`, or of one expert `NAME.weight`, of all `weight`)."""
        kept = [v for v in self.variations if not {v.option, f"{v.expert}.{v.option}"} & set(options)]
        return replace(self, variations=tuple(kept))

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
    models = [model for model in plan.models if tensor.name in model.tensors]
    dtypes = {model.stored_dtype(model.tensors[tensor.name]) for model in models}
    dtypes |= {"F32"} if {"F16", "BF16"} <= dtypes else set()
    return next(dtype for dtype in ("F64", "F32", "F16", "BF16") if dtype in dtypes)


def read(file: Path) -> Translated:
    """The recipe that a mergekit configuration describes, and those of the merges before it.

    Raises:
        RecipeError: It is none, or asks for what modelmerge does not do: all of that, in one error.
    """
    documents, idle = read_documents(file)
    names = [document.name for document in documents if document.name is not None and document.place]
    references = References(frozenset([*names, *idle]))
    parts = [_Translation(document, references) for document in documents]
    recipes = [part.translate() for part in parts]
    complaints = [complaint for part in parts for complaint in part.complaints]
    whole = [recipe for recipe in recipes if recipe is not None]
    if complaints or len(whole) < len(parts):
        count = len(complaints)
        raise RecipeError(
            f"{file}: {count} {'thing' if count == 1 else 'things'} that cannot be honoured:\n  "
            + "\n  ".join(complaints),
            hint="change or remove these keys; modelmerge guide mergekit has them key by key",
        )
    *before, final = whole
    stages = {str(document.name): recipe for document, recipe in zip(documents, before, strict=False)}
    unused = (f"The document '{name}' is not needed for the output and is left out." for name in idle)
    return replace(final, stages=stages, remarks=(*final.remarks, *unused))


class _Translation:
    """One configuration on its way; collects what cannot be honoured."""

    def __init__(self, document: Document, references: References) -> None:
        self.document, self.references = document, references
        self.complaints: list[str] = []
        self.remarks: list[str] = []
        self.variations: Sequence[Variation | InSlice] = ()
        self.modules: tuple[str, ...] = ()
        self.names: Mapping[str, str] = {}  # of the models here, by their references

    def complain(self, path: str, why: str) -> None:
        self.complaints.append(f"{self.document.place}{path}: {why}")

    def translate(self) -> Translated | None:
        config = self.document.config
        check_keys(config, KEYS, "", self.complain, self.remarks.append)
        row = self._row(config.get("merge_method"))
        base = self._reference(config["base_model"], "base_model") if config.get("base_model") is not None else None
        reader = Reader(self.complain, lambda entry, path: self._reference(entry, path, base))
        slices = reader.read(config)
        self.remarks += reader.remarks
        dtype = self._dtype(config)
        recipe = self._recipe(row, base, slices, dtype) if row else None
        tokens = self._tokens(config, base, based=base is not None or (row is not None and row.inputs == "deltas"))
        if recipe is None:
            return None
        recipe = replace(recipe, **tokens._asdict())
        return Translated(recipe, tuple(self.variations), tuple(self.remarks), self.modules)

    def _row(self, name: Any) -> Row | None:
        if isinstance(name, str) and name in METHODS:
            return METHODS[name]
        meant = (isinstance(name, str) and near(name, METHODS)) or f"; there are: {', '.join(METHODS)}"
        self.complain("merge_method", f"modelmerge has no counterpart of {shown(name)}{meant}")
        return None

    def _reference(self, entry: Any, path: str, base: str | None = None) -> str:
        """The reference; an adapter on the base (`base+adapter`) is the adapter."""
        if isinstance(entry, dict) and entry.get("override_architecture") is not None:
            self.remarks.append(f"{path}.override_architecture has no effect here: tensors go by their names.")
        try:
            return self.references.read(entry, base)
        except ValueError as error:
            self.complain(path, str(error))
            return ""

    # ---- what is said once

    def _tokens(self, config: Mapping[str, Any], base: str | None, *, based: bool) -> Tokens:
        """What it says of tokenizers, of the models by their names here."""
        names = {**self.names, **({} if base is None else {base: BASE})}

        def who(entry: Any, place: str) -> Named:
            reference = self._reference(entry, place, base)
            others = names_of([*self.names, reference], sliced=True)  # a model that is not merged has a name, too
            return Named(names.get(reference, others[reference]), "" if reference in names else reference)

        return read_tokens(config, who, "base" if based else "mean", self.complain, self.remarks.append)

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

    # ---- parameters

    def _recipe(self, row: Row, base: str | None, slices: Sequence[Slice], dtype: str | None) -> Recipe | None:
        slices = [self._with_base(row, base, each) for each in slices]
        bases = [each.base for each in slices] or [base]
        if None in bases and (row.inputs == "deltas" or set(bases) != {None}):
            self.complain("base_model", "is missing: mergekit's method needs it")
        base = base or bases[0]
        sources = [source for each in slices for source in each.sources]
        references, spans = [s.reference for s in sources], [s.span for s in sources if s.span is not None]
        first = base if base is not None else next(iter(references), None)
        if first is None or not slices:
            return None
        # A module of the base alone stays as it is.
        whole = base if row.inputs == "deltas" else first if row.inputs == "one" else None
        slices = [each for each in slices if not each.is_of(whole)] or slices
        slices = with_ends(slices, base if row.inputs == "deltas" else None)
        # What is made of some models alone is told as runs: layers, modules of other models each, and the base alone.
        lists = {frozenset(s.reference for s in each.sources) - {base if row.based else None} for each in slices}
        apart = bool(spans) or len(lists) > 1 or lists == {frozenset()}
        seen = base if row.based else None  # from where task vectors are seen
        if row.inputs == "one" and apart:
            seen = first  # layers of it are taken by its own name
        if not row.based:
            slices = [replace(each, base=seen) for each in slices]
        # A model that is the base of one slice may be merged in another.
        others = [s.reference for each in slices for s in each.sources if not s.reference == each.base == seen]
        names = names_of(others, sliced=apart)
        read = [self._read(row, each, each.base, names, apart=apart) for each in slices]
        self.names = names if seen is None else {**names, seen: BASE}
        self.modules = tuple(dict.fromkeys(each.module for each in slices if each.module))
        if self.modules or len(slices) > 1 or any(start for start, _ in spans):  # layers get other numbers
            options, weights, self.variations = together(slices, read, names)
        else:
            options, weights, self.variations = read[0]
        self.remarks = list(dict.fromkeys([*self.remarks, *([row.remark] if row.remark else [])]))
        return Recipe(
            method=row.method, base=first,
            experts=tuple(f"{name}={reference}" for reference, name in names.items()),
            options={**row.fixed, **(row.alone if base is None else {}), **options}, weights=weights, dtype=dtype,
            layers=runs_of(slices, names, seen) if apart else (), whole_experts=True,
        )  # fmt: skip

    def _with_base(self, row: Row, base: str | None, each: Slice) -> Slice:
        """A slice as mergekit completes it: a base that is named but not listed is one more model where all stand."""
        if row.based:
            base = each.base or base
        elif each.base not in (None, base):
            self.remarks.append(f"{each.path}.base_model has no effect with this method in mergekit, nor here.")
        each = replace(each, base=base)
        sided = all(source.span is None for source in each.sources)
        if base is None or base in (source.reference for source in each.sources):
            return each
        if sided:
            return replace(each, sources=(*each.sources, Source(base, each.shared)))
        if row.based:
            self.complain(f"{each.path}.sources", f"'{base}' is missing: mergekit needs the base_model in each slice")
        return each

    def _read(self, row: Row, each: Slice, base: str | None, names: Mapping[str, str], *, apart: bool) -> Read:
        """The parameters of a slice."""
        models = [
            source for source in each.sources if row.inputs == "one" or not self._is_base(source, base, each.shared)
        ]
        fewest, most = row.experts
        lone = apart and len(each.sources) == 1 and (fewest, most) == (1, None) and (models or row.inputs != "either")
        if not fewest <= len(models) <= (most or len(models)) and not lone:
            takes = f"{fewest}" if most == fewest else f"at least {fewest}"
            besides = "" if row.inputs == "one" else " besides the base"
            self.complain(each.path, f"this method takes {takes}{besides}, and there are {len(models)}")
        shared = each.shared
        if row.inputs == "one" and len(models) == 1:
            shared = models[0].scopes  # what is said of the only model is said of all
        nearest = [model.scopes[0] for model in models if model.scopes[0] not in shared]
        self.remarks += strays(row, shared, nearest)
        experts = {names[model.reference]: model.scopes for model in models if model.reference in names}
        options, weights, variations = read_options(row, shared, experts, self.complain)
        if row.method == "multislerp" and len(models) == 1:  # it stays as it is there, whatever it weighs
            return {**options, "reduce": "mean"}, dict.fromkeys(experts, 1.0), ()
        if not lone or row.inputs == "one":
            return options, weights, variations
        means = [Variation("reduce", (options.get("reduce"),)), *(v for v in variations if v.option == "reduce")]
        if row.inputs != "members" or not any("sum" in each.values for each in means):
            return {}, {}, ()  # the layers as they are
        said = [*(Variation(WEIGHT, (value,)) for value in weights.values()), *variations]
        factors = [replace(each, option="factor", expert=None) for each in said if each.option == WEIGHT]
        return {}, {}, [*(each for each in means if each.values != (None,)), *factors]

    def _is_base(self, model: Source, base: str | None, shared: Scopes) -> bool:
        if model.reference != base:
            return False
        path, mine = model.scopes[0]
        if mine and model.scopes[0] not in shared:
            self.remarks.append(f"{path}: parameters of the base itself have no effect in mergekit, nor here.")
        return True
