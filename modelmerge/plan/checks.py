"""What can be known to be wrong with a recipe before a model is opened. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence

from modelmerge.checkpoint.reference import Reference, parse_all, parse_here
from modelmerge.errors import UsageError, named, suggestion
from modelmerge.methods import registry
from modelmerge.methods.contract import Method
from modelmerge.methods.options import make_options
from modelmerge.methods.words import parse_transform
from modelmerge.plan.overrides import BASE, Methods, Override, parse
from modelmerge.plan.recipe import BALANCED, Recipe, parse_size
from modelmerge.plan.tensors import DTYPES, ON_MISMATCH


def check_recipe(recipe: Recipe) -> list[Reference]:
    """Refuse what no models could make right; the models that are on this machine.

    Raises:
        UsageError: An option or its value is wrong, or names no expert.
        ReferenceNotFound: A path leads nowhere.
    """
    check_choices(recipe)
    if (method := _method(recipe.method)) is not None:
        make_options(method, recipe.method, recipe.options)
    for text in recipe.disentangle:
        parse_transform(text)
    overrides = [parse(text) for text in recipe.at]
    refuse_many_experts(recipe, overrides)
    refuse_beside_layers(recipe)
    parse_size(recipe.max_shard_size)
    references = [parse_here(text) for text in (recipe.base, *recipe.experts)]
    if None not in references[1:]:
        experts = parse_all(recipe.experts, "expert")
        names = [expert.name for expert in experts]
        check_weights(recipe, names)
        if method is not None:
            Methods(recipe.method, recipe.options, overrides, rest_of(recipe), names)
    return [reference for reference in references if reference is not None]


def check_choices(recipe: Recipe) -> None:
    """Refuse a value that an option of a few values does not have.

    Raises:
        UsageError: There is one.
    """
    for option, value, choices in (
        ("dtype", recipe.dtype or "float32", tuple(DTYPES)),
        ("on_mismatch", recipe.on_mismatch, ON_MISMATCH),
    ):
        if value not in choices:
            raise UsageError(
                f"must be one of {', '.join(choices)}, not '{value}'", option=option, hint=suggestion(value, choices)
            )


def check_weights(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse a weight of an expert that is none of these.

    Raises:
        UsageError: There is one.
    """
    if isinstance(recipe.weights, str):
        if recipe.weights != BALANCED:
            hint = f"give a weight by expert, or {BALANCED}"
            raise UsageError(
                f"must be {BALANCED} where it is a word, not '{recipe.weights}'", option="weights", hint=hint
            )
        return
    for name in recipe.weights:
        if name not in names:
            hint = suggestion(name, names, f"the experts are: {', '.join(names)}")
            raise UsageError(f"names '{name}', which is no expert", option="weights", hint=hint)


def rest_of(recipe: Recipe) -> str | None:
    """The method for what methods for linear layers leave.

    Raises:
        UsageError: It is one for linear layers itself.
    """
    if recipe.rest not in (None, BASE) and registry.load(recipe.rest).matrices:
        raise UsageError(
            f"must be a method for all tensors or {BASE}, and '{recipe.rest}' is for linear layers only", option="rest",
            hint="average, task-arithmetic and base are the usual ones",
        )  # fmt: skip
    return recipe.rest


def refuse_beside_layers(recipe: Recipe) -> None:
    """Refuse what takes a model whose layers are the base's.

    Raises:
        UsageError: It is asked for, and so are other layers.
    """
    if not recipe.layers:
        return
    asked = {
        "as_lora": recipe.as_lora is not None, "disentangle": bool(recipe.disentangle),
        "weights": recipe.weights == BALANCED,
    }  # fmt: skip
    for option, is_asked in asked.items():
        if is_asked:
            raise UsageError("needs the base's own layers", option=option, hint=f"leave out {named('layers')}")
    method = _method(recipe.method)
    if (method is not None and method.on_data) or recipe.unlabelled or recipe.coefficients:
        raise UsageError(
            "a search on data needs the base's own layers", option="layers", hint="stack the layers of its result"
        )


def refuse_many_experts(recipe: Recipe, overrides: Sequence[Override]) -> None:
    """Refuse more experts than a method takes; of layers, any number may be named.

    Raises:
        UsageError: There are.
    """
    experts = len(recipe.experts)
    for name in [recipe.method, *(override.method for override in overrides if override.method)]:
        method = _method(name)
        most = None if method is None else method.most_experts
        if most is not None and experts > most and not recipe.layers:
            many = "one expert" if most == 1 else f"{most} experts at most"
            raise UsageError(
                f"'{name}' takes {many}, and {experts} are named",
                hint="`modelmerge merge` lists the methods that take any number",
            )


def _method(name: str) -> Method | None:
    """The merge method of that name; None if there is none, which is refused where it is used."""
    return registry.load(name) if name in registry.names() else None
