"""Reports as HTML pages, in a real browser: what they show, light and dark, without a network, whatever names hold."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import modelmerge
from modelmerge.charts import colours, page
from modelmerge.cli import main
from modelmerge.errors import ModelMergeError, UsageError
from modelmerge.verbs.evaluate import evaluate
from modelmerge.verbs.render import render, report_of_search
from tests.support import chromium
from tests.support.chromium import Browser
from tests.support.reports import EIGHT, scores

EVIL = "<script>window.evil=1</script><img src=http://example.org/x onerror=evil=2>"
LONG = tuple(f"mmlu_high_school_european_history_and_what_came_after_it_{i}" for i in range(20))
MISSING = scores(EIGHT, ("ties", "apgd"), missing=(("ties", "svhn"),))
# Boxes of words that lie on one another, by more than half a pixel.
OVERLAPS = """
(() => {
  const found = [], boxes = [...document.querySelectorAll(%s)].map((e) => [e.textContent, e.getBoundingClientRect()])
    .filter(([t, r]) => t.trim() && r.width && r.height);
  boxes.forEach(([s, a], i) => boxes.slice(i + 1).forEach(([t, b]) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > .5 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > .5) found.push([s, t]);
  }));
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    with chromium.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of several kinds."""
    root = tmp_path_factory.mktemp("pages")
    render(MISSING, page=root / "eight.html")
    render(
        scores(LONG, (EVIL, " ".join(LONG[:2]), *(f"m{i}" for i in range(7))), notes=[EVIL]), page=root / "long.html"
    )
    render(scores((EVIL,), ("merged",), experts=False, base=False, gate=FAILED), page=root / "one.html")
    render(scores(EIGHT, tuple(f"m{i}" for i in range(19)), missing=(("m7", "svhn"),)), page=root / "many.html")
    render(report_of_search(SEARCH), page=root / "search.html")
    return root


SEARCH = {
    "device": "cpu", "created": "2026-01-02T03:04:05+00:00", "versions": {"modelmerge": "1"}, "notes": [EVIL],
    "command": "modelmerge merge ties",
    "inputs": {"base": {"name": EVIL, "reference": "b", "files": {}}, "experts": []},
    "searched": {
        "options": {"scale": {"low": 0.1, "high": 1.0, "log": False}}, "chosen": {"scale": 0.5},
        "less_is_better": False, "on": [{"on": [EVIL]}], "base": None,
        "results": [
            {"options": {"scale": scale}, "average": value, "average_stderr": None, "scores": {
                EVIL: {"score": value, "stderr": None, "count": None, "metric": "accuracy"},
            }} for scale, value in ((0.3, None), (0.4, 0.5), (0.5, 0.75), (0.6, 0.25))
        ],
    },
}  # fmt: skip
FAILED = {"gates": ["avg=0.99"], "passed": False,
          "failures": [{"model": "merged", "gate": "avg=0.99", "value": None}]}  # fmt: skip


def rows(browser: Browser, caption: str) -> list[list[str]]:
    """The words of a table, row by row, as they are on the page."""
    return browser.ask(
        f"[...document.querySelectorAll('table')].find(t => t.caption.textContent.trim().startsWith({caption!r}))"
        ".querySelectorAll('tr').values().map(r => [...r.cells].map(c => c.textContent.trim())).toArray()"
    )


def style(browser: Browser, selector: str, what: str) -> str:
    return browser.ask(f"getComputedStyle(document.querySelector({selector!r})).{what}")


def as_hex(colour: str) -> str:
    """`rgb(1, 2, 3)` as `#010203`."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["eight", "long", "one", "many", "search"])
