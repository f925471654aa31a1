"""What strangers may write into names, and how readers of terminals and Markdown take it."""

from __future__ import annotations

from typing import Any

from markdown_it import MarkdownIt

from modelmerge.text import visible

# Codes of terminals, a line that turns around, ends of lines, bytes that are no text; then marks of markup.
STEERS = "\x1b[31m\x9b0m\x07\r\u202e\u2066\u2028\x85\x00\udcff"
MARKS = "[red]x[/red] <script>alert(1)</script> [a](javascript:x) ![i](http://i) *b* _c_ `d` ``` | # http://e &lt; $m$"
HOSTILE = f"{STEERS}\n# heading\n\n```\n<b>{MARKS}"


def steers(text: str) -> list[str]:
    """What steers in a text, but for ends of lines and tabs."""
    return [letter for letter in text if visible(letter) != letter and letter not in "\n\t"]


def tokens(text: str) -> list[Any]:
    """What a reader of Markdown with tables and links sees, all levels flat."""
    flat: list[Any] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        flat += [token, *(token.children or [])]
    return flat
