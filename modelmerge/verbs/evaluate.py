"""evaluate: merged models by their weights, or by their scores at tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modelmerge.checkpoint.opening import as_references, open_references
from modelmerge.checkpoint.reader import MANIFEST, Checkpoint
from modelmerge.checkpoint.reference import Reference, parse, parse_all, parse_experts
from modelmerge.engine.parallel import prepare_process, source_of
from modelmerge.errors import UsageError
from modelmerge.evaluation import custom, weights
from modelmerge.evaluation.bench import Bench, run
from modelmerge.evaluation.model import Model
from modelmerge.evaluation.scores import Score
from modelmerge.plan.downloads import fetch
from modelmerge.plan.tensors import ON_MISMATCH, make_plan
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.manifest import record, remarks, stamp
from modelmerge.verbs.evaluate_clip import evaluate_clip
from modelmerge.verbs.evaluate_lm import evaluate_lm


def evaluate(
    models: Sequence[str | Path] | Mapping[str, str | Path], *, suite: str = "custom", **options: Any
) -> dict[str, Any]:
    """Evaluate models by a suite of `modelmerge eval`; its report.

    Args:
        models: References of the models, `[NAME=]REF` each, or a mapping of name to reference.
        suite: `custom`: by a function, `metric=`, see `evaluate_custom`; `clip`: images, see `evaluate_clip`;
            `lm`: language models, see `evaluate_lm`; `weights`: see `evaluate_weights`.
        **options: The suite's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    if suite not in SUITES:
        near = get_close_matches(suite, SUITES, n=1)
        raise UsageError(
            f"there is no suite '{suite}'",
            hint=f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(SUITES)}",
        )
    return SUITES[suite](models, **options)


