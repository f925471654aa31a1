"""Options mean one thing: naming a default changes no bit, and `scale` is linear, through real files.

The defaults are those that help shows: a number, or the words after "Default:".
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modelmerge
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import (
    as_text,
    asks_overlap,
    is_linear,
    make_options,
    option_types,
    read_value,
    with_experts,
)
from tests.support.checkpoints import State, read, same_bits, write
from tests.support.methods import takes

EXPERTS = 3
SHAPE = (36, 48)  # of all matrices, so that a rank which follows from the tensor is one number
# Whose option belongs to one of them, or to the form that is not the published one.
SOLVERS = {"exact": ("ridge",), "adam": ("steps", "lr", "relative_lr"), "spectral": ("time", "share")}
UNPUBLISHED = {("ace", "ridge"), ("svc", "floor")}
Case = tuple[str, str, bool, str]  # kind, method, published, option


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base of small weights, three experts that went far enough for APGD's cap to act in one layer."""
    root, generator = tmp_path_factory.mktemp("defaults"), torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    base: State = {f"layers.{i}.proj.weight": random(*SHAPE) * 0.1 for i in range(3)} | {"norm.weight": random(48)}
    experts = [
        {name: tensor + random(*tensor.shape) * (0.1 if "layers.0" in name else 5e-3) for name, tensor in base.items()}
        for _ in range(EXPERTS)
    ]
    return [write(root / name, state) for name, state in zip("bxyz", [base, *experts], strict=True)]


def all_options() -> list[Case]:
    """Every option of every method and transform, by default and as published."""
    cases: list[Case] = []
    for kind, names in (("merge", registry.data_free()), ("transform", registry.names("transform"))):
        for name in names:
            options = option_types(registry.load(name, kind).options)
            for published in (False, True) if "published" in options else (False,):
                cases += [(kind, name, published, option) for option in options]
    return cases


def shown(kind: str, name: str, option: str, published: bool) -> Any:
    """The default that help shows, as it is typed: None where there is nothing to type."""
    spec = next(s for s in dataclasses.fields(registry.load(name, kind).options) if s.name == option)
    if spec.default is not None:
        return published if option == "published" else spec.default
    words = re.search(r"Default: (.*)\.$", spec.metadata["help"])
    assert words, f"help does not show the default of {option}"
    plain, *others = words[1].split("; ")
    text = next((other.removesuffix(" as published") for other in others), plain) if published else plain
    if text in ("1 / sqrt(experts)", "by number and overlap"):  # the models here are at right angles
        return round(EXPERTS**-0.5, 3)
    if rank := re.fullmatch(r"min\(m, n\) / (\d+)", text):
        return min(SHAPE) // int(rank[1])
    return None if text == "none" else read_value(option, text, option_types(registry.load(name, kind).options)[option])


def solver_of(kind: str, name: str, option: str) -> dict[str, str]:
    """The solver that the option belongs to, named, if it belongs to one."""
    if "solver" not in option_types(registry.load(name, kind).options):
        return {}
    return next(({"solver": solver} for solver, options in SOLVERS.items() if option in options), {})


_PLAIN: dict[str, State] = {}


def merged(models: list[Path], out: Path, kind: str, name: str, values: dict[str, Any]) -> State:
    """The model that comes out; the same merge is made once."""
    key = f"{kind} {name} {sorted(values.items())}"
    if key not in _PLAIN:
        if kind == "merge":
            chosen = models[: 1 + takes(name, EXPERTS)]
            modelmerge.merge(chosen[0], chosen[1:], out, method=name, **values)
        else:
            words = [f"{option.replace('_', '-')}={as_text(value)}" for option, value in values.items()]
            transform = " ".join([name, *words])
            modelmerge.merge(models[0], models[1:], out, method="task-arithmetic", disentangle=transform)
        _PLAIN[key] = read(out)
    return _PLAIN[key]


def frame_of(kind: str, name: str, published: bool, option: str) -> dict[str, Any]:
    """What must be named for an option to have its default and an effect."""
    return {**solver_of(kind, name, option), **({"published": True} if published else {})}


def named_defaults() -> dict[Case, Any]:
    """The default of every option that has one to name."""
    values = {case: shown(*case[:2], case[3], case[2]) for case in all_options()}
    # `eta` belongs to the published form. None is off by default.
    idle = {c for c in values if (c[3] == "eta" and not c[2]) or (c[2] and (c[1], c[3]) in UNPUBLISHED)}
    return {case: v for case, v in values.items() if v is not None and case not in idle}


DEFAULTS = named_defaults()


@pytest.mark.parametrize("case", DEFAULTS)
def test_naming_a_default_changes_no_option(case: Case, models: list[Path], tmp_path: Path) -> None:
    kind, name, _, option = case
    chosen, frame = registry.load(name, kind), frame_of(*case)
    plain, named = (
        with_experts(make_options(chosen, name, values), EXPERTS)
        for values in (frame, {**frame, option: DEFAULTS[case]})
    )
    if option == "shared_rank":  # which is found for each tensor where it is not named: the bits are the same
        one = merged(models, tmp_path / "plain", kind, name, frame)
        assert same_bits(one, merged(models, tmp_path / "named", kind, name, {**frame, option: DEFAULTS[case]}))
    else:
        assert plain == named
        # And with all that followed, as a manifest records it.
        assert make_options(chosen, name, dataclasses.asdict(plain)) == named


