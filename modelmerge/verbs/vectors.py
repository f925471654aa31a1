"""extract and disentangle: task vectors as directories of their own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelmerge.checkpoint.layout import Entry, Layout, lay_out, together
from modelmerge.checkpoint.opening import as_references, open_models
from modelmerge.checkpoint.reader import LEFT, MANIFEST, RIGHT, VECTOR_KIND
from modelmerge.checkpoint.staging import Staging, companions
from modelmerge.engine import vectors
from modelmerge.engine.job import Source
from modelmerge.engine.memory import front_reads, refuse_too_large, scratch_bytes, vector_memory
from modelmerge.engine.parallel import prepare_process, source_of
from modelmerge.engine.transforms import Entanglement, Front, fit
from modelmerge.engine.vectors import Measured
from modelmerge.errors import UsageError
from modelmerge.methods.contract import Disentangler, Redundancy
from modelmerge.plan.downloads import fetch, with_downloads
from modelmerge.plan.recipe import parse_size
from modelmerge.plan.tensors import TensorPlan, layer_type, make_plan, out_bytes
from modelmerge.progress import SILENT, Reporter
from modelmerge.record.fingerprint import fingerprint
from modelmerge.record.manifest import listing, record, remarks, stamp
from modelmerge.verbs.prepare import begin, disentangler

REDUNDANT = "redundant"  # the folder of the vector that disentangling takes out
FULL = "experts"  # the folder of base + disentangled task vector
_RANKED_LAYERS = 3  # so many of the largest matrices have their rank told; each costs an eigendecomposition
_RANKED_SIDE = 4096  # and none whose smaller side is longer than this
_EPSILON = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True, slots=True)
class _Opened:
    """Models that are ready to be subtracted."""

    source: Source
    tensors: list[TensorPlan]  # what base and experts share, in the base's order
    empty: list[str]  # shared tensors without elements, which cannot change

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.source.plan.experts)


def extract(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    ready: Callable[[], object] | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write each expert's task vector, float32, into a directory of its own under `out`; what was found about them.

    Args:
        base: Reference of the base.
        experts: References of the experts.
        out: Gets `NAME/model.safetensors` and `NAME/modelmerge.json` for each expert.
        rank: Write the weights of linear layers as factors of at most this rank.
        energy: Write them as factors that keep this share of the squared norm.
        include: Globs of the tensors to extract; all if empty.
        exclude: Globs of the tensors to leave out.
        max_shard_size: Largest output file.
        device: cpu, cuda, cuda:N or auto.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        dry_run: Write nothing, and give the plan instead: tensors and why, bytes, peak memory.
        ready: Called once it is known that the work can begin.
        reporter: Is told the progress.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy exclude each other", hint="give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1, not {energy:g}")
    started = time.monotonic()
    opened = _open(base, experts, include, exclude, device)
    out = Path(out)
    try:
        linear = [t for t in opened.tensors if t.linear]
        ranked = sorted((t for t in linear if min(t.shape) <= _RANKED_SIDE), key=lambda t: -t.numel)[:_RANKED_LAYERS]
        wanted = linear if energy is not None else ranked
        if dry_run:
            return _plan(opened, None, [*wanted, *(linear if rank is not None else [])], stream=stream)
        by = fingerprint(opened.source.plan, "extract", rank, energy, include, exclude, max_shard_size)
        done = begin(opened.source.plan, out, by, force=force, resume=resume, ready=ready, reporter=reporter)
        if done is not None:
            return done["report"]
        for remark in remarks(opened.source.plan):
            reporter.note(remark)
        fetch(opened.source.plan, reporter, beside="nothing", stream=stream)
        measured = vectors.measure(opened.source, opened.tensors, reporter)
        spectra = vectors.spectra(opened.source, wanted, reporter)
        ranks = _ranks(linear, measured, spectra, rank, energy)
        layout = together(
            lay_out(_entries(opened, measured, i, ranks), parse_size(max_shard_size), folder=f"{name}/")
            for i, name in enumerate(opened.names)
        )
        with Staging(out, layout, force=force, resume=resume, fingerprint=by) as staging:
            output = vectors.Wanted(tuple(f"{name}/" for name in opened.names), ranks=ranks)
            errors = vectors.write(opened.source, opened.tensors, None, output, staging, reporter)
            report = {
                **_describe(opened, measured),
                "ranks": _rank_report(opened, [t for t in wanted if t in ranked], spectra),
                "low_rank": _low_rank_report(opened, measured, ranks, errors),
            }
            _publish(opened, "extract", report, measured, ranks, False, staging, started, include, exclude, by)
        return report
    finally:
        opened.source.plan.close()


def disentangle(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    out: str | Path,
    *,
    method: str,
    full_experts: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_shard_size: str = "5GB",
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    stream: bool = False,
    dry_run: bool = False,
    ready: Callable[[], object] | None = None,
    reporter: Reporter = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Write each expert's disentangled task vector under `out`, and the redundant one, if any; what disentangling did.

    Args:
        base: Reference of the base.
        experts: References of the experts, two at least.
        out: Gets `NAME/` for each expert, `redundant/` where one vector is taken out of all, and with `full_experts`
            also `experts/NAME/`.
        method: A disentangling method's name; `options` are its own.
        full_experts: Also write base plus disentangled task vector, as checkpoints.
        include: Globs of the tensors to take; all if empty.
        exclude: Globs of the tensors to leave out.
        max_shard_size: Largest output file.
        device: cpu, cuda, cuda:N or auto.
        force: Replace what is at `out`.
        resume: Keep finished shards when interrupted, and take up those of an interrupted run.
        stream: Read weights on the Hub over ranges, without storing them in the cache.
        dry_run: Write nothing, and give the plan instead: tensors and why, bytes, peak memory.
        ready: Called once it is known that the work can begin.
        reporter: Is told the progress.
        **options: The method's options.

    Raises:
        ModelMergeError: See `modelmerge.errors` for the kinds.
    """
    started = time.monotonic()
    chosen = disentangler(method, options)
    opened = _open(base, experts, include, exclude, device)
    out = Path(out)
    try:
        if len(opened.names) < 2:
            raise UsageError("there is nothing to disentangle: only one expert is named", hint="name two or more")
        for name in opened.names:
            if name in (REDUNDANT, FULL):
                raise UsageError(f"an expert cannot be called '{name}' here", hint=f"rename it: other={name}")
        linear = [t for t in opened.tensors if t.linear]
        if not linear:
            raise UsageError("no weight of a linear layer is left to disentangle", hint="check --include and --exclude")
        if dry_run:
            return _plan(opened, chosen, [], stream=stream)
        refuse_too_large(opened.source, chosen, linear)
        by = fingerprint(
            opened.source.plan, "disentangle", method, dataclasses.asdict(chosen[1]), include, exclude, max_shard_size,
            full_experts,
        )  # fmt: skip
        done = begin(opened.source.plan, out, by, force=force, resume=resume, ready=ready, reporter=reporter)
        if done is not None:
            return done["report"]
        for remark in remarks(opened.source.plan):
            reporter.note(remark)
        fetch(opened.source.plan, reporter, beside="all" if full_experts else "nothing", stream=stream)
        # What there is to write is known once the vectors are.
        with Staging(out, Layout((), {}, {}), force=force, resume=resume, fingerprint=by) as staging:
            front = fit(opened.source, chosen, linear, staging.scratch, reporter)
            measured = _known_from(front)
            measured |= vectors.measure(opened.source, [t for t in opened.tensors if not t.linear], reporter)
            one = isinstance(chosen[0].by, Redundancy)
            everything = list(opened.source.plan.tensors.values())
            size = parse_size(max_shard_size)
            folders = [
                lay_out(_entries(opened, measured, i, {}), size, folder=f"{name}/")
                for i, name in enumerate(opened.names)
            ]
            if one:
                entries = {t.name: ("F32", t.shape, 4 * t.numel) for t in linear}
                folders.append(lay_out(entries, size, folder=f"{REDUNDANT}/"))
            if full_experts:
                folders += [_full_layout(everything, size, f"{FULL}/{name}/") for name in opened.names]
            staging.lay_out(together(folders))
            output = vectors.Wanted(
                tuple(f"{name}/" for name in opened.names),
                f"{REDUNDANT}/" if one else None,
                tuple(f"{FULL}/{name}/" for name in opened.names) if full_experts else (),
            )
            written = [t for t in everything if t.numel] if full_experts else opened.tensors
            vectors.write(opened.source, written, front, output, staging, reporter)
            if full_experts:
                _copy_companions(opened, staging)
            report = _report(opened, chosen, method, front)
            _publish(opened, "disentangle", report, measured, {}, one, staging, started, include, exclude, by)
        return report
    finally:
        opened.source.plan.close()


