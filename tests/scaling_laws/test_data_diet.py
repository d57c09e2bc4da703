"""Scores against autograd, closed forms and scikit-learn; planted wrong labels are found in a real fleet."""

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

from toolkit import random
from toolkit.data import digits
from toolkit.fleet import Adam, Fleet, train
from toolkit.models import MLP
from toolkit.scaling_laws.data_diet import (
    detection_auc,
    el2n,
    forgetting_counts,
    grand,
    head_grand,
    keep_largest,
    reliability,
)

N, FEATURES, CLASSES = 11, 5, 4
X = random.normal(random.key(1), (N, FEATURES), torch.float64)
Y = torch.arange(N) % CLASSES


def fleet_of(build, members=2):
    torch.manual_seed(0)
    return Fleet.of([build() for _ in range(members)], build)


def loop(trained):
    """Gradient norms, one member and one example at a time."""
    norms = torch.zeros(len(trained), N, dtype=torch.float64)
    for i in range(len(trained)):
        module = trained[i]
        for j in range(N):
            loss = F.cross_entropy(module(X[j : j + 1]), Y[j : j + 1])
            slopes = torch.autograd.grad(loss, list(module.parameters()))
            norms[i, j] = torch.cat([s.flatten() for s in slopes]).norm()
    return norms


@pytest.mark.parametrize("hidden", [(), (6,), (7, 3)])
def test_grand_of_mlps_is_autograds(hidden):
    trained = fleet_of(lambda: MLP(FEATURES, hidden, CLASSES).double())
    torch.testing.assert_close(grand(trained, {"x": X, "y": Y}), loop(trained), rtol=0, atol=1e-12)


