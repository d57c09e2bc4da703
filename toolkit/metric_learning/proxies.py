"""Losses that compare embeddings with one vector per class: proxies, or the rows of a classifier.

All take the embeddings, their labels 0 .. classes - 1 and the ``proxies`` (classes, dim), which the caller trains along
with the network. Lengths never matter: embeddings and proxies are compared as unit vectors. With C classes a loss costs
batch × C comparisons, whatever the batch holds, so a class that is alone in its batch still learns.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import require_labels, require_positive, require_range, typed
from toolkit.metric_learning.common import Scalar, masked_logsumexp, require_finite
from toolkit.metric_learning.similarities import Measure, cosine, normalise

__all__ = [
    "arcface",
    "cosface",
    "madacos",
    "normalised_softmax",
    "novel_class_weights",
    "proxy_anchor",
    "proxy_nca",
    "unpg",
]

Head = Literal["cosface", "arcface"]


@typed
def proxy_nca(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    scale: Scalar = 1.0,
) -> Float[Tensor, "batch"]:
    """Neighbourhood components with proxies for neighbours: −log( e^(−σ d(x, p_y)) / Σ_k e^(−σ d(x, p_k)) ).

    d is the squared distance of unit vectors, 2 − 2 cos, and σ = ``scale`` > 0; the sum runs over all classes, the own
    one included (the paper leaves it out; pytorch-metric-learning keeps it). So this is :func:`normalised_softmax` with
    twice the scale. Movshovitz-Attias et al. 2017, "No Fuss Distance Metric Learning using Proxies". Raises
    ``ValueError`` for values that are not finite, labels out of range or σ ≤ 0.
    """
    _check(embeddings, labels, proxies)
    require_positive("scale", scale)
    return F.cross_entropy(_cosines(embeddings, proxies, 2 * scale), labels, reduction="none")  # the 2 of d cancels


@typed
def proxy_anchor(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    margin: Scalar = 0.1,
    alpha: Scalar = 32.0,
    similarity: Measure = cosine,
) -> Float[Tensor, "batch"]:
    """Proxies as anchors: each gathers its class's examples and pushes off the others, hard ones most.

    mean over proxies p whose class occurs of log(1 + Σ_{x of p} e^(−α (s(x,p) − δ))), plus mean over all proxies of
    log(1 + Σ_{x not of p} e^(α (s(x,p) + δ))); δ = ``margin``, α = ``alpha`` > 0. The terms belong to proxies, not to
    examples: every example gets the batch's value. Kim et al. 2020, "Proxy Anchor Loss for Deep Metric Learning",
    equation 4. Raises ``ValueError`` for values that are not finite, labels out of range or α ≤ 0.
    """
    _check(embeddings, labels, proxies)
    require_positive("alpha", alpha)
    table = similarity(embeddings, proxies).mT
    own = torch.arange(len(proxies), device=labels.device)[:, None] == labels
    pull = F.softplus(masked_logsumexp(alpha * similarity.excess(table, margin), own))
    push = F.softplus(masked_logsumexp(alpha * similarity.excess(-margin, table), ~own))
    return (pull.sum() / own.any(-1).sum() + push.mean()).expand(len(labels))


@typed
def normalised_softmax(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    scale: Scalar = 10.0,
) -> Float[Tensor, "batch"]:
    """Cross-entropy of softmax(s · cos(x, w_k)): unit embeddings and unit class weights, no bias, s = ``scale`` > 0.

    Training and nearest-prototype search by cosine then rank classes alike, so that classes can be added without
    training (:func:`novel_class_weights`). Pereira et al. 2021, "Hyperspherical embedding for novel class
    classification"; the same form: Zhai & Wu 2019, "Classification is a Strong Baseline for Deep Metric Learning".
    Raises ``ValueError`` for values that are not finite, labels out of range or s ≤ 0.
    """
    _check(embeddings, labels, proxies)
    require_positive("scale", scale)
    return F.cross_entropy(_cosines(embeddings, proxies, scale), labels, reduction="none")


@typed
def novel_class_weights(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"], classes: int
) -> Float[Tensor, "{classes} dim"]:
    """Weights for classes the network never saw: the normalised mean of the normalised embeddings of each class.

    Append them to the trained rows of :func:`normalised_softmax`, or use them alone as nearest prototypes. ``labels``
    are 0 .. ``classes`` - 1; a class without examples gets a row of zeros. Pereira et al. 2021, "Hyperspherical
    embedding for novel class classification". Raises ``ValueError`` for embeddings that are not finite or labels out
    of range.
    """
    require_finite("embeddings", embeddings)
    require_labels("labels", labels, classes)
    own = torch.arange(classes, device=labels.device)[:, None] == labels
    return normalise(own.to(embeddings.dtype) @ normalise(embeddings))


@typed
def cosface(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    margin: Scalar = 0.35,
    scale: Scalar = 64.0,
) -> Float[Tensor, "batch"]:
    """Softmax on cosines in which the own class has to win by a margin: cos θ_y becomes cos θ_y − m, all times s.

    m = ``margin`` ≥ 0, s = ``scale`` > 0; m = 0 is :func:`normalised_softmax`. Wang et al. 2018, "CosFace: Large Margin
    Cosine Loss for Deep Face Recognition", equation 4. Raises ``ValueError`` for values that are not finite, labels out
    of range, m < 0 or s ≤ 0.
    """
    return _margin_softmax(embeddings, labels, proxies, "cosface", margin, scale)


@typed
def arcface(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    margin: Scalar = 0.5,
    scale: Scalar = 64.0,
) -> Float[Tensor, "batch"]:
    """Softmax on cosines in which the own class has to win by an angle: cos θ_y becomes cos(θ_y + m), all times s.

    m = ``margin`` in radians, in [0, π]; s = ``scale`` > 0. Beyond θ = π − m, where cos(θ + m) would rise again, it is
    cos θ − m sin m as in the authors' code. Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face
    Recognition", equation 3. Raises ``ValueError`` for values that are not finite, labels out of range, m outside
    [0, π] or s ≤ 0.
    """
    return _margin_softmax(embeddings, labels, proxies, "arcface", margin, scale)


@typed
def madacos(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    probability: Scalar = 0.02,
) -> Float[Tensor, "batch"]:
    """CosFace whose scale and margin follow each batch's median example, so that it stays as hard to classify.

    With a = ``probability`` in (0, 1), c the (lower) median of the cosines with the own class, and B = Σ_{k≠y} e^(s
    cos θ_k) of that median example: s = max(32, ln(9999999 (1 − a) / a) / (1 − c)), 1 − c taken as at least 0.001, and
    m = max(0, c − ln(B a / (1 − a)) / s). Whenever m > 0 the median example's own class has probability a exactly. No
    gradient passes through s and m. Zhu et al. 2023, "Coarse-to-Fine: Learning Compact Discriminative Representation
    for Single-Stage Image Retrieval", MadaCos. Raises ``ValueError`` for values that are not finite, labels out of
    range or a outside (0, 1).
    """
    _check(embeddings, labels, proxies)
    tiny = torch.finfo(embeddings.dtype).eps
    require_range("probability", probability, tiny, 1 - tiny)
    cosines = _cosines(embeddings, proxies)
    target = _pick(cosines, labels)
    fixed, own = cosines.detach(), target.detach()
    others = torch.arange(len(proxies), device=labels.device) != labels[:, None]
    median = own.argsort()[(len(labels) - 1) // 2][None]
    odds = torch.full_like(own[0], probability) if not isinstance(probability, Tensor) else probability
    odds = torch.logit(odds.to(own.dtype))
    centre = own.gather(0, median)
    scale = ((math.log(9999999) - odds) / (1 - centre).clamp_min(1e-3)).clamp_min(32)
    rest = masked_logsumexp(scale * fixed, others).gather(0, median)
    margin = (centre - (rest + odds) / scale).clamp_min(0)
    return _replaced(scale * cosines, labels, scale * (target - margin))


@typed
def unpg(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    proxies: Float[Tensor, "classes dim"],
    head: Head = "cosface",
    margin: Scalar = 0.5,
    scale: Scalar = 64.0,
    whisker: Scalar = 1.5,
) -> Float[Tensor, "batch"]:
    """Margin softmax in which the cosines of the batch's negative pairs compete with each example's own class too.

    L_i = −log( e^(s t_i) / (e^(s t_i) + Σ_{k≠y} e^(s c_ik) + Σ_n e^(s S_n)) ): t_i is the own class's cosine with the
    margin of ``head`` (:func:`cosface` or :func:`arcface`), S the cosines of all pairs of different classes in the
    batch, each pair once, the same list for every example. Outliers are left out: only S_n in [Q1 − r (Q3 − Q1),
    Q3 + r (Q3 − Q1)] count, r = ``whisker`` ≥ 0, where Q1 and Q3 are entries ⌊l/4⌋ and ⌊3l/4⌋ of the l sorted cosines.
    Jung et al. 2022, "Unified Negative Pair Generation toward Well-discriminative Feature Space for Face Recognition".
    Raises ``ValueError`` for values that are not finite, labels out of range, r < 0, or a margin or scale that the head
    refuses.
    """
    require_range("whisker", whisker, 0, math.inf)
    first, second = torch.triu_indices(len(labels), len(labels), device=labels.device)  # the diagonal is no negative
    unit = normalise(embeddings)
    pairs = (unit @ unit.mT).flatten()[first * len(labels) + second]
    negative = labels[first] != labels[second]
    ordered = torch.where(negative, pairs.detach(), math.inf).sort().values
    count = negative.sum()
    lower, upper = ordered.gather(0, torch.stack([count // 4, 3 * count // 4]).clamp_max(len(ordered) - 1))
    reach = whisker * (upper - lower)
    kept = negative & (pairs >= lower - reach) & (pairs <= upper + reach)
    return _margin_softmax(embeddings, labels, proxies, head, margin, scale, masked_logsumexp(scale * pairs, kept))


def _margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    proxies: Tensor,
    head: Head,
    margin: Scalar,
    scale: Scalar,
    rivals: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of scaled cosines with the margin of ``head``; ``rivals`` is log Σ exp of what else competes."""
    _check(embeddings, labels, proxies)
    require_range("margin", margin, 0, math.pi if head == "arcface" else math.inf)
    require_positive("scale", scale)
    cosines = _cosines(embeddings, proxies)
    target = _pick(cosines, labels)
    target = target - margin if head == "cosface" else _turned(target, margin)
    logits = scale * cosines.scatter(-1, labels[:, None], target[:, None])
    if rivals is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return torch.logaddexp(logits.logsumexp(-1), rivals) - scale * target


