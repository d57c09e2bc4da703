"""Losses that compare a positive with a negative of the same anchor: triplet, N-pair, and triplets of prototypes.

Each returns one value per anchor, ``(batch,)``, and works with every :class:`Measure`: d is a distance, or minus a
similarity. No table is larger than batch². An anchor without positives or without negatives gives 0.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from toolkit.checks import require_labels, require_positive, require_range, typed
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
from toolkit.metric_learning.similarities import Measure, cosine, euclidean
from toolkit.sorting import ascending

__all__ = ["n_pair", "proto_triplet", "triplet"]


@typed
def triplet(
    embeddings: Embeddings,
    labels: Labels,
    margin: Scalar = 0.2,
    kind: Literal["all", "semi-hard", "hard"] = "all",
    similarity: Measure = cosine,
) -> PerAnchor:
    """[d_ap - d_an + m]₊ averaged over the triplets of the batch in which it is above 0; m = ``margin`` ≥ 0.

    ``all``: every triplet, exactly, at the price of sorting each row. ``semi-hard``: with each positive, the nearest
    negative that is farther than it (no triplet if there is none). ``hard``: each anchor's farthest positive and
    nearest negative. With ``similarity=snr`` this is the triplet DSML of Yuan et al. 2019. Sources: Schroff,
    Kalenichenko & Philbin 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering"; Hermans, Beyer &
    Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" (batch hard, there a mean over all
    anchors). Raises ``ValueError`` for embeddings that are not finite or a negative margin.
    """
    require_finite("embeddings", embeddings)
    require_range("margin", margin, 0, math.inf)
    distance = similarity.excess(similarity(embeddings), 0.0)
    positive, negative = pair_masks(labels)
    if kind == "all":
        return _all_triplets(distance, positive, negative, margin)
    if kind == "hard":
        farthest = distance.masked_fill(~positive, -math.inf).amax(-1)
        nearest = distance.masked_fill(~negative, math.inf).amin(-1)
        hinge = torch.where(positive.any(-1) & negative.any(-1), farthest - nearest + margin, 0).relu()
        return shared(hinge, (hinge > 0).sum())
    ordered = distance.masked_fill(~negative, math.inf).sort(-1).values
    place = torch.searchsorted(ordered.detach(), distance.detach(), right=True)
    nearest = ordered.gather(-1, place.clamp_max(len(labels) - 1))
    exists = positive & (place < negative.sum(-1, keepdim=True))
    hinge = torch.where(exists, distance - nearest + margin, 0).relu()
    return shared(hinge.sum(-1), (hinge > 0).sum())


def _all_triplets(distance: Tensor, positive: Tensor, negative: Tensor, margin: Scalar) -> Tensor:
    """The sum of hinges is linear: each distance times the number of violating triplets that it is in, plus margins.

    For a positive that is the number of negatives below its reach d_ap + m, for a negative the number of reaches above
    it: both are places in a sorted row. One pair of tables makes both comparisons, so that rounding cannot part them.
    """
    reach = torch.where(positive, distance + margin, -math.inf).detach()
    bound = torch.where(negative, distance, math.inf).detach()
    below = torch.searchsorted(ascending(bound), reach)
    above = len(distance) - torch.searchsorted(ascending(reach), bound, right=True)
    total = ((below - above).to(distance.dtype) * distance).sum(-1) + margin * below.sum(-1).to(distance.dtype)
    return shared(total, below.sum())


@typed
def n_pair(embeddings: Embeddings, labels: Labels, scale: Scalar = 1.0, similarity: Measure = cosine) -> PerAnchor:
    """log(1 + Σ_N exp(γ (d_ap - d_an))) averaged over the positive pairs (a, p); γ = ``scale`` > 0.

    All the anchor's negatives of the batch are in the sum; Sohn's batches hold two examples of each class, one of which
    serves as negative. His measure is the inner product. With ``similarity=snr`` this is the N-pair DSML of Yuan et al.
    2019. Source: Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", eq. 6. Raises
    ``ValueError`` for embeddings that are not finite or γ ≤ 0.
    """
    require_finite("embeddings", embeddings)
    require_positive("scale", scale)
    distance = scale * similarity.excess(similarity(embeddings), 0.0)
    positive, negative = pair_masks(labels)
    pairs = F.softplus(distance + masked_logsumexp(-distance, negative)[:, None], threshold=40)
    return shared(torch.where(positive, pairs, 0).sum(-1), positive.sum())


@typed
def proto_triplet(
    embeddings: Embeddings,
    labels: Labels,
    prototypes: Float[Tensor, "classes dim"] | None = None,
    margin: Scalar = 0.5,
    similarity: Measure = euclidean,
) -> PerAnchor:
    """[d(x, c_y) - min_{k≠y} d(x, c_k) + m]₊ with class prototypes c; m = ``margin`` ≥ 0. A plain mean over queries.

    ``prototypes`` are the class means of a support set, ``(classes, dim)``; without them they are the class means of
    the batch, an anchor's own class without the anchor. Source: Mendez-Ruiz et al. 2023, "SuSana Distancia is all you
    need: Enforcing class separability in metric learning via two novel distance-based loss functions for few-shot image
    classification", whose code adds 1e-6 under the root of the distance. Raises ``ValueError`` for embeddings or
    prototypes that are not finite, labels that have no prototype, or a negative margin.
    """
    require_finite("embeddings", embeddings)
    require_range("margin", margin, 0, math.inf)
    if prototypes is None:
        same = labels[:, None] == labels
        count = same.sum(-1, keepdim=True)
        totals = same.to(embeddings.dtype) @ embeddings
        others = (totals - embeddings) / (count - 1).clamp_min(1)
        own = similarity.excess(similarity(embeddings, others), 0.0).diagonal()
        distance = similarity.excess(similarity(embeddings, totals / count), 0.0)
        defined = (count[:, 0] > 1) & ~same.all(-1)
    else:
        require_finite("prototypes", prototypes)
        require_labels("labels", labels, len(prototypes))
        same = labels[:, None] == torch.arange(len(prototypes), device=labels.device)
        distance = similarity.excess(similarity(embeddings, prototypes), 0.0)
        own = torch.where(same, distance, 0).sum(-1)
        defined = ~same.all(-1)
    nearest = distance.masked_fill(same, math.inf).amin(-1)
    return torch.where(defined, own - nearest + margin, 0).relu()
