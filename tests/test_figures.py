"""What figures show, read back from matplotlib and plotly objects; and what they refuse."""

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy import stats

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

from toolkit.evidence import Interval, interval
from toolkit.explore import Explorer, slider
from toolkit.figures import (
    COLORS,
    curve_band,
    film,
    image_grid,
    interval_plot,
    live_axes,
    live_band,
    live_intervals,
    live_reliability,
    reliability_diagram,
    scatter,
    style,
)


@pytest.fixture(autouse=True)
def house():
    """The house style, for one test; every figure of it is drawn, then closed."""
    with mpl.rc_context():
        style()
        yield
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        plt.close("all")


def bins(**other: Any) -> dict[str, Any]:
    """Three bins, the middle one empty."""
    result = {
        "confidence": [0.2, math.nan, 0.9],
        "accuracy": [0.3, math.nan, 0.7],
        "low": [0.25, math.nan, 0.6],
        "high": [0.4, math.nan, 0.75],
        "count": [10, 0, 30],
    }
    return {**result, **other}


def row(low: float, estimate: float, high: float) -> Interval:
    return Interval(estimate, low, high, 8, 0.95, "t")


def test_style() -> None:
    assert [entry["color"] for entry in mpl.rcParams["axes.prop_cycle"]] == list(COLORS)
    assert tuple(mpl.rcParams["figure.figsize"]) == (7, 4)
    assert mpl.rcParams["figure.dpi"] == 110
    assert mpl.rcParams["figure.constrained_layout.use"]
    assert len(set(COLORS)) == 8


# --- images ----------------------------------------------------------------------------------------------------------


def test_image_grid_places_each_image_and_title() -> None:
    images = np.arange(6 * 4 * 4).reshape(6, 4, 4)
    ax = image_grid(images, titles=list("abcdef"), columns=4)
    assert [text.get_text() for text in ax.texts] == list("abcdef")
    assert len(ax.images) == 6
    for index, (drawn, title) in enumerate(zip(ax.images, ax.texts, strict=True)):
        np.testing.assert_array_equal(drawn.get_array(), images[index])
        assert drawn.get_clim() == (0, 95)
        left, right, bottom, top = drawn.get_extent()
        assert left <= title.get_position()[0] <= right
        assert top - 2 < title.get_position()[1] <= top < bottom
    lefts, tops = zip(*[(drawn.get_extent()[0], drawn.get_extent()[3]) for drawn in ax.images], strict=True)
    assert lefts[0] == lefts[4] < lefts[1] < lefts[2] < lefts[3]
    assert tops[0] == tops[3] < tops[4] == tops[5]


def test_image_grid_shapes() -> None:
    assert image_grid(torch.rand(3, 1, 8, 8)).images[0].get_array().shape == (8, 8)
    colored = image_grid(torch.rand(2, 3, 8, 8))
    assert colored.images[0].get_array().shape == (8, 8, 3)
    own = plt.subplots()[1]
    assert image_grid(np.zeros((1, 5, 5)), ax=own) is own


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (np.zeros((4, 4)), {}, r"images: expected shape \(n, height, width\) .*, got \(4, 4\)"),
        (np.zeros((2, 2, 4, 4)), {}, "images: expected shape"),
        (np.full((1, 2, 2), math.nan), {}, "images: 4 of 4 values are not finite"),
        (np.full((1, 3, 2, 2), 255.0), {}, r"images: expected colours in \[0, 1\], got 255 to 255"),
        (np.zeros((2, 4, 4)), {"titles": ["a"]}, "titles: expected 2 entries as in images, got 1"),
        (np.zeros((2, 4, 4)), {"columns": -1}, "columns: expected a number greater than 0, got -1"),
        (np.zeros((0, 4, 4)), {}, "images: expected at least one value"),
    ],
)
def test_bad_images(images, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(images, **more)


# --- reliability -----------------------------------------------------------------------------------------------------


def test_reliability_diagram_shows_full_bins() -> None:
    ax = reliability_diagram(**bins())
    points = ax.collections[-1]
    np.testing.assert_allclose(points.get_offsets(), [[0.2, 0.3], [0.9, 0.7]])
    small, large = points.get_sizes() - 18
    assert large == pytest.approx(3 * small)
    gaps, bars = (collection.get_segments() for collection in ax.collections[:2])
    np.testing.assert_allclose([np.sort(gap[:, 1]) for gap in gaps], [[0.2, 0.3], [0.7, 0.9]])
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.25, 0.4], [0.6, 0.75]])
    assert ax.get_xlim() == ax.get_ylim() == (-0.02, 1.02)
    assert "probability" in ax.get_xlabel()
    assert "share" in ax.get_ylabel()


