"""One threshold for all: are two items of the same class? False accepts, false rejects, and how classes differ in them.

Scores are larger for pairs that look more alike; a pair is accepted when its score is at least the threshold. The false
accept rate (FAR) is the share of different-class pairs accepted, the false reject rate (FRR) the share of same-class
pairs refused, and TAR = 1 - FRR. Counts are exact integers, rates float64.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, require_labels, typed
from toolkit.metric_learning.common import masked_mean, require_finite
from toolkit.metric_learning.similarities import Measure, cosine, normalise
from toolkit.sorting import ascending

__all__ = ["Roc", "UtilityCurves", "far_frr", "opis", "pair_scores", "roc", "threshold_at_far", "utility_curves"]

_BLOCK = 1 << 21  # pairs that are looked at together


class Roc(NamedTuple):
    """Rates at each threshold, float64; plot ``tar`` over ``far``, or ``frr`` over ``far`` (DET)."""

    thresholds: Float[Tensor, "thresholds"]
    far: Float[Tensor, "thresholds"]
    frr: Float[Tensor, "thresholds"]

    @property
    def tar(self) -> Tensor:
        return 1 - self.frr


class UtilityCurves(NamedTuple):
    """Per class and threshold, in [0, 1]; rows are the classes in the order of their labels.

    A class with fewer than two items, or without another class beside it, has zeros and ``counted`` is false.
    """

    utility: Float[Tensor, "classes thresholds"]
    sensitivity: Float[Tensor, "classes thresholds"]
    specificity: Float[Tensor, "classes thresholds"]
    counted: Bool[Tensor, "classes"]


@typed
def pair_scores(
    embeddings: Float[Tensor, "items dim"], labels: Int[Tensor, "items"], similarity: Measure = cosine
) -> tuple[Float[Tensor, "pairs"], Bool[Tensor, "pairs"]]:
    """Scores of all pairs i < j, in the order (0, 1), (0, 2), ..., and whether the two share a class.

    The score is the similarity, or minus the distance (of j from the anchor i, where it matters). Raises ``ValueError``
    for embeddings that are not finite.
    """
    require_finite("embeddings", embeddings)
    table = similarity(embeddings)
    i, j = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    scores = table[i, j]
    return -scores if similarity.far_is_large else scores, labels[i] == labels[j]


def _require_pairs(scores: Tensor, same: Tensor, *, genuine: bool = True) -> None:
    require_finite("scores", scores)
    if readable(same) and (bool(same.all()) or (genuine and not bool(same.any()))):
        missing = "different classes" if bool(same.all()) else "the same class"
        raise ValueError(f"same: expected at least one pair of {missing}, got none")


@typed
def roc(
    scores: Float[Tensor, "pairs"], same: Bool[Tensor, "pairs"], thresholds: Float[Tensor, "thresholds"] | None = None
) -> Roc:
    """FAR and FRR at ``thresholds``, or at every score: +∞ first (all refused), then the scores from high to low.

    Every score is a threshold even if it occurs twice, so the length is that of ``scores`` plus one and the curve is
    exact. Raises ``ValueError`` for scores that are not finite and for pairs of one kind only.
    """
    _require_pairs(scores, same)
    if thresholds is None:
        thresholds = torch.cat([scores.new_full((1,), math.inf), ascending(scores).flip(0)])
    total = same.sum()

    def accepted(kind: Tensor, count: Tensor) -> Tensor:
        """Share of the pairs of one kind at or above each threshold; the others are put below them all."""
        ordered = ascending(torch.where(kind, scores, -math.inf))
        reached = len(same) - torch.searchsorted(ordered, thresholds.contiguous())
        return torch.minimum(reached, count).double() / count.clamp_min(1)

    return Roc(thresholds, accepted(~same, len(same) - total), 1 - accepted(same, total))


@typed
def far_frr(
    scores: Float[Tensor, "pairs"], same: Bool[Tensor, "pairs"], threshold: float | int | Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """False accept and false reject rate at one threshold, float64. Errors as :func:`roc`."""
    _require_pairs(scores, same)
    accepted, genuine = scores >= threshold, same.sum()
    far = (accepted & ~same).sum().double() / (len(same) - genuine).clamp_min(1)
    return far, (~accepted & same).sum().double() / genuine.clamp_min(1)


@typed
def threshold_at_far(
    scores: Float[Tensor, "pairs"],
    same: Bool[Tensor, "pairs"],
    far: float | int | Float[Tensor, ""] | Float[Tensor, "rates"],
) -> Float[Tensor, ""] | Float[Tensor, "rates"]:
    """The lowest threshold at which the false accept rate is at most ``far`` (one rate or several).

    With a = ⌊far · different-class pairs⌋ that is the number just above the (a+1)-th highest of their scores, to the
    last bit; at ``far`` = 1 the lowest of all scores. Raises ``ValueError`` for a rate outside [0, 1], scores that are
    not finite and for pairs of one class only.
    """
    _require_pairs(scores, same, genuine=False)
    rate = torch.as_tensor(far, dtype=torch.float64, device=scores.device)
    if readable(rate) and not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(f"far: expected rates in [0, 1], got {far}")
    ordered = ascending(torch.where(same, -math.inf, scores))
    impostors = (~same).sum()
    allowed = (rate * impostors * (1 + 1e-12)).floor().long()  # 0.29 of 100 pairs is 29
    place = len(same) - 1 - allowed
    refused = ordered.gather(0, place.clamp(0, max(len(same) - 1, 0)).reshape(-1)).reshape(rate.shape)
    above = torch.nextafter(refused, torch.full_like(refused, math.inf))
    return torch.where(allowed < impostors, above, scores.detach().amin())


def _counts(embeddings: Tensor, index: Tensor, classes: int, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Per class: pairs (item of the class, other item) whose chord is at most each edge, of the same class and not.

    Two tables ``(classes, edges)``, float64; every pair within a class counts twice. A chord d is compared as the
    cosine 1 - d²/2, so no square root is taken, and each pair is put into its bin once.
    """
    bins = len(edges) + 1
    lowest = (1 - edges.double() ** 2 / 2).to(embeddings.dtype)
    ascending = lowest.flip(0).contiguous()
    rows = max(1, _BLOCK // max(len(index), 1))
    counts = torch.zeros(classes * 2 * bins, dtype=torch.float64, device=index.device)
    places = torch.arange(len(index), device=index.device)
    for start in range(0, len(index), rows):
        own = index[start : start + rows, None]
        # The number of edges reached by the pair: those of the largest distances, at the end of ``edges``.
        reached = torch.bucketize(embeddings[start : start + rows] @ embeddings.mT, ascending, right=True)
        itself = places[start : start + rows, None] == places
        reached = torch.where(itself, 0, reached)
        cell = ((2 * own + (own == index)) * bins + reached).reshape(-1)
        counts = counts.scatter_add(0, cell, torch.ones((), dtype=counts.dtype, device=cell.device).expand(len(cell)))
    accepted = counts.reshape(classes, 2, bins).flip(-1).cumsum(-1)[..., :-1]  # the first edge: those that reach all
    return accepted[:, 1], accepted[:, 0]


def _utility(embeddings: Tensor, index: Tensor, classes: int, thresholds: Tensor) -> UtilityCurves:
    """Utility curves of embeddings of length 1."""
    order = thresholds.argsort()
    same, other = _counts(embeddings, index, classes, thresholds[order])
    back = order.argsort()
    same, other = same[:, back], other[:, back]
    ones = torch.ones_like(index, dtype=torch.float64)
    size = torch.zeros(classes, dtype=torch.float64, device=index.device).scatter_add(0, index, ones)
    genuine, impostors = size * (size - 1), size * (len(index) - size)
    counted = (genuine > 0) & (impostors > 0)
    sensitivity = torch.where(counted[:, None], same / genuine.clamp_min(1)[:, None], 0)
    specificity = torch.where(counted[:, None], 1 - other / impostors.clamp_min(1)[:, None], 0)
    total = sensitivity + specificity
    utility = torch.where(total > 0, 2 * sensitivity * specificity / torch.where(total > 0, total, 1), 0)
    return UtilityCurves(utility, sensitivity, specificity, counted)


def _classes(labels: Tensor, classes: int | None) -> tuple[Tensor, int]:
    """Class index of each item and the number of classes: those that occur, or 0 .. ``classes`` - 1."""
    if classes is not None:
        require_labels("labels", labels, classes)
        return labels.long(), classes
    if not readable(labels):
        raise ValueError("classes: expected the number of classes, which labels under vmap do not tell, got None")
    present, index = labels.unique(return_inverse=True)
    return index, len(present)


@typed
def utility_curves(
    embeddings: Float[Tensor, "items dim"],
    labels: Int[Tensor, "items"],
    thresholds: Float[Tensor, "thresholds"],
    classes: int | None = None,
) -> UtilityCurves:
    """Per class, how well one distance threshold d serves it: U_i(d) = 2 φ ψ / (φ + ψ), in [0, 1].

    φ (sensitivity) is the share of the pairs within class i at most d apart, ψ (specificity) the share of the pairs of
    one item of class i and one of another class more than d apart. Distances are Euclidean between embeddings scaled to
    length 1, in [0, 2]: a cosine c is the distance √(2 - 2c). Rows are the classes that occur, in the order of their
    labels; with ``classes`` (needed under ``vmap`` if labels differ between members) they are 0 .. ``classes`` - 1.
    Values float64; time O(items² log thresholds), memory a few million pairs at a time.

    Raises ``ValueError`` for embeddings that are not finite, negative thresholds and labels outside 0 .. ``classes`` -
    1. Source: Zhang et al. 2024, "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", section 3.
    """
    require_finite("embeddings", embeddings)
    if readable(thresholds) and not bool((thresholds >= 0).all()):
        raise ValueError(f"thresholds: expected distances of at least 0, got {thresholds.min().item()}")
    index, count = _classes(labels, classes)
    return _utility(normalise(embeddings.detach()), index, count, thresholds)


@typed
def opis(
    embeddings: Float[Tensor, "items dim"],
    labels: Int[Tensor, "items"],
    far: tuple[float, float] = (0.01, 0.1),
    thresholds: int = 101,
    worst: float | None = None,
    classes: int | None = None,
) -> Float[Tensor, ""]:
    """Operating-point inconsistency: the variance of the classes' utility curves, averaged over a range of thresholds.

    OPIS = (1/T) Σ_i 1/(d₁ - d₀) ∫ (U_i(d) - Ū(d))² dd over the T classes with :func:`utility_curves` U_i and their mean
    Ū; d₀ and d₁ are the distances at which the false accept rate over all pairs reaches ``far`` (the largest at which
    it is not above it). Trapezoid rule on ``thresholds`` even distances. 0 if all classes share one curve. With
    ``worst`` = ε in (0, 1] (ε-OPIS) only the ⌈ε T⌉ classes with the largest integrals are averaged, Ū still over all.

    The ends 0.01 and 0.1 and the number of thresholds are those of a replication, and the reading of ε-OPIS is ours:
    neither is confirmed from the paper. Float64. Under ``vmap`` share the labels between the members, or give
    ``classes``. Memory O(items²): the scores of all pairs are sorted.

    Raises ``ValueError`` for embeddings that are not finite, rates outside [0, 1] or not ascending, fewer than two
    thresholds, ``worst`` outside (0, 1], and if no two classes with two items each exist. Source: Zhang et al. 2024,
    "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", section 3.
    """
    if not 0 <= far[0] <= far[1] <= 1:
        raise ValueError(f"far: expected two ascending rates in [0, 1], got {far}")
    if thresholds < 2:
        raise ValueError(f"thresholds: expected at least 2, got {thresholds}")
    if worst is not None and not 0 < worst <= 1:
        raise ValueError(f"worst: expected a share of the classes in (0, 1], got {worst}")
    index, count = _classes(labels, classes)
    require_finite("embeddings", embeddings)
    points = normalise(embeddings.detach())
    if readable(index):
        sizes = torch.bincount(index, minlength=1)
        if int((sizes > 1).sum()) < 2:
            raise ValueError(f"labels: expected two classes with two items, got classes of {sizes.tolist()[:9]} items")
    cosines = threshold_at_far(
        *pair_scores(points, labels), torch.tensor(far, dtype=torch.float64, device=index.device)
    )
    beside = cosines.double() + 16 * torch.finfo(points.dtype).eps  # clear of the pair it must refuse, despite rounding
    ends = (2 - 2 * beside).clamp_min(0).sqrt()
    steps = torch.linspace(0, 1, thresholds, dtype=torch.float64, device=index.device)
    curves = _utility(points, index, count, ends[0] + (ends[1] - ends[0]) * steps)
    counted = curves.counted
    mean = masked_mean(curves.utility.mT, counted)
    square = (curves.utility - mean) ** 2
    per_class = ((square[:, 1:] + square[:, :-1]) / 2).mean(-1)  # the range's length cancels
    if worst is None:
        return masked_mean(per_class, counted)
    descending = torch.where(counted, per_class, -1).sort(descending=True).values
    chosen = torch.arange(count, device=index.device) < (worst * counted.sum() * (1 - 1e-12)).ceil()
    return masked_mean(descending, chosen & (descending >= 0))
