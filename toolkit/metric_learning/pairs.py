"""Losses on the pairs of a batch: contrastive, lifted, multi-similarity, circle, and regularisers made of pairs.

Each returns one value per anchor, ``(batch,)``. Where the usual form is a mean over pairs, the values are scaled so
that their mean over the batch is that mean. An anchor with nothing to learn gives 0. All work under ``vmap`` and
``vmap(grad)``, in memory of at most batch².
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import readable, require_positive, require_range, typed
from toolkit.metric_learning.common import (
    Embeddings,
    Labels,
    PerAnchor,
    Scalar,
    masked_logsumexp,
    pair_masks,
    require_finite,
    shared,
)
from toolkit.metric_learning.similarities import Measure, cosine, precomputed, squared_euclidean

__all__ = [
    "circle",
    "contrastive",
    "energy_confusion",
    "kl_hinge",
    "lifted",
    "multi_similarity",
    "pair_weights",
    "tcm",
    "zero_mean",
]


@typed
def contrastive(
    embeddings: Embeddings,
    labels: Labels,
    positive_margin: Scalar = 1.0,
    negative_margin: Scalar = 0.5,
    similarity: Measure = cosine,
) -> PerAnchor:
    """Positives farther than ``positive_margin`` are pulled, negatives nearer than ``negative_margin`` pushed: hinges.

    With a distance d: [d - m⁺]₊ over positives and [m⁻ - d]₊ over negatives; with a similarity the signs turn round.
    Margins are in the measure's units (for a distance take 0 and 1, say). Positives and negatives are averaged apart,
    each over its pairs with a hinge above 0. With ``similarity=snr`` this is the contrastive DSML of Yuan et al. 2019.
    Source: Hadsell, Chopra & LeCun 2006, "Dimensionality Reduction by Learning an Invariant Mapping", with hinges not
    squared. Raises ``ValueError`` for embeddings that are not finite or margins that are NaN.
    """
    hinges = embeddings, labels, positive_margin, negative_margin, similarity
    (positive, too_far), (negative, too_near) = _hinges(*hinges)
    return _mean_over(positive & (too_far > 0), too_far) + _mean_over(negative & (too_near > 0), too_near)


@typed
def tcm(
    embeddings: Embeddings,
    labels: Labels,
    positive_margin: Scalar = 0.9,
    negative_margin: Scalar = 0.5,
    positive_weight: Scalar = 1.0,
    negative_weight: Scalar = 1.0,
    similarity: Measure = cosine,
) -> PerAnchor:
    """Threshold-consistent margin, a regulariser that is added to a base loss so that one threshold fits all classes.

    λ⁺ Σ_P [m⁺ - s]₊ / #{P: s ≤ m⁺} + λ⁻ Σ_N [s - m⁻]₊ / #{N: s ≥ m⁻}, a part being 0 when its count is 0: only the
    hard pairs count, whatever their class. Source: Zhang et al. 2024, "Threshold-Consistent Margin Loss for Open-World
    Deep Metric Learning". Raises ``ValueError`` for embeddings that are not finite, NaN margins or negative weights.
    """
    require_range("positive_weight", positive_weight, 0, math.inf)
    require_range("negative_weight", negative_weight, 0, math.inf)
    hinges = embeddings, labels, positive_margin, negative_margin, similarity
    (positive, too_far), (negative, too_near) = _hinges(*hinges)
    pull, push = _mean_over(positive & (too_far >= 0), too_far), _mean_over(negative & (too_near >= 0), too_near)
    return positive_weight * pull + negative_weight * push


@typed
def lifted(embeddings: Embeddings, labels: Labels, margin: Scalar = 1.0, similarity: Measure = cosine) -> PerAnchor:
    """Generalised lifted structure: [m + log Σ_P exp d_ap + log Σ_N exp(-d_an)]₊, d a distance (or -similarity).

    Both sums are over the whole row: the nearest negatives and the farthest positives weigh most. m = ``margin`` ≥ 0.
    Source: Hermans, Beyer & Leibe 2017, "In Defense of the Triplet Loss", the generalisation of Song et al. 2016, "Deep
    Metric Learning via Lifted Structured Feature Embedding". Raises ``ValueError`` for embeddings that are not finite
    or a negative margin.
    """
    require_finite("embeddings", embeddings)
    require_range("margin", margin, 0, math.inf)
    distance = similarity.excess(similarity(embeddings), 0.0)
    positive, negative = pair_masks(labels)
    return (margin + masked_logsumexp(distance, positive) + masked_logsumexp(-distance, negative)).relu()


@typed
def multi_similarity(
    embeddings: Embeddings,
    labels: Labels,
    alpha: Scalar = 2.0,
    beta: Scalar = 50.0,
    base: Scalar = 0.5,
    epsilon: Scalar | None = 0.1,
    similarity: Measure = cosine,
) -> PerAnchor:
    """(1/α) log(1 + Σ_P exp(-α (s - λ))) + (1/β) log(1 + Σ_N exp(β (s - λ))), λ = ``base``; a distance is -s.

    ``epsilon`` ≥ 0 mines: a negative is kept if s + ε exceeds the anchor's least similar positive, a positive if s - ε
    is below its most similar negative; None keeps all pairs. β is 50 in the paper, 40 in its code, which also drops
    positives of similarity above 1 - 1e-5; they are kept here. The weight of a pair (:func:`pair_weights`) is
    1 / (exp(-α (λ - s_ij)) + Σ_{k in P} exp(-α (s_ik - s_ij))) for a positive, and alike with -β for a negative.
    Source: Wang et al. 2019, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning".
    Raises ``ValueError`` for embeddings that are not finite, α or β ≤ 0, λ that is NaN, or a negative ε.
    """
    require_finite("embeddings", embeddings)
    require_positive("alpha", alpha)
    require_positive("beta", beta)
    require_range("base", base, -math.inf, math.inf)
    excess = similarity.excess(similarity(embeddings), base)
    positive, negative = pair_masks(labels)
    if epsilon is not None:
        require_range("epsilon", epsilon, 0, math.inf)
        seen = excess.detach()
        nearest = seen.masked_fill(~negative, math.inf).amin(-1, keepdim=True)
        farthest = seen.masked_fill(~positive, -math.inf).amax(-1, keepdim=True)
        positive, negative = positive & (seen + epsilon > nearest), negative & (seen - epsilon < farthest)
    pull, push = masked_logsumexp(alpha * excess, positive), masked_logsumexp(-beta * excess, negative)
    return _log_one_plus_exp(pull) / alpha + _log_one_plus_exp(push) / beta


@typed
def pair_weights(
    loss: Callable[..., Tensor], similarities: Float[Tensor, "batch batch"], labels: Labels, **options: Any
) -> Float[Tensor, "batch batch"]:
    """General pair weighting: |∂ Σ_a loss_a / ∂ S_ij|, how strongly a loss pulls or pushes each pair, by autograd.

    ``similarities`` is a table of similarities, the anchor's row first; ``loss`` is any loss here that takes a
    ``similarity`` argument, and ``options`` its other arguments. The sum over anchors, not the mean, is differentiated:
    weights do not shrink with the batch. Source: Wang et al. 2019, "Multi-Similarity Loss with General Pair Weighting
    for Deep Metric Learning". Raises what the loss raises.
    """
    require_finite("similarities", similarities)

    def total(table: Tensor) -> Tensor:
        return loss(table, labels, similarity=precomputed, **options).sum()

    if not readable(similarities):
        return torch.func.grad(total)(similarities).abs()
    table = similarities.detach().requires_grad_()  # plain autograd: the first call of torch.func.grad takes seconds
    with torch.enable_grad():
        return torch.autograd.grad(total(table), table, materialize_grads=True)[0].abs()


@typed
def circle(
    embeddings: Embeddings,
    labels: Labels,
    margin: Scalar = 0.4,
    scale: Scalar = 80.0,
    similarity: Measure = cosine,
) -> PerAnchor:
    """softplus(log Σ_N exp(γ a⁻ (s - m)) + log Σ_P exp(-γ a⁺ (s - 1 + m))), a⁻ = [s + m]₊, a⁺ = [1 + m - s]₊.

    Each pair weighs by how far it is from its optimum; the weights a are constants to the gradient. m = ``margin`` in
    [0, 1], γ = ``scale`` > 0. Averaged over the anchors with a value above 0.
    Source: Sun et al. 2020, "Circle Loss: A Unified Perspective of Pair Similarity Optimization". Raises
    ``ValueError`` for embeddings that are not finite, m or γ out of range, or a distance in place of a similarity.
    """
    require_finite("embeddings", embeddings)
    require_range("margin", margin, 0, 1)
    require_positive("scale", scale)
    if similarity.far_is_large:
        raise ValueError(f"similarity: expected a similarity, got the distance {similarity}")
    table = similarity(embeddings)
    positive, negative = pair_masks(labels)
    seen = table.detach()
    pull = masked_logsumexp(-scale * (1 + margin - seen).relu() * (table - (1 - margin)), positive)
    push = masked_logsumexp(scale * (seen + margin).relu() * (table - margin), negative)
    values = _log_one_plus_exp(pull + push)
    return shared(values, (values > 0).sum())


@typed
def kl_hinge(logits: Float[Tensor, "batch classes"], labels: Labels, margin: Scalar = 2.0) -> PerAnchor:
    """Same class: KL(p_i|p_j) + KL(p_j|p_i); other classes: [m - KL(p_i|p_j)]₊ + [m - KL(p_j|p_i)]₊; p = softmax.

    Averaged over the partners j ≠ i (nats); m = ``margin`` ≥ 0. Meant as λ times this beside cross-entropy. Shukla et
    al. 2019, "Primate Face Identification in the Wild", add a pairwise loss on prediction distributions; this form is
    that of related work (Hsu & Kira 2016, "Neural network-based clustering using pairwise constraints"): a reading
    that is not confirmed. Raises ``ValueError`` for logits that are not finite or a negative margin.
    """
    require_finite("logits", logits)
    require_range("margin", margin, 0, math.inf)
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    divergence = (p * log_p).sum(-1, keepdim=True) - p @ log_p.mT
    positive, negative = pair_masks(labels)
    one_way = torch.where(positive, divergence, torch.where(negative, (margin - divergence).relu(), 0))
    return (one_way.sum(-1) + one_way.sum(-2)) / max(1, len(labels) - 1)


@typed
def energy_confusion(embeddings: Embeddings, labels: Labels) -> PerAnchor:
    """log E, E = ½ (mean |x_i - x_j|² over positives + the same over negatives): added with a small weight (0.13).

    It pulls the classes together again, against the metric loss, so that the embedding does not overfit the classes
    seen. The gradient is that of E divided by E. The authors' code takes ten random partners of each example; here all
    pairs are taken, which is the expectation of that and needs no random numbers. There its gradient reaches only the
    last layer, on embeddings that are not normalised: detach the features for the same. A term of the whole batch:
    every anchor has the same value; 0 without pairs; E is cut off at the smallest normal number.
    Source: Chen & Deng 2019, "Energy Confused Adversarial Metric Learning for Zero-Shot Image Retrieval and
    Clustering", after the code (the paper's own form has pairs of different classes only). Raises ``ValueError`` for
    embeddings that are not finite.
    """
    require_finite("embeddings", embeddings)
    squares = squared_euclidean(embeddings)
    positive, negative = pair_masks(labels)
    energy = (_mean_over(positive, squares) + _mean_over(negative, squares)).mean() / 2
    value = energy.clamp_min(torch.finfo(energy.dtype).tiny).log()
    return (value if len(labels) > 1 else 0 * energy).expand(len(labels))


@typed
def zero_mean(embeddings: Embeddings) -> PerAnchor:
    """|Σ_m x_m| of each row: the regulariser that keeps the coordinates' mean at 0, where SNR is a ratio of energies.

    Source: Yuan et al. 2019, "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning". Raises
    ``ValueError`` for embeddings that are not finite.
    """
    require_finite("embeddings", embeddings)
    return embeddings.sum(-1).abs()


def _hinges(
    embeddings: Tensor, labels: Tensor, positive_margin: Scalar, negative_margin: Scalar, similarity: Measure
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Which pairs are positive and how far beyond their margin they are; the same for the negative ones."""
    require_finite("embeddings", embeddings)
    require_range("positive_margin", positive_margin, -math.inf, math.inf)
    require_range("negative_margin", negative_margin, -math.inf, math.inf)
    table = similarity(embeddings)
    positive, negative = pair_masks(labels)
    too_far, too_near = similarity.excess(table, positive_margin), similarity.excess(negative_margin, table)
    return (positive, too_far), (negative, too_near)


def _mean_over(pairs: Tensor, values: Tensor) -> Tensor:
    """Per anchor, so that the mean over the batch is the mean of ``values`` where ``pairs``; 0 if there are none.

    ``values`` must be finite: products are several times faster than ``torch.where``, whose mask is no number.
    """
    counted = pairs.to(values.dtype)
    return shared((values * counted).sum(-1), counted.sum())


def _log_one_plus_exp(x: Tensor) -> Tensor:
    """log(1 + exp x), exact in float64 too (``softplus`` is linear from 20 on by default)."""
    return F.softplus(x, threshold=40)
