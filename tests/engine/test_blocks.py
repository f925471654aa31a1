"""Nothing that a run holds grows with the number of blocks: Llama 3.1 405B and eight experts, as bare headers."""

from __future__ import annotations

import math
import random
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelmerge.checkpoint.opening import as_references, open_models
from modelmerge.engine import job, parallel, vectors
from modelmerge.engine.job import Source
from modelmerge.engine.merge import run
from modelmerge.engine.parallel import in_order, source_of
from modelmerge.engine.pieces import Pieces, Sample
from modelmerge.engine.rounding import ExactSum
from modelmerge.engine.units import Alone
from modelmerge.errors import CheckpointError
from modelmerge.plan.recipe import Recipe
from modelmerge.plan.tensors import make_plan
from modelmerge.progress import SILENT
from modelmerge.verbs.prepare import prepare
from tests.benchmarks.promises import shapes, write
from tests.support.checkpoints import family

EXPERTS, LAYERS = 8, 126


class Unread:
    """A loader that reads nothing: of every piece there is one element."""

    def __init__(self, source: Any, *capacity: Any) -> None:
        self._tasks = len(source.plan.experts)

    def load(self, piece: Any, *, check: bool) -> tuple[Tensor, Tensor]:
        return torch.ones(1), torch.linspace(0.5, 1.5, self._tasks)[:, None].clone()

    def stored(self, expert: Any, piece: Any) -> Tensor:
        return torch.ones(1, dtype=torch.bfloat16)

    def copy(self, piece: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)


class Nowhere:
    """An output that writes nothing, and knows how many blocks came."""

    def __init__(self) -> None:
        self.blocks, self._mutex = 0, threading.Lock()

    def is_finished(self, tensor: str) -> bool:
        return False

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        with self._mutex:
            self.blocks += 1

    def scratch(self, size: int) -> None:
        raise AssertionError("nothing is written")


def models(folder: Path, layers: int) -> list[str]:
    tensors = shapes(16384, 53248, layers, 1024)
    del tensors["lm_head.weight"]  # of zeros, it would be taken for the other table
    return [write(folder / name, tensors) for name in ("base", *(f"expert-{i}" for i in range(EXPERTS)))]


def merge(paths: list[str], method: str, disentangle: tuple[str, ...] = ()) -> int:
    recipe = Recipe(method=method, base=paths[0], experts=tuple(paths[1:]), disentangle=disentangle)
    prepared, output = prepare(recipe, device="cpu"), Nowhere()
    findings = run(prepared.job, output, SILENT)
    assert findings.rounding is not None
    assert findings.rounding.relative_error() is not None
    prepared.close()
    return output.blocks


def no_room(nbytes: int) -> Any:
    raise AssertionError("nothing is kept")


def extract(paths: list[str]) -> int:
    plan = make_plan(*open_models(paths[0], as_references(paths[1:])))
    source = source_of(plan, "cpu")
    measured = vectors.measure(source, plan.select("merge"), Alone(no_room), SILENT)
    blocks = sum(each.nonzero[0] for each in measured.values())  # every block has one element
    plan.close()
    return blocks


RUNS = {
    "task-arithmetic": lambda paths: merge(paths, "task-arithmetic"),
    "ties": lambda paths: merge(paths, "ties"),
    "model-stock": lambda paths: merge(paths, "model-stock"),
    "karcher": lambda paths: merge(paths, "karcher"),
    "awd": lambda paths: merge(paths, "average", ("awd steps=1",)),
    "extract": extract,
}


