"""Charts as SVG, PNG and PDF files, by matplotlib (extra `plot`). Sizes are in inches, type in points.

Everything is as large as its words need: rows are never closer than their labels are high, so that nothing overlaps.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modelmerge.charts import colours
from modelmerge.charts.figures import RADAR, Chart, Course, Heatmap, Scores, Series, ticks
from modelmerge.charts.names import clean, shorten, wrap
from modelmerge.checkpoint.output import replace_file
from modelmerge.errors import OutputError, UsageError, named
from modelmerge.evaluation.bench import require

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")
Kind = Literal["auto", "bars", "radar"]
_FROM = 5  # tasks: a radar chart is chosen by itself
_WIDTH, _MARGIN, _BETWEEN = 5.6, 8.0, 0.3  # of axes; what may stand out from them; between two of them
_LINE, _CHARACTER = 0.14, 0.062  # a line's height and a character's width, at most
_BAR, _GAP, _LABEL = 0.155, 0.15, 26  # a bar; between tasks; characters in a line of a task's name
_ROW, _COLUMN = 0.2, 0.5  # of a heatmap
_MOST_ROWS = 60.0  # the height of a heatmap: more rows are lower, and only some are named
_DOTS, _MOST_DOTS = 200, 60_000  # per inch, and along an edge: Agg's canvas ends at 65,536
_MARKERS = "osD^vP*X"
_HATCHES = ("", "///", "...", "xxx")
_RULE, _FAINT = "#d5d8dc", "#5f6670"
_SMALL, _TITLE = 6.5, 9.0
_HALO = {"facecolor": colours.PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
_CORNERS = ((0, 0), (1, 0), (1, 1), (0, 1))
_SETTINGS = {
    "font.family": "sans-serif", "font.size": 8.0, "text.color": colours.INK, "legend.frameon": False,
    "hatch.linewidth": 0.6, "hatch.color": "#9aa0a8",
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none", "svg.hashsalt": "modelmerge", "pdf.fonttype": 42,
}  # fmt: skip


def check(file: Path) -> None:
    """Refuse a place where no chart can be written, before any work.

    Raises:
        UsageError: The file's ending names no format that can be drawn.
        OutputError: There is no such directory.
        ModelMergeError: matplotlib is not installed.
    """
    if file.suffix.lower() not in FORMATS:
        hint = f"end in {', '.join(FORMATS)}"
        raise UsageError(f"{file}: a chart cannot be written as '{file.suffix}'", option="plot", hint=hint)
    check_place("plot", file)
    require("a chart", '"matplotlib>=3.10"', "matplotlib")


def check_place(option: str, file: Path) -> None:
    """Refuse a file whose directory is not there or may not be written to, or that is one itself.

    Raises:
        OutputError: That.
    """
    place = f"{named(option)} {file}"
    if not file.parent.is_dir():
        raise OutputError(f"{place}: there is no directory {file.parent}", hint="make it first")
    if not os.access(file.parent, os.W_OK):
        raise OutputError(f"{place}: {file.parent} may not be written to", hint="name another place")
    if file.is_dir():
        raise OutputError(f"{place}: that is a directory", hint="name a file")


def save(charts: Sequence[Chart], file: Path, *, kind: Kind = "auto") -> None:
    """Draw charts below one another into a file, in the format of its ending.

    Args:
        charts: At least one.
        file: Where to; what is there is replaced. The same charts give the same bytes.
        kind: How scores are drawn: as bars, as a radar chart, or as fits their number.

    Raises:
        ModelMergeError: matplotlib is not installed.
        UsageError: The file's ending names no format; or a radar chart cannot show these scores.
        OutputError: The file cannot be written.
    """
    check(file)
    form = file.suffix.lower()[1:]
    metadata: dict[str, str | None] = {"Title": clean(charts[0].title)}
    metadata |= {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
    content = io.BytesIO()
    with settings():
        figure = draw(charts, kind=kind)
        dots = min(_DOTS, _MOST_DOTS / (max(figure.get_size_inches()) + _MARGIN))
        figure.savefig(content, format=form, dpi=dots, metadata=metadata, bbox_inches="tight", pad_inches=0.12)
    replace_file(file.parent, file.name, content.getvalue())


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's own settings and ours, whatever the user's are."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names may be in scripts that the font lacks: SVG has them as text, elsewhere they are boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def draw(charts: Sequence[Chart], *, kind: Kind = "auto") -> Figure:
    """The charts below one another, as a figure of matplotlib; to be called and saved within `settings()`.

    Raises:
        UsageError: A radar chart cannot show these scores.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if kind == "radar" and not any(isinstance(chart, Scores) and chart.round() for chart in charts):
        sizes = ", ".join(str(len(chart.spokes())) for chart in charts if isinstance(chart, Scores)) or "none"
        raise UsageError(
            f"a radar chart takes {RADAR.start} to {RADAR.stop - 1} tasks with scores between 0 and 1; here: {sizes}",
            hint=f"{named('chart')} bars",
        )
    figure = Figure(figsize=(_WIDTH, _WIDTH))
    FigureCanvasAgg(figure)  # measures type
    sheet = _Sheet(figure)
    for chart in charts:
        if isinstance(chart, Heatmap):
            _heatmap(sheet, chart)
        elif isinstance(chart, Course):
            _course(sheet, chart)
        elif _is_radar(chart, kind):
            _radar(sheet, chart)
        elif kind == "auto" and chart.many():
            _dots(sheet, chart)
        else:
            _bars(sheet, chart)
    sheet.fit()
    return figure


