"""Units: every tensor is in one, and together they read what one process reads."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest

from modelmerge.engine.loader import Loader
from modelmerge.engine.parallel import in_order
from modelmerge.engine.pieces import Piece, Pieces, Sample
from modelmerge.engine.units import cut, hash_units, shard_units
from modelmerge.plan.recipe import Recipe
from modelmerge.verbs.prepare import Prepared, prepare


def ready(models: list[Path], method: str = "ties") -> Prepared:
    base, *experts = map(str, models)
    return prepare(Recipe(method=method, base=base, experts=tuple(experts), max_shard_size="2KB"), device="cpu")


def test_every_tensor_is_in_one_unit(models: list[Path]) -> None:
    job = ready(models).job
    tensors = [tensor for tensor in job.plan.in_order() if tensor.numel]
    for units in (cut("survey:ties-0:0", job.plan, tensors, 2000), shard_units(job, tensors)):
        assert len(units) > 2
        assert len({unit.name for unit in units}) == len(units)
        assert [tensor.name for unit in units for tensor in unit.tensors] == [tensor.name for tensor in tensors]
    assert {unit.name for unit in shard_units(job, tensors)} == {
        f"shard:{shard.filename}" for shard in job.plan.layout.shards
    }
    assert sum(unit.nbytes for unit, _, _ in hash_units(job.plan)) == sum(
        (path / "model.safetensors").stat().st_size for path in models
    )
    job.plan.close()


@pytest.mark.parametrize("share", [1, 2, 3, 7])
def test_units_read_the_sample_that_one_process_reads(share: int, models: list[Path]) -> None:
    job = ready(models).job
    tensors = [tensor for tensor in job.plan.in_order() if tensor.numel and tensor.action != "copy"]
    places = []
    for unit in cut("survey:ties-0:0", job.plan, tensors, 1):
        pieces = Pieces(unit.tensors, 50, share=share, before=len(Pieces(unit.before, 50)))
        assert len(list(pieces)) == len(pieces)
        places += [(piece.tensor.name, piece.start) for piece in pieces]
    assert places == [(piece.tensor.name, piece.start) for piece in Pieces(tensors, 50, share=share)]
    job.plan.close()


def test_methods_that_solve_cost_more_than_methods_that_add(models: list[Path]) -> None:
    costs = {}
    for method in ("task-arithmetic", "tsv-m", "kron"):
        job = ready(models, method).job
        costs[method] = sum(unit.cost for unit in shard_units(job, list(job.plan.tensors.values())))
        job.plan.close()
    assert costs["task-arithmetic"] < costs["tsv-m"] < costs["kron"]


def test_runs_of_a_sample_that_are_the_same_are_all_handed_on(models: list[Path]) -> None:
    """While the first is waited for, the others come; of few entries, some of them twice."""
    job = ready(models).job
    pieces = Sample([job.plan.tensors["model.layers.0.norm.weight"]])
    source, begun, taken = dataclasses.replace(job.source, workers=2), threading.Event(), list[int]()

    def look(piece: Piece, loader: Loader) -> int:
        if not begun.is_set():
            begun.set()
            time.sleep(0.2)
        return piece.start

    def run() -> None:
        in_order(source, pieces, look, lambda piece, start: taken.append(start))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert taken == [piece.start for piece in pieces]
    assert len(set(taken)) < len(taken)
    job.plan.close()
