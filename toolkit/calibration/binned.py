"""Calibration errors over bins: how far the stated confidence is from the observed frequency.

Each measure takes probabilities ``(batch, classes)`` with class labels, and then speaks of the *top label* (is the
predicted class right as often as its confidence says?), or probabilities ``(batch,)`` of one event with labels 0 / 1.
So ``ece(probabilities, labels)`` equals ``ece(*top_label(probabilities, labels))``.

Bins of equal width are (a, b]: 0 falls into the first, 1 into the last, and an edge into the bin below it, where a
value within a few units of rounding of an edge counts as that edge. Bins of equal mass (``binning="mass"``) end at the
quantiles of the sample; equal values always share a bin, that of the lowest-ranked of them, so the result does not
depend on the order of the sample (heavy ties therefore make fewer, fuller bins). Sums run in double precision.
"""

import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, require_labels, require_probabilities, typed

__all__ = [
    "Reliability",
    "ace",
    "classwise_ece",
    "debiased_ece",
    "ece",
    "mce",
    "reliability",
    "tace",
    "top_label",
]


BLOCK = 1 << 16  # items that are binned at a time


def wide(values: Tensor) -> Tensor:
    """``values`` in double precision, for sums over many items (left alone where the device has none)."""
    return values if values.device.type == "mps" else values.double()


def require_items(probabilities: Tensor, least: int = 1) -> None:
    """Raise ``ValueError`` where the batch holds fewer than ``least`` items."""
    if probabilities.shape[0] < least:
        raise ValueError(f"probabilities: expected at least {least} item(s), got a batch of {probabilities.shape[0]}")


def require_classified(probabilities: Tensor, labels: Tensor) -> None:
    """Raise ``ValueError`` unless there are items, rows of probabilities, and labels that name their columns."""
    require_items(probabilities)
    require_probabilities("probabilities", probabilities)
    require_labels("labels", labels, probabilities.shape[1])


