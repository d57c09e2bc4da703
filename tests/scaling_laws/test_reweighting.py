"""Weights against hand-made numbers, their variational property and autograd; training against plain training."""

import math
from typing import Any

import pytest
import torch

from toolkit import random
from toolkit.fleet import SGD, train
from toolkit.models import MLP
from toolkit.scaling_laws.reweighting import STRATEGIES, hard_and_redundant, loss_weights, reweighted

LOSSES = random.uniform(random.key(1), (9,), torch.float64) * 3
BY_HAND = {  # f at h = -1, 0, 1/2, 1
    "linear_upper": (0.0, 1.0, 1.0, 1.0),
    "quadratic": (0.0, 1.0, 0.75, 0.0),
    "extremes": (1.0, 0.0, 0.5, 1.0),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_by_hand(strategy):
    losses = torch.tensor([1.0, 2.0, 2.5, 3.0]).double()
    expected = (torch.tensor(BY_HAND[strategy]).double() / 0.7).softmax(0)
    torch.testing.assert_close(loss_weights(losses, strategy, 0.7), expected, rtol=0, atol=1e-14)
    twice = torch.tensor(BY_HAND[strategy]).double() * (1 if strategy == "quadratic" else 2)
    torch.testing.assert_close(loss_weights(losses, strategy, 1.0, 2.0), twice.softmax(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_sum_to_1_and_know_no_scale(strategy):
    weights = loss_weights(LOSSES, strategy)
    assert weights.sum().item() == pytest.approx(1, abs=1e-14)
    for scale, shift in ((1e-7, 0.0), (5.0, -3.0), (1e6, 2.0)):
        torch.testing.assert_close(loss_weights(scale * LOSSES + shift, strategy), weights, rtol=0, atol=1e-9)
    turned = loss_weights(-LOSSES, strategy)
    assert torch.allclose(turned, weights) == (strategy != "linear_upper")


def test_bounds_of_the_weights():
    for r, delta in ((1.0, 1.0), (0.5, 2.0)):
        linear = loss_weights(LOSSES, "linear_upper", r, delta)
        assert (linear.max() / linear.min()).item() == pytest.approx(math.exp(delta / r), rel=1e-12)
        upper = (LOSSES.max() + LOSSES.min()) / 2 <= LOSSES
        torch.testing.assert_close(linear[upper], linear.max().expand(int(upper.sum())), rtol=0, atol=1e-15)
        assert linear[~upper].max() < linear.max()
    middle = torch.tensor([0.0, 1.0, 2.0]).double()
    for strategy in ("quadratic", "extremes"):
        some = loss_weights(LOSSES, strategy, 0.5)
        assert 1.5 < some.max() / some.min() < math.exp(2)
        reached = loss_weights(middle, strategy, 0.5)
        assert (reached.max() / reached.min()).item() == pytest.approx(math.exp(2), rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_are_the_best_ones_for_the_regularised_sum(strategy):
    """No other weights have a larger Σ w f - r KL(w ‖ uniform); f from r = 1, up to a constant."""
    value, r = loss_weights(LOSSES, strategy).log(), 0.4

    def score(w):
        return (w * value).sum() - r * (w * (w * len(w)).log()).sum()

    best = loss_weights(LOSSES, strategy, r)
    for seed in range(50):
        other = (best.log() + 0.1 * random.normal(random.key(seed), (9,), torch.float64)).softmax(0)
        assert score(other) < score(best)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_losses_get_equal_weights(strategy, dtype):
    """Also where they differ by the last bits, whose places would otherwise be the extremes."""
    for level in (0.0, 2.3, 1e-5):
        losses = torch.full((8,), level, dtype=dtype)
        nearly = losses * (1 + torch.finfo(dtype).eps * torch.arange(8))
        for each in (losses, nearly):
            assert torch.equal(loss_weights(each, strategy), torch.full((8,), 0.125, dtype=dtype))
    assert loss_weights(torch.ones(1), strategy).tolist() == [1.0]


def test_the_gradient_has_no_part_through_the_weights():
    theta = random.normal(random.key(2), (9,), torch.float64).requires_grad_()
    fixed = loss_weights(theta.square().detach(), "quadratic")

    def plain(model, batch, hyper):
        return theta.square()

    total = reweighted(plain, "quadratic")(None, None, {}).mean()
    (slope,) = torch.autograd.grad(total, theta)
    torch.testing.assert_close(slope, fixed * 2 * theta.detach(), rtol=0, atol=1e-14)


DATA, THETA = hard_and_redundant(400, 6, seed=3)
FIT: dict[str, Any] = {"steps": 30, "batch": 16, "optimiser": SGD(lr=0.02), "progress": False, "device": "cpu"}


def build():
    return MLP(6, (), 1)


def squared(model, batch, hyper):
    return (model(batch.x)[:, 0] - batch.y).square()


def test_training_without_contrast_is_plain_training():
    plain = train(build, squared, DATA, members=2, **FIT)
    cold = train(build, reweighted(squared, "linear_upper", uniform_until=1.0), DATA, members=2, **FIT)
    torch.testing.assert_close(cold.parameters, plain.parameters, rtol=0, atol=1e-6)
    hyper = {"r": torch.tensor([1e9, 0.5])}
    mixed = train(build, reweighted(squared, "linear_upper", "r"), DATA, hyper=hyper, **FIT)
    torch.testing.assert_close(mixed.parameters[0], plain.parameters[0], rtol=0, atol=1e-5)
    alone = train(build, reweighted(squared, "linear_upper", 0.5), DATA, members=2, **FIT)
    torch.testing.assert_close(mixed.parameters[1], alone.parameters[1], rtol=0, atol=1e-6)
    assert (alone.parameters[1] - plain.parameters[1]).abs().max() > 1e-2


def test_what_the_loss_writes_is_passed_on():
    def writing(model, batch, hyper):
        values = squared(model, batch, hyper)
        return values, {"seen": batch.seen + 1}

    fleet = train(build, reweighted(writing, "extremes"), DATA, members=1, memory={"seen": torch.zeros(400)}, **FIT)
    assert fleet.memory["seen"].sum() == 30 * 16


def test_low_losses_counting_less_is_faster_and_outliers_favour_the_middle():
    """Distance to the true θ after as many steps, paired by stream."""

    def distance(data, theta, loss):
        fleet = train(lambda: MLP(20, (), 1), loss, data, members=8, **FIT | {"steps": 300, "optimiser": SGD(lr=0.004)})
        return (fleet.layout.views(fleet.parameters)["head.weight"][:, 0] - theta).norm(dim=1)

    clean, theta = hard_and_redundant(2000, 20, seed=4)
    plain, upper = distance(clean, theta, squared), distance(clean, theta, reweighted(squared, "linear_upper", 0.3))
    middle = distance(clean, theta, reweighted(squared, "quadratic", 0.3))
    assert bool((upper < plain).all())
    assert bool((upper < middle).all())


def test_the_regression_is_as_described():
    data, theta = hard_and_redundant(20000, 20, seed=5, hard=0.2, outliers=0.1)
    x, y, group = data["x"], data["y"], data["group"]
    torch.testing.assert_close(y[group < 2], (x @ theta)[group < 2])
    assert bool((x[group == 0][:, 2:] == 0).all())
    lengths = [x[group == g].square().sum(1).mean().item() for g in (0, 1)]
    assert lengths == pytest.approx([20, 20], rel=0.05)
    assert (group == 2).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (group == 1).float().mean().item() == pytest.approx(0.18, abs=0.01)
    assert y[group == 2].square().mean().item() == pytest.approx(20, rel=0.1)


def test_bad_input():
    with pytest.raises(ValueError, match="strategy"):
        loss_weights(LOSSES, "upper")
    with pytest.raises(ValueError, match="strategy"):
        reweighted(squared, "upper")
    with pytest.raises(ValueError, match="temperature"):
        loss_weights(LOSSES, "extremes", 0.0)
    with pytest.raises(ValueError, match="temperature"):
        reweighted(squared, "extremes", -1.0)
    with pytest.raises(ValueError, match="delta"):
        loss_weights(LOSSES, "extremes", 1.0, 0.0)
    with pytest.raises(ValueError, match="losses"):
        loss_weights(LOSSES / 0, "extremes")
    with pytest.raises(ValueError, match="losses"):
        loss_weights(LOSSES[:0], "extremes")
    with pytest.raises(ValueError, match="uniform_until"):
        reweighted(squared, "extremes", uniform_until=2.0)
    for name, options in (("hard", {"hard": 1.5}), ("rank", {"rank": 7}), ("noise", {"noise": -1.0})):
        with pytest.raises(ValueError, match=name):
            hard_and_redundant(10, 6, 0, **options)
