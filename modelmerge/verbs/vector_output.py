"""How extract and disentangle run: models opened to be subtracted, and an output with a manifest for each vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelmerge.checkpoint.companions import remarks_on_origin
from modelmerge.checkpoint.layout import Layout
from modelmerge.checkpoint.opening import as_references, open_models
from modelmerge.checkpoint.publication import Publication
from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.checkpoint.staging import Staging
from modelmerge.devices import current
from modelmerge.engine.cluster import Shared
from modelmerge.engine.job import Job
from modelmerge.engine.parallel import prepare_process, source_of
from modelmerge.engine.transforms import Transform
from modelmerge.engine.vectors import Measured
from modelmerge.plan.downloads import fetch
from modelmerge.plan.tensors import TensorPlan, make_plan
from modelmerge.progress import Reporter
from modelmerge.record.fingerprint import fingerprint
from modelmerge.record.manifest import as_file, remarks
from modelmerge.record.vectors import Ranks, vector_manifests
from modelmerge.verbs.output import output_of
from modelmerge.verbs.prepare import threads_of_leftovers
from modelmerge.verbs.shared import Digests, Finish, Undertaking, undertake


@dataclass(frozen=True, slots=True)
class Opened:
    """Models that are ready to be subtracted."""

    job: Job
    tensors: list[TensorPlan]  # what base and experts share, in the base's order
    empty: list[str]  # shared tensors without elements, which cannot change

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the experts."""
        return tuple(expert.name for expert in self.job.plan.experts)

    @property
    def linear(self) -> list[TensorPlan]:
        """The weights of linear layers."""
        return [tensor for tensor in self.tensors if tensor.linear]

    def unchanged(self, measured: Mapping[str, Measured], expert: int) -> list[str]:
        """The tensors that an expert, by its place, has as the base has them."""
        return [*self.empty, *(t.name for t in self.tensors if not measured[t.name].nonzero[expert])]


@dataclass(frozen=True, slots=True)
class Frame:
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

    def asked(self, verb: str, settings: Sequence[Any]) -> list[Any]:
        """What determines the output besides the models."""
        return [verb, *settings, self.include, self.exclude, self.max_shard_size]


@dataclass(frozen=True, slots=True)
class Result:
    """What a verb has written: its report, by directory the tensors that are left out, the ranks of factors."""

    report: dict[str, Any]
    unchanged: Mapping[str, Sequence[str]]
    ranks: Ranks


def opened_models(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    include: Sequence[str],
    exclude: Sequence[str],
    device: str,
    transforms: tuple[Transform, ...] = (),
) -> Opened:
    """Base and experts, opened and planned.

    Raises:
        ModelMergeError: Whatever can be known to be wrong before a tensor is read.
    """
    prepare_process()
    origin, others = open_models(str(base), as_references(experts), exclude)
    plan = make_plan(origin, others, include=include, exclude=exclude)
    shared = [tensor for tensor in plan.tensors.values() if tensor.action == "merge"]
    empty = [tensor.name for tensor in shared if not tensor.numel]
    job = Job(source_of(plan, device), (), (1.0,) * len(others), transforms)
    return Opened(job, [tensor for tensor in shared if tensor.numel], empty)


def run_alone(
    verb: str,
    opened: Opened,
    frame: Frame,
    settings: Sequence[Any],
    write: Callable[[Callable[..., Staging]], Result],
    *,
    beside: Literal["all", "nothing"] = "nothing",
) -> dict[str, Any]:
    """Check, download, write, and publish with a manifest for every directory and one for the whole; the report.

    `write` is given what prepares the output with a layout.
    """
    plan, progress = opened.job.plan, frame.progress
    device, asked = opened.job.source.device, frame.asked(verb, settings)
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
        digests = [model.digests() for model in plan.models]
        output.publish(_complete(verb, opened, frame, result, digest, output.staging, digests))
        return result.report


def run_shared(
    verb: str, opened: Opened, frame: Frame, settings: Sequence[Any], share: Callable[[Shared], tuple[Layout, Result]]
) -> dict[str, Any]:
    """The same together with other processes; `share` does all units."""
    job, progress = opened.job, frame.progress
    digest = fingerprint(job.plan, job.source.device, *frame.asked(verb, settings))

    def do(crew: Shared) -> tuple[Layout, Finish]:
        with current(job.source.device):
            layout, result = share(crew)

        def finish(publication: Publication, digests: Digests) -> dict[str, Any]:
            return _complete(verb, opened, frame, result, digest, publication, digests)

        return layout, finish

    for remark in remarks(job.plan):
        progress.note(remark)
    nbytes = 4 * len(opened.names) * sum(tensor.numel for tensor in opened.tensors)
    work = Undertaking(job=job, digest=digest, stream=frame.stream, beside="nothing", nbytes=nbytes, do=do)
    manifest = undertake(work, frame.out, force=frame.force, ready=frame.ready, progress=progress)
    report: dict[str, Any] = manifest["report"]
    return report


def _complete(
    verb: str, opened: Opened, frame: Frame, result: Result, digest: str, publication: Publication, digests: Digests
) -> dict[str, Any]:
    """Write what goes beside the weights, but for the manifest of the whole, which is returned."""
    publication.write_indices()
    job = opened.job
    each, whole = vector_manifests(verb, job.plan, job.source.device, result.unchanged, result.ranks, digests)
    for name, manifest in each.items():
        publication.write_file(f"{name}/{MANIFEST}", as_file(manifest))
    globs = {"include": list(frame.include), "exclude": list(frame.exclude)}
    return {**whole, **globs, "report": result.report, "fingerprint": digest}
