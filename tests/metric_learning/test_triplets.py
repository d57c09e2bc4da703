"""Triplet losses against pytorch-metric-learning, loops over all triplets, and points on a line."""

import math
from typing import Any

import pytest
import torch
from pair_cases import check_against_a_loop, check_bad_batches, check_order_and_precision, sample, value_and_gradient
from pytorch_metric_learning import distances, losses, miners

from toolkit.metric_learning.common import pair_masks
from toolkit.metric_learning.similarities import cosine, euclidean, precomputed, snr, squared_euclidean
from toolkit.metric_learning.triplets import n_pair, proto_triplet, triplet

CENTRES = torch.randn(4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
LOSSES: dict[str, tuple[Any, tuple[float, float]]] = {
    "all": (lambda x, y, h: triplet(x, y, h), (0.1, 0.3)),
    "all, SNR": (lambda x, y, h: triplet(x, y, h, "all", snr), (0.1, 0.5)),
    "semi-hard": (lambda x, y, h: triplet(x, y, h, "semi-hard"), (0.1, 0.3)),
    "hard": (lambda x, y, h: triplet(x, y, h, "hard", euclidean), (0.1, 0.3)),
    "n_pair": (n_pair, (1.0, 8.0)),
    "n_pair, SNR": (lambda x, y, h: n_pair(x, y, h, snr), (0.5, 1.0)),
    "proto_triplet": (lambda x, y, h: proto_triplet(x, y, None, h), (0.2, 0.5)),
    "prototypes": (lambda x, y, h: proto_triplet(x, y, CENTRES.to(x.dtype), h), (0.2, 0.5)),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    check_against_a_loop(*LOSSES[name])


@every_loss
def test_order_and_precision(name):
    loss, (_, hyper) = LOSSES[name]
    check_order_and_precision(lambda x, y: loss(x, y, hyper))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "prototypes"])
@pytest.mark.parametrize("measure", [cosine, euclidean, squared_euclidean, snr])
def test_batches_with_nothing_to_learn(name, measure):
    if name == "proto_triplet":
        check_bad_batches(lambda x, y: proto_triplet(x, y, similarity=measure))
    elif name.startswith("n_pair"):
        check_bad_batches(lambda x, y: n_pair(x, y, similarity=measure))
    else:
        kind: Any = name.partition(",")[0]
        check_bad_batches(lambda x, y: triplet(x, y, 0.2, kind, measure))


MEASURES = {
    "cosine": (cosine, distances.CosineSimilarity()),
    "euclidean": (euclidean, distances.LpDistance(normalize_embeddings=False)),
    "snr": (snr, distances.SNRDistance(normalize_embeddings=False)),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["all", "hard"])
