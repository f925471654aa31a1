"""From a file that says what to merge to a merge that is ready to run: a manifest, or a mergekit YAML."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from modelmerge.errors import RecipeError, UsageError
from modelmerge.evaluation.custom import Script, label_of
from modelmerge.plan import format_1, mergekit
from modelmerge.plan.mergekit import Translated
from modelmerge.plan.recipe import Recipe, read_recipe
from modelmerge.record.recorded import Recorded, read_recorded, refuse_unrecorded
from modelmerge.verbs.prepare import Prepared, prepare
from modelmerge.verbs.stages import staged


def prepare_file(
    file: Path,
    *,
    device: str = "auto",
    stream: bool = False,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    changed: Collection[str] = (),
    script: Script | str | None = None,
    allow_different_bits: bool = False,
) -> Prepared:
    """Plan the merge that a manifest records or a mergekit YAML describes, `change`d; nothing is written.

    `changed` names the options that are, an expert's weight as `NAME.weight`: a YAML then varies them no more. `script`
    is as for `prepare`. What is written must be what the manifest records, unless the change makes it another merge.
    Where there are stages, the change is to the last merge alone; device and stream are for all.

    Raises:
        ModelMergeError: As for `replay`.
    """
    if file.suffix in (".yaml", ".yml"):
        translated = mergekit.read(file)
        last = dataclasses.replace(translated.without(changed), stages={})
        make = functools.partial(_prepare_translated, file, device=device, stream=stream)
        makes = {name: functools.partial(make, stage) for name, stage in translated.stages.items()}
        return staged(makes, functools.partial(make, last, change=change))
    recipe, digests, old = read_recipe(file)
    later = functools.partial(format_1.overrides_of, old) if old is not None else None
    wanted = change(recipe)
    recorded = read_recorded(file, digests, repeated=_is_same(wanted, recipe), lenient=allow_different_bits)
    if _script_in(wanted) != _script_in(recipe):
        recorded = dataclasses.replace(recorded, script={})  # those of another one
    refuse_unrecorded(recorded)

    def prepare_recipe(recipe: Recipe, recorded: Recorded, places: Mapping[str, Path]) -> Prepared:
        return prepare(
            recipe, device=device, recorded=recorded, stream=stream, script=script, overrides=later, stages=places
        )

    inputs = dataclasses.replace(recorded, files=None)
    makes = {name: functools.partial(prepare_recipe, stage, inputs) for name, stage in wanted.stages.items()}
    return staged(makes, functools.partial(prepare_recipe, wanted, recorded))


def _prepare_translated(
    file: Path,
    translated: Translated,
    places: Mapping[str, Path],
    *,
    device: str,
    stream: bool,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> Prepared:
    late = translated.overrides

    def prepare_recipe(recipe: Recipe, translated: Translated) -> Prepared:
        try:
            return prepare(
                recipe, device=device, remarks=translated.remarks, stream=stream, overrides=late, stages=places
            )
        except UsageError as error:
            if error.option != "layers":
                raise
            # The file says it in slices.
            hint = "; ".join(filter(None, (error.hint_template, f"base is {recipe.base}")))
            raise RecipeError(f"{file}: in its slices, here {error.template}", hint=hint) from error

    prepared = prepare_recipe(change(translated.recipe), translated)
    again = translated.stored_as_mergekit_does(prepared.job.plan)
    if again is translated:
        return prepared
    prepared.close()
    return prepare_recipe(change(again.recipe), again)


def _script_in(recipe: Recipe) -> str:
    return label_of(str(recipe.unlabelled.get("script", "")))


def _is_same(wanted: Recipe, recipe: Recipe) -> bool:
    """Whether both ask for the same weights; a script is the same wherever it lies, its digest is compared apart."""

    def content(each: Recipe) -> Recipe:
        script = {"script": _script_in(each)} if "script" in each.unlabelled else {}
        return dataclasses.replace(each, unlabelled={**each.unlabelled, **script}, coefficients={})

    return content(wanted) == content(recipe)
