"""merge --as-lora: the merged task vector as a PEFT adapter instead of a checkpoint."""

from __future__ import annotations

from typing import Any

from modelmerge.checkpoint import as_lora
from modelmerge.checkpoint.adapter_config import CONFIG, WEIGHTS
from modelmerge.checkpoint.companions import BASE
from modelmerge.checkpoint.staging import Staging
from modelmerge.engine.adapter import Adapted, adapt
from modelmerge.engine.adapter_needs import adapter_bytes, adapter_memory, adapter_reads, adapter_work, of_factors
from modelmerge.engine.estimate import seconds
from modelmerge.engine.job import Job
from modelmerge.errors import OutputError, UsageError, named
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import DTYPES
from modelmerge.progress import Reporter
from modelmerge.record.manifest import listing

_BLOCK = 1 << 24  # bytes copied at a time
# By the role of a tensor that the merge may change, the action that a plan names.
_ACTIONS = {
    "low rank": "low rank", "bias": "keep if changed", "whole": "keep if changed", "no place": "refuse if changed",
}  # fmt: skip


def size_of(recipe: Recipe) -> as_lora.Size | None:
    """The size of the adapter that a recipe asks for, if it does.

    Raises:
        UsageError: It is no size, or another option has no effect beside it.
    """
    if recipe.as_lora is None:
        return None
    if recipe.max_shard_size is not None:
        raise UsageError(f"has no effect with {named('as_lora')}: peft reads one file", option="max_shard_size")
    if recipe.files_from != BASE:
        why = "the tokenizer is that of the model it is put on"
        raise UsageError(f"has no effect with {named('as_lora')}: {why}", option="files_from")
    return as_lora.parse_size(recipe.as_lora)


def describe(job: Job, recipe: Recipe, size: as_lora.Size) -> dict[str, Any]:
    """The entries of a plan that differ from those for a checkpoint."""
    table, dtype = as_lora.roles(job.plan.base), _dtype(recipe)
    sums, tensors = of_factors(job, table), []
    whole = [tensor for tensor in job.merged() if tensor.name not in sums]
    for tensor in job.plan.tensors.values():
        kind = table[tensor.name].kind
        action = "leave out" if tensor.action == "copy" else _ACTIONS[kind]
        tensors.append((tensor, dtype if kind == "low rank" else tensor.out_dtype, action))
    return {
        "tensors": listing(job.source, tensors)["tensors"],
        "peak_memory": adapter_memory(job, sums, size),
        "seconds": seconds(job, whole, adapter_work(job, table, sums, size)),
        "shards": [WEIGHTS],
    }


def bytes_read(job: Job, *, streamed: bool = False) -> int:
    """Bytes of tensors that are read; or only from models that are streamed."""
    return adapter_reads(job, as_lora.roles(job.plan.base), streamed=streamed)


def of_adapters_alone(job: Job) -> bool:
    """Whether all is made of the experts' factors, so that no weight of the base is read."""
    return len(of_factors(job, as_lora.roles(job.plan.base))) == len(job.merged())


def most_bytes(job: Job, recipe: Recipe, size: as_lora.Size) -> int:
    """The most bytes that the adapter's weights can have."""
    return adapter_bytes(job, as_lora.roles(job.plan.base), size, _dtype(recipe))


def run(job: Job, recipe: Recipe, size: as_lora.Size, staging: Staging, progress: Reporter) -> Adapted:
    """Merge into an adapter's two files.

    Raises:
        OutputError: A tensor changes that an adapter has no place for, or no linear layer changes.
    """
    base, table = job.plan.base, as_lora.roles(job.plan.base)
    with staging.spool() as spool:
        adapted = adapt(job, table, size, _dtype(recipe), spool, staging.scratch, progress)
        if not adapted.ranks:
            raise OutputError(
                "the merge changes no weight of a linear layer: there is nothing to write as a LoRA",
                hint=f"write a whole checkpoint, without {named('as_lora')}",
            )
        staging.lay_out(as_lora.lay_out_adapter(adapted.entries))
        for key, (_, _, nbytes) in adapted.entries.items():
            spool.seek(adapted.places[key])
            for start in range(0, nbytes, _BLOCK):
                staging.write(key, start, memoryview(spool.read(min(_BLOCK, nbytes - start))))
    config = as_lora.config(base, adapted.ranks, adapted.modules, table, biases=bool(adapted.biases))
    staging.write_file(CONFIG, config)
    return adapted


def report(adapted: Adapted) -> dict[str, Any]:
    """The entry of an adapter in a manifest."""
    return {
        "relative_error": adapted.relative_error(),
        "tensors": {
            name: {"rank": rank, "relative_error": adapted.relative_error(name) if name in adapted.squares else 0.0}
            for name, rank in adapted.ranks.items()
        },
        "modules_to_save": sorted(adapted.modules),
        "biases": adapted.biases,
    }


def note(adapted: Adapted) -> str:
    """A sentence about an adapter, for people."""
    ranks = sorted(set(adapted.ranks.values()))
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    counts = ((len(adapted.modules), "module", "modules"), (len(adapted.biases), "bias", "biases"))
    whole = [f"{count} {one if count == 1 else more}" for count, one, more in counts if count]
    kept = f"; kept whole, for they are no LoRA: {' and '.join(whole)}" if whole else ""
    return f"Written as a PEFT adapter of {rank}: its relative error is {adapted.relative_error():.2%}{kept}."


def _dtype(recipe: Recipe) -> str:
    """The safetensors dtype of the factors."""
    return DTYPES[recipe.dtype or "float32"]
