"""What the command line says, and where: results on stdout, all else on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from modelmerge.errors import ModelMergeError, spelled
from modelmerge.text import visible, visible_lines

Format = Literal["human", "json", "quiet"]

# Where the command line's word for a parameter of a verb is another one.
_FLAGS = {
    "weights": "weight", "experts": "expert", "tasks": "task", "templates": "template", "tries": "try", "out": "output",
    "full_experts": "experts", "metrics": "metric", "page": "report",
}  # fmt: skip


def flag(option: str) -> str:
    """An option as it is typed, by its Python name."""
    return "--" + _FLAGS.get(option, option).replace("_", "-")


_FOLDED = 24  # cells of a column of words that is folded


class Unprinted(Exception):
    """A result could not be written to stdout: its disk is full, or its reader has gone away."""


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise Unprinted(error.strerror) from error


class Screen(Console):
    """A console that shows text as text, whoever it is from: no markup, and no control codes but Rich's own."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **settings)

    def render(self, *renderable: Any, **settings: Any) -> Iterator[Segment]:
        """What is printed, in pieces. All of it comes by here, progress bars too."""
        for piece in super().render(*renderable, **settings):
            yield piece if piece.control else piece._replace(text=visible_lines(piece.text))


class Sink:
    """Renders results in one of three formats.

    human: text and tables for a terminal. json: exactly one object on stdout. quiet: the one thing a script wants.
    """

    def __init__(self, form: Format, *, verbose: bool = False) -> None:
        self.form = form
        self.verbose = verbose
        # A table that goes to a file or a pipe is as wide as it needs to be.
        width = None if sys.stdout.isatty() else 1000
        self.screen = Screen(file=sys.stdout, width=width)
        self.margin = Screen(file=sys.stderr)

    def result(self, data: Mapping[str, Any], *, quiet: str, human: Sequence[str | Table | Text]) -> None:
        """Print a command's result: `data` as JSON, `quiet` alone, or the lines and tables for people."""
        with _printing():
            if self.form == "json":
                _write(json.dumps(data, indent=2))
            elif self.form == "quiet":
                # A script gets the very letters, and bytes, of a path.
                _write(visible_lines(quiet) if self.screen.is_terminal else quiet)
            else:
                for part in human:
                    self.screen.print(visible_lines(part) if isinstance(part, str) else part)

    def note(self, message: str) -> None:
        """Say something a person should know; nothing in quiet form."""
        if self.form != "quiet":
            self._say(line(("note:", "yellow"), f" {visible(message)}"))

    def say(self, message: str) -> None:
        """Say how far the work is; nothing in quiet form."""
        if self.form != "quiet":
            self._say(line(visible(message)))

    def trace(self, lines: str) -> None:
        """Show on stderr where a bug is."""
        self._say(line(lines.rstrip()))

    def failed(self, message: str) -> None:
        """Say on stderr that a result is not what was asked for; the result itself has been printed."""
        self._say(line(("error:", "bold red"), f" {message}"))

    def error(self, error: ModelMergeError) -> None:
        """Say what went wrong and what to do, with options as they are typed."""
        hint = error.hint_template and spelled(error.hint_template, flag)
        self.failure(spelled(error.template, flag), hint, error.exit_code)

    def failure(self, message: str, hint: str | None, exit_code: int) -> None:
        """Say what went wrong and what to do, on stderr; with JSON, also as the one object on stdout."""
        self.failed(message)
        if hint:
            self._say(line(("hint:", "bold cyan"), f" {hint}"))
        if self.form == "json":
            outcome = {"error": {"message": message, "hint": hint, "exit_code": exit_code}}
            with _printing():
                _write(json.dumps(outcome, indent=2))

    def _say(self, text: Text) -> None:
        with contextlib.suppress(OSError):  # a full disk under a log of stderr is no reason to lose a merge
            self.margin.print(text)


def _write(text: str) -> None:
    """A line on stdout."""
    try:
        sys.stdout.write(f"{text}\n")
    except UnicodeEncodeError:  # bytes of a path that are no text
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(f"{text}\n"))


