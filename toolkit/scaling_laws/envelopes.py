"""Where curves meet: the crossings of two laws, and the common lower envelope of many learning curves.

What does not exist is NaN.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from toolkit.checks import readable, typed
from toolkit.scaling_laws.constants import Number, PowerLaw, as_like, require_all_positive, require_constants

__all__ = [
    "Crossover",
    "Envelope",
    "crossover",
    "lower_envelope",
]

_HALVINGS = 80
_ROWS = 128  # points whose slopes to all others are in memory at a time


class Crossover(NamedTuple):
    """Up to two crossings ``at`` (..., 2), in ascending order, NaN where there is none, and the loss there."""

    at: Tensor
    loss: Tensor


class Envelope(NamedTuple):
    """Where the curves touch their common lower hull, and the laws of the touching points.

    ``touching`` (curves, points) marks them, ``compute`` and ``loss`` (curves,) are their means on each curve (of
    log C and L), NaN on a curve without any; N_opt ~ C^``size_exponent``, L - floor ~ C^-``loss_exponent``.
    """

    touching: Tensor
    compute: Tensor
    loss: Tensor
    size_exponent: Tensor
    loss_exponent: Tensor


@typed
def crossover(first: PowerLaw, second: PowerLaw, low: float, high: float) -> Crossover:
    """The x in [low, high] at which two power laws meet: x* = (A_1/A_2)^(1/(a_1 - a_2)) for a shared floor, else roots.

    The difference E_1 - E_2 + A_1 x^-a_1 - A_2 x^-a_2 has one extremum, at (a_1 A_1/(a_2 A_2))^(1/(a_1 - a_2)): at most
    one root lies on each side of it, found by bisection in log x. Constants may be tensors that broadcast (one law per
    bootstrap resample, say): the share of NaN is the share without a crossing. Raises ``ValueError`` for an empty range
    and for scales or exponents that are not positive. Which recipes cross is the question of "Rethinking Conventional
    Wisdom in Machine Learning: From Generalization to Scaling" (Xiao 2024); fits and their crossing are a reading.
    """
    require_all_positive(low=low)
    if not low < high < math.inf:
        raise ValueError(f"high: expected a finite number above low = {low}, got {high}")
    require_constants(first)
    require_constants(second)
    like = next(
        (value for value in (*first, *second) if isinstance(value, Tensor)), torch.zeros((), dtype=torch.double)
    )
    values = torch.broadcast_tensors(*(as_like(value, like) for value in (*first, *second)))
    e_1, a_1, p_1, e_2, a_2, p_2 = (value[..., None] for value in values)

    def difference(u: Tensor) -> Tensor:
        return e_1 - e_2 + a_1 * torch.exp(-p_1 * u) - a_2 * torch.exp(-p_2 * u)

    bottom, top = math.log(low), math.log(high)
    turn = torch.log(p_1 * a_1 / (p_2 * a_2)) / (p_1 - p_2)
    turn = torch.where(p_1 == p_2, top, turn).clamp(bottom, top)
    left = torch.cat([torch.full_like(turn, bottom), turn], -1)
    right = torch.cat([turn, torch.full_like(turn, top)], -1)
    rising = difference(right) > difference(left)
    exists = (difference(right) > 0) != (difference(left) > 0)
    for _ in range(_HALVINGS):
        middle = (left + right) / 2
        before = (difference(middle) > 0) != rising
        left, right = torch.where(before, middle, left), torch.where(before, right, middle)
    shared = torch.log(a_1 / a_2) / torch.where(p_1 == p_2, math.nan, p_1 - p_2)
    inside = (shared >= bottom) & (shared <= top)
    shared = torch.cat([torch.where(inside, shared, math.nan), torch.full_like(shared, math.nan)], -1)
    u = torch.where(e_1 == e_2, shared, torch.where(exists, (left + right) / 2, math.nan))
    u = torch.where(u[..., :1].isnan(), u.flip(-1), u)  # a single crossing comes first
    return Crossover(u.exp(), e_1 + a_1 * torch.exp(-p_1 * u))


def _slope(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Least squares over the points of weight 1; the others may be NaN."""
    x, y = torch.where(weight, x, 0), torch.where(weight, y, 0)
    centre = torch.where(weight, x - x.sum() / weight.sum(), 0)
    return (centre * y).sum() / centre.square().sum()


def _on_lower_hull(x: Tensor, y: Tensor) -> Tensor:
    """Whether each point is on the lower convex hull: no slope from its left exceeds one to its right."""
    on = []
    for x_i, y_i in zip(x[:, None].split(_ROWS), y[:, None].split(_ROWS), strict=True):
        run = x - x_i
        slope = (y - y_i) / torch.where(run == 0, 1, run)
        before = torch.where(run < 0, slope, -math.inf).amax(1)
        after = torch.where(run > 0, slope, math.inf).amin(1)
        on.append((before <= after) & ((run != 0) | (y >= y_i)).all(1))
    return torch.cat(on)


@typed
def lower_envelope(
    compute: Float[Tensor, "curves points"],
    loss: Float[Tensor, "curves points"],
    sizes: Float[Tensor, "curves"],
    floor: Number = 0.0,
) -> Envelope:
    """The lower convex hull of many learning curves in (log C, L), and N_opt(C) through the points on it.

    One row per size: its compute (FLOPs, ascending) and loss along a run. The hull is that of the loss, where it falls
    (a pure power law is straight in log L, and a hull of it has no corners); it does not depend on the floor. The first
    and the last point of each run, and all of the smallest and of the largest size, touch for want of neighbours and do
    not count. Least squares through the touching points' means give the exponents; ``floor`` is subtracted from the
    loss for ``loss_exponent`` alone. The work is (curves · points)². Raises ``ValueError`` for fewer than 4 sizes or 3
    points, for what is not positive or finite, and for fewer than 2 sizes that touch. Source: Henighan et al. 2020,
    "Scaling Laws for Autoregressive Generative Modeling" (N_opt ~ C^0.7 there; the hull is a reading).
    """
    if len(sizes) < 4 or compute.shape[1] < 3:
        raise ValueError(f"compute: expected at least 4 sizes of 3 points, got {tuple(compute.shape)}")
    require_all_positive(compute=compute, loss=loss, sizes=sizes)
    x = compute.log()
    if readable(x + loss) and not bool((x + loss).isfinite().all()):
        raise ValueError("loss: expected finite losses and compute, got an infinite one")
    every, values = x.reshape(-1), loss.reshape(-1)
    touching = _on_lower_hull(every, values).reshape(x.shape)
    touching = touching & (x <= every.gather(0, values.argmin(keepdim=True)))
    middle = (sizes > sizes.min()) & (sizes < sizes.max())
    place = torch.arange(x.shape[1], device=x.device)
    touching = touching & middle[:, None] & (place > 0) & (place < x.shape[1] - 1)
    count = touching.sum(1)
    if readable(count) and (count > 0).sum() < 2:
        raise ValueError(f"loss: expected at least 2 sizes that touch the hull, got {int((count > 0).sum())}")
    log_compute = torch.where(touching, x, 0).sum(1) / count  # NaN where nothing touches
    least = torch.where(touching, loss, 0).sum(1) / count
    excess = (least - floor).log()
    return Envelope(
        touching,
        log_compute.exp(),
        least,
        _slope(log_compute, sizes.log(), count > 0),
        -_slope(log_compute, excess, count > 0),
    )
