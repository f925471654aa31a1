"""What a search over ten scales costs, beside ten merges one after the other.

`python -m tests.benchmarks.search_speed` makes a Llama and four experts, and for each method runs in child processes
a search over ten values of the scale, by a function that looks at nothing, and ten merges at the same values. What is
compared is processor time, wall time and the bytes that went through read and write, from after the imports to the
end; it writes RESULTS-search.md. Linux only: bytes are read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.generate import generate
from tests.benchmarks.merge_speed import cache, work_directory

MODULE = "tests.benchmarks.search_speed"
RESULTS = Path(__file__).parent / "RESULTS-search.md"
VALUES = tuple(i / 10 for i in range(1, 11))


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=100_000_000, help="bytes of one Llama (default: 100 MB)")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["task-arithmetic", "ties", "kron"])
    parser.add_argument("--workdir", type=Path, help="keep the checkpoints here (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    told = parser.parse_args()
    with work_directory(told.workdir) as work:
        models = _models(work, told.size, told.experts)
        rows = {
            name: [_measure(work, kind, name, models) for kind in ("searched", "separate")] for name in told.methods
        }
    told.results.write_text(_report(rows, told.size, told.experts))
    print(told.results.read_text())


def _models(work: Path, size: int, experts: int) -> list[Path]:
    directory = work / f"llama-{size}-{experts}"
    if not directory.exists():
        generate("llama", directory, size=size, experts=experts)
        time.sleep(2.5)  # modelmerge remembers no digest of a file younger than 2 s
    return [directory / "single" / name for name in ("base", *(f"expert_{i + 1}" for i in range(experts)))]


def _measure(work: Path, kind: str, name: str, models: Sequence[Path]) -> dict[str, float]:
    """In a child, with no digest remembered."""
    print(f"{name}: {kind}", file=sys.stderr, flush=True)
    with cache(work) as environment, tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, "-c", f"from {MODULE} import child; child()", kind, name, out, *map(str, models)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def child() -> None:
    """The search, or the merges one by one, and what they took. Arguments: KIND METHOD OUT MODEL..."""
    from modelmerge.verbs.merge import merge
    from modelmerge.verbs.search import search

    kind, name, out, *models = sys.argv[1:]
    before = _used()
    if kind == "searched":
        search(
            models[0], models[1:], Path(out) / "best", method=name, tries={"scale": VALUES}, metric=lambda model: 1.0
        )
    else:
        for value in VALUES:
            merge(models[0], models[1:], Path(out) / "best", method=name, scale=value, force=True)
    after = _used()
    print(json.dumps({key: after[key] - before[key] for key in after}))


def _used() -> dict[str, Any]:
    moved = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    times = os.times()
    return {
        "cpu": times.user + times.system, "wall": time.monotonic(), "read": int(moved["rchar"]),
        "written": int(moved["wchar"]),
    }  # fmt: skip


def _report(rows: dict[str, list[dict[str, float]]], size: int, experts: int) -> str:
    head = ["method", "CPU s, search", "ten merges", "ratio"]
    head += [word for what in ("wall s", "GB read", "GB written") for word in (f"{what}, search", "ten merges")]
    lines = [
        "# A search over ten scales, beside ten merges", "",
        f"Written by `python -m {MODULE}`: a Llama of {size / 1e6:.0f} MB in bfloat16, {experts} experts,",
        "ten values of `--scale`, on the CPU. The search measures with a function that looks at nothing: what a suite",
        "takes comes on top, in both ways alike. Both read what they have written once, for its sha256.", "",
        f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}",
    ]  # fmt: skip
    for name, (one, ten) in rows.items():
        cells = [f"{one['cpu']:.1f}", f"{ten['cpu']:.1f}", f"{one['cpu'] / ten['cpu']:.2f}"]
        cells += [f"{told['wall']:.1f}" for told in (one, ten)]
        cells += [f"{told[key] / 1e9:.2f}" for key in ("read", "written") for told in (one, ten)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
