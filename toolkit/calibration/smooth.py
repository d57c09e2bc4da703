"""Calibration errors without bins: Kolmogorov-Smirnov, smooth and kernel measures.

As in :mod:`toolkit.calibration.binned`, probabilities ``(batch, classes)`` speak of the top label and ``(batch,)`` of
one event with labels 0 / 1. Sums run in double precision; results have the dtype of the probabilities.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.calibration.binned import event_blocks, events, require_items, root, totals, wide
from toolkit.checks import readable, require_positive, typed
from toolkit.sorting import ascending_order

__all__ = ["ks_error", "mmce", "skce", "smooth_ece"]

GRID = 4096  # cells on [0, 1] for the smooth error: error below 2e-7 at a width of 0.01

# A point at offset s in its cell, as masses on the four nodes around it (cubic interpolation): coefficients of
# 1, s, s², s³ for the nodes at -1, 0, 1 and 2.
_CUBIC = [[0, -1 / 3, 1 / 2, -1 / 6], [1, -1 / 2, -1, 1 / 2], [0, 1, 1 / 2, -1 / 2], [0, -1 / 6, 0, 1 / 6]]


@typed
def ks_error(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, ""]:
    """Kolmogorov-Smirnov calibration error max_t |(1/n) Σ_{p_i <= t} (p_i - y_i)|: no bins, no width.

    The distance between the cumulative confidence and the cumulative frequency; equal confidences enter together. In
    [0, 1]. Raises ``ValueError`` for an empty batch, values that are not probabilities and labels out of range.
    Source: Gupta et al. 2021 (Calibration of Neural Networks using Splines).
    """
    chance, outcome = events(probabilities, labels)
    order = ascending_order(chance)
    ordered = chance[order]
    residual = wide(ordered) - wide(outcome.gather(0, order))
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones_like(ordered[:1], dtype=torch.bool)])
    return (torch.where(last, residual.cumsum(0).abs(), 0).amax() / len(chance)).to(chance.dtype)


def _modes(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cosine coefficients (1/n) Σ_i (p_i - y_i) cos(π k p_i), k = 0 .. GRID, of the residual measure."""
    blocks = []
    for some, happened in event_blocks(probabilities, labels):
        some = wide(some)
        residual = some - wide(happened)
        cell = (some.detach() * GRID).floor_().clamp(0, GRID - 1)
        offset = some * GRID - cell
        index = cell.long()
        moments = []
        for _ in range(4):
            moments.append(totals(index, GRID, residual))
            residual = residual * offset
        blocks.append(torch.stack(moments))
    moment = torch.stack(blocks).sum(0) / len(probabilities)
    masses = torch.tensor(_CUBIC, dtype=moment.dtype, device=moment.device) @ moment
    nodes = torch.stack([torch.nn.functional.pad(masses[i], (i, 3 - i)) for i in range(4)]).sum(0)  # nodes -1 .. GRID+1
    below, inside, above = nodes[:1], nodes[1:-1], nodes[-1:]  # beyond an end, the measure is its own mirror image
    pad = torch.nn.functional.pad
    inside = inside + pad(below, (1, GRID - 1)) + pad(above, (GRID - 1, 1))
    return torch.fft.rfft(inside, n=2 * GRID).real


def _waves(modes: Tensor) -> Tensor:
    """The frequencies π k of the ``modes``."""
    return math.pi * torch.arange(GRID + 1, dtype=modes.dtype, device=modes.device)


def _blurred(modes: Tensor, sigma: Tensor) -> Tensor:
    """The residual curve on the nodes of [0, 1] and its mirror image, after a Gaussian blur of width ``sigma``."""
    return torch.fft.hfft(modes * torch.exp(-((_waves(modes) * sigma) ** 2) / 2))


def _area(curve: Tensor) -> Tensor:
    """∫ |r(t)| dt over [0, 1]: the trapezoid rule, which is the mean over the period, exact to third order at kinks.

    A cell in which the curve changes sign counts as two triangles, plus the end correction h² |r'| / 6 of the two
    pieces that meet there.
    """
    start, end = curve[:GRID].abs(), curve[1 : GRID + 1].abs()
    crosses = curve[:GRID] * curve[1 : GRID + 1] < 0
    both = start + end
    bent = (start**2 + end**2) / torch.where(crosses, 2 * both, 1) + both / 6
    return torch.where(crosses, bent, both / 2).mean()