def _open(
    base: str | Path,
    experts: Sequence[str | Path] | Mapping[str, str | Path],
    include: Sequence[str],
    exclude: Sequence[str],
    device: str,
) -> _Opened:
    prepare_process()
    origin, others = open_models(str(base), as_references(experts))
    made = make_plan(origin, others, include=include, exclude=exclude)
    shared = [tensor for tensor in made.tensors.values() if tensor.action == "merge"]
    empty = [tensor.name for tensor in shared if not tensor.numel]
    return _Opened(source_of(made, device), [tensor for tensor in shared if tensor.numel], empty)


def _plan(
    opened: _Opened,
    front: tuple[Disentangler, Any] | None,
    decomposed: Sequence[TensorPlan],
    *,
    stream: bool,
) -> dict[str, Any]:
    """What a run would do; `write` is what it writes at most, for unchanged tensors are known only once read."""
    made = opened.source.plan
    linear = [t for t in opened.tensors if t.linear]
    # Once to write, once more to measure; to disentangle or to decompose some another time.
    times = [*opened.tensors, *([] if front else [*opened.tensors, *decomposed])]
    fitting = front_reads(front, linear)

    def read(streamed: bool) -> int:
        once, apart = (
            sum(made.stored_bytes(t, experts=True, streamed=streamed) for t in tensors) for tensors in (times, linear)
        )
        return once + int(fitting * apart)

    write = 4 * len(opened.names) * sum(t.numel for t in opened.tensors)
    write += 4 * sum(t.numel for t in linear) if front and isinstance(front[0].by, Redundancy) else 0
    told = {
        **listing(opened.source, ((t, "F32", _action(t, front is not None)) for t in made.tensors.values())),
        "bytes": {"read": read(False), "write": write, "scratch": scratch_bytes(opened.source, front, linear)},
        "peak_memory": vector_memory(opened.source, front, opened.tensors, decomposed),
    }
    return {"plan": with_downloads(told, made, beside="nothing", streamed=read(True) if stream else None)}


