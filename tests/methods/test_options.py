"""The one parser of option values, and the options of methods by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from modelmerge.errors import UsageError, spelled
from modelmerge.methods import registry
from modelmerge.methods.options import change_options, make_options, read_option, read_value, read_values, with_experts

Choice = Literal["sum", "mean"]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("0.1", float, 0.1),
        (" 1e-3 ", float, 1e-3),
        ("-2", float, -2.0),
        ("3", int, 3),
        ("1e3", int, 1000),
        ("true", bool, True),
        ("false", bool, False),
        ("sum", Choice, "sum"),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
        ("mean", Choice | None, "mean"),
        ("a word", str, "a word"),
    ],
)
def test_a_text_stands_for_a_value(text: str, kind: Any, value: Any) -> None:
    got = read_value("scale", text, kind)
    assert (got, type(got)) == (value, type(value))
    assert read_values("scale", text, kind) == (value,)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("much", float, "must be a float, not 'much'"),
        ("", float, "must be a float, not ''"),
        ("nan", float, "must be a float, not 'nan'"),
        ("inf", float, "must be finite, not inf"),
        ("1e999999", int, "must be finite, not 1e999999"),
        ("1.5", int, "must be an integer, not 1.5"),
        ("none", float, "must be a float, not 'none'"),
        ("yes", bool, "must be true or false, not 'yes'"),
        ("True", bool, "must be true or false, not 'True'"),
        ("max", Choice | None, "must be one of sum, mean, not 'max'"),
    ],
)
def test_a_text_that_stands_for_no_value_is_refused(text: str, kind: Any, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_value("norm_cap", text, kind)
    assert refused.value.message == f"norm_cap {says}"
    assert spelled(refused.value.template, lambda name: "--" + name.replace("_", "-")) == f"--norm-cap {says}"


def test_an_option_is_read_by_its_type_and_checked() -> None:
    apgd = registry.load("apgd")
    assert read_option(apgd, "apgd", "shared_rank", "3") == 3
    assert read_option(apgd, "apgd", "published", "true") is True
    assert read_option(apgd, "apgd", "norm_cap", "none") is None
    with pytest.raises(UsageError, match="density must be above 0 and at most 1, not 2"):
        read_option(apgd, "apgd", "density", "2")
    for wrong in (
        lambda: read_option(apgd, "apgd", "sharedrank", "3"),
        lambda: make_options(apgd, "apgd", {"shard": 3}),
    ):
        with pytest.raises(UsageError, match="'apgd' has no option 'sha") as refused:
            wrong()
        assert refused.value.hint == "did you mean 'shared_rank'?"
    awd = registry.load("awd", "transform")
    assert read_option(awd, "awd", "granularity", "row") == "row"


def test_a_change_to_recorded_options_lets_go_of_what_followed_from_the_number_of_experts() -> None:
    ties = registry.load("ties")
    recorded = dataclasses.asdict(with_experts(make_options(ties, "ties", {"density": 0.5}), 4))
    assert recorded["scale"] == 0.5
    changed = change_options(ties, "ties", recorded, {"reduce": "mean"}, 4)
    assert (changed.scale, changed.density) == (1.0, 0.5)
    assert change_options(ties, "ties", recorded, {"published": True}, 4).scale == 0.3
    named = dataclasses.asdict(make_options(ties, "ties", {"scale": 0.7}))
    assert change_options(ties, "ties", named, {"published": True}, 4).scale == 0.7


@pytest.mark.parametrize(("experts", "scale"), [(1, 1.0), (2, 0.707), (4, 0.5), (8, 0.354), (16, 0.25)])
def test_the_scale_of_a_sum_follows_from_the_number_of_experts(experts: int, scale: float) -> None:
    for name in ("task-arithmetic", "ties", "breadcrumbs", "consensus"):
        assert with_experts(make_options(registry.load(name), name, {}), experts).scale == scale
    assert with_experts(make_options(registry.load("kron"), "kron", {}), experts).scale == 1.0
