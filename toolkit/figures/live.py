"""Figures by plotly with fixed axes, to be returned by an explorer's ``draw``."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from toolkit.figures.common import (
    COLORS,
    GREY,
    checked_bins,
    mean_band,
    require_labels,
)
from toolkit.intervals import Interval

__all__ = ["live_axes", "live_band", "live_intervals", "live_reliability"]


def live_axes(
    xlabel: str,
    ylabel: str,
    xrange: tuple[float, float],
    yrange: tuple[float, float],
    title: str = "",
    height: int = 400,
) -> Any:
    """An empty plotly figure with fixed, labelled axes in the house style, to add traces to inside ``draw``."""
    import plotly.graph_objects as go

    require_labels(xlabel=xlabel, ylabel=ylabel)
    for name, limits in (("xrange", xrange), ("yrange", yrange)):
        if len(limits) != 2 or not all(map(math.isfinite, limits)) or limits[0] == limits[1]:
            raise ValueError(f"{name}: expected two different finite limits, got {limits}")
    shared = {"showline": True, "linecolor": "#444444", "gridcolor": "#E6E6E6", "zeroline": False, "ticks": "outside"}
    return go.Figure(
        layout={
            "template": "none",
            "colorway": COLORS,
            "font": {"size": 13},
            "height": height,
            "margin": {"l": 64, "r": 16, "t": 76, "b": 56},
            "title": {"text": title, "font": {"size": 15}, "x": 0.02, "y": 0.98, "yanchor": "top"},
            "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
            "xaxis": {"title": {"text": xlabel}, "range": list(xrange), **shared},
            "yaxis": {"title": {"text": ylabel}, "range": list(yrange), **shared},
            "uirevision": "fixed",
        }
    )


def live_band(
    figure: Any, x: Any, values_by_member: Any, label: str, level: float = 0.95, color: str = COLORS[0]
) -> Any:
    """Add to a plotly ``figure`` the mean curve over members and its t interval as a band: two traces."""
    positions, mean, low, high = mean_band(x, values_by_member, level)
    figure.add_traces(
        [
            {
                "type": "scatter",
                "x": np.concatenate([positions, positions[::-1]]),
                "y": np.concatenate([high, low[::-1]]),
                "fill": "toself",
                "fillcolor": _faint(color),
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "x": positions,
                "y": mean,
                "mode": "lines",
                "line": {"color": color, "width": 2.2},
                "name": label,
            },
        ]
    )
    return figure


def live_intervals(
    figure: Any, x: Sequence[Any], intervals: Sequence[Interval], label: str, color: str = COLORS[1], size: Any = 11
) -> Any:
    """Add to a plotly ``figure`` a marker with its interval at each ``x``: one trace. ``size`` may differ by marker."""
    if len(x) != len(intervals):
        raise ValueError(f"intervals: expected {len(x)}, one for each x, got {len(intervals)}")
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [it.high - it.estimate for it in intervals],
        "arrayminus": [it.estimate - it.low for it in intervals],
    }
    y, marker = [it.estimate for it in intervals], {"size": size, "color": color}
    return figure.add_scatter(x=list(x), y=y, error_y=bars, mode="markers", name=label, marker=marker)


def _faint(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"


def live_reliability(
    confidence: Any, accuracy: Any, low: Any, high: Any, count: Any, title: str = "", color: str = COLORS[0]
) -> Any:
    """:func:`reliability_diagram` as a plotly figure for ``draw``: always three traces on axes fixed to [0, 1]."""
    x, y, bottom, top, share = checked_bins(confidence, accuracy, low, high, count)
    figure = live_axes(
        "mean confidence of the bin (probability)",
        "accuracy of the bin (share correct)",
        (-0.02, 1.02),
        (-0.02, 1.02),
        title,
    )
    nothing = np.full(len(x), np.nan)
    figure.add_traces(
        [
            {
                "type": "scatter",
                "x": [0, 1],
                "y": [0, 1],
                "mode": "lines",
                "line": {"color": GREY, "dash": "dash", "width": 1.5},
                "name": "calibrated",
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "x": np.stack([x, x, nothing], 1).ravel(),
                "y": np.stack([x, y, nothing], 1).ravel(),
                "mode": "lines",
                "line": {"color": _faint(color), "width": 9},
                "name": "gap",
                "hoverinfo": "skip",
            },
            {
                "type": "scatter",
                "x": x,
                "y": y,
                "mode": "markers",
                "error_y": {
                    "type": "data",
                    "array": top - y,
                    "arrayminus": y - bottom,
                    "color": color,
                    "thickness": 1.6,
                },
                "marker": {"color": color, "size": 7 + 22 * np.sqrt(share), "line": {"color": "white", "width": 1}},
                "customdata": share,
                "hovertemplate": "confidence %{x:.3f}<br>accuracy %{y:.3f}<br>share %{customdata:.1%}<extra></extra>",
                "name": "accuracy with interval",
            },
        ]
    )
    return figure
