"""evaluate, suite lm: language models at the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmerge.engine.parallel import find_device
from modelmerge.evaluation import lm
from modelmerge.evaluation.bench import Bench, base_name, merged_from, normalise_by_published, run
from modelmerge.progress import SILENT, Reporter


def evaluate_lm(
    models: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    metrics: Sequence[str] | Mapping[str, str] = (),
    held_out: bool = False,
    base: str | Path | None = None,
    experts: Sequence[str | Path] | Mapping[str, str | Path] = (),
    seed: int | None = None,
    cache: bool = True,
    compare: str | Path | None = None,
    fail_under: Sequence[str] = (),
    update_card: bool = False,
    device: str = "auto",
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """The scores of language models at tasks of lm-evaluation-harness; the words are the harness's where it has them.

    Args:
        models: References of the models to evaluate: directories with config and tokenizer, or PEFT adapters of `base`.
        tasks: Names of tasks, groups or tags, with `*` and `?`: the harness's, those of `include_path`, and
            `flan_t5_glue` with its eight tasks, as the literature scores merges of Flan-T5. Default: all of
            `include_path`.
        include_path: A directory of tasks as YAML files. What they name as functions is Python code that will run.
        limit: So many items of each task, from the first on; below 1, this share of them.
        num_fewshot: Solved examples in front of each item.
        batch_size: Items at a time, or `auto`: as many as the GPU holds.
        dtype: `auto`: as the weights are stored; or the name of a torch dtype.
        apply_chat_template: Put items as a conversation, in the model's own format.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.
        metrics: What the score is: `NAME` or `NAME,FILTER` for all tasks, `TASK=NAME` for one, or a mapping. Default:
            the first metric of the task where more is better.
        held_out: Look at the validation split of a task that is reported on its test split, and at the training split
            of one that is reported on its validation split: to choose by.
        base: The base, to be evaluated too; adapters need it.
        experts: The experts, to be evaluated too; a task's scores are normalised by the expert of its name, and those
            of `flan_t5_glue_cola` and the like by the expert called `cola`.
        seed: In the place of the harness's own seeds.
        cache: As for `evaluate_custom`, like all that follows.
        compare: An earlier report.
        fail_under: Least values.
        update_card: Write the scores into each model's card.
        device: Where the model runs.
        reporter: Is told the progress.

    Returns:
        As for `evaluate_custom`; each score has `figures`, those of all the task's metrics by the harness's names.
        Where scores at `flan_t5_glue` are published for the base's experts, and these were not measured, there are
        `published` and each model's `normalised_by_published`.

    Raises:
        ModelMergeError: lm-evaluation-harness is not installed (`pip install 'modelmerge[lm]'`); there is no such
            task, or it has no items; a model is no language model; see `modelmerge.errors` for other kinds.
    """
    settings = lm.Settings(
        include_path=None if include_path is None else Path(include_path).expanduser().resolve(), limit=limit,
        num_fewshot=num_fewshot, batch_size=str(batch_size), dtype=dtype, apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=confirm_run_unsafe_code, metrics=lm.parse_metrics(metrics), seed=seed,
        held_out=held_out,
    )  # fmt: skip
    lm.check_settings(settings)
    harness = lm.Harness(lm.load_tasks(tasks, settings, reporter), settings, str(find_device(device)), reporter)
    bench = Bench(
        suite="lm", about=harness.about(), tasks=tuple(harness.tasks),
        depends=lambda task: harness.depends(str(task)),
        measure=lambda model, task: {str(task): harness.measure(model, str(task))},
        base_counts=True, items=lambda task: harness.items(str(task)), experts=harness.experts(),
        versions=lm.versions(),
    )  # fmt: skip
    report = run(
        bench, models, base, experts, seed=seed, cache=cache, compare=compare, fail_under=fail_under,
        update_card=update_card, device=device, reporter=reporter,
    )  # fmt: skip
    if not held_out:
        _normalise_by_published(report, harness.experts())
    return report


def _normalise_by_published(report: dict[str, Any], experts: Mapping[str, str]) -> None:
    """Where no expert was measured: scores at our own tasks by those published for the experts of the same base.

    Of a merge of adapters, by its experts' names, those of adapters.
    """
    known = lm.published() if experts else {}
    for row in (row for row in report["models"] if row["role"] == "model"):
        base = base_name(report, row)
        scores = {task: row["scores"][task] for task in experts}
        if base not in known or any(told["normalised"] is not None for told in scores.values()):
            continue
        paths = merged_from(row).get("paths", ())
        adapters = any("lora" in path.lower() for path in paths) or "experts" not in known[base]
        kind = "lora-experts" if adapters else "experts"
        shares = {
            task: told["score"] / known[base][kind][experts[task]] if told["score"] is not None else None
            for task, told in scores.items()
        }
        normalise_by_published(
            report, row, shares, of=f"scores published for the {kind}", known={"model": base, **known[base]}
        )
