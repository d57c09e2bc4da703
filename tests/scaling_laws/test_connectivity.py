"""Dropout against all subsets, the path against its corners, and the fall of both with width in trained nets."""

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from toolkit import random
from toolkit.data import digits
from toolkit.fleet import Fleet
from toolkit.models import MLP
from toolkit.scaling_laws.connectivity import (
    MeanField,
    along,
    barrier,
    dropout_variance,
    dropped,
    five_segments,
    squared_error,
    train_mean_field,
)

WIDTH, INPUTS, OUTPUTS = 6, 4, 2
X = random.normal(random.key(1), (7, INPUTS), torch.float64)
TARGET = random.normal(random.key(2), (7, OUTPUTS), torch.float64)


def build():
    return MeanField(INPUTS, WIDTH, OUTPUTS).double()


def pair(members=2):
    rows = random.normal(random.key(3), (members, WIDTH * (INPUTS + OUTPUTS + 1)), torch.float64)
    return Fleet(build, rows)


def losses(fleet, x=X, target=TARGET):
    return fleet.evaluate(squared_error, {"x": x, "target": target}).mean(1)


def test_the_net_is_a_mean_over_its_neurons():
    net = build()
    net.b.data = random.normal(random.key(4), (WIDTH,), torch.float64)
    out, hidden = net(X, return_features=True)
    by_hand = torch.zeros(7, OUTPUTS, dtype=torch.float64)
    for i in range(WIDTH):
        by_hand += net.a[i] * (X @ net.w[i] + net.b[i]).clamp_min(0)[:, None] / WIDTH
    torch.testing.assert_close(out, by_hand, rtol=0, atol=1e-14)
    torch.testing.assert_close(hidden @ net.a / WIDTH, out, rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 6])
def test_the_variance_is_that_over_all_subsets_and_what_the_squared_error_gains(keep):
    fleet = pair(1)
    net = fleet[0]
    every = [torch.tensor([i in chosen for i in range(WIDTH)]) for chosen in combinations(range(WIDTH), keep)]
    nets = Fleet(build, torch.cat([dropped(fleet, kept).parameters for kept in every]))
    outputs = nets.logits(X)
    whole, hidden = net(X, return_features=True)
    torch.testing.assert_close(outputs.mean(0), whole, rtol=0, atol=1e-12)
    variance = dropout_variance(hidden, net.a, keep)
    torch.testing.assert_close(outputs.var(0, unbiased=False), variance, rtol=0, atol=1e-12)
    gain = losses(nets).mean() - losses(fleet)[0]
    torch.testing.assert_close(gain, variance.sum(1).mean(), rtol=0, atol=1e-12)


