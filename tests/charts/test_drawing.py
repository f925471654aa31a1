"""Charts: what they show, drawn by matplotlib; names that hide nothing, gaps where there is no score, colours."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor

from modelmerge.charts import colours, drawing, figures
from modelmerge.charts.figures import Scores
from modelmerge.errors import OutputError, UsageError
from tests.support.reports import EIGHT, scores

LONG = tuple(f"mmlu_high_school_european_history_and_what_came_after_it_{i}" for i in range(20))
ODD = ("<script>alert(1)</script>", "a$b$^2", "x & y", "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW", "tab\tand\x07bell")


def words(figure: Any) -> list[tuple[str, Any]]:
    """Every text of a figure with the box it fills."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def overlapping(figure: Any) -> list[tuple[str, str]]:
    boxes = [(text, *box.extents) for text, box in words(figure)]
    return [
        (one, other)
        for (one, x0, y0, x1, y1), (other, left, bottom, right, top) in itertools.combinations(boxes, 2)
        if min(x1, right) - max(x0, left) > 0.5 and min(y1, top) - max(y0, bottom) > 0.5
    ]


@pytest.fixture
def drawn() -> Iterator[Any]:
    pytest.importorskip("matplotlib")
    with drawing.settings():
        yield drawing.draw


@pytest.mark.parametrize("kind", ["bars", "radar"])
@pytest.mark.parametrize(
    ("tasks", "models"),
    [
        (EIGHT, ("ties", "apgd")),
        (EIGHT[:3], tuple(f"{name} and more words than fit on any line of this legend" for name in LONG[:8])),
        (LONG, tuple(f"m{i}" for i in range(8))),
        (LONG[:12], ODD),
        (ODD, ("merged",)),
    ],
)
def test_no_text_overlaps_another(tasks: tuple[str, ...], models: tuple[str, ...], kind: Any, drawn: Any) -> None:
    assert overlapping(drawn(figures.of_report(scores(tasks, models)), kind=kind)) == []


def test_no_text_overlaps_in_a_heatmap(drawn: Any) -> None:
    for rows, columns in (
        (LONG, ODD),
        (("q",), LONG),
        (tuple(f"layers.{i}.w" for i in range(400)), ("a",)),
        ("a", "b"),
    ):
        values = [[0.001 * i - 0.5 for _ in columns] for i in range(len(rows))]
        made = drawn([figures.heatmap(" ".join(LONG[:3]), rows, columns, values, what="cosine")])
        assert overlapping(made) == []


def test_one_task_and_one_model_are_a_chart(drawn: Any) -> None:
    made = drawn(figures.of_report(scores(("mnist",), ("merged",), experts=False, base=False)))
    told = [text for text, _ in words(made)]
    assert "mnist" in told
    assert "average" not in told
    assert overlapping(made) == []


def test_a_missing_score_is_a_gap(drawn: Any) -> None:
    from matplotlib.patches import Rectangle

    report = scores(EIGHT, ("ties",), missing=(("ties", "svhn"),), experts=False, base=False)
    chart = figures.of_report(report)
    assert isinstance(chart[0], Scores)
    assert chart[0].series[0].values[EIGHT.index("svhn")] is None
    assert chart[0].series[0].values[-1] is None, "an average over fewer tasks is none"
    made = drawn(chart, kind="bars")
    bars = [patch for patch in made.axes[0].findobj(Rectangle) if patch in made.axes[0].get_children()]
    bars = [bar for bar in bars if bar is not made.axes[0].patch]
    assert len(bars) == len(EIGHT) - 1
    assert all(bar.get_width() > 0 for bar in bars)
    assert [text for text, _ in words(made)].count("n/a") == 2
    # In the radar chart, the lines that would meet there are not drawn.
    lines = [line for line in drawn(chart, kind="radar").axes[0].get_lines() if line.get_linewidth() == 1.3]
    assert len(lines) == len(EIGHT) - 2
    heat = drawn([figures.heatmap("t", ("a", "b"), ("c", "d"), [[0.5, None], [float("nan"), 0.2]])])
    assert [text for text, _ in words(heat)].count("n/a") == 2


def test_bars_are_as_long_as_the_scores_and_whiskers_as_the_errors(drawn: Any) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    report = scores(("a", "b"), ("merged",), experts=False, base=False)
    axes = drawn(figures.of_report(report), kind="bars").axes[0]
    told = [report["models"][0]["scores"][task] for task in ("a", "b")]
    bars = [child for child in axes.get_children() if isinstance(child, Rectangle) and child is not axes.patch]
    whiskers = [child for child in axes.get_children() if isinstance(child, LineCollection)]
    assert bars[0].get_width() / bars[1].get_width() == pytest.approx(told[0]["score"] / told[1]["score"])
    for bar, whisker, score in zip(bars, whiskers, told, strict=False):
        (left, _), (right, _) = whisker.get_segments()[0]
        assert (right - left) / bar.get_width() == pytest.approx(2 * score["stderr"] / score["score"])
        assert (right + left) / 2 == pytest.approx(bar.get_width())


