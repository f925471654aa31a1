"""extract and disentangle: task vectors as directories of their own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from modelmerge.checkpoint.companions import companions, remarks_on_origin
from modelmerge.checkpoint.layout import Entry, Layout, lay_out, lay_out_model, together
from modelmerge.checkpoint.opening import as_references, open_models
from modelmerge.checkpoint.portable import portable
from modelmerge.checkpoint.reader import LEFT, MANIFEST, RIGHT
from modelmerge.checkpoint.staging import Staging
from modelmerge.devices import current
from modelmerge.engine import vectors
from modelmerge.engine.job import Job
from modelmerge.engine.memory import fitting_bytes, scratch_bytes, vector_memory
from modelmerge.engine.parallel import prepare_process, source_of
from modelmerge.engine.transforms import Chain, Transform, transform_of
from modelmerge.engine.units import Alone
from modelmerge.engine.vectors import Measured
from modelmerge.errors import UsageError, named
from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from modelmerge.plan.downloads import fetch, with_downloads
from modelmerge.plan.recipe import parse_size
from modelmerge.plan.stacks import entries
from modelmerge.plan.tensors import TensorPlan, make_plan
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.fingerprint import fingerprint
from modelmerge.record.manifest import as_file, listing, remarks
from modelmerge.record.vectors import (
    Ranks,
    low_rank_report,
    measured_report,
    numerical_ranks,
    transform_report,
    vector_manifests,
)
from modelmerge.verbs.output import output_of
from modelmerge.verbs.prepare import threads_of_leftovers

REDUNDANT = "redundant"  # the folder of the vector that disentangling subtracts from all
FULL = "experts"  # the folder of base + disentangled task vector
_RANKED_LAYERS = 3  # so many of the largest matrices have their rank reported; each costs an eigendecomposition
_RANKED_SIDE = 4096  # and none whose smaller side is longer than this


@dataclass(frozen=True, slots=True)
class _Opened:
    """Models that are ready to be subtracted."""

    job: Job
    tensors: list[TensorPlan]  # what base and experts share, in the base's order
    empty: list[str]  # shared tensors without elements, which cannot change

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.job.plan.experts)

    @property
    def linear(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors if tensor.linear]

    def unchanged(self, measured: Mapping[str, Measured], expert: int) -> list[str]:
        return [*self.empty, *(t.name for t in self.tensors if not measured[t.name].nonzero[expert])]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What both verbs take besides the models."""

    out: Path
    include: Sequence[str]
    exclude: Sequence[str]
    max_shard_size: str | None
    force: bool
    resume: bool
    stream: bool
    ready: Callable[[], object] | None
    progress: Reporter