def test_live_reliability_shows_the_same() -> None:
    figure = live_reliability(**bins(), title="T = 2")
    diagonal, gaps, points = figure.data
    assert list(diagonal.x) == list(diagonal.y) == [0, 1]
    np.testing.assert_allclose(points.x, [0.2, math.nan, 0.9])
    np.testing.assert_allclose(points.y, [0.3, math.nan, 0.7])
    np.testing.assert_allclose(points.error_y.array, [0.1, math.nan, 0.05])
    np.testing.assert_allclose(points.error_y.arrayminus, [0.05, math.nan, 0.1])
    np.testing.assert_allclose(gaps.y[:3], [0.2, 0.3, math.nan])
    np.testing.assert_allclose(gaps.x[6:8], [0.9, 0.9])
    np.testing.assert_allclose(points.customdata, [0.25, 0, 0.75])
    areas = (np.array(points.marker.size) - 7) ** 2
    assert areas[2] == pytest.approx(3 * areas[0])
    assert figure.layout.title.text == "T = 2"
    assert figure.layout.xaxis.range == figure.layout.yaxis.range == (-0.02, 1.02)


@pytest.mark.parametrize("function", [reliability_diagram, live_reliability])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"accuracy": [0.3, 0.7]}, "accuracy: expected 3 entries as in confidence, got 2"),
        ({"confidence": [0.2, 0.5, 1.2]}, r"confidence: expected values in \[0, 1\], got 0.2 to 1.2"),
        ({"accuracy": [0.3, 0.5, math.nan]}, "accuracy: 1 of 2 values are not finite"),
        ({"low": [0.31, 0.5, 0.6]}, "low, high: expected low <= accuracy <= high"),
        ({"high": [0.4, 0.5, 0.69]}, "low, high: expected low <= accuracy <= high"),
        ({"count": [0, 0, 0]}, "count: expected numbers of examples"),
        ({"count": [1, -1, 1]}, "count: expected numbers of examples"),
        ({"confidence": [[0.2, 0.5, 0.9]]}, r"confidence: expected 1 dimension, got shape \(1, 3\)"),
    ],
)
def test_bad_bins(function, other, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(**bins(**other))


# --- intervals, curves, points ---------------------------------------------------------------------------------------


def test_interval_plot_sorts_and_marks() -> None:
    rows = [row(0.5, 0.6, 0.7), row(0.1, 0.2, 0.3), row(0.25, 0.35, 0.45)]
    ax = interval_plot(["c", "a", "b"], rows, "ECE (probability)", reference=0.26)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    spans, markers = ax.lines[0:6:2], ax.lines[1:6:2]
    assert [tuple(line.get_xdata()) for line in spans] == [(0.1, 0.3), (0.25, 0.45), (0.5, 0.7)]
    assert [float(line.get_xdata()[0]) for line in markers] == [0.2, 0.35, 0.6]
    assert [to_hex(line.get_markerfacecolor()) for line in markers] == ["#ffffff", "#ffffff", COLORS[0].lower()]
    assert [text.get_text() for text in ax.texts] == [rows[i].numbers() for i in (1, 2, 0)]
    assert tuple(ax.lines[6].get_xdata()) == (0.26, 0.26)
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "ECE (probability)"
    assert len(interval_plot(["a"], rows[:1], "x").lines) == 2
    turned = interval_plot(["c", "a", "b"], rows, "ECE (probability)", largest_first=True)
    assert [t.get_text() for t in turned.get_yticklabels()] == [t.get_text() for t in ax.get_yticklabels()][::-1]


def test_curve_band_is_mean_and_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=(6, 5))
    ax = curve_band(np.arange(5), torch.tensor(values), "epoch", "NLL (nats)", label="focal", level=0.9)
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values.mean(0))
    outline = ax.collections[0].get_paths()[0].vertices
    for position in range(5):
        drawn = outline[outline[:, 0] == position, 1]
        assert (drawn.min(), drawn.max()) == pytest.approx((oracle.low[position], oracle.high[position]))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "NLL (nats)")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["focal"]
    second = curve_band(np.arange(5), values, "epoch", "NLL (nats)", ax=ax)
    assert second is ax
    assert to_hex(ax.lines[1].get_color()) == COLORS[1].lower()


