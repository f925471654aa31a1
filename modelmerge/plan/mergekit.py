"""mergekit's YAML configurations as recipes: what a key means there, and which option it is here.

`METHODS` is the whole of the mapping: a method that both have is one row. A key that cannot be honoured is never
skipped: one error names all of them with their places in the file.

The result is mergekit's, to rounding in float32, with exceptions where its number depends on storage or on chance:

- `dtype: bfloat16` or `float16` makes it round every model before it subtracts, and compute in that dtype: half of a
  small task vector can be rounding. (Earlier versions cast the experts to the base's dtype whatever was said.) Here
  the arithmetic is float32 on the models as they are stored, and the result is rounded once.
- Entries whose task vectors cancel exactly go to the positive side there; here they stay at the base, as in the paper.
- Of entries that are equal in size at a threshold, common in 16 bits, it keeps some and drops others to make the count;
  here all are kept.
- Of a tensor of fewer than 1 / density entries, its breadcrumbs keep nothing; here one entry stays.
- Where entries are dropped at random the draws are other ones.

Checked against runs of mergekit 0.1.5 (`tests/support/mergekit_runs.py` makes them, `tests/plan/test_mergekit.py`
compares).
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from modelmerge.errors import RecipeError, UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import check_option
from modelmerge.plan.format_1 import Variation, merged_overrides
from modelmerge.plan.overrides import WEIGHT, layers
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import Plan, TensorPlan

REQUIRED: Any = object()
_DTYPES = ("float32", "float16", "bfloat16")
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of mergekit's parameters of a method.

    Args:
        key: Its name there.
        option: The option here, `weight` for `--weight`, None for one that changes no number.
        default: What it is there when it is not given; REQUIRED where mergekit insists.
        per_model: It is one value for each model, not one for all.
        words: The option's value for each of the parameter's, where it is no number.
        only: The one value that can be honoured, where there is no option.
        told: What becomes of it, where the above does not say it.
    """

    key: str
    option: str | None
    default: Any
    per_model: bool = False
    words: Mapping[Any, Any] | None = None
    only: Any = None
    told: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A method of mergekit: the method here, what that has to be told besides, and its parameters.

    `inputs`: the models are experts of `base_model` (deltas), or stand side by side, the base among them if it is
    listed (members), or the former if there is a base and the latter with the options `alone` if there is none
    (either). `experts`: the fewest and the most that mergekit takes. `remark` says where the numbers differ.
    """

    method: str
    parameters: tuple[Parameter, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    inputs: Literal["deltas", "members", "either"] = "deltas"
    alone: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[int, int | None] = (1, None)
    remark: str | None = None


_WEIGHT = Parameter("weight", WEIGHT, REQUIRED, per_model=True)
_DENSITY = Parameter("density", "density", 1.0, per_model=True)
_LAMBDA = Parameter("lambda", "scale", 1.0)
_INT8_MASK = Parameter("int8_mask", None, False)
_MEANS: Mapping[Any, Any] = {True: "mean", False: "sum"}
_GAMMA = Parameter("gamma", "gamma", 0.01, per_model=True)
_EPSILON = Parameter("epsilon", "epsilon", 0.15, per_model=True)
_SUM_ONLY = Parameter("normalize", None, False, only=False)
_RESCALED = Parameter("rescale", None, True, only=True)
_AS_IT_IS = Parameter("rescale", None, False, only=False)
_DRAWN = (
    "mergekit draws other entries, others in every process; it scales what is kept of a tensor to the L1 norm it had, "
    "and here every entry is divided by its chance to be kept."
)
_TO_THE_END = "has no effect: it iterates until it stands still"


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "reduce", default, words=_MEANS)


METHODS: Mapping[str, Row] = {
    "linear": Row(
        "average",
        (_WEIGHT, Parameter("normalize", None, True, told="true, or false with weights that add up to 1")),
        inputs="members",
    ),
    "task_arithmetic": Row("task-arithmetic", (_WEIGHT, _LAMBDA, _normalize(False), _INT8_MASK)),
    "ties": Row(
        "ties", (_WEIGHT, _DENSITY, _LAMBDA, _normalize(True), _INT8_MASK, _AS_IT_IS), fixed={"trim_scope": "tensor"}
    ),
    "dare_linear": Row(
        "dare", (_WEIGHT, _DENSITY, _LAMBDA, _SUM_ONLY, _INT8_MASK, _RESCALED), {"consensus": "linear"}, remark=_DRAWN
    ),
    "dare_ties": Row(
        "dare",
        (_WEIGHT, _DENSITY, _LAMBDA, _normalize(False), _INT8_MASK, _RESCALED),
        {"consensus": "ties"},
        remark=_DRAWN,
    ),
    "della": Row(
        "della",
        (_WEIGHT, _DENSITY, _EPSILON, _LAMBDA, _normalize(True), _INT8_MASK, _RESCALED),
        {"consensus": "ties"},
        remark=_DRAWN,
    ),
    "della_linear": Row(
        "della",
        (_WEIGHT, _DENSITY, _EPSILON, _LAMBDA, _SUM_ONLY, _INT8_MASK, _RESCALED),
        {"consensus": "linear"},
        remark=_DRAWN,
    ),
    "breadcrumbs": Row(
        "breadcrumbs",
        (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _SUM_ONLY, _INT8_MASK, _AS_IT_IS),
        {"consensus": "linear", "scope": "tensor"},
    ),
    "breadcrumbs_ties": Row(
        "breadcrumbs",
        (_WEIGHT, _DENSITY, _GAMMA, _LAMBDA, _SUM_ONLY, _INT8_MASK, _AS_IT_IS),
        {"consensus": "ties", "scope": "tensor"},
    ),
    "sce": Row("sce", (Parameter("select_topk", "density", 1.0), _INT8_MASK), {"scale": 1.0}),
    "model_stock": Row(
        "model-stock",
        (Parameter("filter_wise", "scope", False, words={True: "row", False: "tensor"}),),
        experts=(2, None),
    ),
    "slerp": Row("slerp", (Parameter("t", "t", REQUIRED),), {"points": "weights"}, experts=(1, 1)),
    "nuslerp": Row(
        "slerp",
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", None, True, only=True),
            Parameter("nuslerp_row_wise", None, False, told="has no effect with nuslerp_flatten"),
        ),
        {"t": 0.5, "points": "task-vectors"},
        inputs="either",
        alone={"points": "weights"},
        experts=(2, 2),
    ),
    "karcher": Row(
        "karcher",
        (Parameter("max_iter", None, 10.0, told=_TO_THE_END), Parameter("tol", None, 1e-5, told=_TO_THE_END)),
        {"points": "weights"},
        inputs="members",
    ),
    "nearswap": Row("nearswap", (Parameter("t", "t", REQUIRED),), experts=(1, 1)),
}

# Every parameter of any method there: those of another method have no effect, which is worth a remark; any other is
# a slip of the pen.
KNOWN = {
    "weight", "density", "lambda", "normalize", "rescale", "int8_mask", "gamma", "epsilon", "t", "select_topk",
    "filter_wise", "max_iter", "tol", "eps", "normalize_weights", "nuslerp_row_wise", "nuslerp_flatten", "scale", "r",
    "alpha",
}  # fmt: skip
# What becomes of the keys of the file itself.
KEYS: Mapping[str, str] = {
    "merge_method": "METHOD, see below",
    "base_model": "BASE; where a method needs none, the first model",
    "models": "EXPERT...; an adapter on the base, `base+adapter`, is the adapter",
    "slices": "one, over all layers: as `models`",
    "parameters": "see below; a list over the layers or a `filter` becomes `--at`",
    "dtype": "`--dtype`; the arithmetic is float32 whatever it says",
    "out_dtype": "`--dtype`",
    "tokenizer_source": "`base` only: the base's files are copied",
    "tokenizer": "`source: base` only",
    "chat_template": "cannot be honoured",
    "modules": "cannot be honoured",
}


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
        widest = {_widest(tensor, plan) for tensor in plan.in_order() if tensor.action == "merge"}
        own = {tensor.dtype for tensor in plan.in_order() if tensor.action == "merge"}
        name = _DTYPE_NAMES.get(next(iter(widest))) if len(widest) == 1 else None
        if widest == own:
            return self
        if name is None:
            said = "No dtype: tensors are stored as the base does; mergekit stores each in the widest dtype it has."
            return replace(self, remarks=(*self.remarks, said))
        said = f"No dtype: stored in {name}, the widest of the models', as mergekit does."
        return replace(self, recipe=replace(self.recipe, dtype=name), remarks=(*self.remarks, said))


def _widest(tensor: TensorPlan, plan: Plan) -> str:
    """The dtype that holds what all models store of a tensor."""
    found = {model.tensors[tensor.name].dtype for model in plan.models if tensor.name in model.tensors}
    found |= {"F32"} if {"F16", "BF16"} <= found else set()
    return next(dtype for dtype in ("F64", "F32", "F16", "BF16") if dtype in found)


def read(file: Path) -> Translated:
    """The recipe that a mergekit configuration describes.

    Raises:
        RecipeError: It is none, or asks for what modelmerge does not do: all of that, in one error.
    """
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise RecipeError(f"{file}: cannot be read as YAML: {said}") from error
    if not isinstance(config, dict) or "merge_method" not in config:
        raise RecipeError(
            f"{file}: no mergekit configuration: it has no 'merge_method'",
            hint="a YAML recipe is mergekit's; modelmerge's own is the modelmerge.json of a merged checkpoint",
        )
    return _Translation(file).translate(config)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, which also refuses a key that comes twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice[0]}' comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model of the configuration: the reference, a name of its own, and its settings from near to far."""

    reference: str
    name: str
    scopes: tuple[tuple[str, Mapping[str, Any]], ...]  # (path, parameters)


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
        if name in METHODS:
            return METHODS[name]
        near = _near(str(name), METHODS) or f"; there are: {', '.join(METHODS)}"
        self.complain("merge_method", f"modelmerge has no counterpart of '{name}'{near}")
        return None

    # ---- models

    def _models(
        self, config: Mapping[str, Any], base: str | None
    ) -> tuple[tuple[tuple[str, Mapping[str, Any]], ...], list[_Model]]:
        """The settings for all models, from near to far, and the models."""
        top = self._parameters(config.get("parameters"), "parameters")
        shared: tuple[tuple[str, Mapping[str, Any]], ...] = (("parameters", top),)
        given = [key for key in ("models", "slices", "modules") if config.get(key)]
        if given == ["slices"]:
            shared, entries, path = self._only_slice(config["slices"], shared)
        elif given == ["models"]:
            entries, path = config["models"], "models"
        else:
            if len(given) == 1:
                self.complain("modules", "parts of a model with settings of their own cannot be honoured")
            else:
                self.complain(" and ".join(given) or "models", "mergekit takes exactly one of models, slices, modules")
            return shared, []
        if not isinstance(entries, list):
            self.complain(path, "is no list")
            return shared, []
        models: list[_Model] = []
        seen: Counter[str] = Counter()
        known = {"model", "parameters"} | ({"layer_range"} if path != "models" else set())
        for i, entry in enumerate(entries):
            here = f"{path}[{i}]"
            if not isinstance(entry, dict) or "model" not in entry:
                self.complain(here, "has no 'model'")
                continue
            for key in entry:
                if key not in known:
                    self.complain(f"{here}.{key}", "mergekit has no such key" + _near(str(key), known))
            reference = self._reference(entry["model"], f"{here}.model", base)
            mine = self._parameters(entry.get("parameters"), f"{here}.parameters")
            if reference in (model.reference for model in models):
                self.complain(f"{here}.model", f"'{reference}' is listed twice")
            name = _name(reference)
            seen[name] += 1
            name = name if seen[name] == 1 else f"{name}-{seen[name]}"
            models.append(_Model(reference, name, ((f"{here}.parameters", mine), *shared)))
        return shared, models

    def _only_slice(
        self, slices: Any, shared: tuple[tuple[str, Mapping[str, Any]], ...]
    ) -> tuple[tuple[tuple[str, Mapping[str, Any]], ...], Any, str]:
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            self.complain("slices", "several slices stack layers anew, and modelmerge merges whole models")
            return shared, [], "slices"
        for key in slices[0]:
            if key not in ("sources", "parameters"):
                self.complain(f"slices[0].{key}", "cannot be honoured")
        mine = self._parameters(slices[0].get("parameters"), "slices[0].parameters")
        sources = slices[0].get("sources")
        ranges = {
            tuple(source["layer_range"]) if isinstance(source.get("layer_range"), list) else None
            for source in sources or ()
            if isinstance(source, dict)
        }
        found = ranges.pop() if len(ranges) == 1 else None
        if found is None or len(found) != 2 or found[0] != 0 or not isinstance(found[1], int):
            self.complain("slices[0].sources", "each needs the layer_range [0, N] with all N layers of the models")
        else:
            self.layers = found[1]
        return (("slices[0].parameters", mine), *shared), sources, "slices[0].sources"

    def _parameters(self, given: Any, path: str) -> Mapping[str, Any]:
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.complain(path, "is no mapping")
            return {}
        for key in given:
            if key not in KNOWN:
                self.complain(f"{path}.{key}", "no method of mergekit has such a parameter" + _near(str(key), KNOWN))
        return given

    def _reference(self, given: Any, path: str, base: str | None = None) -> str:
        """The reference; an adapter on the base (`base+adapter`) is the adapter."""
        if isinstance(given, dict) and set(given) == {"model"}:
            given = given["model"]
        if isinstance(given, dict) and set(given) == {"model", "lora"}:
            given = f"{given['model']}+{given['lora']}"
        if isinstance(given, dict) and "path" in given and set(given) <= {"path", "revision"}:
            given = f"{given['path']}@{given['revision']}" if given.get("revision") else given["path"]
        if not isinstance(given, str) or not given:
            self.complain(path, f"only a path or a name on the Hub can be honoured, not {given!r}")
            return ""
        model, plus, adapter = given.partition("+")
        if not plus:
            return given
        if base is None or model != base or not adapter:
            self.complain(path, "an adapter can be honoured on the base_model only: BASE+ADAPTER")
        return adapter

    # ---- what is said once

    def _dtype(self, config: Mapping[str, Any]) -> str | None:
        told: dict[str, str | None] = {}
        for key in ("dtype", "out_dtype"):
            value = config.get(key)
            told[key] = value.removeprefix("torch.") if isinstance(value, str) else None
            if value is not None and told[key] not in _DTYPES:
                self.complain(key, f"{value!r}: only {', '.join(_DTYPES)} can be honoured")
        if told["dtype"] in _HALVES:
            self.remarks.append(
                f"dtype {told['dtype']}: mergekit rounds every model to it before it subtracts and computes in it; "
                "here the arithmetic is float32 on the models as they are stored, and the result is rounded once."
            )
        return told["out_dtype"] or told["dtype"]

    def _tokenizer(self, config: Mapping[str, Any], base: str | None) -> None:
        honoured = {"base", base}
        why = "only the base's own tokenizer can be honoured: vocabularies are not merged"
        if config.get("tokenizer_source") is not None and config["tokenizer_source"] not in honoured:
            self.complain("tokenizer_source", f"'{config['tokenizer_source']}': {why}")
        told = config.get("tokenizer")
        if isinstance(told, dict):
            for key, value in told.items():
                if key != "source" or value not in honoured:
                    self.complain(f"tokenizer.{key}", why)
            if "source" not in told:
                self.complain("tokenizer", f"its source is 'union' where none is given; {why}")
        elif told is not None:
            self.complain("tokenizer", why)
        if config.get("chat_template") is not None:
            self.complain("chat_template", "the base's files are copied as they are; change the template afterwards")

    # ---- parameters

    def _recipe(
        self,
        row: Row,
        base: str | None,
        shared: Sequence[tuple[str, Mapping[str, Any]]],
        models: list[_Model],
        dtype: str | None,
    ) -> Recipe | None:
        if row.inputs == "deltas" and base is None:
            self.complain("base_model", "is missing: mergekit's method needs it")
        if row.inputs == "deltas" or (row.inputs == "either" and base is not None):
            models = [model for model in models if not self._is_base(model, base)]
        elif base is not None and base not in (model.reference for model in models):
            # As mergekit does: a base that is named but not listed is one more model, with the settings for all.
            models = [*models, _Model(base, _name(base), tuple(shared))]
        fewest, most = row.experts
        if not fewest <= len(models) <= (most or len(models)):
            takes = f"{fewest}" if most == fewest else f"at least {fewest}"
            self.complain("models", f"this method takes {takes} besides the base, and there are {len(models)}")
        if not models:
            return None
        self._refuse_strays(row, shared, models)
        options, vary = {**row.fixed, **(row.alone if base is None else {})}, []
        weights: dict[str, float] = {}
        for parameter in row.parameters:
            if not parameter.per_model:
                told = self._settle(parameter, shared, None)
                if parameter.option is not None and told.plain is not None:
                    options[parameter.option] = told.plain
                vary += told.variations
                continue
            for model in models:
                told = self._settle(parameter, model.scopes, model.name)
                vary += told.variations
                if parameter.option == WEIGHT and told.plain is not None:
                    weights[model.name] = told.plain
                elif parameter.option is not None and told.plain is not None:
                    options.setdefault(parameter.option, told.plain)
                    if options[parameter.option] != told.plain:
                        vary.insert(0, Variation(parameter.option, (told.plain,), model.name))
        if row.method == "average" and self._shared_value("normalize", shared) is False:
            self._refuse_sum(weights, vary)
        if row.remark:
            self.remarks.append(row.remark)
        self.variations = vary
        return Recipe(
            method=row.method, base=base if base is not None else models[0].reference,
            experts=tuple(f"{model.name}={model.reference}" for model in models), options=options, weights=weights,
            dtype=dtype,
        )  # fmt: skip

    def _is_base(self, model: _Model, base: str | None) -> bool:
        if model.reference != base:
            return False
        path, mine = model.scopes[0]
        if mine:
            self.remarks.append(f"{path}: parameters of the base itself have no effect in mergekit, nor here.")
        return True

    def _refuse_strays(
        self, row: Row, shared: Sequence[tuple[str, Mapping[str, Any]]], models: Sequence[_Model]
    ) -> None:
        """Complain of parameters in the wrong place; remark on those that the method does not have."""
        has = {parameter.key: parameter for parameter in row.parameters}
        own = [model.scopes[0] for model in models if model.scopes[0] not in shared]
        for path, given in [*shared, *own]:
            for key in given:
                if key in KNOWN and key not in has:
                    self.remarks.append(f"{path}.{key} has no effect on this method in mergekit, nor here.")
                elif key in has and not has[key].per_model and path in (place for place, _ in own):
                    self.complain(f"{path}.{key}", "mergekit ignores it here; it belongs into the parameters for all")

    def _shared_value(self, key: str, shared: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
        return next((given[key] for _, given in shared if key in given), None)

    def _refuse_sum(self, weights: Mapping[str, float], vary: Sequence[Variation]) -> None:
        varies = any(variation.option == WEIGHT for variation in vary)
        if varies or abs(sum(weights.values()) - 1.0) > 1e-6:
            total = "weights that vary" if varies else f"weights that add up to {sum(weights.values()):g}"
            self.complain(
                "parameters.normalize",
                f"false with {total}: a sum of models whose weights are not 1 together cannot be honoured",
            )

    def _settle(
        self, parameter: Parameter, scopes: Sequence[tuple[str, Mapping[str, Any]]], expert: str | None
    ) -> _Told:
        """What a parameter is, by mergekit's rules: the nearest scope that has a value for a tensor decides.

        Here the last variation that applies decides, so they come from far to near and from the last filter to the
        first.
        """
        plain = parameter.default
        variations: list[Variation] = []
        for path, given in reversed(scopes):
            if parameter.key not in given:
                continue
            for only, value in reversed(self._conditions(given[parameter.key], f"{path}.{parameter.key}")):
                values = self._values(parameter, value, f"{path}.{parameter.key}")
                if values is None:
                    plain = None  # complained of
                elif only is None and len(values) == 1:
                    plain, variations = values[0], []
                elif parameter.words is not None or parameter.option is None:
                    if parameter.option is not None or parameter.only is not None:
                        self.complain(f"{path}.{parameter.key}", "can be honoured only as one value for all tensors")
                elif only is None:
                    plain, variations = None, [Variation(parameter.option, values, expert)]
                else:
                    variations.append(Variation(parameter.option, values, expert, f"*{glob.escape(only)}*"))
        if plain is REQUIRED:
            nearest = scopes[0][0]
            for_some = " for tensors that no filter matches" if variations else ""
            self.complain(f"{nearest}.{parameter.key}", f"is missing{for_some}: mergekit insists on it")
            plain = None
        if plain is not None and parameter.only is not None and plain != parameter.only:
            self.complain(
                parameter.key, f"{_yaml(plain)} cannot be honoured with this method, only {_yaml(parameter.only)}"
            )
        if plain is not None and parameter.words is not None:
            plain = parameter.words[plain]
        return _Told(plain, variations)

    def _conditions(self, setting: Any, path: str) -> list[tuple[str | None, Any]]:
        """(filter, value) of each part of a setting, in order; those after one without a filter never count."""
        listed = setting if isinstance(setting, list) and setting and isinstance(setting[0], dict) else [setting]
        conditions: list[tuple[str | None, Any]] = []
        for part in listed:
            only = None
            if isinstance(part, dict):
                if "value" not in part or not set(part) <= {"value", "filter"}:
                    self.complain(path, "a condition has a 'value' and a 'filter' and nothing else")
                    continue
                only, part = part.get("filter"), part["value"]
            conditions.append((None if only in (None, "*") else str(only), part))
            if conditions[-1][0] is None:
                break
        return conditions

    def _values(self, parameter: Parameter, value: Any, path: str) -> tuple[Any, ...] | None:
        """The value, or the several of a gradient; None if it is neither."""
        values = value if isinstance(value, list) else [value]
        if isinstance(parameter.default, bool):
            if values and all(isinstance(each, bool) for each in values):
                return tuple(values)
            self.complain(path, f"must be true or false, not {value!r}")
            return None
        try:
            if not values or any(isinstance(each, bool) for each in values):
                raise TypeError
            numbers = tuple(float(each) for each in values)
        except (TypeError, ValueError):
            self.complain(path, f"must be a number or a list of numbers, not {value!r}")
            return None
        if self.row is not None and parameter.option not in (None, WEIGHT):
            try:
                for number in numbers:
                    check_option(registry.load(self.row.method), parameter.option, number)
            except UsageError as error:
                self.complain(path, error.message)
                return None
        return numbers


@dataclass(frozen=True, slots=True)
class _Told:
    plain: Any  # None: nothing to say, or complained of
    variations: list[Variation]


def _name(reference: str) -> str:
    """A name for a model: the last part of its path or repository, in the letters that a name may have."""
    last = reference.removeprefix("hf://").partition("@")[0].rstrip("/").rpartition("/")[2]
    last = last.removesuffix(".safetensors")
    return re.sub(r"[^\w.\-]", "-", last).lstrip("_.-") or "model"


def _near(word: str, words: Iterable[str]) -> str:
    near = get_close_matches(word, sorted(words), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
