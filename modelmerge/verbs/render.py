"""render: a report as a page, as tables and as a chart, when it is made or from a file later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from modelmerge.charts import drawing, exports, page
from modelmerge.charts.figures import of_coefficients, of_report
from modelmerge.checkpoint.documents import read_json
from modelmerge.checkpoint.output import replace_file
from modelmerge.errors import ModelMergeError, UsageError, named
from modelmerge.evaluation.bench import SAVE
from modelmerge.evaluation.report import ModelRow, Report, Role
from modelmerge.verbs.candidates import label_of

_PAGES = {".html": page.render, ".htm": page.render, ".md": exports.markdown, ".csv": exports.values}


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a report: a chart, and how scores are drawn in it; pages and tables, by their endings.

    Raises:
        UsageError: A file's ending names no format, or `chart` has no effect.
        OutputError: A file cannot be where it shall be.
        ModelMergeError: matplotlib is not installed, and a chart is asked for.
    """

    plot: Path | None
    chart: drawing.Kind
    pages: tuple[Path, ...]

    def __post_init__(self) -> None:
        if self.plot is not None:
            drawing.check(self.plot)
        elif self.chart != "auto":
            raise UsageError(f"has no effect without {named('plot')}", option="chart")
        for file in self.pages:
            if file.suffix.lower() not in _PAGES:
                hint = f"end in {', '.join(_PAGES)}"
                raise UsageError(f"{file}: a report is a page or a table", option="page", hint=hint)
            drawing.check_place("page", file)

    def write(self, report: Report) -> list[Path]:
        """Draw the chart and write the pages; the files.

        Raises:
            UsageError: A radar chart cannot show this.
            OutputError: A file cannot be written.
        """
        if self.plot is not None:
            if self.chart != "auto" and report["suite"] == "weights":
                raise UsageError("is of scores, and a report of weights has heatmaps alone", option="chart")
            charts = of_report(report)
            drawing.save(charts[:1] if "searched" in report else charts, self.plot, kind=self.chart)
        for file in self.pages:
            text = _PAGES[file.suffix.lower()](report)
            replace_file(file.parent, file.name, text.encode(errors="backslashreplace"))
        return [*([self.plot] if self.plot is not None else []), *self.pages]

    def write_of(self, manifest: Mapping[str, Any]) -> list[Path]:
        """The same of what a merge has found: the course of a search, or coefficients, which are a chart alone.

        Raises:
            OutputError: A file cannot be written.
        """
        if "searched" in manifest:
            return self.write(report_of_search(manifest))
        assert self.plot is not None, "a merge has no pages"
        drawing.save([of_coefficients(manifest["recipe"])], self.plot)
        return [self.plot]


def pictures_at(
    plot: str | Path | None, chart: drawing.Kind, page: str | Path | Sequence[str | Path] | None
) -> Pictures:
    """Pictures by paths as they are typed; what cannot be drawn is refused before the work."""
    pages = [page] if isinstance(page, str | Path) else page or ()
    place = None if plot is None else Path(plot).expanduser()
    return Pictures(place, chart, tuple(Path(file).expanduser() for file in pages))


def report_of_search(manifest: Mapping[str, Any]) -> Report:
    """What a search found, of its manifest, as a report; its candidates are named by their options."""
    searched, inputs = manifest["searched"], manifest["inputs"]
    tasks = [*searched["results"][0]["scores"]]

    def row(entry: Mapping[str, Any], name: str, role: Role) -> ModelRow:
        # Where less is better, there is no average: models are ranked by their scores.
        average = None if searched["less_is_better"] else entry["average"]
        return {
            "name": name, "role": role, "reference": name, "files": {}, "normalised": None,
            "scores": entry["scores"], "average": average, "average_stderr": entry["average_stderr"],
        }  # fmt: skip

    models = [row(each, label_of(each["options"]), "model") for each in searched["results"]]
    if searched["base"]:
        models.insert(0, row(searched["base"], "base", "base"))
    taken = {name: manifest[name] for name in ("device", "created", "versions", "command", "notes")}
    settings = {"chosen": label_of(searched["chosen"]), "tried": searched["options"], "on": searched["on"]}
    report = {"suite": "search", "tasks": tasks, "models": models, "searched": searched, **inputs, **taken, **settings}
    return cast(Report, report)


def append_summary(report: Report, file: Path) -> None:
    """Add a report, as Markdown, to the end of a file, as GitHub Actions collects the summary of a job.

    Raises:
        OSError: It cannot be written.
    """
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"{exports.markdown(report)}\n")


def render(
    report: str | Path | Report,
    *,
    plot: str | Path | None = None,
    chart: drawing.Kind = "auto",
    page: str | Path | Sequence[str | Path] | None = None,
) -> Report:
    """Draw a report of `modelmerge.evaluate`, or of one that was saved.

    Args:
        report: The report, or its file.
        plot: A chart, as `.svg`, `.png` or `.pdf`: scores as bars or as a radar chart, of more than 8 models as dots;
            cosines as heatmaps. Takes matplotlib.
        chart: How scores are drawn: `bars`, `radar`, or `auto`: as a radar chart from 5 to 20 tasks.
        page: One file or several: an `.html` page that holds all of the report, and asks the network for nothing;
            `.md`, its tables as Markdown; `.csv`, all its figures.

    Returns:
        The report.

    Raises:
        ModelMergeError: The file is no report; see `Pictures` for other kinds.
    """
    pictures = pictures_at(plot, chart, page)
    content = read(report) if isinstance(report, str | Path) else report
    pictures.write(content)
    return content


def read(file: str | Path) -> Report:
    """A report that was saved.

    Raises:
        ModelMergeError: It cannot be read, or is none.
    """
    report: Report = read_json(Path(file).expanduser(), Report, error=ModelMergeError, hint=SAVE)
    try:
        page.render(report)  # what a page can show is a report
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, page.Incomplete) as error:
        raise ModelMergeError(f"{file}: no report of modelmerge eval", hint=SAVE) from error
    return report