def test_scatter_groups() -> None:
    ax = scatter([1, 2, 3], [4, 5, 6], "accuracy (share)", "ECE (probability)", groups=["b", "a", "b"])
    first, second = ax.collections
    np.testing.assert_array_equal(first.get_offsets(), [[1, 4], [3, 6]])
    np.testing.assert_array_equal(second.get_offsets(), [[2, 5]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "a"]
    assert len(first.get_paths()[0].vertices) != len(second.get_paths()[0].vertices)
    np.testing.assert_array_equal(scatter([1], [2], "x", "y").collections[0].get_offsets(), [[1, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval_plot([], [], "x"), "names: expected at least one row"),
        (lambda: interval_plot(["a"], [], "x"), "intervals: expected 1 entries as in names, got 0"),
        (lambda: interval_plot(["a"], [row(0, 1, 2)], ""), "xlabel: expected the quantity and its unit"),
        (
            lambda: curve_band([1, 2], [[1.0, 2.0, 3.0]] * 2, "x", "y"),
            r"expected shape \(members, 2\) as in x, got \(2, 3\)",
        ),
        (lambda: curve_band([1], [1.0], "x", "y"), "values_by_member: expected 2 dimensions, got shape"),
        (lambda: curve_band([1], [[1.0], [math.nan]], "x", "y"), "values_by_member: 1 of 2 values are not finite"),
        (lambda: curve_band([1, 2], [[1.0, 2.0]], "x", "y"), "values: expected at least 2 members"),
        (lambda: curve_band([1], [[1.0], [2.0]], "x", " "), "ylabel: expected the quantity"),
        (lambda: scatter([1, 2], [1], "x", "y"), "y: expected 2 entries as in x, got 1"),
        (lambda: scatter([1, math.inf], [1, 2], "x", "y"), "x: 1 of 2 values are not finite"),
        (lambda: scatter([1], [1], "x", "y", groups=["a", "b"]), "groups: expected 1 entries as in x, got 2"),
        (lambda: scatter(range(9), range(9), "x", "y", groups=range(9)), "groups: expected at most 8 different groups"),
        (lambda: live_axes("x", "y", (0, 0), (0, 1)), "xrange: expected two different finite limits"),
        (lambda: live_axes("x", "y", (0, 1), (0, math.inf)), "yrange: expected two different finite limits"),
        (lambda: live_axes("", "y", (0, 1), (0, 1)), "xlabel: expected the quantity"),
    ],
)
def test_bad_input(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- plotly ----------------------------------------------------------------------------------------------------------


def test_live_band_is_mean_and_t_interval() -> None:
    values = np.random.default_rng(1).normal(size=(6, 4))
    figure = live_band(live_axes("bins", "ECE (probability)", (0, 3), (-2, 2)), np.arange(4), values, "plug-in")
    band, line = figure.data
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(line.y, values.mean(0))
    np.testing.assert_allclose(band.y, [*oracle.high, *oracle.low[::-1]])
    np.testing.assert_array_equal(band.x, [0, 1, 2, 3, 3, 2, 1, 0])
    assert (band.fill, line.name, line.line.color) == ("toself", "plug-in", COLORS[0])
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("bins", "ECE (probability)")
    assert (figure.layout.xaxis.range, figure.layout.yaxis.range) == ((0, 3), (-2, 2))


def test_live_intervals_are_markers_with_their_bars() -> None:
    values = np.random.default_rng(2).normal(size=(7, 3))
    found = [interval(column, 0.9) for column in values.T]
    figure = live_axes("set", "accuracy", (-0.5, 2.5), (-3, 3))
    (dots,) = live_intervals(figure, ["a", "b", "c"], found, "nets", size=[9, 9, 16]).data
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose(np.add(dots.y, dots.error_y.array), oracle.high)
    np.testing.assert_allclose(np.subtract(dots.y, dots.error_y.arrayminus), oracle.low)
    assert (dots.x, dots.mode, dots.name, dots.marker.size) == (("a", "b", "c"), "markers", "nets", (9, 9, 16))
    with pytest.raises(ValueError, match="intervals: expected 2, one for each x, got 3"):
        live_intervals(figure, [0, 1], found, "nets")


def test_live_figures_live_in_an_explorer() -> None:
    def draw(n: int):
        confidence = (np.arange(n) + 0.5) / n
        count = np.arange(n)
        accuracy = confidence**2
        return live_reliability(confidence, accuracy, accuracy / 2, (1 + accuracy) / 2, count, title=f"{n} bins")

    explorer = Explorer(lambda n: n, draw, {"n": slider([2, 5, 15, 100], "bins")})
    assert len(explorer.drive(5)) == 7
    explorer.set(n=15)
    assert len(explorer.figure.data[2].y) == 15


def test_a_log_leaderboard_has_plain_ticks_and_wants_positive_values():
    good = [interval([0.01, 0.011, 0.012]), interval([0.2, 0.3, 0.25])]
    ax = interval_plot(["a", "b"], good, "error", log=True)
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "log"
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert {"0.02", "0.1"} <= set(labels)
    assert len(ax.xaxis.get_minorticklocs()) == 0
    with pytest.raises(ValueError, match="intervals: expected estimates above 0"):
        interval_plot(["a"], [interval([-1.0, -2.0, -3.0])], "error", log=True)


def test_a_film_has_its_frames_and_loads_nothing() -> None:
    figure, ax = plt.subplots(figsize=(1, 1))
    drawn = []

    def draw(i: int) -> None:
        drawn.append(i)
        ax.plot([0, i])

    page = film(figure, draw, 3).data
    assert drawn == [0, 1, 2]
    assert page.count("data:image/png;base64") == 3
    assert "http" not in page
    assert "fa-" not in page
    assert all(sign in page for sign in "−⏮◂◀⏸▶▸⏭+")
    assert not plt.fignum_exists(figure.number)
    with pytest.raises(ValueError, match="frames: expected at least 2, got 1"):
        film(figure, draw, 1)
