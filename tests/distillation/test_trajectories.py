"""Experts against autograd and their stated loss; matched students against students trained one by one."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from synthetic_cases import CLASSES, DATA, INPUTS, N, X, Y, build, normal

from toolkit import random
from toolkit.distillation.trajectories import (
    _MOMENT,
    expert_trajectories,
    input_gradient,
    match_trajectories,
    trajectory_loss,
)
from toolkit.fleet import Fleet
from toolkit.fleet.members import Layout
from toolkit.models import MLP, ConvNet


def test_trajectory_loss_is_1_for_a_student_that_stays_and_0_at_the_target():
    start, target = normal(10, 4, 7), normal(11, 4, 7)
    torch.testing.assert_close(trajectory_loss(start, target, start), torch.ones(4).double())
    assert trajectory_loss(target, target, start).abs().max() == 0
    halfway = trajectory_loss((start + target) / 2, target, start)
    torch.testing.assert_close(halfway, torch.full((4,), 0.25).double())
    torch.testing.assert_close(trajectory_loss(2 * start - target, target, start), torch.full((4,), 4.0).double())
    for scale in (1e-3, 50.0):
        torch.testing.assert_close(
            trajectory_loss(scale * start, scale * target, scale * start), torch.ones(4).double()
        )
    with pytest.raises(ValueError, match="target: expected an expert that moves"):
        trajectory_loss(target, start, start)


@cache
def experts():
    return expert_trajectories(build, DATA, members=3, epochs=4, batch=20, lr=0.2, device="cpu")


def test_experts_keep_their_weights_after_each_epoch():
    fleet = experts()
    assert sorted(fleet.snapshots) == [0, 3, 6, 9, 12]
    assert torch.equal(fleet.snapshots[12], fleet.parameters)
    assert not torch.equal(fleet.snapshots[0], fleet.snapshots[3])


def test_input_gradient_is_autograds():
    net = MLP(INPUTS, (5, 4), CLASSES).double()
    x = normal(12, 7, INPUTS).requires_grad_()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(input_gradient(dict(net.named_parameters()), x.detach()), expected)


def test_smooth_experts_are_smoother_and_their_loss_is_the_stated_one():
    def distance(fleet):
        slopes = fleet.evaluate(lambda m, b, h: input_gradient(m.parameters, b.x).norm(dim=-1), {"x": X})
        return (slopes - 1).square().mean()

    heavy = expert_trajectories(build, DATA, members=3, epochs=4, batch=20, smooth=True, penalty=5.0, lr=0.02)
    none = expert_trajectories(build, DATA, members=3, epochs=4, batch=20, smooth=True, penalty=0.0, lr=0.02)
    assert distance(heavy) < distance(none)
    batch = {"x": X, "y": Y}
    whole = expert_trajectories(build, batch, members=2, epochs=2, batch=N, smooth=True, penalty=2.0, lr=0.02)
    for epoch, share in enumerate((0.5, 0.55)):
        fleet = Fleet(build, whole.snapshots[epoch])
        loss = F.cross_entropy(fleet.logits(X).flatten(0, 1), Y.repeat(2), reduction="none").view(2, N).mean(1)
        slopes = fleet.evaluate(lambda m, b, h: input_gradient(m.parameters, b.x).norm(dim=-1), {"x": X})
        expected = share * loss + 2 * (slopes - 1).square().mean(1)
        torch.testing.assert_close(whole.history[:, epoch], expected)


def trajectory_by_loop(fleet, images, labels, who, when, span, steps, rate, momentum=0.0, intermediate=0.0, scale=1.0):
    """One student by torch.optim on a module."""
    path = [fleet.snapshots[moment][who] for moment in sorted(fleet.snapshots)]
    net = Fleet(build, path[when][None])[0]
    optimiser = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
    total = 0.0
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        (scale * F.cross_entropy(net(images), labels)).backward()
        optimiser.step()
        now = Layout.of(net).pack(net)
        if step * span % steps == 0:
            passed = path[when + step * span // steps]
            value = (now - passed).square().sum() / (path[when] - passed).square().sum()
            total += float(value) * (1 if step == steps else intermediate)
    return total


@pytest.mark.parametrize(
    ("momentum", "intermediate", "balance"), [(0.0, 0.0, False), (0.9, 1.0, False), (0.5, 0.0, True)]
)
def test_the_first_trajectory_loss_is_that_of_students_trained_one_by_one(momentum, intermediate, balance):
    fleet, given = experts(), {"momentum": momentum, "intermediate": intermediate, "balance": balance}
    kwargs: dict[str, Any] = {"nets": 6, "steps": 4, "span": 2, "rate": 0.3, "snapshots": (0,), "iterations": 1} | given
    result = match_trajectories(DATA, fleet, **kwargs)
    u = random.uniform(random.key(0, _MOMENT, 0), (2, 6))
    who, when = (u[0] * 3).long().tolist(), (u[1] * 3).long().tolist()
    assert set(when) == {0, 1, 2}
    values = []
    for i, t in zip(who, when, strict=True):
        size = float(torch.tensor(8 + abs(t - 1)).log() / torch.tensor(5).log())
        scale = (size if t > 1 else 1 / size) if balance else 1.0
        args = (fleet, result.snapshots[0], result.y, i, t, 2, 4, 0.3, momentum, intermediate, scale)
        values.append(trajectory_by_loop(*args))
    assert result.history[0].item() == pytest.approx(sum(values) / 6, rel=1e-6)


def test_a_student_that_does_not_move_has_trajectory_loss_1():
    still = match_trajectories(DATA, experts(), rate=1e-12, rate_lr=1e-9, iterations=2)
    torch.testing.assert_close(still.history, torch.ones(2).double())
    shaken = match_trajectories(DATA, experts(), rate=1e-12, rate_lr=1e-9, iterations=2, perturb=3.0)
    assert (shaken.history - 1).abs().min() > 1e-3


def test_the_rate_is_learnt_with_the_images():
    result = match_trajectories(DATA, experts(), iterations=60, rate=0.02, rate_lr=0.05)
    assert result.rate is not None
    assert result.rate > 0.04
    assert result.history[-10:].mean() < 0.7 * result.history[:5].mean()


def test_bad_input():
    wrong: dict[str, Any]
    for wrong in ({"nets": 0}, {"steps": 0}, {"span": 0}, {"momentum": 1.5}, {"perturb": -1.0}, {"rate": 0.0},
                  {"rate_lr": 0.0}, {"intermediate": -1.0}, {"latest": 4}, {"latest": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            match_trajectories(DATA, experts(), **wrong)
    with pytest.raises(ValueError, match="latest"):
        match_trajectories(DATA, experts(), span=5)
    with pytest.raises(ValueError, match="steps: expected a multiple"):
        match_trajectories(DATA, experts(), span=2, steps=5, intermediate=1.0)
    for wrong in ({"members": 0}, {"epochs": 0}, {"penalty": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            expert_trajectories(build, DATA, smooth=True, **wrong)
    with pytest.raises(ValueError, match="MLP"):
        expert_trajectories(lambda: ConvNet(1, (2, 3), 2), {"x": X, "y": Y}, smooth=True)
