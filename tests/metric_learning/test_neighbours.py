"""The ICNN score against a loop over neighbours, by hand, and as a loss."""

import math

import pytest
import torch
from torch.func import grad, vmap

from toolkit.metric_learning.neighbours import icnn, icnn_score
from toolkit.metric_learning.similarities import Measure, cosine, euclidean, precomputed, snr


def sample(size=14, seed=0, spread=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    noise = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    return (2 * torch.eye(3, dtype=torch.float64)[labels] + spread * noise).to(dtype), labels


def given_table(x, y):
    return x


as_distance = Measure(given_table, far_is_large=True)


def by_loop(x, labels, neighbours=4, reach=None):
    """J written from its definition, one example at a time; differentiable."""
    size = len(x)
    few = neighbours + 2 >= size
    k = size - 2 if few else neighbours
    reach = k + 1 if reach is None else reach
    rows = []
    for i in range(size):
        others = sorted(((x[i] - x[j]).norm(), int(labels[j] == labels[i])) for j in range(size) if j != i)[:reach]
        rivals = [d for d, same in others if not same]
        rows.append((others[:k], rivals[0] if rivals else None))
    within, between, shares = [], [], []
    farthest = [d for near, _ in rows for d, same in near if not same]
    for near, rival in rows:
        own = [d for d, same in near if same]
        if own and rival is None:
            within.append(torch.zeros(()))
        elif own:
            ratios = [d / rival for d, _ in near]
            top = max(1.0, *ratios)
            within.append(sum(d / rival / top for d in own) / len(own))
        foreign = [d for d, same in near if not same]
        if foreign:
            between.append(sum(d / max(farthest) for d in foreign) / len(foreign))
        shares.append(len(own) / k)
    a = 1 - sum(within) / max(1, len(within))
    b = sum(between) / len(between) if between else 1.0
    gamma = 1.0 if few else sum(shares) / size
    return ((a + b) / 2 + gamma) / 2


@pytest.mark.parametrize(
    ("size", "neighbours", "reach"), [(14, 4, None), (14, 2, 9), (14, 5, 5), (6, 4, None), (3, 4, 8)]
)
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_score_and_gradient_are_the_loop(size, neighbours, reach, spread):
    x, labels = sample(size, 1, spread)
    x.requires_grad_()
    score, expected = (
        icnn_score(x, labels, neighbours, reach),
        by_loop(x, labels, neighbours, reach and min(reach, size - 1)),
    )
    assert score.item() == pytest.approx(expected.item(), rel=1e-12)
    (slope,) = torch.autograd.grad(score, x)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, x)[0], rtol=1e-9, atol=1e-12)
    assert slope.abs().max() > 1e-4
    loss = icnn(x, labels, neighbours, reach)
    torch.testing.assert_close(loss, -score.log().expand(size))
    torch.testing.assert_close(torch.autograd.grad(loss.mean(), x)[0], -slope / score.detach())


def test_score_by_hand():
    """On a line, k = 1: 0 and 1 are of one class, 3 and 7 of the other, 16 of neither."""
    x = torch.tensor([0.0, 1.0, 3.0, 7.0, 16.0], dtype=torch.float64)[:, None]
    labels = torch.tensor([0, 0, 1, 1, 2])
    # nearest: 1 (own), 0 (own), 1 (other), 3 (own), 7 (other); nearest of another class among two: 3, 2, -, 6, -
    within = 1 - (1 / 3 + 1 / 2 + 4 / 6) / 3
    between = (2 / 9 + 9 / 9) / 2
    expected = ((within + between) / 2 + 3 / 5) / 2
    assert icnn_score(x, labels, 1).item() == pytest.approx(expected, rel=1e-12)
    assert icnn(x, labels, 1).tolist() == pytest.approx([-math.log(expected)] * 5)