def event_blocks(probabilities: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The events that a measure is about: their probabilities ``(batch,)`` and whether they happened (0 / 1 or bool).

    For ``(batch, classes)`` the event is "the top label is right"; ``(batch,)`` is checked and passed through. They
    come in blocks that stay in the processor's cache.
    """
    if probabilities.ndim == 1:
        require_items(probabilities)
        require_probabilities("probabilities", probabilities)
        require_labels("labels", labels, 2)
        yield from zip(probabilities.split(BLOCK), labels.split(BLOCK), strict=True)
        return
    require_items(probabilities)
    bare = readable(probabilities) and probabilities.dtype == torch.float32 and not probabilities.requires_grad
    for rows, true in zip(probabilities.split(BLOCK), labels.long().split(BLOCK), strict=True):
        require_probabilities("probabilities", rows)  # here, so that each value is read from memory once
        require_labels("labels", true, probabilities.shape[1])
        # The bits of floats that are not negative order like integers, whose maximum needs no care for NaN: twice as
        # fast where no gradient is asked for. The checks have excluded NaN, and each row has a positive entry.
        top = rows.view(torch.int32).amax(-1).view(torch.float32) if bare else rows.amax(-1)
        yield top, rows.gather(-1, true[:, None]).squeeze(-1) >= top


def events(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All of :func:`event_blocks` in one piece: two tensors ``(batch,)``."""
    chance, outcome = zip(*event_blocks(probabilities, labels), strict=True)
    return torch.cat(chance), torch.cat(outcome)


@typed
def top_label(
    probabilities: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Confidence max_k p_k of each prediction, and whether it is right (1) or not (0).

    Right means that no class is more probable than the true one: an item whose true class ties for the largest
    probability counts as right (``argmax`` would let the class order decide). The confidence is differentiable.

    Raises ``ValueError`` for an empty batch, for rows that are not probabilities, and for labels out of range. Source:
    Guo et al. 2017, section 2.
    """
    confidence, correct = events(probabilities, labels)
    return confidence, correct.long()


def require_bins(bins: int, binning: str) -> None:
    """Raise ``ValueError`` unless there is at least one bin and the binning is known."""
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    if binning not in ("width", "mass"):
        raise ValueError(f"binning: expected 'width' or 'mass', got {binning!r}")


def _quantiles(values: Tensor, bins: int, kept: Tensor | int) -> Tensor:
    """Inner edges ``(..., bins - 1)`` that cut the ``kept`` largest of ``values`` (last axis) into equal counts."""
    ordered = values.detach().sort(-1).values
    count = values.shape[-1]
    cut = torch.arange(1, bins, device=values.device)
    if isinstance(kept, Tensor):
        cut, kept = cut.expand(*kept.shape, -1), kept[..., None]
    rank = count - kept + (cut * kept + bins - 1) // bins - 1
    return ordered.gather(-1, rank.expand(*ordered.shape[:-1], bins - 1))


def mass_edges(values: Tensor, bins: int, binning: str) -> Tensor | None:
    """The inner edges that :func:`assign` takes: quantiles along the last axis for equal mass, None for equal width."""
    require_bins(bins, binning)
    return _quantiles(values, bins, values.shape[-1]) if binning == "mass" else None


def assign(values: Tensor, bins: int, inner: Tensor | None) -> Tensor:
    """Bin index 0 .. ``bins`` - 1 of each of ``values``, between the ``inner`` edges or in bins of equal width."""
    values = values.detach()
    if inner is not None:
        return torch.searchsorted(inner, values.contiguous())
    slack = 1 - 2 * torch.finfo(values.dtype).eps
    return (values * (bins * slack)).clamp(0, bins - 1).long()  # an edge k / bins stays just below k


def totals(index: Tensor, bins: int, values: Tensor) -> Tensor:
    """Sum of ``values`` in each bin, in double precision, along the last axis: shape ``(..., bins)``."""
    values = wide(values)
    return values.new_zeros(*values.shape[:-1], bins).scatter_add(-1, index, values)


def tally(probabilities: Tensor, labels: Tensor, bins: int, binning: str, sums: int = 3) -> Tensor:
    """Sums over the events in each bin, of p - y, of 1 and of y (the first ``sums`` of these): ``(sums, bins)``."""
    require_bins(bins, binning)
    inner, blocks = None, event_blocks(probabilities, labels)
    if binning == "mass":
        chance, outcome = events(probabilities, labels)
        inner, blocks = mass_edges(chance, bins, binning), zip(chance.split(BLOCK), outcome.split(BLOCK), strict=True)
    parts = []
    for chance, outcome in blocks:
        index, happened = assign(chance, bins, inner), outcome.to(chance.dtype)
        values = [chance - happened] if sums == 1 else [chance - happened, torch.ones_like(chance), happened][:sums]
        parts.append(torch.stack([totals(index, bins, value) for value in values]))
    return torch.stack(parts).sum(0)


def root(values: Tensor, norm: float) -> Tensor:
    """``values`` to the power 1 / ``norm``, 0 where they are not positive, with the gradient 0 there (never NaN)."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1) ** (1 / norm), 0)


@typed
def ece(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    norm: float = 1.0,
    binning: str = "width",
) -> Float[Tensor, ""]:
    """Expected calibration error (Σ_b w_b |ȳ_b - p̄_b|^norm)^(1/norm), w_b the share of items in bin b.

    ȳ_b is the observed frequency and p̄_b the mean confidence in bin b; ``norm=math.inf`` is the largest gap over the
    bins that hold items. Top label for ``(batch, classes)``, one event for ``(batch,)``. In [0, 1].

    Raises ``ValueError`` for an empty batch, values that are not probabilities, labels out of range, ``bins`` < 1,
    ``norm`` < 1 or an unknown ``binning``. Source: Naeini, Cooper & Hauskrecht 2015; Guo et al. 2017, equation 3;
    norms: Kumar, Liang & Ma 2019.
    """
    if not norm >= 1:
        raise ValueError(f"norm: expected a number of at least 1, got {norm}")
    dtype, size = probabilities.dtype, len(probabilities)
    if norm == 1:
        return (tally(probabilities, labels, bins, binning, sums=1).abs().sum() / size).to(dtype)
    excess, count = tally(probabilities, labels, bins, binning, sums=2)
    gap = excess.abs() / count.clamp_min(1)
    if norm == math.inf:
        return gap.amax().to(dtype)
    return root((count * gap**norm).sum() / size, norm).to(dtype)


@typed
def mce(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    binning: str = "width",
) -> Float[Tensor, ""]:
    """Maximum calibration error max_b |ȳ_b - p̄_b| over the bins that hold items: :func:`ece` with infinite norm.

    Shapes and errors as there. Source: Naeini, Cooper & Hauskrecht 2015.
    """
    return ece(probabilities, labels, bins, math.inf, binning)


@typed
def debiased_ece(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    binning: str = "width",
    squared: bool = False,
) -> Float[Tensor, ""]:
    """Calibration error of norm 2 without the bias that the noise of ȳ_b brings.

    Σ_b w_b [(ȳ_b - p̄_b)² - ȳ_b (1 - ȳ_b) / (n_b - 1)] is unbiased for the squared error over bins of two or more items
    and may be negative; it is returned with ``squared=True``. Otherwise its square root, 0 where it is negative. A bin
    of one item says nothing about its own noise: it adds 0 and keeps its weight.

    Shapes and errors as :func:`ece`. Source: Bröcker 2012; Kumar, Liang & Ma 2019 (Verified Uncertainty Calibration).
    """
    excess, count, happened = tally(probabilities, labels, bins, binning)
    gap, rate = excess / count.clamp_min(1), happened / count.clamp_min(1)
    terms = torch.where(count > 1, gap**2 - rate * (1 - rate) / (count - 1).clamp_min(1), 0)
    value = (count * terms).sum() / len(probabilities)
    return (value if squared else root(value, 2)).to(probabilities.dtype)


def class_events(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One row of events per class, "the label is k": probabilities and outcomes, both ``(classes, batch)``."""
    require_classified(probabilities, labels)
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    return probabilities.t().contiguous(), (labels == classes[:, None]).to(probabilities.dtype)


@typed
def classwise_ece(
    probabilities: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    binning: str = "width",
) -> Float[Tensor, ""]:
    """Classwise calibration error (1/K) Σ_k Σ_b w_kb |ȳ_kb - p̄_kb|: the mean over classes of the :func:`ece` of p_k.

    Bins of equal mass are cut for each class. Errors as :func:`ece`. Source: Kull et al. 2019 (Dirichlet calibration),
    also the static calibration error of Nixon et al. 2019.
    """
    chance, outcome = class_events(probabilities, labels)
    excess = totals(assign(chance, bins, mass_edges(chance, bins, binning)), bins, chance - outcome).abs()
    return (excess.sum() / chance.numel()).to(chance.dtype)


def _adaptive(chance: Tensor, outcome: Tensor, bins: int, kept: Tensor) -> Tensor:
    """Mean over classes of the mean gap over ranges of equal mass, of the ``kept`` entries only."""
    require_bins(bins, "mass")
    index = torch.searchsorted(_quantiles(chance, bins, kept.sum(-1)), chance.detach().contiguous())
    weight = kept.to(chance.dtype)
    count = totals(index, bins, weight)
    gap = totals(index, bins, (chance - outcome) * weight).abs() / count.clamp_min(1)
    return (gap.sum(-1) / (count > 0).sum(-1).clamp_min(1)).mean().to(chance.dtype)


@typed
def ace(
    probabilities: Float[Tensor, "batch classes"], labels: Int[Tensor, "batch"], bins: int = 15
) -> Float[Tensor, ""]:
    """Adaptive calibration error (1/K) Σ_k (1/R) Σ_r |ȳ_kr - p̄_kr| over R ranges of equal mass for each class k.

    Every range has the same weight, unlike :func:`classwise_ece`; a range that ties have left empty is not counted in
    R. Errors as :func:`ece`. Source: Nixon et al. 2019 (Measuring Calibration in Deep Learning).
    """
    chance, outcome = class_events(probabilities, labels)
    return _adaptive(chance, outcome, bins, torch.ones_like(chance, dtype=torch.bool))


@typed
def tace(
    probabilities: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    threshold: float | Float[Tensor, ""] = 0.01,
) -> Float[Tensor, ""]:
    """Thresholded :func:`ace`: only probabilities above ``threshold`` are cut into ranges and counted.

    So the many near-zero probabilities of a problem with many classes do not wash the error out. A class that no item
    gives more than ``threshold`` adds 0. Errors as :func:`ece`. Source: Nixon et al. 2019.
    """
    chance, outcome = class_events(probabilities, labels)
    kept: Bool[Tensor, "classes batch"] = chance > threshold
    return _adaptive(chance, outcome, bins, kept)


class Reliability(NamedTuple):
    """A reliability diagram: what :func:`reliability` returns, one entry for each bin (one more for the edges)."""

    edges: Float[Tensor, "bins+1"]
    confidence: Float[Tensor, "bins"]
    accuracy: Float[Tensor, "bins"]
    counts: Float[Tensor, "bins"]
    low: Float[Tensor, "bins"]
    high: Float[Tensor, "bins"]


@typed
def reliability(
    probabilities: Float[Tensor, "batch classes"] | Float[Tensor, "batch"],
    labels: Int[Tensor, "batch"],
    bins: int = 15,
    binning: str = "width",
    level: float = 0.95,
) -> Reliability:
    """Reliability diagram: mean confidence, observed frequency and its interval in each bin.

    ``low`` and ``high`` bound the frequency by Wilson's score interval at ``level``: the rates q whose z-test against
    ȳ_b passes, (ȳ + z²/2n ± z √(ȳ(1-ȳ)/n + z²/4n²)) / (1 + z²/n). An empty bin has counts 0, interval [0, 1], and NaN
    for the two means, which plots leave out. ``edges`` run from 0 to 1, at quantiles for ``binning="mass"``.

    Errors as :func:`ece`, and ``ValueError`` for a ``level`` outside (0, 1). Source: DeGroot & Fienberg 1983;
    Guo et al. 2017; interval: Wilson 1927.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    excess, count, happened = tally(probabilities, labels, bins, binning)
    inner = mass_edges(events(probabilities, labels)[0], bins, binning)
    if inner is None:
        inner = torch.arange(1, bins, dtype=probabilities.dtype, device=probabilities.device) / bins
    edges = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)])
    some = count.clamp_min(1)
    rate, confidence = happened / some, (happened + excess) / some
    share = NormalDist().inv_cdf((1 + level) / 2) ** 2 / some  # z² / n
    half = (share * rate * (1 - rate) + share**2 / 4).sqrt()
    empty = count == 0
    low = torch.where(empty, 0, ((rate + share / 2 - half) / (1 + share)).clamp_min(0))
    high = torch.where(empty, 1, ((rate + share / 2 + half) / (1 + share)).clamp_max(1))
    confidence, rate = (torch.where(empty, math.nan, mean) for mean in (confidence, rate))
    return Reliability(edges, *(value.to(probabilities.dtype) for value in (confidence, rate, count, low, high)))
