"""`modelmerge search METHOD BASE EXPERT... -o DIR --try OPTION=VALUES --on SUITE:WHAT`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from modelmerge.cli import merge
from modelmerge.cli import options as opt
from modelmerge.cli.help import with_examples
from modelmerge.cli.output import Sink, flag, line, table
from modelmerge.errors import UsageError
from modelmerge.methods import registry
from modelmerge.methods.options import as_key, as_word
from modelmerge.verbs.auto import AUTO

if TYPE_CHECKING:
    from rich.table import Table

SEARCH = with_examples(
    "Merge with each value of some options, measure, and keep the best. Without METHOD: list the methods.",
    (
        "modelmerge search ties base math code -o merged --try scale=0.1:1.0:0.1 --on lm:gsm8k",
        "modelmerge search tsv-m base svhn gtsrb -o merged --try scale=0.5,1.0 --on clip:svhn,limit=500",
    ),
)
_option = opt.in_panel("What is tried, and how it is measured")
Try = Annotated[list[str], _option(
    "--try", metavar="OPTION=VALUES",
    help="scale=0.1:1.0:0.1 (first, last, step), scale=0.2,0.5, reduce=sum,mean, awd.alpha=0.1,0.2, math.weight=0,1. "
    "With --budget also scale=0.1..1.5, awd.alpha=0.01..10:log, '*.weight=0..1'. Repeatable: all combinations. Of "
    "equal ones the first.",
)]  # fmt: skip
Budget = Annotated[int | None, _option(
    metavar="N", help="Merge N candidates, each chosen by the scores of those before (extra search).",
)]  # fmt: skip
Plot = Annotated[
    str | None, _option("--plot", metavar="FILE", help="Draw the scores and the best so far, as .svg, .png or .pdf.")
]
Report = Annotated[list[str] | None, _option(
    "--report", metavar="FILE", help="Write what was found: .html is a page with the course, .md tables, .csv figures.",
)]  # fmt: skip
On = Annotated[list[str], _option(
    "--on", metavar="SUITE:WHAT",
    help="custom:FILE:FUNCTION, clip:TASK, clip:DATA or lm:TASK, with the settings of that suite in eval behind "
    "commas: clip:svhn,limit=500. clip and lm measure on a validation split, or else the training split. "
    "Repeatable: the mean over all tasks counts.",
)]  # fmt: skip


def command(name: str) -> Callable[..., None]:
    """The Typer command of a search with a merge method."""
    method = None if name == AUTO else registry.load(name)

    def searched(tries: Try, on: On, budget: Budget = None, plot: Plot = None, page: Report = None) -> None: ...

    def run(sink: Sink, context: typer.Context, **values: Any) -> None:
        from modelmerge.verbs.candidates import prepare_search
        from modelmerge.verbs.search import execute_search

        tries = parse_tries(values["tries"])
        for option in (option for option in tries if option in values and opt.typed(context, option)):
            raise UsageError(f"{flag(option)} is given, and tried", hint="leave one of them out")
        recipe = merge.recipe_of(name, method, values, context)
        place = {"device": values["device"], "stream": values["stream"], "look": not values["dry_run"]}
        place["budget"] = values["budget"]
        merge.carry_out(
            lambda: prepare_search(recipe, tries, values["on"], **place), execute_search,
            lambda search: search.describe(), values, sink, lambda manifest: results(manifest["searched"]),
        )  # fmt: skip

    parameters = [p for p in merge.parameters(method) if p.name not in ("cluster", "part", "finish", "plot", "within")]
    place = next(i for i, parameter in enumerate(parameters) if parameter.name == "output")
    return opt.command(run, [*parameters[:place], *opt.shared(searched), *parameters[place:]])


def parse_tries(texts: Sequence[str]) -> dict[str, str]:
    """By option, or TRANSFORM.OPTION, what `OPTION=START:STOP:STEP` or `OPTION=V,V...` says of its values.

    Raises:
        UsageError: One is not of that form, or an option comes twice.
    """
    values: dict[str, str] = {}
    for text in texts:
        name, _, after = text.rpartition("=")
        name = as_key(name.strip().removeprefix("--"))
        if not name or not after:
            raise UsageError(f"--try '{text}' is not OPTION=VALUES", hint="scale=0.1:1.0:0.1, or scale=0.2,0.5")
        if name in values:
            raise UsageError(f"--try names '{as_word(name)}' twice", hint="with commas between its values")
        values[name] = after
    return values


_SHOWN = 8  # tasks: more do not fit a terminal, and are in the JSON


def results(search: dict[str, Any]) -> list[str | Text | Table]:
    """A row for the base and each candidate, the chosen one in bold, and which that is."""
    options = list(search["options"])
    tasks = list(search["results"][0]["scores"])
    tasks = tasks if len(tasks) <= _SHOWN else []
    every = [*([search["base"]] if search["base"] else []), *search["results"]]
    scores = [score for each in every for score in each["scores"].values()]
    share = all(0.0 <= score["score"] <= 1.0 for score in scores if score["score"] is not None)
    rows: list[list[str | Text]] = []
    for each in every:
        values = each.get("options")
        row = ["base", *[""] * (len(options) - 1)] if values is None else [_word(values[name]) for name in options]
        row += [_shown(each["scores"][task]["score"], None, share) for task in tasks]
        row.append(_shown(each["average"], each["average_stderr"], share))
        rows.append([Text(cell, style="bold" if values == search["chosen"] else "") for cell in row])
    metrics = sorted({score["metric"] for score in scores})
    title = f"{', '.join(metrics)}{', per cent' if share else ''}{', less is better' * search['less_is_better']}"
    columns = [*map(as_word, options), *tasks, "mean"]
    chosen = ", ".join(f"{as_word(name)}={_word(value)}" for name, value in search["chosen"].items())
    equal = f", the first of {1 + len(search['equal'])} equal ones" if search["equal"] else ""
    best = line(("best", "bold green"), " ", (chosen, "bold"), f" of {len(search['results'])} candidates{equal}")
    return [table(title[0].upper() + title[1:], columns, rows, words=0), best]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _shown(value: float | None, error: float | None, share: bool) -> str:
    if value is None:
        return "n/a"
    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
    return shown if error is None else shown + (f" ±{100 * error:.1f}" if share else f" ±{error:.2g}")
