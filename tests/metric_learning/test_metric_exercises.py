"""The solutions of the metric-learning lab's exercises against the toolkit, autograd, and loops."""

import math

import pytest
import torch
from torch.nn.functional import triplet_margin_loss

from toolkit import random
from toolkit.exercises import metric_learning as exercises
from toolkit.metric_learning.geometry import uniformity
from toolkit.metric_learning.infonce import nt_xent, sup_con
from toolkit.metric_learning.pairs import pair_weights
from toolkit.metric_learning.retrieval import recall_at_k, retrieval_scores
from toolkit.metric_learning.verification import far_frr, pair_scores

SEEDS = range(5)


def embedded(seed: int, items: int = 20, dim: int = 4, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, some near their class and the last one alone in its class."""
    labels = torch.arange(items) % classes
    labels[-1] = classes
    centres = random.normal(random.key(seed, 0), (classes + 1, dim), torch.float64)
    noise, length = random.normal(random.key(seed, 1), (2, items, dim), torch.float64)
    return (centres[labels] + noise) * length[:, :1].exp(), labels


@pytest.mark.parametrize("seed", SEEDS)
def test_recall_against_the_toolkit(seed) -> None:
    x, y = embedded(seed)
    assert exercises.recall_by_hand(x, y) == pytest.approx(recall_at_k(x, y, (1,)).item(), abs=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_hinge_against_torch(seed) -> None:
    triplets = random.normal(random.key(seed), (20, 3, 4), torch.float64)
    found = [exercises.hinge_of_triplet(a, p, n, 0.5) for a, p, n in triplets]
    oracle = triplet_margin_loss(triplets[:, 0], triplets[:, 1], triplets[:, 2], margin=0.5, eps=0, reduction="none")
    assert found == pytest.approx(oracle.tolist(), abs=1e-12)
    assert 0 < found.count(0) < 20


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_loss_of_anchor_against_the_toolkit(seed, temperature) -> None:
    """Two views of six items as in SimCLR: the mean over the anchors is the batch's loss."""
    x = random.normal(random.key(seed), (12, 4), torch.float64)
    y = torch.arange(6).repeat(2)
    found = [exercises.loss_of_anchor(x, anchor, (anchor + 6) % 12, temperature) for anchor in range(12)]
    for loss in (nt_xent, sup_con):
        assert found == pytest.approx(loss(x, y, temperature).tolist(), rel=1e-9)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_uniformity_against_the_toolkit(seed, scale) -> None:
    x, _ = embedded(seed)
    assert exercises.uniformity_by_hand(x, scale) == pytest.approx(uniformity(x, scale).item(), rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_map_at_r_against_the_toolkit(seed) -> None:
    x, y = embedded(seed)
    scores = retrieval_scores(x, y)
    unit = x / x.norm(dim=1, keepdim=True)
    for query in range(len(y) - 1):
        order = (unit @ unit[query]).argsort(descending=True)
        assert order[0] == query
        found = exercises.map_at_r_of_query((y[order[1:]] == y[query]).double())
        assert found == pytest.approx(scores.map_at_r[query].item(), abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_error_rates_against_the_toolkit(seed) -> None:
    scores, same = pair_scores(*embedded(seed))
    for threshold in (*scores[:10].tolist(), -2.0, 2.0):
        oracle = [rate.item() for rate in far_frr(scores, same, threshold)]
        assert exercises.rates_at_threshold(scores, same, threshold) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_pairs_against_autograd_and_the_weights(seed, temperature) -> None:
    table = random.uniform(random.key(seed), (6, 6), torch.float64) * 2 - 1
    row = table[0, 1:].clone().requires_grad_()
    (torch.logsumexp(row / temperature, 0) - row[2] / temperature).backward()
    assert row.grad is not None
    found = exercises.gradient_of_pairs(table[0, 1:], 2, temperature)
    assert found.tolist() == pytest.approx(row.grad.tolist(), abs=1e-12)
    assert found.sum().item() == pytest.approx(0, abs=1e-12)
    weights = pair_weights(nt_xent, table, torch.tensor([0, 1, 2, 0, 3, 4]), temperature=temperature)
    # nt_xent's mean is over the batch's positive pairs, two of them for six anchors: each anchor counts threefold.
    assert found.abs().tolist() == pytest.approx((weights[0, 1:] / 3).tolist(), abs=1e-12)
    assert found[2] < 0


@pytest.mark.parametrize(("classes", "dim"), [(2, 2), (3, 7), (5, 5), (10, 16)])
def test_simplex_frame_is_one(classes, dim) -> None:
    directions = torch.linalg.qr(random.normal(random.key(classes), (dim, dim), torch.float64)).Q[:classes]
    frame = exercises.simplex_frame(directions)
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    assert torch.allclose(frame @ frame.T, gram, atol=1e-12)
    moved = directions - frame * math.sqrt(1 - 1 / classes)
    assert torch.allclose(moved, moved[:1].expand_as(moved), atol=1e-12)
