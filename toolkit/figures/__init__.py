"""Figures in one house style: matplotlib for still pictures, plotly for what an explorer redraws.

Still figures take an optional ``ax`` and return it (end the cell's last line with a semicolon to hide its text). The
``live_*`` functions build plotly figures with fixed axes, to be returned by an explorer's ``draw``. Colours are those
of Okabe & Ito (2008), told apart by colour-blind readers.
"""

from toolkit.figures.common import COLORS
from toolkit.figures.live import live_axes, live_band, live_intervals, live_reliability
from toolkit.figures.still import curve_band, film, image_grid, interval_plot, reliability_diagram, scatter, style

__all__ = [
    "COLORS",
    "curve_band",
    "film",
    "image_grid",
    "interval_plot",
    "live_axes",
    "live_band",
    "live_intervals",
    "live_reliability",
    "reliability_diagram",
    "scatter",
    "style",
]