def _action(tensor: TensorPlan, disentangling: bool) -> str:
    if tensor.action == "copy":
        return "leave out"
    return "disentangle" if disentangling and tensor.linear else "extract"


def _known_from(front: Front) -> dict[str, Measured]:
    """What the fit has told of the linear layers already: which experts changed them."""
    return {
        name: Measured(part.before, 0.0, tuple((part.before.diagonal() > 0).long().tolist()), (0,) * len(part.before))
        for name, part in front.entanglement.items()
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
            found = [min(rank, m, n)] * len(measured[tensor.name].changed)
        else:
            shares = spectra[tensor.name].square().cumsum(1)
            # The smallest rank whose share reaches the energy, but for rounding of the sums.
            enough = shares >= shares[:, -1:] * (float(energy or 0.0) - 1e-12)
            found = [int(row.float().argmax()) + 1 for row in enough]
        found = [r if changed else 0 for r, changed in zip(found, measured[tensor.name].changed, strict=True)]
        if max(found) * (m + n) < m * n:
            ranks[tensor.name] = tuple(found)
    return ranks


def _entries(
    opened: _Opened, measured: Mapping[str, Measured], expert: int, ranks: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
    """What one expert's directory holds: changed tensors, whole or as factors."""
    entries: dict[str, Entry] = {}
    for tensor in opened.tensors:
        if not measured[tensor.name].changed[expert]:
            continue
        if tensor.name in ranks:
            rank = ranks[tensor.name][expert]
            for end, shape in ((LEFT, (tensor.shape[0], rank)), (RIGHT, (rank, tensor.shape[1]))):
                entries[tensor.name + end] = ("F32", shape, 4 * shape[0] * shape[1])
        else:
            entries[tensor.name] = ("F32", tensor.shape, 4 * tensor.numel)
    return entries


def _full_layout(tensors: Iterable[TensorPlan], size: int, folder: str) -> Layout:
    entries = {t.name: (t.out_dtype, t.shape, out_bytes(t)) for t in tensors}
    return lay_out(entries, size, folder=folder)


def _copy_companions(opened: _Opened, staging: Staging) -> None:
    for place, file in companions(opened.source.plan.base.directory).items():
        for name in opened.names:
            staging.write_file(f"{FULL}/{name}/{place}", file)


def _describe(opened: _Opened, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """What one pass found: by expert, and the cosines between experts, of the model and by type of layer."""
    total = _sum(measured.values())
    entries = sum(tensor.numel for tensor in opened.tensors)
    kinds: dict[str, list[Measured]] = {}
    for tensor in opened.tensors:
        kinds.setdefault(layer_type(tensor.name), []).append(measured[tensor.name])
    norms = total.gram.diagonal().sqrt().tolist()
    return {
        "experts": [
            {
                "name": name,
                "norm": norms[i],
                "relative_norm": norms[i] / total.base_square**0.5 if total.base_square else None,
                "changed": total.changed[i] / entries,
                "unchanged_tensors": [t.name for t in opened.tensors if not measured[t.name].changed[i]],
                # Where base + task vector, rounded to the expert's dtype, is not the expert to the last bit.
                "entries_not_restored": total.lost[i],
            }
            for i, name in enumerate(opened.names)
        ],
        "cosines": {
            "model": _cosines(total.gram),
            "layer_types": {kind: _cosines(_sum(parts).gram) for kind, parts in kinds.items()},
        },
    }


def _sum(parts: Iterable[Measured]) -> Measured:
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def _cosines(gram: Tensor) -> list[list[float | None]]:
    """The matrix of cosines; None where a task vector is zero."""
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    rows = (gram / (norms[:, None] * norms[None, :])).clamp(-1.0, 1.0)
    return [[float(value) if bool(value.isfinite()) else None for value in row] for row in rows]


def _rank_report(opened: _Opened, ranked: Sequence[TensorPlan], spectra: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Numerical rank (singular values above max(m, n) * eps of the first) of the largest layers."""
    return [
        {
            "tensor": tensor.name,
            "shape": list(tensor.shape),
            "numerical_rank": {
                name: int((values > values[0] * max(tensor.shape) * _EPSILON).sum())
                for name, values in zip(opened.names, spectra[tensor.name], strict=True)
            },
        }
        for tensor in ranked
    ]


def _low_rank_report(
    opened: _Opened,
    measured: Mapping[str, Measured],
    ranks: Mapping[str, tuple[int, ...]],
    errors: Mapping[str, tuple[float, ...]],
) -> dict[str, Any] | None:
    """How much the factors lose: relative error of each expert's task vector, and of each of its tensors."""
    if not ranks:
        return None
    told = {}
    for i, name in enumerate(opened.names):
        square = sum(float(part.gram[i, i]) for part in measured.values())
        lost = sum(error[i] for error in errors.values())
        tensors = {
            tensor: {
                "rank": ranks[tensor][i],
                "relative_error": (error[i] / float(measured[tensor].gram[i, i])) ** 0.5 if ranks[tensor][i] else 0.0,
            }
            for tensor, error in errors.items()
        }
        told[name] = {"relative_error": (lost / square) ** 0.5 if square else 0.0, "tensors": tensors}
    return told


def _report(opened: _Opened, chosen: tuple[Disentangler, Any], name: str, front: Front) -> dict[str, Any]:
    """What disentangling did: cosines before and after, the redundant vector's size, the loss at each step."""
    parts = front.entanglement
    first, *rest = parts.values()
    for part in rest:
        first = first + part
    losses = front.losses
    return {
        "method": name,
        "options": dataclasses.asdict(chosen[1]),
        "steps": len(losses) - 1 if isinstance(chosen[0].by, Redundancy) else None,
        "loss": {"first": losses[0], "lowest": min(losses), "curve": losses},
        "model": _entangled(first),
        "tensors": {tensor: _entangled(part) for tensor, part in parts.items()},
        "experts": [{"name": expert} for expert in opened.names],
    }


def _entangled(part: Entanglement) -> dict[str, Any]:
    size = float(part.before.diagonal().mean().sqrt())
    return {
        "before": _summary(part.before),
        "after": _summary(part.after),
        # ||delta|| over the root mean square of the task vectors' norms.
        "redundant": part.redundant**0.5 / size if size else 0.0,
    }


def _summary(gram: Tensor) -> dict[str, float | None]:
    values = [abs(v) for i, row in enumerate(_cosines(gram)) for j, v in enumerate(row) if i < j and v is not None]
    return {"mean_cosine": sum(values) / len(values) if values else None, "largest_cosine": max(values, default=None)}


def _publish(
    opened: _Opened,
    verb: str,
    report: dict[str, Any],
    measured: Mapping[str, Measured],
    ranks: Mapping[str, tuple[int, ...]],
    redundant: bool,
    staging: Staging,
    started: float,
    include: Sequence[str],
    exclude: Sequence[str],
    fingerprint: str,
) -> None:
    """Write every directory's manifest, then that of the whole."""
    models = opened.source.plan.models
    digests = [model.digests() for model in models]
    common = stamp(opened.source.device)
    base = record(models[0], digests[0])
    staging.write_indices()
    for i, name in enumerate(opened.names):
        manifest = {
            **common,
            "kind": VECTOR_KIND,
            "verb": verb,
            "inputs": {"base": base, "expert": record(models[i + 1], digests[i + 1])},
            "unchanged": [*opened.empty, *(t.name for t in opened.tensors if not measured[t.name].changed[i])],
            "ranks": {tensor: found[i] for tensor, found in ranks.items()},
        }
        staging.write_file(f"{name}/{MANIFEST}", _text(manifest))
    if redundant:
        fitted = set(report["tensors"])
        zero = [*opened.empty, *(tensor.name for tensor in opened.tensors if tensor.name not in fitted)]
        manifest = {
            **common,
            "kind": VECTOR_KIND,
            "verb": verb,
            "inputs": {"base": base},
            "unchanged": zero,
            "ranks": {},
        }
        staging.write_file(f"{REDUNDANT}/{MANIFEST}", _text(manifest))
    whole = {
        **common,
        "kind": verb,
        "inputs": {"base": base, "experts": [record(m, d) for m, d in zip(models[1:], digests[1:], strict=True)]},
        "include": list(include),
        "exclude": list(exclude),
        "remarks": remarks(opened.source.plan),
        "report": report,
        "seconds": round(time.monotonic() - started, 3),
        "fingerprint": fingerprint,
        "files": staging.listing(),
    }
    staging.publish(_text(whole))


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()
