"""extract and disentangle: task vectors as directories of their own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modelmerge.checkpoint.companions import companions, remarks_on_origin
from modelmerge.checkpoint.layout import Entry, Layout, lay_out, lay_out_model, together
from modelmerge.checkpoint.portable import portable
from modelmerge.checkpoint.reader import LEFT, MANIFEST, RIGHT
from modelmerge.checkpoint.staging import Staging
from modelmerge.engine import vectors
from modelmerge.engine.cluster import Shared
from modelmerge.engine.job import Job
from modelmerge.engine.memory import fitting_bytes, scratch_bytes, vector_memory
from modelmerge.engine.transforms import Chain, transform_of
from modelmerge.engine.units import Alone, Crew
from modelmerge.engine.vectors import Measured
from modelmerge.errors import UsageError, named
from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from modelmerge.plan.downloads import with_downloads
from modelmerge.plan.recipe import parse_size
from modelmerge.plan.stacks import entries
from modelmerge.plan.tensors import TensorPlan
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.manifest import listing
from modelmerge.record.vectors import Ranks, low_rank_report, measured_report, numerical_ranks, transform_report
from modelmerge.verbs.shared import FILES, on_local_card
from modelmerge.verbs.vector_output import Frame, Opened, Result, opened_models, run_alone, run_shared

REDUNDANT = "redundant"  # the folder of the vector that disentangling subtracts from all
FULL = "experts"  # the folder of base + disentangled task vector
_RANKED_LAYERS = 3  # so many of the largest matrices have their rank reported; each costs an eigendecomposition
_RANKED_SIDE = 4096  # and none whose smaller side is longer than this


def extract(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    stream: bool = False,
    cluster: str | None = None,
    dry_run: bool = False,
    ready: Callable[[], object] | None = None,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Write each expert's task vector, float32, into a directory of its own under `out`; a report about them.

    Args:
        base: Reference of the base.
        experts: References of the experts.
        out: Gets `NAME/model.safetensors` and `NAME/modelmerge.json` for each expert.
        rank: Write the weights of linear layers as factors of at most this rank.
        energy: Write them as factors that keep this share of the squared norm.
        include: Globs of the tensors to extract; all if empty.
        exclude: Globs of the tensors to leave out.
        max_shard_size: Largest output file, like 200MB; None: 5GB.
        device: cpu, cuda, cuda:N or auto.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        cluster: `files`: share the work with all processes that are given the same, and return once it is complete.
        dry_run: Write nothing, and give the plan instead: tensors and why, bytes, peak memory.
        ready: Called once it is known that the work can begin.
        progress: Shows the progress.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    if cluster not in (None, FILES):
        raise UsageError(f"of task vectors must be {FILES}, not '{cluster}'", option="cluster")
    if cluster is not None and resume:
        hint = f"with {named('cluster')} what is finished is kept anyhow, and the same command takes it up"
        raise UsageError(f"{named('resume')} and {named('cluster')} exclude each other", hint=hint)
    if rank is not None and energy is not None:
        raise UsageError(f"{named('rank')} and {named('energy')} exclude each other", hint="give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"must be at least 1, not {rank}", option="rank")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"must be above 0 and at most 1, not {energy:g}", option="energy")
    frame = Frame(Path(out), include, exclude, max_shard_size, force, resume, stream, ready, progress)
    opened = opened_models(base, experts, include, exclude, device)
    if cluster is not None:
        opened = dataclasses.replace(opened, job=on_local_card(opened.job, device, progress))
    source, linear, names = opened.job.source, opened.linear, opened.names
    ranked = sorted((t for t in linear if min(t.shape) <= _RANKED_SIDE), key=lambda t: -t.numel)[:_RANKED_LAYERS]
    decomposed = linear if energy is not None else ranked

    def write(stage: Callable[..., Staging]) -> Result:
        staging = stage()

        def put(places: vectors.Places, layout: Layout) -> vectors.Errors:
            staging.lay_out(layout)
            return vectors.write(source, opened.tensors, None, places, staging, progress)

        return make(Alone(staging.scratch), put)[1]

    def share(crew: Shared) -> tuple[Layout, Result]:
        def put(places: vectors.Places, layout: Layout) -> vectors.Errors:
            crew.lay_out(layout)
            return vectors.write_shared(source, opened.tensors, places, layout, crew, crew.shard, progress)

        return make(crew, put)

    def make(crew: Crew, put: Callable[[vectors.Places, Layout], vectors.Errors]) -> tuple[Layout, Result]:
        measured = vectors.measure(source, opened.tensors, crew, progress)
        spectra = vectors.spectra(source, decomposed, crew, progress)
        ranks = _ranks(linear, measured, spectra, rank, energy)
        layout = together(_layouts(opened, measured, ranks, parse_size(max_shard_size)))
        errors = put(vectors.Places(tuple(f"{name}/" for name in names), ranks=ranks), layout)
        report = {
            **measured_report(names, opened.tensors, measured),
            "ranks": numerical_ranks(names, [t for t in decomposed if t in ranked], spectra),
            "low_rank": low_rank_report(names, measured, ranks, errors),
        }
        unchanged = {name: opened.unchanged(measured, i) for i, name in enumerate(names)}
        return layout, Result(report, unchanged, ranks)

    with contextlib.closing(opened.job.plan):
        _refuse_names(names)
        if dry_run:
            factored = linear if rank is not None or energy is not None else []
            return _plan(opened, decomposed, factored, stream=stream)
        if cluster is not None:
            return run_shared("extract", opened, frame, [rank, energy], share)
        return run_alone("extract", opened, frame, [rank, energy], write)


def disentangle(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    full_experts: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    ready: Callable[[], object] | None = None,
    progress: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Write each expert's transformed task vector under `out`, and the shared one, if any; what the transform did.

    Args:
        base: Reference of the base.
        experts: References of the experts, two at least.
        out: Gets `NAME/` for each expert, `redundant/` where one vector is subtracted from all, and with
            `full_experts` also `experts/NAME/`.
        method: A transform's name; `options` are its own.
        full_experts: Also write base plus transformed task vector, as checkpoints.
        include: Globs of the tensors to take; all if empty.
        exclude: Globs of the tensors to leave out.
        max_shard_size: Largest output file, like 200MB; None: 5GB.
        device: cpu, cuda, cuda:N or auto.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        dry_run: Write nothing, and give the plan instead: tensors and why, bytes, peak memory.
        ready: Called once it is known that the work can begin.
        progress: Shows the progress.
        **options: The transform's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    spec = registry.load(method, "transform")
    transform = transform_of(method, spec, make_options(spec, method, options))
    frame = Frame(Path(out), include, exclude, max_shard_size, force, resume, stream, ready, progress)
    opened = opened_models(base, experts, include, exclude, device, (transform,))
    job, names = opened.job, opened.names

    def write(stage: Callable[..., Staging]) -> Result:
        staging = stage(companions=full_experts * len(names))  # what there is to write shows once the vectors are there
        crew = Alone(staging.scratch)
        fitted = transform.fit(job, opened.linear, Chain(), crew, progress)
        figures = fitted.figures()
        measured = _changes(figures.entanglement)
        measured |= vectors.measure(job.source, [t for t in opened.tensors if not t.linear], crew, progress)
        everything, size = list(job.plan.tensors.values()), parse_size(max_shard_size)
        layouts = list(_layouts(opened, measured, {}, size))
        if transform.shares_vector:
            shared = {t.name: ("F32", t.shape, 4 * t.numel) for t in opened.linear}
            layouts.append(lay_out(shared, size, folder=f"{REDUNDANT}/"))
        if full_experts:
            stored, parts = entries(everything)
            layouts += [
                lay_out_model(stored, job.plan.base.components, size, parts=parts, folder=f"{FULL}/{name}/")
                for name in names
            ]
        staging.lay_out(together(layouts))
        places = vectors.Places(
            tuple(f"{name}/" for name in names),
            f"{REDUNDANT}/" if transform.shares_vector else None,
            tuple(f"{FULL}/{name}/" for name in names) if full_experts else (),
        )
        tensors = [t for t in everything if t.numel] if full_experts else opened.tensors
        vectors.write(job.source, tensors, fitted, places, staging, progress)
        if full_experts:
            _copy_companions(opened, staging)
        unchanged = {name: opened.unchanged(measured, i) for i, name in enumerate(names)}
        if transform.shares_vector:
            unchanged[REDUNDANT] = [*opened.empty, *(t.name for t in opened.tensors if not t.linear)]
        report = transform_report(names, method, dataclasses.asdict(transform.options), figures)
        return Result(report, unchanged, {})

    with contextlib.closing(job.plan):
        if len(names) < 2:
            raise UsageError("there is nothing to disentangle: only one expert is named", hint="name two or more")
        _refuse_names(names, REDUNDANT, FULL)
        if not opened.linear:
            raise UsageError(
                "no weight of a linear layer is left to disentangle",
                hint=f"check {named('include')} and {named('exclude')}",
            )
        if dry_run:
            plan = _plan(opened, stream=stream)
            plan["plan"]["remarks"] += remarks_on_origin(job.plan.base) if full_experts else []
            return plan
        settings = [method, dataclasses.asdict(transform.options), full_experts]
        return run_alone("disentangle", opened, frame, settings, write, beside="all" if full_experts else "nothing")


def _refuse_names(names: Sequence[str], *others: str) -> None:
    """Refuse experts whose task vectors could not have directories of their names."""
    for name in names:
        if name in (MANIFEST, *others):
            raise UsageError(f"an expert cannot be called '{name}' here", hint=f"rename it: other={name}")


def _plan(
    opened: Opened, ranked: Sequence[TensorPlan] = (), factored: Sequence[TensorPlan] = (), *, stream: bool
) -> dict[str, Any]:
    """What a run would do; `write` is what it writes at most, for unchanged tensors are known only once read."""
    job, plan = opened.job, opened.job.plan
    # Once to write, once more to measure; to find the ranks of some another time.
    times = [*opened.tensors, *([] if job.transforms else [*opened.tensors, *ranked])]

    def read(streamed: bool) -> int:
        once = sum(plan.stored_bytes(tensor, experts=True, streamed=streamed) for tensor in times)
        return once + fitting_bytes(job, streamed=streamed)

    write = 4 * len(opened.names) * sum(t.numel for t in opened.tensors)
    write += 4 * sum(t.numel for t in opened.linear) if any(t.shares_vector for t in job.transforms) else 0
    described = {
        **listing(job.source, ((t, "F32", _action(t, job)) for t in plan.tensors.values())),
        "bytes": {"read": read(False), "write": write, "scratch": scratch_bytes(job)},
        "peak_memory": vector_memory(job, opened.tensors, ranked, factored),
    }
    return {"plan": with_downloads(described, plan, beside="nothing", streamed=read(True) if stream else None)}


def _action(tensor: TensorPlan, job: Job) -> str:
    if tensor.action == "copy":
        return "leave out"
    return "disentangle" if any(transform.takes(tensor) for transform in job.transforms) else "extract"


def _changes(entanglement: Mapping[str, Any]) -> dict[str, Measured]:
    """Which experts changed the tensors of a fit, as it has measured already."""
    return {
        name: Measured(part.before, 0.0, tuple((part.before.diagonal() > 0).long().tolist()), (0,) * len(part.before))
        for name, part in entanglement.items()
    }


def _ranks(
    linear: Iterable[TensorPlan],
    measured: Mapping[str, Measured],
    spectra: Mapping[str, Tensor],
    rank: int | None,
    energy: float | None,
) -> dict[str, tuple[int, ...]]:
    """The rank of each expert's factors, for every tensor that is smaller as factors than whole; 0: unchanged."""
    if rank is None and energy is None:
        return {}
    ranks = {}
    for tensor in linear:
        m, n = tensor.shape
        if rank is not None:
            each = [min(rank, m, n)] * len(measured[tensor.name].nonzero)
        else:
            shares = spectra[tensor.name].square().cumsum(1)
            # The smallest rank whose share reaches the energy, but for rounding of the sums.
            enough = shares >= shares[:, -1:] * (float(energy or 0.0) - 1e-12)
            each = [int(row.float().argmax()) + 1 for row in enough]
        each = [r if entries else 0 for r, entries in zip(each, measured[tensor.name].nonzero, strict=True)]
        if max(each) * (m + n) < m * n:
            ranks[tensor.name] = tuple(each)
    return ranks


def _layouts(opened: Opened, measured: Mapping[str, Measured], ranks: Ranks, size: int | None) -> Iterable[Layout]:
    """The files of each expert's directory: changed tensors, whole or as factors."""
    for i, name in enumerate(opened.names):
        changed: dict[str, Entry] = {}
        for tensor in opened.tensors:
            if not measured[tensor.name].nonzero[i]:
                continue
            if tensor.name in ranks:
                rank = ranks[tensor.name][i]
                for end, shape in ((LEFT, (tensor.shape[0], rank)), (RIGHT, (rank, tensor.shape[1]))):
                    changed[tensor.name + end] = ("F32", shape, 4 * shape[0] * shape[1])
            else:
                changed[tensor.name] = ("F32", tensor.shape, 4 * tensor.numel)
        yield lay_out(changed, size, folder=f"{name}/")


def _copy_companions(opened: Opened, staging: Staging) -> None:
    for place, file in companions(opened.job.plan.base).items():
        content = portable(place, file)
        for name in opened.names:
            staging.write_file(f"{FULL}/{name}/{place}", content)
