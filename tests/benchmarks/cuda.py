"""What a card says of this package, in one run of minutes: are its results the CPU's, how fast, how much memory.

    python -m tests.benchmarks.cuda --minutes 7 --device cuda:0 --output DIR

Sections in the order of what they are worth; each result is written to DIR at once, and what is there is not done
again: a run that ends early is taken up by the same command. Every section prints `passed`, `failed`, or `not run` and
why; the exit code is 1 where a comparison failed. `--small` is for trying it out. RESULTS-cuda.md beside this file is
written by a run on a real card alone, which has not been made yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import modelmerge
from modelmerge.devices import KINDS, find_device
from modelmerge.engine.estimate import rates_of
from modelmerge.errors import DeviceError, ModelMergeError
from modelmerge.methods import registry
from modelmerge.methods.contract import Context
from modelmerge.methods.options import make_options
from tests.benchmarks.apgd_speed import BLOCK, published, task_vectors
from tests.benchmarks.generate import generate
from tests.support.checkpoints import family, read
from tests.support.methods import choices, context_of, takes

HERE = Path(__file__).parent
_LONG = 2.0  # seconds
EXACT, CLOSE = 1e-5, 1e-4  # of methods that work entry by entry, and of those that decompose or descend
MORE: dict[str, list[dict[str, Any]]] = {
    "ace": [{"published": True}],
    "actmat": [{"density": 0.5}],
    "apgd": [{"published": True, "steps": 50}, {"solver": "adam", "steps": 50}],
    "svc": [{"published": True}, {"of": "ties"}, {"of": "kron"}],
    "wudi": [{"solver": "adam", "steps": 50}],
}
TIMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("apgd", {}), ("apgd", {"published": True}), ("kron", {}), ("tsv-m", {}), ("wudi", {}), ("ties", {}),
    ("task-arithmetic", {}),
)  # fmt: skip
# By model, tasks and the shapes of one block's weights; 7B and 70B are Llama's.
BLOCKS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "ViT-B/32, 8 tasks": (8, BLOCK),
    "ViT-L/14, 8 tasks": (8, ((1024, 1024),) * 4 + ((4096, 1024), (1024, 4096))),
    "Flan-T5-base, 8 LoRA": (8, ((768, 768),) * 4 + ((2048, 768), (768, 2048))),
    "7B, 2 tasks": (2, ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)),
    "70B, 2 tasks": (2, ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192))),
}
SMALL_BLOCKS = {"small, 3 tasks": (3, ((48, 32), (32, 48)))}
# Small matrices that go through a method at once: tasks, how many, their shape, and the rank of adapters.
BATCHES: dict[str, tuple[int, int, tuple[int, int], int | None]] = {
    "ViT-B/32, 8 tasks": (8, 14, (768, 768), None),
    "ViT-B/32, 8 LoRA of rank 16": (8, 14, (768, 768), 16),
}
SMALL_BATCHES = {"small, 3 tasks": (3, 4, (48, 32), None), "small, 3 LoRA of rank 2": (3, 4, (48, 32), 2)}
MERGED = ("task-arithmetic", "ties", "apgd", "kron")

Result = dict[str, Any]
Item = tuple[str, Callable[[], Result]]


@dataclasses.dataclass(frozen=True)
class Run:
    """Where it runs, whether it is only tried out, and when it has to be over."""

    device: torch.device
    small: bool
    deadline: float

    def synchronised(self) -> float:
        """The time, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Seconds, the median of some; once before, for what is loaded at first, unless that would take long."""
        started = self.synchronised()
        work()
        first, took = self.synchronised() - started, list[float]()
        if first > _LONG:
            return first
        for _ in range(1 if self.small else repeats):
            started = self.synchronised()
            work()
            took.append(self.synchronised() - started)
        return median(took)

    def peak(self, work: Callable[[], Any]) -> int | None:
        """The most bytes that torch holds on a card while it works; None where there is no card."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return int(torch.cuda.max_memory_allocated(self.device))


def distance(there: Tensor, here: Tensor) -> float:
    """The relative distance of the device's result from the CPU's."""
    return float((there.cpu().double() - here.double()).norm() / here.double().norm().clamp(min=1e-30))


def agreed(far: float, limit: float) -> Result:
    return {"distance": far, "limit": limit, "failed": not far <= limit}