def test_best_and_worst():
    """Classes that have collapsed onto distant points score 1; neighbours of other classes only score at most 1/2."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(6)
    tight = 10 * torch.eye(3, dtype=torch.float64)[labels] + 1e-9 * torch.randn(
        18, 3, generator=generator, dtype=torch.float64
    )
    assert icnn_score(tight, labels, 4, 8).item() == pytest.approx(1, abs=1e-8)
    assert icnn(tight, labels, 4, 8).abs().max() < 1e-7
    place = torch.arange(18, dtype=torch.float64)[:, None]
    assert icnn_score(place, torch.arange(18)).item() < 0.5 + 1e-12
    assert icnn_score(place, torch.arange(18)).item() > 0.25


def test_size_rotation_and_order_do_not_matter():
    x, labels = sample()
    score = icnn_score(x, labels)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    rows = torch.randperm(14, generator=generator)
    for other, given in ((37 * x, labels), (x @ turn + 5, labels), (x[rows], labels[rows]), (x, (labels + 1) % 3)):
        torch.testing.assert_close(icnn_score(other, given), score)


@pytest.mark.parametrize("similarity", [euclidean, snr, cosine, precomputed])
def test_vmap_and_vmap_of_grad_are_the_loop(similarity):
    def loss(x, y):
        return icnn(x, y, 3, 7, similarity)

    x, labels = (torch.stack(parts) for parts in zip(*(sample(seed=seed) for seed in range(3)), strict=True))
    x = torch.stack([cosine(rows) for rows in x]) if similarity is precomputed else x
    together = vmap(loss)(x, labels)
    slopes = vmap(grad(lambda x, y: loss(x, y).mean()))(x, labels)
    for member in range(3):
        one = x[member].clone().requires_grad_()
        value = loss(one, labels[member])
        torch.testing.assert_close(together[member], value.detach(), rtol=1e-12, atol=1e-12)
        (expected,) = torch.autograd.grad(value.mean(), one)
        torch.testing.assert_close(slopes[member], expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-4


def test_a_similarity_counts_as_one_minus_it():
    x, labels = sample()
    expected = icnn_score(-(cosine(x) - 1), labels, similarity=as_distance)
    torch.testing.assert_close(icnn_score(x, labels, similarity=cosine), expected)
    torch.testing.assert_close(icnn_score(cosine(x), labels, similarity=precomputed), expected)


@pytest.mark.parametrize("similarity", [euclidean, cosine, snr])
def test_bad_batches_have_finite_values_and_gradients(similarity):
    x, labels = sample(dtype=torch.float32)
    same = x[:1].expand(14, 3)
    pairs = x[torch.arange(14) // 2]
    batches = {
        "one class": (x, torch.zeros_like(labels)),
        "all classes": (x, torch.arange(14)),
        "one example": (x[:1], labels[:1]),
        "two examples": (x[:2], torch.tensor([0, 1])),
        "three examples": (x[:3], torch.tensor([0, 1, 1])),
        "all equal": (same, labels),
        "all equal, all classes": (same, torch.arange(14)),
        "duplicates of different classes": (pairs, torch.arange(14)),
        "duplicates of one class": (pairs, torch.arange(14) // 2),
        "zeros": (0 * x, labels),
    }
    for kind, (rows, given) in batches.items():
        rows = rows.detach().clone().requires_grad_()
        value = icnn(rows, given, 4, None, similarity)
        (slope,) = torch.autograd.grad(value.mean(), rows)
        assert value.shape == given.shape, kind
        assert value.dtype == torch.float32
        assert value.isfinite().all(), kind
        assert value.min() >= -1e-6, kind
        assert slope.isfinite().all(), kind
        if len(given) < 3:
            assert value.tolist() == [0.0] * len(given)
            assert slope.abs().max() == 0


def test_bad_arguments_are_refused():
    x, labels = sample()
    for loss in (icnn, icnn_score):
        with pytest.raises(ValueError, match="embeddings: expected finite"):
            loss(x * math.inf, labels)
        with pytest.raises(ValueError, match="neighbours: expected at least 1, got 0"):
            loss(x, labels, 0)
        with pytest.raises(ValueError, match="reach: expected at least neighbours = 4, got 3"):
            loss(x, labels, 4, 3)
        with pytest.raises(Exception, match="labels"):
            loss(x, labels[:-1])
