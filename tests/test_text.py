"""What strangers named is text in every sink: terminal, Markdown, HTML. No sink may be passed by."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from modelmerge.charts import page
from modelmerge.cli.bars import Bars
from modelmerge.cli.output import Sink, line, table
from modelmerge.record import card, markdown
from modelmerge.text import visible, visible_lines
from tests.support.strangers import HOSTILE, MARKS, steers, tokens

PACKAGE = Path(__file__).parent.parent / "modelmerge"
MODULES = sorted(PACKAGE.rglob("*.py"))
# --- as such ---


def test_what_steers_is_shown_by_its_number() -> None:
    assert visible("a\x1b[1m\n\r\u202e\udcff\x9b\U000e0041") == r"a\x1b[1m\n\r\u202e\xff\x9b\U000e0041"
    assert visible_lines("a\n\tb\rc") == "a\n\tb\\rc"
    for text in ("Ünïcode 漢字 \N{PILE OF POO}", "क्\N{ZERO WIDTH JOINER}ष", "a\N{NO-BREAK SPACE}b", ""):
        assert visible(text) == text


# --- Markdown ---


def shown(text: str) -> str:
    return "".join(token.content for token in tokens(text) if token.type in ("text", "code_inline"))


PLAIN = {"paragraph_open", "paragraph_close", "inline", "text"}


@pytest.mark.parametrize(
    "text",
    [HOSTILE, MARKS, "# h", "- x", "+ x", "1. x", "1) x", "=====", "---", "***", "    code", "> q", "a\\", "\\",
     "|a|b|", "| - |", "&amp;", "<!-- x", "q_proj", "__init__", "0.5", "-0.5", "~~a~~", "[a]: http://b", "a  \nb"],
)  # fmt: skip
def test_words_are_shown_letter_for_letter(text: str) -> None:
    written = markdown.words(text)
    assert {token.type for token in tokens(written)} <= PLAIN
    assert shown(written) == visible(text).strip()
    row = markdown.table(("", "x"), [[written, markdown.code(text)]])
    cells = [token.content for token in tokens(row) if token.type == "inline"]
    assert len(cells) == 4, "a cell stays one"
    assert shown(markdown.code(text)).strip() == visible(text).strip()
    assert [token.type for token in tokens(markdown.code(text))] == [
        "paragraph_open", "inline", "code_inline", "paragraph_close"]  # fmt: skip


def test_names_of_tensors_need_no_escapes() -> None:
    for text in ("model.layers.0.q_proj.weight", "(x)", "'a' is in b, c.", "0.5", "-1", "org/name"):
        assert markdown.words(text) == text


def test_a_block_of_code_ends_where_it_ends() -> None:
    block = markdown.block("a\n```\n# heading\n````", "sh")
    assert [token.type for token in MarkdownIt().parse(block)] == ["fence"]


def test_a_shell_line_says_every_byte(tmp_path: Path) -> None:
    words = ["a b", "x'y", "\x1b[31m", "\udcff", "\u202e", "n\nl", "\\", "plain", "", "é"]
    said = markdown.shell(words)
    assert not steers(said)
    said.encode()
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {said}"], capture_output=True, check=True).stdout
    assert echoed.decode(errors="surrogateescape").split("\0")[:-1] == words


def hostile_card(text: str) -> str:
    front = {"license": text, "license_name": text, "pipeline_tag": text, "tags": [text]}
    models = [card.Model(name=text, reference=text, weight=weight, front=front) for weight in (None, 1.0, 2.0)]
    models[2] = card.Model(name=text, reference=text, weight=2.0, front={"license": text + "2"})
    method = card.Source(name="ties", summary=text, paper="https://p", bibtex="@misc{x}", options={text: text})
    whole = card.render(
        title=text, base=models[0], experts=models[1:], methods=[method], settings={text: (text, text)},
        command="modelmerge merge ties base", notes=[text, text], library="transformers",
        versions={"modelmerge": "1"}, device="cpu",
    )  # fmt: skip
    result = card.Result(task=text, dataset=text, metric=text, value=0.5, split=text, detail=text)
    return card.with_results(whole, [result], name=text)


def test_a_card_is_built_as_if_every_name_were_plain() -> None:
    """Headings, links, tables and blocks are those of the card of harmless names, and all else is text."""

    def structure(text: str) -> list[str]:
        body = text.split("---\n", 2)[2]
        return [token.type for token in tokens(body) if token.type not in ("text", "code_inline", "html_block")]

    hostile = hostile_card(HOSTILE)
    assert structure(hostile) == structure(hostile_card("plain"))
    assert not steers(hostile)
    blocks = [token.content for token in tokens(hostile.split("---\n", 2)[2]) if token.type.startswith("html")]
    assert all(block.strip() in (card._START, card._END) for block in blocks)
    hostile.encode()


# --- the terminal ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_terminal_is_told_nothing_but_text(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = stream(), stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for form in ("human", "json", "quiet"):
        sink = Sink(form)  # type: ignore[arg-type]
        rows = [[HOSTILE, "1"]]
        sink.result(
            {HOSTILE: HOSTILE},
            quiet="path",
            human=[HOSTILE, line((HOSTILE, "bold")), table(HOSTILE, [HOSTILE, ""], rows)],
        )
        sink.note(HOSTILE)
        sink.failure(HOSTILE, HOSTILE, 1)
        sink.trace(HOSTILE)
        sink.screen.print(HOSTILE)  # whatever way a text takes
        with Bars(sink) as bars:
            bars.stage(HOSTILE, 10)
            bars.advance(5, HOSTILE)
            bars.note(HOSTILE)
    text = out.getvalue() + err.getvalue()
    assert not steers(text)
    assert "[red]x[/red]" in text, "markup of names is no markup"
    assert r"\x1b[31m" in text
    text.encode()


def test_bars_on_a_terminal_show_no_codes_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    with Bars(Sink("human")) as bars:
        bars.stage("a\x1b]0;title\x07[red]b[/red]", 10)
        bars.advance(5, "t\x1b]0;title\x07\u202e")
    assert "\x1b]0" not in err.getvalue()
    assert "\u202e" not in err.getvalue()
    assert r"a\x1b]0;title\x07[red]b[/red]" in err.getvalue()


def test_a_script_gets_the_bytes_of_a_path() -> None:
    names = ["plain", "\x1b[31m", "\udcff", "a\nb", "\u202e", "é"]
    shown = "Sink('quiet').result({}, quiet=name, human=[])"
    program = f"from modelmerge.cli.output import Sink\nfor name in {names!a}: {shown}"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert out == "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")


def test_json_holds_every_name_in_plain_letters(capsys: pytest.CaptureFixture[str]) -> None:
    Sink("json").result({HOSTILE: [HOSTILE]}, quiet="", human=[])
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {HOSTILE: [HOSTILE]}


# --- pages ---


def test_a_page_shows_text_and_tells_no_folder() -> None:
    files = {"/home/alice/m/model.safetensors": {"sha256": "0" * 64, "bytes": 3}}
    score = {"score": 0.5, "stderr": 0.1, "count": 3, "metric": HOSTILE, "normalised": None}
    row = {
        "name": HOSTILE, "role": "model", "reference": "/home/alice/m", "path": "/home/alice/m", "files": files,
        "scores": {HOSTILE: score}, "average": 0.5, "average_stderr": None, "normalised": None, "digest": "",
        "cached": [],
    }  # fmt: skip
    report: Any = {
        "suite": "custom", "device": "cpu", "created": "now", "versions": {"modelmerge": "1"}, "notes": [HOSTILE],
        "models": [row], "tasks": [HOSTILE], "seed": 0,
        "metric": {"script": "/home/alice/metric.py:score", HOSTILE: HOSTILE},
    }  # fmt: skip
    shown = page.render(report)
    assert not steers(shown)
    assert "<script>alert" not in shown
    assert "alice" not in shown
    shown.encode()


# --- nothing passes the sinks by ---

# Where text goes out of the process, and who may send it there.
_OUT = {
    ("cli/output.py", "stdout"), ("cli/output.py", "stderr"), ("cli/__init__.py", "stdout"), ("cli/merge.py", "stderr"),
    ("cli/evaluate.py", "stderr"), ("interrupts.py", "stdout"), ("interrupts.py", "stderr"),  # flushed there
    ("__main__.py", "stdout"), ("__main__.py", "stderr"),  # words of its own, before there is a command line
}  # fmt: skip


def called(node: ast.AST) -> str:
    """The dotted name of what is called or looked up: of two words at most, as all of these are."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_all_that_is_printed_goes_through_the_sink() -> None:
    for file in MODULES:
        place = file.relative_to(PACKAGE).as_posix()
        if place != "cli/output.py":
            assert not re.search(r"rich(\.console)? import .*(Console|print)|rich\.markup", file.read_text()), place
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{place}:{getattr(node, 'lineno', 0)} writes past the sink"
            if isinstance(node, ast.Call):
                assert called(node.func) not in (
                    "print",
                    "traceback.print_exc",
                    "traceback.print_exception",
                    "Text.from_markup",
                ), where
                if called(node.func) == "typer.echo":
                    assert called(node.args[0]) == "modelmerge.__version__", where
            if called(node) in ("sys.stdout", "sys.stderr"):
                assert (place, called(node).removeprefix("sys.")) in _OUT, where


def test_markup_of_ours_is_on_help_pages_alone() -> None:
    """Screens read no markup, so that a name's cannot count; ours would be shown as it stands."""
    for file in (file for file in MODULES if file.parent.name == "cli" and file.name != "help.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not {"[/]", "[bold]"} & set(re.findall(r"\[/?\w*\]", node.value)), (file, node.lineno)


def test_cards_are_made_by_markdown_alone() -> None:
    """Marks of Markdown stand beside a name only where `markdown` put it between them."""
    tree = ast.parse((PACKAGE / "record" / "card.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
            for before, value in itertools.pairwise(parts):
                text = before.value if isinstance(before, ast.Constant) else ""
                if (
                    isinstance(value, ast.FormattedValue)
                    and isinstance(text, str)
                    and text.endswith(("`", "# ", "- ", "| "))
                ):
                    inner = ast.unparse(value.value)
                    assert inner.startswith(("words(", "code(", "REPLAY")), inner
