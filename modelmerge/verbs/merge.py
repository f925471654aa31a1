"""merge: experts of one base into one checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelmerge.checkpoint.companions import BASE
from modelmerge.checkpoint.opening import as_references
from modelmerge.checkpoint.reference import Named
from modelmerge.checkpoint.scratch import scratches
from modelmerge.checkpoint.work import job_at, work_folder
from modelmerge.engine.merge import run
from modelmerge.engine.parallel import threads
from modelmerge.errors import UsageError, named
from modelmerge.plan.downloads import fetch
from modelmerge.plan.recipe import Dtype, OnMismatch, Recipe, Weights
from modelmerge.progress import SILENT, Reporter
from modelmerge.verbs import adapted, coefficients, parts, stages
from modelmerge.verbs.auto import refuse_within
from modelmerge.verbs.driver import drive
from modelmerge.verbs.output import complete, output_of
from modelmerge.verbs.prepare import (
    Prepared,
    digest_of,
    prepare,
    refuse_unknown,
    threads_of_leftovers,
    with_coefficients,
)
from modelmerge.verbs.recipes import prepare_file
from modelmerge.verbs.shared import FILES, on_local_card, plan_of_units, refuse_unshared, share_out
from modelmerge.verbs.tensors import State, merge_tensors, states_of

if TYPE_CHECKING:
    from modelmerge.hub.upload import Uploader


def merge(
    base: str | Path | State,
    experts: Sequence[str | Path] | Mapping[str, str | Path] | Mapping[str, State],
    out: str | Path | None = None,
    *,
    method: str,
    weights: Weights | None = None,
    disentangle: str | Sequence[str] = (),
    at: Sequence[str] = (),
    layers: Sequence[str] = (),
    rest: str | None = None,
    dtype: Dtype | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_mismatch: OnMismatch = "error",
    vocab: str | None = None,
    files_from: str = BASE,
    max_shard_size: str | None = None,
    seed: int = 0,
    as_lora: int | float | None = None,
    unlabelled: Mapping[str, Any] | None = None,
    device: str = "auto",
    stream: bool = False,
    force: bool = False,
    resume: bool = False,
    cluster: str | None = None,
    part: str | None = None,
    finish: Sequence[str | Path] = (),
    within: float | None = None,
    dry_run: bool = False,
    progress: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Merge `experts` onto `base` into the directory `out`; the manifest that was written there.

    In a notebook, `merge(base_tensors, {"math": tensors}, method="ties")` merges tensors that are in memory and returns
    the merged ones, with the bits that files would have.

    Args:
        base: Reference of the base, or a mapping of its tensors by name.
        experts: References of the experts, `[NAME=]REF` each, or a mapping of name to reference (to tensors, where the
            base is tensors).
        out: Where the merged checkpoint shall be; None for tensors in memory.
        method: A merge method's name, or `auto`; `options` are the method's own, by their Python names.
        weights: Weight of each expert by name; 1 where none is given. "balanced": an expert that went more than 1.5
            times as far from the base as the one in the middle weighs less by how many times.
        disentangle: Transforms of the task vectors before they are merged, in their order, `NAME [OPTION=V ...]` each,
            as in "awd alpha=0.2".
        at: Overrides, `GLOB: [METHOD] [OPTION=V[,V...]] [EXPERT.OPTION=V[,V...]]` each: another method or other values
            for tensors of such names. The first that matches a tensor decides.
        layers: The layers of the output, in order, where they are not the base's: `NAME:FIRST-LAST` (LAST is not part
            of it) takes one model's as they are, NAME being base or an expert's; several in one text are merged by the
            method from these alone, and `FIRST-LAST` from all. What comes before the layers is made as the first, what
            comes after them as the last of these.
        rest: What becomes of the tensors that a method for linear layers leaves: base, average or task-arithmetic;
            the method's own choice if None.
        dtype: float32, float16 or bfloat16 to store floating tensors in; the base's own if None.
        include: Globs of the tensors to merge; all if empty.
        exclude: Globs of the tensors to copy from the base.
        on_mismatch: What becomes of tensors whose shapes differ: error; copy: the base's; common-rows: of embeddings
            and heads, the rows that all have are merged, by token where tokenizers can be read, and the base's others
            kept.
        vocab: Whose tokens embeddings and heads have: base, an expert's name, or union, which is the base's and after
            them those that only experts have. Rows go by token then. Rows go by their number if None, and tokenizers
            that number their tokens differently are an error.
        files_from: Name of the expert whose tokenizer, chat template and generation config go with the output; base:
            the base's.
        max_shard_size: Largest output file, like 200MB; None: 5GB, and one file for a base that is one.
        seed: Seed of methods that draw at random.
        as_lora: Write a PEFT adapter instead of a checkpoint, of this rank or, below 1, so large that each matrix keeps
            this share of its squared norm.
        unlabelled: Unlabelled data, on which a coefficient for each expert and tensor is found before `method` merges;
            the search's options can stand here too: `granularity`, `init`, `steps`, `lr`, `batch_size` (of
            `adamerging` they are the method's). For CLIP models what `evaluate` takes: `tasks`, `data`, `classes`,
            `templates`, `config`, `split`, `image_column`, `label_column`, `heads`, `limit`; each expert goes with the
            task of its name. For any other classifier `script`: a function, or `FILE:FUNCTION`, that takes an expert
            (`modelmerge.evaluation.custom.Model`: a mapping of tensor names to tensors, with `name`, `path`,
            `base_path` and `device`) and returns
            `(module, inputs)`. The module gives logits [N, C] or has them as `logits` in what it returns; the merged
            tensors are put into it where its state dict has their names, which may be behind one prefix, and the rest
            of it, such as a head of its own, stays. The inputs are a tensor [N, ...], a tuple or a mapping of such, or
            batches that can be iterated over again and again, as a list of them or a DataLoader gives them.
        device: cpu, cuda, cuda:N or auto; or several, `cuda:0,cuda:1` or `cuda:all`, with a process on each.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        cluster: files: share the work with every process that is called like this one, here or wherever the same
            files are; each returns when the output is complete. MODELMERGE_LEASE is after how many seconds without a
            sign of life others take over what a process was at, 30 by default. ray, or ray=ADDRESS: share it among
            workers of that cluster, of the one at RAY_ADDRESS, or of one on this machine.
        part: I/N: write part I of N into `out`, which takes nothing of the others: some of the weight files, as they
            will be in the whole, under names that no program loads. What is measured over the model is measured by
            each part. Every machine deals out the files alike.
        finish: The directories of all parts: copy them into one output at `out`. Nothing is merged then, and the parts
            stay. The models must be the same, wherever they lie, and so must the options, the versions and the number
            of threads.
        within: Minutes that the method may take which `auto` chooses, on this device.
        dry_run: Write nothing, and return the plan: tensors and why, bytes, peak memory.
        progress: Hears of the progress.
        **options: The method's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    refuse_unknown(merge, method, options)
    refuse_within(method, within, {"cluster": cluster, "part": part, "finish": finish})
    data, script = coefficients.to_recipe(unlabelled or {})

    def make(base: str, experts: Sequence[str | Named], place: Path) -> dict[str, Any]:
        recipe = Recipe(
            method=method, base=base, experts=tuple(experts), options=options, weights=weights or {},
            disentangle=(disentangle,) if isinstance(disentangle, str) else tuple(disentangle), at=tuple(at),
            layers=tuple(layers), rest=rest, dtype=dtype, include=tuple(include), exclude=tuple(exclude),
            on_mismatch=on_mismatch, vocab=vocab, files_from=files_from, max_shard_size=max_shard_size, seed=seed,
            as_lora=as_lora, unlabelled=data,
        )  # fmt: skip
        recipe = parts.as_measured(recipe, finish)
        prepared = prepare(recipe, device=device, stream=stream, script=script, look=not dry_run, within=within)
        if dry_run:
            with contextlib.closing(prepared):
                return describe(prepared, cluster=cluster, part=part, finish=finish)
        return execute(
            prepared, place, force=force, resume=resume, cluster=cluster, part=part, finish=finish, progress=progress
        )

    if (states := states_of(base, experts)) is not None:
        no_place = {"out": out, "as_lora": as_lora, "part": part, "finish": finish or None}
        if names := [named(name) for name, value in no_place.items() if value is not None]:
            raise UsageError("tensors in memory are merged in memory", hint=f"leave out {' and '.join(names)}")
        return merge_tensors(*states, make)
    if out is None and not dry_run:
        raise UsageError("is missing: where the merged checkpoint shall be", option="out")
    return make(str(base), as_references(experts), Path(out or ""))  # type: ignore[arg-type]


def replay(
    file: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    stream: bool = False,
    force: bool = False,
    resume: bool = False,
    cluster: str | None = None,
    part: str | None = None,
    finish: Sequence[str | Path] = (),
    script: Callable[..., Any] | str | None = None,
    allow_different_bits: bool = False,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Repeat the merge that a manifest records, or make the one that a mergekit YAML describes; the new manifest.

    Args:
        file: The manifest, its directory, or the YAML.
        out: Where the merged checkpoint shall be.
        device: As for `merge`.
        stream: As for `merge`.
        force: As for `merge`.
        resume: As for `merge`.
        cluster: As for `merge`.
        part: As for `merge`.
        finish: As for `merge`.
        script: The script that the recipe names, or another, to find the coefficients anew. A script that only the
            recipe names is never run.
        allow_different_bits: Accept a recipe without digests, and results that are not those it records.
        progress: Hears of the progress.

    Raises:
        RecipeError: The file cannot be read or asks for what there is not, an input or the script is no longer what it
            was, or the result is not.
        ModelMergeError: As for `merge`.
    """
    data, function = coefficients.to_recipe({"script": script} if script is not None else {})

    def change(recipe: Recipe) -> Recipe:
        if data and not recipe.unlabelled:
            raise UsageError("has no effect: the recipe has no unlabelled data", option="script")
        settings = {name: value for name, value in recipe.unlabelled.items() if name not in coefficients.IMAGES}
        return dataclasses.replace(recipe, unlabelled=settings | data, coefficients={}) if data else recipe

    prepared = prepare_file(
        Path(file), device=device, stream=stream, change=change, script=function,
        allow_different_bits=allow_different_bits,
    )  # fmt: skip
    return execute(
        prepared, Path(out), force=force, resume=resume, cluster=cluster, part=part, finish=finish, progress=progress
    )