def evaluate_weights(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base: str | Path | None = None,
    experts: Sequence[str | Path] | Mapping[str, str | Path] = (),
    per_layer: bool = False,
    decompose: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_mismatch: str = "error",
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """How the weights of merged models stand to those of the experts, in one pass over the tensors.

    Args:
        models: References of the models to look at, `[NAME=]REF` each, or a mapping of name to reference.
        base: Reference of the base. Where it or the experts are not given, a merge's own `modelmerge.json` names them.
        experts: References of the experts.
        per_layer: Tell the figures of each tensor too, not only of the model and of each type of layer.
        decompose: Also find what takes decompositions of matrices: subspace alignment, singular task interference, and
            where APGD would start and arrive.
        include: Globs of the tensors to look at; all if empty.
        exclude: Globs of the tensors to leave out.
        on_mismatch: What becomes of tensors whose shapes differ: error, copy (they are left out), common-rows.
        device: cpu, cuda, cuda:N or auto.
        reporter: Is told the progress.

    Returns:
        The figures as plain data: `model`, `layer_types`, `tensors`, with `experts` and `models` in each; see
        `modelmerge.evaluation.weights` and the papers named in `modelmerge.evaluation.interference`.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    prepare_process()
    if on_mismatch not in ON_MISMATCH:
        raise UsageError(f"--on-mismatch must be one of {', '.join(ON_MISMATCH)}, not '{on_mismatch}'")
    looked_at = parse_all(as_references(models), "model")
    if not looked_at:
        raise UsageError("no model is named", hint="give at least one MODEL")
    base, told = _origins(looked_at, base, as_references(experts))
    others = parse_experts(told)
    taken = {expert.name for expert in others}
    # Readers tell models apart by their names; an expert may be looked at as a model too.
    apart = [replace(m, name=f"model {m.name}") if m.name in taken else m for m in looked_at]
    origin, opened = open_references(parse(str(base)), [*others, *apart])
    made = make_plan(
        origin, opened, include=include, exclude=exclude, on_mismatch=on_mismatch
    )  # fmt: skip
    try:
        source = source_of(made, device)
        fetch(made, reporter, beside="nothing", stream=False)
        tensors = [tensor for tensor in made.select("merge") if tensor.numel and tensor.twin is None]
        sums = weights.measure(source, len(others), tensors, reporter, decompose=decompose)
        names, columns = [expert.name for expert in others], [model.name for model in looked_at]
        report = weights.describe(sums, names, columns, per_layer=per_layer)
        inputs = [record(model, model.digests()) for model in made.models]
        merged = list(zip(columns, inputs[1 + len(others) :], opened[len(others) :], strict=True))
        return {
            "suite": "weights",
            **stamp(source.device),
            "base": inputs[0],
            "experts": inputs[1 : 1 + len(others)],
            "models": [
                {**entry, "name": name, "measured_rounding": _measured_rounding(model)}
                for name, entry, model in merged
            ],
            "remark": weights.REMARK,
            "notes": remarks(made),
            "left_out": {t.name: t.reason for t in made.tensors.values() if t.action == "copy"},
            **report,
        }  # fmt: skip
    finally:
        made.close()


def _origins(
    models: Sequence[Reference], base: str | Path | None, experts: tuple[str, ...]
) -> tuple[str | Path, tuple[str, ...]]:
    """The base and the experts, from the models' manifests where they are not named.

    Raises:
        UsageError: No manifest names them, or several name different ones.
    """
    if base is not None and experts:
        return base, experts
    found = {model.name: _inputs(model) for model in models}
    known = [inputs for inputs in found.values() if inputs is not None]
    silent = next((name for name, inputs in found.items() if inputs is None), None)
    if silent is not None and not known:
        lacking = " and ".join([*(["--base"] if base is None else []), *(["--expert"] if not experts else [])])
        raise UsageError(
            f"{lacking} must be named: beside '{silent}' lies no {MANIFEST} of a merge that would tell",
            hint="--base REF --expert NAME=REF --expert NAME=REF",
        )
    if any(inputs != known[0] for inputs in known):
        raise UsageError(
            "the models are merges of different experts", hint="name those to compare with: --base REF --expert REF"
        )
    return base if base is not None else known[0][0], experts or known[0][1]


def _inputs(model: Reference) -> tuple[str, tuple[str, ...]] | None:
    """The base and the experts of a merge, as its manifest has them."""
    try:
        inputs = json.loads((model.path / MANIFEST).read_bytes())["inputs"]
        return str(inputs["base"]["path"]), tuple(f"{e['name']}={e['path']}" for e in inputs["experts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured_rounding(model: Checkpoint) -> float | None:
    """What storing lost of the merged task vector, as the merge itself measured it."""
    try:
        assert model.directory is not None
        return json.loads((model.directory / MANIFEST).read_bytes())["rounding"]["relative_error"]
    except (AssertionError, OSError, ValueError, KeyError, TypeError):
        return None


def evaluate_custom(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    metric: custom.Metric | str,
    tasks: Sequence[str] = (),
    base: str | Path | None = None,
    experts: Sequence[str | Path] | Mapping[str, str | Path] = (),
    seed: int = 0,
    cache: bool = True,
    key: str | None = None,
    compare: str | Path | None = None,
    fail_under: Sequence[str] = (),
    update_card: bool = False,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """The scores of models at tasks, by a function that is given each model.

    Args:
        models: References of the models to evaluate, `[NAME=]REF` each, or a mapping of name to reference.
        metric: A function, or `FILE:FUNCTION`. It is given a model (`modelmerge.evaluation.custom.Model`: a mapping of
            tensor names to tensors that are read when asked for, with `path`, `name` and `device`), and returns a
            score, or a mapping of tasks to scores. A score is a number, more is better, or a mapping: `score` with
            `count` and `stderr`; `correct` and `count`; or `items`, the score of each item, with `ids` if there are.
        tasks: Call the function for each of these, as `metric(model, task)`; each is kept as soon as it is done.
        base: The base, to be evaluated too; adapters and task vectors need it.
        experts: The experts, to be evaluated too; a task's scores are normalised by the expert of its name.
        seed: Python's, numpy's and torch's generators are seeded with it before each call.
        cache: Do not measure again what was measured before.
        key: With a function that is no `FILE:FUNCTION`: what the cache knows it by; without it, nothing is cached.
        compare: An earlier report, as a file: differences to it, with their significance.
        fail_under: Least values, `avg=0.70`, `normalized=0.95` or `TASK=0.8`; whether they are met is in `gate`.
        update_card: Write the scores into each model's card; they must be directories here.
        device: What the function is told to compute on: cpu, cuda, cuda:N or auto.
        reporter: Is told the progress.

    Returns:
        `tasks`; `models`, each with `role` (base, expert or model), `scores` by task, `average` and `normalised`;
        `comparison` and `gate` where asked for; the seed, versions, and sha256 of all models.

    Raises:
        ModelMergeError: The function raises, or returns what is no score; see `modelmerge.errors` for other kinds.
    """
    script = metric if callable(metric) else custom.load_script(metric)
    if not isinstance(script, custom.Script):
        script = custom.Script(script, getattr(script, "__name__", "metric"), key or "")
    custom.check_metric(script.metric, script.label, by_task=bool(tasks))

    def measure(model: Model, task: str | None) -> dict[str, Score]:
        return custom.measure(script.metric, script.label, model, task, seed)

    bench = Bench(
        suite="custom", about={"metric": {"function": script.label, "sha256": script.digest or None}},
        tasks=tuple(tasks) or (None,), depends=(lambda task: script.digest) if script.digest else None, measure=measure,
    )  # fmt: skip
    return run(
        bench, models, base, experts, seed=seed, cache=cache, compare=compare, fail_under=fail_under,
        update_card=update_card, device=device, reporter=reporter,
    )  # fmt: skip


SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "clip": evaluate_clip, "custom": evaluate_custom, "lm": evaluate_lm, "weights": evaluate_weights,
}  # fmt: skip