def agreement(run: Run) -> Iterator[Item]:
    """Every method with each of its choices, and the transforms, on one weight."""
    shape = (24, 18) if run.small else (256, 192)
    for name in registry.names():
        defaults: list[dict[str, Any]] = [{}]
        for values in defaults if run.small else (*choices(registry.load(name)), *MORE.get(name, ())):
            label = " ".join([name, *(f"{option}={value}" for option, value in values.items())])
            yield label, lambda name=name, values=values: _method(run, name, values, shape)
    for name, values in (("apgd", {}), ("apgd", {"correction": "task"}), ("awd", {"steps": 20})):
        label = " ".join(["disentangle", name, *(f"{option}={value}" for option, value in values.items())])
        yield label, lambda name=name, values=values: _transform(run, name, values, shape)


def _method(run: Run, name: str, values: Result, shape: tuple[int, int]) -> Result:
    chosen, taus = registry.load(name), task_vectors(takes(name, 4), *shape, torch.device("cpu"))
    options = make_options(chosen, name, values)
    context = context_of(chosen, options, taus)
    here = chosen.apply(taus, options, context)
    return agreed(distance(_apply(run.device, name, options, taus, context), here), CLOSE if chosen.matrices else EXACT)


def _apply(device: torch.device, name: str, options: Any, taus: Tensor, context: Context) -> Tensor:
    fields = {field: getattr(context, field) for field in ("measured", "base")}
    there = {field: value.to(device) for field, value in fields.items() if value is not None}
    return registry.load(name).apply(taus.to(device), options, dataclasses.replace(context, **there))


def _transform(run: Run, name: str, values: Result, shape: tuple[int, int]) -> Result:
    spec, taus = registry.load(name, "transform"), task_vectors(4, *shape, torch.device("cpu"))
    options: Any = make_options(spec, name, values)
    context = Context(tensor="w", weights=(1.0,) * 4, experts=("a", "b", "c", "d"))

    def found(vectors: Tensor) -> Tensor:
        by: Any = spec.by
        if name == "apgd":
            return by.find(vectors, options, context).matrices
        return by.solve(by.measure(vectors.flatten(1)[:, None]), options, None).coefficients

    return agreed(distance(found(taus.to(run.device)), found(taus)), CLOSE)


def cards(run: Run) -> Iterator[Item]:
    """A card that is not there is an error; one that is not the first does the same."""
    kind = run.device.type
    count = KINDS[kind].count()

    def absent() -> Result:
        try:
            find_device(f"{kind}:{count}")
        except DeviceError as error:
            return {"error": error.message, "failed": False}
        return {"failed": True}

    def other() -> Result:
        if count < 2:
            return {"failed": False, "remark": "there is one card"}
        last = dataclasses.replace(run, device=torch.device(kind, count - 1))
        return _method(last, "apgd", {}, (24, 18))

    yield f"{kind}:{count}", absent
    yield "the last card", other


def speed(run: Run) -> Iterator[Item]:
    """One block of a model: seconds, and rates beside a plain product and a copy of the same minute."""
    for label, (tasks, shapes) in (SMALL_BLOCKS if run.small else BLOCKS).items():
        for name, values in TIMED:
            yield (
                f"{label}: {_named(name, values)}",
                lambda *words, n=name, v=values, t=tasks, s=shapes: _timed(run, n, v, t, s),
            )


def _named(name: str, values: Result) -> str:
    return " ".join([name, *(f"--{option}" for option in values)])


def _timed(run: Run, name: str, values: Result, tasks: int, shapes: Sequence[tuple[int, int]]) -> Result:
    chosen = registry.load(name)
    options = make_options(chosen, name, values)
    seconds = planned = flops = read_bytes = 0.0
    rates = rates_of(run.device, 64 if run.small else 512)
    promised, taken = 0, 0
    for (m, n), times in {shape: shapes.count(shape) for shape in shapes}.items():
        taus = _noise(tasks, m, n, run.device)
        limits = taus.abs().flatten(1)[:, ::97].kthvalue(max(int(0.7 * m * n / 97), 1), dim=1).values
        context = Context(
            tensor="w", weights=(1.0,) * tasks, experts=tuple(f"e{i}" for i in range(tasks)), base=taus[0] * 30,
            measured=limits if chosen.survey(options, {}) else None,
        )  # fmt: skip
        seconds += times * run.timed(lambda t=taus, c=context: chosen.apply(t, options, c))
        work = chosen.work(options, m, n, tasks)
        flops += times * (work.single + work.double + work.eigen)
        planned += times * work.seconds(rates)
        read_bytes += times * taus.nbytes
        copies, squares = chosen.workspace(options, tasks), chosen.squares(options, m, n, tasks)
        workspace = 4 * m * n * (tasks + 2 + copies) + 8 * squares
        promised = max(promised, int(workspace))
        taken = max(taken, run.peak(lambda t=taus, c=context: chosen.apply(t, options, c)) or 0)
    product, copied = _rates(run)
    return {
        "seconds": seconds, "seconds planned": planned,
        "TFLOP/s": flops / seconds / 1e12, "GB/s": read_bytes / seconds / 1e9,
        "TFLOP/s of a product": product / 1e12, "GB/s of a copy": copied / 1e9, "bytes promised": promised,
        "bytes taken": taken, "failed": taken > promised,
    }  # fmt: skip