def describe(
    prepared: Prepared, *, cluster: str | None = None, part: str | None = None, finish: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """The plan of a prepared merge, of a part of it, or of putting parts together.

    Raises:
        ModelMergeError: As for `merge`.
    """
    _refuse_several(cluster, part, finish)
    if part is None and not finish:
        return {**prepared.describe(), **plan_of_units(prepared, cluster)}
    return parts.describe(prepared, part, [Path(place).expanduser() for place in finish])


def _refuse_several(cluster: str | None, part: str | None, finish: Sequence[str | Path]) -> None:
    ways = {"cluster": cluster, "part": part, "finish": finish or None}
    first, *more = [name for name, value in ways.items() if value is not None] or [""]
    if more:
        raise UsageError(f"{named(first)} and {named(more[0])} exclude each other", hint="give one of them")


def execute(
    prepared: Prepared,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
    cluster: str | None = None,
    part: str | None = None,
    finish: Sequence[str | Path] = (),
    ready: Callable[[], object] | None = None,
    uploader: Uploader | None = None,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Run a prepared merge into `out`, with others if it is a `cluster`'s; the manifest. The inputs are closed then.

    Or make a `part` of it, or put parts together.

    `ready` is called once it is known that the work can begin. `uploader` is given the weight files as they are
    finished, and closed before they are moved.

    Raises:
        ModelMergeError: As for `merge`.
    """
    try:
        _refuse_several(cluster, part, finish)
        several = len(prepared.devices) > 1
        if several and (part is not None or finish):
            raise UsageError("a part is made on one device", option="device", hint="name one of them")
        if cluster is not None or several:
            refuse_unshared(cluster, prepared)
        if several or cluster not in (None, FILES):
            return drive(prepared, cluster, out, force=force, ready=ready, uploader=uploader, progress=progress)
        if cluster is not None:
            prepared = dataclasses.replace(prepared, job=on_local_card(prepared.job, prepared.device, progress))
        share = parts.share_of(part, prepared) if part is not None else None
        if finish:
            places = [Path(place).expanduser() for place in finish]
            return parts.put_together(prepared, places, out, force=force, resume=resume, ready=ready, progress=progress)
        if prepared.staged is not None:
            return stages.run(
                prepared, out, execute, force=force, resume=resume, cluster=cluster, ready=ready, uploader=uploader,
                progress=progress,
            )  # fmt: skip
        size = adapted.size_of(prepared.recipe)
        beside: Literal["all", "cards"] = "all" if size is None else "cards"
        with contextlib.ExitStack() as stack:
            recorded = prepared.recorded
            if recorded is not None and recorded.threads is not None:
                stack.enter_context(threads(recorded.threads))
            if share is not None:
                return parts.make(prepared, share, out, force=force, resume=resume, ready=ready, progress=progress)
            script = recorded.script if recorded is not None else {}
            data = prepared.data.read(prepared.recipe.seed, script) if prepared.data is not None else None
            take_part = functools.partial(
                share_out, prepared, data, out, force=force, ready=ready, uploader=uploader, progress=progress
            )
            if cluster is not None:
                return take_part()
            if resume and (recorded is None or recorded.threads is None):
                stack.enter_context(threads_of_leftovers(out, digest_of(prepared, data)))
            digest = digest_of(prepared, data)
            if resume and (job_at(out) or {}).get("digest") == digest:
                progress.note(f"takes up what is finished in {work_folder(out)}")
                return take_part()
            output = stack.enter_context(output_of(
                prepared.job.plan, out, digest, force=force, resume=resume, ready=ready, progress=progress,
                hand_on=None if uploader is None else uploader.add,
            ))  # fmt: skip
            if output.complete is not None:
                return output.complete
            if data is not None:
                fetch(prepared.job.plan, progress, beside=beside, stream=prepared.stream)
                with scratches(out) as scratch:
                    found = coefficients.find(prepared.job, data, digest, scratch, resume=resume, progress=progress)
                prepared = with_coefficients(prepared, data, found)
            job = prepared.job
            # Shards of other coefficients are not taken up.
            staging = output.stage(
                job.plan.layout if size is None else None,
                digest=digest_of(prepared, data),
                resume=size is None,
                companions=size is None,
            )
            fetch(job.plan, progress, beside=beside, stream=prepared.stream)
            small = None if size is None else adapted.run(job, prepared.recipe, size, staging, progress)
            findings = run(job, staging, progress) if small is None else small.findings
            digests = [model.digests() for model in job.plan.models]  # base first, then the experts in order
            manifest = complete(prepared, out, staging, findings, small, output.seconds, digest, digests)
            for note in manifest["notes"]:
                progress.note(note)
            if uploader is not None:
                uploader.close()
            return output.publish(manifest)
    finally:
        prepared.close()
