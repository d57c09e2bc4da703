"""How well the nearest neighbours of an embedding know its class: Recall@K, R-precision, MAP@R and clusterings.

All four neighbour measures come from one pass over the similarity table, a few rows at a time:
:func:`retrieval_scores` gives them per query, for paired comparisons; the functions named after a measure give means.
For a fleet's embeddings ``(members, items, dim)`` call them member by member, or under ``vmap`` with the labels shared.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from toolkit.checks import readable, typed
from toolkit.metric_learning.common import masked_mean, require_finite
from toolkit.metric_learning.similarities import Measure, cosine, normalise, precomputed

__all__ = [
    "ClusteringAgreement",
    "RetrievalScores",
    "clustering_agreement",
    "map_at_r",
    "precision_at_1",
    "r_precision",
    "recall_at_k",
    "retrieval_scores",
]

_BLOCK = 1 << 21  # similarities that are looked at together: what a core's cache holds


class RetrievalScores(NamedTuple):
    """One value per query, in [0, 1]; 0 where ``counted`` is false (nothing of the query's class could be found)."""

    recall: Float[Tensor, "ks queries"]
    precision_at_1: Float[Tensor, "queries"]
    r_precision: Float[Tensor, "queries"]
    map_at_r: Float[Tensor, "queries"]
    counted: Bool[Tensor, "queries"]


class ClusteringAgreement(NamedTuple):
    """Agreement of k-means clusters with the classes; 1 for the same partition."""

    nmi: float
    ami: float


@typed
def retrieval_scores(
    embeddings: Float[Tensor, "queries dim"],
    labels: Int[Tensor, "queries"],
    ks: Sequence[int] = (1, 2, 4, 8),
    references: Float[Tensor, "references dim"] | None = None,
    reference_labels: Int[Tensor, "references"] | None = None,
    similarity: Measure = cosine,
) -> RetrievalScores:
    """Recall@K for each of ``ks``, precision@1, R-precision and MAP@R of every query, in one pass.

    The references are ranked by ``similarity`` to the query; without ``references`` they are all the other embeddings.
    With R the number of references of the query's class and P(i) the share of that class among the first i:

    - Recall@K: 1 if one of the first K is of the class, else 0; precision@1 is Recall@1;
    - R-precision: P(R);
    - MAP@R: (1/R) Σ_{i ≤ R} P(i) · [the i-th is of the class].

    A query with R = 0 is left out: its values are 0 and ``counted`` is false. Exact: only the largest of the class
    sizes and ``ks`` neighbours are sorted, and only a few million similarities are held at a time. Equally similar
    references come in the order in which ``torch.topk`` leaves them. With ``similarity=precomputed`` the embeddings are
    the table itself. Under ``vmap`` with labels of each member's own, whole rows are sorted.

    Raises ``ValueError`` for a K below 1, embeddings that are not finite, and only one of the two reference arguments.
    Source: Musgrave, Belongie & Lim 2020, "A Metric Learning Reality Check", section 3.2; Jégou et al. 2011 (Recall@K).
    """
    if (references is None) != (reference_labels is None):
        raise ValueError("references: expected together with reference_labels, got one of the two")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks: expected numbers of neighbours from 1, got {tuple(ks)}")
    require_finite("embeddings", embeddings)
    alone = references is None or reference_labels is None
    if references is None or reference_labels is None:
        references, reference_labels = embeddings, labels
    else:
        require_finite("references", references)
    if similarity is cosine:  # lengths are taken once, not once for each block of rows
        embeddings, references, similarity = normalise(embeddings), normalise(references), Measure(_dot, False)
    total = len(reference_labels)
    ordered = reference_labels.sort().values
    relevant = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels) - int(alone)
    deepest = int(relevant.max()) if readable(relevant) and len(labels) else total
    depth = max(0, min(max(deepest, *ks, 1), total - int(alone)))
    positions = torch.arange(1, depth + 1, device=labels.device)
    rows = max(1, _BLOCK // max(total, 1))
    scores = embeddings.new_zeros(len(ks) + 3, len(labels))
    for start in range(0, len(labels), rows):
        block, own = embeddings[start : start + rows], labels[start : start + rows, None]
        table = block if similarity is precomputed else similarity(block, references)
        candidates = _candidates(table, depth + int(alone), not similarity.far_is_large)
        values = table.gather(1, candidates)
        if alone:  # nobody finds himself
            itself = candidates == torch.arange(start, start + len(block), device=labels.device)[:, None]
            values = values.masked_fill(itself, math.inf if similarity.far_is_large else -math.inf)
        order = values.topk(depth, largest=not similarity.far_is_large).indices
        nearest = candidates.gather(1, order)
        hits = (reference_labels[nearest] == own).double()
        size = relevant[start : start + rows, None]
        within = torch.where(positions <= size, hits, 0)
        precision = within.cumsum(1) / positions
        found = torch.stack([hits[:, :k].sum(1) > 0 for k in (*ks, 1)])
        ratios = torch.stack([within.sum(1), (precision * within).sum(1)]) / size[:, 0].clamp_min(1)
        # Into one table at once: many small results kept between the large ones would break up the memory.
        part = torch.cat([found.to(scores.dtype), ratios.to(scores.dtype)])
        scores = torch.slice_scatter(scores, part, 1, start, start + len(block))
    first, precise, average = scores[len(ks) :].unbind()
    return RetrievalScores(scores[: len(ks)], first, precise, average, relevant > 0)


def _candidates(table: Tensor, count: int, largest: bool) -> Tensor:
    """Columns among which the ``count`` best of each row are, in no order: ``(rows, at least count)``.

    The columns are laid into groups, of which those with the ``count`` best heads must hold them all: two short sorts
    in place of a long one.
    """
    columns = table.shape[1]
    group = math.isqrt(columns // max(count, 1))
    if group < 3:
        return table.topk(count, largest=largest, sorted=False).indices
    groups = columns // group
    laid = table[:, : groups * group].unflatten(1, (group, groups))
    best = (laid.amax(1) if largest else laid.amin(1)).topk(count, largest=largest, sorted=False).indices
    inside = best[:, None] + groups * torch.arange(group, device=table.device)[:, None]
    rest = torch.arange(groups * group, columns, device=table.device).expand(len(table), -1)
    return torch.cat([inside.flatten(1), rest], 1)


def _dot(x: Float[Tensor, "rows dim"], y: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    return x @ y.mT


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted queries."""
    if readable(counted) and not bool(counted.any()):
        raise ValueError("labels: expected a query that shares its class with a reference, got none")
    return masked_mean(values, counted)


@typed
def recall_at_k(
    embeddings: Float[Tensor, "queries dim"],
    labels: Int[Tensor, "queries"],
    ks: Sequence[int] = (1, 2, 4, 8),
    similarity: Measure = cosine,
) -> Float[Tensor, "ks"]:
    """Recall@K for each K of ``ks``: the share of queries with one of their class among their K nearest others.

    Means of :func:`retrieval_scores` over the queries that can succeed, and its errors; ``ValueError`` if none can.
    """
    scores = retrieval_scores(embeddings, labels, ks, similarity=similarity)
    return _mean(scores.recall, scores.counted)


@typed
def precision_at_1(
    embeddings: Float[Tensor, "queries dim"], labels: Int[Tensor, "queries"], similarity: Measure = cosine
) -> Float[Tensor, ""]:
    """Precision@1: the share of queries whose nearest other is of their class. Errors as :func:`recall_at_k`."""
    scores = retrieval_scores(embeddings, labels, (), similarity=similarity)
    return _mean(scores.precision_at_1, scores.counted)


@typed
def r_precision(
    embeddings: Float[Tensor, "queries dim"], labels: Int[Tensor, "queries"], similarity: Measure = cosine
) -> Float[Tensor, ""]:
    """R-precision: the share of a query's class among its R nearest others, R the size of the class without it.

    Mean of :func:`retrieval_scores`; errors as :func:`recall_at_k`.
    """
    scores = retrieval_scores(embeddings, labels, (), similarity=similarity)
    return _mean(scores.r_precision, scores.counted)


@typed
def map_at_r(
    embeddings: Float[Tensor, "queries dim"], labels: Int[Tensor, "queries"], similarity: Measure = cosine
) -> Float[Tensor, ""]:
    """Mean average precision at R: (1/R) Σ_{i ≤ R} P(i) [the i-th nearest other is of the query's class].

    Mean of :func:`retrieval_scores`; errors as :func:`recall_at_k`. Never above :func:`r_precision`: it also asks that
    the hits come first. Source: Musgrave, Belongie & Lim 2020, "A Metric Learning Reality Check", section 3.2.
    """
    scores = retrieval_scores(embeddings, labels, (), similarity=similarity)
    return _mean(scores.map_at_r, scores.counted)


@typed
def clustering_agreement(
    embeddings: Float[Tensor, "items dim"], labels: Int[Tensor, "items"], seed: int = 0
) -> ClusteringAgreement:
    """Normalised and adjusted mutual information between the classes and as many k-means clusters.

    Rows are scaled to length 1, then clustered by scikit-learn's ``KMeans`` (one k-means++ start from ``seed``).
    NMI = 2 I(classes; clusters) / (H(classes) + H(clusters)) grows with the number of clusters even for random ones;
    AMI subtracts what chance gives, so 0 is chance. Raises ``ValueError`` for no items and embeddings that are not
    finite. Source: Vinh, Epps & Bailey 2010, "Information Theoretic Measures for Clusterings Comparison".
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    if not len(labels):
        raise ValueError("embeddings: expected at least one item, got none")
    require_finite("embeddings", embeddings)
    points, truth = normalise(embeddings).detach().cpu().numpy(), labels.cpu().numpy()
    clusters = KMeans(len(labels.unique()), n_init=1, random_state=seed).fit_predict(points)
    return ClusteringAgreement(
        float(normalized_mutual_info_score(truth, clusters)), float(adjusted_mutual_info_score(truth, clusters))
    )
