"""Neighbour measures against hand-ranked tables, loops, and pytorch-metric-learning's calculator."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import KMeans
from sklearn.metrics import mutual_info_score
from torch.func import vmap

from toolkit.metric_learning import retrieval
from toolkit.metric_learning.retrieval import (
    clustering_agreement,
    map_at_r,
    precision_at_1,
    r_precision,
    recall_at_k,
    retrieval_scores,
)
from toolkit.metric_learning.similarities import cosine, euclidean, precomputed, snr, squared_euclidean


def cloud(items=90, classes=7, dim=5, seed=0, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (items,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(items, dim, generator=generator, dtype=torch.float64)
    return (centres[labels] + spread * noise).to(dtype), labels


def one_by_one(table, labels, reference_labels, ks, alone):
    """Per query: recalls, precision@1, R-precision, MAP@R and whether it counts; ``table`` larger is nearer."""
    out = []
    for q in range(len(labels)):
        ranked = sorted((j for j in range(len(reference_labels)) if not (alone and j == q)), key=lambda j: -table[q, j])
        hits = [int(reference_labels[j] == labels[q]) for j in ranked]
        size = sum(hits)
        if not size:
            out.append([0.0] * (len(ks) + 3) + [0.0])
            continue
        average = sum(sum(hits[: i + 1]) / (i + 1) for i in range(size) if hits[i]) / size
        out.append([*(float(any(hits[:k])) for k in ks), hits[0], sum(hits[:size]) / size, average, 1.0])
    return torch.tensor(out, dtype=torch.float64).T


def stacked(scores):
    return torch.cat([scores.recall, torch.stack(scores[1:4]), scores.counted[None].to(scores.recall.dtype)])


def test_a_ranking_by_hand():
    # Similarity to item 0 falls in the order 1, 2, 3, 4, 5; its class is {0, 1, 3, 5}, so R = 3: hit, miss, hit.
    table = torch.zeros(6, 6)
    table[0] = torch.tensor([9.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    labels = torch.tensor([0, 0, 1, 0, 2, 0])
    scores = retrieval_scores(table, labels, (1, 2), similarity=precomputed)
    assert scores.recall[:, 0].tolist() == [1, 1]
    assert scores.precision_at_1[0] == 1
    assert scores.r_precision[0] == pytest.approx(2 / 3)
    assert scores.map_at_r[0] == pytest.approx((1 + 2 / 3) / 3)
    assert scores.counted.tolist() == [True, True, False, True, False, True]
    assert stacked(scores)[:, ~scores.counted].abs().max() == 0


@pytest.mark.parametrize("similarity", [cosine, euclidean, squared_euclidean, snr, precomputed])
@pytest.mark.parametrize("block", [7 * 90, 1 << 21])
def test_loop_over_queries(similarity, block, monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    x, labels = cloud()
    labels[3] = 99  # alone in its class
    ks = (1, 3, 10)
    table = cosine(x) if similarity is precomputed else similarity(x)
    near = -table if similarity.far_is_large else table
    scores = retrieval_scores(table if similarity is precomputed else x, labels, ks, similarity=similarity)
    torch.testing.assert_close(stacked(scores), one_by_one(near, labels, labels, ks, True), rtol=1e-12, atol=1e-12)
    assert 0.05 < scores.map_at_r.mean() < 0.9


@pytest.mark.parametrize("similarity", [cosine, euclidean])
@pytest.mark.parametrize(("references", "classes"), [(400, 100), (403, 130), (60, 3)])
def test_references_of_their_own(similarity, references, classes, monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", 11 * references)
    x, labels = cloud(40, classes + 3)
    y, known = cloud(references, classes, seed=1)
    table = similarity(x, y) * (-1 if similarity.far_is_large else 1)
    scores = retrieval_scores(x, labels, (1, 5), y, known, similarity)
    torch.testing.assert_close(stacked(scores), one_by_one(table, labels, known, (1, 5), False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 8, 50, 401])
@pytest.mark.parametrize("largest", [True, False])
def test_candidates_hold_the_best(columns, largest):
    table = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    for count in {1, min(3, columns), min(40, columns), columns}:
        candidates = retrieval._candidates(table, count, largest)
        assert all(len(set(row)) == len(row) for row in candidates.tolist())
        best = table.topk(count, largest=largest).values
        assert torch.equal(table.gather(1, candidates).topk(count, largest=largest).values, best)


@pytest.mark.parametrize("classes", [4, 60])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_peer_library(classes, distance):
    x, labels = cloud(400, classes, 8, dtype=torch.float32)
    labels[:2] = torch.tensor([1000, 2000])
    knn = CustomKNN(CosineSimilarity() if distance == "cosine" else LpDistance(normalize_embeddings=False))
    calculator = AccuracyCalculator(
        exclude=("NMI", "AMI"), k="max_bin_count", device=torch.device("cpu"), knn_func=knn, kmeans_func=lambda x, k: k
    )
    peer = calculator.get_accuracy(x, labels)
    kind = {"cosine": cosine, "euclidean": euclidean}[distance]
    assert float(map_at_r(x, labels, kind)) == pytest.approx(peer["mean_average_precision_at_r"], abs=1e-6)
    assert float(r_precision(x, labels, kind)) == pytest.approx(peer["r_precision"], abs=1e-6)
    assert float(precision_at_1(x, labels, kind)) == pytest.approx(peer["precision_at_1"], abs=1e-6)
    assert map_at_r(x, labels).dtype == torch.float32


def test_means_leave_out_queries_that_cannot_succeed():
    x, labels = cloud(30, 3)
    labels[:5] = torch.arange(100, 105)
    scores = retrieval_scores(x, labels, (1, 4))
    kept = scores.counted
    assert kept.sum() == 25
    torch.testing.assert_close(recall_at_k(x, labels, (1, 4)), scores.recall[:, kept].mean(1))
    torch.testing.assert_close(precision_at_1(x, labels), scores.precision_at_1[kept].mean())
    torch.testing.assert_close(r_precision(x, labels), scores.r_precision[kept].mean())
    torch.testing.assert_close(map_at_r(x, labels), scores.map_at_r[kept].mean())
    assert recall_at_k(x, labels, (1,))[0] == precision_at_1(x, labels)
    assert recall_at_k(x, labels, (1000,))[0] == 1
    assert map_at_r(x, labels) < r_precision(x, labels)


def test_separated_classes_are_perfect_and_rescaling_changes_nothing():
    x, labels = cloud(50, 5, spread=1e-3)
    assert map_at_r(x, labels) == 1
    x, labels = cloud(50, 5)
    lengths = torch.rand(50, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(map_at_r(lengths * x, labels), map_at_r(x, labels))
    assert (map_at_r(lengths * x, labels, euclidean) - map_at_r(x, labels, euclidean)).abs() > 1e-3


def test_members_of_a_fleet_under_vmap(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", 20 * 60)
    x = torch.stack([cloud(60, 5, seed=seed)[0] for seed in range(3)])
    labels = torch.stack([cloud(60, 5, seed=seed)[1] for seed in range(3)])
    together = vmap(lambda e: retrieval_scores(e, labels[0], (1, 2)))(x)
    own = vmap(lambda e, y: retrieval_scores(e, y, (1, 2)))(x, labels)
    means = vmap(map_at_r)(x, labels)
    for member in range(3):
        for result, truth in ((together, labels[0]), (own, labels[member])):
            expected = retrieval_scores(x[member], truth, (1, 2))
            for one, two in zip(result, expected, strict=True):
                torch.testing.assert_close(one[member], two)
        torch.testing.assert_close(means[member], map_at_r(x[member], labels[member]))


def test_small_and_bad_batches():
    x, labels = cloud(6, 2)
    alone = retrieval_scores(x[:1], labels[:1])
    assert stacked(alone).abs().max() == 0
    assert retrieval_scores(x[:0], labels[:0], (1, 2)).recall.shape == (2, 0)
    one_class = torch.zeros(6, dtype=torch.long)
    assert map_at_r(x, one_class) == 1
    assert retrieval_scores(torch.zeros_like(x), labels).map_at_r.isfinite().all()
    for function in (map_at_r, r_precision, precision_at_1, recall_at_k):
        with pytest.raises(ValueError, match="labels: expected a query that shares"):
            function(x, torch.arange(6))
        with pytest.raises(ValueError, match="embeddings: expected finite"):
            function(x.index_fill(0, torch.tensor([2]), math.nan), labels)
        with pytest.raises(Exception, match="labels"):
            function(x, labels[:4])
    with pytest.raises(ValueError, match="references: expected finite"):
        retrieval_scores(x, labels, (1,), x / 0, labels)
    with pytest.raises(ValueError, match="references: expected together"):
        retrieval_scores(x, labels, (1,), x)
    with pytest.raises(ValueError, match="ks: expected"):
        recall_at_k(x, labels, (0, 1))


def test_clustering_agreement():
    x, labels = cloud(120, 4, spread=0.8)
    result = clustering_agreement(3 * x, labels + 10, seed=3)
    sphere = (x / x.norm(dim=1, keepdim=True)).numpy()
    clusters = KMeans(4, n_init=1, random_state=3).fit_predict(sphere)

    def entropy(values):
        share = torch.as_tensor(values).unique(return_counts=True)[1].double() / len(values)
        return float(-(share * share.log()).sum())

    shared = mutual_info_score(labels.numpy(), clusters)
    assert result.nmi == pytest.approx(2 * shared / (entropy(labels) + entropy(clusters)), rel=1e-9)
    assert 0.1 < result.ami < result.nmi < 0.95
    assert clustering_agreement(3 * x, labels, seed=3) == result
    apart = clustering_agreement(torch.eye(4).repeat(10, 1), torch.arange(4).repeat(10))
    assert apart == pytest.approx((1, 1))
    with pytest.raises(ValueError, match="embeddings: expected finite"):
        clustering_agreement(x / 0, labels)
    with pytest.raises(ValueError, match="at least one item"):
        clustering_agreement(x[:0], labels[:0])