def test_experts_are_one_series_each_at_its_own_task() -> None:
    report = scores(EIGHT, ("ties",))
    (chart,) = figures.of_report(report)
    assert isinstance(chart, Scores)
    assert [series.name for series in chart.series] == ["base", "each task's expert", "ties"]
    own = {model["name"]: model for model in report["models"] if model["role"] == "expert"}
    assert chart.series[1].values[:-1] == tuple(own[task]["scores"][task]["score"] for task in EIGHT)
    assert chart.series[2].values[-1] == pytest.approx(report["models"][-1]["average"])
    # A report from before it told whose task is whose has experts of the tasks' names.
    assert figures.of_report({key: value for key, value in report.items() if key != "own_experts"}) == [chart]
    (told,) = figures.of_report(
        scores(("glue_cola",), ("m",), experts=False, others=("cola",), owners={"glue_cola": "cola"})
    )
    assert isinstance(told, Scores)
    assert [series.name for series in told.series] == ["base", "each task's expert", "m"]
    # One that is for none of the tasks is itself.
    (chart,) = figures.of_report(scores(EIGHT, ("ties",), others=("generalist",)))
    assert isinstance(chart, Scores)
    assert [series.name for series in chart.series] == ["base", "each task's expert", "generalist", "ties"]


def test_scores_that_are_no_shares_have_a_chart_of_their_own(drawn: Any) -> None:
    report = scores(("qa", "wiki", "sst"), ("ties",), experts=False)
    for model in report["models"]:
        model["scores"]["wiki"] |= {"score": 31.5, "stderr": None, "metric": "word_perplexity", "lower": True}
    charts = figures.of_report(report)
    assert [chart.tasks for chart in charts if isinstance(chart, Scores)] == [("qa", "sst", "average"), ("wiki",)]
    assert charts[1].title == "Word_perplexity, less is better"
    made = drawn(charts, kind="auto")
    assert overlapping(made) == []
    assert "31.5" in [text for text, _ in words(made)]


@pytest.mark.parametrize("models", [9, 19])
def test_more_models_than_colours_are_dots_the_best_at_the_top(models: int, drawn: Any) -> None:
    report = scores(EIGHT, tuple(f"m{i}" for i in range(models)), missing=(("m3", "svhn"),))
    charts = figures.of_report(report)
    made = drawn(charts)
    assert overlapping(made) == []
    height = {text: box.y0 for text, box in words(made)}
    averages = {model["name"]: model["average"] for model in report["models"] if model["role"] == "model"}
    order = sorted(averages, key=lambda name: -height[name])
    assert order == sorted(averages, key=lambda name: -(averages[name] or 0.0))
    assert order[-1] == "m3", "what has no average is last"
    dots = [line for line in made.axes[0].get_lines() if line.get_marker() == "o"]
    assert len(dots) == models - 1 + 2, "of the models, the base, and each task's expert"
    # Without an average there is a chart for each task; bars are still drawn for who asks for them.
    for model in report["models"]:
        for score in model["scores"].values():
            score |= {"lower": True, "metric": "perplexity"}
        model["average"] = None
    assert [len(chart.tasks) for chart in figures.of_report(report) if isinstance(chart, Scores)] == [1] * 8
    assert not [line for line in drawn(charts, kind="bars").axes[0].get_lines() if line.get_marker() == "o"]


def test_coefficients_are_shaded_by_how_far_they_went_from_their_start(drawn: Any) -> None:
    recipe = {"coefficients": {"a": {"x": 0.295, "y": 0.3}, "b": {"x": 0.305, "y": 0.301}}, "unlabelled": {},
              "options": {"init": 0.3}}  # fmt: skip
    chart = figures.of_coefficients(recipe)
    assert (chart.centre, chart.limit) == (0.3, pytest.approx(0.005))
    assert chart.has_negative()
    texts = [text for text, _ in words(drawn([chart]))]
    assert {"0.29500", "0.305", "0.295", "0.3"} <= set(texts)
    from matplotlib.collections import PolyCollection

    faces = next(c for c in drawn([chart]).axes[0].collections if isinstance(c, PolyCollection)).get_facecolor()
    assert [f"#{''.join(f'{round(255 * part):02x}' for part in face[:3])}" for face in faces] == [
        colours.shade(step) for step in (-20, 0, 20, 4)
    ]
    assert figures.of_coefficients({**recipe, "options": {}}).centre == 0.3, "the search's default"


def test_negative_scores_go_left_of_zero(drawn: Any) -> None:
    from matplotlib.patches import Rectangle

    report = scores(("cola",), ("ties",), experts=False, base=False)
    report["models"][0]["scores"]["cola"] |= {"score": -0.2, "stderr": 0.05, "metric": "matthews"}
    axes = drawn(figures.of_report(report)).axes[0]
    (bar,) = [child for child in axes.get_children() if isinstance(child, Rectangle) and child is not axes.patch]
    assert bar.get_width() < 0
    assert bar.get_x() + bar.get_width() > 0, "within the axes"