FRAMES = {f"{case[:2]} {sorted(frame_of(*case).items())}": (*case[:2], frame_of(*case)) for case in DEFAULTS}


@pytest.mark.parametrize(("kind", "name", "frame"), FRAMES.values(), ids=FRAMES)
def test_naming_all_defaults_changes_no_bit(
    kind: str, name: str, frame: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    together = {
        option: value
        for (k, n, published, option), value in DEFAULTS.items()
        if (k, n) == (kind, name) and frame_of(k, n, published, option) == frame
    }
    if asks_overlap(make_options(registry.load(name, kind), name, frame)):  # which the plan has
        plan = modelmerge.merge(models[0], models[1:], method=name, dry_run=True, **frame)
        together["scale"] = plan["groups"][0]["settings"]["scale"]
    plain = merged(models, tmp_path / "plain", kind, name, frame)
    assert same_bits(plain, merged(models, tmp_path / "named", kind, name, {**frame, **together}))


@pytest.mark.parametrize("name", ["ace", "apgd", "breadcrumbs", "consensus", "svc", "task-arithmetic", "ties", "wudi"])
def test_the_published_form_is_another_one(name: str, models: list[Path], tmp_path: Path) -> None:
    plain = merged(models, tmp_path / "a", "merge", name, {})
    assert not same_bits(plain, merged(models, tmp_path / "b", "merge", name, {"published": True}))


@pytest.mark.parametrize(("name", "option"), sorted(UNPUBLISHED))
def test_an_option_that_the_published_form_does_not_have_is_refused_there(name: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"^{option} has no effect with published$"):
        make_options(registry.load(name), name, {"published": True, option: shown("merge", name, option, False)})


OF_A_SOLVER = [
    (kind, name, option)
    for kind, name, published, option in all_options()
    if not published and solver_of(kind, name, option)
]


@pytest.mark.parametrize(("kind", "name", "option"), OF_A_SOLVER)
def test_an_option_of_a_solver_that_does_not_run_is_refused_at_its_default_too(
    kind: str, name: str, option: str
) -> None:
    mine = solver_of(kind, name, option)["solver"]
    other = next(solver for solver in SOLVERS if solver != mine)
    value = shown(kind, name, option, False) or 0.1
    ways: list[dict[str, Any]] = [{"solver": other}, {"solver": other, "published": True}]
    ways += [{}] if other == "exact" else [{"published": True}]
    for frame in ways:
        with pytest.raises(UsageError, match=f"^{option} has no effect with solver {other}$"):
            make_options(registry.load(name, kind), name, {**frame, option: value})


SCALED = [
    (name, published)
    for kind, name, published, option in all_options()
    if kind == "merge" and is_linear(registry.load(name), option)
]


@pytest.mark.parametrize(("name", "published"), SCALED)
def test_the_scale_is_linear_to_the_bit(name: str, published: bool, models: list[Path], tmp_path: Path) -> None:
    chosen = registry.load(name)
    # On a base of zeros the merged weight is the merged task vector, without the rounding of a sum.
    zeros = write(tmp_path / "zeros", {key: torch.zeros_like(tensor) for key, tensor in read(models[0]).items()})
    experts = [
        write(tmp_path / path.name, {key: tensor - read(models[0])[key] for key, tensor in read(path).items()})
        for path in models[1 : 1 + takes(name, EXPERTS)]
    ]
    values: dict[str, Any] = {"published": True} if published else {}
    values |= {"steps": 20} if published and "steps" in option_types(chosen.options) else {}
    linear = [key for key in read(models[0]) if len(read(models[0])[key].shape) == 2 or not chosen.matrices]
    modelmerge.merge(zeros, experts, tmp_path / "one", method=name, scale=1.0, **values)
    one = read(tmp_path / "one")
    assert any(one[key].any() for key in linear)
    for scale in (0.3, 1.7):
        modelmerge.merge(zeros, experts, tmp_path / "out", method=name, scale=scale, force=True, **values)
        got = read(tmp_path / "out")
        assert all(torch.equal(got[key], one[key] * scale) for key in linear), scale


@pytest.mark.parametrize("name", registry.names())
def test_every_scale_is_declared_linear(name: str) -> None:
    if "scale" in option_types(registry.load(name).options):
        assert is_linear(registry.load(name), "scale")


def test_the_options_of_a_method_that_needs_data_are_the_same_with_a_default_named() -> None:
    for name in set(registry.names()) - set(registry.data_free()):
        chosen = registry.load(name)
        for option in option_types(chosen.options):
            named = make_options(chosen, name, {option: shown("merge", name, option, False)})
            assert named == chosen.options()