def test_each_member_may_keep_its_own_neurons():
    fleet = pair()
    masks = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()
    both = dropped(fleet, masks)
    for i in range(2):
        torch.testing.assert_close(both.parameters[i], dropped(fleet[[i]], masks[i]).parameters[0])
        kept = MeanField(INPUTS, int(masks[i].sum()), OUTPUTS).double()
        whole = fleet[i]
        kept.a.data, kept.w.data, kept.b.data = whole.a[masks[i]], whole.w[masks[i]], whole.b[masks[i]]
        torch.testing.assert_close(both[i](X), kept(X), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kept", [None, torch.tensor([0, 1, 0, 0, 1, 0]).bool()])
def test_the_path_has_its_largest_loss_at_a_corner(kept):
    fleet, points = pair(), 40
    corners = five_segments(fleet, 0, 1, kept)
    at = losses(corners)
    path = losses(along(corners, points))
    assert len(path) == 5 * points + 1
    torch.testing.assert_close(path[::points], at, rtol=0, atol=1e-12)
    torch.testing.assert_close(corners.parameters[[0, -1]], fleet.parameters, rtol=0, atol=0)
    for segment in (1, 3):
        inside = path[segment * points : (segment + 1) * points + 1]
        torch.testing.assert_close(inside, inside[:1].expand(points + 1), rtol=0, atol=1e-12)
    bent = path[:-2] - 2 * path[1:-1] + path[2:]
    inner = torch.arange(1, 5 * points) % points != 0
    assert bool((bent[inner] > -1e-12).all())
    assert path.max() == pytest.approx(at.max().item(), abs=1e-12)
    mask = torch.arange(WIDTH) < 3 if kept is None else kept
    drops = losses(dropped(fleet, torch.stack([mask, ~mask])))
    torch.testing.assert_close(at[1:5], drops.repeat_interleave(2), rtol=0, atol=1e-12)
    found = barrier(path)
    torch.testing.assert_close(found, torch.cat([at[[0, 5]], drops]).max() - at[[0, 5]].max(), rtol=0, atol=1e-12)
    assert found > 0


def test_only_one_layer_moves_at_a_time():
    a, w, b = five_segments(pair(), 0, 1).parameters.split([WIDTH * OUTPUTS, WIDTH * INPUTS, WIDTH], 1)
    for still in (w, b):
        assert torch.equal(still[0], still[1])
        assert torch.equal(still[2], still[3])
        assert torch.equal(still[4], still[5])
    assert torch.equal(a[1], a[2])
    assert torch.equal(a[3], a[4])


def test_the_straight_line_and_the_barrier_by_hand():
    fleet = pair()
    line = along(fleet, 4)
    torch.testing.assert_close(line.parameters[1], 0.75 * fleet.parameters[0] + 0.25 * fleet.parameters[1])
    assert barrier(torch.tensor([1.0, 3.0, 2.5, 2.0])).item() == 1
    assert barrier(torch.tensor([[1.0, 0.5, 2.0], [0.0, 4.0, 1.0]])).tolist() == [0, 3]


@cache
def trained():
    data = digits()
    fields = {"x": data.x.flatten(1), "target": F.one_hot(data.y, 10).float()}
    options: dict[str, Any] = {"batch": 32, "progress": False, "device": "cpu"}
    return fields, {n: train_mean_field(fields, n, 2, 300, **options) for n in (32, 512)}


def test_wider_nets_lose_less_by_dropping_and_on_the_path():
    fields, fleets = trained()
    expected, barriers = {}, {}
    for width, fleet in fleets.items():
        loss = losses(fleet, **fields)
        assert bool((loss < 0.6).all())  # 0.9 is the best constant
        hidden = fleet[0](fields["x"], return_features=True)[1]
        expected[width] = dropout_variance(hidden, fleet[0].a, width // 2).sum(1).mean().item()
        barriers[width] = barrier(losses(along(five_segments(fleet, 0, 1), 1), **fields)).item()
    assert 16 / 2 < expected[32] / expected[512] < 16 * 2  # 1 / width
    assert barriers[32] > 4 * barriers[512] > 0


def test_bad_input():
    fleet = pair()
    for kept in (torch.zeros(WIDTH).bool(), torch.ones(WIDTH + 1).bool()):
        with pytest.raises(ValueError, match="kept"):
            dropped(fleet, kept)
        with pytest.raises(ValueError, match="kept"):
            five_segments(fleet, 0, 1, kept)
    with pytest.raises(ValueError, match="kept"):
        five_segments(fleet, 0, 1, torch.ones(WIDTH).bool())
    with pytest.raises(ValueError, match="second"):
        five_segments(fleet, 0, 2)
    with pytest.raises(ValueError, match="trained"):
        dropped(Fleet.of([MLP(4, (), 2)], lambda: MLP(4, (), 2)), torch.ones(WIDTH).bool())
    with pytest.raises(ValueError, match="corners"):
        along(fleet[[0]], 3)
    with pytest.raises(ValueError, match="points"):
        along(fleet, 0)
    for values in (torch.ones(1), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="losses"):
            barrier(values)
    for keep in (0, WIDTH + 1):
        with pytest.raises(ValueError, match="keep"):
            dropout_variance(torch.ones(3, WIDTH), torch.ones(WIDTH, 1), keep)
    with pytest.raises(ValueError, match="target"):
        train_mean_field({"x": X}, 4, 1, 1)
    with pytest.raises(ValueError, match="rate"):
        train_mean_field({"x": X, "target": TARGET}, 4, 1, 1, rate=0.0)
    with pytest.raises(ValueError, match="width"):
        MeanField(3, 0, 2)