@dataclass(frozen=True, slots=True)
class _Result:
    """What a verb has written: its report, by directory the tensors that are left out, the ranks of factors."""

    report: dict[str, Any]
    unchanged: Mapping[str, Sequence[str]]
    ranks: Ranks


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
        dry_run: Write nothing, and give the plan instead: tensors and why, bytes, peak memory.
        ready: Called once it is known that the work can begin.
        progress: Shows the progress.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    if rank is not None and energy is not None:
        raise UsageError(f"{named('rank')} and {named('energy')} exclude each other", hint="give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"must be at least 1, not {rank}", option="rank")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"must be above 0 and at most 1, not {energy:g}", option="energy")
    frame = _Frame(Path(out), include, exclude, max_shard_size, force, resume, stream, ready, progress)
    opened = _open(base, experts, include, exclude, device)
    source, linear, names = opened.job.source, opened.linear, opened.names
    ranked = sorted((t for t in linear if min(t.shape) <= _RANKED_SIDE), key=lambda t: -t.numel)[:_RANKED_LAYERS]
    decomposed = linear if energy is not None else ranked

    def write(stage: Callable[..., Staging]) -> _Result:
        measured = vectors.measure(source, opened.tensors, progress)
        spectra = vectors.spectra(source, decomposed, progress)
        ranks = _ranks(linear, measured, spectra, rank, energy)
        staging = stage(together(_layouts(opened, measured, ranks, parse_size(max_shard_size))))
        places = vectors.Places(tuple(f"{name}/" for name in names), ranks=ranks)
        errors = vectors.write(source, opened.tensors, None, places, staging, progress)
        report = {
            **measured_report(names, opened.tensors, measured),
            "ranks": numerical_ranks(names, [t for t in decomposed if t in ranked], spectra),
            "low_rank": low_rank_report(names, measured, ranks, errors),
        }
        return _Result(report, {name: opened.unchanged(measured, i) for i, name in enumerate(names)}, ranks)

    with contextlib.closing(opened.job.plan):
        _refuse_names(names)
        if dry_run:
            factored = linear if rank is not None or energy is not None else []
            return _plan(opened, decomposed, factored, stream=stream)
        return _run("extract", opened, frame, [rank, energy], write)


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
    frame = _Frame(Path(out), include, exclude, max_shard_size, force, resume, stream, ready, progress)
    opened = _open(base, experts, include, exclude, device, (transform,))
    job, names = opened.job, opened.names

    def write(stage: Callable[..., Staging]) -> _Result:
        staging = stage(companions=full_experts * len(names))  # what there is to write shows once the vectors are there
        fitted = transform.fit(job, opened.linear, Chain(), Alone(staging.scratch), progress)
        figures = fitted.figures()
        measured = _changes(figures.entanglement)
        measured |= vectors.measure(job.source, [t for t in opened.tensors if not t.linear], progress)
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
        return _Result(report, unchanged, {})

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
        return _run("disentangle", opened, frame, settings, write, beside="all" if full_experts else "nothing")


def _refuse_names(names: Sequence[str], *others: str) -> None:
    """Refuse experts whose task vectors could not have directories of their names."""
    for name in names:
        if name in (MANIFEST, *others):
            raise UsageError(f"an expert cannot be called '{name}' here", hint=f"rename it: other={name}")


def _open(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    include: Sequence[str],
    exclude: Sequence[str],
    device: str,
    transforms: tuple[Transform, ...] = (),
) -> _Opened:
    prepare_process()
    origin, others = open_models(str(base), as_references(experts), exclude)
    plan = make_plan(origin, others, include=include, exclude=exclude)
    shared = [tensor for tensor in plan.tensors.values() if tensor.action == "merge"]
    empty = [tensor.name for tensor in shared if not tensor.numel]
    job = Job(source_of(plan, device), (), (1.0,) * len(others), transforms)
    return _Opened(job, [tensor for tensor in shared if tensor.numel], empty)


def _run(
    verb: str,
    opened: _Opened,
    frame: _Frame,
    settings: Sequence[Any],
    write: Callable[[Callable[..., Staging]], _Result],
    *,
    beside: Literal["all", "nothing"] = "nothing",
) -> dict[str, Any]:
    """Check, download, write, and publish with a manifest for every directory and one for the whole; the report.

    `write` is given what prepares the output with a layout.
    """
    plan, progress = opened.job.plan, frame.progress
    device, asked = opened.job.source.device, [verb, *settings, frame.include, frame.exclude, frame.max_shard_size]
    with contextlib.ExitStack() as stack:
        if frame.resume:
            stack.enter_context(threads_of_leftovers(frame.out, fingerprint(plan, device, *asked)))
        digest = fingerprint(plan, device, *asked)
        output = stack.enter_context(output_of(
            plan, frame.out, digest, force=frame.force, resume=frame.resume, ready=frame.ready, progress=progress
        ))  # fmt: skip
        if output.complete is not None:
            return output.complete["report"]
        for remark in [*remarks(plan), *(remarks_on_origin(plan.base) if beside == "all" else [])]:
            progress.note(remark)
        fetch(plan, progress, beside=beside, stream=frame.stream)
        with current(device):
            result = write(output.stage)
        output.staging.write_indices()
        each, whole = vector_manifests(verb, plan, device, result.unchanged, result.ranks)
        for name, manifest in each.items():
            output.staging.write_file(f"{name}/{MANIFEST}", as_file(manifest))
        globs = {"include": list(frame.include), "exclude": list(frame.exclude)}
        output.publish({**whole, **globs, "report": result.report, "fingerprint": digest})
        return result.report


def _plan(
    opened: _Opened, ranked: Sequence[TensorPlan] = (), factored: Sequence[TensorPlan] = (), *, stream: bool
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


def _layouts(opened: _Opened, measured: Mapping[str, Measured], ranks: Ranks, size: int | None) -> Iterable[Layout]:
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


def _copy_companions(opened: _Opened, staging: Staging) -> None:
    for place, file in companions(opened.job.plan.base).items():
        content = portable(place, file)
        for name in opened.names:
            staging.write_file(f"{FULL}/{name}/{place}", content)