@dataclass(slots=True)
class _Sheet:
    """Axes below one another on a figure that grows; each has inches as its units, y going down from its top."""

    figure: Figure
    top: float = 0.0  # how far down it is filled
    places: list[tuple[Axes, float, float, float]] = field(default_factory=list)

    def axes(self, width: float, height: float) -> Axes:
        """New axes of that size; `put` gives them their place."""
        size = self.figure.get_size_inches()
        axes: Axes = self.figure.add_axes((0.0, 0.0, width / size[0], height / size[1]), label=str(len(self.places)))
        axes.set_xlim(0.0, width)
        axes.set_ylim(height, 0.0)
        axes.set_axis_off()
        return axes

    def put(self, axes: Axes, width: float, height: float, *, above: float, below: float = 0.0) -> None:
        """Put axes below what is there, with so much room above and below them."""
        self.places.append((axes, self.top + above, width, height))
        self.top += above + height + below + _BETWEEN

    def size(self, artist: Artist) -> tuple[float, float]:
        """Width and height of what is drawn."""
        box = artist.get_window_extent()
        return box.width / self.figure.dpi, box.height / self.figure.dpi

    def fit(self) -> None:
        """Make the figure as large as the axes need, and put them in their places."""
        wide, high = max(width for _, _, width, _ in self.places), self.top
        self.figure.set_size_inches(wide, high)
        for axes, top, width, height in self.places:
            axes.set_position((0.0, 1 - (top + height) / high, width / wide, height / high))


def _is_radar(chart: Scores, kind: Kind) -> bool:
    return chart.round() and (kind == "radar" or (kind == "auto" and len(chart.spokes()) >= _FROM and not chart.many()))


@dataclass(frozen=True, slots=True)
class _Style:
    """What a series looks like: bars are filled and hatched, lines have a colour, a marker and dashes."""

    fill: str
    hatch: str
    line: str
    marker: str
    dashes: str


def _styles(chart: Scores) -> list[_Style]:
    styles = []
    for series, i in zip(chart.series, chart.ranks(), strict=True):
        if series.role == "base":
            styles.append(_Style(colours.GREY, "", colours.GREY, ".", ":"))
        elif series.role == "expert":
            styles.append(_Style(colours.PAPER, _HATCHES[i % len(_HATCHES)], colours.INK, ".", "--"))
        else:
            colour, again = colours.SERIES[i % len(colours.SERIES)], i // len(colours.SERIES)
            marker = _MARKERS[i % len(_MARKERS)]
            styles.append(_Style(colour, _HATCHES[again % len(_HATCHES)], colour, marker, "-" if not again else "-."))
    return styles


def _bars(sheet: _Sheet, chart: Scores) -> None:
    """Horizontal bars: names are read without turning the head, however long."""
    labels = [wrap(task, _LABEL, 3) for task in chart.tasks]
    heights = [max(len(chart.series) * _BAR, (label.count("\n") + 1) * _LINE) + _GAP for label in labels]
    height = sum(heights)
    axes, low, scale = _axis(sheet, chart, height)
    styles, top = _styles(chart), 0.0
    for i, (label, high_is) in enumerate(zip(labels, heights, strict=True)):
        average = chart.average and i == len(labels) - 1
        if average:
            axes.plot([0, _WIDTH], [top, top], color=colours.INK, linewidth=0.6)
        axes.text(
            -0.08, top + high_is / 2, label, ha="right", va="center",
            fontweight="bold" if average else "normal",
        )  # fmt: skip
        for j, (series, style) in enumerate(zip(chart.series, styles, strict=True)):
            middle = top + high_is / 2 + (j - (len(chart.series) - 1) / 2) * _BAR
            end, value = _bar(axes, series, style, i, middle, low, scale), series.values[i]
            axes.text(
                (end - low) * scale + 0.05, middle, chart.text(value, series.errors[i]), ha="left", va="center",
                fontsize=_SMALL, color=_FAINT if value is None else colours.INK, bbox=_HALO, zorder=1,
            )  # fmt: skip
        top += high_is
    from matplotlib.patches import Patch

    keys = [Patch(facecolor=s.fill, edgecolor=colours.INK, linewidth=0.5, hatch=s.hatch) for s in styles]
    sheet.put(axes, _WIDTH, height, above=_legend(sheet, axes, chart, keys), below=0.2)


