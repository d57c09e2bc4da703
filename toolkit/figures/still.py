"""Figures by matplotlib. They take an optional ``ax`` and return it."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from toolkit.figures.common import (
    COLORS,
    GREY,
    MARKERS,
    as_numpy,
    checked_bins,
    finite,
    mean_band,
    require_labels,
    same_length,
)
from toolkit.intervals import Interval

__all__ = ["curve_band", "film", "image_grid", "interval_plot", "reliability_diagram", "scatter", "style"]


def style() -> None:
    """Set matplotlib's defaults for the labs: colours, sizes readable on a laptop, constrained layout."""
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib_inline.config import InlineBackend

    uncropped: dict[str, Any] = {"bbox_inches": None}  # "tight" would draw each figure twice
    InlineBackend.instance().print_figure_kwargs = uncropped
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=COLORS),
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.labelsize": 11,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "figure.figsize": (7, 4),
            "font.size": 10.5,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.8,
            "image.cmap": "gray_r",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.dpi": 110,
        }
    )


def _axes(ax: Any, figsize: tuple[float, float] | None = None) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=figsize)[1]


def image_grid(images: Any, titles: Sequence[Any] | None = None, columns: int | None = None, ax: Any = None) -> Any:
    """``images`` as a mosaic on one grey scale, with a title above each.

    Shapes ``(n, height, width)`` or ``(n, 1, height, width)`` in grey, ``(n, 3, height, width)`` in colour from 0 to 1.
    """
    array = finite("images", as_numpy("images", images))
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[1] != 3):
        raise ValueError(f"images: expected shape (n, height, width) or (n, 1 or 3, height, width), got {array.shape}")
    if array.ndim == 4:
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"images: expected colours in [0, 1], got {array.min():.3g} to {array.max():.3g}")
        array = array.transpose(0, 2, 3, 1)
    count, height, width = array.shape[:3]
    if titles is not None:
        same_length("titles", np.empty(len(titles)), count, "images")
    if columns is not None and columns < 1:
        raise ValueError(f"columns: expected a number greater than 0, got {columns}")
    columns = min(count, columns or 10)
    rows = math.ceil(count / columns)
    lines = 0 if titles is None else max(str(title).count("\n") + 1 for title in titles)
    gap, head = 0.12 * width, (0.08 + 0.27 * lines) * height
    step_x, step_y = width + gap, height + head
    ax = _axes(ax, (min(9.0, 0.95 * columns), min(9.0, 0.95 * columns) / (columns * step_x) * rows * step_y))
    for index, image in enumerate(array):
        left, top = index % columns * step_x, index // columns * step_y + head
        ax.imshow(
            image, extent=(left, left + width, top + height, top), vmin=array.min(), vmax=array.max(), cmap="gray_r"
        )
        if titles is not None:
            ax.text(left + width / 2, top - 0.05 * height, str(titles[index]), ha="center", va="bottom", fontsize=9)
    ax.set(xlim=(-gap, columns * step_x), ylim=(rows * step_y, 0), aspect="equal")
    ax.set_axis_off()
    return ax


def reliability_diagram(
    confidence: Any,
    accuracy: Any,
    low: Any,
    high: Any,
    count: Any,
    ax: Any = None,
    label: str = "accuracy with interval",
    color: str = COLORS[0],
) -> Any:
    """Accuracy against mean confidence, one entry per bin; intervals as bars, the area of a point is its bin's share.

    Bins with ``count`` 0 are left out (their other entries may be NaN). Points below the diagonal are overconfident.
    """
    x, y, bottom, top, share = checked_bins(confidence, accuracy, low, high, count)
    full = share > 0
    ax = _axes(ax, (4.6, 4.4))
    ax.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    ax.vlines(x[full], np.minimum(x, y)[full], np.maximum(x, y)[full], color=color, alpha=0.2, linewidth=7)
    ax.errorbar(
        x[full],
        y[full],
        (np.maximum(y - bottom, 0)[full], np.maximum(top - y, 0)[full]),
        fmt="none",
        ecolor=color,
        elinewidth=1.4,
        capsize=3,
    )
    ax.scatter(
        x[full], y[full], s=18 + 250 * share[full], color=color, edgecolor="white", linewidth=0.6, label=label, zorder=3
    )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set(xlabel="mean confidence of the bin (probability)", ylabel="accuracy of the bin (share correct)")
    ax.legend(markerscale=0.6)
    return ax


