"""Plans and results of merges, as lines and tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelmerge.checkpoint.reader import MANIFEST
from modelmerge.cli.output import line, size, table
from modelmerge.text import duration, visible

_NAMED = 6  # files beside the weights

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from rich.text import Text


def head(method: str, transforms: str | Sequence[str] | None) -> str:
    """A method behind its transforms, in words."""
    names = [transforms] if isinstance(transforms, str) else transforms or ()
    return " + ".join([*(text.split()[0] for text in names), method])


def result_lines(manifest: Mapping[str, Any], out: Path, *, verbose: bool) -> list[str | Text | Table]:
    """What a merge did, for people."""
    recipe, counts = manifest["recipe"], manifest["tensors"]
    weights = [entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")]
    beside = [*(name for name in manifest["files"] if not name.endswith(".safetensors")), MANIFEST]
    groups = [f"{len(group['tensors'])} by {group['method']}" for group in counts["groups"]]
    counted = [f"{many(counts['merged'], 'tensor')} merged" + (f" ({', '.join(groups)})" if len(groups) > 1 else "")]
    counted += [f"{len(counts['copied'])} copied from the base"] if counts["copied"] else []
    count = len(manifest["inputs"]["experts"])
    experts = many(count, "expert") if count else "layers of the base"
    lines: list[str | Text | Table] = [
        line(
            ("merged", "bold green"),
            f" {experts} with {head(recipe['method'], recipe['disentangle'])}: {', '.join(counted)}",
        ),
        line(
            (str(out), "bold"),
            f"  {size(sum(weights))} of weights in {many(len(weights), 'file')}, in "
            f"{manifest['seconds']:.1f} s on {manifest['device']}; beside them {listed(beside)}",
        ),
    ]
    rounding = manifest["rounding"]
    if rounding and rounding["relative_error"] is not None:
        lines.append(
            f"rounding to {rounding['stored_as']} changes the merged task vector by {rounding['relative_error']:.2%}"
        )
    lines += _coefficient_lines(manifest, verbose) if "adaptation" in manifest else []
    if verbose and counts["copied"]:
        lines.append(table(None, ["copied", "why"], [[k, v] for k, v in counts["copied"].items()], words=2))
    return lines


def part_lines(manifest: Mapping[str, Any], out: Path) -> list[str | Text | Table]:
    """What a part of a merge did, and what to do with it."""
    part, weights = manifest["part"], [entry["bytes"] for entry in manifest["files"].values()]
    return [
        line(
            ("merged", "bold green"), f" part {part['number']}/{part['of']}: "
            f"{many(manifest['findings']['merged'], 'tensor')}",
        ),
        line(
            (str(out), "bold"), f"  {size(sum(weights))} of weights in {many(len(weights), 'file')}, in "
            f"{manifest['seconds']:.1f} s on {manifest['device']}",
        ),
        line(("next  ", "bold cyan"), "all parts, then the same command with --finish for each of them: --finish "
             f"{shlex.quote(str(out))}"),
    ]  # fmt: skip


def next_lines(manifest: Mapping[str, Any], out: Path) -> list[str | Text | Table]:
    """What to do with a merged model: commands, and a line of Python that loads it."""
    from modelmerge.record.loading import code_of

    place = shlex.quote(str(out))
    python = code_of(out, str(out), beside=False)
    steps = [f"modelmerge verify {place}"]
    if not manifest["recipe"].get("layers") and "stages" not in manifest:  # they have no experts to be set beside
        steps.append(f"modelmerge eval weights {place}")
    steps += ["; ".join(python)] if python else []
    return [line(("next  " if i == 0 else "      ", "bold cyan"), step) for i, step in enumerate(steps)]


def many(count: int, word: str) -> str:
    """So many of what the word names."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def listed(names: Sequence[str]) -> str:
    """The names in a sentence; of very many, the first."""
    shown = names if len(names) <= _NAMED else [*names[: _NAMED - 1], f"{len(names) - _NAMED + 1} more"]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def _coefficient_lines(manifest: Mapping[str, Any], verbose: bool) -> list[str | Text | Table]:
    """The coefficients that were found on data: of each expert over the tensors, and, if verbose, of each tensor."""
    tasks, coefficients = manifest["adaptation"]["tasks"], manifest["recipe"]["coefficients"]
    rows = []
    for expert, entropy in tasks.items():
        values = [each[expert] for each in coefficients.values()]
        mean = sum(values) / len(values)
        figures = (mean, min(values), max(values), entropy["entropy_before"], entropy["entropy_after"])
        rows.append([expert, *(f"{figure:.3f}" for figure in figures)])
    lines: list[str | Text | Table] = [
        "",
        table(
            f"Coefficients over {many(len(coefficients), 'tensor')}; entropy of the predictions in the first and the "
            f"last {manifest['adaptation']['averaged_steps']} steps",
            ["", "mean", "least", "most", "before", "after"],
            rows,
        ),
    ]
    if verbose:
        rows = [[tensor, *(f"{v:.3f}" for v in values.values())] for tensor, values in coefficients.items()]
        lines.append(table(None, ["tensor", *tasks], rows))
    return lines


