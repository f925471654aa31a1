"""The digest of everything that determines the bytes of the weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from modelmerge._version import __version__
from modelmerge.checkpoint.reader import Checkpoint
from modelmerge.devices import KINDS, device_kind, multiplies_by_onednn
from modelmerge.plan.tensors import Plan

_THREADS = " threads="


def versions() -> dict[str, str]:
    """The versions that bear on the result's bits."""
    return {**_packages(), "python": platform.python_version()}


@cache  # reading a package's metadata takes milliseconds
def _packages() -> dict[str, str]:
    others = {name: version(name) for name in ("safetensors", "huggingface_hub", "numpy")}
    # A source tree has no metadata. That of torch does not say which CUDA it is built for.
    return {"modelmerge": __version__, "torch": str(torch.__version__), **others}


def circumstances(device: object) -> dict[str, Any]:
    """What bears on the result's bits beside recipe and inputs: device, threads, kind of processor, versions."""
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    machine: dict[str, str | None] = {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": (blas[1] + " and oneDNN" * multiplies_by_onednn()) if blas else None,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    kind = KINDS.get(str(device).partition(":")[0])
    if kind is not None:
        machine["gpu"] = kind.name(torch.device(str(device)))
    return {"device": str(device), "threads": torch.get_num_threads(), "machine": machine, "versions": versions()}


def fingerprint(plan: Plan, device: torch.device, *settings: Any) -> str:
    """Digest of everything that determines the weights' bytes, as far as it can be had without reading tensors.

    The number of torch's threads stands behind it, so that a run that is taken up can be given as many.
    """
    parts = [part for model in plan.models for part in model.parts]
    files = [(p.reference.address(f), stat.st_size, _time(p, stat)) for p in parts for f, stat in p.files.items()]
    names = [model.name for model in plan.models]
    content = json.dumps([settings, names, files, device_kind(device), versions()], sort_keys=True, default=str)
    return f"{hashlib.sha256(content.encode()).hexdigest()}{_THREADS}{torch.get_num_threads()}"


def _time(model: Checkpoint, stat: os.stat_result) -> int:
    """When a file was changed; nothing where that tells nothing of its content."""
    return 0 if model.reference.is_stage or model.reference.repository is not None else stat.st_mtime_ns


def threads_in(fingerprint: str) -> int | None:
    """The number of threads that a fingerprint names, if any."""
    count = fingerprint.partition(_THREADS)[2]
    return int(count) if re.fullmatch(r"[1-9]\d{0,3}", count) else None
