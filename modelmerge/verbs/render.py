"""render: a report as a page and as a chart, when it is made or from a file later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelmerge.charts import drawing, page
from modelmerge.charts.figures import of_report
from modelmerge.checkpoint.documents import read_json
from modelmerge.errors import ModelMergeError, UsageError, named
from modelmerge.evaluation.bench import SAVE
from modelmerge.evaluation.report import Report


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a report: a chart, and how scores are drawn in it; a page.

    Raises:
        UsageError: A file's ending names no format, or `chart` has no effect.
        OutputError: A file cannot be where it shall be.
        ModelMergeError: matplotlib is not installed, and a chart is asked for.
    """

    plot: Path | None
    chart: drawing.Kind
    page: Path | None

    def __post_init__(self) -> None:
        if self.plot is not None:
            drawing.check(self.plot)
        elif self.chart != "auto":
            raise UsageError(f"has no effect without {named('plot')}", option="chart")
        if self.page is not None:
            if self.page.suffix.lower() not in (".html", ".htm"):
                raise UsageError(f"{self.page}: a report is a page", option="page", hint="end in .html or .htm")
            drawing.check_place("page", self.page)

    def write(self, report: Report) -> list[Path]:
        """Draw the chart and write the page; the files.

        Raises:
            UsageError: A radar chart cannot show this.
            OutputError: A file cannot be written.
        """
        if self.plot is not None:
            if self.chart != "auto" and report["suite"] == "weights":
                raise UsageError("is of scores, and a report of weights has heatmaps alone", option="chart")
            drawing.save(of_report(report), self.plot, kind=self.chart)
        if self.page is not None:
            page.write(report, self.page)
        return [file for file in (self.plot, self.page) if file is not None]


def pictures_at(plot: str | Path | None, chart: drawing.Kind, page: str | Path | None) -> Pictures:
    """Pictures by paths as they are typed; what cannot be drawn is refused before the work."""
    places = [None if file is None else Path(file).expanduser() for file in (plot, page)]
    return Pictures(places[0], chart, places[1])


def render(
    report: str | Path | Report,
    *,
    plot: str | Path | None = None,
    chart: drawing.Kind = "auto",
    page: str | Path | None = None,
) -> Report:
    """Draw a report of `modelmerge.evaluate`, or of one that was saved.

    Args:
        report: The report, or its file.
        plot: A chart, as `.svg`, `.png` or `.pdf`: scores as bars or as a radar chart, cosines as heatmaps. Takes
            matplotlib.
        chart: How scores are drawn: `bars`, `radar`, or `auto`: as a radar chart from 5 to 20 tasks.
        page: An HTML file that holds all of the report, and asks the network for nothing.

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