@typed
def smooth_ece(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    sigma: float | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Smooth calibration error smECE_σ = ∫ |(1/n) Σ_i (p_i - y_i) K_σ(t, p_i)| dt over [0, 1].

    K_σ is the Gaussian kernel reflected at 0 and 1, exactly: a blur that damps the cosine mode k of the residuals by
    exp(-(π k σ)² / 2). Without ``sigma`` the width is the value itself, the one σ with smECE_σ = σ (accurate for
    results above about 5e-4, the finest width that the grid resolves). |mean(p - y)| <= smECE_σ <= mean |p - y| for
    every σ. Differentiable, through the fixed point too.

    Errors as :func:`ks_error`, and ``ValueError`` for a ``sigma`` that is not positive. Source: Błasiok & Nakkiran
    2023 (Smooth ECE).
    """
    if sigma is not None:
        require_positive("sigma", sigma)
    modes = _modes(probabilities, labels)
    if sigma is not None:
        width = torch.as_tensor(sigma, dtype=modes.dtype, device=modes.device)
        return _area(_blurred(modes, width)).to(probabilities.dtype)
    still = modes.detach()
    low, high = torch.zeros_like(still[0]), torch.ones_like(still[0])
    for _ in range(20):  # smECE_σ - σ falls in σ: bisect ...
        middle = (low + high) / 2
        above = _blurred(still, middle).abs().mean() > middle
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    width = (low + high) / 2
    curve = _blurred(still, width)
    slope = (curve.sign() * _blurred(-width * _waves(still) ** 2 * still, width)).mean()
    value = _area(_blurred(modes, width))
    return (width + (value - width) / (1 - slope)).to(probabilities.dtype)  # ... and one step of Newton's method


def _pairs(chance: Tensor, outcome: Tensor, width: float | Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{i≠j} r_i r_j exp(-|p_i - p_j| / width) and Σ_i r_i², with r = y - p.

    After a sort the kernel is exp(p_j / width) exp(-p_i / width) for j before i: one running sum does all pairs.
    """
    if (not isinstance(width, Tensor) or readable(width)) and not width >= 1e-3:
        raise ValueError(f"width: expected at least 0.001, got {float(width)}")
    if isinstance(width, Tensor):
        width = wide(width).clamp_min(1e-3)
    order = ascending_order(chance)
    ordered = wide(chance)[order]
    residual = wide(outcome).gather(0, order) - ordered
    place = (ordered - 0.5) / width
    rising = residual * place.exp()
    before = rising.cumsum(0) - rising
    return 2 * (residual * (-place).exp() * before).sum(), (residual**2).sum()


@typed
def mmce(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    width: float | Float[Tensor, ""] = 0.4,
) -> Float[Tensor, ""]:
    """Maximum mean calibration error √((1/n²) Σ_ij r_i r_j exp(-|p_i - p_j| / width)), r_i = y_i - p_i.

    Exact in O(n log n) time and O(n) memory. Differentiable (the gradient is 0 where the value is 0). ``width`` is at
    least 0.001 in units of probability. Errors as :func:`ks_error`, and ``ValueError`` for a smaller ``width``.
    Source: Kumar, Sarawagi & Jain 2018 (Trainable Calibration Measures).
    """
    chance, outcome = events(probabilities, labels)
    pairs, diagonal = _pairs(chance, outcome, width)
    return (root(pairs + diagonal, 2) / len(chance)).to(chance.dtype)


@typed
def skce(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    width: float | Float[Tensor, ""] = 0.4,
) -> Float[Tensor, ""]:
    """Squared kernel calibration error, unbiased: Σ_{i≠j} r_i r_j exp(-|p_i - p_j| / width) / (n (n - 1)).

    The square of :func:`mmce` without the pairs of an item with itself, so its mean over samples of a calibrated model
    is 0 and single values may be negative. Of the top label (or of one event), not of the whole probability vector.

    Errors as :func:`mmce`, and ``ValueError`` for fewer than two items. Source: Widmann, Lindsten & Zachariah 2019
    (Calibration tests in multi-class classification), the estimator SKCE_uq.
    """
    require_items(probabilities, 2)
    chance, outcome = events(probabilities, labels)
    count = len(chance)
    return (_pairs(chance, outcome, width)[0] / (count * (count - 1))).to(chance.dtype)
