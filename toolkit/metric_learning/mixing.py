"""Metrix: mixing a batch's examples, and metric losses on mixtures that are part positive, part negative.

Mix whatever the level asks for, then embed it. In a training loss, with ``z = model(batch.x)``::

    mixed, pairs = mix(batch.x, batch.y, batch.key); z_mixed = model(mixed)                    # inputs
    mixed, pairs = mix(features, batch.y, batch.key); z_mixed = mixed @ head.weight.T          # features
    z_mixed, pairs = mix(z, batch.y, batch.key)                                                # embeddings
    return metrix_contrastive(z, batch.y, z_mixed, pairs)
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import require_positive, require_range, typed
from toolkit.metric_learning.common import Scalar, masked_logsumexp, pair_masks, require_finite
from toolkit.metric_learning.similarities import Measure, cosine, precomputed, squared_euclidean

__all__ = ["Pairs", "metrix_contrastive", "metrix_multi_similarity", "mix", "utilisation"]

_BLOCK = 1024  # queries that are searched for at a time


class Pairs(NamedTuple):
    """How far each mixture is a positive and how far a negative of each anchor: two tables ``(anchors, mixtures)``.

    ``pull + push`` is 1 where the mixture counts for the anchor, 0 where it does not.
    """

    pull: Tensor
    push: Tensor


@typed
def mix(
    x: Float[Tensor, "batch ..."],
    labels: Int[Tensor, "batch"],
    key: Int[Tensor, ""],
    kind: Literal["positive", "anchor", "either"] = "either",
    share: Scalar | None = None,
) -> tuple[Float[Tensor, "batch ..."], Pairs]:
    """Mix each example with one of another class: v_i = λ x_i + (1 − λ) x_j, one λ ~ Beta(2, 2) per batch.

    ``x`` are inputs, features or embeddings. The partner j is drawn evenly from the other classes. For an anchor to
    which one of the two sources is positive (share y = λ or 1 − λ) v_i is a positive by y and a negative by 1 − y. What
    is positive says ``kind``: another example of the anchor's class ("positive"), the anchor itself ("anchor"), or one
    of the two with equal chance for the whole batch ("either", the authors' choice). For other anchors v_i does not
    count, nor for anyone in a batch of one class. ``share`` fixes λ. The result depends on ``key`` alone. Returns the
    mixtures, shaped like ``x``, and the pairs.

    Venkataramanan et al. 2022, "It Takes Two to Tango: Mixup for Deep Metric Learning"; there an anchor has
    mixtures of its own, here the batch shares as many mixtures as it has examples. Raises ``ValueError`` for ``x``
    that is not finite or λ outside [0, 1].
    """
    require_finite("x", x)
    if share is None:
        draws = random.uniform(random.fold_in(key, 0), (3,), x.dtype)
        lam = draws.sort().values[1]  # the median of three uniforms is Beta(2, 2)
    else:
        require_range("share", share, 0, 1)
        lam = share.to(x.dtype) if isinstance(share, Tensor) else torch.full((), share, dtype=x.dtype, device=x.device)
    positives, negatives = pair_masks(labels)
    chance = random.uniform(random.fold_in(key, 1), tuple(negatives.shape))
    partner = torch.where(negatives, chance, -1).argmax(-1)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    anchored = random.uniform(random.fold_in(key, 2), ()) < 0.5 if kind == "either" else torch.tensor(kind == "anchor")
    near = torch.where(anchored.to(labels.device), itself, positives) & negatives.any()
    first, second = near.to(x.dtype), near[:, partner].to(x.dtype)
    mixed = lam * x + (1 - lam) * x[partner]
    return mixed, Pairs(lam * first + (1 - lam) * second, (1 - lam) * first + lam * second)


@typed
def metrix_contrastive(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    mixed: Float[Tensor, "mixtures dim"],
    pairs: Pairs,
    weight: Scalar = 0.4,
    margin: Scalar = 0.5,
    similarity: Measure = cosine,
) -> Float[Tensor, "batch"]:
    """Contrastive loss plus w times the same on mixtures: ℓ(a) = Σ_p −S(a,p) + Σ_n [S(a,n) − m]₊, sums per anchor.

    On mixtures: Σ_v y_v · −S(a,v) + (1 − y_v) · [S(a,v) − m]₊ with y from :func:`mix`. w = ``weight`` ≥ 0, m =
    ``margin``. With a distance: Σ_p d + Σ_n [m − d]₊. With ``similarity=precomputed``, ``embeddings`` and ``mixed`` are
    the tables anchors × examples and anchors × mixtures.

    Venkataramanan et al. 2022, "It Takes Two to Tango: Mixup for Deep Metric Learning": our reading of its generic
    loss τ(σ⁺(Σ y ρ⁺) + σ⁻(Σ (1 − y) ρ⁻)) with τ = σ⁺ = σ⁻ = id, ρ⁺(x) = −x, ρ⁻(x) = [x − m]₊, not confirmed in its
    text. Raises ``ValueError`` for values that are not finite, pairs of another shape or w < 0.
    """
    plain, mixtures = _tables(embeddings, labels, mixed, pairs, weight, similarity)

    def terms(table: Tensor, given: Pairs) -> Tensor:
        pull, push = similarity.excess(table, 0.0), similarity.excess(margin, table).relu()
        return (given.pull * pull + given.push * push).sum(-1)

    return terms(*plain) + weight * terms(*mixtures)


@typed
def metrix_multi_similarity(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    mixed: Float[Tensor, "mixtures dim"],
    pairs: Pairs,
    weight: Scalar = 0.4,
    alpha: Scalar = 2.0,
    beta: Scalar = 50.0,
    base: Scalar = 0.5,
    similarity: Measure = cosine,
) -> Float[Tensor, "batch"]:
    """Multi-similarity loss plus w times the same on mixtures.

    ℓ(a) = (1/α) log(1 + Σ_p e^(−α (S(a,p) − λ))) + (1/β) log(1 + Σ_n e^(β (S(a,n) − λ))), and on mixtures the sums are
    Σ_v y_v e^(−α (S(a,v) − λ)) and Σ_v (1 − y_v) e^(β (S(a,v) − λ)) with y from :func:`mix`. w = ``weight`` ≥ 0, α =
    ``alpha`` > 0, β = ``beta`` > 0, λ = ``base``. With a distance S − λ is λ − d. ``similarity=precomputed`` as in
    :func:`metrix_contrastive`.

    Venkataramanan et al. 2022, "It Takes Two to Tango: Mixup for Deep Metric Learning": as there, in our reading, with
    σ⁺(x) = (1/α) log(1 + x), ρ⁺(x) = e^(−α (x − λ)), σ⁻ and ρ⁻ likewise with −β. The plain loss is Wang et al. 2019,
    "Multi-Similarity Loss with General Pair Weighting". Raises ``ValueError`` for values that are not finite, pairs of
    another shape, w < 0, α ≤ 0 or β ≤ 0.
    """
    require_positive("alpha", alpha)
    require_positive("beta", beta)
    plain, mixtures = _tables(embeddings, labels, mixed, pairs, weight, similarity)

    def terms(table: Tensor, given: Pairs) -> Tensor:
        farther = similarity.excess(table, base)
        pull, push = _log_total(alpha * farther, given.pull), _log_total(-beta * farther, given.push)
        return F.softplus(pull) / alpha + F.softplus(push) / beta

    return terms(*plain) + weight * terms(*mixtures)


@typed
def utilisation(queries: Float[Tensor, "queries dim"], embeddings: Float[Tensor, "examples dim"]) -> Float[Tensor, ""]:
    """How well the training embeddings cover the space that queries use: mean over queries of min_x |q − x|² ≥ 0.

    Lower is better: hand in the training embeddings with and without their mixtures to see what mixing adds. For unit
    vectors it lies in [0, 4]. Venkataramanan et al. 2022, "It Takes Two to Tango: Mixup for Deep Metric Learning"
    (our reading, not confirmed in its text). Raises ``ValueError`` for values that are not finite or no rows.
    """
    require_finite("queries", queries)
    require_finite("embeddings", embeddings)
    for name, rows in (("queries", queries), ("embeddings", embeddings)):
        if not len(rows):
            raise ValueError(f"{name}: expected at least one row, got none")
    nearest = [squared_euclidean(block, embeddings).amin(-1) for block in queries.split(_BLOCK)]
    return torch.cat(nearest).mean()


def _tables(
    embeddings: Tensor, labels: Tensor, mixed: Tensor, pairs: Pairs, weight: Scalar, similarity: Measure
) -> tuple[tuple[Tensor, Pairs], tuple[Tensor, Pairs]]:
    """Checked arguments as (comparisons, pairs), twice: of the examples and of the mixtures."""
    require_finite("embeddings", embeddings)
    require_finite("mixed", mixed)
    require_range("weight", weight, 0, math.inf)
    plain = similarity(embeddings)
    mixtures = mixed if similarity is precomputed else similarity(embeddings, mixed)
    if not pairs.pull.shape == pairs.push.shape == mixtures.shape:
        raise ValueError(f"pairs: expected two tables of shape {tuple(mixtures.shape)}, got {tuple(pairs.pull.shape)}")
    positives, negatives = pair_masks(labels)
    return (plain, Pairs(positives.to(plain.dtype), negatives.to(plain.dtype))), (mixtures, pairs)


def _log_total(exponents: Tensor, shares: Tensor) -> Tensor:
    """log Σ shares · exp(exponents) over the last dimension, ``shares`` ≥ 0."""
    counts = shares > 0
    return masked_logsumexp(exponents + torch.where(counts, shares, 1).log(), counts)