@pytest.mark.parametrize("name", ["task-arithmetic", "model-stock", "awd", "extract"])
def test_more_blocks_hold_no_more_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(RUNS[name], models(tmp_path, 1), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_more_blocks_of_all_layers_hold_no_more_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(RUNS[name], models(tmp_path, LAYERS if name in ("task-arithmetic", "extract") else 2), monkeypatch)


def check(go: Any, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times as many blocks, and the same peak but for what the threads happen to be at."""
    monkeypatch.setattr(parallel, "Loader", Unread)
    monkeypatch.setattr(job, "AT_ONCE", 0)  # what comes whole has a loader of its own
    peaks, counts = [], []
    for block in (1 << 24, 1 << 24, 1 << 21):
        monkeypatch.setattr(job, "CPU_BLOCK", block)
        tracemalloc.start()
        counts.append(go(paths))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    _, few, many = counts  # the first run fills caches
    assert many > 7 * few
    assert peaks[2] - peaks[1] < 64 * (many - few)


@pytest.mark.parametrize("share", [1, 3, 32])
@pytest.mark.parametrize("by_rows", [False, True])
def test_pieces_are_all_of_every_tensor_or_a_regular_part(share: int, by_rows: bool, tmp_path: Path) -> None:
    base, *experts = family(tmp_path)
    plan = make_plan(*open_models(str(base), as_references(experts)))
    tensors = [tensor for tensor in plan.tensors.values() if tensor.numel]
    pieces = Pieces(tensors, 37, lambda tensor: by_rows, share)
    every = [place for tensor in tensors for place in cuts(tensor.name, tensor.numel, step_of(tensor, by_rows))]
    assert [(piece.tensor.name, piece.start, piece.stop) for piece in pieces] == every[::share]
    assert len(pieces) == len(every[::share])
    assert pieces.largest == max(stop - start for _, start, stop in every)
    assert all(piece.sampled == (share > 1) for piece in pieces)
    plan.close()


def step_of(tensor: Any, by_rows: bool) -> int:
    width = tensor.row if by_rows or len(tensor.shape) == 2 else 1
    return max(37 // width, 1) * width


def cuts(name: str, count: int, step: int) -> list[tuple[str, int, int]]:
    return [(name, start, min(start + step, count)) for start in range(0, count, step)]


def test_an_exact_sum_is_that_of_fsum_in_any_order() -> None:
    numbers = [random.Random(0).uniform(-1, 1) * 10.0**e for e in range(-320, 300)] + [5e-324, 1e308, -1e308, 0.0]
    for seed in range(3):
        random.Random(seed).shuffle(numbers)
        total = ExactSum()
        for number in numbers:
            total.add(number)
        assert float(total) == math.fsum(numbers)


def test_an_exact_sum_loses_nothing_to_threads() -> None:
    total = ExactSum()
    workers = [threading.Thread(target=lambda: [total.add(0.1) for _ in range(2000)]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert float(total) == math.fsum([0.1] * 8000)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_an_exact_sum_with_what_is_not_finite_is_not_finite(number: float) -> None:
    total = ExactSum()
    total.add(1.0)
    total.add(number)
    assert not math.isfinite(float(total))


def test_pieces_are_taken_up_in_their_order_and_workers_do_not_run_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 4)
    base, *experts = family(tmp_path)
    plan = make_plan(*open_models(str(base), as_references(experts)))
    source, tensors = Source(plan, torch.device("cpu"), 3), [t for t in plan.select("merge") if t.numel]
    done, taken, ahead = [], [], []

    def look(piece: Any, loader: Any) -> int:
        time.sleep(0.02 if not done else 0.0)  # the others could all be done meanwhile
        done.append(piece.start)
        return piece.start

    def take(piece: Any, start: int) -> None:
        assert piece.start == start
        taken.append((piece.tensor.name, start))
        ahead.append(len(done) - len(taken))

    in_order(source, Pieces(tensors, 4), look, take)
    assert taken == [(piece.tensor.name, piece.start) for piece in Pieces(tensors, 4)]
    assert len(taken) > 100
    assert max(ahead) <= 3 * 8
    plan.close()


def test_a_run_that_a_sample_has_several_times_is_taken_each_time(tmp_path: Path) -> None:
    """The samples of small tensors repeat runs, and workers may have done several before the first is taken."""
    base, *experts = family(tmp_path)
    plan = make_plan(*open_models(str(base), as_references(experts)))
    source, sample = Source(plan, torch.device("cpu"), 2), Sample([t for t in plan.select("merge") if t.numel])
    done, taken = [], []

    def look(piece: Any, loader: Any) -> int:
        time.sleep(0.02 if not done else 0.0)
        done.append(piece.start)
        return piece.start

    def take(piece: Any, start: int) -> None:
        taken.append((piece.tensor.name, start))

    thread = threading.Thread(target=in_order, args=(source, sample, look, take), daemon=True)
    thread.start()
    thread.join(60)
    want = [(piece.tensor.name, piece.start) for piece in sample]
    assert taken == want
    assert len(set(want)) < len(want)
    plan.close()


@pytest.mark.parametrize("where", ["look", "take"])
def test_an_error_ends_all_that_goes_in_order(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "CPU_BLOCK", 4)
    base, *experts = family(tmp_path)
    plan = make_plan(*open_models(str(base), as_references(experts)))
    source, tensors = Source(plan, torch.device("cpu"), 3), [t for t in plan.select("merge") if t.numel]
    seen = []

    def fail(piece: Any, *rest: Any) -> None:
        seen.append(piece)
        if len(seen) == 30:
            raise CheckpointError("no more")

    steps = {"look": lambda piece, loader: None, "take": lambda piece, result: None} | {where: fail}
    with pytest.raises(CheckpointError, match="no more"):
        in_order(source, Pieces(tensors, 4), steps["look"], steps["take"])
    assert len(seen) < 60
    plan.close()
