"""The shell line that repeats a merge, and options as they are typed in it: for manifest and card."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from modelmerge.checkpoint.reference import STAGE
from modelmerge.methods.options import written
from modelmerge.plan.recipe import Recipe

REPLAY = "modelmerge merge --recipe modelmerge.json -o DIR"
THEN = "&&"  # between the commands of a shell line
_ONE_EACH = {"tasks": "task", "templates": "template"}  # settings of several values, by the option for each


def steps_of(command: str) -> list[list[str]]:
    """The words of a shell line, of each of its commands apart."""
    steps: list[list[str]] = [[]]
    for word in shlex.split(command):
        steps = [*steps, []] if word == THEN else [*steps[:-1], [*steps[-1], word]]
    return steps


def flag(option: str) -> str:
    """An option as it is typed, by its Python name."""
    return f"--{_ONE_EACH.get(option, option).replace('_', '-')}"


def settings_of(recipe: Recipe, *names: str) -> dict[str, Any]:
    """Those of a recipe's settings that are not at their defaults."""
    usual = Recipe(method="", base="", experts=())
    return {name: getattr(recipe, name) for name in names if getattr(recipe, name) != getattr(usual, name)}


def command_of(recipe: Recipe, output: str) -> str:
    """The shell line that repeats a merge: modelmerge merge METHOD BASE EXPERT... OPTIONS -o DIR.

    A recipe that says what options cannot is named by its manifest. Stages come first, each into a directory of its
    name: `... -o NAME && modelmerge merge ...`.
    """
    if any(each.tables or each.chat_template or each.whole_experts for each in (recipe, *recipe.stages.values())):
        return shlex.join(["modelmerge", "merge", "--recipe", "modelmerge.json", "-o", output])
    if recipe.stages:
        steps = [(stage, name) for name, stage in recipe.stages.items()]
        steps.append((dataclasses.replace(recipe, stages={}), output))
        return f" {THEN} ".join(command_of(*step) for step in steps)
    models = (str(model).replace(STAGE, "./", 1) for model in (recipe.base, *recipe.experts))
    words = ["modelmerge", "merge", recipe.method, *models]
    names = ("rest", "dtype", "on_mismatch", "vocab", "files_from", "max_shard_size", "seed", "as_lora", "include",
             "exclude")  # fmt: skip
    weights: Any = recipe.weights
    if not isinstance(weights, str):
        weights = [f"{name}={written(weight)}" for name, weight in weights.items()]
    options = [
        *recipe.options.items(),
        ("disentangle", recipe.disentangle),
        ("weight", weights),
        ("at", recipe.at),
        ("layers", recipe.layers),
        *settings_of(recipe, *names).items(),
        *recipe.unlabelled.items(),
    ]
    for name, value in options:
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is not None and each is not False:
                words += [flag(name)] if each is True else [flag(name), str(each)]
    return shlex.join([*words, "-o", output])
