"""What the command line shows: tables that lose nothing, progress with and without a terminal, errors in no time."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from modelmerge.cli import bars as bars_module
from modelmerge.cli import main
from modelmerge.cli.bars import Bars, clock
from modelmerge.cli.merge import list_methods
from modelmerge.cli.output import Screen, Sink, table
from modelmerge.methods import registry
from tests.support.checkpoints import base_state, write


def printed(part: object, width: int) -> str:
    stream = io.StringIO()
    Screen(file=stream, width=width).print(part)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_never_cut_a_name_or_a_number(width: int) -> None:
    names = [f"a-model-of-some-length-{i}" for i in range(3)]
    figures = [[f"{i + j}.{j:04}" for j in range(9)] for i in range(3)]
    rows = [[name, *numbers] for name, numbers in zip(names, figures, strict=True)]
    text = printed(table("Scores", ["model", *(f"column {i}" for i in range(9))], rows), width)
    for row in rows:
        assert all(re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text) for cell in row)
    assert all(f"column {i}" in text for i in range(9))
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_columns_without_room_go_below_one_another() -> None:
    rows = [["whole model", "73.4 %", "0.047"], ["a.bias", "-", "-"], ["b.weight", "71.2 %", "-"]]
    lines = printed(table("Conflicts", ["", "sign conflict", "mean |cos|"], rows), 28).splitlines()
    assert [line.split() for line in lines] == [
        ["Conflicts"],
        ["sign", "conflict"], ["whole", "model", "73.4", "%"], ["a.bias", "-"], ["b.weight", "71.2", "%"],
        [],
        ["mean", "|cos|"], ["whole", "model", "0.047"],
    ]  # fmt: skip


def test_a_name_without_room_beside_it_heads_a_paragraph() -> None:
    text = printed(table(None, ["model", "accuracy"], [["a-model-of-some-length", "73.4 %"]]), 26)
    assert text.splitlines() == ["a-model-of-some-length", "  accuracy  73.4 %"]


@pytest.mark.parametrize("width", [60, 80])
def test_methods_are_listed_by_their_whole_names(width: int) -> None:
    sink = Sink("human")
    sink.screen = Screen(file=io.StringIO(), width=width)
    list_methods("merge", "merge", sink)
    text = sink.screen.file.getvalue()  # type: ignore[attr-defined]
    assert set(registry.names()) <= {line.split()[0] for line in text.splitlines() if line and line[0] != " "}
    assert " ".join(registry.summary("ties").split()) in " ".join(text.split())


def drawn(width: int) -> str:
    sink = Sink("human")
    stream = io.StringIO()
    sink.margin = Screen(file=stream, width=width, force_terminal=True, color_system=None)
    with Bars(sink) as bars:
        bars.stage("merging", 7_400_000_000)
        bars.begin("model.language_model.layers.31.self_attn.q_proj.weight")
        bars.advance(1_200_000_000, "model.language_model.layers.31.self_attn.q_proj.weight")
        bars._progress.refresh()
        return stream.getvalue()


def test_the_bar_keeps_twenty_cells_and_the_name_gives_way() -> None:
    narrow = [line for line in re.split(r"[\r\n]", drawn(80)) if "1.2 GB of 7.4 GB" in line][-1]
    assert narrow.index("1.2 GB") == narrow.index("merging") + len("merging ") + 20 + 1
    assert "proj.weight" in narrow
    assert "self_attn.q_proj.weight" not in narrow
    wide = [line for line in re.split(r"[\r\n]", drawn(160)) if "1.2 GB of 7.4 GB" in line][-1]
    assert wide.index("1.2 GB") == wide.index("merging") + len("merging ") + 40 + 1
    assert "model.language_model.layers.31.self_attn.q_proj.weight" in wide


def test_what_is_at_work_is_named_until_it_ends() -> None:
    """Of several at a time the one that takes longest; what takes no time to speak of is named once it is done."""
    sink, stream = plain("human")
    with Bars(sink) as bars:
        bars.stage("merging", 10, "work")
        for deed, seen in (
            (lambda: bars.begin("large"), "large"), (lambda: bars.begin("small"), "large"),
            (lambda: bars.advance(1, "small"), "large"), (lambda: bars.begin("other"), "large"),
            (lambda: bars.advance(5, "large"), "other"), (lambda: bars.advance(1, "other"), "other"),
            (lambda: bars.advance(1, "piece"), "piece"),
        ):  # fmt: skip
            deed()
            bars._speak()
            assert stream.getvalue().splitlines()[-1].endswith(f", {seen}")
    assert re.fullmatch(r"merging: 80%, 0:00 so far, 0:00 left, piece", stream.getvalue().splitlines()[-1])


def test_what_is_left_runs_down_while_one_item_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: now)
    sink, stream = plain("human")
    bars = Bars(sink)
    bars.stage("merging", 10, "work")
    for seconds, share in ((10.0, 4), (5.0, 0), (20.0, 0), (5.0, 4)):
        now += seconds
        if share:
            bars.advance(share, "matrix")  # a tenth: it says so
        else:
            bars._speak()
    times = [line.split(", ")[1:3] for line in stream.getvalue().splitlines()]
    assert times == [["0:10 so far", "0:15 left"], ["0:15 so far", "0:10 left"], ["0:35 so far", "0:00 left"],
                     ["0:40 so far", "0:10 left"]]  # fmt: skip


def plain(form: Literal["human", "quiet"]) -> tuple[Sink, io.StringIO]:
    """A sink whose margin is no terminal, and what it shows there."""
    sink, stream = Sink(form), io.StringIO()
    sink.margin = Screen(file=stream, width=100)
    return sink, stream


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each tenth, and when nothing has moved for long; not ten lines of a merge that takes a second."""
    monkeypatch.setattr(bars_module, "_EVERY", 0.2)
    sink, stream = plain("human")
    with Bars(sink) as bars:
        bars.stage("merging", 100)
        for _ in range(50):
            bars.advance(1, "some.weight")
        assert stream.getvalue() == ""
        bars.begin("large.weight")
        time.sleep(0.5)
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 3
    assert re.fullmatch(r"merging: 50%, 50 bytes of 100 bytes, 0:0\d so far, 0:0\d left, large.weight", lines[0])
    monkeypatch.setattr(bars_module, "_SOON", 0.0)
    with Bars(sink) as bars:
        bars.stage("merging", 100, "steps")
        for _ in range(100):
            bars.advance(1, "")
    tenths = [line for line in stream.getvalue().splitlines() if "steps" in line]
    assert [line.split(",")[0] for line in tenths] == [f"merging: {10 * i}%" for i in range(1, 11)]