def _noise(tasks: int, m: int, n: int, device: torch.device) -> Tensor:
    """Task vectors [T, m, n] with a part in common, made where they are."""
    shared = torch.randn(m, n, device=device)
    return torch.stack([torch.randn(m, n, device=device).add_(shared, alpha=0.3) for _ in range(tasks)]).mul_(5e-4)


def batches(run: Run) -> Iterator[Item]:
    """Every method that takes batches: are several matrices at once what each is alone, and how much faster?"""
    for label, asked in (SMALL_BATCHES if run.small else BATCHES).items():
        for name in registry.names():
            if registry.load(name).batches(registry.load(name).options()):
                yield f"{label}: {name}", lambda *_, n=name, a=asked: _batch(run, n, *a)


def _batch(run: Run, name: str, tasks: int, count: int, shape: tuple[int, int], rank: int | None) -> Result:
    chosen, (m, n) = registry.load(name), shape
    options, factors = chosen.options(), None
    taus = torch.stack([_noise(tasks, m, n, run.device) for _ in range(count)], dim=1)
    if rank is not None:
        sides = torch.randn(tasks, count, m + n, rank, device=run.device).mul_(0.02).split([m, n], dim=2)
        factors = tuple((left, right.mT) for left, right in zip(*sides, strict=True))
        taus = torch.stack([left @ right for left, right in factors])
    together = Context(
        tensor="w", weights=(1.0,) * tasks, experts=tuple(f"e{i}" for i in range(tasks)), base=taus[0] * 30,
        factors=factors,
    )  # fmt: skip

    def one_by_one() -> Tensor:
        each = []
        for i in range(count):
            pairs = factors and tuple((left[i], right[i]) for left, right in factors)
            alone = dataclasses.replace(together, base=together.base[i], factors=pairs)  # type: ignore[index]
            each.append(chosen.apply(taus[:, i], options, alone))
        return torch.stack(each)

    def at_once() -> Tensor:
        return chosen.apply(taus, options, together)

    far = distance(at_once(), one_by_one().cpu())
    alone, batch = run.timed(one_by_one), run.timed(at_once)
    return agreed(far, CLOSE) | {
        "matrices": count,
        "seconds one by one": alone,
        "seconds": batch,
        "ratio": alone / batch,
    }


def _rates(run: Run) -> tuple[float, float]:
    """FLOP/s of a float32 product and bytes/s of a copy, read and written."""
    side = 64 if run.small else 8192
    a, b = torch.randn(2, side, side, device=run.device)
    target = torch.empty_like(a)
    return 2 * side**3 / run.timed(lambda: a @ b), 2 * a.nbytes / run.timed(lambda: target.copy_(a))


def files(run: Run) -> Iterator[Item]:
    """Whole merges, from files and to files, on the card and on the CPU."""
    for label, kind, size, experts in (("8 x ViT-B/32", "clip", 0, 8), ("2 x 7B shapes, 8 GB", "llama", 8 * 10**9, 2)):
        if not run.small or kind == "clip":
            yield label, lambda *_, k=kind, s=size, e=experts: _merges(run, k, s, e)


