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

from modelmerge.methods import apgd, linalg, registry, work
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


def parts_of(m: int, n: int, device: torch.device) -> list[tuple[str, int, work.Work, Callable[[], Any]]]:
    """What the descent of all steps and the default do for one weight: names, times, work of one time, and calls."""
    taus, k = task_vectors(TASKS, m, n, device), min(m, n)
    adam, exact = (make_options(registry.load("apgd"), "apgd", values) for values in ({"published": True}, {}))
    rows, weights, matrix = apgd.rows_of(taus), torch.randn(m, TASKS, device=device), taus[0].clone()
    wide = torch.linalg.qr(torch.randn(m, k // 6, device=device)).Q.contiguous()
    moving = torch.zeros_like(matrix, requires_grad=True)
    moving.grad = matrix
    optimizer = torch.optim.Adam([moving], lr=1e-4, fused=True)
    basis, rank = apgd.task_basis(taus, exact), k // TASKS
    read = work.Work(single=4.0 * TASKS * m * n, moved=4.0 * (TASKS + 2) * m * n)
    project = work.Work(moved=12.0 * m * n)
    wider, narrower = (work.product(m, n, 2 * (k // divisor)) + project for divisor in (6, 12))
    figures: dict[str, float] = {}
    context = Context(tensor="w", weights=(1.0,) * TASKS, base=None, tell=figures.update)
    apgd.solve(taus, [0.1] * TASKS, basis, exact, context)
    return [
        ("adam: gradient off the basis", STEPS, wider, lambda: linalg.remove_subspace(matrix, wide)),
        (
            "adam: sums and inner products of rows", STEPS, read,
            lambda: (apgd.inner(rows, matrix), apgd.combined(rows, weights)),
        ),
        ("adam: its own step, by element", STEPS, work.Work(moved=28.0 * m * n), optimizer.step),
        (
            "adam: bases", 1, work.triplets(m, n, rank) * TASKS + work.triplets(m, rank * TASKS, k // 6),
            lambda: apgd.task_basis(taus, adam),
        ),
        (
            "exact: bases", 1, work.iterated(m, n, rank) * TASKS + work.iterated(m, rank * TASKS, k // 12),
            lambda: apgd.task_basis(taus, exact),
        ),
        (
            "exact: conjugate gradients", 1, (narrower + read) * (figures["iterations"] + 2),
            lambda: apgd.solve(taus, [0.1] * TASKS, basis, exact, context),
        ),
    ]  # fmt: skip


def profile(device: torch.device) -> list[str]:
    """The table of what the block's parts do and take, beside what they would at the rates of a product and of a copy.

    An operation in float64 counts as two. Where there are two libraries for products, the rate is the faster one's.
    """
    flops, copied = rates(device)
    a, b = torch.randn(2, 2048, 2048, device=device)
    quick = linalg.multiplier(a)
    flops = max(flops, 2 * 2048**3 / median(timed(lambda: quick(b), device)[0] for _ in range(5)))
    sums: dict[str, tuple[float, work.Work]] = {}
    for m, n in BLOCK:
        for part, times, done, call in parts_of(m, n, device):
            took = times * median(timed(call, device)[0] for _ in range(5))
            seconds, before = sums.get(part, (0.0, work.NOTHING))
            sums[part] = (seconds + took, before + done * times)
    lines = [
        f"Parts, beside {flops / 1e9:,.0f} GFLOP/s in a product and {copied / 1e9:.1f} GB/s in a copy:",
        "",
        "| part of the block | GFLOP | GB | seconds | at these rates | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for part, (seconds, done) in sums.items():
        counted = done.single + 2.0 * (done.double + done.eigen)
        least = max(counted / flops, done.moved / copied)
        cells = f"{counted / 1e9:,.0f} | {done.moved / 1e9:,.0f} | {seconds:.2f} | {least:.2f} | {least / seconds:.0%}"
        lines.append(f"| {part} | {cells} |")
    print("\n".join(lines), flush=True)
    return lines


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def block(device: torch.device, reference_steps: int, repeats: int) -> list[str]:
    """The table of one ViT-B/32 block with eight tasks."""
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
    return lines


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
    lines = [
        head,
        *block(device, told.reference_steps, told.repeats),
        "",
        *profile(device),
        "",
        *growth(device, told.repeats),
    ]
    kind = "" if device.type == "cpu" else "-" + device.type
    (HERE / f"RESULTS-apgd-speed{kind}.md").write_text("# The cost of APGD\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