def _axis(sheet: _Sheet, chart: Scores, height: float) -> tuple[Axes, float, float]:
    """Axes with the ticks of the scores across; where they begin, and how long a unit is."""
    texts = [chart.text(v, e) for s in chart.series for v, e in zip(s.values, s.errors, strict=True)]
    low, high = chart.reach()
    scale = (_WIDTH - max(map(len, texts)) * _CHARACTER) / (high - low)  # the longest bar leaves room for its figure
    axes = sheet.axes(_WIDTH, height)
    for tick in ticks(low, high):
        at = (tick - low) * scale
        axes.plot([at, at], [0, height], color=colours.INK if tick == 0 else _RULE, linewidth=0.6, zorder=0)
        axes.text(at, height + 0.05, chart.tick(tick), ha="center", va="top", fontsize=_SMALL)
    return axes, low, scale


def _dots(sheet: _Sheet, chart: Scores) -> None:
    """A row for each series, the best at the top: a dot for its last value, ticks for the others."""
    labels = [wrap(series.name, _LABEL, 3) for series in chart.sorted()]
    heights = [(label.count("\n") + 1) * _LINE + 0.06 for label in labels]
    height, top = sum(heights), 0.0
    axes, low, scale = _axis(sheet, chart, height)
    for series, label, high_is in zip(chart.sorted(), labels, heights, strict=True):
        *others, value = series.values
        error, middle = series.errors[-1], top + high_is / 2
        axes.text(-0.08, middle, label, ha="right", va="center")
        marks = [(each - low) * scale for each in others if each is not None]
        axes.vlines(marks, middle - 0.04, middle + 0.04, color=colours.GREY, linewidth=0.8, zorder=1)
        if value is not None:
            at, reach = (value - low) * scale, (error or 0.0) * scale
            fill = {"base": colours.GREY, "expert": colours.PAPER}.get(series.role, colours.SERIES[0])
            axes.hlines(middle, at - reach, at + reach, color=colours.INK, linewidth=0.9, zorder=2)
            axes.plot(at, middle, "o", color=fill, markersize=5, markeredgecolor=colours.INK, markeredgewidth=0.5)
        text = chart.text(value, error)
        axes.text(_WIDTH, middle, text, ha="right", va="center", fontsize=_SMALL, bbox=_HALO)
        top += high_is
    title = wrap(chart.title + ("; dots are averages, ticks tasks" if chart.average else ""), 70, 3)
    drawn = axes.text(0.0, -0.08, title, ha="left", va="bottom", fontsize=_TITLE)
    sheet.put(axes, _WIDTH, height, above=sheet.size(drawn)[1] + 0.15, below=0.2)


def _course(sheet: _Sheet, chart: Course) -> None:
    """Candidates from left to right: a dot for the score of each, steps for the best so far, dots for the base."""
    axes, places = sheet.axes(_WIDTH, _WIDTH / 2), range(1, len(chart.values) + 1)
    axes.set_axis_on()
    axes.set(xlim=(0.5, len(places) + 0.5), ylim=chart.reach(), yticks=ticks(*chart.reach()))
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.tick_params(labelsize=_SMALL, color=_RULE)
    axes.locator_params(axis="x", integer=True)
    axes.step(places, chart.best, where="post", color=colours.INK, linewidth=1.0, label="best so far")
    axes.plot(places, chart.values, "o", color=colours.SERIES[0], markersize=4, label="candidate")
    if chart.base is not None:
        axes.axhline(chart.base, color=colours.GREY, linestyle=":", label="base")
    axes.legend(fontsize=_SMALL, loc="lower right", frameon=True, edgecolor=_RULE)
    above = sheet.size(axes.set_title(wrap(chart.title, 70, 3), loc="left", fontsize=_TITLE))[1]
    sheet.put(axes, _WIDTH, _WIDTH / 2, above=above + 0.15, below=0.2)


