"""Streams task vectors through a method: the only place that knows devices, dtypes, passes and workers.

The way of the data, for each piece of a tensor: the stored bytes of the base and of every expert are read; both are
widened to float32 (float64 where that is stored) and subtracted; the task vectors [T, *shape], float32 on the device,
go through the method; `theta_0` plus the merged task vector is rounded once, to the output's dtype, and written at
its final place in the output file.

Element-wise methods take tensors in blocks small enough to stay in the processor's cache; each worker thread reads,
computes and writes its own blocks, so that reading, maths and writing overlap and memory does not grow with the
tensors. Methods that need whole matrices get them one by one, with the next one being read and the last one being
written meanwhile.
"""

from __future__ import annotations

from modelmerge.engine.adapting import Adapted, adapt, adapted_bytes, adapted_memory
from modelmerge.engine.finding import (
    Found,
    Problem,
    find_weights,
    finding_memory,
    finding_reads,
    refuse_finding_beyond_memory,
)
from modelmerge.engine.job import (
    Findings,
    Job,
    Part,
    Source,
    beyond_device,
    bytes_read,
    default_workers,
    find_device,
    passes,
    peak_memory,
    refuse_too_large,
    scratch_bytes,
    threads,
    vector_memory,
)
from modelmerge.engine.merging import run, run_scaled
from modelmerge.engine.rounding import stored_narrow
from modelmerge.methods._lambdas import Mode as TaskLambda

__all__ = [
    "Adapted",
    "Findings",
    "Found",
    "Job",
    "Part",
    "Problem",
    "Source",
    "TaskLambda",
    "adapt",
    "adapted_bytes",
    "adapted_memory",
    "beyond_device",
    "bytes_read",
    "default_workers",
    "find_device",
    "find_weights",
    "finding_memory",
    "finding_reads",
    "passes",
    "peak_memory",
    "refuse_finding_beyond_memory",
    "refuse_too_large",
    "run",
    "run_scaled",
    "scratch_bytes",
    "stored_narrow",
    "threads",
    "vector_memory",
]