def test_the_mean_is_pytorch_metric_learnings(kind, measure, seed):
    ours, theirs = MEASURES[measure]
    embeddings, labels = sample(size=20, classes=6, seed=seed)
    peer = losses.TripletMarginLoss(margin=0.3, distance=theirs)
    miner = miners.BatchHardMiner(distance=theirs) if kind == "hard" else lambda x, y: None
    values, gradient = value_and_gradient(lambda x, y: triplet(x, y, 0.3, kind, ours), embeddings, labels)
    expected, slope = value_and_gradient(lambda x, y: peer(x, y, miner(x, y)).reshape(1), embeddings, labels)
    assert values.mean() > 0.1
    torch.testing.assert_close(values.mean(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


def test_all_triplets_of_a_larger_uneven_batch_in_float32():
    embeddings, labels = sample(size=90, dim=16, classes=9, dtype=torch.float32)
    labels = torch.where(labels < 3, 0, labels)
    peer = losses.TripletMarginLoss(margin=0.2, distance=distances.CosineSimilarity())
    values, gradient = value_and_gradient(triplet, embeddings, labels)
    expected, slope = value_and_gradient(lambda x, y: peer(x, y).reshape(1), embeddings, labels)
    torch.testing.assert_close(values.mean(), expected[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)


def loop(table, labels, margin, kind):
    """Hinges of each anchor's triplets, from a table of distances."""
    size, hinges = len(labels), []
    for a in range(size):
        near = [table[a][p] for p in range(size) if p != a and labels[p] == labels[a]]
        far = [table[a][n] for n in range(size) if labels[n] != labels[a]]
        if kind == "all":
            one = [d - e + margin for d in near for e in far]
        elif kind == "hard":
            one = [max(near) - min(far) + margin]
        else:
            one = [d - min(e for e in far if e > d) + margin for d in near if max(far) > d]
        hinges.append([hinge for hinge in one if hinge > 0])
    return hinges


@pytest.mark.parametrize("kind", ["all", "semi-hard", "hard"])
@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_each_anchor_has_its_share_of_the_violating_triplets(kind, margin):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randint(8, (12, 12), generator=generator) / 4.0  # many ties
        labels = sample(seed=seed)[1]
        hinges = loop(table.tolist(), labels.tolist(), margin, kind)
        count = max(1, sum(map(len, hinges)))
        values = triplet(-table, labels, margin, kind, precomputed)
        assert values.tolist() == pytest.approx([12 * sum(one) / count for one in hinges], rel=1e-6, abs=1e-7)


def test_all_triplets_weights_are_counts_of_violations():
    table = torch.randint(8, (12, 12), generator=torch.Generator().manual_seed(3)) / 4.0
    labels = sample(seed=3)[1]
    positive, negative = pair_masks(labels)
    violates = positive[:, :, None] & negative[:, None, :] & (table[:, :, None] + 0.5 > table[:, None, :])
    expected = (violates.sum(2) - violates.sum(1)) / violates.sum()
    gradient = torch.func.grad(lambda s: triplet(s, labels, 0.5, similarity=precomputed).mean())(-table)
    torch.testing.assert_close(-gradient, expected)


def test_triplets_on_a_line():
    """Points 0, 1 | 1.2, 4, margin .5. Distances, d⁺ | d⁻: 1 | 1.2, 4; 1 | .2, 3; 2.8 | 1.2, .2; 2.8 | 4, 3."""
    x, y = torch.tensor([[0.0], [1.0], [1.2], [4.0]]), torch.tensor([0, 0, 1, 1])
    share = 4 / 5  # hinges .3 | 1.3 | 2.1, 3.1 | .3
    assert triplet(x, y, 0.5, "all", euclidean).tolist() == pytest.approx(
        [0.3 * share, 1.3 * share, 5.2 * share, 0.3 * share], rel=1e-5
    )
    # nearest farther negatives: 1.2 | 3 | none | 3, hinges .3 | 0 | none | .3
    assert triplet(x, y, 0.5, "semi-hard", euclidean).tolist() == pytest.approx([0.6, 0, 0, 0.6], rel=1e-5)
    assert triplet(x, y, 0.5, "hard", euclidean).tolist() == pytest.approx([0.3, 1.3, 3.1, 0.3], rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_n_pair_is_the_tuplet_loss_without_margin(scale):
    embeddings, labels = sample(size=20, classes=6)
    peer = losses.TupletMarginLoss(margin=0.0, scale=scale)
    values, gradient = value_and_gradient(lambda x, y: n_pair(x, y, scale), embeddings, labels)
    expected, slope = value_and_gradient(lambda x, y: peer(x, y).mean().reshape(1), embeddings, labels)
    torch.testing.assert_close(values.mean(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


def test_n_pair_with_one_positive_is_cross_entropy():
    """Two examples of each class: -log softmax of the positive among it and the negatives, by a loop; SNR distances."""
    embeddings, labels = sample(size=10, classes=5)
    values, table = n_pair(embeddings, labels, 1.0, snr), snr(embeddings)
    for a in range(10):
        scores = [(-table[a, j]).exp().item() for j in range(10) if j != a]
        partner = next(j for j in range(10) if j != a and labels[j] == labels[a])
        assert values[a].item() == pytest.approx(-math.log((-table[a, partner]).exp().item() / sum(scores)))


@pytest.mark.parametrize("measure", [euclidean, cosine, snr])
def test_proto_triplet_is_the_loop_over_classes(measure):
    embeddings, labels = sample(classes=3)
    sign = 1 if measure.far_is_large else -1

    def distance(x, y):
        return sign * measure(x[None], y[None]).item()

    values = proto_triplet(embeddings, labels, None, 0.7, measure)
    fixed = proto_triplet(embeddings, labels, CENTRES[:3], 0.7, measure)
    for a in range(12):
        means = [embeddings[(labels == k) & (torch.arange(12) != a)].mean(0) for k in range(3)]
        for prototypes, value in ((means, values[a]), (CENTRES[:3], fixed[a])):
            each = [distance(embeddings[a], prototype) for prototype in prototypes]
            own = each.pop(int(labels[a]))
            assert value.item() == pytest.approx(max(0, own - min(each) + 0.7), abs=1e-10)
    assert values.max() > 0.1


BAD = {
    "embeddings": lambda x, y: triplet(x.index_fill(0, torch.tensor([2]), math.nan), y),
    "embeddings ": lambda x, y: n_pair(x / 0, y),
    "embeddings  ": lambda x, y: proto_triplet(x / 0, y),
    "prototypes": lambda x, y: proto_triplet(x, y, CENTRES / 0),
    "labels": lambda x, y: proto_triplet(x, y, CENTRES[:3]),
    "margin": lambda x, y: triplet(x, y, -0.1),
    "margin ": lambda x, y: proto_triplet(x, y, margin=-0.1),
    "scale": lambda x, y: n_pair(x, y, 0.0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name.strip()}: expected"):
        BAD[name](*sample())


@pytest.mark.parametrize("loss", [triplet, n_pair, proto_triplet])
def test_labels_of_another_length_and_unknown_kinds_are_refused(loss):
    embeddings, labels = sample()
    with pytest.raises(TypeError, match="labels"):
        loss(embeddings, labels[:-1])
    unknown: Any = "easy"
    with pytest.raises(TypeError, match="easy"):
        triplet(embeddings, labels, 0.2, unknown)
