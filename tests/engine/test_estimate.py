"""The time that a plan tells. How near it comes, `python -m tests.benchmarks.estimates` measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelmerge
from modelmerge.cli import main
from modelmerge.engine import estimate
from modelmerge.methods import registry
from modelmerge.methods.options import make_options
from modelmerge.methods.work import Work, eigen, product
from modelmerge.text import duration
from tests.support.checkpoints import family, write

MATRICES = [name for name in registry.names("merge") if registry.load(name).matrices]


def test_work_is_told_at_the_rate_of_each_kind() -> None:
    work = product(2, 3, 4) + eigen(2) * 0.5 + Work(double=10.0, moved=7.0)
    assert work == Work(48.0, 10.0, 36.0, 7.0)
    assert work.seconds(Work(48.0, 5.0, 12.0, 7.0)) == 1.0 + 2.0 + 3.0 + 1.0


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("published", [False, True])
def test_more_rows_columns_or_experts_are_more_work(name: str, published: bool) -> None:
    method = registry.load(name)
    if published and not hasattr(method.options(), "published"):
        pytest.skip("it has one form")
    options = make_options(method, name, {"published": True} if published else {})
    cost = lambda m, n, tasks: method.work(options, m, n, tasks).cost  # noqa: E731
    for m, n in ((300, 200), (200, 300)):
        assert cost(m, n, 4) < cost(2 * m, n, 4)
        assert cost(m, n, 4) < cost(m, 2 * n, 4)
        assert cost(m, n, 4) <= cost(m, n, 8)


@pytest.mark.parametrize("name", [name for name in MATRICES if registry.load(name).work_of_products])
def test_products_of_few_directions_are_less_work(name: str) -> None:
    method = registry.load(name)
    of_products = method.work_of_products
    assert of_products is not None
    cost = lambda k: of_products(method.options(), 2000, 3000, 4, k).cost  # noqa: E731
    assert cost(16) < cost(64) < cost(512) < method.work(method.options(), 2000, 3000, 4).cost


def test_a_plan_counts_the_directions_of_adapters(tmp_path: Path) -> None:
    """Some tenths of a second are hashing and moving bytes, which both have."""
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    base = write(tmp_path / "base", {f"{name}.weight": torch.randn(1024, 1024, generator=generator)})
    adapters = []
    for seed in "ab":
        sides = {side: torch.randn(shape, generator=generator) for side, shape in (("A", (4, 1024)), ("B", (1024, 4)))}
        folder = write(tmp_path / seed, {f"base_model.model.{name}.lora_{s}.weight": t for s, t in sides.items()})
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        adapters.append(folder)
        modelmerge.merge(base, [folder], tmp_path / "whole" / seed, method="average")
    wholes = [base, *(tmp_path / "whole" / seed for seed in "ab")]
    assert plan_of([base, *adapters], "kron")["seconds"] < 0.2 * plan_of(wholes, "kron")["seconds"]
    # A method for single entries has as many of them to look at.
    assert 0.5 < plan_of([base, *adapters], "pcb")["seconds"] / plan_of(wholes, "pcb")["seconds"] < 2.0


def plan_of(models: list[Path], method: str, **options: Any) -> dict[str, Any]:
    return modelmerge.merge(models[0], models[1:], method=method, dry_run=True, **options)


def test_a_plan_tells_the_time_in_numbers_and_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = family(tmp_path)
    plain, dear = plan_of(models, "average"), plan_of(models, "kron")
    assert 0 < plain["seconds"] < dear["seconds"]
    assert plan_of(models, "average", disentangle=["apgd"])["seconds"] > plain["seconds"]
    assert main(["merge", "kron", *map(str, models), "-o", str(tmp_path / "out"), "-n"]) == 0
    assert "about 1 s on cpu, beside the start and downloads" in capsys.readouterr().out


def test_what_goes_to_the_cpu_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = family(tmp_path)
    matrix = "model.layers.0.q_proj.weight"
    monkeypatch.setattr(estimate, "beyond_device", lambda job: frozenset([matrix]))
    monkeypatch.setattr("modelmerge.verbs.prepare.beyond_device", lambda job: frozenset([matrix]))
    remarks = plan_of(models, "kron")["remarks"]
    assert "1 weight does not fit on cpu and is merged on the CPU, which takes about 1 s" in remarks


def test_rates_are_those_of_a_machine() -> None:
    rates = estimate.rates_of(torch.device("cpu"), 64)
    assert min(rates.single, rates.double, rates.eigen, rates.moved) > 1e6


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h"), (2e5, "2.3 days")],
)
def test_a_time_is_told_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
