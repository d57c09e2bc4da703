"""Similarities and distances between the rows of two tables of embeddings, and the one thing losses ask of them.

A loss never needs to know whether a large value means near or far: it compares two values with
:meth:`Measure.excess`, so the same text serves a cosine and a distance.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import typed

__all__ = ["Measure", "cosine", "euclidean", "normalise", "precomputed", "snr", "squared_euclidean"]

Table = Callable[[Tensor, Tensor], Tensor]


class Measure:
    """A similarity or a distance: ``measure(x)`` compares all rows of x, ``measure(x, y)`` those of x with those of y.

    ``x`` is ``(rows, dim)``, ``y`` is ``(columns, dim)``; the result is ``(rows, columns)``, the anchor's row first.
    """

    def __init__(self, table: Table, far_is_large: bool):
        update_wrapper(self, table)
        self._table = typed(table)
        self.far_is_large = far_is_large

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._table(x, x if y is None else y)

    def __repr__(self) -> str:
        return self._table.__name__

    def excess(self, far: Tensor | float, near: Tensor | float) -> Tensor:
        """How much farther apart ``far`` is than ``near``: far - near for a distance, near - far for a similarity."""
        difference: Any = far - near
        return difference if self.far_is_large else -difference


def _measure(far_is_large: bool) -> Callable[[Table], Measure]:
    return lambda table: Measure(table, far_is_large)


@typed
def normalise(x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Rows scaled to length 1 (Euclidean); a row of zeros stays zero, with a finite gradient."""
    square = (x * x).sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, 1).rsqrt()


@_measure(far_is_large=False)
def cosine(x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Cosine similarity x·y / (|x| |y|), in [-1, 1]; 0 with a row of zeros."""
    unit = normalise(x)
    return unit @ (unit if y is x else normalise(y)).mT


@_measure(far_is_large=True)
def squared_euclidean(x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Squared Euclidean distance |x - y|² ≥ 0, from the Gram matrix (|x|² + |y|² - 2 x·y, cut off at 0)."""
    return ((x * x).sum(-1)[:, None] + (y * y).sum(-1) - 2 * (x @ y.mT)).relu()


@_measure(far_is_large=True)
def euclidean(x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Euclidean distance |x - y|; between rows that coincide (to rounding) the gradient is 0."""
    square = (x * x).sum(-1)[:, None] + (y * y).sum(-1)
    smallest = 4 * torch.finfo(x.dtype).eps * square  # what is left of the difference of two equal numbers
    square = square - 2 * (x @ y.mT)
    apart = square > smallest
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


@_measure(far_is_large=True)
def snr(x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Signal-to-noise distance var(y - x) / var(x), variances over the coordinates; x is the anchor: not symmetric.

    In Gram form on centred rows: (|x|² + |y|² - 2 x·y) / |x|². If the noise y - x is independent of x, the correlation
    of x and y is 1/√(1+d). An anchor whose coordinates are all equal has no signal: its distances are 0.
    Source: Yuan et al. 2019, "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", eq. 3.
    """
    smallest = (4 * torch.finfo(x.dtype).eps) ** 2 * (x * x).sum(-1)[:, None]  # what rounding leaves of equal numbers
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    signal = (x * x).sum(-1)[:, None]
    noise = (signal + (y * y).sum(-1) - 2 * (x @ y.mT)).relu()
    heard = signal > smallest
    return noise * torch.where(heard, 1 / torch.where(heard, signal, 1), 0)


@_measure(far_is_large=False)
def precomputed(x: Float[Tensor, "rows columns"], y: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The table itself: hand a loss a similarity matrix in place of embeddings, to look at one pair at a time."""
    return x