def size(count: int) -> str:
    """A number of bytes for people, in units of 1000."""
    value, units = float(count), ("bytes", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def line(*parts: str | tuple[str, str]) -> Text:
    """A line of parts, each a text or a text and its style."""
    return Text.assemble(
        *((visible_lines(each), "") if isinstance(each, str) else (visible_lines(each[0]), each[1]) for each in parts)
    )


class Grid(Table):
    """A plain table in which no word that one must type, and no number, is ever cut.

    Where the terminal is too narrow, the last of the columns that are words is folded. Where that is not enough, the
    columns of numbers go below one another, some at a time beside the names of the rows that have any. Where a name has
    no room for a number beside it, and where rows have more words, each row becomes a paragraph.
    """

    def __init__(self, title: str | None, columns: Sequence[str], words: int) -> None:
        super().__init__(
            title=title and visible(title), title_justify="left", box=None, pad_edge=False, padding=(0, 1),
            header_style="bold",
        )  # fmt: skip
        self._words = words
        self._cells: list[list[Text]] = []
        self._headers = [visible(column) for column in columns]
        for i, column in enumerate(self._headers):
            folds = 0 < i == words - 1
            self.add_column(column, justify="left" if i < words else "right", no_wrap=not folds, overflow="fold")

    def add_cells(self, cells: Sequence[str | Text]) -> None:
        """Add a row; a cell may have a style of its own."""
        texts = [Text(visible(cell)) if isinstance(cell, str) else cell for cell in cells]
        self._cells.append(texts)
        self.add_row(*texts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least() <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), "italic")
        if blocks := self._blocks(options.max_width):
            for i, block in enumerate(blocks):
                if i:
                    yield ""
                yield self._part(block, whole=i == 0)
            return
        for cells in self._cells:
            yield Text.assemble((cells[0].plain, "bold"), overflow="fold")
            width = max(map(len, self._headers[1:]), default=0)
            for header, cell in zip(self._headers[1:], cells[1:], strict=True):
                yield Text.assemble(f"  {header:<{width}}  " if width else "  ", cell, overflow="fold")

    def _least(self) -> int:
        """Cells that the table needs: each column its widest, one that is folded some."""
        widths = [max(map(cell_len, column)) for column in self._columns_of_text()]
        folded = [
            _FOLDED if column.no_wrap is False else width for column, width in zip(self.columns, widths, strict=True)
        ]
        return sum(map(min, folded, widths)) + 2 * len(widths) - 1

    def _blocks(self, room: int) -> list[list[int]]:
        """The columns of each table that has room, the first of them in all; none where that cannot be."""
        name, *widths = (max(map(cell_len, column)) for column in self._columns_of_text())
        if self._words != 1 or name + 2 + max(widths, default=0) > room:
            return []
        blocks, used = [[0]], name
        for j, width in enumerate(widths, 1):
            if used + 2 + width > room:
                blocks.append([0])
                used = name
            blocks[-1].append(j)
            used += 2 + width
        return blocks

    def _part(self, columns: list[int], *, whole: bool) -> Grid:
        """Some of its columns; of the rows, where they are not to be whole, those that have something there."""
        grid = Grid(None, [self._headers[j] for j in columns], 1)
        for cells in self._cells:
            if whole or any(cells[j].plain not in ("", "-") for j in columns[1:]):
                grid.add_cells([cells[j] for j in columns])
        return grid

    def _columns_of_text(self) -> list[list[str]]:
        rows = [self._headers, *([cell.plain for cell in cells] for cells in self._cells)]
        return [list(column) for column in zip(*rows, strict=True)]


def table(title: str | None, columns: list[str], rows: Sequence[Sequence[str | Text]], *, words: int = 1) -> Table:
    """A plain table; the first `words` columns are words, the others numbers. A cell may have a style of its own."""
    grid = Grid(title, columns, words)
    for row in rows:
        grid.add_cells(row)
    return grid
