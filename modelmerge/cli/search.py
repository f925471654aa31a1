"""What `merge --search` found, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from modelmerge.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 8  # tasks: more do not fit a terminal, and are in the JSON


def results(search: dict[str, Any]) -> list[str | Table]:
    """A row for the base and each candidate, the chosen one in bold, and which that is."""
    options = list(search["options"])
    tasks = list(search["results"][0]["scores"])
    tasks = tasks if len(tasks) <= _SHOWN else []
    every = [*([search["base"]] if search["base"] else []), *search["results"]]
    known = [told["score"] for each in every for told in each["scores"].values() if told["score"] is not None]
    share = all(0.0 <= score <= 1.0 for score in known)
    rows: list[list[str | Text]] = []
    for each in every:
        values = each.get("options")
        row = ["base", *[""] * (len(options) - 1)] if values is None else [_word(values[name]) for name in options]
        row += [_shown(each["scores"][task]["score"], None, share) for task in tasks]
        row.append(_shown(each["average"], each["average_stderr"], share))
        rows.append([Text(cell, style="bold" if values == search["chosen"] else "") for cell in row])
    metrics = sorted({told["metric"] for each in every for told in each["scores"].values()})
    title = f"{', '.join(metrics)}{', per cent' if share else ''}{', less is better' * search['less_is_better']}"
    columns = [*(name.replace("_", "-") for name in options), *tasks, "mean"]
    chosen = ", ".join(f"{name.replace('_', '-')}={_word(value)}" for name, value in search["chosen"].items())
    equal = f", the first of {1 + len(search['equal'])} equal ones" if search["equal"] else ""
    best = f"[bold green]best[/] [bold]{chosen}[/] of {len(search['results'])} candidates{equal}"
    return [table(title[0].upper() + title[1:], columns, rows, left=0), best]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _shown(value: float | None, error: float | None, share: bool) -> str:
    if value is None:
        return "n/a"
    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
    return shown if error is None else shown + (f" ±{100 * error:.1f}" if share else f" ±{error:.2g}")