def test_a_radar_chart_takes_three_shares(drawn: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 to 20 tasks"):
        drawn(figures.of_report(scores(("a", "b"), ("ties",))), kind="radar")
    with pytest.raises(UsageError):
        drawing.save(figures.of_report(scores((*LONG, "one"), ("ties",))), tmp_path / "x.svg", kind="radar")
    assert list(tmp_path.iterdir()) == []
    # What is no share is drawn as bars beside it.
    report = scores((*EIGHT, "wiki"), ("ties",), experts=False)
    for model in report["models"]:
        model["scores"]["wiki"] |= {"score": 31.5, "stderr": None, "metric": "word_perplexity", "lower": True}
    assert "31.5" in [text for text, _ in words(drawn(figures.of_report(report), kind="radar"))]


def test_files_are_what_their_endings_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    charts = figures.of_report(scores(EIGHT[:2], ODD))
    for name in ("a.svg", "a.PNG", "a.pdf"):
        drawing.save(charts, tmp_path / name)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF-")
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
    text = (tmp_path / "a.svg").read_text()
    read = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("}text")]
    assert "a$b$^2" in read, "no formula"
    assert "tab and bell" in read
    assert "script>" in "".join(filter(None, read))
    assert "<script" not in text
    drawing.save(charts, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text


def test_a_name_in_any_script_is_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    charts = figures.of_report(scores(("a", "b"), ("合并", "🙂")))
    for name in ("a.svg", "a.png", "a.pdf"):
        drawing.save(charts, tmp_path / name)  # with no warning, which would be an error
    assert "合并" in (tmp_path / "a.svg").read_text()


def test_the_users_settings_do_not_bear_on_charts(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    charts = figures.of_report(scores(("a",), ("ties",)))
    drawing.save(charts, tmp_path / "one.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "figure.facecolor": "red"}):
        drawing.save(charts, tmp_path / "other.svg")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("as '.jpg'")):
        drawing.check(tmp_path / "a.jpg")
    with pytest.raises(OutputError, match="no directory"):
        drawing.check(tmp_path / "gone" / "a.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        drawing.check(tmp_path / "folder.svg")


def test_weights_are_heatmaps_of_cosines() -> None:
    told = {"norms": {"a": 1.0, "b": 2.0}, "cosines": [[1.0, 0.02], [0.02, 1.0]]}
    layer = {"entries": 4, "experts": told, "models": {"m": {"experts": {"a": {"cosine": 0.4}, "b": {"cosine": None}}}}}
    report = {"suite": "weights", "model": layer, "layer_types": {"mlp": layer}, "tensors": {"mlp.0": layer}}
    pairs, layers = figures.of_weights(report)
    assert pairs.values == ((None, 0.02), (0.02, None)), "a cosine with itself says nothing"
    assert not pairs.diagonal
    assert pairs.limit == pytest.approx(0.1), "what is nearly orthogonal is pale"
    assert pairs.text(-0.0008) == "-0.001"
    assert layers.rows == ("whole model", "mlp", "mlp.0")
    assert layers.values == ((0.4, None),) * 3
    assert layers.limit == pytest.approx(0.4)


# What linear RGB is to eyes that lack one kind of cones, wholly (Machado, Oliveira and Fernandes 2009, table 1).
EYES = {
    "all cones": torch.eye(3),
    "no long": torch.tensor([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "no middle": torch.tensor([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "no short": torch.tensor([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}


def oklab(colour: str, eyes: Tensor) -> Tensor:
    """A colour as it is seen, in Ottosson's Oklab (https://bottosson.github.io/posts/oklab/)."""
    parts = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    cones = torch.tensor([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    lab = torch.tensor([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return lab @ (cones @ (eyes @ linear).clamp(0, 1)).pow(1 / 3)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("series", [colours.SERIES, colours.SERIES_DARK])
def test_series_stay_apart_to_all_eyes(series: Sequence[str], eyes: str) -> None:
    seen = [oklab(colour, EYES[eyes]) for colour in series]
    # 0.02 is about what can just be told apart.
    assert min(float((a - b).norm()) for a, b in itertools.combinations(seen, 2)) > 0.07


@pytest.mark.parametrize("dark", [False, True])
def test_figures_can_be_read_on_every_shade(dark: bool) -> None:
    for place in range(-colours.STEPS, colours.STEPS + 1):
        shade = colours.shade(place, dark=dark)
        assert colours.contrast(colours.ink_on(shade), shade) > 4.5
    steps = [oklab(colours.shade(p, dark=dark), EYES["all cones"])[0] for p in range(colours.STEPS + 1)]
    assert all((b > a) == dark for a, b in itertools.pairwise(steps)), "lightness goes one way"
    ends = [oklab(colours.shade(sign * colours.STEPS, dark=dark), eyes) for eyes in EYES.values() for sign in (-1, 1)]
    assert all(float((ends[i] - ends[i + 1]).norm()) > 0.15 for i in range(0, len(ends), 2))


def test_contrast_is_that_of_wcag() -> None:
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert colours.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.8), (-0.5, 0.3), (0, 3e-5), (0, 4e6), (-2, 0), (0, 0.15)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = figures.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert 0 in found
    assert low - 1e-12 <= found[0] < found[-1] <= high * (1 + 1e-9) + 1e-12
    assert all(len(f"{tick:g}") <= 7 for tick in found)