def _turned(target: Tensor, margin: Scalar) -> Tensor:
    """cos(θ + margin) from cos θ, and cos θ − margin · sin(margin) beyond θ = π − margin."""
    angle = margin if isinstance(margin, Tensor) else torch.full_like(target[0], margin)
    square = 1 - target * target
    wide = square > torch.finfo(target.dtype).eps  # at θ = 0 the sine has no derivative
    sine = torch.where(wide, torch.where(wide, square, 1).sqrt(), 0)
    turned = target * angle.cos() - sine * angle.sin()
    return torch.where(target >= -angle.cos(), turned, target - angle * angle.sin())


def _replaced(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` in which the labels' entries are ``target``."""
    return F.cross_entropy(logits.scatter(-1, labels[:, None], target[:, None]), labels, reduction="none")


def _cosines(embeddings: Tensor, proxies: Tensor, scale: Scalar = 1.0) -> Tensor:
    """``scale`` times :func:`cosine`, the embeddings' lengths divided out of the products, which are fewer."""
    return (embeddings @ (proxies * _inverse_lengths(proxies)).mT) * (scale * _inverse_lengths(embeddings))


def _inverse_lengths(x: Tensor) -> Tensor:
    """1 / length of each row, 1 for a row of zeros."""
    square = (x * x).sum(-1, keepdim=True)
    return torch.where(square > 0, square, 1).rsqrt()


def _pick(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row at its label."""
    return values.gather(-1, labels[:, None])[:, 0]


def _check(embeddings: Tensor, labels: Tensor, proxies: Tensor) -> None:
    require_finite("embeddings", embeddings)
    require_finite("proxies", proxies)
    require_labels("labels", labels, len(proxies))