def test_nothing_is_asked_for_and_nothing_complained_of(
    name: str, scheme: Literal["light", "dark"], made: Path, browser: Browser
) -> None:
    file = made / f"{name}.html"
    browser.open(file, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [file.as_uri()]
    assert browser.ask("document.scripts.length") == 1
    assert browser.ask("window.evil") is None


def test_a_search_has_a_dot_for_each_score_and_steps_for_the_best_so_far(made: Path, browser: Browser) -> None:
    browser.open(made / "search.html")
    boxes = browser.ask(
        "[...document.querySelectorAll('.course .marker')].map(m => [m.textContent, m.getBoundingClientRect().top])"
    )
    assert [text for text, _ in boxes] == ["2: 50.0", "3: 75.0", "4: 25.0"]
    first, second, third = (top for _, top in boxes)
    assert second < first < third, "higher is better"
    assert first - second == pytest.approx(0.5 * (third - second), abs=1.0)
    steps = browser.ask("document.querySelector('.course .steps').getBoundingClientRect().toJSON()")
    radius = steps["bottom"] - first
    assert steps["top"] == pytest.approx(second + radius, abs=1.5)
    assert browser.ask("document.querySelector('h1').textContent").startswith("scale=0.5 75.0 % is the best of 4")


def test_the_tables_have_the_reports_numbers(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    told = rows(browser, "Accuracy")
    assert told[0] == ["", *EIGHT, "average", "normalised"]
    roles = {role: [m for m in MISSING["models"] if m["role"] == role] for role in ("model", "expert", "base")}
    best_first = sorted(roles["model"], key=lambda model: -(model["average"] or 0.0))
    for row, model in zip(told[1:], [*best_first, *roles["expert"], *roles["base"]], strict=False):
        values = [model["scores"][task] for task in EIGHT]
        assert row[0].split()[-1] == model["name"]
        wanted = ["n/a" if v["score"] is None else f"{100 * v['score']:.1f} ±{100 * v['stderr']:.1f}" for v in values]
        assert row[1:9] == wanted
        assert row[9].split()[0] == ("n/a" if model["average"] is None else f"{100 * model['average']:.1f}")
    assert told[-1] == ["items", *["1,000"] * 8, "", ""]
    every = rows(browser, "Every score")
    assert len(every) == 1 + len(MISSING["models"]) * len(EIGHT)
    assert every[1][:5] == [
        "base",
        "base",
        "sun397",
        "accuracy",
        f"{MISSING['models'][0]['scores']['sun397']['score']:.6g}",
    ]
    assert [row[5] for row in rows(browser, "Files")[1:]] == ["1,000"] * len(MISSING["models"])
    assert {row[4] for row in rows(browser, "Files")[1:]} == {"ab" * 32}


def test_bars_are_as_long_as_the_scores_and_a_missing_one_is_a_gap(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    lanes = browser.ask(
        "[...document.querySelectorAll('.task:not(.axis)')].map(t => [...t.querySelectorAll('.lane')].map(l =>"
        "[l.querySelector('.bar')?.getBoundingClientRect().width ?? null, l.querySelector('.value').textContent,"
        " l.querySelector('.whisker')?.getBoundingClientRect().width ?? null, l.getBoundingClientRect().width]))"
    )
    assert len(lanes) == len(EIGHT) + 1, "and the average"
    ties = next(model for model in MISSING["models"] if model["name"] == "ties")
    for task, told in zip(EIGHT, lanes, strict=False):
        assert len(told) == 4, "base, the task's expert, two merges, the better one first"
        bar, text, whisker, whole = told[3]
        score = ties["scores"][task]
        if score["score"] is None:
            assert (bar, text, whisker) == (None, "n/a", None)
        else:
            assert bar / whole == pytest.approx(score["score"], abs=0.004)
            assert whisker / whole == pytest.approx(2 * score["stderr"], abs=0.004)
    assert lanes[-1][3][1] == "n/a"
    # Seven points, and no line to or from the eighth.
    assert browser.ask("document.querySelectorAll('.radar [data-series=\"3\"] .marker').length") == 7
    assert browser.ask("document.querySelector('.radar [data-series=\"3\"] .line').getAttribute('d')").count("M") == 6


def test_colours_are_others_in_the_dark_and_all_can_be_read(made: Path, browser: Browser) -> None:
    seen: dict[str, list[str]] = {}
    places = (
        ("html", "backgroundColor"),
        ("html", "color"),
        (".bar.s0", "backgroundColor"),
        ("small, header > p", "color"),
    )
    for scheme in ("light", "dark"):
        browser.open(made / "one.html", scheme=scheme)  # type: ignore[arg-type]
        seen[scheme] = [as_hex(style(browser, *place)) for place in places]
        paper, ink, _, faint = seen[scheme]
        gate = as_hex(style(browser, ".gate", "color"))
        sheet = as_hex(style(browser, ".gate", "backgroundColor"))
        for one, other in ((ink, paper), (faint, paper), (gate, sheet)):
            assert colours.contrast(one, other) > 4.5
    assert seen["light"][:2] == [colours.PAPER, colours.INK]
    assert seen["dark"][:2] == [colours.PAPER_DARK, colours.INK_DARK]
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert as_hex(style(browser, "html", "backgroundColor")) == colours.PAPER, "on paper it is light"
    browser.open(made / "eight.html")
    folded = (
        "document.querySelector('details td').getBoundingClientRect().height > 0 && "
        "document.querySelector('details td').checkVisibility()"
    )
    assert not browser.ask(folded)
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.ask(folded), "and nothing is folded away"
    browser.send("Emulation.setEmulatedMedia", media="")


@pytest.mark.parametrize("width", [360, 400, 1200])
@pytest.mark.parametrize("name", ["eight", "long", "one", "many"])
def test_no_words_overlap_at_any_width(name: str, width: int, made: Path, browser: Browser) -> None:
    browser.open(made / f"{name}.html", width=width)
    for selector in (
        ".bars .name, .bars .value, .bars .tick",
        ".dots .name, .dots .value, .dots .tick",
        ".radar text:not(.ring)",
        "figcaption, .legend li, caption",
    ):
        assert browser.ask(OVERLAPS % json.dumps(selector)) == []
    assert browser.ask("document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert width < 1200 or browser.ask(cut) == 0, "on a desk all of every table is seen"
    assert browser.ask("[...document.querySelectorAll('.radar text')].every(t => {"
                       "const [a, b] = [t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()];"
                       "return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 })")  # fmt: skip


def test_the_headline_says_what_it_comes_to(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    best = next(model for model in MISSING["models"] if model["name"] == "apgd")
    text = f"{100 * best['average']:.1f} ±{100 * best['average_stderr']:.1f} %"
    head = browser.ask("document.querySelector('h1').textContent")
    assert head.startswith(f"apgd {text} is the best of 2 on average over 8 tasks: {100 * best['normalised']:.1f} % of")
    assert browser.ask("document.title") == head
    browser.open(made / "one.html")
    assert "'merged' has n/a on average, and is asked for 99 % (avg=0.99)" in browser.ask("document.body.textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_table_of_scores_is_shaded_by_column(
    scheme: Literal["light", "dark"], made: Path, browser: Browser
) -> None:
    browser.open(made / "eight.html", scheme=scheme)
    cells = browser.ask(
        "[...document.querySelectorAll('.shaded')].flatMap(t => [...t.tBodies[0].rows].map(r => [...r.cells].slice(1)"
        ".map(c => [c.textContent, getComputedStyle(c).backgroundColor, getComputedStyle(c).color])))"
    )
    assert all(
        colours.contrast(as_hex(ground), as_hex(ink)) > 4.5 for row in cells for t, ground, ink in row if t != "n/a"
    )
    for column in range(8):
        values = sorted(
            (float(row[column][0].split()[0]), as_hex(row[column][1])) for row in cells if row[column][0] != "n/a"
        )
        assert values[-1] == (95.0, colours.shade(colours.STEPS, dark=scheme == "dark")), "the task's expert"
        assert values[0][1] == colours.shade(0, dark=scheme == "dark")


def test_many_models_are_dots_the_best_at_the_top(made: Path, browser: Browser) -> None:
    browser.open(made / "many.html")
    assert browser.ask("document.querySelectorAll('.bars, .radar').length") == 0
    tasks = browser.ask(
        "[...document.querySelectorAll('.dots .task:not(.axis)')].map(t => [t.querySelector('.name').textContent,"
        "t.querySelector('.value').textContent, t.querySelector('.dot')?.getBoundingClientRect().x ?? null,"
        "t.querySelectorAll('.mark').length])"
    )
    assert len(tasks) == 21, "with the base and the experts"
    assert [(name, text, at, marks) for name, text, at, marks in tasks if at is None] == [("m7", "n/a", None, 7)]
    assert tasks[-1][0] == "m7", "what has no average is last"
    places = [at for _, _, at, _ in tasks[:-1]]
    assert places == sorted(places, reverse=True)
    averages = [float(text.split()[0]) for _, text, _, _ in tasks[:-1]]
    assert averages == sorted(averages, reverse=True)


def test_a_click_copies_the_whole_digest(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    browser.ask("document.addEventListener('copy', () => { window.copied = getSelection().toString() })")
    box = browser.ask("(e => { e.scrollIntoView(); const r = e.getBoundingClientRect();"
                      " return [r.x + 5, r.y + 5, r.width] })(document.querySelector('.hash'))")  # fmt: skip
    assert box[2] < 120, "it is shown shortened"
    for kind in ("mousePressed", "mouseReleased"):
        browser.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
    assert browser.ask("window.copied") == "ab" * 32
    assert browser.ask("document.querySelector('td.copied') !== null")
    browser.ask("window.copied = null; document.querySelectorAll('.hash')[1].focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert browser.ask("window.copied") == "ab" * 32


def test_columns_sort_and_what_is_missing_comes_last(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    place = 1 + EIGHT.index("svhn")
    first = rows(browser, "Accuracy")
    press = f"document.querySelector('table.sortable').tHead.rows[0].cells[{place}].querySelector('button').click()"
    for way, order in (("descending", -1), ("ascending", 1)):
        browser.ask(press)
        told = rows(browser, "Accuracy")
        values = [row[place] for row in told[1:-1]]
        assert values[-1] == "n/a"
        numbers = [float(value.split()[0]) for value in values[:-1]]
        assert numbers == sorted(numbers, key=lambda number: order * number)
        assert told[-1] == first[-1], "the foot stays"
        assert browser.ask(f"document.querySelector('table').tHead.rows[0].cells[{place}].ariaSort") == way
    browser.ask(press)
    assert rows(browser, "Accuracy") == first
    # By the keyboard, too.
    browser.ask("document.querySelector('table.sortable button').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
        )
    assert browser.ask("document.querySelector('table').tHead.rows[0].cells[1].ariaSort") == "descending"
    browser.ask("document.querySelectorAll('.legend li')[2].focus()")
    assert browser.ask("document.querySelectorAll('.bars .lane.faded').length") == 3 * 9


def test_all_is_there_without_javascript(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html", scripts=False)
    tree = browser.send("DOM.getDocument", depth=0)["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(browser.send("DOM.querySelectorAll", nodeId=tree, selector=selector)["nodeIds"])

    assert count("button") == 0
    assert count(".lane .bar") == 4 * 9 - 2
    assert count("tbody tr") == len(MISSING["models"]) * (1 + len(EIGHT) + 1)
    assert count("script:not(body > script)") == 0


def test_it_can_be_read_to_who_does_not_see_it(made: Path, browser: Browser) -> None:
    browser.open(made / "eight.html")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    images = [name for role, name in seen if role in ("image", "img")]
    assert len(images) == 2
    assert all(re.match(r"(Bar|Radar) chart\. Accuracy.*ties", name) for name in images)
    tables = [name for role, name in seen if role == "table"]
    assert tables
    assert all(tables)
    assert browser.ask("document.documentElement.lang") == "en"
    assert browser.ask("[...document.querySelectorAll('thead th, tbody th')].every(h => h.scope)")
    assert browser.ask("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.role === 'region')")


def test_the_policy_refuses_every_other_script_and_request(made: Path, browser: Browser) -> None:
    browser.open(made / "one.html")
    assert EVIL in browser.ask("document.body.textContent")
    browser.ask("document.body.append(Object.assign(document.createElement('script'), {textContent: 'evil = 3'}))")
    browser.ask("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    assert browser.ask("window.evil") is None
    assert len(browser.complaints()) == 2


def test_weights_are_heatmaps_with_the_reports_cosines(models: list[Path], tmp_path: Path, browser: Browser) -> None:
    modelmerge.merge(models[0], models[1:], tmp_path / "ties", method="ties")
    report = evaluate([tmp_path / "ties"], suite="weights", per_layer=True)
    render(report, page=tmp_path / "page.html")
    shades: dict[str, set[str]] = {}
    for scheme in ("light", "dark"):
        browser.open(tmp_path / "page.html", scheme=scheme)  # type: ignore[arg-type]
        assert browser.complaints() == []
        told = {row[0]: row[1:] for row in rows(browser, "Cosines of ties")}
        assert told.pop("") == ["expert_0", "expert_1", "expert_2"]
        layers = {"whole model": report["model"], **report["layer_types"], **report["tensors"]}
        assert list(told) == list(layers)
        for name, layer in layers.items():
            wanted = [told["cosine"] for told in layer["models"]["ties"]["experts"].values()]
            for text, value in zip(told[name], wanted, strict=True):
                assert text == "n/a" if value is None else float(text) == pytest.approx(value, abs=0.006)
        pairs = [row[1:] for row in rows(browser, "Cosines of the experts")[1:]]
        assert [pairs[i][i] for i in range(3)] == [""] * 3
        assert all(float(v) == pytest.approx(report["model"]["experts"]["cosines"][i][j], abs=6e-4)
                   for i, row in enumerate(pairs) for j, v in enumerate(row) if i != j)  # fmt: skip
        head = browser.ask("document.querySelector('h1').textContent")
        assert re.match(r"The experts conflict (most in|alike in all kinds of layers)", head)
        cells = browser.ask("[...document.querySelectorAll('.heat tbody td:not(.none):not(.blank)')].map(c => "
                            "[getComputedStyle(c).backgroundColor, getComputedStyle(c).color])")  # fmt: skip
        assert all(colours.contrast(as_hex(ground), as_hex(ink)) > 4.5 for ground, ink in cells)
        shades[scheme] = {ground for ground, _ in cells}
    assert len(shades["light"]) > 5
    assert not shades["light"] & shades["dark"]
    assert rows(browser, "ties, by layer")


SCRIPT = """
from pathlib import Path
def score(model):
    Path({log!r}).write_text("called")
    return {{"a": 0.5, "b": {{"items": [1, 0, 1]}}, "c": 0.1}}
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "metric.py").write_text(SCRIPT.format(log=str(tmp_path / "log")))
    return f"{tmp_path / 'metric.py'}:score"


def test_a_suite_draws_and_a_saved_report_draws_the_same(
    models: list[Path], script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = ["eval", "custom", str(models[1]), "--script", script, "--json"]
    pictures = ["--report", str(tmp_path / "now.html"), "--plot", str(tmp_path / "now.svg"), "--chart", "radar"]
    assert main([*words, *pictures]) == 0
    captured = capsys.readouterr()
    (tmp_path / "today.json").write_text(captured.out)
    assert json.loads(captured.out)["tasks"] == ["a", "b", "c"]
    assert "now.svg" in captured.err
    again = ["--report", str(tmp_path / "later.html"), "--plot", str(tmp_path / "later.svg"), "--chart", "radar"]
    assert main(["eval", "report", str(tmp_path / "today.json"), *again]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"expert_0 +50\.0 +66\.7 ±33\.3 +10\.0", printed)
    for ending in ("html", "svg"):
        assert (tmp_path / f"later.{ending}").read_bytes() == (tmp_path / f"now.{ending}").read_bytes()
    assert main(["eval", "report", str(tmp_path / "today.json"), "-q"]) == 0
    assert float(capsys.readouterr().out) == pytest.approx((0.5 + 2 / 3 + 0.1) / 3)
    assert "own_experts" not in json.loads((tmp_path / "today.json").read_text()), "there is no expert"
    told = render(tmp_path / "today.json", page=tmp_path / "python.html")
    assert (tmp_path / "python.html").read_bytes() == (tmp_path / "now.html").read_bytes()
    assert told["models"][0]["name"] == "expert_0"


def test_weights_draw_too(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    words = ["eval", "weights", str(models[1]), "--base", str(models[0]), "--expert", str(models[2]), "--no-decompose"]
    assert main([*words, "--plot", str(tmp_path / "w.svg"), "--report", str(tmp_path / "w.html"), "-q"]) == 0
    assert "by layer" in (tmp_path / "w.svg").read_text()
    assert "Conflicts between the experts" in (tmp_path / "w.html").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--plot", "a.jpg"], "cannot be written as '.jpg'", 2),
        (["--report", "a.json"], "a report is a page", 2),
        (["--report", "gone/a.html"], "there is no directory", 1),
        (["--chart", "radar"], "--chart has no effect without --plot", 2),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_work(
    words: list[str], message: str, code: int, models: list[Path], script: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "custom", str(models[1]), "--script", script, *words]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_without_matplotlib_a_chart_is_one_error_and_a_page_needs_none(
    models: list[Path], script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["eval", "custom", str(models[1]), "--script", script]
    assert main([*words, "--plot", str(tmp_path / "a.svg")]) == 1
    err = capsys.readouterr().err
    assert "a chart needs matplotlib, which is not installed" in err
    assert 'pip install "matplotlib>=3.10"' in err
    assert not (tmp_path / "log").exists()
    assert main([*words, "--report", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").stat().st_size > 5000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"), ("\x80", "not valid JSON"), ("[]", "it must be an object"),
        ("{}", "no report of modelmerge eval"), ('{"suite": "clip", "models": [{}]}', "no report of modelmerge eval"),
        ('{"suite": "weights", "models": [1]}', r"models\[0\] must be an object, not 1"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_one_error(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelMergeError, match=rf"x\.json: (malformed: )?{says}"):
        render(tmp_path / "x.json", page=tmp_path / "x.html")
    with pytest.raises(ModelMergeError, match="no such file"):
        render(tmp_path / "gone.json")
    assert not (tmp_path / "x.html").exists()


def test_a_radar_chart_of_two_tasks_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="3 to 20 tasks"):
        render(scores(("a", "b"), ("m",)), plot=tmp_path / "a.svg", chart="radar")


def test_pages_of_reports_with_everything(tmp_path: Path) -> None:
    """Comparisons, gates, published scores, figures of other metrics, long settings."""
    report: dict[str, Any] = scores(
        EIGHT, ("ties",), data={"sun397": {"classes": ["a"] * 300}}, limit=None, gate=FAILED
    )
    report["published"] = {"model": "clip", "experts": dict.fromkeys(EIGHT, 0.9)}
    report["models"][-1]["normalised_by_published"] = 0.9
    report["models"][0]["scores"]["dtd"]["figures"] = {"f1": 0.25, "mcc": None}
    difference = {"difference": -0.01, "stderr": 0.02, "p": 0.62}
    report["comparison"] = {"with": "old.json", "models": [
        {"model": "ties", "other": "ties", "tasks": {"dtd": {**difference, "paired": True}}, "average": difference},
    ]}  # fmt: skip
    text = page.render(report)
    for words in ("Differences to old.json", "0.620", "f1", "0.25", "Failed", "normalised_by_published", "null"):
        assert words in text
    assert page.render(report) == text


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    render(scores(("a", "b"), ("\udcff",)), page=tmp_path / "x.html")
    assert "\\xff" in (tmp_path / "x.html").read_text()