def _merges(run: Run, kind: str, size: int, count: int) -> Result:
    figures: Result = {"failed": False}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if run.small:
            base, *experts = family(root / "models", experts=2)
        else:
            generate(kind, root, size=size, experts=count)
            base, *experts = (root / "single" / name for name in ("base", *(f"expert_{i + 1}" for i in range(count))))
        for name in MERGED:
            asked: Result = {"method": name, "force": True}
            plan = modelmerge.merge(base, experts, root / "out", device=str(run.device), dry_run=True, method=name)
            started = run.synchronised()
            taken = run.peak(
                lambda a=asked: modelmerge.merge(base, experts, root / "there", device=str(run.device), **a)
            )
            figures[f"{name}: seconds"] = run.synchronised() - started
            figures[f"{name}: bytes promised"], figures[f"{name}: bytes taken"] = plan["peak_memory"]["device"], taken
            figures["failed"] |= (taken or 0) > plan["peak_memory"]["device"]
            if kind == "clip":  # the CPU takes minutes for the other
                modelmerge.merge(base, experts, root / "here", device="cpu", **asked)
                there, here = read(root / "there"), read(root / "here")
                far = max(distance(there[key], here[key]) for key in here if here[key].is_floating_point())
                figures[f"{name}: distance"] = far
                figures["failed"] |= not far <= CLOSE
    return figures


def beside(run: Run) -> Iterator[Item]:
    """The published loop of APGD on one ViT-B/32 block, from a few of its steps, beside `apgd --published`."""

    def loop() -> Result:
        tasks, shapes = (3, ((48, 32),)) if run.small else (8, BLOCK)
        steps, theirs = 2 if run.small else 20, 0.0
        place = run.device if run.device.type == "cuda" else torch.device("cpu")  # a simulated one has no autograd
        for m, n in shapes:
            bases, step = published(task_vectors(tasks, m, n, place), steps)
            theirs += bases + 400 * step
        ours = _timed(run, "apgd", {"published": True}, tasks, shapes)["seconds"]
        return {"seconds of the loop": theirs, "seconds": ours, "ratio": theirs / ours, "failed": False}

    yield "one ViT-B/32 block", loop


SECTIONS: dict[str, Callable[[Run], Iterator[Item]]] = {
    "agreement": agreement, "cards": cards, "speed": speed, "batches": batches, "files": files, "published": beside,
}  # fmt: skip


def do(name: str, run: Run, output: Path) -> tuple[str, dict[str, Result]]:
    """A section's outcome, and its results, of which each is written as soon as it is there."""
    file = output / f"{name}.json"
    results: dict[str, Result] = json.loads(file.read_text()) if file.is_file() else {}
    items, longest = list(SECTIONS[name](run)), 0.0
    for label, work in items:
        if label in results:
            continue
        started = time.monotonic()
        if started + 2 * longest > run.deadline:
            return f"not run (no time: {len(results)} of {len(items)} results are there)", results
        try:
            results[label] = work()
        except (ModelMergeError, RuntimeError) as error:
            results[label] = {"failed": True, "error": str(error).splitlines()[0]}
        longest = max(longest, time.monotonic() - started)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1))
        part.replace(file)
    wrong = [label for label, result in results.items() if result["failed"]]
    return f"failed ({', '.join(wrong)})" if wrong else "passed", results


def table(results: dict[str, Result]) -> list[str]:
    """A section's results as Markdown."""
    columns = list(dict.fromkeys(key for result in results.values() for key in result))
    rows = [[label, *(_cell(result.get(column)) for column in columns)] for label, result in results.items()]
    return ["| " + " | ".join(row) + " |" for row in (["", *columns], ["---"] * (len(columns) + 1), *rows)]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("cuda-results"))
    words = parser.parse_args(argv)
    started = time.monotonic()
    try:
        device = find_device(words.device)
    except DeviceError as error:
        for name in SECTIONS:
            print(f"{name}: not run ({error.message})")
        return 1
    words.output.mkdir(parents=True, exist_ok=True)
    # What has been begun is to end well inside the time.
    run = Run(device, words.small, started + 0.85 * 60 * words.minutes)
    lines, outcomes = [], []
    for name in SECTIONS:
        outcome, results = do(name, run, words.output)
        print(f"{name}: {outcome}", flush=True)
        outcomes.append(outcome)
        lines += [f"## {name}: {outcome}", "", *table(results), ""]
    if device.type == "cuda" and not words.small:
        head = f"# On a card\n\n{KINDS['cuda'].name(device)}, torch {torch.__version__}.\n"
        (words.output / "RESULTS-cuda.md").write_text("\n".join([head, *lines]))
        shutil.copy(words.output / "RESULTS-cuda.md", HERE)
    return int(any(outcome.startswith("failed") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