def _bar(axes: Axes, series: Series, style: _Style, task: int, middle: float, low: float, scale: float) -> float:
    """Draw a bar with its standard error; where both end, from zero on."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    value, error = series.values[task], series.errors[task]
    if value is None:
        return 0.0
    # Artists are added without asking for limits, which takes longer than all else.
    axes.add_artist(
        Rectangle(
            (-low * scale, middle - 0.42 * _BAR), value * scale, 0.84 * _BAR, facecolor=style.fill, hatch=style.hatch,
            edgecolor=colours.INK, linewidth=0.5, clip_on=False,
        )
    )  # fmt: skip
    if error is not None:
        start, end = ((value + way * error - low) * scale for way in (-1, 1))
        cap = 0.2 * _BAR
        lines = [[(start, middle), (end, middle)], *([(x, middle - cap), (x, middle + cap)] for x in (start, end))]
        axes.add_artist(LineCollection(lines, colors=colours.INK, linewidths=0.8, clip_on=False, zorder=2))
    return max(value + (error or 0.0), 0.0)


def _radar(sheet: _Sheet, chart: Scores) -> None:
    """A spoke for each task, from zero at the centre; the line of a model has a gap where it has no score."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Polygon

    tasks, high = chart.spokes(), chart.reach()[1]
    radius = max(1.6, 0.15 * len(tasks))
    labels = [wrap(task, 16, 3) for task in tasks]
    room = max(label.count("\n") + 1 for label in labels) * _LINE
    width, height = max(2 * radius, _WIDTH), 2 * (radius + 0.24 + room)
    x, y, scale = width / 2, height / 2, radius / high
    turns = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    ways = [(math.sin(turn), -math.cos(turn)) for turn in turns]  # clockwise from the top
    axes = sheet.axes(width, height)
    for tick in ticks(0.0, high):
        axes.add_patch(Circle((x, y), tick * scale, fill=False, edgecolor=_RULE, linewidth=0.6, zorder=0))
    for (across, down), label in zip(ways, labels, strict=True):
        axes.plot([x, x + across * radius], [y, y + down * radius], color=_RULE, linewidth=0.6, zorder=0)
        # Up by half its height at the top, down at the bottom: labels keep clear of the circle and of one another.
        away, half = radius + 0.14, (label.count("\n") + 1) * _LINE / 2
        side = "center" if abs(across) < 1e-6 else "left" if across > 0 else "right"
        axes.text(x + across * away, y + down * (away + half), label, ha=side, va="center")
    for series, style in zip(chart.series, _styles(chart), strict=True):
        points = [
            None if value is None else (x + across * value * scale, y + down * value * scale)
            for value, (across, down) in zip(series.values, ways, strict=False)
        ]
        for start, end in zip(points, [*points[1:], points[0]], strict=True):
            if start and end:
                axes.plot(*zip(start, end, strict=True), color=style.line, linewidth=1.3, linestyle=style.dashes)
        for point, error, (across, down) in zip(points, series.errors, ways, strict=False):
            if point:
                axes.plot(*point, color=style.line, marker=style.marker, markersize=4, markeredgecolor=colours.INK,
                          markeredgewidth=0.4)  # fmt: skip
            if point and error:
                reach = [error * scale * way for way in (-1, 1)]
                axes.plot([point[0] + across * r for r in reach], [point[1] + down * r for r in reach],
                          color=style.line, linewidth=0.8)  # fmt: skip
        corners = [point for point in points if point]
        if series.role == "model" and len(corners) == len(points) and len(chart.series) <= 5:
            axes.add_patch(Polygon(corners, facecolor=style.fill, alpha=0.08, edgecolor="none"))
    for tick in ticks(0.0, high)[1:]:  # above the lines
        axes.text(x + 0.03, y - tick * scale, chart.tick(tick), fontsize=_SMALL - 0.5, va="center", bbox=_HALO)
    keys = [
        Line2D([], [], color=s.line, linestyle=s.dashes, marker=s.marker, markersize=4, linewidth=1.3,
               markeredgecolor=colours.INK, markeredgewidth=0.4)
        for s in _styles(chart)
    ]  # fmt: skip
    sheet.put(axes, width, height, above=_legend(sheet, axes, chart, keys))