def test_quiet_says_nothing_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars_module, "_SOON", 0.0)
    sink, stream = plain("quiet")
    with Bars(sink) as bars:
        bars.stage("merging", 10)
        bars.advance(10, "x")
    assert stream.getvalue() == ""


def test_a_clock_shows_hours_where_there_are_some() -> None:
    assert [clock(7), clock(760), clock(11_100)] == ["0:07", "12:40", "3:05:00"]


def test_globs_and_strangers_are_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_state()
    base |= {
        f"model.layers.{i}.self_attn.q_proj.weight": base["model.layers.0.q_proj.weight"].clone() for i in range(2, 14)
    }
    shared = {name: tensor for name, tensor in base.items() if "layers" not in name}
    for name, state in (("base", base), ("math", base), ("strange", shared)):
        write(tmp_path / name, state)
    models = [str(tmp_path / name) for name in ("base", "math")]
    assert main(["merge", "average", *models, "-o", str(tmp_path / "out"), "--exclude", "*q_prj*"]) == 2
    assert "hint: did you mean '*q_proj*'?" in capsys.readouterr().err
    assert main(["merge", "average", *models, "-o", str(tmp_path / "out"), "--at", "*.layer.3.*: base"]) == 2
    assert "hint: did you mean '*.layers.3.*'?" in capsys.readouterr().err
    assert main(["merge", "average", *models, str(tmp_path / "strange"), "-o", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "  'model.layers.*': 17 tensors in math, but missing in strange\n" in error
    assert "hint: --exclude 'model.layers.*' copies them from the base" in error
    assert len(error.splitlines()) == 3
    code = main(["merge", "average", *models, str(tmp_path / "strange"), "-o", str(tmp_path / "out"),
                 "--exclude", "model.layers.*"])  # fmt: skip
    assert code == 0


CHEAP = [
    (["merge", "ties", "base", "mth", "-o", "out"], 1, "did you mean 'math'?"),
    (["merge", "ties", "base", "math", "-o", "base"], 1, "is the input"),
    (["merge", "ties", "base", "math", "-o", "full"], 1, "is not empty"),
    (["merge", "ties", "base", "math", "-o", "out", "--density", "0"], 2, "--density must be above 0"),
    (["merge", "ties", "base", "math", "-o", "out", "--weight", "mth=2"], 2, "did you mean 'math'?"),
    (["merge", "ties", "base", "math", "-o", "out", "--at", "*: scale"], 2, "there is no merge method 'scale'"),
    (["merge", "ties", "base", "math", "-o", "out", "--disentangle", "awdd"], 2, "did you mean 'awd'?"),
    (["merge", "tise", "base", "math", "-o", "out"], 2, "ties"),
]
RUN = """
import contextlib, io, json, sys
from modelmerge.cli import main
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]))
"""


def test_errors_that_need_no_torch_do_not_wait_for_it(tmp_path: Path) -> None:
    for name in ("base", "math", "full"):
        write(tmp_path / name, base_state())
    command = [sys.executable, "-c", RUN, json.dumps([words for words, _, _ in CHEAP])]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    outcomes = [json.loads(line) for line in ran.stdout.splitlines()]
    for (words, code, part), (got, said, with_torch) in zip(CHEAP, outcomes, strict=True):
        assert (got, with_torch) == (code, False), (words, said)
        assert part in said, (words, said)
