"""Several teachers: their mean, limits of dropping, specialists by hand, assistance that cannot mislead."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from logit_cases import LABELS, check_against_a_loop, logits

from toolkit import random
from toolkit.distillation.logits import kd
from toolkit.distillation.teachers import (
    LadderMLP,
    assisted,
    averaged,
    concentrate,
    drop_teachers,
    ink_points,
    smooth_points,
    specialist_logits,
    train_assisted,
    train_specialists,
    train_unic,
    unic_distance,
)
from toolkit.fleet import SGD, Adam, train
from toolkit.models import MLP

TRAINING: dict[str, Any] = {"steps": 12, "batch": 8, "optimiser": Adam(lr=1e-2), "progress": False, "device": "cpu"}
X = logits(11, 40, 6, scale=1).float()
Y = torch.arange(40) % 5
GROUPS = torch.tensor([0, 1, 0, 1, 0])


def test_the_averaged_teacher_has_the_mean_probabilities():
    z = logits(1, 3, 6, 4)
    for temperature in (1.0, 4.0):
        one = averaged(z, temperature)
        torch.testing.assert_close((one / temperature).softmax(-1), (z / temperature).softmax(-1).mean(0))
    torch.testing.assert_close(averaged(z[:1]).softmax(-1), z[0].softmax(-1))


def test_a_student_of_the_mean_teacher_has_the_mean_gradient():
    z, t = logits(2, 7, 5).requires_grad_(), logits(3, 4, 7, 5, scale=3)
    y = torch.zeros(7, dtype=torch.int64)
    (together,) = torch.autograd.grad(kd(z, averaged(t, 2.0), y, 2.0, 1.0).sum(), z)
    (each,) = torch.autograd.grad(torch.stack([kd(z, one, y, 2.0, 1.0) for one in t]).mean(0).sum(), z)
    torch.testing.assert_close(together, each)


def test_unic_distance():
    s, t = logits(4, 6, 5), logits(5, 6, 5)
    expected = 0.5 * (1 - F.cosine_similarity(s, t)) + 0.5 * F.smooth_l1_loss(s, t, reduction="none").mean(1)
    torch.testing.assert_close(unic_distance(s, t), expected)
    assert unic_distance(s, s).abs().max() < 1e-12
    axes = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(unic_distance(axes[:1], axes[1:]), torch.tensor([0.75], dtype=torch.float64))
    torch.testing.assert_close(unic_distance(3 * axes[:1], -axes[:1]), torch.tensor([1.875], dtype=torch.float64))
    empty = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(unic_distance(empty, axes[:1]).sum(), empty)
    assert slope.isfinite().all()


def test_dropping_limits():
    losses = logits(6, 4, 500).square()
    key = random.key(7)
    torch.testing.assert_close(drop_teachers(losses, key, 0.0), torch.full_like(losses, 0.25))
    worst = drop_teachers(losses, key, 1.0)
    assert torch.equal(worst, F.one_hot(losses.argmax(0), 4).T.double())
    weighted = (worst * losses).sum(0)
    assert torch.equal(weighted, losses.amax(0))
    assert torch.equal(drop_teachers(losses[:1], key), torch.ones(1, 500, dtype=torch.float64))


def test_the_worst_teacher_is_never_dropped_and_others_as_often_as_asked():
    losses = logits(8, 4, 20000).square()
    for rate in (0.2, 0.5, 0.9):
        weights = drop_teachers(losses, random.key(9), rate)
        torch.testing.assert_close(weights.sum(0), torch.ones(20000, dtype=torch.float64))
        assert (weights.gather(0, losses.argmax(0)[None]) > 0).all()
        others = torch.arange(4)[:, None] != losses.argmax(0)
        dropped = (weights[others] == 0).double().mean().item()
        assert dropped == pytest.approx(rate, abs=0.01)
        kept = (weights > 0).double()
        torch.testing.assert_close(weights, kept / kept.sum(0))
    again = drop_teachers(losses, random.key(9), 0.9)
    assert torch.equal(again, weights)
    assert not torch.equal(drop_teachers(losses, random.key(10), 0.9), weights)


def test_dropping_in_a_fleet_is_dropping_alone_and_has_no_gradient():
    losses = logits(10, 3, 4, 9).square().requires_grad_()
    keys = random.fold_in(random.key(1), torch.arange(3))
    rates = torch.tensor([0.0, 0.5, 1.0])
    found = torch.vmap(drop_teachers)(losses, keys, rates)
    assert not found.requires_grad
    for i in range(3):
        assert torch.equal(found[i], drop_teachers(losses[i], keys[i], rates[i]))


def test_the_ladder_sums_projections_of_every_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tall, last = (LadderMLP(6, (5, 7), (3, 4), projector=2, ladder=ladder) for ladder in (True, False))
    predictions, features = tall(X, return_features=True)
    first = F.relu(tall.layers[0](X))
    second = F.relu(tall.layers[1](first))
    assert torch.equal(features, second)
    assert [p.shape for p in predictions] == [(40, 3), (40, 4)]
    for found, ladder in zip(predictions, tall.projectors, strict=True):
        torch.testing.assert_close(found, ladder[0](first) + ladder[1](second))  # type: ignore[index]
    assert [len(list(ladder.children())) for ladder in last.projectors] == [1, 1]
    torch.testing.assert_close(last(X)[1], last.projectors[1][0](last(X, return_features=True)[1]))  # type: ignore[index]


def test_a_unic_step_is_the_gradient_of_its_definition():
    teachers = [5 + logits(12, 40, 3).float(), 0.1 * logits(13, 40, 4).float()]
    options = TRAINING | {"steps": 1, "batch": 40, "optimiser": SGD(lr=0.5), "snapshots": [0]}
    build = lambda: LadderMLP(6, (5,), (3, 4))  # noqa: E731
    fleet = train_unic(build, X, teachers, rates=[0.0, 1.0], seeds=2, **options)
    wanted = [(t - t.mean(0)) / t.std(0, correction=0) for t in teachers]
    for i, reduce in enumerate((lambda v: v.mean(0), lambda v: v.amax(0))):
        module = fleet.at(0)[2 * i]
        values = torch.stack([unic_distance(p, t) for p, t in zip(module(X), wanted, strict=True)])
        slopes = torch.autograd.grad(reduce(values).mean(), list(module.parameters()))
        moved = torch.cat([(p - 0.5 * g).reshape(-1) for p, g in zip(module.parameters(), slopes, strict=True)])
        torch.testing.assert_close(fleet.parameters[2 * i], moved.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(fleet.at(0).parameters[:2], fleet.at(0).parameters[2:])


def by_hand(z, t, y, groups, weight, pace):
    """Example by example, group by group."""
    values, soft = [], []
    errors: dict[int, list[torch.Tensor]] = {}
    for i in range(len(y)):
        inside = [c for c in range(z.shape[1]) if groups[c] == groups[y[i]]]
        p, q = t[i, inside].softmax(0), z[i, inside].log_softmax(0)
        values.append(-z[i].log_softmax(0)[y[i]])
        soft.append(-(p * q).sum())
        errors.setdefault(int(groups[y[i]]), []).append(1 - z[i].detach().softmax(0)[y[i]])
    strength = {g: torch.stack(e).mean() ** pace for g, e in errors.items()}
    mean = sum(strength.values()) / len(strength)
    return torch.stack(
        [v + weight * strength[int(groups[c])] / mean * s for v, s, c in zip(values, soft, y, strict=True)]
    )


@pytest.mark.parametrize(("weight", "pace"), [(0.0, 1.0), (1.0, 0.0), (0.7, 1.0), (2.0, 2.5)])
def test_concentration_by_hand(weight, pace):
    z, t = logits(14), logits(15, scale=3)
    found = concentrate(z, t, LABELS, GROUPS, weight, pace)
    torch.testing.assert_close(found, by_hand(z, t, LABELS, GROUPS, weight, pace))
    moved = torch.where(GROUPS[LABELS][:, None] == GROUPS, t + 3, 100 * t)
    torch.testing.assert_close(concentrate(z, moved, LABELS, GROUPS, weight, pace), found)  # what others say is unheard


def test_the_pace_turns_to_the_group_with_the_larger_error():
    sure = 8.0 * F.one_hot(LABELS, 5).double()
    lost = GROUPS[LABELS] == 1
    z = torch.where(lost[:, None], 0.1 * logits(16), sure)
    t = logits(17)

    def share(pace):
        heard = concentrate(z, t, LABELS, GROUPS, 1.0, pace) - concentrate(z, t, LABELS, GROUPS, 0.0)
        return heard / (concentrate(z, t, LABELS, GROUPS, 1.0, 0.0) - concentrate(z, t, LABELS, GROUPS, 0.0))

    torch.testing.assert_close(share(3.0)[lost], torch.full_like(z[lost, 0], 2.0), rtol=1e-6, atol=0)
    assert share(3.0)[~lost].max() < 1e-6
    flat = concentrate(sure * 100, t, LABELS, GROUPS, 1.0, 1.0)
    assert flat.isfinite().all()


def test_concentration_in_a_fleet_is_a_loop():
    check_against_a_loop(lambda z, t, y, h: concentrate(z, t, y, GROUPS, h), [0.5, 1.0, 2.0])
    z, t, y = logits(1, 3, 7, 5), logits(2, 3, 7, 5), torch.stack([LABELS.roll(i) for i in range(3)])
    paces = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    slopes = torch.vmap(torch.func.grad(lambda z, t, y, h: concentrate(z, t, y, GROUPS, 1.0, h).mean()))(z, t, y, paces)
    for i, pace in enumerate(paces.tolist()):
        leaf = z[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(by_hand(leaf, t[i], y[i], GROUPS, 1.0, pace).mean(), leaf)
        torch.testing.assert_close(slopes[i], slope, rtol=1e-9, atol=1e-12)


def test_specialists_see_their_own_group_only_and_speak_about_it():
    build = lambda: MLP(6, (5,), 5)  # noqa: E731
    fleet = train_specialists(build, {"x": X, "y": Y}, GROUPS, **TRAINING)
    for group in (0, 1):
        own = GROUPS[Y] == group
        alone = train(
            build,
            lambda model, batch, hyper: F.cross_entropy(model(batch.x), batch.y, reduction="none"),
            {"x": X[own], "y": Y[own]},
            streams=torch.tensor([group]),
            **TRAINING,
        )
        torch.testing.assert_close(fleet.parameters[group], alone.parameters[0], rtol=1e-4, atol=1e-6)
    z = fleet.logits(X)
    table = specialist_logits(z, Y, GROUPS)
    for i in range(40):
        assert torch.equal(table[i], z[GROUPS[Y[i]], i])


def test_smooth_points_are_the_nearest_of_low_rank():
    points = logits(18, 30, 6) + 3
    for components in (0, 2, 6):
        found = smooth_points(points, components)
        values = torch.linalg.svdvals(points - points.mean(0))
        torch.testing.assert_close((points - found).square().sum(), values[components:].square().sum())
        torch.testing.assert_close(found.mean(0), points.mean(0))
        assert torch.linalg.matrix_rank(found - found.mean(0), atol=1e-9) == components


def test_ink_points():
    image = torch.zeros(2, 1, 4, 6)
    image[0, 0, 0, 1] = 1.0  # upper left: one pixel
    image[0, 0, 0, 3], image[0, 0, 1, 5] = 1.0, 3.0  # upper right: a quarter of the way back from the second
    row, column = (torch.linspace(-1, 1, n) for n in (4, 6))
    found = ink_points(image)
    torch.testing.assert_close(found[0, :2], torch.stack([row[0], column[1]]))
    expected = torch.stack([(row[0] + 3 * row[1]) / 4, (column[3] + 3 * column[5]) / 4])
    torch.testing.assert_close(found[0, 2:4], expected)
    middle = torch.stack([row[2:].mean(), column[:3].mean(), row[2:].mean(), column[3:].mean()])
    torch.testing.assert_close(found[0, 4:], middle)


def test_assistance_by_hand():
    y = torch.zeros(1, 4, dtype=torch.float64)
    s = torch.tensor([[1.0, 1.0, -2.0, 0.5]], dtype=torch.float64)
    tolerant = torch.tensor([[0.5, 3.0, 1.0, 0.5]], dtype=torch.float64)  # helps, misleads, helps from beyond, agrees
    tough = torch.tensor([[-1.0, 0.0, -3.0, 0.25]], dtype=torch.float64)  # helps, helps, misleads, helps
    both = torch.stack([tolerant, tough])
    found = assisted(s, y, both, torch.tensor([0.1, 10.0], dtype=torch.float64))
    expected = (1 + 1 + 4 + 0.25 + 0.1 * (0.5 + 3) + 10 * (2 + 1 + 0.25)) / 4
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))
    alone = assisted(s, y, both, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(alone, (s - y).square().mean(1))


def test_no_teacher_pulls_away_from_the_truth():
    s, y = logits(19, 50, 6).requires_grad_(), logits(20, 50, 6)
    teachers = logits(21, 2, 50, 6)
    (slope,) = torch.autograd.grad(assisted(s, y, teachers, torch.tensor([0.5, 2.0]).double()).sum(), s)
    (plain,) = torch.autograd.grad((s - y).square().mean(1).sum(), s)
    assert ((slope - plain) * (s - y).sign() >= -1e-12).all()
    pulls = ((slope - plain) * 6 * (s - y).sign()).detach()
    expected = {0.0, 0.5, 2.0, 2.5}
    assert {round(v, 6) for v in pulls.flatten().tolist()} == expected


def test_training_with_assistance():
    points, tolerant, tough = (logits(seed, 40, 4).float() for seed in (22, 23, 24))
    build = lambda: MLP(6, (5,), 4)  # noqa: E731
    options = TRAINING | {"steps": 1, "batch": 40, "optimiser": SGD(lr=0.5), "snapshots": [0]}
    pairs = [(0.0, 0.0), (1.0, 0.0), (0.0, 2.0)]
    fleet = train_assisted(build, X, points, tolerant, tough, weights=pairs, seeds=2, **options)
    for i, pair in enumerate(pairs):
        module = fleet.at(0)[2 * i + 1]
        values = assisted(module(X), points, torch.stack([tolerant, tough]), torch.tensor(pair))
        slopes = torch.autograd.grad(values.mean(), list(module.parameters()))
        moved = torch.cat([(p - 0.5 * g).reshape(-1) for p, g in zip(module.parameters(), slopes, strict=True)])
        torch.testing.assert_close(fleet.parameters[2 * i + 1], moved.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(fleet.at(0).parameters[1], fleet.at(0).parameters[5])


def test_bad_input():
    z, weights = logits(25, 2, 7, 5), torch.zeros(2, dtype=torch.float64)
    bad = z.clone()
    bad[0, 0, 0] = math.inf
    data, wide = {"x": X, "y": Y}, logits(1, 40, 3).float()
    build = lambda: LadderMLP(6, (5,), (3,))  # noqa: E731
    for call, name in (
        (lambda: averaged(z, 0.0), "temperature"),
        (lambda: averaged(z[:0]), "teachers"),
        (lambda: averaged(bad), "teacher"),
        (lambda: drop_teachers(z[0], random.key(0), 1.5), "rate"),
        (lambda: drop_teachers(z[0, :0], random.key(0)), "losses"),
        (lambda: LadderMLP(6, (), (3,)), "hidden"),
        (lambda: LadderMLP(6, (5,), ()), "hidden"),
        (lambda: train_unic(build, X, [], rates=[0.5], seeds=1, **TRAINING), "teachers"),
        (lambda: train_unic(build, X, [wide[1:]], rates=[0.5], seeds=1, **TRAINING), "teachers"),
        (lambda: train_unic(build, X, [wide], rates=[-0.5], seeds=1, **TRAINING), "rates"),
        (lambda: train_unic(build, X, [wide * math.nan], rates=[0.5], seeds=1, **TRAINING), "teacher"),
        (lambda: train_specialists(build, data, 2 * GROUPS, **TRAINING), "groups"),
        (lambda: train_specialists(build, data, GROUPS[:4], **TRAINING), "labels"),
        (lambda: specialist_logits(z[:1], LABELS, GROUPS), "teachers"),
        (lambda: concentrate(z[0], z[1], LABELS, GROUPS, -1.0), "weight"),
        (lambda: concentrate(z[0], z[1], LABELS, GROUPS, 1.0, -1.0), "pace"),
        (lambda: concentrate(z[0], z[1], LABELS + 1, GROUPS), "labels"),
        (lambda: smooth_points(z[0], 6), "components"),
        (lambda: ink_points(torch.zeros(1, 1, 3, 4)), "images"),
        (lambda: assisted(z[0], z[0], z, weights - 1), "weights"),
        (lambda: train_assisted(build, X, wide, wide, wide, weights=[], seeds=1, **TRAINING), "weights"),
        (lambda: train_assisted(build, X, wide, wide, wide, weights=[(0.0, -1.0)], seeds=1, **TRAINING), "weights"),
        (
            lambda: train_assisted(build, X, wide, wide * math.nan, wide, weights=[(0, 1)], seeds=1, **TRAINING),
            "teacher",
        ),
    ):
        with pytest.raises(ValueError, match=name):
            call()
