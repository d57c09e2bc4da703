"""Harder positives and more diverse negatives, mixed from those of the batch in embedding space."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from toolkit import random
from toolkit.checks import readable, require_range, typed
from toolkit.metric_learning.common import Scalar, masked_logsumexp, pair_masks, shared
from toolkit.metric_learning.infonce import _logits
from toolkit.metric_learning.similarities import Measure, cosine, precomputed

__all__ = ["extrapolated_positives", "feature_transformed", "interpolated_negatives"]

Mixable = Float[Tensor, "*rows dim"]


@typed
def extrapolated_positives(queries: Mixable, keys: Mixable, share: Scalar | Tensor) -> tuple[Mixable, Mixable]:
    """Move the two ends of positive pairs apart: q' = λ q + (1 - λ) k and k' = λ k + (1 - λ) q with λ = ``share`` ≥ 1.

    λ broadcasts: one number, one per row ``(rows, 1)`` or one per entry. For unit vectors the similarity falls from s
    to s - 2 λ (λ - 1) (1 - s); sum and direction of the pair stay. The results are not normalised again. Raises
    ``ValueError`` for λ < 1.

    Zhu et al. 2021, "Improving Contrastive Learning by Visualizing Feature Transformation" (the paper
    draws λ - 1 from Beta(2, 2)).
    """
    _require_within("share", share, 1, math.inf)
    return share * queries + (1 - share) * keys, share * keys + (1 - share) * queries


@typed
def interpolated_negatives(negatives: Mixable, partners: Mixable, share: Scalar | Tensor) -> Mixable:
    """Negatives between negatives: n' = λ n + (1 - λ) n_partner, with λ = ``share`` in [0, 1], which broadcasts.

    Being linear it serves similarities q·n as well as features. If the partners are a random permutation, the mean
    similarity to a query stays and its variance shrinks to about λ² + (1 - λ)² of what it was. The results are not
    normalised again. Raises ``ValueError`` for λ out of range.

    Zhu et al. 2021, "Improving Contrastive Learning by Visualizing Feature Transformation" (λ from
    Beta(1.6, 1.6)).
    """
    _require_within("share", share, 0, 1)
    return share * negatives + (1 - share) * partners


@typed
def feature_transformed(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    key: Int[Tensor, ""],
    temperature: Scalar = 0.1,
    positive: Scalar | None = None,
    negative: Scalar | None = None,
    similarity: Measure = cosine,
) -> Float[Tensor, "batch"]:
    """InfoNCE on harder positives and more diverse negatives, mixed in embedding space.

    Each anchor q has one positive k per call, and each of its negatives one partner among its negatives: the next ones
    in a random cyclic order of the batch that ``key`` draws. With q', k' of :func:`extrapolated_positives` and n' of
    :func:`interpolated_negatives` the value is -log(e^(q'·k'/τ) / (e^(q'·k'/τ) + Σ_n e^(q'·n'/τ))): q' is used against
    the negatives too, as in the public code. λ is one number per call for each: ``positive`` ≥ 1, by default
    1 + Beta(2, 2), and ``negative`` in [0, 1], by default Beta(1.6, 1.6), drawn with ``key``. λ = 1 for both is
    :func:`nt_xent` where each anchor has one positive. Here the batch replaces the queue and both ends of a pair are
    trained. All is bilinear, so ``similarity`` is cosine or a precomputed table of inner products. Raises
    ``ValueError`` for another one, τ ≤ 0, λ out of range, or values that are not finite.

    Zhu et al. 2021, "Improving Contrastive Learning by Visualizing Feature Transformation".
    """
    if similarity not in (cosine, precomputed):
        raise ValueError(f"similarity: expected cosine or precomputed inner products, got {similarity}")
    logits = _logits(embeddings, temperature, similarity)
    if positive is None:
        positive = 1 + random.symmetric_beta(random.fold_in(key, 0), 1, 2.0, logits.dtype)[0].clamp(0, 1)
    if negative is None:
        negative = random.symmetric_beta(random.fold_in(key, 1), 1, 1.6, logits.dtype)[0].clamp(0, 1)
    require_range("positive", positive, 1, math.inf)
    require_range("negative", negative, 0, 1)
    positives, negatives = pair_masks(labels)
    order = random.permutation(random.fold_in(key, 2), len(labels))
    rank = order.argsort()
    partner = order[_next(positives[:, order]).gather(1, rank[:, None])]  # (batch, 1), in the batch's own numbering
    query, _ = extrapolated_positives(logits, logits[partner[:, 0]], positive)  # rows of products with q'
    pull = positive * query.gather(1, partner)[:, 0] + (1 - positive) * query.diagonal()
    allowed = negatives[:, order]
    sorted_query = query[:, order]
    push = interpolated_negatives(sorted_query, sorted_query.gather(1, _next(allowed)), negative)
    each = F.softplus(masked_logsumexp(push, allowed) - pull, threshold=40)
    found = positives.any(-1)
    return shared(torch.where(found, each, 0), found.sum())


def _next(mask: Tensor) -> Tensor:
    """For each column the next one, cyclically, where the row's ``mask`` is true (itself if that is the only one)."""
    size = mask.shape[-1]
    places = torch.arange(2 * size, device=mask.device)
    twice = torch.where(torch.cat([mask, mask], -1), places, 2 * size)
    ahead = twice.flip(-1).cummin(-1).values.flip(-1)  # the first true place at or after each
    return ahead[:, 1 : size + 1] % size


def _require_within(name: str, values: Scalar | Tensor, low: float, high: float) -> None:
    """Raise ``ValueError`` unless all of ``values`` lie in [low, high] (nothing where they cannot be read)."""
    if not isinstance(values, Tensor):
        require_range(name, values, low, high)
    elif readable(values) and values.numel():
        for bound in values.detach().aminmax():
            require_range(name, bound, low, high)
