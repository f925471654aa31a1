"""evaluate: merged models by their weights, or by their scores at tasks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reference import parse_all
from modelmerge.errors import UsageError, suggestion
from modelmerge.evaluation import clip, custom, lm, weights
from modelmerge.evaluation.bench import Models, Running
from modelmerge.evaluation.report import Report
from modelmerge.progress import SILENT, Reporter
from modelmerge.verbs.cards import refuse_cardless, write_cards

SUITES: dict[str, Callable[..., Report]] = {
    "clip": clip.evaluate, "custom": custom.evaluate, "lm": lm.evaluate, "weights": weights.evaluate,
}  # fmt: skip
_RUNNING = tuple(field.name for field in dataclasses.fields(Running) if field.name != "progress")
_OF_WEIGHTS = ("base", "experts", "device")  # what of that bears on weights


def evaluate(
    models: Models, *, suite: str = "custom", update_card: bool = False, progress: Reporter = SILENT, **options: Any
) -> Report:
    """Evaluate models by a suite of `modelmerge eval`; its report.

    Args:
        models: References of the models, `[NAME=]REF` each, or a mapping of name to reference.
        suite: `custom`: by a function, `metric=`; `clip`: images; `lm`: language models; `weights`: no data.
        update_card: Write the scores into each model's card, with a picture where matplotlib is installed. The models
            must be local directories. Not of `weights`.
        progress: Receives progress and notes.
        **options: Those that suites share, see `modelmerge.evaluation.bench.Running`, and the suite's own: see
            `evaluate` of `modelmerge.evaluation.custom`, `.clip`, `.lm` or `.weights`.

    Returns:
        Plain data, see `modelmerge.evaluation.report`. Of suites of scores: `tasks`; `models`, each with `role` (base,
        expert or model), `scores` by task, `average` and `normalised`; `comparison` and `gate` where asked for; the
        seed, versions, and sha256 of all models.

    Raises:
        UsageError: There is no such suite, or the suite has no such option.
        ModelMergeError: See `modelmerge.errors` for other kinds.
    """
    if suite not in SUITES:
        hint = suggestion(suite, SUITES, f"there are: {', '.join(SUITES)}")
        raise UsageError(f"there is no suite '{suite}'", hint=hint)
    common = _OF_WEIGHTS if suite == "weights" else _RUNNING
    _check_options(suite, options, common)
    running = Running(progress=progress, **{name: options.pop(name) for name in common if name in options})
    if not update_card:
        return SUITES[suite](models, running, **options)
    if suite == "weights":
        raise UsageError("is of scores, and weights have none", option="update_card")
    ours = parse_all(as_references(models), "model")
    refuse_cardless(ours)
    report = SUITES[suite](models, running, **options)
    write_cards(ours, report, progress)
    return report


def _check_options(suite: str, options: Mapping[str, Any], common: tuple[str, ...]) -> None:
    """Refuse options that the suite does not have, and the lack of one that it needs.

    Raises:
        UsageError: That.
    """
    parameters = inspect.signature(SUITES[suite]).parameters.values()
    specific = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    names = [*(parameter.name for parameter in specific), *common]
    odd = next((name for name in options if name not in names), None)
    if odd is not None:
        hint = suggestion(odd, names, f"it has: {', '.join(names)}")
        raise UsageError(f"suite '{suite}' has no option '{odd}'", hint=hint)
    lacking = next((p.name for p in specific if p.default is p.empty and p.name not in options), None)
    if lacking is not None:
        raise UsageError(f"suite '{suite}' needs the option '{lacking}'")
