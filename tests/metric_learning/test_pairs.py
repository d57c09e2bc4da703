"""Pair losses against pytorch-metric-learning, closed forms of their weights, loops and hand-made batches."""

import math
from typing import Any

import pytest
import torch
from pair_cases import check_against_a_loop, check_bad_batches, check_order_and_precision, sample, value_and_gradient
from pytorch_metric_learning import distances, losses, miners
from torch.func import vmap

from toolkit.metric_learning.common import pair_masks
from toolkit.metric_learning.pairs import (
    circle,
    contrastive,
    energy_confusion,
    kl_hinge,
    lifted,
    multi_similarity,
    pair_weights,
    tcm,
    zero_mean,
)
from toolkit.metric_learning.similarities import cosine, euclidean, precomputed, snr
from toolkit.metric_learning.triplets import n_pair, triplet

# name: (loss of embeddings, labels and one hyper-parameter, two values of it, whether it compares pairs of both kinds)
LOSSES: dict[str, tuple[Any, tuple[float, float], bool]] = {
    "contrastive": (lambda x, y, h: contrastive(x, y, 0.9, h), (0.1, 0.5), False),
    "contrastive, euclidean": (lambda x, y, h: contrastive(x, y, h, 2.5, euclidean), (0.0, 0.5), False),
    "contrastive, SNR": (lambda x, y, h: contrastive(x, y, h, 2.5, snr), (0.0, 0.4), False),
    "tcm": (lambda x, y, h: tcm(x, y, 0.9, 0.2, h, 0.7), (0.5, 2.0), False),
    "lifted": (lambda x, y, h: lifted(x, y, h), (0.5, 1.0), True),
    "lifted, euclidean": (lambda x, y, h: lifted(x, y, h, euclidean), (0.5, 1.0), True),
    "multi_similarity": (lambda x, y, h: multi_similarity(x, y, h, 20.0, 0.4, None), (1.0, 3.0), False),
    "multi_similarity, mined": (lambda x, y, h: multi_similarity(x, y, 2.0, h, 0.4, 0.1), (10.0, 50.0), True),
    "circle": (lambda x, y, h: circle(x, y, 0.3, h), (5.0, 20.0), True),
    "kl_hinge": (kl_hinge, (0.5, 2.0), False),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_vmap_and_vmap_of_grad_are_the_loop(name):
    check_against_a_loop(*LOSSES[name][:2], slopes_are_exact=name != "circle")  # whose weights are constants


@every_loss
def test_order_and_precision(name):
    loss, (_, hyper), _ = LOSSES[name]
    check_order_and_precision(lambda x, y: loss(x, y, hyper))


@every_loss
def test_batches_with_nothing_to_learn(name):
    loss, (_, hyper), comparing = LOSSES[name]
    check_bad_batches(lambda x, y: loss(x, y, hyper), comparing)


def test_regularisers_bear_every_batch_and_vmap():
    check_bad_batches(energy_confusion, comparing=False)
    check_bad_batches(lambda x, y: zero_mean(x), comparing=False)
    check_order_and_precision(energy_confusion)
    one, two = sample(seed=0), sample(seed=1)
    together = vmap(energy_confusion)(torch.stack([one[0], two[0]]), torch.stack([one[1], two[1]]))
    torch.testing.assert_close(together, torch.stack([energy_confusion(*one), energy_confusion(*two)]))
    torch.testing.assert_close(vmap(zero_mean)(torch.stack([one[0], two[0]]))[1], zero_mean(two[0]))


NORMAL = distances.CosineSimilarity()
PLAIN = distances.LpDistance(normalize_embeddings=False)
NOISE = distances.SNRDistance(normalize_embeddings=False)


def mined(miner, loss):
    return lambda x, y: loss(x, y, miner(x, y))


PEERS: dict[str, tuple[Any, Any]] = {
    "contrastive": (
        lambda x, y: contrastive(x, y, 0.9, 0.1),
        losses.ContrastiveLoss(0.9, 0.1, distance=NORMAL),
    ),
    "contrastive, default": (contrastive, losses.ContrastiveLoss(1.0, 0.5, distance=NORMAL)),
    "contrastive, euclidean": (
        lambda x, y: contrastive(x, y, 0.5, 2.5, euclidean),
        losses.ContrastiveLoss(0.5, 2.5, distance=PLAIN),
    ),
    "contrastive, SNR": (
        lambda x, y: contrastive(x, y, 0.1, 1.5, snr),
        losses.SignalToNoiseRatioContrastiveLoss(pos_margin=0.1, neg_margin=1.5, distance=NOISE),
    ),
    "lifted": (
        lambda x, y: lifted(x, y, 1.0, euclidean),
        losses.GeneralizedLiftedStructureLoss(neg_margin=1.0, pos_margin=0.0, distance=PLAIN),
    ),
    "lifted, cosine": (
        lambda x, y: lifted(x, y, 0.8),
        losses.GeneralizedLiftedStructureLoss(neg_margin=0.1, pos_margin=0.9, distance=NORMAL),
    ),
    "multi_similarity": (
        lambda x, y: multi_similarity(x, y, 2.0, 50.0, 0.5, None),
        losses.MultiSimilarityLoss(2, 50, 0.5),
    ),
    "multi_similarity, mined": (
        multi_similarity,
        mined(miners.MultiSimilarityMiner(0.1), losses.MultiSimilarityLoss(2, 50, 0.5)),
    ),
    "multi_similarity, SNR": (
        lambda x, y: multi_similarity(x, y, 1.5, 4.0, 1.2, 0.3, snr),
        mined(
            miners.MultiSimilarityMiner(0.3, distance=NOISE), losses.MultiSimilarityLoss(1.5, 4, 1.2, distance=NOISE)
        ),
    ),
    "circle": (circle, losses.CircleLoss(0.4, 80)),
    "circle, other": (lambda x, y: circle(x, y, 0.25, 8.0), losses.CircleLoss(0.25, 8)),
    "tcm": (tcm, losses.ThresholdConsistentMarginLoss()),
    "tcm, other": (
        lambda x, y: tcm(x, y, 0.8, 0.1, 0.3, 1.7),
        losses.ThresholdConsistentMarginLoss(0.3, 1.7, 0.8, 0.1),
    ),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_is_pytorch_metric_learnings(name, seed):
    ours, peer = PEERS[name]
    embeddings, labels = sample(size=20, classes=6, seed=seed)
    values, gradient = value_and_gradient(ours, embeddings, labels)
    expected, slope = value_and_gradient(lambda x, y: peer(x, y).reshape(1), embeddings, labels)
    assert values.mean() > 1e-3
    torch.testing.assert_close(values.mean(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["contrastive", "multi_similarity", "multi_similarity, mined", "circle", "tcm"])
def test_pytorch_metric_learning_agrees_where_some_anchors_have_no_positives(name):
    ours, peer = PEERS[name]
    embeddings, labels = sample(size=14, classes=4, seed=5)
    labels[:4] = torch.arange(10, 14)
    values, gradient = value_and_gradient(ours, embeddings, labels)
    expected, slope = value_and_gradient(lambda x, y: peer(x, y).reshape(1), embeddings, labels)
    torch.testing.assert_close(values.mean(), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


# Four points: cosines .8 within the first class, 0 within the second; across -1, 0, -.8, .6.
HAND = torch.tensor([[1, 0], [0.8, 0.6], [-1, 0], [0, 1]], dtype=torch.float64), torch.tensor([0, 0, 1, 1])


def test_contrastive_by_hand():
    """Hinges at 1: .2 and 1, each twice, mean .6; at 0: .6 twice (0 does not count). Shares: 4 (.2 / 4), 4 (.6 / 2)."""
    values = contrastive(*HAND, 1.0, 0.0)
    assert values.tolist() == pytest.approx([0.2, 0.2 + 1.2, 1.0, 1.0 + 1.2])
    assert values.mean().item() == pytest.approx(0.6 + 0.6)


def test_tcm_counts_pairs_on_the_margin():
    """At .8 the first class's pairs count with 0: mean of 0, 0, .8, .8; at 0 the pair (0, 3) counts: .6, .6, 0, 0."""
    stretched = torch.tensor([[5, 0], [4, 3], [-1, 0], [0, 1]], dtype=torch.float64)
    table = cosine(stretched)
    assert tcm(stretched, HAND[1], table[0, 1], 0.0).mean().item() == pytest.approx(0.4 + 0.3)
    assert contrastive(stretched, HAND[1], table[0, 1], 0.0).mean().item() == pytest.approx(0.8 + 0.6)
    assert tcm(*HAND, 0.9, 0.5, 2.0, 3.0).mean().item() == pytest.approx(2 * 0.5 + 3 * 0.1)


def test_mining_keeps_pairs_within_epsilon_of_the_hardest():
    """Anchor 1: positive .8, negatives -.8 and .6. ε = .1 keeps none, ε = .3 the positive and the negative .6."""
    assert multi_similarity(*HAND, epsilon=0.1)[1] == 0
    pull, push = math.log1p(math.exp(-2 * 0.3)) / 2, math.log1p(math.exp(50 * 0.1)) / 50
    assert multi_similarity(*HAND, epsilon=0.3)[1].item() == pytest.approx(pull + push)
    every = math.log1p(math.exp(50 * 0.1) + math.exp(50 * -1.3)) / 50
    assert multi_similarity(*HAND, epsilon=None)[1].item() == pytest.approx(pull + every)


@pytest.mark.parametrize("measure", [cosine, euclidean, snr])
@pytest.mark.parametrize("name", ["contrastive", "tcm", "lifted", "multi_similarity", "n_pair", "triplet"])
def test_a_distance_is_minus_a_similarity(name, measure):
    """Margins change their sign with the measure, and nothing else does: a table of similarities gives the same."""
    embeddings, labels = sample()
    sign = -1.0 if measure.far_is_large else 1.0
    options: dict[str, tuple[Any, dict[str, float]]] = {
        "contrastive": (contrastive, {"positive_margin": 0.7, "negative_margin": 0.2}),
        "tcm": (tcm, {"positive_margin": 0.7, "negative_margin": 0.2}),
        "lifted": (lifted, {}),
        "multi_similarity": (multi_similarity, {"base": 0.4}),
        "n_pair": (n_pair, {}),
        "triplet": (triplet, {}),
    }
    loss, margins = options[name]
    there = {key: sign * margin for key, margin in margins.items()}
    values = loss(embeddings, labels, **margins, similarity=measure)
    assert values.max() > 0.1
    torch.testing.assert_close(loss(sign * measure(embeddings), labels, **there, similarity=precomputed), values)


def test_multi_similarity_weights_are_the_closed_form():
    embeddings, labels = sample()
    table = cosine(embeddings)
    positive, negative = pair_masks(labels)
    weights = pair_weights(multi_similarity, table, labels, alpha=2.0, beta=20.0, base=0.4, epsilon=None)
    for i in range(12):
        for j in range(12):
            s = table[i, j]
            if positive[i, j]:
                others = (-2 * (table[i, positive[i]] - s)).exp().sum()
                expected = 1 / ((-2 * (0.4 - s)).exp() + others)
            elif negative[i, j]:
                others = (20 * (table[i, negative[i]] - s)).exp().sum()
                expected = 1 / ((20 * (0.4 - s)).exp() + others)
            else:
                expected = torch.zeros(())
            assert weights[i, j].item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)


def test_weights_of_other_losses_are_closed_forms():
    embeddings, labels = sample()
    table = cosine(embeddings)
    positive, negative = pair_masks(labels)
    pulled, pushed = positive & (table < 0.9), negative & (table > 0.1)
    weights = pair_weights(contrastive, table, labels, positive_margin=0.9, negative_margin=0.1)
    torch.testing.assert_close(weights / 12, pulled.double() / pulled.sum() + pushed.double() / pushed.sum())
    weights = pair_weights(lifted, table, labels)
    soft = [(-table).masked_fill(~positive, -math.inf), table.masked_fill(~negative, -math.inf)]
    torch.testing.assert_close(weights, soft[0].softmax(-1) + soft[1].softmax(-1))
    weights = pair_weights(circle, table, labels, margin=0.25, scale=8.0)
    pull = -8 * (1.25 - table) * (table - 0.75)
    push = 8 * (table + 0.25).clamp_min(0) * (table - 0.25)
    gap = pull.masked_fill(~positive, -math.inf).logsumexp(-1) + push.masked_fill(~negative, -math.inf).logsumexp(-1)
    inner = pull.masked_fill(~positive, -math.inf).softmax(-1) * 8 * (1.25 - table)
    outer = push.masked_fill(~negative, -math.inf).softmax(-1) * 8 * (table + 0.25).clamp_min(0)
    torch.testing.assert_close(weights, gap.sigmoid()[:, None] * (inner + outer))


def test_pair_weights_vmap():
    embeddings, labels = sample()
    tables = torch.stack([cosine(embeddings), 0.5 * cosine(embeddings)])
    together = vmap(lambda table: pair_weights(multi_similarity, table, labels))(tables)
    for member in range(2):
        torch.testing.assert_close(together[member], pair_weights(multi_similarity, tables[member], labels))


def test_kl_hinge_is_the_loop_over_pairs():
    logits, labels = sample(size=9)
    p = (1.5 * logits).softmax(-1)

    def divergence(i, j):
        return sum(a * math.log(a / b) for a, b in zip(p[i].tolist(), p[j].tolist(), strict=True))

    values = kl_hinge(1.5 * logits, labels, 1.5)
    for i in range(9):
        total = 0.0
        for j in set(range(9)) - {i}:
            both = divergence(i, j), divergence(j, i)
            total += sum(both) if labels[i] == labels[j] else sum(max(0, 1.5 - one) for one in both)
        assert values[i].item() == pytest.approx(total / 8, rel=1e-10)


def test_energy_confusion_is_the_log_of_the_loop():
    embeddings, labels = sample()
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i in range(12):
        for j in range(i + 1, 12):
            same = bool(labels[i] == labels[j])
            sums[same] += (embeddings[i] - embeddings[j]).square().sum().item() / 2
            counts[same] += 1
    values, gradient = value_and_gradient(energy_confusion, embeddings, labels)
    energy = sums[True] / counts[True] + sums[False] / counts[False]
    assert values.tolist() == pytest.approx([math.log(energy)] * 12)
    assert (gradient * embeddings).sum().item() == pytest.approx(2)  # log E of s x is log E + 2 log s
    torch.testing.assert_close(energy_confusion(3 * embeddings, labels), values + math.log(9))
    assert energy_confusion(torch.ones(1, 3), torch.tensor([0])).tolist() == [0.0]


def test_zero_mean_is_the_size_of_the_sum():
    assert zero_mean(torch.tensor([[1.0, -3.0, 0.5], [2.0, -1.0, -1.0]])).tolist() == [1.5, 0.0]


def test_descending_pulls_positives_and_pushes_negatives():
    """Signs, for all losses: a positive's similarity should grow, a negative's shrink (energy confusion: all grow)."""
    embeddings, labels = sample()
    table = cosine(embeddings)
    positive, negative = pair_masks(labels)
    for loss in (contrastive, tcm, lifted, multi_similarity, circle, n_pair, triplet):
        gradient = torch.func.grad(lambda s, loss=loss: loss(s, labels, similarity=precomputed).sum())(table)
        assert gradient[positive].max() <= 0 < -gradient[positive].min()
        assert gradient[negative].min() >= 0 < gradient[negative].max()
        assert gradient.diagonal().abs().max() == 0


BAD = {
    "embeddings": lambda x, y: contrastive(x.index_fill(0, torch.tensor([2]), math.nan), y),
    "embeddings ": lambda x, y: energy_confusion(x.index_fill(0, torch.tensor([2]), math.inf), y),
    "embeddings  ": lambda x, y: zero_mean(x / 0),
    "embeddings   ": lambda x, y: multi_similarity(x * math.nan, y),
    "logits": lambda x, y: kl_hinge(x * math.nan, y),
    "similarities": lambda x, y: pair_weights(lifted, x @ x.mT / 0, y),
    "positive_margin": lambda x, y: contrastive(x, y, math.nan),
    "negative_margin": lambda x, y: tcm(x, y, 0.9, math.nan),
    "positive_weight": lambda x, y: tcm(x, y, positive_weight=-1.0),
    "negative_weight": lambda x, y: tcm(x, y, negative_weight=torch.tensor(-1.0)),
    "margin": lambda x, y: lifted(x, y, -0.1),
    "alpha": lambda x, y: multi_similarity(x, y, 0.0),
    "beta": lambda x, y: multi_similarity(x, y, 2.0, -1.0),
    "base": lambda x, y: multi_similarity(x, y, base=math.nan),
    "epsilon": lambda x, y: multi_similarity(x, y, epsilon=-0.1),
    "margin ": lambda x, y: circle(x, y, 1.5),
    "scale": lambda x, y: circle(x, y, 0.4, 0.0),
    "similarity": lambda x, y: circle(x, y, similarity=euclidean),
    "margin  ": lambda x, y: kl_hinge(x, y, -1.0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name.strip()}: expected"):
        BAD[name](*sample())


@pytest.mark.parametrize("loss", [contrastive, tcm, lifted, multi_similarity, circle, kl_hinge, energy_confusion])
def test_labels_of_another_length_are_refused(loss):
    embeddings, labels = sample()
    with pytest.raises(TypeError, match="labels"):
        loss(embeddings, labels[:-1])
