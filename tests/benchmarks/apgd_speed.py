"""What APGD costs on one ViT-B/32 block and how that grows, beside the published loop.

    python -m tests.benchmarks.apgd_speed                      writes RESULTS-apgd-speed.md beside this file
    python -m tests.benchmarks.apgd_speed --device cuda:0      the same on a GPU

The published loop is written here as the paper's code has it: full singular value decompositions, the loss by
autograd, an m x m projection matrix, Adam. It is linear in its steps, so `--reference-steps` of them are run and scaled
to 400. Everything is measured in one run, side by side; seconds are this process's CPU time (on a GPU: wall time,
synchronised). The last column is what the matrix products of the iterations would take at the rate of one large
product in the same run, as a share of all seconds. The table of parts says how near each is to what its operations and
bytes would take at these rates.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from modelmerge.methods import apgd, registry, work
from modelmerge.methods import products as multiplication
from modelmerge.methods.contract import Context
from modelmerge.methods.options import make_options

HERE = Path(__file__).parent
BLOCK = ((768, 768),) * 4 + ((3072, 768), (768, 3072))
TASKS, STEPS = 8, 400
WIDTHS, COUNTS = (768, 1536, 3072), (2, 4, 8, 16)
# By form, the options and the share of the first loss at which Adam stops.
FORMS: dict[str, tuple[dict[str, Any], float]] = {
    "adam, all 400 steps": ({"published": True}, 0.0),
    "adam, default stop": ({"published": True}, apgd.TOLERANCE),
    "default (exact)": ({}, apgd.TOLERANCE),
}
# The parts of what runs, and the functions that each is made of.
BASES, GRADIENTS, ADAM = "bases", "conjugate gradients", "Adam's own step, by element"
PROJECTION, SUMS = "gradient off the basis", "sums and inner products of rows"
EXACT: dict[str, list[tuple[Any, str]]] = {BASES: [(apgd, "task_basis")], GRADIENTS: [(apgd, "solve")]}
DESCENT: dict[str, list[tuple[Any, str]]] = {
    PROJECTION: [(multiplication, "remove_subspace")],
    SUMS: [(apgd, "inner"), (apgd, "combined")],
    ADAM: [(torch, "_fused_adam_")],
    BASES: [(apgd, "task_basis")],
}
GROWING = {"adam, 20 steps": ({"published": True, "steps": 20}, 0.0), "default (exact)": FORMS["default (exact)"]}


def task_vectors(tasks: int, m: int, n: int, device: torch.device) -> Tensor:
    """Task vectors as fine-tuning makes them, [T, m, n]: falling singular values, a part in common, rms 5e-4."""
    generator = torch.Generator().manual_seed(m + n)

    def one() -> Tensor:
        rank = min(m, n) // 4
        left = torch.randn(m, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.5
        return left @ torch.randn(rank, n, generator=generator) + 0.3 * torch.randn(m, n, generator=generator)

    shared = one()
    taus = torch.stack([one() + 0.3 * shared for _ in range(tasks)])
    return taus.mul_(5e-4 / taus.square().mean().sqrt()).to(device)


def published(taus: Tensor, steps: int) -> tuple[float, float]:
    """Seconds of the published algorithm: its decompositions, and one of its steps."""
    tasks, m, n = taus.shape
    smaller = min(m, n)

    def bases() -> Tensor:
        each = [torch.linalg.svd(tau, full_matrices=False).U[:, : smaller // tasks] for tau in taus]
        basis = torch.linalg.svd(torch.cat(each, 1), full_matrices=False).U[:, : smaller // 6]
        return basis @ basis.T

    seconds, projection = timed(bases, taus.device)
    lambdas = [0.07 / tau.norm() for tau in taus]
    correction = torch.zeros_like(taus[0], requires_grad=True)
    adam = torch.optim.Adam([correction], lr=1e-4)

    def descend() -> None:
        for _ in range(steps):
            adam.zero_grad()
            merged = sum(lam * (tau + correction) for lam, tau in zip(lambdas, taus, strict=True))
            loss = sum((tau * (merged - tau)).sum(1).square().sum() for tau in taus)
            loss.backward()
            correction.grad.sub_(projection @ correction.grad)
            adam.step()

    return seconds, timed(descend, taus.device)[0] / steps


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it gives."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        found = call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started, found
    started = time.process_time()
    found = call()
    return time.process_time() - started, found


def ours(taus: Tensor, form: tuple[dict[str, Any], float], repeats: int) -> tuple[float, dict[str, float]]:
    """Seconds of the merge of one weight, bases included, and what the method tells of it."""
    chosen = registry.load("apgd")
    options = make_options(chosen, "apgd", form[0])
    figures: dict[str, float] = {}
    context = Context(
        tensor="w", weights=(1.0,) * len(taus), base=taus[0] * 30, tell=figures.update,
        measured=taus.abs().flatten(1)[:, ::97].quantile(0.7, 1) if options.density < 1.0 else None,
    )  # fmt: skip
    with mock.patch.object(apgd, "TOLERANCE", form[1]):
        took = [timed(lambda: chosen.apply(taus, options, context), taus.device)[0] for _ in range(repeats)]
    return median(took), figures


def products(taus: Tensor, form: tuple[dict[str, Any], float], figures: dict[str, float]) -> float:
    """FLOP of the matrix products of what is iterated: projections, and inner products with the task vectors."""
    tasks, m, n = taus.shape
    rank = min(m, n) // make_options(registry.load("apgd"), "apgd", form[0]).rank_divisor
    times = figures.get("steps", figures.get("iterations", 0) + 1)
    return times * (4.0 * m * n * rank + 4.0 * m * n * tasks)


def rates(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large float32 product and bytes/s of a copy (read and written), as measured now."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    timed(lambda: a @ b, device)
    product = median(timed(lambda: a @ b, device)[0] for _ in range(5))
    source = torch.randn(64 << 20, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), device)
    copy = median(timed(lambda: target.copy_(source), device)[0] for _ in range(5))
    return 2 * 2048**3 / product, 2 * source.nbytes / copy


def works(m: int, n: int, form: str, figures: dict[str, float], device: torch.device) -> dict[str, work.Work]:
    """What the parts of a form do for one weight: operations and bytes."""
    k, rank = min(m, n), min(m, n) // TASKS
    shared = k // make_options(registry.load("apgd"), "apgd", FORMS[form][0]).rank_divisor
    read = work.Work(single=4.0 * TASKS * m * n, moved=4.0 * (TASKS + 2) * m * n)
    project = work.product(m, n, 2 * shared) + work.Work(moved=12.0 * m * n)
    if "iterations" in figures:
        bases = work.iterated(m, n, rank) * TASKS + work.iterated(m, rank * TASKS, shared)
        return {BASES: bases, GRADIENTS: (project + read) * (figures["iterations"] + 2)}

    def vectors(n: int, rank: int) -> work.Work:
        """Of `linalg.left_singular_vectors`: on a CPU half a Gram matrix, float32's vectors, and one correction."""
        (k, g), kept = sorted((m, n)), rank + 32
        fine = 1.0 * k * k * g + 2.0 * k * k * kept + 10.0 * k * kept**2
        refined = work.Work(single=9.0 * k**3 + 4.0 * k * k * kept, double=fine)
        return refined if device.type == "cpu" else work.triplets(m, n, rank)

    step = {PROJECTION: project, SUMS: read, ADAM: work.Work(moved=28.0 * m * n)}
    bases = vectors(n, rank) * TASKS + vectors(rank * TASKS, shared)
    return {**{part: done * figures["steps"] for part, done in step.items()}, BASES: bases}