def _heatmap(sheet: _Sheet, chart: Heatmap) -> None:
    """A cell for each figure, which it has in it; nothing but hatching where there is none."""
    from matplotlib.collections import PolyCollection

    count = len(chart.rows)
    row = min(_ROW, _MOST_ROWS / count)
    every = math.ceil(_LINE / row - 1e-9)  # rows that are named
    width, height = len(chart.columns) * _COLUMN, count * row
    axes = sheet.axes(width, height)
    places = [(i, j) for i in range(count) for j in range(len(chart.columns)) if chart.diagonal or i != j]
    cells = [(i, j) for i, j in places if chart.values[i][j] is not None]
    empty = [(i, j) for i, j in places if chart.values[i][j] is None]
    shades = [colours.shade(_step(chart, chart.values[i][j])) for i, j in cells]
    missing = {"facecolors": "none", "edgecolors": _RULE, "hatch": "////"}
    for some, look in ((cells, {"facecolors": shades, "edgecolors": colours.PAPER}), (empty, missing)):
        corners = [[(j * _COLUMN + a * _COLUMN, i * row + b * row) for a, b in _CORNERS] for i, j in some]
        axes.add_collection(PolyCollection(corners, linewidths=0.5, clip_on=False, **look), autolim=False)
    if every == 1:
        for i, j in places:
            value = chart.values[i][j]
            ink = _FAINT if value is None else colours.ink_on(colours.shade(_step(chart, value)))
            axes.text((j + 0.5) * _COLUMN, (i + 0.5) * row, chart.text(value), ha="center", va="center",
                      fontsize=_SMALL, color=ink)  # fmt: skip
    for i in range(0, count, every):
        axes.text(-0.08, (i + 0.5) * row, shorten(chart.rows[i], 60), ha="right", va="center", fontsize=_SMALL + 0.5)
    names = [shorten(column, 40) for column in chart.columns]
    labels = [axes.text((j + 0.5) * _COLUMN, -0.07, name, ha="center", va="bottom") for j, name in enumerate(names)]
    if any(sheet.size(label)[0] > _COLUMN - 0.05 for label in labels):
        for label in labels:
            label.set_rotation(90)
    above = max(sheet.size(label)[1] for label in labels) + 0.07 + 0.12
    lines = wrap(chart.title, 70, 4)
    title = axes.text(0.0, -above, lines, ha="left", va="bottom", fontsize=_TITLE)
    tall = _scale(axes, chart, width + 0.25, height)
    sheet.put(axes, width, height, above=above + sheet.size(title)[1] + 0.05, below=max(tall - height, 0.0))


def _step(chart: Heatmap, value: float | None) -> int:
    return colours.step((value or 0.0) - chart.centre, chart.limit)


def _scale(axes: Axes, chart: Heatmap, across: float, height: float) -> float:
    """Which shade is which figure, at the right of a heatmap; how far down it goes."""
    from matplotlib.collections import PolyCollection

    lowest = -colours.STEPS if chart.has_negative() else 0
    steps, tall = range(colours.STEPS, lowest - 1, -1), min(max(height, 1.0), 2.5)
    each = tall / len(steps)
    corners = [[(across + 0.14 * a, i * each + each * b) for a, b in _CORNERS] for i in range(len(steps))]
    shades = [colours.shade(step) for step in steps]
    axes.add_collection(
        PolyCollection(corners, facecolors=shades, edgecolors=shades, linewidths=0.3, clip_on=False), autolim=False
    )
    ends = {0.0: chart.limit, tall: -chart.limit if lowest else 0.0, **({tall / 2: 0.0} if lowest else {})}
    ends = {at: round(chart.centre + value, 9) for at, value in ends.items()}
    for at, value in ends.items():
        side = "top" if at == 0.0 else "bottom" if at == tall else "center"
        axes.text(across + 0.2, at, f"{value:g}", va=side, fontsize=_SMALL)
    if chart.what:
        axes.text(across + 0.2, tall / 4, wrap(chart.what, 14, 2), va="center", fontsize=_SMALL, color=_FAINT)
    return tall


def _legend(sheet: _Sheet, axes: Axes, chart: Scores, keys: Sequence[Artist]) -> float:
    """The title and the names of the series above the axes, in as many columns as fit; the height it takes."""
    names = [wrap(series.name, 44, 2) for series in chart.series]
    for columns in range(len(names), 0, -1):
        legend = axes.legend(
            keys, names, ncols=columns, title=wrap(chart.title, 70, 3), title_fontsize=_TITLE, alignment="left",
            loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.3, borderpad=0.0, handlelength=2.2,
        )  # fmt: skip
        width, height = sheet.size(legend)
        if width <= _WIDTH:
            break
    return height + 0.1