def interval_plot(
    names: Sequence[str],
    intervals: Sequence[Interval],
    xlabel: str,
    reference: float | None = None,
    ax: Any = None,
    log: bool = False,
    largest_first: bool = False,
) -> Any:
    """A leaderboard: one interval per row, its numbers at the right; the smallest estimate on top, or the largest.

    ``reference`` draws a dashed line; a row whose interval contains it gets a hollow marker. ``log`` spreads values of
    different size, which must be greater than 0.
    """
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    require_labels(xlabel=xlabel)
    if not names:
        raise ValueError("names: expected at least one row, got none")
    same_length("intervals", np.empty(len(intervals)), len(names), "names")
    order = sorted(range(len(names)), key=lambda index: intervals[index].estimate, reverse=largest_first)
    ax = _axes(ax, (7, 0.9 + 0.32 * len(names)))
    for row, index in enumerate(order):
        it = intervals[index]
        hollow = reference is not None and it.low <= reference <= it.high
        ax.plot((it.low, it.high), (row, row), color=COLORS[0], linewidth=2.4, solid_capstyle="butt")
        ax.plot(
            it.estimate, row, "o", color=COLORS[0], markersize=6.5, markerfacecolor="white" if hollow else COLORS[0]
        )
        ax.text(1.02, row, it.numbers(), transform=ax.get_yaxis_transform(), va="center", fontsize=9, clip_on=False)
    if reference is not None:
        ax.axvline(reference, color=GREY, linestyle="--", linewidth=1.2)
    ax.set_yticks(range(len(names)), [names[index] for index in order])
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel)
    if log:
        if not all(it.estimate > 0 for it in intervals):
            raise ValueError(
                f"intervals: expected estimates above 0 on a log scale, got {min(i.estimate for i in intervals)}"
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.locator_params(axis="x", nbins=6)
    ax.grid(axis="y", visible=False)
    return ax


def curve_band(
    x: Any,
    values_by_member: Any,
    xlabel: str,
    ylabel: str,
    label: str | None = None,
    level: float = 0.95,
    ax: Any = None,
    color: str | None = None,
) -> Any:
    """The mean curve over members with the t interval at each x as a band; values have shape (members, len(x))."""
    require_labels(xlabel=xlabel, ylabel=ylabel)
    positions, mean, low, high = mean_band(x, values_by_member, level)
    ax = _axes(ax)
    (line,) = ax.plot(positions, mean, color=color, label=label)
    ax.fill_between(positions, low, high, color=line.get_color(), alpha=0.22, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if label is not None:
        ax.legend()
    return ax


def film(figure: Any, draw: Callable[[int], Any], frames: int, per_second: int = 2) -> Any:
    """An animation with buttons, as HTML that loads nothing: ``draw(i)`` draws frame i of ``frames`` on ``figure``.

    It plays in a notebook and on a web page, without a kernel; the figure is closed. Raises ``ValueError`` for fewer
    than two frames.
    """
    import matplotlib.pyplot as plt
    from IPython.display import HTML
    from matplotlib.animation import FuncAnimation

    if frames < 2:
        raise ValueError(f"frames: expected at least 2, got {frames}")
    page = FuncAnimation(figure, draw, frames=frames, init_func=lambda: None).to_jshtml(per_second, True, "once")
    plt.close(figure)
    page = re.sub(r"<link[^>]*>", "", page)  # a style sheet of icons from the web; these signs need none
    signs = {"minus": "−", "fast-backward": "⏮", "step-backward": "◂", "play fa-flip-horizontal": "◀", "pause": "⏸"}
    signs |= {"play": "▶", "step-forward": "▸", "fast-forward": "⏭", "plus": "+"}
    for name, sign in signs.items():
        page = page.replace(f'<i class="fa fa-{name}"></i>', sign)
    return HTML(page)


def scatter(x: Any, y: Any, xlabel: str, ylabel: str, groups: Sequence[Any] | None = None, ax: Any = None) -> Any:
    """Points, with a colour and a marker for each of ``groups`` (one entry per point, in order of appearance)."""
    require_labels(xlabel=xlabel, ylabel=ylabel)
    left, right = finite("x", as_numpy("x", x, 1)), finite("y", as_numpy("y", y, 1))
    same_length("y", right, len(left), "x")
    ax = _axes(ax)
    if groups is None:
        ax.scatter(left, right, s=28, alpha=0.8, linewidth=0)
    else:
        members = [str(group) for group in groups]
        same_length("groups", np.empty(len(members)), len(left), "x")
        distinct = list(dict.fromkeys(members))
        if len(distinct) > len(COLORS):
            raise ValueError(f"groups: expected at most {len(COLORS)} different groups, got {len(distinct)}")
        for index, group in enumerate(distinct):
            chosen = np.array([member == group for member in members])
            ax.scatter(
                left[chosen],
                right[chosen],
                s=34,
                alpha=0.8,
                color=COLORS[index],
                marker=MARKERS[index],
                label=group,
                linewidth=0,
            )
        ax.legend()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return ax