def watched(form: str, taus: Tensor) -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds of the merge of one weight, of them those of each part, and what the method tells of it."""
    spent: dict[str, float] = {}

    def watch(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            took, found = timed(lambda: call(*args, **named), taus.device)
            spent[part] = spent.get(part, 0.0) + took
            return found

        return run

    with contextlib.ExitStack() as stack:
        for part, functions in (EXACT if "exact" in form else DESCENT).items():
            for module, name in functions:
                stack.enter_context(mock.patch.object(module, name, watch(part, getattr(module, name))))
        took, figures = ours(taus, FORMS[form], 1)
    return took, spent, figures


def profile(device: torch.device, reference: float) -> list[str]:
    """The table of what the block's parts do and take, beside what they would at the rates of a product and of a copy.

    Parts are timed where they run, and what is left of the whole has its own row. An operation in float64 counts as
    two. Where there are two libraries for products, the rate is the faster one's. `reference`: seconds of the published
    loop, which the whole at these rates is compared with.
    """
    flops, copied = rates(device)
    a, b = torch.randn(2, 2048, 2048, device=device)
    quick = multiplication.multiplier(a)
    flops = max(flops, 2 * 2048**3 / median(timed(lambda: quick(b), device)[0] for _ in range(5)))
    lines = [
        f"Parts, beside {flops / 1e9:,.0f} GFLOP/s in a product and {copied / 1e9:.1f} GB/s in a copy:",
        "",
        "| part of the block | GFLOP | GB | seconds | at these rates | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    floors = []
    for form in FORMS:
        sums: dict[str, list[float]] = {}
        whole = 0.0
        for m, n in BLOCK:
            took, spent, figures = watched(form, task_vectors(TASKS, m, n, device))
            whole += took
            for part, done in works(m, n, form, figures, device).items():
                counted = done.single + 2.0 * (done.double + done.eigen)
                each = (counted, done.moved, spent[part], max(counted / flops, done.moved / copied))
                sums[part] = [one + other for one, other in zip(sums.get(part, [0.0] * 4), each, strict=True)]
        counted, moved, inside, least = (sum(column) for column in zip(*sums.values(), strict=True))
        sums["in all"] = [counted, moved, whole, least]
        for part, (counted, moved, took, at_rates) in sums.items():
            if part == "in all":
                lines.append(f"| {form}: outside these parts | | | {whole - inside:.2f} | | |")
            cells = f"{counted / 1e9:,.0f} | {moved / 1e9:,.0f} | {took:.2f} | {at_rates:.2f} | {at_rates / took:.0%}"
            lines.append(f"| {form}: {part} | {cells} |")
        floors.append(f"{form} would take {least:.1f} s ({reference / least:.0f} x)")
    lines += ["", f"At these rates, beside the published loop: {'; '.join(floors)}."]
    print("\n".join(lines), flush=True)
    return lines


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def block(device: torch.device, reference_steps: int, repeats: int) -> tuple[list[str], float]:
    """The table of one ViT-B/32 block with eight tasks, and the seconds of the published loop."""
    flops, copied = rates(device)
    weights = [task_vectors(TASKS, m, n, device) for m, n in BLOCK]
    found = [published(taus, reference_steps) for taus in weights]
    reference = sum(bases + STEPS * step for bases, step in found)
    share = sum(bases for bases, _ in found)
    lines = [
        f"Measured beside: {flops / 1e9:,.0f} GFLOP/s in a float32 product of 2048, {copied / 1e9:.1f} GB/s in a copy.",
        "",
        "| one block, 8 tasks | seconds | ratio to the published loop | share of the product rate |",
        "|---|---:|---:|---:|",
        f"| published loop ({reference_steps} steps, scaled to {STEPS}; {share:.1f} s of it decompositions) "
        f"| {reference:.1f} | 1 | |",
    ]
    for label, form in FORMS.items():
        results = [ours(taus, form, repeats) for taus in weights]
        seconds = sum(took for took, _ in results)
        multiplied = sum(products(taus, form, figures) for taus, (_, figures) in zip(weights, results, strict=True))
        lines.append(f"| {label} | {seconds:.2f} | {reference / seconds:.1f} x | {multiplied / flops / seconds:.0%} |")
        print(lines[-1], flush=True)
    return lines, reference


def growth(device: torch.device, repeats: int) -> list[str]:
    """Seconds by width (square weights, eight tasks) and by the number of tasks (768 x 768), with exponents."""
    lines = ["| growth | " + " | ".join(map(str, WIDTHS)) + " | exponent |", "|---|" + "---:|" * (len(WIDTHS) + 1)]
    for label, form in GROWING.items():
        took = [ours(task_vectors(TASKS, n, n, device), form, repeats)[0] for n in WIDTHS]
        cells = " | ".join(f"{seconds:.2f} s" for seconds in took)
        lines.append(f"| {label}, by width | {cells} | {exponent(WIDTHS, took):.2f} |")
        print(lines[-1], flush=True)
    lines += ["", "| growth | " + " | ".join(f"T = {count}" for count in COUNTS) + " | exponent |"]
    lines.append("|---|" + "---:|" * (len(COUNTS) + 1))
    for label, form in GROWING.items():
        took = [ours(task_vectors(count, 768, 768, device), form, repeats)[0] for count in COUNTS]
        cells = " | ".join(f"{seconds:.2f} s" for seconds in took)
        lines.append(f"| {label}, by tasks | {cells} | {exponent(COUNTS, took):.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reference-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    told = parser.parse_args()
    device = torch.device(told.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    head = (
        f"## {name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n\n"
        f"Written by `python -m tests.benchmarks.apgd_speed --device {told.device} --reference-steps "
        f"{told.reference_steps} --repeats {told.repeats}`.\n"
    )
    table, reference = block(device, told.reference_steps, told.repeats)
    lines = [head, *table, "", *profile(device, reference), "", *growth(device, told.repeats)]
    kind = "" if device.type == "cpu" else "-" + device.type
    (HERE / f"RESULTS-apgd-speed{kind}.md").write_text("# The cost of APGD\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