def test_grand_of_any_net_is_autograds():
    class Tanh(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(FEATURES, 3), nn.Linear(3, CLASSES, bias=False)

        def forward(self, x):
            return self.head(self.first(x).tanh())

    trained = fleet_of(lambda: Tanh().double())
    torch.testing.assert_close(grand(trained, {"x": X, "y": Y}), loop(trained), rtol=0, atol=1e-12)


def test_grand_of_a_linear_model_is_el2n_times_the_length_of_its_input():
    trained = fleet_of(lambda: MLP(FEATURES, (), CLASSES).double())
    closed = head_grand(trained.logits(X), Y, X)
    torch.testing.assert_close(closed, loop(trained), rtol=0, atol=1e-12)
    expected = el2n(trained.logits(X), Y) * (X.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(closed, expected, rtol=0, atol=1e-12)
    theta = random.normal(random.key(2), (FEATURES, CLASSES), torch.float64)
    slope = torch.func.grad(lambda t: F.cross_entropy(X[3:4] @ t, Y[3:4]))(theta)
    without = head_grand(X @ theta, Y, X, bias=False)
    torch.testing.assert_close(without[3], slope.norm(), rtol=0, atol=1e-12)


def test_el2n_of_equal_probabilities_and_its_range():
    """A head of zeros gives √(1 - 1/K) for all examples, whatever they are."""
    for classes, expected in ((10, 0.9486832980505138), (2, math.sqrt(0.5))):
        flat = el2n(torch.zeros(3, classes, dtype=torch.float64), torch.tensor([0, 1, 1]))
        torch.testing.assert_close(flat, torch.full((3,), expected).double(), rtol=0, atol=1e-7)
    sure = torch.tensor([[90.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(el2n(sure, torch.tensor([0])), torch.zeros(1).double())
    torch.testing.assert_close(el2n(sure, torch.tensor([1])), torch.full((1,), math.sqrt(2)).double())
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    by_hand = math.sqrt(0.2**2 + 0.5**2 + 0.3**2)
    assert el2n(p.log()[None], torch.tensor([1])).item() == pytest.approx(by_hand, abs=1e-12)


def test_el2n_of_a_fleet_is_vmap_and_single_precision():
    logits = random.normal(random.key(3), (3, N, CLASSES), torch.float64)
    torch.testing.assert_close(el2n(logits, Y), torch.vmap(lambda z: el2n(z, Y))(logits))
    assert el2n(logits.float(), Y).dtype == torch.float32


def test_forgetting_by_hand():
    right = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    assert forgetting_counts(right).tolist() == [2, 4, 0, 0, 1]
    assert forgetting_counts(right[:, None].expand(4, 3, 5)).shape == (3, 5)


def test_masks_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3])
    assert keep_largest(scores, 0.4).tolist() == [False, True, True, False, False]
    assert keep_largest(scores, 0.4, 0.2).tolist() == [False, False, True, True, False]
    assert keep_largest(scores, 0.6, 0.4).tolist() == [True, False, False, True, True]
    assert bool(keep_largest(scores, 1.0).all())
    rows = torch.stack([scores, -scores])
    assert torch.equal(torch.vmap(lambda s: keep_largest(s, 0.4))(rows), keep_largest(rows, 0.4))


def test_detection_is_scikit_learns_auc_with_ties():
    scores = (random.normal(random.key(4), (60,), torch.float64) * 2).round()
    wrong = random.uniform(random.key(5), (60,)) < 0.3
    expected = roc_auc_score(wrong.numpy(), scores.numpy())
    assert detection_auc(scores, wrong).item() == pytest.approx(expected, abs=1e-12)
    both = torch.vmap(lambda s: detection_auc(s, wrong))(torch.stack([scores, -scores]))
    assert both.sum().item() == pytest.approx(1, abs=1e-12)


def test_reliability_is_scipys_and_follows_spearman_brown():
    few = random.normal(random.key(6), (4, 30), torch.float64)
    expected = spearmanr(few[:2].mean(0), few[2:].mean(0)).statistic
    assert reliability(few, 2).item() == pytest.approx(expected, abs=1e-12)
    truth = random.normal(random.key(7), (4000,), torch.float64)
    noisy = truth + 1.5 * random.normal(random.key(8), (40, 4000), torch.float64)
    single = 1 / (1 + 1.5**2)
    for runs in (1, 5, 20):
        pearson = runs * single / (1 + (runs - 1) * single)
        normal = 6 / math.pi * math.asin(pearson / 2)  # rank correlation of a bivariate normal
        assert reliability(noisy, runs).item() == pytest.approx(normal, abs=0.02)


@cache
def flipped_digits() -> tuple[Any, torch.Tensor]:
    data = digits()
    x, y = data.x[:1000].flatten(1), data.y[:1000]
    wrong = random.uniform(random.key(9), (1000,)) < 0.1
    labels = torch.where(wrong, (y + 1 + (random.bits(random.key(10), (1000,)) % 9)) % 10, y)
    return {"x": x, "y": labels}, wrong


def test_wrong_labels_of_digits_score_highest_and_averages_agree_better():
    data, wrong = flipped_digits()

    def loss(model, batch, hyper):
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    trained = train(
        lambda: MLP(64, (32,), 10),
        loss,
        data,
        members=10,
        epochs=6,
        optimiser=Adam(lr=5e-3),
        progress=False,
        device="cpu",
    )
    errors, slopes = el2n(trained.logits(data["x"]), data["y"]), grand(trained, data)
    assert detection_auc(errors.mean(0), wrong) > 0.95
    assert detection_auc(slopes.mean(0), wrong) > 0.95
    one, five = reliability(errors, 1), reliability(errors, 5)
    assert five > one + 0.01
    assert abs(five - 5 * one / (1 + 4 * one)) < 0.02
    hard, offset = keep_largest(errors.mean(0), 0.3), keep_largest(errors.mean(0), 0.3, 0.15)
    assert wrong[hard].float().mean() > 0.25 > 0.05 > wrong[offset].float().mean()


def test_bad_input():
    scores = torch.rand(5)
    for keep, offset in ((1.5, 0.0), (0.0, 0.0), (-0.1, 0.0)):
        with pytest.raises(ValueError, match="keep"):
            keep_largest(scores, keep, offset)
    for offset in (-0.2, 0.8):
        with pytest.raises(ValueError, match="offset"):
            keep_largest(scores, 0.4, offset)
    with pytest.raises(ValueError, match="scores"):
        keep_largest(scores / 0 * 0, 0.4)
    with pytest.raises(ValueError, match="labels"):
        el2n(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="right"):
        forgetting_counts(torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="wrong"):
        detection_auc(scores, torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="runs"):
        reliability(torch.rand(4, 5), 3)
    trained = fleet_of(lambda: MLP(FEATURES, (), CLASSES).double())
    with pytest.raises(ValueError, match="'y'"):
        grand(trained, {"x": X})
    with pytest.raises(ValueError, match="class indices"):
        grand(trained, {"x": X, "y": Y + 1})