def _units_line(units: Mapping[str, Any]) -> str:
    """How a merge can be shared out."""
    count = many(units["count"], "unit")
    shared = f"{count} for {units['workers']} processes" if units["workers"] else f"{count} to share"
    dearest = f"the dearest, {units['share']:.0%} of the work, is {units['dearest']}"
    return f"{shared}: up to {units['speed_up']:.1f} times as fast; {dearest}"


def plan_lines(title: str, plan: dict[str, Any], verbose: bool) -> list[str | Text | Table]:
    """A plan for people: what happens to how many tensors and why, bytes, peak memory."""
    groups: dict[tuple[str, str], int] = {}
    for tensor in plan["tensors"]:
        groups[tensor["action"], tensor["reason"]] = groups.get((tensor["action"], tensor["reason"]), 0) + 1
    rows = [[action, str(count), reason] for (action, reason), count in sorted(groups.items(), reverse=True)]
    counted = table(None, ["action", "tensors", "why"], rows, words=3)
    sizes, memory = plan["bytes"], plan["peak_memory"]
    lines: list[str | Text | Table] = []
    for stage in plan.get("stages", ()):
        lines += [
            line("first ", (stage["name"], "bold")),
            *plan_lines(stage["method"], {"push": None, **stage}, verbose),
            "",
        ]
    kept = sum(stage["bytes"]["write"] for stage in plan.get("stages", ()))
    lines += [
        line(
            (title, "bold"),
            f" of {many(len(plan['experts']), 'expert')} onto {plan['base']['name']}, on {plan['device']}",
        ),
        counted,
    ]
    if plan["expert_only"]:
        rows = [[name, ", ".join(experts)] for name, experts in plan["expert_only"].items()]
        lines.append(table(None, ["not in the base, left out", "in"], rows, words=2))
    lines += [f"note: {visible(remark)}" for remark in plan["remarks"]]
    if verbose:
        rows = [
            [
                t["name"],
                "x".join(map(str, t["shape"])) or "0-d",
                f"{t['dtype']} -> {t['stored_as']}",
                t["action"],
                t["reason"],
            ]
            for t in plan["tensors"]
        ]
        lines.append(table(None, ["tensor", "shape", "dtype", "action", "why"], rows, words=5))
    passes = f"{plan.get('passes', 0):.3g}"
    times = f" ({passes} pass{'es' * (passes != '1')})" if "passes" in plan else ""
    files = f" in {many(len(plan['shards']), 'file')}" if "shards" in plan else " at most"
    peak = f"peak memory {size(memory['host'])}"
    if memory["device"]:
        peak += f", on the device {size(memory['device'])}"
    if plan["cache"] and sizes["download"]:
        cache = plan["cache"]
        free = f"{size(cache['free'])} free in {cache['directory']}, "
        held = ["which holds it"] if cache["enough"] else [("too little", "bold red"), ": --stream stores no weights"]
        lines.append(line(free, *held))
    lines.append(
        f"download {size(sizes['download'])}, read {size(sizes['read'])}{times}, "
        f"write {size(sizes['write'])}{files}; {peak}"
    )
    if plan.get("seconds") is not None:
        lines.append(f"about {duration(plan['seconds'])} on {plan['device']}, beside the start and downloads")
    if "part" in plan:
        part = plan["part"]
        words = f"part {part['number']} of {part['of']}, {part['work']:.0%} of the work of merging: "
        lines.append(line(words, listed(plan["shards"])))
    if "parts" in plan:
        lines.append(line(f"copied from {many(len(plan['parts']), 'part')}: ", listed(plan["parts"])))
    if "units" in plan:
        lines.append(_units_line(plan["units"]))
    if kept:
        lines.append(f"{size(kept)} beside the output until it is done, for what is merged first")
    if sizes["scratch"] > kept:
        lines.append(f"{size(sizes['scratch'] - kept)} beside the output while it runs, for what disentangling found")
    if "search" in plan:
        search, disk = plan["search"], plan["search"]["disk"]
        lines.append(
            f"{many(search['candidates'], 'candidate')} in {many(search['merges'], 'merge')}, each "
            f"measured on {', '.join(search['on'])}; on the disk {size(disk['all'])} at once, where there is "
            f"less {size(disk['least'])} at least"
        )
    if plan["push"]:
        what = [word for word in ("new", "private") if plan["push"][word]]
        what += ["as a pull request"] if plan["push"]["pull_request"] else []
        lines.append(f"push to {plan['push']['repository']} {', '.join(what)}".rstrip())
    return lines
