"""The sets of experts are what the defaults are chosen on: their pictures, their keeping, and how good they are."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch

from tests.benchmarks import grid
from tests.benchmarks.choose import vectors_of
from tests.benchmarks.experts import SETS, ExpertSet, build, pictures, subset

TASKS = [*pictures.FIRST.items(), *pictures.SECOND.items()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def own(expert_set: ExpertSet) -> dict[str, float]:
    return {name: expert_set.evaluate(state, "test")[name] for name, state in expert_set.experts.items()}


def length(expert_set: ExpertSet, name: str) -> float:
    return (
        sum((expert_set.experts[name][key] - tensor).square().sum().item() for key, tensor in expert_set.base.items())
        ** 0.5
    )


@pytest.mark.parametrize(("name", "task"), TASKS, ids=[name for name, _ in TASKS])
def test_pictures_are_finite_and_new_in_every_part(name: str, task: pictures.Task) -> None:
    drawn = {}
    for part in ("train", "validation", "test"):
        images, labels = task.draw(torch.Generator().manual_seed(0), 300, part, 0.3)
        assert images.shape == (300, 3, pictures.SIZE, pictures.SIZE)
        assert images.isfinite().all()
        assert set(labels.tolist()) == set(range(task.labels))
        drawn[part] = images
    # Where pictures are taken and not made, the same draw takes others for each part.
    taken = name in ("digits", "mirrored", "photographs", "filters")
    assert torch.equal(drawn["train"], drawn["test"]) != taken
    assert torch.equal(drawn["train"], drawn["validation"]) != taken


def test_a_set_is_trained_once_and_its_subset_is_judged_on_its_tasks(cache: Path) -> None:
    first = build("digits", 0, cache)
    files = {file: file.stat().st_mtime_ns for file in (cache / "digits-0").iterdir()}
    again = build("digits", 0, cache)
    assert {file: file.stat().st_mtime_ns for file in (cache / "digits-0").iterdir()} == files
    for name, expert in first.experts.items():
        assert all(torch.equal(expert[key], again.experts[name][key]) for key in expert)
    few = subset(first, list(first.experts)[1:3])
    assert list(few.experts) == list(first.experts)[1:3]
    whole = first.evaluate(few.base, "test")
    assert few.evaluate(few.base, "test") == {name: whole[name] for name in few.experts}


def test_figures_are_kept_and_the_table_marks_what_is_level_with_the_best(cache: Path) -> None:
    methods = ["average", "kron"]
    figures = grid.figures_of("digits", 0, methods, [""], cache)
    (file,) = cache.glob("figures-*.json")
    written = file.stat().st_mtime_ns
    assert grid.figures_of("digits", 0, methods, [""], cache) == figures
    assert file.stat().st_mtime_ns == written
    lines = grid.table({"digits": [figures]}, "", methods)
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| (each expert on its own task)", "| (base)", "| kron", "| average", "| (standard error)"
    ]  # fmt: skip
    assert lines[4].count("*") == 2  # at the defaults and at the best scale
    assert "*" not in lines[5]
    (_, _, lead) = grid.leads({"digits": [figures]}, "", methods, "kron")
    assert lead.startswith("| average | +")
    column = {
        "best": [{"one": 90.0, "two": 80.0}],
        "level": [{"one": 88.0, "two": 81.0}],
        "behind": [{"one": 80.0, "two": 71.0}],
    }
    assert grid.level(column) == {"best", "level"}
    assert grid.behind(column["best"], column["behind"]) == (9.5, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETS))
def test_experts_are_better_than_the_base_and_merges_lie_between(name: str, cache: Path) -> None:
    try:
        expert_set = build(name, 0, cache)
    except ModuleNotFoundError as error:  # the model is a package of its own
        pytest.skip(str(error))
    base, experts = expert_set.evaluate(expert_set.base, "test"), own(expert_set)
    assert list(base) == list(expert_set.experts)
    assert mean(experts.values()) > mean(base.values()) + 0.05
    vectors = vectors_of(expert_set)
    merges = [mean(expert_set.evaluate(grid.full(vectors, method), "test").values()) for method in ("average", "kron")]
    assert mean(base.values()) < max(merges) < mean(experts.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "far"), [("unequal", 1), ("unequal-2", 2)])
def test_unequal_experts_are_those_of_the_even_set_but_for_some_that_went_far(name: str, far: int, cache: Path) -> None:
    even, unequal = build("vision", 1, cache), build(name, 1, cache)
    ratios = {task: length(unequal, task) / length(even, task) for task in even.experts}
    assert len([ratio for ratio in ratios.values() if 5 <= ratio <= 9]) == far
    assert len([ratio for ratio in ratios.values() if ratio == 1]) == len(ratios) - far
    assert mean(own(unequal).values()) > mean(own(even).values()) - 0.01
    # All others are read from the cache.
    assert len(list((cache / f"{name}-1").iterdir())) == 1
