"""Task vectors by chance, and methods applied to them in memory as the engine would."""

from __future__ import annotations

import functools
import operator
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from modelmerge.methods import registry
from modelmerge.methods.contract import Context, Method, Moments, Pass, Survey, measured_at_once
from modelmerge.methods.options import make_options, option_types

SHAPE = (24, 18)


def taus_of(experts: int = 4, seed: int = 0) -> Tensor:
    """Task vectors that agree a little, as those of one base do."""
    generator = torch.Generator().manual_seed(seed)
    own, shared = torch.randn(experts, *SHAPE, generator=generator), torch.randn(*SHAPE, generator=generator)
    return 1e-2 * own + 3e-3 * shared


def measured(chosen: Method, options: Any, taus: Tensor, base: Tensor) -> Tensor | None:
    survey, moments = chosen.survey(options, {}), chosen.moments(options, {})
    if moments is not None:
        return measured_at_once(moments, taus.reshape(len(taus), -1), base.reshape(-1))
    return None if survey is None else surveyed(survey, taus.reshape(len(taus), -1))


def measured_in_blocks(moments: Moments, taus: Tensor, base: Tensor, step: int, run: int) -> Tensor:
    """What moments tell of task vectors [T, n] and their base in blocks of `step`; runs of a sample have `run`."""
    search = moments(taus.shape[1], False)
    look = next(search)
    while True:
        width = run if look.sampled else step
        parts = [look.measure(*part) for part in zip(taus.split(width, dim=1), base.split(width), strict=True)]
        if look.sampled and taus.shape[1] % run:
            parts.pop()  # the last run is shorter
        try:
            look = search.send(functools.reduce(operator.add, parts))
        except StopIteration as end:
            return end.value


def surveyed(survey: Survey, taus: Tensor) -> Tensor:
    """What a survey concludes from task vectors [T, n] that lie in memory, shares taken as every so-manieth entry."""
    search = survey.find(taus.shape[1])
    wanted = next(search)
    while True:
        try:
            wanted = search.send(counted(wanted, taus[:, :: wanted.share]))
        except StopIteration as found:
            return found.value


def counted(wanted: Pass, taus: Tensor) -> Any:
    total = torch.zeros(len(taus), wanted.counters, dtype=torch.int64, device=taus.device)
    numbers = wanted.measure(taus.contiguous(), total)
    if numbers is None:
        return total
    return total, numbers if len(numbers) <= wanted.room else numbers[:0]


def takes(name: str, experts: int) -> int:
    """So many experts, or as many as the method takes."""
    return min(experts, registry.load(name).most_experts or experts)


def context_of(chosen: Method, options: Any, taus: Tensor, **told: Any) -> Context:
    """The context in which the engine would call the method on the whole tensor `w`."""
    base = torch.randn(taus.shape[1:], generator=torch.Generator().manual_seed(99)).to(taus.device)
    told = {
        "tensor": "w",
        "weights": (1.0,) * len(taus),
        "experts": tuple(f"e{i}" for i in range(len(taus))),
        "measured": measured(chosen, options, taus, base),
        "base": base if chosen.wants_base else None,
    } | told
    return Context(**told)


def merged(
    name: str,
    taus: Tensor,
    weights: tuple[float, ...] | None = None,
    experts: tuple[str, ...] | None = None,
    seed: int = 0,
    **values: Any,
) -> Tensor:
    chosen = registry.load(name)
    options = make_options(chosen, name, values)
    told: dict[str, Any] = {"weights": weights} if weights else {}
    told |= {"experts": experts} if experts else {}
    return chosen.apply(taus, options, context_of(chosen, options, taus, seed=seed, **told))


def leaves_out_and_says(name: str) -> None:
    """Assert that a method leaves a negligible task vector out, says so, and merges the others as without it."""
    taus = taus_of(4)
    taus[2] *= 1e-5
    remarks: list[tuple[int, str]] = []
    chosen = registry.load(name)
    options = chosen.options()
    context = context_of(chosen, options, taus, leave_out=lambda i, why: remarks.append((i, why)))
    with_it = chosen.apply(taus, options, context)
    assert remarks == [(2, "it hardly changed this weight")]
    assert torch.equal(with_it, merged(name, taus[[0, 1, 3]]))


def choices(chosen: Method) -> list[dict[str, Any]]:
    """The defaults, and each choice of each option that is a choice."""
    kinds = option_types(chosen.options).items()
    return [{}, *({name: value} for name, kind in kinds if get_origin(kind) is Literal for value in get_args(kind))]


def typed(name: str, options: dict[str, Any]) -> str:
    """A transform as `disentangle` takes it."""
    return " ".join([name, *(f"{option}={str(value).lower()}" for option, value in options.items())])


def constant_scale(name: str) -> dict[str, Any]:
    """Options with which a sum's scale does not follow the angles between the task vectors."""
    return {"published": True} if name in ("task-arithmetic", "ties") else {}
