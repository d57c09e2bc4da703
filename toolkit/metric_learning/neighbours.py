"""A score of how well neighbours agree with labels, and the loss that raises it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from toolkit.checks import typed
from toolkit.metric_learning.common import masked_mean, require_finite
from toolkit.metric_learning.similarities import Measure, euclidean

__all__ = ["icnn", "icnn_score"]


@typed
def icnn(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    neighbours: int = 4,
    reach: int | None = None,
    similarity: Measure = euclidean,
) -> Float[Tensor, "batch"]:
    """Minus the logarithm of :func:`icnn_score`, ≥ 0; it belongs to the whole batch, so every example gets it.

    The authors add it to a classification loss. Which examples are neighbours and the share of them that is of the own
    class have no gradient; distances have. Mendez-Ruiz et al. 2023, "SuSana Distancia is all you need: Enforcing class
    separability in metric learning via two novel distance-based loss functions for few-shot image classification",
    "full" variant: all examples of an episode, support and query, are one batch. Raises ``ValueError`` as the score.
    """
    return -icnn_score(embeddings, labels, neighbours, reach, similarity).log().expand(len(labels))


@typed
def icnn_score(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, "batch"],
    neighbours: int = 4,
    reach: int | None = None,
    similarity: Measure = euclidean,
) -> Float[Tensor, ""]:
    """Inter and intra class nearest neighbours score J = ((A + B)/2 + γ)/2 in (0, 1]; 1 is best.

    Over the k = ``neighbours`` nearest other examples of each example i, at distances d_ij:
    A = 1 − mean_i mean_{j of i's class} d_ij / max(r_i, max_j d_ij), where r_i is the distance of the nearest example
    of another class among the ``reach`` ≥ k nearest (k + 1 by default; the authors take shots + queries per class;
    infinite if there is none, which makes the ratio 0);
    B = mean_i mean_{j of another class} d_ij / D, where D is the largest distance in this sum; 1 if nobody has a
    neighbour of another class;
    γ = mean share of the neighbours that are of the own class.
    Outer means are over examples that have such a neighbour. In a batch of at most k + 2 examples k is the batch less 2
    and γ is 1; with fewer than three examples J is 1. A similarity counts as the distance 1 − s.

    Mendez-Ruiz et al. 2023, "SuSana Distancia is all you need", as in its code (there 10⁻⁶ is added to squared
    distances). Raises ``ValueError`` for embeddings that are not finite, k < 1 or reach < k.
    """
    require_finite("embeddings", embeddings)
    if neighbours < 1:
        raise ValueError(f"neighbours: expected at least 1, got {neighbours}")
    if reach is not None and reach < neighbours:
        raise ValueError(f"reach: expected at least neighbours = {neighbours}, got {reach}")
    size = len(labels)
    if size < 3:
        return (embeddings * 0).sum() + 1
    few = neighbours + 2 >= size
    count = size - 2 if few else neighbours
    widest = min(count + 1 if reach is None else reach, size - 1)
    distances = similarity.excess(similarity(embeddings), 0.0 if similarity.far_is_large else 1.0).clamp_min(0)
    itself = torch.eye(size, dtype=torch.bool, device=labels.device)
    found = distances.masked_fill(itself, torch.inf).topk(widest, largest=False)
    same = labels[found.indices] == labels[:, None]
    rival = found.values.masked_fill(same, torch.inf).amin(-1, keepdim=True)
    near, same = found.values[:, :count], same[:, :count]
    own = _ratio(near, torch.maximum(rival, near.amax(-1, keepdim=True)))
    within = 1 - masked_mean(masked_mean(own, same), same.any(-1))
    foreign = _ratio(near, torch.where(same, 0, near).amax())
    between = masked_mean(masked_mean(foreign, ~same), (~same).any(-1))
    between = torch.where(same.all(), 1, between)
    agreement = torch.ones_like(within) if few else same.to(near.dtype).mean()
    return ((within + between) / 2 + agreement) / 2


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0 or infinite."""
    usable = (whole > 0) & whole.isfinite()
    return torch.where(usable, part / torch.where(usable, whole, 1), 0)
